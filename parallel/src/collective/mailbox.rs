//! Where collective messages wait until the training thread asks for them.
//!
//! Messages of one rank come in the order in which it sent them, and every member knows which ones an operation brings:
//! so what is first in the queue of a sender and a sub-group is the piece that is due, or the two are at different calls.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::call::{Call, Operation};
use super::error::CollectiveError;
use super::message::{Body, Leg, Message, is_collective};
use crate::progress::Progress;
use crate::transport::{Incoming, Loss, Sink};

/// What may wait from one rank, unless [told otherwise](Mailbox::keeping).
pub const KEPT_BYTES_MAX: usize = 1 << 30;
/// After so long a waiting rank writes down what it waits for.
const LOOK: Duration = Duration::from_millis(200);

/// Who this rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub rank: usize,
    /// Ranks in the run.
    pub ranks: usize,
    /// Changes whenever the group of ranks does.
    pub epoch: u32,
}

/// Where collective messages wait. It exists before the transport does, whose messages go [to it](Self::sink).
#[derive(Clone, Debug)]
pub struct Mailbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    place: Place,
    kept_bytes_max: usize,
    progress: Arc<Progress>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Pieces in the order of their arrival.
    queues: HashMap<Key, VecDeque<Piece>>,
    /// Bytes of messages in the queues, by sender.
    kept: Vec<usize>,
    /// What ended everything.
    fault: Option<CollectiveError>,
}

/// Sends and collective operations have queues of their own: a send may lie there while others come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    from: usize,
    group: u64,
    sends: bool,
}

/// A piece as it came.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) call: Call,
    pub(super) leg: Leg,
    pub(super) offset: u64,
    pub(super) bytes: Bytes,
    /// Of the whole message.
    kept: usize,
}

/// What the training thread waits for.
#[derive(Debug)]
pub(super) struct Wait<'a> {
    /// The call that it is at.
    pub(super) call: &'a Call,
    /// Whose piece is due.
    pub(super) from: usize,
    /// All members.
    pub(super) members: &'a [usize],
}

impl Mailbox {
    /// An empty one. `progress` is told what this rank waits for.
    #[must_use]
    pub fn new(place: Place, progress: Arc<Progress>) -> Self {
        Self::keeping(KEPT_BYTES_MAX, place, progress)
    }

    /// As [`new`](Self::new), with another bound on what may wait from one rank.
    #[must_use]
    pub fn keeping(kept_bytes_max: usize, place: Place, progress: Arc<Progress>) -> Self {
        let state = State { queues: HashMap::new(), kept: vec![0; place.ranks], fault: None };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Self(Arc::new(Shared { place, kept_bytes_max, progress, state, changed }))
    }

    /// What a transport calls: collective messages stay here, everything else goes on to the engine, and a loss to both. What cannot be
    /// used goes on too: between collective operations nobody looks here.
    #[must_use]
    pub fn sink(&self, engine: Sink) -> Sink {
        let mailbox = self.clone();
        Arc::new(move |incoming| match incoming {
            Incoming::Message { from, bytes } if is_collective(&bytes) => {
                // What another rank has refused it has told as well.
                if let Err(fault) = mailbox.take_in(from, &bytes)
                    && fault.is_news()
                {
                    engine(Incoming::Unreadable { from, what: fault.of_sender() });
                }
            }
            incoming => {
                if let Incoming::Lost { rank, why } = &incoming {
                    let (step, why) = (mailbox.progress().step(), why.clone());
                    mailbox.fail(Loss { rank: *rank, step, why, waited: None }.into());
                }
                engine(incoming);
            }
        })
    }

    /// Ends whatever waits here: the run is over, for this reason.
    pub fn abort(&self, why: &str) {
        self.fail(CollectiveError::Aborted(why.to_owned()));
    }

    /// Who this rank is.
    #[must_use]
    pub fn place(&self) -> Place {
        self.0.place
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.0.progress
    }

    /// What a call may bring from one rank: with the two legs of it, and the first leg of the next from a rank that is
    /// ahead, no more than may wait.
    pub(super) fn part_bytes_max(&self) -> usize {
        self.0.kept_bytes_max / 4
    }

