//! A run's folder: `runs/NAME/{recipe.toml, run.json, metrics.jsonl, events.jsonl, checkpoints/, export/, logs/}`.

use std::fs::{File, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::cache::{replace, sync_names};
use crate::error::{Error, Result};
use crate::recipe::{Raw, Tag, batch, raw};
use crate::run::join::random;

/// How a run stands, `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How it stands.
    pub status: Status,
    /// The last step that was taken.
    pub step: u64,
    /// Its loss in nats a token.
    pub loss: Option<f64>,
    /// On all held-out text, when the run is done.
    pub held_out_bits_per_byte: Option<f64>,
    /// BLAKE3 of all parameters in name order.
    pub parameter_hash: Option<String>,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Seconds since this process started, and before it the ones of the processes that it resumed.
    pub wall_s: f64,
    /// `data x pipeline x tensor`.
    pub mesh: String,
    /// What gradients travel in; null with one rank.
    pub codec: Option<String>,
    /// Of Tributary.
    pub version: String,
}

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// A process works on it, or was killed while it did.
    Running,
    /// Every step was taken.
    Done,
    /// It ended with an error.
    Failed,
    /// A signal, or `train.stop_at_step`, ended it in good order.
    Interrupted,
}

/// The folder, locked for this process.
#[derive(Debug)]
pub struct Folder {
    name: String,
    path: PathBuf,
    /// Held as long as the run lasts; the system lets go of it when the process dies.
    _lock: File,
}

impl Folder {
    /// Whether a new run may have this name.
    ///
    /// # Errors
    /// A name that is no name, or a run that has it.
    pub fn check_free(runs: &Path, name: &str) -> Result<()> {
        check_name(name)?;
        let path = runs.join(name);
        if path.exists() { Err(exists(name, &path)) } else { Ok(()) }
    }

    /// Makes the folder of a new run.
    ///
    /// # Errors
    /// As [`check_free`](Self::check_free), or a folder that cannot be written.
    pub fn create(runs: &Path, name: &str) -> Result<Self> {
        check_name(name)?;
        let path = runs.join(name);
        make_durably(runs)?;
        match std::fs::create_dir(&path) {
            // What is committed in it shall not vanish with its name.
            Ok(()) => sync_names(runs)?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Err(exists(name, &path)),
            Err(error) => return Err(Error::io("create", path)(error)),
        }
        Ok(Self { name: name.into(), _lock: lock(name, &path)?, path })
    }

    /// Opens the folder of a run that is to go on, and returns with it what changed of the recipe that may change.
    /// `None` when there is no such folder: a run that was killed before it had one has done nothing yet.
    ///
    /// # Errors
    /// A folder that is no run's, a process that still works on it, a fixed key that changed, another number of sequences
    /// a step.
    pub fn resume(runs: &Path, name: &str, recipe: &Raw) -> Result<Option<(Self, Vec<String>)>> {
        check_name(name)?;
        let path = runs.join(name);
        if !path.is_dir() {
            return Ok(None);
        }
        let file = path.join("recipe.toml");
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("read", file)(error)),
        };
        let empty = || std::fs::read_dir(&path).is_ok_and(|entries| entries.flatten().all(|entry| is_ours(&entry)));
        if text.is_none() && !empty() {
            let what = format!("{} has no recipe.toml: it is not the folder of a run", path.display());
            return Err(Error::Run { name: name.into(), what });
        }
        let folder = Self { name: name.into(), _lock: lock(name, &path)?, path };
        // A run that was killed before it wrote its recipe has done nothing that could differ.
        let Some(text) = text else { return Ok(Some((folder, Vec::new()))) };
        let (old, _) = raw::read(&text, &[]);
        Ok(Some((folder, differences(name, &old, recipe)?)))
    }

    /// Writes the recipe that the run follows from now on.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep_recipe(&self, recipe: &Raw) -> Result<()> {
        let logs = self.file("logs");
        std::fs::create_dir_all(&logs).map_err(Error::io("create", logs))?;
        replace(&self.file("recipe.toml"), recipe.to_toml().as_bytes())
    }

    /// Removes the folder of a new run that did not come to its first step.
    pub fn abandon(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!("{} is left over and may be removed: {error}", self.path.display());
        }
    }

    /// The run's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file or folder in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where checkpoints are.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.file("checkpoints")
    }

    /// What `run.json` says, if it is there.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        serde_json::from_slice(&std::fs::read(self.file("run.json")).ok()?).ok()
    }

    /// Replaces `run.json`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_summary(&self, summary: &Summary) -> Result<()> {
        let mut text =
            serde_json::to_vec_pretty(summary).map_err(|error| Error::io("write", "run.json")(error.into()))?;
        text.push(b'\n');
        replace(&self.file("run.json"), &text)
    }
}

/// Makes a folder and those above it, their names too.
///
/// # Errors
/// What the system says.
pub fn make_durably(folder: &Path) -> Result<()> {
    let is_missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
    let missing: Vec<&Path> = folder.ancestors().take_while(is_missing).collect();
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    missing.into_iter().filter_map(Path::parent).try_for_each(sync_names)
}

/// What differs of the recipe of a run that goes on, and may.
///
/// # Errors
/// A fixed key that changed, another number of sequences a step.
pub fn differences(name: &str, old: &Raw, recipe: &Raw) -> Result<Vec<String>> {
    let mut fixed = recipe.differences(old, Tag::Fixed);
    fixed.extend(batch::fault(old, recipe));
    if fixed.is_empty() {
        return Ok(recipe.differences(old, Tag::Resumable));
    }
    let what = format!(
        "--resume cannot change what the run is:\n  {}\nrestore these keys, or start another run with --name",
        fixed.join("\n  ")
    );
    Err(Error::Run { name: name.into(), what })
}

