//! What is left when a run of several ranks ends in the middle of a save.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::member_tests::{FOLDER, commit, dumped, failure, members, names, offer, part, parts, save, simulated};
use super::tests::check_content;
use super::*;
use crate::disk::hooked::{Call, Fate, hooked};
use crate::{Checkpoint, SimulatedDisk};

#[test]
fn abandoning_leaves_nothing_but_what_is_committed() {
    let (disk, shared) = simulated();
    let mut writers = members(&shared, Path::new(FOLDER), 3, 0);
    let parts = parts(&mut writers, 1, 1.0);
    assert!(matches!(commit(&mut writers[0], 1, "a", parts), Outcome::Committed { .. }));
    // Nobody settles step 1, and step 2 is never committed; one rank has nothing of it.
    for writer in &mut writers[..2] {
        offer(writer, 2, 2.0);
        assert!(part(writer).is_some());
    }
    assert!(names(&disk).contains(&"step-00000002.partial".to_owned()), "the control: there is something to remove");
    // In any order, and again.
    for rank in [1, 0, 2, 0] {
        assert!(writers[rank].abandon().is_empty());
        assert_eq!(names(&disk), ["step-00000001"]);
    }
    // A rank that is late makes the folder anew, and removes it.
    offer(&mut writers[2], 2, 2.0);
    assert!(part(&mut writers[2]).is_some());
    writers[2].abandon();
    assert_eq!(names(&disk), ["step-00000001"]);
    save(&mut writers, 2, 2.0, "b");
    assert_eq!(names(&disk), ["step-00000001", "step-00000002"], "the writers can go on");
}

#[test]
fn abandoning_lets_the_job_at_hand_finish_and_no_other_begin() {
    let target = Arc::new(std::sync::OnceLock::<Arc<Target>>::new());
    let theirs = Arc::clone(&target);
    let simulated = SimulatedDisk::new();
    simulated.create_dir(Path::new(FOLDER)).unwrap();
    let disk = hooked(&simulated, move |call| {
        while call == Call::Sync && !theirs.get().is_some_and(|target| target.abandoned.load(Ordering::SeqCst)) {
            std::thread::yield_now();
        }
        Fate::Pass
    });
    let shared: Arc<dyn Disk> = disk;
    let mut lead = members(&shared, Path::new(FOLDER), 2, 0).remove(0);
    assert!(target.set(Arc::clone(&lead.target)).is_ok());
    let before = simulated.operations();
    offer(&mut lead, 1, 1.0);
    offer(&mut lead, 2, 2.0);
    // The first is begun: only then is it the job at hand.
    while simulated.operations() == before {
        std::thread::yield_now();
    }
    let outcomes = lead.abandon();
    assert!(matches!(&outcomes[..], [Outcome::Written { step: 1, .. }, Outcome::Failed { step: 2, .. }]));
    assert!(failure(&outcomes[1]).contains("step 2: the run was abandoned"));
    assert!(names(&simulated).is_empty());
}

/// The lead stops right before it renames the folder that it commits; `meanwhile` runs on another member. Returns what
/// became of the commit.
fn commit_with_a_stop(disk: &SimulatedDisk, meanwhile: impl FnOnce(&mut Writer)) -> Outcome {
    let (reached, wait_reached) = sync_channel(1);
    let (go_on, wait_go_on) = sync_channel::<()>(1);
    let wait_go_on = std::sync::Mutex::new(Some(wait_go_on));
    let hooked = hooked(disk, move |call| {
        if call == Call::Rename
            && let Some(wait) = wait_go_on.lock().unwrap().take()
        {
            reached.send(()).unwrap();
            wait.recv().unwrap();
        }
        Fate::Pass
    });
    let (theirs, leads): (Arc<dyn Disk>, Arc<dyn Disk>) = (Arc::new(disk.clone()), hooked);
    let mut lead = members(&leads, Path::new(FOLDER), 2, 0).remove(0);
    let mut other = members(&theirs, Path::new(FOLDER), 2, 0).remove(1);
    let parts = [&mut lead, &mut other].map(|writer| {
        offer(writer, 2, 2.0);
        part(writer).unwrap()
    });
    lead.commit(2, "b".into(), parts.to_vec());
    wait_reached.recv().unwrap();
    meanwhile(&mut other);
    go_on.send(()).unwrap();
    let outcome = lead.flush().pop().unwrap();
    other.abandon();
    lead.abandon();
    outcome
}

#[test]
fn a_member_that_abandons_while_the_lead_commits_leaves_all_or_nothing() {
    let disk = SimulatedDisk::new();
    let outcome = commit_with_a_stop(&disk, |other| drop(other.abandon()));
    assert!(failure(&outcome).contains("could not rename"), "{outcome:?}");
    assert!(names(&disk).is_empty());
    // Nor is anything committed of which a part is gone: a removal takes one file after the other, and this one stops
    // half way.
    let disk = SimulatedDisk::new();
    let outcome = commit_with_a_stop(&disk, |other| {
        disk.fail_at(disk.operations() + 1, std::io::ErrorKind::Other);
        drop(other.abandon());
    });
    assert!(failure(&outcome).contains("could not rename"), "{outcome:?}");
    assert_eq!(names(&disk), ["step-00000002.rank-0001.partial"], "it counts for nothing");
    drop(members(&(Arc::new(disk.clone()) as Arc<dyn Disk>), Path::new(FOLDER), 1, 0));
    assert!(names(&disk).is_empty(), "and the next lead sweeps it");
    // The control: the same removal without the rename before it, and half a checkpoint is committed.
    let disk = SimulatedDisk::new();
    let outcome = commit_with_a_stop(&disk, |_| {
        disk.fail_at(disk.operations(), std::io::ErrorKind::Other);
        disk.remove_dir_all(&Path::new(FOLDER).join("step-00000002.partial")).unwrap_err();
    });
    assert!(matches!(outcome, Outcome::Committed { .. }));
    let (_root, folder) = dumped(&disk);
    Checkpoint::open(&folder.join("step-00000002")).unwrap_err();
}

#[test]
fn abandoning_after_the_commit_takes_nothing_away() {
    let disk = SimulatedDisk::new();
    assert!(matches!(commit_with_a_stop(&disk, |_| {}), Outcome::Committed { .. }));
    let (_root, folder) = dumped(&disk);
    check_content(&Checkpoint::open(&folder.join("step-00000002")).unwrap(), 2, 2.0).unwrap();
}

#[test]
fn the_death_of_a_members_thread_is_told_and_its_step_can_be_settled() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("the second panic, which nobody catches");
        }
    }
    let (disk, shared) = simulated();
    let deadly: Arc<dyn Disk> = hooked(&disk, |call| match call {
        Call::Sync => std::panic::panic_any(Bomb),
        _ => Fate::Pass,
    });
    drop(members(&shared, Path::new(FOLDER), 1, 0));
    let mut writer = members(&deadly, Path::new(FOLDER), 2, 0).remove(1);
    for step in [1, 2] {
        offer(&mut writer, step, 1.0);
        assert!(failure(&writer.flush().pop().unwrap()).contains("thread has died"));
        assert!(!writer.ready(step));
    }
    assert_eq!(names(&disk), ["step-00000001.partial"]);
    writer.settle(1, false);
    assert!(names(&disk).is_empty() && writer.ready(1));
    assert!(writer.abandon().is_empty() && writer.flights.is_empty());
}
