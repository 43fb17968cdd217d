use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use serde_json::json;

use super::*;
use crate::disk::hooked::{Call, Fate, hooked};
use crate::{Checkpoint, RealDisk, SimulatedDisk, list};

pub(super) fn specs() -> Vec<TensorSpec> {
    let spec = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), shape: shape.to_vec() };
    vec![spec("w", &[2, 3]), spec("b", &[3]), spec("empty", &[0, 4])]
}

/// Offers a snapshot whose every number tells `seed`.
pub(super) fn offer(writer: &mut Writer, step: u64, seed: f32) -> Offer {
    let attachment = Attachment { name: "recipe.toml".into(), bytes: Arc::from(format!("seed = {seed}").as_bytes()) };
    writer.offer(step, json!({ "seed": seed }), vec![attachment], |snapshot| {
        for index in 0..2 {
            for (offset, value) in snapshot.tensor(index).iter_mut().enumerate() {
                *value = seed + (10 * index + offset) as f32;
            }
        }
    })
}

/// Loads all that [`offer`] wrote.
pub(super) fn check_content(checkpoint: &Checkpoint, step: u64, seed: f32) -> Result<(), CheckpointError> {
    let (mut w, mut b) = ([0.0; 6], [0.0; 3]);
    checkpoint.verify()?;
    checkpoint.tensor("w", &[2, 3], &mut w)?;
    checkpoint.tensor("b", &[3], &mut b)?;
    checkpoint.tensor("empty", &[0, 4], &mut [])?;
    assert_eq!(w, std::array::from_fn(|offset| seed + offset as f32));
    assert_eq!(b, std::array::from_fn(|offset| seed + (10 + offset) as f32));
    assert_eq!(checkpoint.step(), step);
    assert_eq!(checkpoint.state(), &json!({ "seed": seed }));
    assert_eq!(checkpoint.attachment("recipe.toml")?, format!("seed = {seed}").as_bytes());
    Ok(())
}

pub(super) fn writer(disk: Arc<dyn Disk>, folder: &Path, keep_last: usize) -> Result<Writer, CheckpointError> {
    Writer::new(disk, folder.to_path_buf(), specs(), Retention::last(keep_last))
}

fn steps(folder: &Path) -> Vec<u64> {
    list(folder).unwrap().into_iter().map(|(step, _)| step).collect()
}

/// The one outcome's error, as text.
fn failure(outcomes: &[Outcome]) -> String {
    match outcomes {
        [Outcome::Failed { error, .. }] => error.to_string(),
        other => panic!("expected one failure, found {other:?}"),
    }
}

fn assert_committed(outcomes: &[Outcome], steps: &[u64]) {
    let committed: Vec<u64> = (outcomes.iter())
        .filter_map(|outcome| match outcome {
            Outcome::Committed { step, .. } => Some(*step),
            _ => None,
        })
        .collect();
    assert!(committed == steps && outcomes.len() == steps.len(), "{outcomes:?}");
}

#[test]
fn a_checkpoint_comes_back_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("runs/a/checkpoints");
    let mut writer = writer(Arc::new(RealDisk), &folder, 0).unwrap();
    assert!(matches!(offer(&mut writer, 100, 0.5), Offer::Taken { .. }));
    let outcomes = writer.flush();
    let [Outcome::Committed { step: 100, path, bytes, removed, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
    assert_eq!(list(&folder).unwrap(), [(100, path.clone())]);
    assert_eq!(path, &folder.join("step-00000100"));
    assert!(removed.is_empty());
    let on_disk: u64 = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(*bytes, on_disk);
    let checkpoint = Checkpoint::open(path).unwrap();
    check_content(&checkpoint, 100, 0.5).unwrap();
    assert_eq!(checkpoint.manifest().files.len(), 2);
}

#[test]
fn a_tensor_of_more_than_one_chunk_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let count = (1 << 18) + 3;
    let specs = vec![TensorSpec { name: "w".into(), shape: vec![count] }];
    let mut writer = Writer::new(Arc::new(RealDisk), root.path().to_path_buf(), specs, Retention::last(0)).unwrap();
    writer.offer(1, Value::Null, Vec::new(), |snapshot| {
        snapshot.tensor(0).iter_mut().enumerate().for_each(|(index, value)| *value = index as f32);
    });
    assert_committed(&writer.flush(), &[1]);
    let mut found = vec![0.0; count];
    Checkpoint::open(&root.path().join("step-00000001")).unwrap().tensor("w", &[count], &mut found).unwrap();
    assert!(found.iter().enumerate().all(|(index, &value)| value == index as f32));
}

