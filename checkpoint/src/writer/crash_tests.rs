//! The machine stops, or the disk fails, at every single operation of a save.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{check_content, offer, writer};
use super::*;
use crate::disk::hooked::{Call, Fate, hooked};
use crate::{Checkpoint, SimulatedDisk, layout, list};

pub(crate) const FOLDER: &str = "/checkpoints";

/// A disk with the committed checkpoint of step 1.
pub(crate) fn base() -> SimulatedDisk {
    saved(1, 1.0)
}

/// A disk with the committed checkpoint of that step alone.
pub(crate) fn saved(step: u64, seed: f32) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    assert!(save(Arc::new(disk.clone()), step, seed, false));
    disk.after_crash()
}

/// Saves `step` through `disk`, packed or not, and says whether it was reported as committed.
fn save(disk: Arc<dyn Disk>, step: u64, seed: f32, packs: bool) -> bool {
    let Ok(mut writer) = writer(disk, Path::new(FOLDER), 1) else { return false };
    writer.pack(packs);
    offer(&mut writer, step, seed);
    matches!(writer.flush()[..], [Outcome::Committed { .. }])
}

/// Disks in disorder that are looked at after each crash.
const DISORDERS: usize = 4;

/// What a machine that stopped at operation `crash` may find: what was durable, what was done, and things in between.
pub(crate) fn remains(disk: &SimulatedDisk, crash: usize) -> impl Iterator<Item = SimulatedDisk> {
    let disorder = move |turn| disk.after_crash_in_disorder((DISORDERS * crash + turn) as u64);
    [disk.after_crash(), disk.after_kill()].into_iter().chain((0..DISORDERS).map(disorder))
}

/// The control of the tests of failures: a disk whose failing sync says nothing loses what was reported.
#[test]
fn a_failing_sync_that_says_nothing_is_noticed() {
    for quiet in 0..6 {
        let disk = base();
        let syncs = AtomicUsize::new(0);
        let hooked = hooked(&disk, move |call| match call {
            Call::Sync | Call::SyncDir if syncs.fetch_add(1, Ordering::SeqCst) == quiet => Fate::Skip,
            _ => Fate::Pass,
        });
        let newest = save(hooked, 2, 2.0, false).then_some((2, 2.0));
        let found: Result<(), String> =
            remains(&disk, quiet).try_for_each(|left| check(&left, &[(1, 1.0), (2, 2.0)], newest));
        // That of the commit is of the same folder as the next one, of the older checkpoint's removal.
        assert_eq!(found.is_err(), quiet != 4, "sync {quiet}: {found:?}");
    }
}

/// What disks say: that they are full, and that they cannot read or write.
pub(super) fn kinds() -> [io::ErrorKind; 2] {
    use rustix::io::Errno;
    [Errno::NOSPC, Errno::IO].map(|errno| io::Error::from(errno).kind())
}

/// The checkpoints that are listed (step, seed). Every one must verify and load.
pub(crate) fn found(disk: &SimulatedDisk) -> Result<Vec<(u64, f32)>, String> {
    let root = tempfile::tempdir().unwrap();
    disk.dump(root.path()).unwrap();
    let listed = list(&root.path().join(&FOLDER[1..])).map_err(|fault| fault.to_string())?;
    let seed = |(step, path): (u64, PathBuf)| {
        let checkpoint = Checkpoint::open(&path)?;
        let seed = checkpoint.state()["seed"].as_f64().unwrap() as f32;
        check_content(&checkpoint, step, seed).map(|()| (step, seed))
    };
    listed.into_iter().map(|listed| seed(listed).map_err(|fault| fault.to_string())).collect()
}

/// Every checkpoint that is listed must load, and be one of `allowed` (step, seed); the newest must be `newest` if given.
pub(super) fn check(disk: &SimulatedDisk, allowed: &[(u64, f32)], newest: Option<(u64, f32)>) -> Result<(), String> {
    let found = found(disk)?;
    if let Some((step, seed)) = found.iter().find(|found| !allowed.contains(found)) {
        return Err(format!("step {step} with seed {seed} is none of {allowed:?}"));
    }
    match (found.last().copied(), newest) {
        (None, _) => Err("no checkpoint is left".to_owned()),
        (found, Some(_)) if found != newest => Err(format!("{newest:?} was reported, {found:?} was found")),
        _ => Ok(()),
    }
}

