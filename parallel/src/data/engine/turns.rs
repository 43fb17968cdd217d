//! An engine without a thread: whoever simulates gives it its turns.

use super::events::Events;
use super::*;

/// What the engine's thread would do.
pub(crate) struct Turns {
    work: work::Work,
    events: Events,
}

impl Engine {
    /// As [`start`](Self::start), without the thread.
    pub(crate) fn in_turns(
        exchange: Exchange,
        transport: Arc<dyn Transport>,
        inbox: Inbox,
        progress: Arc<Progress>,
    ) -> (Self, Turns) {
        let members = Members::all(exchange.group());
        let (engine, work, incoming) = Self::idle((exchange, members), transport, inbox, progress);
        (engine, Turns { work, events: Events::new(incoming) })
    }

    /// As [`voted`](Self::voted), without waiting.
    pub(crate) fn try_voted(&self) -> Option<Result<Voted, EngineError>> {
        self.replies().poll(Replies::voted)
    }

    /// As [`wait_for`](Self::wait_for), without waiting.
    pub(crate) fn try_sum(&self, index: usize) -> Option<Result<(), EngineError>> {
        self.replies().poll(|replies| replies.sum(index))
    }

    /// As [`settled`](Self::settled), without waiting.
    pub(crate) fn try_settled(&self) -> Option<Result<Settled, EngineError>> {
        self.replies().poll(Replies::settled)
    }
}

impl Turns {
    /// Whether there is something to do.
    pub(crate) fn is_due(&mut self) -> bool {
        self.events.is_due()
    }

    /// Does the next thing.
    pub(crate) fn turn(&mut self) {
        if let Some(event) = self.events.try_next() {
            self.work.turn(event);
        }
    }

    /// Writes down what this rank waits for, as the thread does whenever nothing has happened for a while.
    pub(crate) fn look(&self) {
        self.work.look();
    }
}
