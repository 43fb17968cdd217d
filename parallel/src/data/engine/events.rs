//! What the engine's thread takes next.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use super::Event;
use crate::transport::Incoming;

/// How often a waiting rank looks what it waits for.
const LOOK: Duration = Duration::from_millis(200);

/// Events in the order of their arrival, but for frames that have left, which go first: there is room in a window, and what
/// came before may be milliseconds of adding, in which the link would run dry.
pub(super) struct Events {
    incoming: Receiver<Event>,
    left: VecDeque<Event>,
    waiting: VecDeque<Event>,
}

impl Events {
    pub(super) const fn new(incoming: Receiver<Event>) -> Self {
        Self { incoming, left: VecDeque::new(), waiting: VecDeque::new() }
    }

    /// Waits for the next one.
    ///
    /// # Errors
    /// None came for a while, or none will come any more.
    pub(super) fn next(&mut self) -> Result<Event, RecvTimeoutError> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let event = self.incoming.recv_timeout(LOOK)?;
            self.keep(event);
        }
    }

    /// The next one, if there is one.
    pub(super) fn try_next(&mut self) -> Option<Event> {
        self.take_in();
        self.left.pop_front().or_else(|| self.waiting.pop_front())
    }

    /// Whether there is one.
    #[cfg(test)]
    pub(super) fn is_due(&mut self) -> bool {
        self.take_in();
        !(self.left.is_empty() && self.waiting.is_empty())
    }

    fn take_in(&mut self) {
        while let Ok(event) = self.incoming.try_recv() {
            self.keep(event);
        }
    }

    fn keep(&mut self, event: Event) {
        match event {
            Event::Incoming(Incoming::Left { .. }, _) => self.left.push_back(event),
            _ => self.waiting.push_back(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn room_in_a_window_goes_before_what_came_earlier_and_nothing_else_is_reordered() {
        let (events, incoming) = channel();
        let left = |to| Event::Incoming(Incoming::Left { to }, None);
        for event in [Event::Begin(1), left(2), Event::Publish(7), left(3)] {
            events.send(event).expect("somebody listens");
        }
        let mut taken = Events::new(incoming);
        let mut next = || match taken.next() {
            Ok(Event::Incoming(Incoming::Left { to }, _)) => format!("left {to}"),
            other => format!("{other:?}"),
        };
        assert_eq!([next(), next(), next()], ["left 2", "left 3", "Ok(Begin(1))"]);
        events.send(left(4)).expect("somebody listens");
        assert_eq!([next(), next()], ["left 4", "Ok(Publish(7))"]);
        drop(events);
        assert_eq!(next(), "Err(Disconnected)");
    }
}