/// Stops at each operation of a save of `step`, `skipped` being the one sync that does nothing, and looks at what a loss
/// of power and what a kill [leave](remains). The first fault found, if any; otherwise how many operations there are.
fn crash_everywhere(step: u64, skipped: Option<usize>, packs: bool) -> Result<usize, String> {
    let allowed = [(1, 1.0), (step, 2.0)];
    for crash in 0.. {
        let disk = base();
        disk.crash_at(crash);
        let syncs = AtomicUsize::new(0);
        let hooked = hooked(&disk, move |call| match call {
            Call::Sync | Call::SyncDir if Some(syncs.fetch_add(1, Ordering::SeqCst)) == skipped => Fate::Skip,
            _ => Fate::Pass,
        });
        let newest = save(hooked, step, 2.0, packs).then_some((step, 2.0));
        for left in remains(&disk, crash) {
            check(&left, &allowed, newest).map_err(|fault| format!("operation {crash}: {fault}"))?;
            assert!(save(Arc::new(left.clone()), 3, 3.0, packs), "the next run saves");
            assert_eq!(left.list(Path::new(FOLDER)).unwrap(), ["step-00000003"], "and puts the folder in order");
        }
        if disk.operations() <= crash {
            return Ok(crash);
        }
    }
    unreachable!("the loop ends when no operation is left to crash at")
}

#[test]
fn a_crash_at_any_operation_leaves_whole_checkpoints_only() {
    for packs in [false, true] {
        let operations = crash_everywhere(2, None, packs).unwrap();
        assert!(operations > 20, "a save has more operations than {operations}");
    }
}

/// The control of the test above: each sync is there for a reason, and leaving out any one of them is found.
#[test]
fn a_crash_after_any_left_out_sync_is_noticed() {
    [false, true].into_iter().for_each(left_out_syncs_are_noticed);
}

