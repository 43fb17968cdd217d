//! The machine stops at every single operation of a fetch.

use std::sync::atomic::{AtomicUsize, Ordering};

use object_store::memory::InMemory;
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::SimulatedDisk;
use crate::disk::hooked::{Call, Fate, hooked};
use crate::store::Place;
use crate::store::send::send;
use crate::writer::crash_tests::{FOLDER, base, found, remains, saved};

/// What the store has: a step, and the number that tells its content.
const COPY: (u64, f32) = (2, 2.0);

/// A store with that copy.
struct Copies {
    shelf: Shelf,
    runtime: Runtime,
}

impl Copies {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let shelf = Shelf { store: Arc::new(InMemory::new()), place: Place::parse("s3://bucket/runs/a").unwrap() };
        let (step, seed) = COPY;
        let (disk, path) = (saved(step, seed), Path::new(FOLDER).join(layout::committed(step)));
        runtime.block_on(send(&shelf, At { step, seat: Seat::Shared }, &disk, &path)).unwrap();
        Self { shelf, runtime }
    }

    /// Brings the copy through `disk`, and says whether it was reported as there.
    fn bring(&self, disk: &dyn Disk) -> bool {
        let fetched = fetch(&self.shelf, COPY.0, &[Seat::Shared], disk, Path::new(FOLDER));
        self.runtime.block_on(fetched).is_ok()
    }
}

/// What is there where `before` was: that alone, or as well the copy, which must be there if it was reported.
fn check(disk: &SimulatedDisk, before: &[(u64, f32)], is_reported: bool) -> Result<bool, String> {
    let (found, with) = (found(disk)?, [before, &[COPY]].concat());
    match found == with || (found == before && !is_reported) {
        true => Ok(found == with),
        false => Err(format!("found {found:?} where {before:?} was, reported: {is_reported}")),
    }
}

/// Stops at each operation of a fetch to a disk like `start`, `skipped` being the one sync that does nothing, and looks at
/// what a loss of power and what a kill leave. The first fault found, if any; otherwise how many operations there are.
fn crash_everywhere(copies: &Copies, start: &SimulatedDisk, skipped: Option<usize>) -> Result<usize, String> {
    let before = found(start)?;
    for crash in 0.. {
        let disk = start.after_kill();
        disk.crash_at(crash);
        let syncs = AtomicUsize::new(0);
        let hooked = hooked(&disk, move |call| match call {
            Call::Sync | Call::SyncDir if Some(syncs.fetch_add(1, Ordering::SeqCst)) == skipped => Fate::Skip,
            _ => Fate::Pass,
        });
        let is_reported = copies.bring(&*hooked);
        for left in remains(&disk, crash) {
            let is_there = check(&left, &before, is_reported).map_err(|fault| format!("operation {crash}: {fault}"))?;
            if !is_there {
                assert!(copies.bring(&left), "operation {crash}: the next start brings it");
                assert_eq!(check(&left.after_crash(), &before, true), Ok(true), "operation {crash}");
            }
        }
        if disk.operations() <= crash {
            return Ok(crash);
        }
    }
    unreachable!("the loop ends when no operation is left to crash at")
}

/// Disks to bring a copy to: a new machine's, one with an older checkpoint, and one where a fetch was killed before its end.
fn starts(copies: &Copies) -> [SimulatedDisk; 3] {
    let killed = base();
    killed.crash_at(8);
    assert!(!copies.bring(&killed));
    let left_over = killed.after_kill();
    let partial = Path::new(FOLDER).join(layout::partial(&layout::committed(COPY.0)));
    assert!(left_over.exists(&partial).unwrap(), "it was killed in the middle");
    [SimulatedDisk::new(), base(), left_over]
}

#[test]
fn a_crash_at_any_operation_of_a_fetch_leaves_whole_checkpoints_only() {
    let copies = Copies::new();
    for start in starts(&copies) {
        let operations = crash_everywhere(&copies, &start, None).unwrap();
        assert!(operations > 12, "a fetch has more operations than {operations}");
    }
}

/// The control of the test above: each sync is there for a reason, and leaving out any one of them is found.
#[test]
fn a_crash_after_any_left_out_sync_of_a_fetch_is_noticed() {
    let copies = Copies::new();
    let syncs = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&syncs);
    let counting = hooked(&SimulatedDisk::new(), move |call| {
        if matches!(call, Call::Sync | Call::SyncDir) {
            theirs.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    assert!(copies.bring(&*counting));
    let syncs = syncs.load(Ordering::SeqCst);
    assert_eq!(syncs, 6, "the folder's own name, shard, attachment, manifest, their folder, the commit");
    for skipped in 0..syncs {
        let found = crash_everywhere(&copies, &SimulatedDisk::new(), Some(skipped));
        assert!(found.is_err(), "sync {skipped} can be left out unnoticed");
    }
}
