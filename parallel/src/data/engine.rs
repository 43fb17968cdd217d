//! The thread that moves gradients between ranks while the backward pass computes.
//!
//! It owns one rank's [`Exchange`]: full buckets come from the backward pass, frames from the other ranks; it encodes,
//! hands frames to the transport, adds, votes. The thread that trains meets it so in a step:
//! [`Engine::begin`], [`Engine::give`] for each full bucket, [`Engine::vote`], and [`Engine::voted`], which waits until all
//! ranks have voted. From then on it is known what becomes of the step, and sums may still be on their way:
//! [`Engine::wait_for`] waits for one, as the next forward pass needs it, [`Engine::read`] decodes it, and [`Engine::settled`]
//! waits for all. The next step
//! begins after that. With a sharded optimiser parameters take the place of sums: [`Engine::publish`] sends those that this
//! rank owns, after the votes.
//!
//! - `work`: what the thread does, one event after the other; `burst`: how it measures the rate of a link.
//! - `replies`: what the thread has said, at the other end.
//! - `members`: which ranks of the run sum together, where not all of them do. `fault`: why a step cannot be completed, and who hears
//!   of it at once.
//!
//! A rank can be ahead of another by one step at the most, because every step ends with the votes of all: what comes for
//! the next step is kept until it begins. So everything that waits here is bounded by what a step sends.

mod burst;
mod events;
mod fault;
mod members;
pub mod packing;
mod replies;
mod work;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

pub use self::fault::EngineError;
use self::fault::OnFault;
pub use self::members::Members;
use self::packing::Packing;
use self::replies::Replies;
use super::exchange::{Exchange, Group, Verdict};
use super::norm::SquaredNorm;
use crate::note::Ballot;
use crate::progress::Progress;
use crate::trace::{Label, Trace, Track};
use crate::transport::{Counted, Incoming, Sink, Transport};

/// What all ranks together say of a step.
#[derive(Clone, Debug)]
pub struct Voted {
    /// What every rank does with it.
    pub verdict: Verdict,
    /// Of every rank, in rank order.
    pub ballots: Vec<Ballot>,
    /// Of the sum over all ranks. It means nothing when the verdict is to skip.
    pub norm: SquaredNorm,
    /// Buffers to be filled again, one a bucket.
    pub(super) buffers: Vec<Vec<f32>>,
}

/// What is known of a step once its whole sum is here.
#[derive(Clone, Debug)]
pub struct Settled {
    /// Seconds of encoding.
    pub encode_s: f64,
    /// When the first encoding began.
    pub first_encode: Option<Instant>,
    /// When the whole sum was here.
    pub last_sum: Instant,
    /// What zstd serves.
    pub packed: Packed,
}

/// What zstd serves, as of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packed {
    /// Buckets that were packed.
    pub buckets: usize,
    /// Buckets that are packed since this step, or no longer.
    pub changes: Vec<packing::Change>,
}

#[derive(Debug)]
enum Event {
    Begin(u64),
    Bucket(usize, Vec<f32>),
    Settle(Ballot),
    Publish(usize),
    Gather(Vec<f64>),
    Burst,
    /// With when it came, where that is recorded.
    Incoming(Incoming, Option<Instant>),
    Pack(Box<Packing>, f64),
    Abort(String),
    Quit,
}

/// Where events wait for the thread. It exists before the transport does, whose messages go to it.
#[derive(Debug)]
pub struct Inbox {
    events: Sender<Event>,
    incoming: Receiver<Event>,
    trace: Option<Arc<Trace>>,
    on_fault: OnFault,
}

/// Ends whatever the engine is waiting for.
#[derive(Clone, Debug)]
pub struct Aborter(Sender<Event>);