fn left_out_syncs_are_noticed(packs: bool) {
    let syncs = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&syncs);
    let counting = hooked(&base(), move |call| {
        if matches!(call, Call::Sync | Call::SyncDir) {
            theirs.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    assert!(save(counting, 2, 2.0, packs));
    let syncs = syncs.load(Ordering::SeqCst);
    assert_eq!(syncs, 6, "shard, attachment, manifest, their folder, the commit, the removal");
    for skipped in 0..syncs {
        let found = crash_everywhere(2, Some(skipped), packs);
        assert!(found.is_err(), "sync {skipped} can be left out unnoticed");
    }
}

#[test]
fn a_crash_while_a_step_is_replaced_leaves_one_or_the_other() {
    for packs in [false, true] {
        let operations = crash_everywhere(1, None, packs).unwrap();
        assert!(operations > 20, "a save has more operations than {operations}");
    }
}

#[test]
fn a_failure_at_any_operation_leaves_the_older_one_and_the_next_save_works() {
    for (kind, packs) in kinds().into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let mut failed = 0;
        for index in 0.. {
            let disk = base();
            let mut writer = writer(Arc::new(disk.clone()), Path::new(FOLDER), 1).unwrap();
            writer.pack(packs);
            let start = disk.operations();
            disk.fail_at(start + index, kind);
            offer(&mut writer, 2, 2.0);
            let outcomes = writer.flush();
            let newest = match &outcomes[..] {
                [Outcome::Committed { .. }] => Some((2, 2.0)),
                [Outcome::Failed { step: 2, error }] => {
                    failed += 1;
                    assert!(error.to_string().contains(FOLDER), "{error}");
                    None
                }
                other => panic!("{other:?}"),
            };
            let allowed = [(1, 1.0), (2, 2.0)];
            check(&disk, &allowed, newest).unwrap_or_else(|fault| panic!("operation {index}: {fault}"));
            // What was reported is durable, and so is what was there if nothing was.
            for left in remains(&disk, index) {
                check(&left, &allowed, newest)
                    .unwrap_or_else(|fault| panic!("operation {index}, then a crash: {fault}"));
            }
            if newest.is_none() {
                assert!(disk.exists(&Path::new(FOLDER).join("step-00000001")).unwrap(), "the older one is intact");
            }
            if disk.operations() <= start + index {
                break;
            }
            offer(&mut writer, 3, 3.0);
            assert!(matches!(writer.flush()[..], [Outcome::Committed { step: 3, .. }]), "operation {index}");
            check(&disk.after_crash(), &[(3, 3.0)], Some((3, 3.0))).unwrap();
        }
        assert!(failed > 12, "a save has more operations than {failed}");
    }
}

#[test]
fn a_failure_at_any_operation_of_a_replacement_leaves_one_or_the_other_and_the_next_save_works() {
    // Other content, packed and not; the same content; and where what would undo a failure fails at once too.
    for (packs, seed, failures) in [(false, 2.0, 1), (true, 2.0, 1), (false, 1.0, 1), (false, 2.0, 2)] {
        for kind in kinds() {
            let aside = fail_everywhere_in_a_replacement(kind, (packs, seed), failures);
            // The control: the failure that nothing undoes shows that there was something to undo.
            assert_eq!(aside, failures - 1, "packed: {packs}, seed {seed}: nobody puts back what was set aside");
        }
    }
}

/// Saves step 1 again, where so many operations fail in a row, from each one on. Returns how often the checkpoint that was to be
/// replaced waits under its other name then, with none in its place.
fn fail_everywhere_in_a_replacement(kind: io::ErrorKind, (packs, seed): (bool, f32), failures: usize) -> usize {
    let (mut failed, mut aside) = (0, 0);
    for index in 0.. {
        let disk = base();
        let mut writer = writer(Arc::new(disk.clone()), Path::new(FOLDER), 1).unwrap();
        writer.pack(packs);
        let start = disk.operations() + index;
        (start..start + failures).for_each(|operation| disk.fail_at(operation, kind));
        offer(&mut writer, 1, seed);
        let outcomes = writer.flush();
        let newest = match &outcomes[..] {
            [Outcome::Committed { .. }] => Some((1, seed)),
            [Outcome::Failed { step: 1, .. }] => None,
            other => panic!("{other:?}"),
        };
        failed += usize::from(newest.is_none());
        let allowed = [(1, 1.0), (1, seed)];
        check(&disk, &allowed, newest).unwrap_or_else(|fault| panic!("operation {index}: {fault}"));
        for left in remains(&disk, index) {
            check(&left, &allowed, newest).unwrap_or_else(|fault| panic!("operation {index}, then a crash: {fault}"));
        }
        let is_there = |name: String| disk.exists(&Path::new(FOLDER).join(name)).unwrap();
        // What is planned and did not come to pass would meet the questions.
        let over = disk.operations() < start + failures;
        if over {
            break;
        }
        aside += usize::from(is_there(layout::replaced(1)) && !is_there(layout::committed(1)));
        offer(&mut writer, 3, 3.0);
        assert!(matches!(writer.flush()[..], [Outcome::Committed { step: 3, .. }]), "operation {index}");
        check(&disk.after_crash(), &[(3, 3.0)], Some((3, 3.0))).unwrap();
        assert_eq!(disk.list(Path::new(FOLDER)).unwrap(), ["step-00000003"]);
    }
    assert!(failed > 12, "a save has more operations than {failed}");
    aside
}

#[test]
fn a_short_write_at_any_operation_costs_nothing() {
    [false, true].into_iter().for_each(short_writes_cost_nothing);
}

fn short_writes_cost_nothing(packs: bool) {
    let (mut short, before) = (0, operations_of_a_save(packs));
    for index in 0.. {
        let disk = base();
        let mut writer = writer(Arc::new(disk.clone()), Path::new(FOLDER), 1).unwrap();
        writer.pack(packs);
        let start = disk.operations();
        disk.short_at(start + index);
        offer(&mut writer, 2, 2.0);
        assert!(matches!(writer.flush()[..], [Outcome::Committed { step: 2, .. }]), "operation {index}");
        check(&disk.after_crash(), &[(2, 2.0)], Some((2, 2.0))).unwrap();
        // What was left over took a call of its own.
        short += usize::from(disk.operations() - start > before);
        if disk.operations() <= start + index {
            break;
        }
    }
    assert!(short >= 5, "header, values, attachment and manifest are written, found {short} writes");
}

fn operations_of_a_save(packs: bool) -> usize {
    let disk = base();
    let mut writer = writer(Arc::new(disk.clone()), Path::new(FOLDER), 1).unwrap();
    writer.pack(packs);
    let start = disk.operations();
    offer(&mut writer, 2, 2.0);
    writer.flush();
    disk.operations() - start
}
