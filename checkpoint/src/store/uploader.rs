//! A thread that copies committed checkpoints to a store while training goes on. Nobody waits for it but at a run's end, and
//! then not for ever.
//!
//! The newest checkpoint goes first. One that could not be copied is tried again when the next is committed, and once more
//! at the end; an older one that is still missing follows, if it would stay there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::Remote;
use super::retain::{self, scores};
use super::send::send;
use super::shelf::{At, Seat, Shelf, is_complete};
use crate::disk::{self, Disk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::Manifest;
use crate::writer::{Retention, Verdict, stand_back};

/// Most checkpoints that wait to be copied; of more the newest are tried.
const WAITING_MAX: usize = 1024;

/// What became of a checkpoint that was to be copied.
#[derive(Debug)]
pub enum News {
    /// It is in the store.
    Uploaded {
        /// Its step.
        step: u64,
        /// Where it is.
        url: String,
        /// Bytes of its files.
        bytes: u64,
        /// Seconds that it took.
        seconds: f64,
        /// Steps whose copies retention removed then.
        removed: Vec<u64>,
    },
    /// It is not, and is tried again later.
    Failed {
        /// Its step.
        step: u64,
        /// Why not.
        error: CheckpointError,
    },
    /// It is not, and will not be.
    Passed {
        /// Its step.
        step: u64,
        /// Why not.
        why: &'static str,
    },
}

/// What the uploader copies.
#[derive(Debug)]
pub struct Task {
    /// The folder of checkpoints.
    pub folder: PathBuf,
    /// How it is read.
    pub disk: Arc<dyn Disk>,
    /// Whose folder it is.
    pub seat: Seat,
    /// All folders of the run, this one among them. A step goes only once a later one is there of all of them.
    pub seats: Vec<Seat>,
    /// Which copies stay.
    pub retention: Retention,
    /// The step that the run goes on from, 0 for none. What is later in the folder is of a run that was rewound.
    pub from: u64,
}

/// The thread, and what it has to say.
#[derive(Debug)]
pub struct Uploader {
    shared: Arc<Shared>,
    news: Receiver<News>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    orders: Mutex<Orders>,
    wake: Notify,
    cancel: Notify,
}

#[derive(Debug, Default)]
struct Orders {
    /// Steps that are not in the store yet.
    waiting: BTreeSet<u64>,
    /// Something changed since the last try.
    changed: bool,
    finish: bool,
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        // Each change is a single insertion or removal.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offer(&self, steps: impl IntoIterator<Item = u64>) {
        let mut orders = self.orders();
        orders.waiting.extend(steps);
        while orders.waiting.len() > WAITING_MAX {
            orders.waiting.pop_first();
        }
        orders.changed = true;
        self.wake.notify_one();
    }
}

impl Uploader {
    /// Starts the thread. It first removes what a crash left in the store, and copies what an earlier process could not.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(remote: Remote, task: Task) -> io::Result<Self> {
        let (say, news) = channel();
        let shared = Arc::new(Shared::default());
        shared.offer([]);
        let Remote { shelf, runtime } = remote;
        let work =
            Work { shelf, task, shared: shared.clone(), say, in_order: false, newest: 0, begun: BTreeSet::new() };
        let body = move || {
            stand_back();
            let shared = work.shared.clone();
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = shared.cancel.notified() => {}
                    () = work.run() => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("checkpoint-upload".into()).spawn(body)?;
        Ok(Self { shared, news, thread: Some(thread) })
    }

    /// A checkpoint was committed: it is copied as soon as may be.
    pub fn offer(&self, step: u64) {
        self.shared.offer([step]);
    }

    /// What became of checkpoints since the last call.
    pub fn news(&self) -> Vec<News> {
        self.news.try_iter().collect()
    }

    /// Nothing more will be offered. What is still missing is tried once more, and then the thread ends.
    pub fn finish(&self) {
        self.shared.orders().finish = true;
        self.shared.wake.notify_one();
    }