/// Whether a run makes this entry before it writes its recipe.
fn is_ours(entry: &std::fs::DirEntry) -> bool {
    let name = entry.file_name();
    let name = name.to_string_lossy();
    // Of checkpoints what was begun: written, or brought from a store.
    let begun = |entry: std::fs::DirEntry| checkpoint::layout::is_left_over(&entry.file_name().to_string_lossy());
    let empty = || std::fs::read_dir(entry.path()).is_ok_and(|entries| entries.flatten().all(begun));
    name == ".lock" || name == "logs" || name.starts_with(".new-") || (name == "checkpoints" && empty())
}

/// A run's name is one plain path component, so that it can be said on a command line and cannot leave the folder.
///
/// # Errors
/// It is not.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain) && name.len() <= 100 {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "--name: expected letters, digits, '-', '_' and '.', at most 100, starting with a letter or digit; found {name:?}"
    )))
}

/// Whether a process is working on the run in this folder.
#[must_use]
pub fn in_use(path: &Path) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path.join(".lock")) else { return false };
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// What the last process that took a run's lock wrote into it, which no other writes: whether it is still the same one.
#[must_use]
pub fn holder(path: &Path) -> String {
    std::fs::read_to_string(path.join(".lock")).unwrap_or_default()
}

fn exists(name: &str, path: &Path) -> Error {
    let what = format!(
        "{} exists: go on with it by --resume, start another by --name OTHER, or remove the folder",
        path.display()
    );
    Error::Run { name: name.into(), what }
}

fn lock(name: &str, path: &Path) -> Result<File> {
    let file = path.join(".lock");
    let mut open = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&file)
        .map_err(Error::io("open", &file))?;
    match open.try_lock() {
        Ok(()) => {
            // For people who look, and ranks that must know whose the run is, on other machines too; the lock itself is
            // the system's.
            let text = format!("{}\n{}\n", std::process::id(), random());
            let written = open.set_len(0).and_then(|()| open.write_all(text.as_bytes()));
            let _ = written.and_then(|()| open.sync_data());
            Ok(open)
        }
        Err(TryLockError::WouldBlock) => {
            let text = holder(path);
            let who = text.lines().next().unwrap_or_default();
            let what = format!("process {who} is working on it: wait for it, or stop it");
            Err(Error::Run { name: name.into(), what })
        }
        Err(TryLockError::Error(error)) => Err(Error::io("lock", file)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(sets: &[&str]) -> Raw {
        raw::read("[train]\nsteps = 3\n", &sets.iter().map(|&x| x.to_owned()).collect::<Vec<_>>()).0
    }

    #[test]
    fn a_second_run_of_the_name_and_a_second_process_are_refused() {
        let runs = tempfile::tempdir().expect("a folder");
        let first = Folder::create(runs.path(), "a").expect("new");
        let message = Folder::create(runs.path(), "a").expect_err("exists").to_string();
        assert!(message.contains("--resume") && message.contains("--name"), "{message}");
        let message = Folder::resume(runs.path(), "a", &recipe(&[])).expect_err("locked").to_string();
        assert!(message.contains(&format!("process {} is working on it", std::process::id())), "{message}");
        let held_by = holder(&runs.path().join("a"));
        drop(first);
        assert_eq!(holder(&runs.path().join("a")), held_by, "until somebody else takes it");
        assert!(Folder::resume(runs.path(), "a", &recipe(&[])).expect("its own").is_some());
        assert_ne!(holder(&runs.path().join("a")), held_by, "also by the same process");
        assert!(Folder::resume(runs.path(), "b", &recipe(&[])).expect("none").is_none());
    }

    #[test]
    fn a_folder_that_is_no_runs_is_not_taken_over() {
        let runs = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(runs.path().join("mine")).expect("writable");
        std::fs::write(runs.path().join("mine/diary"), "").expect("writable");
        let message = Folder::resume(runs.path(), "mine", &recipe(&[])).expect_err("not a run").to_string();
        assert!(message.contains("has no recipe.toml"), "{message}");
        assert!(!runs.path().join("mine/.lock").exists());
    }

    #[test]
    fn a_resume_names_every_fixed_key_that_changed_and_reports_the_others() {
        let runs = tempfile::tempdir().expect("a folder");
        Folder::create(runs.path(), "a").and_then(|folder| folder.keep_recipe(&recipe(&[]))).expect("new");
        let changed = ["train.seed=9", "model.from=x", "train.steps=5"];
        let message = Folder::resume(runs.path(), "a", &recipe(&changed)).expect_err("two fixed keys").to_string();
        assert!(message.contains("train.seed: the run has 1, the recipe says 9"), "{message}");
        assert!(message.contains("model.from") && !message.contains("train.steps"), "{message}");
        let resumed = Folder::resume(runs.path(), "a", &recipe(&["train.steps=5", "device.threads=1"]));
        let (_, changes) = resumed.expect("allowed").expect("there");
        assert_eq!(changes, ["train.steps: the run has 3, the recipe says 5"]);
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        let runs = tempfile::tempdir().expect("a folder");
        for name in ["..", "a/b", "", ".cache", "a b"] {
            assert!(Folder::create(runs.path(), name).is_err(), "{name}");
        }
    }
}
