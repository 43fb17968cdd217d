//! Two host buffers, one thread, the commit, retention.
//!
//! [`Writer::offer`] copies the state into a host buffer, which is all that training waits for. The thread writes it
//! into `step-N.partial`, syncs every file, the manifest last, and renames the folder to `step-N`: the rename is the
//! commit. Whatever fails before it leaves the earlier checkpoints as they were, and the thread goes on.
//!
//! A folder of checkpoints belongs to one writer at a time.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use compression::region::elements;
use serde_json::Value;

use crate::disk::{self, Disk};
use crate::error::CheckpointError;
use crate::safetensors_file::check_names;

mod save;

use save::{Job, Target};

/// Snapshots that may wait or be written at a time, and host buffers at most.
const IN_FLIGHT_MAX: usize = 2;

/// A tensor that every snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Sizes of its dimensions.
    pub shape: Vec<usize>,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How many of the newest, the one just committed among them; 0 keeps all.
    pub keep_last: usize,
}

/// What became of an offered snapshot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Offer {
    /// It is copied and will be written.
    Taken {
        /// Seconds that the copy took.
        copy_s: f64,
    },
    /// Two snapshots are in flight; nothing was copied.
    Busy,
}

/// How the writing of a snapshot ended.
#[derive(Debug)]
pub enum Outcome {
    /// The checkpoint is on the disk and survives a crash.
    Committed {
        /// The step.
        step: u64,
        /// Its folder.
        path: PathBuf,
        /// Bytes of all its files.
        bytes: u64,
        /// Seconds from the start of the writing to the commit.
        seconds: f64,
        /// Older checkpoints that retention removed thereafter.
        removed: Vec<u64>,
    },
    /// The checkpoint is not known to be on the disk; earlier ones are as they were. When the very last sync failed, a
    /// whole checkpoint may stand there all the same.
    Failed {
        /// The step.
        step: u64,
        /// Why.
        error: CheckpointError,
    },
}

/// A small extra file stored inside the checkpoint, such as `tokenizer.json` or `recipe.toml`.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Its plain name.
    pub name: String,
    /// Its content.
    pub bytes: Arc<[u8]>,
}

/// A host buffer to be filled. Every tensor must be asked for; one that is not fails the snapshot.
#[derive(Debug)]
pub struct Snapshot<'a> {
    ranges: &'a [Range<usize>],
    values: &'a mut [f32],
    filled: &'a mut [bool],
}

impl Snapshot<'_> {
    /// Where tensor `index` of the writer's specs goes, row-major. It holds what an earlier snapshot left.
    ///
    /// # Panics
    /// When there is no such spec.
    pub fn tensor(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.ranges.len(), "tensor {index} of {}", self.ranges.len());
        self.filled[index] = true;
        &mut self.values[self.ranges[index].clone()]
    }
}

/// Writes checkpoints in the background. Dropping it waits for those in flight.
#[derive(Debug)]
pub struct Writer {
    target: Arc<Target>,
    /// Nothing once the writer is being dropped.
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// Host buffers that no snapshot is using.
    spare: Vec<Vec<f32>>,
    /// The steps that the thread has not reported yet, oldest first.
    in_flight: VecDeque<u64>,
    finished: Vec<Outcome>,
}

#[derive(Debug)]
struct Done {
    outcome: Outcome,
    values: Vec<f32>,
}

impl Writer {
    /// A writer of these tensors into `folder`, which is made if it does not exist. What an earlier writer left half
    /// done in it (folders named `step-N.partial`) is removed.
    ///
    /// # Errors
    /// Specs that make no sense, or what the file system says.
    pub fn new(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        specs: Vec<TensorSpec>,
        retention: Retention,
    ) -> Result<Self, CheckpointError> {
        check_names(specs.iter().map(|spec| spec.name.as_str()))?;
        let ranges = ranges(&specs).map_err(|(tensor, source)| {
            let path = folder.clone();
            CheckpointError::Region { path, tensor, source }
        })?;
        disk::ensure_folder(&*disk, &folder)?;
        let target = Arc::new(Target { disk, folder, specs, ranges, retention });
        save::sweep(&target)?;
        // Neither channel is ever full: no more than this many snapshots are between them.
        let (jobs, incoming) = sync_channel(IN_FLIGHT_MAX);
        let (outgoing, done) = sync_channel(IN_FLIGHT_MAX);
        let theirs = Arc::clone(&target);
        let thread = thread::Builder::new()
            .name("checkpoint-writer".into())
            .spawn(move || run(&theirs, &incoming, &outgoing))
            .map_err(CheckpointError::io("start the thread that writes into", &target.folder))?;
        Ok(Self {
            target,
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            spare: Vec::new(),
            in_flight: VecDeque::new(),
            finished: Vec::new(),
        })
    }

