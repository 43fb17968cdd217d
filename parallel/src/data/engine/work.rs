//! What the engine's thread does: one event after the other.
//!
//! - `incoming`: what other ranks' messages do.
//! - `answers`: what the thread says once it knows.

mod answers;
mod incoming;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::burst::Burst;
use super::events::Events;
use super::fault::OnFault;
use super::packing::Packing;
use super::replies::Reply;
use super::{EngineError, Event, Members};
use crate::data::exchange::{Exchange, Group, Outgoing};
use crate::data::nodes::Nodes;
use crate::data::norm::SquaredNorm;
use crate::frame::{PAYLOAD_BYTES_MAX, Phase};
use crate::note::{Ballot, Note};
use crate::progress::Progress;
use crate::trace::{Label, Trace, Track};
use crate::transport::{Incoming, Loss, Transport};

pub(super) struct Work {
    exchange: Arc<Mutex<Exchange>>,
    transport: Arc<dyn Transport>,
    progress: Arc<Progress>,
    handed: Arc<AtomicU64>,
    trace: Option<Arc<Trace>>,
    replies: Sender<Result<Reply, EngineError>>,
    group: Group,
    members: Members,
    /// The step under way, or the last one.
    step: u64,
    open: bool,
    /// Our ballot, and whether it was sent.
    own: Option<(Ballot, bool)>,
    ballots: Vec<Option<(Ballot, SquaredNorm)>>,
    /// Whether all have voted in the step under way: what is still to come are sums.
    voted: bool,
    /// What came before its step began, and how many bytes of it from each rank.
    early: Vec<(usize, Bytes)>,
    early_bytes: Vec<usize>,
    early_bytes_max: usize,
    /// Gathered numbers of each rank that were not asked for yet, and which round comes next.
    values: Vec<VecDeque<(u64, Vec<f64>)>>,
    gathering: bool,
    round: u64,
    burst: Burst,
    bursting: bool,
    packing: Option<Packing>,
    encode_s: f64,
    first_encode: Option<Instant>,
    fault: Option<EngineError>,
    on_fault: OnFault,
}

/// What the thread shares with the engine's other end.
pub(super) struct Shared {
    pub(super) exchange: Arc<Mutex<Exchange>>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) progress: Arc<Progress>,
    pub(super) handed: Arc<AtomicU64>,
    pub(super) members: Members,
    pub(super) trace: Option<Arc<Trace>>,
    pub(super) on_fault: OnFault,
}

impl Work {
    pub(super) fn new(shared: Shared, replies: Sender<Result<Reply, EngineError>>) -> Self {
        let Shared { exchange, transport, progress, handed, members, trace, on_fault } = shared;
        let (group, elements) = {
            let exchange = lock(&exchange);
            (exchange.group(), exchange.plan().elements())
        };
        Self {
            early_bytes_max: 2 * size_of::<f32>() * elements + PAYLOAD_BYTES_MAX,
            ballots: vec![None; members.ranks()],
            early_bytes: vec![0; members.ranks()],
            values: vec![VecDeque::new(); members.ranks()],
            exchange,
            transport,
            progress,
            handed,
            trace,
            replies,
            group,
            members,
            step: 0,
            open: false,
            own: None,
            voted: false,
            early: Vec::new(),
            gathering: false,
            round: 0,
            burst: Burst::new(group),
            bursting: false,
            packing: None,
            encode_s: 0.0,
            first_encode: None,
            fault: None,
            on_fault,
        }
    }

    pub(super) fn run(mut self, incoming: Receiver<Event>) {
        let mut events = Events::new(incoming);
        loop {
            match events.next() {
                Ok(Event::Quit) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(event) => self.turn(event),
                Err(RecvTimeoutError::Timeout) => self.look(),
            }
        }
    }

    /// Takes one event and does everything that follows from it.
    pub(super) fn turn(&mut self, event: Event) {
        let asks = matches!(event, Event::Settle(_) | Event::Gather(_) | Event::Burst);
        let waited = self.waits();
        if self.fault.is_none() {
            self.fault = self.event(event).and_then(|()| self.answer()).err();
            if let Some(fault) = &self.fault {
                self.on_fault.tell(fault);
                if asks || waited {
                    self.reply_fault();
                }
            }
        } else if asks {
            self.reply_fault();
        }
    }