#[test]
fn retention_keeps_the_newest_and_buffers_are_reused() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = writer(Arc::new(RealDisk), root.path(), 2).unwrap();
    let mut gone = Vec::new();
    for step in 1..=5 {
        offer(&mut writer, step, step as f32);
        for outcome in writer.flush() {
            let Outcome::Committed { removed, .. } = outcome else { panic!("{outcome:?}") };
            gone.extend(removed);
        }
    }
    assert_eq!(gone, [1, 2, 3]);
    assert_eq!(steps(root.path()), [4, 5]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "nothing else is left");
    assert_eq!(writer.spare.len(), 1, "one snapshot at a time needs one buffer");
}

/// Saves steps 1 to 6 by a writer each, damages the manifest of step 3 in between, if that is wanted, and says which steps
/// are left.
fn left_after(retention: Retention, damaged: bool) -> Vec<u64> {
    let scores = [Some(0.3), Some(0.1), Some(0.05), Some(0.2), None, Some(0.9)];
    let root = tempfile::tempdir().unwrap();
    for (index, score) in scores.into_iter().enumerate() {
        let step = index as u64 + 1;
        let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), specs(), retention).unwrap();
        writer.offer(step, json!({ SCORE: score }), Vec::new(), |snapshot| {
            (0..2).for_each(|index| snapshot.tensor(index).fill(step as f32));
        });
        assert_committed(&writer.flush(), &[step]);
        if damaged && step == 3 {
            fs::write(root.path().join("step-00000003/manifest.json"), b"{}").unwrap();
        }
    }
    steps(root.path())
}

#[test]
fn the_best_are_known_from_their_manifests_and_every_so_many_stay() {
    let keep = |keep_last, keep_every, keep_best| Retention { keep_last, keep_every, keep_best };
    assert_eq!(left_after(keep(1, 0, 0), false), [6]);
    assert_eq!(left_after(keep(1, 0, 1), false), [3, 6]);
    assert_eq!(left_after(keep(1, 0, 2), false), [2, 3, 6]);
    assert_eq!(left_after(keep(1, 5, 1), false), [3, 5, 6]);
    // One whose manifest says nothing any more is not among the best.
    assert_eq!(left_after(keep(1, 0, 1), true), [4, 6]);
    assert_eq!(left_after(keep(1, 0, 2), true), [2, 4, 6]);
    assert_eq!(left_after(keep(2, 0, 1), true), [2, 5, 6]);
}

#[test]
fn a_third_snapshot_is_refused_while_two_are_in_flight() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let theirs = Arc::clone(&gate);
    let simulated = SimulatedDisk::new();
    simulated.create_dir(Path::new("/c")).unwrap();
    let disk = hooked(&simulated, move |call| {
        if call == Call::CreateDir {
            drop(theirs.1.wait_while(theirs.0.lock().unwrap(), |open| !*open).unwrap());
        }
        Fate::Pass
    });
    let mut writer = writer(disk, Path::new("/c"), 0).unwrap();
    assert!(matches!(offer(&mut writer, 1, 1.0), Offer::Taken { .. }));
    assert!(matches!(offer(&mut writer, 2, 2.0), Offer::Taken { .. }));
    assert_eq!(writer.offer(3, Value::Null, Vec::new(), |_| panic!("nothing is copied")), Offer::Busy);
    assert!(writer.outcomes().is_empty());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_committed(&writer.flush(), &[1, 2]);
    assert!(matches!(offer(&mut writer, 3, 3.0), Offer::Taken { .. }));
    assert_committed(&writer.flush(), &[3]);
    assert_eq!(writer.spare.len(), 2, "two buffers and no more");
}

#[test]
fn dropping_the_writer_finishes_what_is_in_flight() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = writer(Arc::new(RealDisk), root.path(), 0).unwrap();
    offer(&mut writer, 1, 1.0);
    offer(&mut writer, 2, 2.0);
    drop(writer);
    assert_eq!(steps(root.path()), [1, 2]);
}

#[test]
fn a_panic_in_the_thread_fails_its_snapshot_alone() {
    let armed = Arc::new(AtomicBool::new(true));
    let disk = hooked(&SimulatedDisk::new(), move |call| {
        assert!(call != Call::Sync || !armed.swap(false, Ordering::SeqCst), "the disk is on fire");
        Fate::Pass
    });
    let mut writer = writer(disk, Path::new("/c"), 0).unwrap();
    offer(&mut writer, 1, 1.0);
    let message = failure(&writer.flush());
    assert!(message.contains("step 1") && message.contains("the disk is on fire"), "{message}");
    offer(&mut writer, 1, 1.0);
    assert_committed(&writer.flush(), &[1]);
}

/// Thrown as a panic it kills the thread: dropping it after it was caught panics again.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("the second panic, which nobody catches");
    }
}

