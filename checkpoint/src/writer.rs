//! Two host buffers, one thread, the commit, retention.
//!
//! [`Writer::offer`] copies the state into a host buffer, which is all that training waits for. The thread writes it
//! into `step-N.partial`, syncs every file, the manifest last, and renames the folder to `step-N`: the rename is the
//! commit. Whatever fails before it leaves the earlier checkpoints as they were, and the thread goes on.
//!
//! A process alone ([`Writer::new`]) does all of that by itself. Of several ranks ([`Writer::member`]) each writes its own
//! file and reports a [`Part`]; the lead, given the parts of all, commits; and when the caller knows whether all folders
//! have committed, it settles the step on every rank. Who tells whom is the caller's matter: nothing here knows a network.
//!
//! A snapshot's host buffer holds as many bytes as the tensors that this process stores. One is made when the writer starts,
//! so that the first snapshot does not wait for the system to find its pages; a second one only when a snapshot is taken
//! while another is being written. There are never more.
//!
//! A folder of checkpoints belongs to one writer at a time, or to the members of one run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::disk::paced::{Limit, SystemClock, paced};
use crate::disk::{self, Disk};
use crate::error::CheckpointError;

mod flight;
mod folder;
mod member;
mod outcome;
mod part;
mod retention;
mod save;
mod snapshot;
mod thread;

use flight::{Flight, IN_FLIGHT_MAX, Phase, QUEUE_MAX};
use save::Extras;
use thread::{Done, Job, Role, Target};

pub use folder::give_up_all;
pub use outcome::{Attachment, Offer, Outcome};
pub use part::{Member, Part, PieceSpec, TensorSpec};
pub use retention::{Retention, SCORE, Verdict};
pub use snapshot::Snapshot;
pub(crate) use thread::stand_back;