    /// Offers the state after `step` steps: unless two snapshots are in flight, `fill` copies it into a host buffer, and
    /// the thread writes it with `state` and `attachments`. How that ends is told by [`outcomes`](Self::outcomes).
    pub fn offer(
        &mut self,
        step: u64,
        state: Value,
        attachments: Vec<Attachment>,
        fill: impl FnOnce(&mut Snapshot<'_>),
    ) -> Offer {
        self.collect();
        if self.in_flight.len() >= IN_FLIGHT_MAX {
            return Offer::Busy;
        }
        let started = Instant::now();
        let ranges = &self.target.ranges;
        let total = ranges.last().map_or(0, |range| range.end);
        let mut values = self.spare.pop().unwrap_or_else(|| vec![0.0; total]);
        let mut filled: Vec<bool> = ranges.iter().map(Range::is_empty).collect();
        fill(&mut Snapshot { ranges, values: &mut values, filled: &mut filled });
        let copy_s = started.elapsed().as_secs_f64();
        if let Some(index) = filled.iter().position(|&filled| !filled) {
            let tensor = self.target.specs[index].name.clone();
            self.spare.push(values);
            self.finished.push(Outcome::Failed { step, error: CheckpointError::Unfilled { step, tensor } });
            return Offer::Taken { copy_s };
        }
        let jobs = self.jobs.as_ref().expect("the sender is taken in drop alone");
        match jobs.send(Job { step, state, attachments, values }) {
            Ok(()) => self.in_flight.push_back(step),
            Err(unsent) => {
                self.spare.push(unsent.0.values);
                self.finished.push(Outcome::Failed { step, error: CheckpointError::Gone { step } });
            }
        }
        Offer::Taken { copy_s }
    }

    /// What finished since the last call, in the order of the offers. Never waits.
    pub fn outcomes(&mut self) -> Vec<Outcome> {
        self.collect();
        std::mem::take(&mut self.finished)
    }

    /// Waits until nothing is in flight, which takes as long as the disk takes for two checkpoints at most.
    pub fn flush(&mut self) -> Vec<Outcome> {
        while !self.in_flight.is_empty() {
            match self.done.recv() {
                Ok(done) => self.take(done),
                Err(_) => self.give_up(),
            }
        }
        std::mem::take(&mut self.finished)
    }

    fn collect(&mut self) {
        while !self.in_flight.is_empty() {
            match self.done.try_recv() {
                Ok(done) => self.take(done),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.give_up(),
            }
        }
    }

    fn take(&mut self, done: Done) {
        self.in_flight.pop_front();
        self.spare.push(done.values);
        self.finished.push(done.outcome);
    }

    /// The thread is dead: what it had will never be written.
    fn give_up(&mut self) {
        let gone = |step| Outcome::Failed { step, error: CheckpointError::Gone { step } };
        self.finished.extend(self.in_flight.drain(..).map(gone));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(what = text(&*panic), "the checkpoint writer's thread had died");
            // Whatever was thrown may panic again when it is dropped.
            std::mem::forget(panic);
        }
        self.collect();
        for outcome in &self.finished {
            if let Outcome::Failed { step, error } = outcome {
                tracing::error!(step, %error, "a checkpoint failed and nobody asked");
            }
        }
    }
}

/// Where each tensor lies in a buffer: end to end in the order of the specs.
fn ranges(specs: &[TensorSpec]) -> Result<Vec<Range<usize>>, (String, compression::RegionError)> {
    let mut end = 0usize;
    let mut ranges = Vec::with_capacity(specs.len());
    for spec in specs {
        let next = elements(&spec.shape).and_then(|count| {
            // A buffer is one allocation, and those end at `isize::MAX` bytes.
            let next = end.checked_add(count).filter(|&next| next <= isize::MAX as usize / size_of::<f32>());
            next.ok_or_else(|| compression::RegionError::Overflow { shape: spec.shape.clone() })
        });
        let next = next.map_err(|fault| (spec.name.clone(), fault))?;
        ranges.push(end..next);
        end = next;
    }
    Ok(ranges)
}

/// The thread: one job after the other until the writer is dropped.
fn run(target: &Target, jobs: &Receiver<Job>, done: &SyncSender<Done>) {
    while let Ok(job) = jobs.recv() {
        let outcome = catch_unwind(AssertUnwindSafe(|| save::save(target, &job))).unwrap_or_else(|panic| {
            let error = CheckpointError::Panicked { step: job.step, what: text(&*panic).to_owned() };
            Outcome::Failed { step: job.step, error }
        });
        if done.send(Done { outcome, values: job.values }).is_err() {
            return;
        }
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;