#[test]
fn the_death_of_the_thread_is_told_and_nothing_hangs() {
    let disk = hooked(&SimulatedDisk::new(), |call| match call {
        Call::Sync => std::panic::panic_any(Bomb),
        Call::CreateDir | Call::SyncDir | Call::Rename => Fate::Pass,
    });
    let mut writer = writer(disk, Path::new("/c"), 0).unwrap();
    offer(&mut writer, 1, 1.0);
    assert!(failure(&writer.flush()).contains("step 1: the checkpoint writer's thread has died"));
    offer(&mut writer, 2, 2.0);
    assert!(failure(&writer.flush()).contains("step 2: the checkpoint writer's thread has died"));
    assert!(writer.outcomes().is_empty());
}

#[test]
fn a_tensor_that_was_not_filled_fails_the_snapshot() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = writer(Arc::new(RealDisk), root.path(), 0).unwrap();
    let taken = writer.offer(9, Value::Null, Vec::new(), |snapshot| snapshot.tensor(0).fill(1.0));
    assert!(matches!(taken, Offer::Taken { .. }));
    let message = failure(&writer.flush());
    assert!(message.contains("step 9") && message.contains("did not fill tensor b"), "{message}");
    assert!(steps(root.path()).is_empty());
}

#[test]
fn an_attachment_that_climbs_out_or_collides_fails_the_snapshot() {
    for name in ["../recipe.toml", "/recipe.toml", "manifest.json", "rank-0000.safetensors", ""] {
        let root = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(Arc::new(RealDisk), root.path().into(), Vec::new(), Retention::last(0)).unwrap();
        let attachment = Attachment { name: name.into(), bytes: Arc::from([1, 2, 3]) };
        writer.offer(1, Value::Null, vec![attachment], |_| {});
        assert!(failure(&writer.flush()).contains(&format!("{name:?}")));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}

#[test]
fn specs_that_make_no_sense_are_refused() {
    let check = |names: &[&str], shape: &[usize], expected: &str| {
        let specs = names.iter().map(|&name| TensorSpec { name: name.into(), shape: shape.to_vec() }).collect();
        let disk = Arc::new(SimulatedDisk::new());
        let fault = Writer::new(disk, "/c".into(), specs, Retention::last(0)).unwrap_err().to_string();
        assert!(fault.contains(expected), "{fault}");
    };
    check(&["a", "a"], &[1], "two tensors have it");
    check(&[""], &[1], "it is empty");
    check(&["a"], &[usize::MAX, 2], "more elements than can be addressed");
    check(&["a", "b"], &[usize::MAX / 8], "more elements than can be addressed");
}

#[test]
fn the_same_step_again_is_kept_or_replaced() {
    let root = tempfile::tempdir().unwrap();
    let mut writer = writer(Arc::new(RealDisk), root.path(), 0).unwrap();
    let path = root.path().join("step-00000001");
    offer(&mut writer, 1, 1.0);
    assert_committed(&writer.flush(), &[1]);
    let check = |writer: &mut Writer, seed: f32, kept: bool| {
        fs::write(path.join("note.txt"), b"mine").unwrap();
        offer(writer, 1, seed);
        assert_committed(&writer.flush(), &[1]);
        check_content(&Checkpoint::open(&path).unwrap(), 1, seed).unwrap();
        assert_eq!(path.join("note.txt").exists(), kept);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing else is left");
    };
    check(&mut writer, 1.0, true);
    check(&mut writer, 2.0, false);
    let mut bytes = fs::read(path.join("rank-0000.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path.join("rank-0000.safetensors"), bytes).unwrap();
    check(&mut writer, 2.0, false);
}

#[test]
fn a_new_writer_puts_the_folder_in_order() {
    let root = tempfile::tempdir().unwrap();
    let mut first = writer(Arc::new(RealDisk), root.path(), 0).unwrap();
    offer(&mut first, 1, 1.0);
    offer(&mut first, 2, 2.0);
    drop(first);
    let at = |name: &str| root.path().join(name);
    fs::rename(at("step-00000002"), at("step-00000002.replaced")).unwrap();
    fs::create_dir(at("step-00000001.replaced")).unwrap();
    for name in ["step-00000003.partial", "step-00000001.replaced.partial", "mine.partial", "step-3.partial"] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("file"), b"half").unwrap();
    }
    assert_eq!(list(root.path()).unwrap(), [(1, at("step-00000001")), (2, at("step-00000002.replaced"))]);
    drop(writer(Arc::new(RealDisk), root.path(), 0).unwrap());
    let mut names = RealDisk.list(root.path()).unwrap();
    names.sort();
    assert_eq!(names, ["mine.partial", "step-00000001", "step-00000002", "step-3.partial"]);
    check_content(&Checkpoint::open(&at("step-00000002")).unwrap(), 2, 2.0).unwrap();
}
