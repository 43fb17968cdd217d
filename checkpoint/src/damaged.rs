//! The newest checkpoint that is whole, and what becomes of those above it that are not.
//!
//! A damaged checkpoint is never removed here: it may be all that somebody has of those steps. It gets a name under which it
//! counts no more and is in nobody's way, also when a run comes to its step again.

use std::path::{Path, PathBuf};

use crate::disk::{self, Disk};
use crate::error::CheckpointError;
use crate::layout;
use crate::reader::{Checkpoint, list};

/// A checkpoint that cannot be used.
#[derive(Debug)]
pub struct Damaged {
    /// The step of its name.
    pub step: u64,
    /// Where it lies.
    pub path: PathBuf,
    /// What is wrong with it.
    pub error: CheckpointError,
}

/// What a folder of checkpoints has to go on from.
#[derive(Debug)]
pub struct Survey<T> {
    /// The newest checkpoint whose every byte is as its manifest says, and what was made of it.
    pub good: Option<(Checkpoint, T)>,
    /// Those that are newer, the newest first.
    pub damaged: Vec<Damaged>,
}

/// Goes through checkpoints from the newest down to the first that is whole. `read` must look at every byte of one, as
/// [`Checkpoint::verify`] does, and as [`Checkpoint::load_and_verify`] does in the one pass that a resume takes anyway.
///
/// # Errors
/// One that this build or this user cannot read, which says nothing of its bytes: it is not passed over.
pub fn survey<T>(
    folder: &Path,
    mut read: impl FnMut(&Checkpoint) -> Result<T, CheckpointError>,
) -> Result<Survey<T>, CheckpointError> {
    let mut survey = Survey { good: None, damaged: Vec::new() };
    for (step, path) in list(folder)?.into_iter().rev() {
        let opened = Checkpoint::open(&path).and_then(|checkpoint| read(&checkpoint).map(|read| (checkpoint, read)));
        match opened {
            Ok(good) => {
                survey.good = Some(good);
                break;
            }
            Err(error) if error.is_damage() => survey.damaged.push(Damaged { step, path, error }),
            Err(error) => return Err(error),
        }
    }
    Ok(survey)
}

/// Gives a damaged checkpoint a name under which it does not count, and returns where it is now.
///
/// # Errors
/// What the file system says.
pub fn set_aside(disk: &dyn Disk, damaged: &Damaged) -> Result<PathBuf, CheckpointError> {
    let folder = damaged.path.parent().unwrap_or(Path::new("."));
    for number in 1..=u32::MAX {
        let path = folder.join(layout::damaged(damaged.step, number));
        if !disk.exists(&path).map_err(CheckpointError::io("look for", &path))? {
            disk::rename(disk, &damaged.path, &path)?;
            disk::sync_dir(disk, folder)?;
            return Ok(path);
        }
    }
    unreachable!("a folder has fewer entries than there are numbers")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;
    use crate::disk::RealDisk;
    use crate::writer::{Retention, TensorSpec, Writer};

    /// A folder with checkpoints of these steps.
    fn folder(steps: &[u64]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), steps, 0);
        folder
    }

    fn save(folder: &Path, steps: &[u64], keep_last: usize) {
        let specs = vec![TensorSpec { name: "w".into(), shape: vec![3] }];
        let mut writer = Writer::new(Arc::new(RealDisk), folder.into(), specs, Retention::last(keep_last)).unwrap();
        for &step in steps {
            writer.offer(step, serde_json::Value::Null, Vec::new(), |snapshot| snapshot.tensor(0).fill(step as f32));
            writer.flush();
        }
    }

    /// The survey that reads everything and keeps nothing.
    fn survey(folder: &Path) -> Result<Survey<u64>, CheckpointError> {
        super::survey(folder, Checkpoint::verify)
    }

    fn damage(folder: &Path, step: u64, change: impl FnOnce(&Path)) {
        change(&folder.join(layout::committed(step)));
    }

    fn flip(file: &Path) {
        let mut bytes = fs::read(file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn the_newest_that_is_whole_is_found_below_all_kinds_of_damage() {
        let kinds: [fn(&Path); 5] = [
            |path| flip(&path.join(layout::shard(0))),
            |path| flip(&path.join(layout::MANIFEST)),
            |path| fs::write(path.join(layout::shard(0)), "").unwrap(),
            |path| fs::remove_file(path.join(layout::shard(0))).unwrap(),
            |path| fs::remove_file(path.join(layout::MANIFEST)).unwrap(),
        ];
        for kind in kinds {
            let folder = folder(&[1, 2, 3]);
            assert_eq!(survey(folder.path()).unwrap().good.unwrap().0.step(), 3, "the control: nothing is damaged");
            [3, 2].into_iter().for_each(|step| damage(folder.path(), step, kind));
            let found = survey(folder.path()).unwrap();
            assert_eq!(found.good.unwrap().0.step(), 1);
            assert_eq!(found.damaged.iter().map(|damaged| damaged.step).collect::<Vec<_>>(), [3, 2]);
            damage(folder.path(), 1, kind);
            assert!(survey(folder.path()).unwrap().good.is_none());
        }
    }

    #[test]
    fn a_checkpoint_of_a_newer_build_is_not_passed_over() {
        let folder = folder(&[1, 2]);
        let file = folder.path().join(layout::committed(2)).join(layout::MANIFEST);
        let text = fs::read_to_string(&file).unwrap().replace("\"version\": 1", "\"version\": 9");
        let (head, tail) = (&text[..15], &text[79..]);
        let hash = blake3::hash(format!("{head}{}{tail}", "0".repeat(64)).as_bytes()).to_hex();
        fs::write(&file, format!("{head}{hash}{tail}")).unwrap();
        assert!(matches!(survey(folder.path()), Err(CheckpointError::Version { found: 9, .. })));
    }

    #[test]
    fn what_is_set_aside_is_kept_as_it_is_and_counts_no_more() {
        let folder = folder(&[1, 2]);
        for number in 1..4 {
            damage(folder.path(), 2, |path| flip(&path.join(layout::shard(0))));
            let found = survey(folder.path()).unwrap();
            let was = fs::read(found.damaged[0].path.join(layout::shard(0))).unwrap();
            let kept = set_aside(&RealDisk, &found.damaged[0]).unwrap();
            assert_eq!(kept, folder.path().join(layout::damaged(2, number)));
            assert_eq!(fs::read(kept.join(layout::shard(0))).unwrap(), was);
            assert_eq!(list(folder.path()).unwrap().len(), 1);
            // A run comes to that step again, and its writer puts the folder in order.
            save(folder.path(), &[2], 0);
            assert_eq!(survey(folder.path()).unwrap().good.unwrap().0.step(), 2);
            assert!(kept.is_dir());
        }
        save(folder.path(), &[3], 1);
        assert_eq!(list(folder.path()).unwrap().len(), 1, "retention has taken the others");
        assert!((1..4).all(|number| folder.path().join(layout::damaged(2, number)).is_dir()), "and not these");
    }
}