/// The training thread's end.
#[derive(Debug)]
pub struct Engine {
    events: Sender<Event>,
    /// Behind a lock only so that a stream can be shared with the taps.
    replies: Mutex<Replies>,
    exchange: Arc<Mutex<Exchange>>,
    transport: Arc<dyn Transport>,
    handed: Arc<AtomicU64>,
    progress: Arc<Progress>,
    members: Members,
    trace: Option<Arc<Trace>>,
    thread: Option<JoinHandle<()>>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Inbox {
    /// An inbox whose engine records what it does, if that is wanted.
    #[must_use]
    pub fn new(trace: Option<Arc<Trace>>) -> Self {
        let (events, incoming) = channel();
        Self { events, incoming, trace, on_fault: OnFault::default() }
    }

    /// An engine that tells its first fault as soon as it has one, from its own thread: the thread that trains may ask much later.
    /// That somebody else has ended the run is not told.
    #[must_use]
    pub fn telling(self, on_fault: impl Fn(&EngineError) + Send + Sync + 'static) -> Self {
        Self { on_fault: OnFault::new(on_fault), ..self }
    }

    /// What a transport calls.
    #[must_use]
    pub fn sink(&self) -> Sink {
        let (events, traces) = (self.events.clone(), self.trace.is_some());
        // When the engine is gone nobody wants the message.
        Arc::new(move |incoming| _ = events.send(Event::Incoming(incoming, traces.then(Instant::now))))
    }

    /// Ends whatever the engine waits for, once it exists.
    #[must_use]
    pub fn aborter(&self) -> Aborter {
        Aborter(self.events.clone())
    }
}

impl Aborter {
    /// The run ends, for this reason.
    pub fn abort(&self, why: &str) {
        // When the engine is gone there is nothing to end.
        let _ = self.0.send(Event::Abort(why.to_owned()));
    }
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(
        exchange: Exchange,
        transport: Arc<dyn Transport>,
        inbox: Inbox,
        progress: Arc<Progress>,
    ) -> std::io::Result<Self> {
        let members = Members::all(exchange.group());
        Self::start_among((exchange, members), transport, inbox, progress)
    }

    /// As [`start`](Self::start), where some ranks of the run sum together and all of them vote.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    ///
    /// # Panics
    /// When the members are not those of the exchange.
    pub fn start_among(
        (exchange, members): (Exchange, Members),
        transport: Arc<dyn Transport>,
        inbox: Inbox,
        progress: Arc<Progress>,
    ) -> std::io::Result<Self> {
        let (mut engine, work, incoming) = Self::idle((exchange, members), transport, inbox, progress);
        let thread = std::thread::Builder::new().name("gradients".into()).spawn(move || work.run(incoming))?;
        engine.thread = Some(thread);
        Ok(engine)
    }

    /// An engine, what its thread is to do, and where that hears of it.
    fn idle(
        (exchange, members): (Exchange, Members),
        transport: Arc<dyn Transport>,
        inbox: Inbox,
        progress: Arc<Progress>,
    ) -> (Self, work::Work, Receiver<Event>) {
        assert!(members.fit(exchange.group()), "{members:?} and {:?}", exchange.group());
        let Inbox { events, incoming, trace, on_fault } = inbox;
        let exchange = Arc::new(Mutex::new(exchange));
        let handed = Arc::new(AtomicU64::new(0));
        let (answer, replies) = channel();
        let shared = work::Shared {
            exchange: exchange.clone(),
            transport: transport.clone(),
            progress: progress.clone(),
            handed: handed.clone(),
            members: members.clone(),
            trace: trace.clone(),
            on_fault,
        };
        let work = work::Work::new(shared, answer);
        let tensors = exchange.lock().unwrap_or_else(PoisonError::into_inner).plan().parameters().len();
        let replies = Mutex::new(Replies::new(replies, tensors));
        (Self { events, replies, exchange, transport, handed, progress, members, trace, thread: None }, work, incoming)
    }

    /// Starts a step. The one before it is [settled](Self::settled).
    pub fn begin(&self, step: u64) {
        self.replies().begin();
        self.event(Event::Begin(step));
    }

    /// Gives a full bucket; [`voted`](Self::voted) hands the buffer back.
    pub fn give(&self, bucket: usize, values: Vec<f32>) {
        self.progress.bucket();
        self.event(Event::Bucket(bucket, values));
    }

    /// Votes. Every bucket has been given.
    pub fn vote(&self, ballot: Ballot) {
        self.event(Event::Settle(ballot));
    }

    /// Waits until the votes of all ranks are here.
    ///
    /// # Errors
    /// A rank is lost or sends what makes no sense, or the run was aborted.
    pub fn voted(&self) -> Result<Voted, EngineError> {
        self.replies().wait(Replies::voted)
    }

