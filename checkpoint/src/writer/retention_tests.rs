//! The best checkpoint stays through crashes, and in every folder of machines that share none.

use std::path::Path;

use serde_json::json;

use super::crash_tests::{FOLDER, remains};
use super::member_tests::{commit, dumped, settle};
use super::tests::specs;
use super::*;
use crate::disk::watched::{Watch, Watched};
use crate::disk::{DiskFile, RealDisk};
use crate::{Checkpoint, SimulatedDisk, list};

const BEST: Retention = Retention { keep_last: 1, keep_every: 0, keep_best: 1 };

fn offer(writer: &mut Writer, step: u64, score: f32) -> Offer {
    let count = writer.target.pieces.len();
    writer.offer(step, json!({ SCORE: score }), Vec::new(), |snapshot| {
        (0..count).for_each(|index| snapshot.tensor(index).fill(step as f32));
    })
}

/// Saves a step alone, and says whether it was reported as committed.
fn save(disk: &SimulatedDisk, step: u64, score: f32) -> bool {
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let Ok(mut writer) = Writer::new(shared, FOLDER.into(), specs(), BEST) else { return false };
    offer(&mut writer, step, score);
    matches!(writer.flush()[..], [Outcome::Committed { .. }])
}

/// The steps in a folder of the disk, all of which verify.
fn whole_steps(disk: &SimulatedDisk) -> Vec<u64> {
    let (_root, folder) = dumped(disk);
    let verified = |(step, path): (u64, PathBuf)| {
        Checkpoint::open(&path).unwrap().verify().unwrap();
        step
    };
    list(&folder).unwrap().into_iter().map(verified).collect()
}

#[test]
fn nothing_goes_for_a_checkpoint_that_has_lost_something() {
    let root = tempfile::tempdir().unwrap();
    let last = |keep| Writer::new(Arc::new(RealDisk), root.path().into(), specs(), Retention::last(keep)).unwrap();
    let mut writer = last(0);
    for step in 1..4 {
        offer(&mut writer, step, 0.5);
        assert!(matches!(writer.flush()[..], [Outcome::Committed { .. }]));
    }
    drop(writer);
    let writer = last(1);
    let steps = || list(root.path()).unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>();
    let newest = root.path().join("step-00000003");
    for name in ["rank-0000.safetensors", "manifest.json"] {
        let (file, kept) = (newest.join(name), std::fs::read(newest.join(name)).unwrap());
        std::fs::write(&file, &kept[..kept.len() - 1]).unwrap();
        assert_eq!((folder::retain(&writer.target, 3), steps()), (vec![], vec![1, 2, 3]), "{name} is cut");
        std::fs::remove_file(&file).unwrap();
        assert_eq!((folder::retain(&writer.target, 3), steps()), (vec![], vec![1, 2, 3]), "{name} is missing");
        std::fs::write(&file, &kept).unwrap();
    }
    // The control: one that is whole takes the place of the others.
    assert_eq!((folder::retain(&writer.target, 3), steps()), (vec![1, 2], vec![3]));
}

/// A disk that keeps another byte than it was given, once, in a file of tensors.
#[derive(Debug, Default)]
struct Lying(AtomicBool);

impl Watch for Lying {
    fn write(&self, file: &mut dyn DiskFile, bytes: &[u8]) -> std::io::Result<()> {
        // The manifest's bytes are text.
        if bytes.len() < 16 || bytes[0] == b'{' || self.0.swap(true, Ordering::SeqCst) {
            return file.write_all(bytes);
        }
        let mut other = bytes.to_vec();
        *other.last_mut().unwrap() ^= 1;
        file.write_all(&other)
    }
}