    fn waits(&self) -> bool {
        self.own.is_some() || self.voted || self.gathering || self.bursting
    }

    fn reply_fault(&mut self) {
        if let Some(fault) = &self.fault {
            // Nobody listens once the engine's other end is dropped.
            let _ = self.replies.send(Err(fault.clone()));
        }
    }

    fn event(&mut self, event: Event) -> Result<(), EngineError> {
        match event {
            Event::Begin(step) => self.begin(step),
            Event::Bucket(bucket, values) => {
                self.bucket(bucket, values);
                Ok(())
            }
            Event::Settle(ballot) => {
                self.own = Some((ballot, false));
                Ok(())
            }
            Event::Publish(index) => {
                self.publish(index);
                Ok(())
            }
            Event::Gather(values) => {
                let note = Note::Values(values.clone()).write(self.group.epoch, self.round);
                self.to_all(&note);
                self.values[self.members.rank()].push_back((self.round, values));
                self.gathering = true;
                Ok(())
            }
            Event::Burst => {
                self.burst.send(&*self.transport, &self.members);
                self.bursting = true;
                Ok(())
            }
            Event::Incoming(Incoming::Message { from, bytes }, came) => {
                if let (Some(trace), Some(came)) = (&self.trace, came) {
                    trace.queued(Track::Receive(from), came, Label::of("receive", &bytes));
                }
                self.message(from, bytes)
            }
            Event::Incoming(Incoming::Left { to }, _) => {
                if let Some(to) = self.members.index_of(to) {
                    self.encoding(None, |exchange, out| exchange.left(to, out));
                }
                self.progress.advance();
                Ok(())
            }
            Event::Incoming(Incoming::Lost { rank, why }, _) => {
                let (why, waited) = match self.waits() {
                    true => (why, self.missing()),
                    false => (self.owing(rank, why), None),
                };
                Err(Loss { rank, step: self.step, why, waited }.into())
            }
            Event::Incoming(Incoming::Unreadable { from, what }, _) => {
                Err(EngineError::Unreadable { from, step: self.step, what })
            }
            Event::Pack(packing, rate) => {
                // What is packed already stays so, at another rate.
                self.packing.get_or_insert(*packing).set_link(rate);
                Ok(())
            }
            Event::Abort(why) => Err(EngineError::Aborted(why)),
            Event::Quit => Ok(()),
        }
    }

    fn begin(&mut self, step: u64) -> Result<(), EngineError> {
        lock(&self.exchange).begin(step);
        if let Some(packing) = &mut self.packing {
            packing.begin(step);
        }
        self.step = step;
        self.open = true;
        self.ballots.fill(None);
        self.encode_s = 0.0;
        self.first_encode = None;
        self.early_bytes.fill(0);
        for (from, bytes) in std::mem::take(&mut self.early) {
            self.message(from, bytes)?;
        }
        Ok(())
    }

    fn bucket(&mut self, bucket: usize, values: Vec<f32>) {
        self.encoding(Some(bucket), |exchange, out| exchange.give(bucket, values, out));
        self.progress.advance();
    }

    fn publish(&mut self, index: usize) {
        let bucket = lock(&self.exchange).plan().slot(index).bucket;
        self.encoding(Some(bucket), |exchange, out| exchange.publish(index, out));
        self.progress.advance();
    }

    /// Does what may encode, and keeps the time of it. `bucket` is what is given, if something is.
    fn encoding(&mut self, bucket: Option<usize>, work: impl FnOnce(&mut Exchange, &mut dyn FnMut(Outgoing))) {
        let start = Instant::now();
        let (mut bytes, mut of) = (0, bucket);
        let mut way = Way {
            transport: &*self.transport,
            handed: &self.handed,
            members: &self.members,
            packing: &mut self.packing,
            nodes: self.group.nodes(),
        };
        work(&mut lock(&self.exchange), &mut |out| {
            if out.phase != Phase::Gather {
                (bytes, of) = (bytes + out.frame.len(), of.or(Some(out.bucket)));
            }
            way.hand(out);
        });
        if of.is_none() {
            return;
        }
        if self.open {
            self.first_encode.get_or_insert(start);
            self.encode_s += start.elapsed().as_secs_f64();
        }
        if let Some(trace) = &self.trace {
            let label = Label { bucket: of, bytes: Some(bytes), ..Label::new("encode", self.step) };
            trace.span(Track::Gradients, start, label);
        }
    }