    /// What ended everything, if something did.
    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        self.lock().fault.clone().map_or(Ok(()), Err)
    }

    /// Waits for a piece. A loss, an abort, a refusal and a dissent end it.
    pub(super) fn wait(&self, wait: &Wait<'_>) -> Result<Piece, CollectiveError> {
        let mut state = self.lock();
        let mut has_looked = false;
        let found = loop {
            if let Some(mut fault) = state.fault.clone() {
                if let CollectiveError::Lost(loss) = &mut fault {
                    loss.waited = Some(wait.what());
                }
                break Err(fault);
            }
            if let Some((other, there)) = state.dissent(wait) {
                let there = there.to_string();
                let fault = self.disagreement(wait.call.to_string(), other, there);
                self.end(&mut state, fault.clone());
                break Err(fault);
            }
            if let Some(piece) = state.pop(wait.key(wait.from)) {
                break Ok(piece);
            }
            let (woken, timeout) = self.0.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if timeout.timed_out() && !has_looked {
                has_looked = true;
                self.progress().waits_for(Some(wait.what()));
            }
        };
        if has_looked {
            self.progress().waits_for(None);
        }
        found
    }

    /// Two ranks are not at the same place.
    pub(super) fn disagreement(&self, here: String, other: usize, there: String) -> CollectiveError {
        CollectiveError::Disagreement { rank: self.0.place.rank, step: self.progress().step(), here, other, there }
    }

    /// Ends everything; the first fault stays.
    pub(super) fn fail(&self, fault: CollectiveError) {
        self.end(&mut self.lock(), fault);
    }

    fn end(&self, state: &mut State, fault: CollectiveError) {
        state.fault.get_or_insert(fault);
        // Nobody will ask for them.
        state.queues.clear();
        state.kept.fill(0);
        self.0.changed.notify_all();
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.queues.is_empty() && state.kept.iter().all(|&bytes| bytes == 0)
    }

    /// What is wrong with it is told once.
    fn take_in(&self, from: usize, bytes: &Bytes) -> Result<(), CollectiveError> {
        // Outside the lock: a checksum takes longer than anything else here.
        let message = Message::read(bytes);
        let mut state = self.lock();
        if state.fault.is_some() {
            return Ok(());
        }
        let sorted = self.sorted(&mut state, from, bytes.len(), message);
        match &sorted {
            Ok(()) => {
                self.progress().advance();
                self.0.changed.notify_all();
            }
            Err(fault) => self.end(&mut state, fault.clone()),
        }
        sorted
    }

    /// Puts a message into its queue.
    fn sorted(
        &self,
        state: &mut State,
        from: usize,
        kept: usize,
        message: Result<Message, super::message::MessageError>,
    ) -> Result<(), CollectiveError> {
        let Message { call, body } = message.map_err(|error| CollectiveError::Message { from, error })?;
        let Place { rank, ranks, epoch } = self.0.place;
        if call.epoch != epoch || from >= ranks || from == rank {
            return Err(CollectiveError::Stranger { from, found: call.epoch, epoch, ranks });
        }
        let (leg, offset, bytes) = match body {
            Body::Piece { leg, offset, bytes } => (leg, offset, bytes),
            Body::Refusal(what) => return Err(CollectiveError::Refused { by: from, what }),
        };
        // A message takes its place in a queue, and may need a queue of its own.
        let kept = kept + size_of::<Piece>() + size_of::<(Key, VecDeque<Piece>)>();
        let (sum, max) = (state.kept[from] + kept, self.0.kept_bytes_max);
        if sum > max {
            return Err(CollectiveError::Flood { from, bytes: sum, max });
        }
        state.kept[from] = sum;
        let key = Key { from, group: call.group, sends: call.operation == Operation::Send };
        state.queues.entry(key).or_default().push_back(Piece { call, leg, offset, bytes, kept });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn front(&self, key: Key) -> Option<&Call> {
        self.queues.get(&key)?.front().map(|piece| &piece.call)
    }

    fn pop(&mut self, key: Key) -> Option<Piece> {
        let queue = self.queues.get_mut(&key)?;
        let piece = queue.pop_front()?;
        if queue.is_empty() {
            self.queues.remove(&key);
        }
        self.kept[key.from] -= piece.kept;
        Some(piece)
    }

    /// A member that cannot be at the call that this rank waits in, and where it is.
    fn dissent(&self, wait: &Wait<'_>) -> Option<(usize, &Call)> {
        if wait.call.operation == Operation::Send {
            // Without what it was to send, the sender's collective operation cannot end before ours has begun.
            let key = wait.key(wait.from);
            let there = self.front(key).or_else(|| self.front(Key { sends: false, ..key }))?;
            return (there != wait.call).then_some((wait.from, there));
        }
        wait.members.iter().find_map(|&member| {
            let there = self.front(wait.key(member))?;
            // A member that owes nothing may be ahead.
            let counts = member == wait.from || there.sequence <= wait.call.sequence;
            (counts && there != wait.call).then_some((member, there))
        })
    }
}

impl Wait<'_> {
    fn key(&self, from: usize) -> Key {
        Key { from, group: self.call.group, sends: self.call.operation == Operation::Send }
    }

    /// For people.
    fn what(&self) -> String {
        format!("rank {}'s {}", self.from, self.call)
    }
}