/// Writes checkpoints in the background. Dropping it waits for the jobs that the thread has.
///
/// A step is in flight from the [`offer`](Self::offer) that took it. For a process alone that ends with the report of
/// what became of it. For a member it ends when the step is [settled](Self::settle), whatever failed before, and the
/// thread has answered every job of it.
#[derive(Debug)]
pub struct Writer {
    target: Arc<Target>,
    /// Nothing once the writer is being dropped.
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// Bytes a second that the thread may write.
    limit: Arc<Limit>,
    /// The first host buffer, until it is fetched from the thread, which makes it before anything else.
    first: Option<Receiver<Vec<f32>>>,
    /// Host buffers that no snapshot is using.
    spare: Vec<Vec<f32>>,
    /// Oldest first.
    flights: Vec<Flight>,
    finished: Vec<Outcome>,
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
        let pieces = specs.into_iter().map(|spec| PieceSpec::whole(spec, &folder)).collect::<Result<_, _>>()?;
        Self::start(disk, folder, pieces, Role::Alone, retention)
    }

    fn start(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        pieces: Vec<PieceSpec>,
        role: Role,
        retention: Retention,
    ) -> Result<Self, CheckpointError> {
        let ranges = part::buffer_ranges(&pieces, &folder)?;
        disk::ensure_folder(&*disk, &folder)?;
        let limit = Arc::new(Limit::default());
        let disk = Arc::new(paced(disk, Arc::clone(&limit), Arc::new(SystemClock::default())));
        let [packed, read_back, abandoned] = [(); 3].map(|()| AtomicBool::new(false));
        let target = Target { disk, folder, pieces, ranges, role, retention, packed, read_back, abandoned };
        let target = Arc::new(target);
        if role.leads() {
            folder::sweep(&target)?;
        }
        let (jobs, incoming) = sync_channel(QUEUE_MAX);
        let (outgoing, done) = sync_channel(QUEUE_MAX);
        let (making, first) = sync_channel(1);
        let theirs = Arc::clone(&target);
        let thread = std::thread::Builder::new()
            .name("checkpoint-writer".into())
            .spawn(move || thread::run(&theirs, making, &incoming, &outgoing))
            .map_err(CheckpointError::io("start the thread that writes into", &target.folder))?;
        let (spare, flights, finished) = (Vec::new(), Vec::new(), Vec::new());
        let (jobs, thread, first) = (Some(jobs), Some(thread), Some(first));
        Ok(Self { target, jobs, done, thread, limit, first, spare, flights, finished })
    }

    /// From now on files take no more bytes a second than this; 0 is no limit. It holds for what is being written, too.
    pub fn limit(&self, bytes_per_s_max: u64) {
        self.limit.set(bytes_per_s_max);
    }

    /// From the next file on, whether it is packed: zstd frames of shuffled bytes, smaller, and more work for the thread.
    pub fn pack(&self, packed: bool) {
        self.target.packed.store(packed, Ordering::SeqCst);
    }

    /// From the next checkpoint on, whether this rank's file is read from the disk again, and its hash compared, before it counts as
    /// written. If all ranks do so no older one is ever removed for one that was not read.
    pub fn read_back(&self, on: bool) {
        self.target.read_back.store(on, Ordering::SeqCst);
    }

    /// Bytes that the thread has written and read so far, for whoever wonders whether it gets on.
    #[must_use]
    pub fn moved_bytes(&self) -> u64 {
        self.limit.moved_bytes()
    }

    /// Whether an [`offer`](Self::offer) of `step` would be taken now. It stays so until the next offer: ranks that must
    /// decide alike ask, compare, and then offer.
    pub fn ready(&mut self, step: u64) -> bool {
        self.collect();
        let again =
            matches!(self.target.role, Role::Member(_)) && self.flights.iter().any(|flight| flight.step == step);
        self.flights.len() < IN_FLIGHT_MAX && !again
    }

    /// Offers the state after `step` steps: unless two steps are in flight, `fill` copies it into a host buffer, and the
    /// thread writes it with `state` and `attachments`. How that ends is told by [`outcomes`](Self::outcomes).
    ///
    /// A member writes its own part alone, and is refused a step that is in flight already. Its `state` and `attachments`
    /// are the lead's matter, which stores them at the commit; the others' are dropped.
    pub fn offer(
        &mut self,
        step: u64,
        state: Value,
        attachments: Vec<Attachment>,
        fill: impl FnOnce(&mut Snapshot<'_>),
    ) -> Offer {
        if !self.ready(step) {
            return Offer::Busy;
        }
        let started = Instant::now();
        let mut values = self.buffer();
        let unfilled = Snapshot::fill(&self.target.ranges, &mut values, fill);
        let copy_s = started.elapsed().as_secs_f64();
        let (role, extras) = (self.target.role, Extras { state, attachments });
        self.flights.push(Flight::new(step, matches!(role, Role::Alone)));
        let at = self.flights.len() - 1;
        if let Some(index) = unfilled {
            let tensor = self.target.pieces[index].tensor.clone();
            self.spare.push(values);
            self.fail(at, CheckpointError::Unfilled { step, tensor });
        } else if let Role::Alone = role {
            self.send(at, Job::Save { step, values, extras });
        } else {
            self.flights[at].extras = role.leads().then_some(extras);
            self.send(at, Job::Write { step, values });
        }
        self.flights.retain(|flight| !flight.over());
        Offer::Taken { copy_s }
    }

    /// What was done since the last call, in the order in which it was asked for. Never waits.
    pub fn outcomes(&mut self) -> Vec<Outcome> {
        self.collect();
        std::mem::take(&mut self.finished)
    }

    /// Waits until the thread has done what it was told, which takes as long as the disk takes for two checkpoints at
    /// most. For a process alone nothing is in flight then; a member's steps are until they are settled.
    pub fn flush(&mut self) -> Vec<Outcome> {
        while self.flights.iter().any(|flight| flight.jobs > 0) {
            match self.done.recv() {
                Ok(done) => self.take(done),
                Err(_) => self.lose(),
            }
        }
        std::mem::take(&mut self.finished)
    }

    /// Waits until the thread has done something that it was told, at most so long. [`outcomes`](Self::outcomes) has it.
    pub fn wait(&mut self, within: Duration) {
        match self.done.recv_timeout(within) {
            Ok(done) => self.take(done),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.lose(),
        }
    }

    fn buffer(&mut self) -> Vec<f32> {
        // The thread makes the first one; if it is at it still, waiting for that is as quick as making another.
        let there = self.spare.pop().or_else(|| self.first.take()?.recv().ok());
        there.unwrap_or_else(|| snapshot::buffer(&self.target.ranges))
    }

    fn collect(&mut self) {
        while self.flights.iter().any(|flight| flight.jobs > 0) {
            match self.done.try_recv() {
                Ok(done) => self.take(done),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.lose(),
            }
        }
    }

    fn take(&mut self, Done { step, outcome, values }: Done) {
        // The thread answers in order: of two offers of one step the first that waits is meant.
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.step == step && flight.jobs > 0) {
            flight.answered(outcome.as_ref());
        }
        self.flights.retain(|flight| !flight.over());
        self.spare.extend(values);
        self.finished.extend(outcome);
    }

    fn send(&mut self, at: usize, job: Job) {
        let jobs = self.jobs.as_ref().expect("the sender is taken in drop alone");
        match jobs.send(job) {
            Ok(()) => self.flights[at].jobs += 1,
            Err(unsent) => {
                let step = unsent.0.step();
                match unsent.0 {
                    Job::Retain { .. } => {}
                    // It takes as long as a removal takes; only a thread that is dead leaves it to the caller.
                    Job::GiveUp { .. } => folder::take_back(&self.target, step),
                    Job::Save { .. } | Job::Write { .. } | Job::Commit { .. } => {
                        self.fail(at, CheckpointError::Gone { step });
                    }
                }
                self.spare.extend(unsent.0.into_values());
            }
        }
    }

    fn fail(&mut self, at: usize, error: CheckpointError) {
        let flight = &mut self.flights[at];
        flight.phase = Phase::Failed;
        self.finished.push(Outcome::Failed { step: flight.step, error });
    }

    /// The thread is dead: what it had will never be written.
    fn lose(&mut self) {
        for flight in self.flights.iter_mut().filter(|flight| flight.jobs > 0) {
            flight.jobs = 0;
            if matches!(flight.phase, Phase::Writing | Phase::Committing) {
                flight.phase = Phase::Failed;
                let (step, error) = (flight.step, CheckpointError::Gone { step: flight.step });
                self.finished.push(Outcome::Failed { step, error });
            }
        }
        self.flights.retain(|flight| !flight.over());
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Somebody waits.
        self.limit.set(0);
        self.jobs = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(what = thread::text(&*panic), "the checkpoint writer's thread had died");
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

#[cfg(test)]
mod abandon_tests;
#[cfg(test)]
pub(crate) mod crash_tests;
#[cfg(test)]
mod member_crash_tests;
#[cfg(test)]
mod member_tests;
#[cfg(test)]
mod retention_tests;
#[cfg(test)]
mod tests;