    fn trace_vote(&self, of_rank: usize) {
        if let Some(trace) = &self.trace {
            let label = Label { of_rank: Some(of_rank), ..Label::new("vote", self.step) };
            trace.instant(Track::Gradients, label);
        }
    }

    fn reply(&self, reply: Reply) -> Result<(), EngineError> {
        self.replies.send(Ok(reply)).map_err(|_| EngineError::Gone)
    }

    fn to_all(&self, message: &Bytes) {
        self.members.others().for_each(|to| self.transport.send(to, message.clone()));
    }

    /// Writes down what this rank waits for, for the heartbeat.
    pub(super) fn look(&self) {
        // Sums that are still on their way may have nobody waiting for them: the next forward pass may be far from needing them.
        let asked = self.own.is_some() || self.gathering || self.bursting;
        if self.fault.is_some() || !(asked || self.voted) {
            return;
        }
        let missing = self.missing();
        if asked {
            self.progress.waits_for(missing);
        } else {
            self.progress.waits_for_if_waiting(missing);
        }
    }

    /// Why a rank is lost, with what of it this rank will need next.
    fn owing(&self, rank: usize, why: String) -> String {
        let exchange = lock(&self.exchange);
        let next = self.members.index_of(rank).filter(|_| self.open).and_then(|of| exchange.first_missing_of_rank(of));
        match next {
            Some(index) => {
                format!("{why}; the next of it that this rank needs is {}", self.piece(&exchange, rank, index))
            }
            None => why,
        }
    }

    /// A part of a gradient, or a sum, as people find it.
    fn piece(&self, exchange: &Exchange, rank: usize, index: usize) -> String {
        let plan = exchange.plan();
        let (bucket, name) = (plan.slot(index).bucket, &plan.parameters()[index].name);
        // The training thread may be at the next step already.
        let what = if exchange.parameter_codec(index).is_some() { "parameters" } else { "sums" };
        match self.voted {
            true => format!("rank {rank}'s {what} of step {}, bucket {bucket}, parameter {name}", self.step),
            false => format!("rank {rank}'s part of bucket {bucket}, parameter {name}"),
        }
    }

    /// What another rank has not sent yet.
    fn missing(&self) -> Option<String> {
        if self.gathering {
            let late = self.values.iter().position(VecDeque::is_empty)?;
            return Some(format!("rank {late}'s numbers"));
        }
        if self.bursting {
            return Some(self.burst.missing(&self.members));
        }
        let exchange = lock(&self.exchange);
        if let Some((rank, index)) = exchange.first_missing() {
            return Some(self.piece(&exchange, self.members.members()[rank], index));
        }
        let late = self.ballots.iter().position(Option::is_none)?;
        Some(format!("rank {late}'s vote"))
    }
}

/// The way of a frame out of this thread.
struct Way<'a> {
    transport: &'a dyn Transport,
    handed: &'a AtomicU64,
    members: &'a Members,
    packing: &'a mut Option<Packing>,
    nodes: Nodes,
}

impl Way<'_> {
    fn hand(&mut self, Outgoing { to, bucket, phase, frame }: Outgoing) {
        // Inside a node a link is fast, and what a member hands on may be packed already.
        let crosses = self.nodes.node(to) != self.nodes.node(self.nodes.rank);
        let frame = match &mut self.packing {
            Some(packing) if crosses => packing.pack(bucket, frame, phase == Phase::Gather),
            _ => frame,
        };
        self.transport.send(self.members.members()[to], frame);
        self.handed.fetch_add(1, Ordering::SeqCst);
    }
}

fn lock(exchange: &Mutex<Exchange>) -> MutexGuard<'_, Exchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}