    /// Where parameters travel: sends what the exchange's [`own_mut`](Exchange::own_mut) holds of parameter `index`, once the
    /// step was [voted](Self::voted) for. A step that counts waits for that of every parameter.
    pub fn publish(&self, index: usize) {
        self.event(Event::Publish(index));
    }

    /// Waits until the whole sum of parameter `index` is here, once the step was [voted](Self::voted) about.
    ///
    /// # Errors
    /// As [`voted`](Self::voted).
    pub fn wait_for(&self, index: usize) -> Result<(), EngineError> {
        self.replies().wait(|replies| replies.sum(index))
    }

    /// Decodes the sum of parameter `index` from `start` on, which begins a block, to the end of a block or of the parameter; by all
    /// threads of the caller's pool. It is there once one has [waited for](Self::wait_for) it.
    ///
    /// # Panics
    /// When it has no such part.
    pub fn read(&self, index: usize, start: usize, out: &mut [f32]) {
        let exchange = self.exchange();
        let begun = self.trace.as_ref().map(|_| Instant::now());
        exchange.read(index, start, out);
        if let (Some(trace), Some(begun)) = (&self.trace, begun) {
            let (bytes, bucket) = (Some(size_of_val(out)), Some(exchange.plan().slot(index).bucket));
            let label = Label { bucket, parameter: Some(index), bytes, ..Label::new("decode", exchange.step()) };
            trace.span(Track::Compute, begun, label);
        }
    }

    /// Waits until the whole sum of every parameter is here, once the step was [voted](Self::voted) about.
    ///
    /// # Errors
    /// As [`voted`](Self::voted).
    pub fn settled(&self) -> Result<Settled, EngineError> {
        self.replies().wait(Replies::settled)
    }

    /// Gathers numbers from every rank, in rank order; all ranks call it at the same place. To be called between steps.
    ///
    /// # Errors
    /// As [`settled`](Self::settled).
    pub fn gather(&self, values: Vec<f64>) -> Result<Vec<Vec<f64>>, EngineError> {
        self.event(Event::Gather(values));
        self.replies().wait(Replies::gathered)
    }

    /// Measures the link from the rank before this one, in bytes a second, while every rank sends to the next one. All
    /// ranks call it at the same place, between steps.
    ///
    /// # Errors
    /// As [`settled`](Self::settled).
    pub fn link_bytes_per_s(&self) -> Result<f64, EngineError> {
        // All begin together, so that every link is as busy as it will be.
        self.gather(Vec::new())?;
        self.event(Event::Burst);
        self.replies().wait(Replies::burst)
    }

    /// From the next step on, packs with zstd what that saves time for on a link of so many bytes a second.
    ///
    /// # Errors
    /// There is no memory for it.
    ///
    /// # Panics
    /// When the rate is not above zero.
    pub fn pack(&self, link_bytes_per_s: f64) -> std::io::Result<()> {
        assert!(link_bytes_per_s > 0.0, "a rate was measured, {link_bytes_per_s} is none");
        let buckets = self.exchange().plan().buckets().len();
        self.event(Event::Pack(Box::new(Packing::new(buckets, link_bytes_per_s)?), link_bytes_per_s));
        Ok(())
    }

    /// The sums of the last step that are here, and the residuals. Not to be held for long while a step is under way: the
    /// thread waits for it.
    pub fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes at the sockets so far.
    #[must_use]
    pub fn counted(&self) -> Counted {
        self.transport.counted()
    }

    /// Frames of gradients that were handed to the transport so far.
    #[must_use]
    pub fn handed(&self) -> u64 {
        self.handed.load(Ordering::SeqCst)
    }

    /// Which ranks sum together, of all that vote.
    #[must_use]
    pub const fn members(&self) -> &Members {
        &self.members
    }

    /// Who this rank is among those that sum together.
    pub fn group(&self) -> Group {
        self.exchange().group()
    }

    /// How far this rank is.
    #[must_use]
    pub const fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    fn replies(&self) -> MutexGuard<'_, Replies> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(&self, event: Event) {
        // If the thread is gone, the next reply says so.
        let _ = self.events.send(event);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.event(Event::Quit);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread that exchanges gradients had died");
            // Whatever was thrown may panic again when it is dropped.
            std::mem::forget(panic);
        }
    }
}

#[cfg(test)]
pub(crate) mod turns;

#[cfg(test)]
mod tests;
