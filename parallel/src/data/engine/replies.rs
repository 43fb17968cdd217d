//! What the engine's thread has said, at the end of the thread that trains.

use std::sync::mpsc::Receiver;

use super::{EngineError, Settled, Voted};

/// What the thread says.
#[derive(Debug)]
pub(super) enum Reply {
    Voted(Box<Voted>),
    /// The whole sum of this parameter is here. It comes after the votes.
    Sum(usize),
    /// The sums of all parameters are here.
    Settled(Box<Settled>),
    Gathered(Vec<Vec<f64>>),
    Burst(f64),
}

/// What it has said that nobody has asked for yet.
#[derive(Debug)]
pub(super) struct Replies {
    incoming: Receiver<Result<Reply, EngineError>>,
    /// Whose whole sum is here.
    sums: Vec<bool>,
    last: Option<Reply>,
    fault: Option<EngineError>,
}

impl Replies {
    pub(super) fn new(incoming: Receiver<Result<Reply, EngineError>>, tensors: usize) -> Self {
        Self { incoming, sums: vec![false; tensors], last: None, fault: None }
    }

    /// A step begins: no sum of it is here.
    pub(super) fn begin(&mut self) {
        self.sums.fill(false);
    }

    /// Waits until `ready` finds what it looks for. A fault stays, for whoever waits after it.
    pub(super) fn wait<T>(&mut self, ready: impl Fn(&mut Self) -> Option<T>) -> Result<T, EngineError> {
        loop {
            if let Some(found) = self.look(&ready) {
                return found;
            }
            let reply = self.incoming.recv().unwrap_or(Err(EngineError::Gone));
            self.note(reply);
        }
    }

    /// As [`wait`](Self::wait), without waiting.
    #[cfg(test)]
    pub(super) fn poll<T>(&mut self, ready: impl Fn(&mut Self) -> Option<T>) -> Option<Result<T, EngineError>> {
        loop {
            if let Some(found) = self.look(&ready) {
                return Some(found);
            }
            let reply = self.incoming.try_recv().ok()?;
            self.note(reply);
        }
    }

    fn look<T>(&mut self, ready: impl Fn(&mut Self) -> Option<T>) -> Option<Result<T, EngineError>> {
        ready(self).map(Ok).or_else(|| self.fault.clone().map(Err))
    }

    fn note(&mut self, reply: Result<Reply, EngineError>) {
        match reply {
            Ok(Reply::Sum(index)) => self.sums[index] = true,
            Ok(reply) => {
                assert!(self.last.is_none(), "one answer at a time: {:?} and {reply:?}", self.last);
                self.last = Some(reply);
            }
            Err(fault) => self.fault = Some(fault),
        }
    }

    pub(super) fn sum(&mut self, index: usize) -> Option<()> {
        self.sums[index].then_some(())
    }

    pub(super) fn voted(&mut self) -> Option<Voted> {
        match self.last.take_if(|last| matches!(last, Reply::Voted(_)))? {
            Reply::Voted(voted) => Some(*voted),
            _ => None,
        }
    }

    pub(super) fn settled(&mut self) -> Option<Settled> {
        match self.last.take_if(|last| matches!(last, Reply::Settled(_)))? {
            Reply::Settled(settled) => Some(*settled),
            _ => None,
        }
    }

    pub(super) fn gathered(&mut self) -> Option<Vec<Vec<f64>>> {
        match self.last.take_if(|last| matches!(last, Reply::Gathered(_)))? {
            Reply::Gathered(values) => Some(values),
            _ => None,
        }
    }

    pub(super) fn burst(&mut self) -> Option<f64> {
        match self.last.take_if(|last| matches!(last, Reply::Burst(_)))? {
            Reply::Burst(bytes_per_s) => Some(bytes_per_s),
            _ => None,
        }
    }
}
