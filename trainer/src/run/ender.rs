//! How a rank's process ends when the run ends for everybody, and what it takes away before.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use checkpoint::disk::RealDisk;
use checkpoint::writer::give_up_all;
use parallel::collective::Mailbox;
use parallel::control::By;
use parallel::coordinator::state::Ending;
use parallel::data::engine::Aborter;

use super::folder::holder;
use super::join::remove_nonces;
use crate::log::say;

/// A disk that hangs keeps no process for longer.
const TIDY_WITHIN: Duration = Duration::from_secs(2);

/// What happens to this process when the run ends for everybody: the training thread is woken, and if it cannot end in
/// time, because it computes, the process ends without it.
#[derive(Clone, Debug)]
pub struct Ender(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    waiting: Mutex<Option<(Aborter, Mailbox)>>,
    /// Where nonces would lie, and in the run's folder half-written checkpoints, as long as its lock is the same one's.
    runs: Mutex<Option<PathBuf>>,
    folder: Mutex<Option<(PathBuf, String)>>,
    grace_ms: AtomicU64,
    /// Whether a launcher hosts the coordinator and, while it can, says how the run ended.
    quiet: bool,
    /// Whether that launcher cannot say how the run ended.
    alone: AtomicBool,
    said: AtomicBool,
}

impl Ender {
    /// `quiet` where a launcher hosts the coordinator and, while it can, says how the run ended.
    #[must_use]
    pub fn new(quiet: bool) -> Self {
        let (waiting, runs, folder) = (Mutex::new(None), Mutex::new(None), Mutex::new(None));
        let (grace_ms, alone, said) = (AtomicU64::new(125), AtomicBool::new(false), AtomicBool::new(false));
        Self(Arc::new(Ends { waiting, runs, folder, grace_ms, quiet, alone, said }))
    }

    /// The run's `parallel.peer_timeout_s` is known.
    pub fn joined(&self, peer_timeout_s: f64) {
        self.0.grace_ms.store(((peer_timeout_s / 8.0).clamp(0.05, 2.0) * 1e3) as u64, Ordering::Relaxed);
    }

    /// What to wake: where the training thread may wait for other ranks.
    pub fn wake(&self, engine: Aborter, collectives: Mailbox) {
        *lock(&self.0.waiting) = Some((engine, collectives));
    }

    /// The folder of runs, where this process may leave a nonce.
    pub fn tidy_nonces(&self, runs: PathBuf) {
        *lock(&self.0.runs) = Some(runs);
    }

    /// The run's folder, where this process may leave a checkpoint half-written. Not before the run is its own, and its
    /// lead has the lock.
    pub fn tidy_checkpoints(&self, folder: &Path) {
        *lock(&self.0.folder) = Some((folder.to_owned(), holder(folder)));
    }

    /// Takes away what this process would leave behind.
    pub fn tidy_up(&self) {
        if let Some(runs) = &*lock(&self.0.runs) {
            remove_nonces(runs, std::process::id());
        }
        // If a later run has had the lock since, what is half-written there is its own. That the lock is held says nothing:
        // the lead of this one may still have it.
        if let Some((folder, lead)) = &*lock(&self.0.folder)
            && holder(folder) == *lead
        {
            give_up_all(&RealDisk, &folder.join("checkpoints"), std::process::id() as usize);
        }
    }

    /// The run has ended.
    pub fn end(&self, ending: &Ending, by: By) {
        self.0.alone.fetch_or(by == By::Worker, Ordering::Relaxed);
        if let Some((engine, collectives)) = &*lock(&self.0.waiting) {
            engine.abort(&ending.verdict);
            collectives.abort(&ending.verdict);
        }
        let (ender, ending) = (self.clone(), ending.clone());
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(ender.0.grace_ms.load(Ordering::Relaxed)));
            // Before anything that may wait for a disk.
            ender.say(&ending.verdict);
            let (done, tidied) = channel();
            std::thread::spawn(move || {
                ender.tidy_up();
                // Whoever waits may have gone on.
                let _ = done.send(());
            });
            let _ = tidied.recv_timeout(TIDY_WITHIN);
            std::process::exit(i32::from(ending.code));
        });
    }

    /// Says how the run ended, once, unless the process that started this one does.
    pub fn say(&self, verdict: &str) {
        if self.0.said.swap(true, Ordering::Relaxed) {
            return;
        }
        // A log is a file on a disk, which may be what hangs.
        match (self.0.quiet, self.0.alone.load(Ordering::Relaxed)) {
            (true, false) => {}
            // Its brothers write to the same terminal.
            (true, true) => say(&format!("error: process {}: {verdict}", std::process::id())),
            (false, _) => say(&format!("error: {verdict}")),
        }
        tracing::info!("the run ended: {verdict}");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use checkpoint::layout::{committed, partial};

    use super::*;
    use crate::recipe::raw;
    use crate::run::folder::Folder;

    #[test]
    fn what_is_half_written_goes_with_its_own_run_and_stays_with_a_later_one() {
        let runs = tempfile::tempdir().expect("a folder");
        let first = Folder::create(runs.path(), "a").expect("new");
        let half = first.checkpoints().join(partial(&committed(3)));
        let begin = || std::fs::create_dir_all(&half).expect("writable");
        let ender = Ender::new(true);
        ender.tidy_checkpoints(first.path());
        begin();
        ender.tidy_up();
        assert!(!half.exists(), "while the lead has the lock");
        drop(first);
        begin();
        ender.tidy_up();
        assert!(!half.exists(), "when the lead is gone");
        let later = Folder::resume(runs.path(), "a", &raw::read("", &[]).0).expect("nobody has it");
        begin();
        ender.tidy_up();
        assert!(half.exists(), "it is the later run's");
        drop(later);
        ender.tidy_up();
        assert!(half.exists(), "whoever comes next puts it in order");
    }
}
