//! The writer's thread: one job after the other.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use super::save::{self, Commit, Extras, Saved};
use super::{Member, Outcome, Part, PieceSpec, Retention, folder, snapshot};
use crate::disk::Disk;
use crate::error::CheckpointError;
use crate::layout;

/// Where everything goes, and what it is.
#[derive(Debug)]
pub(super) struct Target {
    pub disk: Arc<dyn Disk>,
    pub folder: PathBuf,
    pub pieces: Vec<PieceSpec>,
    /// Where each piece lies in a host buffer.
    pub ranges: Vec<Range<usize>>,
    pub role: Role,
    pub retention: Retention,
    /// Whether this rank's file is packed.
    pub packed: AtomicBool,
    /// Whether this rank's file is read again before it counts as written.
    pub read_back: AtomicBool,
    /// While it is set, jobs that the thread has not begun fail at once.
    pub abandoned: AtomicBool,
}

/// For whom a writer writes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role {
    /// A process that commits whatever it has written.
    Alone,
    /// One rank of several.
    Member(Member),
}

/// What the thread is told to do.
#[derive(Debug)]
pub(super) enum Job {
    /// Alone: write, commit, retain.
    Save { step: u64, values: Vec<f32>, extras: Extras },
    /// A member: write this rank's part.
    Write { step: u64, values: Vec<f32> },
    /// The lead: commit all parts.
    Commit { step: u64, id: String, parts: Vec<Part>, extras: Extras },
    /// The lead: the step is kept.
    Retain { step: u64 },
    /// A member: the step is not kept.
    GiveUp { step: u64 },
}

/// The answer to a job; to each there is one.
#[derive(Debug)]
pub(super) struct Done {
    pub step: u64,
    pub outcome: Option<Outcome>,
    /// The host buffer that came with the job.
    pub values: Option<Vec<f32>>,
}

impl Target {
    /// The folder in which a step is put together.
    pub fn partial(&self, step: u64) -> PathBuf {
        self.folder.join(layout::partial(&layout::committed(step)))
    }

    /// Whether this is the name of this rank's own file, packed or not.
    pub fn is_own(&self, file: &str) -> bool {
        [layout::shard(self.role.rank()), layout::packed_shard(self.role.rank())].iter().any(|own| own == file)
    }
}

impl Role {
    pub const fn rank(self) -> usize {
        match self {
            Self::Alone => 0,
            Self::Member(member) => member.rank,
        }
    }

    /// Whether this writer, and no other, commits in its folder.
    pub const fn leads(self) -> bool {
        matches!(self, Self::Alone | Self::Member(Member { lead: true, .. }))
    }
}

impl Job {
    pub const fn step(&self) -> u64 {
        let (Self::Save { step, .. }
        | Self::Write { step, .. }
        | Self::Commit { step, .. }
        | Self::Retain { step }
        | Self::GiveUp { step }) = self;
        *step
    }

    /// The host buffer, if the job came with one.
    pub fn into_values(self) -> Option<Vec<f32>> {
        match self {
            Self::Save { values, .. } | Self::Write { values, .. } => Some(values),
            Self::Commit { .. } | Self::Retain { .. } | Self::GiveUp { .. } => None,
        }
    }

    /// Whether it tidies up after a step rather than bringing it forth.
    const fn tidies(&self) -> bool {
        matches!(self, Self::Retain { .. } | Self::GiveUp { .. })
    }
}

/// The thread: the first host buffer, then one job after the other until the writer is dropped.
pub(super) fn run(target: &Target, first: SyncSender<Vec<f32>>, jobs: &Receiver<Job>, done: &SyncSender<Done>) {
    stand_back();
    // Nobody takes it from a writer that is dropped before its first snapshot.
    let _ = first.send(snapshot::buffer(&target.ranges));
    drop(first);
    while let Ok(job) = jobs.recv() {
        let step = job.step();
        let outcome = if target.abandoned.load(Ordering::SeqCst) && !job.tidies() {
            Some(Outcome::Failed { step, error: CheckpointError::Abandoned { step } })
        } else {
            catch_unwind(AssertUnwindSafe(|| perform(target, &job))).unwrap_or_else(|panic| panicked(&job, &*panic))
        };
        if done.send(Done { step, outcome, values: job.into_values() }).is_err() {
            return;
        }
    }
}

/// Lets whoever trains go first where both want the same core: this thread then takes about a tenth of it, and all of it
/// whenever training waits, for gradients or for a checkpoint.
#[cfg(target_os = "linux")]
pub(crate) fn stand_back() {
    // On Linux it is the priority of the calling thread. A system that refuses it costs training a little.
    const NICER: i32 = 10;
    if let Err(error) = rustix::process::nice(NICER) {
        tracing::debug!(%error, "a thread keeps the priority of those that train");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) const fn stand_back() {}

fn perform(target: &Target, job: &Job) -> Option<Outcome> {
    let started = Instant::now();
    let seconds = || started.elapsed().as_secs_f64();
    let failed = |step| move |error| Outcome::Failed { step, error };
    match job {
        Job::Save { step, values, extras } => Some(save::save(target, *step, values, extras)),
        &Job::Write { step, ref values } => {
            let written = save::write_member(target, step, values);
            Some(written.map_or_else(failed(step), |part| Outcome::Written { step, part, seconds: seconds() }))
        }
        &Job::Commit { step, ref id, ref parts, ref extras } => {
            let committed = save::commit(target, &Commit { step, id, parts, extras });
            Some(committed.map_or_else(failed(step), |Saved { path, bytes, unpacked_bytes }| {
                let removed = Vec::new();
                Outcome::Committed { step, path, bytes, unpacked_bytes, seconds: seconds(), removed }
            }))
        }
        &Job::Retain { step } => {
            let removed = folder::retain(target, step);
            (!removed.is_empty()).then_some(Outcome::Retained { step, removed })
        }
        &Job::GiveUp { step } => {
            folder::take_back(target, step);
            None
        }
    }
}

fn panicked(job: &Job, panic: &(dyn Any + Send)) -> Option<Outcome> {
    let (step, what) = (job.step(), text(panic).to_owned());
    if job.tidies() {
        // What became of the step was told before.
        tracing::error!(step, what, "the checkpoint writer panicked while it tidied up");
        return None;
    }
    Some(Outcome::Failed { step, error: CheckpointError::Panicked { step, what } })
}

/// A panic's message.
pub(super) fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