#[test]
fn older_ones_stay_where_the_disk_keeps_another_byte_and_whoever_does_not_read_it_again_loses_them() {
    for reads in [true, false] {
        let disk = SimulatedDisk::new();
        assert!(save(&disk, 1, 0.1));
        let lying = Arc::new(Watched::new(Arc::new(disk.clone()), Lying::default()));
        let mut writer = Writer::new(lying, FOLDER.into(), specs(), Retention::last(1)).unwrap();
        writer.read_back(reads);
        offer(&mut writer, 2, 0.5);
        match &writer.flush()[..] {
            [Outcome::Failed { step: 2, error }] if reads => {
                let said = error.to_string();
                assert!(
                    said.contains("rank-0000.safetensors was written with BLAKE3") && said.contains("changes bytes"),
                    "{said}"
                );
            }
            [Outcome::Committed { step: 2, removed, .. }] if !reads => assert_eq!(removed, &[1]),
            other => panic!("{other:?}"),
        }
        drop(writer);
        let (_root, folder) = dumped(&disk);
        let verify = |(step, path): (u64, PathBuf)| (step, Checkpoint::open(&path).unwrap().verify().is_ok());
        let left: Vec<_> = list(&folder).unwrap().into_iter().map(verify).collect();
        assert_eq!(left, if reads { [(1, true)] } else { [(2, false)] });
    }
}

#[test]
fn a_crash_at_any_operation_leaves_the_best_one_too() {
    for crash in 0.. {
        let disk = SimulatedDisk::new();
        assert!(save(&disk, 1, 0.1) && save(&disk, 2, 0.5));
        let disk = disk.after_crash();
        assert_eq!(whole_steps(&disk), [1, 2]);
        disk.crash_at(crash);
        let committed = save(&disk, 3, 0.3);
        for left in remains(&disk, crash) {
            let steps = whole_steps(&left);
            assert_eq!(steps[0], 1, "operation {crash}: the best is gone, {steps:?} are left");
            assert!(steps.contains(if committed { &3 } else { &2 }) || steps.contains(&3), "{steps:?}");
            assert!(save(&left, 4, 0.9));
            assert_eq!(whole_steps(&left), [1, 4]);
        }
        if disk.operations() <= crash {
            assert!(committed && crash > 20, "a save has more operations than {crash}");
            break;
        }
    }
}

#[test]
fn a_call_that_fails_once_costs_no_best_one() {
    // What says nothing of the bytes, as too many open files do. The control is a manifest that is not there: it has no score.
    for (kind, control) in [(std::io::ErrorKind::Other, false), (std::io::ErrorKind::NotFound, true)] {
        let mut lost = 0;
        for index in 0.. {
            let disk = SimulatedDisk::new();
            assert!(save(&disk, 1, 0.1) && save(&disk, 2, 0.5));
            disk.fail_at(disk.operations() + index, kind);
            let before = disk.operations();
            save(&disk, 3, 0.3);
            lost += usize::from(!whole_steps(&disk).contains(&1));
            if disk.operations() <= before + index {
                break;
            }
        }
        assert_eq!(lost > 0, control, "{kind:?} cost the best one {lost} times");
    }
}

#[test]
fn two_folders_keep_the_same_ones() {
    let disk = SimulatedDisk::new();
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let folder = |rank: usize| Path::new(FOLDER).join(rank.to_string());
    let writer = |rank: usize| {
        let range = 3 * rank..3 * rank + 3;
        let piece = PieceSpec::interval("w", &[2, 3], range);
        Writer::member(Arc::clone(&shared), folder(rank), vec![piece], Member { rank, lead: true }, BEST).unwrap()
    };
    let mut writers: Vec<Writer> = (0..2).map(writer).collect();
    for (step, score) in [(1, 0.5), (2, 0.2), (3, 0.4), (4, 0.3)] {
        for writer in &mut writers {
            assert!(matches!(offer(writer, step, score), Offer::Taken { .. }));
            let Some(Outcome::Written { part, .. }) = writer.flush().pop() else { panic!("it is written") };
            let outcome = commit(writer, step, &format!("commit {step}"), vec![part]);
            assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
        }
        let held = |rank| disk.list(&folder(rank)).unwrap();
        assert!(step == 1 || held(0).len() > 1, "nothing goes before the step is settled");
        settle(&mut writers, step, true);
        assert_eq!(held(0), held(1));
    }
    assert_eq!(disk.list(&folder(0)).unwrap(), ["step-00000002", "step-00000004"]);
}
