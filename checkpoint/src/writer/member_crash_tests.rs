//! The machine stops, or the disk fails, at every single operation of a save by two ranks.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::crash_tests::{FOLDER, base, check, kinds, remains};
use super::member_tests::{offer, part, try_members};
use super::*;
use crate::disk::hooked::{Call, Fate, hooked};

/// Saves `step` by two ranks, packed or not, and says whether it was reported as committed.
fn save(disk: &Arc<dyn Disk>, step: u64, seed: f32, packs: bool) -> bool {
    let Ok(mut writers) = try_members(disk, Path::new(FOLDER), 2, 1) else { return false };
    writers.iter().for_each(|writer| writer.pack(packs));
    try_save(&mut writers, step, seed)
}

fn try_save(writers: &mut [Writer], step: u64, seed: f32) -> bool {
    let kept = try_commit(writers, step, seed);
    for writer in writers {
        writer.settle(step, kept);
        writer.flush();
        assert!(writer.ready(step), "its place is free whatever happened");
    }
    kept
}

/// One rank writes after the other, then the lead commits if both have: the order of operations is always the same.
fn try_commit(writers: &mut [Writer], step: u64, seed: f32) -> bool {
    let mut parts = Vec::new();
    for writer in writers.iter_mut() {
        assert!(matches!(offer(writer, step, seed), Offer::Taken { .. }));
        parts.extend(part(writer));
    }
    if parts.len() < writers.len() {
        return false;
    }
    writers[0].commit(step, format!("step {step} of {seed}"), parts);
    matches!(writers[0].flush()[..], [Outcome::Committed { .. }])
}

/// As for a writer alone: stops at each operation of a save of `step`, `skipped` being the one sync that does nothing.
/// The first fault found, if any; otherwise how many operations there are.
fn crash_everywhere(step: u64, skipped: Option<usize>, packs: bool) -> Result<usize, String> {
    let allowed = [(1, 1.0), (step, 2.0)];
    for crash in 0.. {
        let disk = base();
        disk.crash_at(crash);
        let syncs = AtomicUsize::new(0);
        let hooked: Arc<dyn Disk> = hooked(&disk, move |call| match call {
            Call::Sync | Call::SyncDir if Some(syncs.fetch_add(1, Ordering::SeqCst)) == skipped => Fate::Skip,
            _ => Fate::Pass,
        });
        let newest = save(&hooked, step, 2.0, packs).then_some((step, 2.0));
        for left in remains(&disk, crash) {
            check(&left, &allowed, newest).map_err(|fault| format!("operation {crash}: {fault}"))?;
            let again: Arc<dyn Disk> = Arc::new(left.clone());
            assert!(save(&again, 3, 3.0, packs), "the next run saves");
            assert_eq!(left.list(Path::new(FOLDER)).unwrap(), ["step-00000003"], "and puts the folder in order");
        }
        if disk.operations() <= crash {
            return Ok(crash);
        }
    }
    unreachable!("the loop ends when no operation is left to crash at")
}

#[test]
fn a_crash_at_any_operation_of_two_ranks_leaves_whole_checkpoints_only() {
    for packs in [false, true] {
        let operations = crash_everywhere(2, None, packs).unwrap();
        assert!(operations > 30, "a save by two has more operations than {operations}");
    }
}

#[test]
fn a_crash_while_two_ranks_replace_a_step_leaves_one_or_the_other() {
    let operations = crash_everywhere(1, None, false).unwrap();
    assert!(operations > 30, "a save by two has more operations than {operations}");
}