    /// Waits for news, for so long at the most. `None` when there will be no more, after [`finish`](Self::finish).
    #[must_use]
    pub fn wait(&self, within: Duration) -> Option<Vec<News>> {
        match self.news.recv_timeout(within) {
            Ok(first) => Some(std::iter::once(first).chain(self.news()).collect()),
            Err(RecvTimeoutError::Timeout) => Some(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    /// The steps that are not in the store, so far.
    #[must_use]
    pub fn missing(&self) -> Vec<u64> {
        self.shared.orders().waiting.iter().copied().collect()
    }

    fn stop(&mut self) {
        self.shared.cancel.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends at its next wait for the store, and there is nothing to be said of how.
            let _ = thread.join();
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the thread does.
struct Work {
    shelf: Shelf,
    task: Task,
    shared: Arc<Shared>,
    say: Sender<News>,
    /// Whether the store was looked through.
    in_order: bool,
    /// The newest step that this process has copied. Later ones in the store are of a run that was rewound.
    newest: u64,
    /// Steps of whose copies there may be a part in the store, by this process.
    begun: BTreeSet<u64>,
}

impl Work {
    async fn run(mut self) {
        loop {
            let last = {
                let mut orders = self.shared.orders();
                let woken = std::mem::take(&mut orders.changed);
                match (orders.finish, woken) {
                    (false, false) => None,
                    (finish, _) => Some(finish),
                }
            };
            match last {
                None => self.shared.wake.notified().await,
                Some(last) => {
                    self.copy_all().await;
                    if last {
                        return;
                    }
                }
            }
        }
    }

    fn newest_waiting(&self) -> Option<u64> {
        self.shared.orders().waiting.last().copied()
    }

    /// Copies what waits, as long as the store takes it.
    async fn copy_all(&mut self) {
        if !self.in_order {
            match self.look_through().await {
                Ok(()) => self.in_order = true,
                Err(error) if self.newest_waiting().is_none() => {
                    tracing::warn!(%error, "the store could not be looked through; it is tried again with the next checkpoint");
                }
                Err(error) => {
                    let step = self.newest_waiting().expect("one waits");
                    return self.tell(News::Failed { step, error });
                }
            }
        }
        let mut failed = BTreeSet::new();
        loop {
            let Some(step) = self.next(&failed).await else { return };
            match self.copy(step).await {
                Ok(news) => {
                    self.shared.orders().waiting.remove(&step);
                    self.tell(news);
                }
                Err(error) => {
                    let is_away = matches!(error, CheckpointError::Store { .. });
                    self.tell(News::Failed { step, error });
                    if is_away {
                        return;
                    }
                    // One that is damaged here is in nobody's way.
                    failed.insert(step);
                }
            }
        }
    }

    fn tell(&self, news: News) {
        // Whoever does not listen any more ends this thread too.
        let _ = self.say.send(news);
    }

    /// Removes left-overs, and finds what an earlier process has not copied.
    async fn look_through(&self) -> Result<(), CheckpointError> {
        let Task { folder, disk, seat, seats, retention, from } = &self.task;
        retain::sweep(&self.shelf, *seat).await?;
        let names = if disk.exists(folder).map_err(CheckpointError::io("look for", folder))? {
            disk::names(&**disk, folder)?
        } else {
            Vec::new()
        };
        let mut scores = scores(&self.shelf, &self.shelf.list().await?, *seat, retention).await?;
        let mut here = layout::checkpoints(&names);
        here.retain(|step, _| step <= from);
        let mut missing = BTreeSet::new();
        for (&step, name) in here.iter().rev() {
            let is_there = scores.contains_key(&step) && self.is_copied(At { step, seat: *seat }, name).await?;
            if !is_there {
                missing.insert(step);
            }
        }
        for &step in &missing {
            scores.insert(step, self.score(&here[&step]));
        }
        let verdicts = retention.judge(&scores, *from);
        let kept = missing.into_iter().filter(|step| verdicts[step] != Verdict::Removed);
        self.shared.orders().waiting.extend(kept);
        // What stayed for a machine that was not done.
        if let Some((&step, _)) = scores.range(..=from).next_back().filter(|_| seats.len() > 1) {
            self.retain(At { step, seat: *seat }).await;
        }
        Ok(())
    }

    /// Removes what retention does not keep beside this copy. What cannot be removed is only too much, and stops no copy.
    async fn retain(&self, at: At) -> Vec<u64> {
        let Task { seats, retention, .. } = &self.task;
        retain::retain(&self.shelf, at, seats, retention).await.unwrap_or_else(|error| {
            tracing::warn!(step = at.step, %error, "older copies could not be removed from the store");
            Vec::new()
        })
    }

    /// Whether a complete copy is of the checkpoint that the folder has of this step. A run that went back writes a step again,
    /// as another checkpoint.
    async fn is_copied(&self, at: At, name: &str) -> Result<bool, CheckpointError> {
        // What is damaged here is not copied, and nothing is known of it.
        let Some((here, text)) = self.manifest(name) else { return Ok(true) };
        match retain::manifest(&self.shelf, at).await {
            // With folders of several machines one may have put together what is there, so that the texts differ. One process
            // alone gives no names to its commits.
            Ok((there, _)) if !here.id.is_empty() => Ok(here.id == there.id),
            Ok((_, there)) => Ok(text == there),
            Err(error) if error.is_damage() => {
                // Nobody knows what belongs to it, so nothing takes its place.
                tracing::warn!(step = at.step, %error, "a copy in the store is damaged, and stays");
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    /// The next step to copy: the newest that waits. Where other machines have folders of their own, the newest of those that
    /// another of them has begun to copy, if there is one: whoever takes longer for a copy than checkpoints lie apart would
    /// seldom copy the same steps as the others otherwise.
    async fn next(&self, failed: &BTreeSet<u64>) -> Option<u64> {
        let Task { seat, seats, .. } = &self.task;
        let waiting: Vec<u64> =
            self.shared.orders().waiting.iter().rev().filter(|step| !failed.contains(step)).copied().collect();
        let newest = *waiting.first()?;
        let listing = match seats.len() > 1 && waiting.len() > 1 {
            true => self.shelf.list().await.unwrap_or_default(),
            false => return Some(newest),
        };
        // A copy has its announcement first, and its manifest at the end.
        let announced = layout::partial(layout::MANIFEST);
        let has_begun = |(at, objects): (&At, &BTreeMap<String, u64>)| {
            let is_other = at.seat != *seat && seats.contains(&at.seat);
            (is_other && (is_complete(objects) || objects.contains_key(&announced))).then_some(at.step)
        };
        let begun: BTreeSet<u64> = listing.iter().filter_map(has_begun).collect();
        Some(waiting.into_iter().find(|step| begun.contains(step)).unwrap_or(newest))
    }

    fn score(&self, name: &str) -> Option<f64> {
        retain::score(&self.manifest(name)?.0)
    }

    /// The manifest of a checkpoint here, and its text.
    fn manifest(&self, name: &str) -> Option<(Manifest, Vec<u8>)> {
        let path = self.task.folder.join(name).join(layout::MANIFEST);
        let text = self.task.disk.read(&path).ok()?;
        Some((Manifest::parse(&text, &path).ok()?, text))
    }

    async fn copy(&mut self, step: u64) -> Result<News, CheckpointError> {
        const GONE: &str = "retention has removed it from the run's folder before it was copied";
        let Task { folder, disk, seat, retention, .. } = &self.task;
        let start = Instant::now();
        let at = At { step, seat: *seat };
        let Some(name) = layout::checkpoints(&disk::names(&**disk, folder)?).remove(&step) else {
            return self.pass(at, GONE).await;
        };
        if self.newest > step {
            let mut scores = scores(&self.shelf, &self.shelf.list().await?, *seat, retention).await?;
            scores.insert(step, self.score(&name));
            if retention.judge(&scores, self.newest)[&step] == Verdict::Removed {
                return self.pass(at, "newer ones are in the store, and it would not stay there").await;
            }
        }
        self.begun.insert(step);
        let path = folder.join(&name);
        let bytes = match send(&self.shelf, at, &**disk, &path).await {
            Ok(bytes) => bytes,
            // Retention takes the folder's name before it takes a file.
            Err(error)
                if error.is_damage() && !disk.exists(&path).map_err(CheckpointError::io("look for", &path))? =>
            {
                return self.pass(at, GONE).await;
            }
            Err(error) => return Err(error),
        };
        self.begun.remove(&step);
        self.newest = self.newest.max(step);
        // Also after an older one has followed, which makes one too many.
        let newest = At { step: self.newest, ..at };
        let removed = self.retain(newest).await;
        let (url, seconds) = (at.below(&self.shelf.place).to_string(), start.elapsed().as_secs_f64());
        Ok(News::Uploaded { step, url, bytes, seconds, removed })
    }

    /// Leaves a step out, and takes away what an earlier try may have left of its copy.
    async fn pass(&mut self, at: At, why: &'static str) -> Result<News, CheckpointError> {
        if self.begun.contains(&at.step) {
            retain::tidy(&self.shelf, at, &self.shelf.objects(at).await?).await?;
            self.begun.remove(&at.step);
        }
        Ok(News::Passed { step: at.step, why })
    }
}