/// The control of the tests above. On one machine the lead's sync of the folder makes the other ranks' names durable with
/// its own, so that their syncs of it can be left out unnoticed; they are for machines that share it over a network.
#[test]
fn a_crash_after_any_left_out_sync_of_two_ranks_is_noticed() {
    let syncs = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&syncs);
    let counting: Arc<dyn Disk> = hooked(&base(), move |call| {
        if matches!(call, Call::Sync | Call::SyncDir) {
            theirs.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    assert!(save(&counting, 2, 2.0, false));
    let syncs = syncs.load(Ordering::SeqCst);
    assert_eq!(syncs, 9, "two shards, each with its name, attachment, manifest, their folder, the commit, the removal");
    let ranks_names = [1, 3];
    for skipped in 0..syncs {
        let found = crash_everywhere(2, Some(skipped), false);
        assert_eq!(found.is_ok(), ranks_names.contains(&skipped), "sync {skipped}: {found:?}");
    }
}

#[test]
fn a_failure_at_any_operation_of_two_ranks_leaves_the_older_one_and_the_next_save_works() {
    kinds().into_iter().flat_map(|kind| [(kind, false), (kind, true)]).for_each(fail_everywhere);
}

fn fail_everywhere((kind, packs): (std::io::ErrorKind, bool)) {
    let mut failed = 0;
    for index in 0.. {
        let disk = base();
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let mut writers = try_members(&shared, Path::new(FOLDER), 2, 1).unwrap();
        writers.iter().for_each(|writer| writer.pack(packs));
        let start = disk.operations();
        disk.fail_at(start + index, kind);
        let newest = try_save(&mut writers, 2, 2.0).then_some((2, 2.0));
        failed += usize::from(newest.is_none());
        let allowed = [(1, 1.0), (2, 2.0)];
        check(&disk, &allowed, newest).unwrap_or_else(|fault| panic!("operation {index}: {fault}"));
        for left in remains(&disk, index) {
            check(&left, &allowed, newest).unwrap_or_else(|fault| panic!("operation {index}, then a crash: {fault}"));
        }
        if disk.operations() <= start + index {
            break;
        }
        // The same step again, over whatever the failure has left.
        assert!(try_save(&mut writers, 2, 4.0), "operation {index}");
        check(&disk.after_crash(), &[(1, 1.0), (2, 4.0)], Some((2, 4.0))).unwrap();
        drop(writers);
        assert!(save(&shared, 3, 3.0, packs));
        assert_eq!(disk.list(Path::new(FOLDER)).unwrap(), ["step-00000003"]);
    }
    assert!(failed > 20, "a save by two has more operations than {failed}");
}

/// Abandoned at any failure, a save leaves nothing of its own.
#[test]
fn abandoning_after_a_failure_at_any_operation_leaves_nothing_of_the_step() {
    let mut failed = 0;
    for index in 0.. {
        let disk = base();
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let mut writers = try_members(&shared, Path::new(FOLDER), 2, 1).unwrap();
        let start = disk.operations();
        disk.fail_at(start + index, std::io::ErrorKind::StorageFull);
        let committed = try_commit(&mut writers, 2, 2.0);
        let done = disk.operations() <= start + index;
        writers.iter_mut().for_each(|writer| drop(writer.abandon()));
        if done {
            assert!(committed && index > 20, "a save by two has more operations than {index}");
            break;
        }
        failed += usize::from(!committed);
        let names = disk.list(Path::new(FOLDER)).unwrap();
        assert!(names.iter().all(|name| !name.ends_with(".partial")), "operation {index}: {names:?}");
        check(&disk, &[(1, 1.0), (2, 2.0)], committed.then_some((2, 2.0))).unwrap();
    }
    assert!(failed > 20, "{failed}");
}

#[test]
fn a_short_write_at_any_operation_of_two_ranks_costs_nothing() {
    [false, true].into_iter().for_each(short_writes_cost_nothing);
}

fn short_writes_cost_nothing(packs: bool) {
    for index in 0.. {
        let disk = base();
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let mut writers = try_members(&shared, Path::new(FOLDER), 2, 1).unwrap();
        writers.iter().for_each(|writer| writer.pack(packs));
        let start = disk.operations();
        disk.short_at(start + index);
        assert!(try_save(&mut writers, 2, 2.0), "operation {index}");
        check(&disk.after_crash(), &[(2, 2.0)], Some((2, 2.0))).unwrap();
        if disk.operations() <= start + index {
            assert!(index > 20, "a save by two has more operations than {index}");
            break;
        }
    }
}
