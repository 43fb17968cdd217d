//! Steps in flight: from the offer until nothing is left to do for them.

use super::Outcome;
use super::save::Extras;

/// Steps that may be in flight at a time, and host buffers at most.
pub(super) const IN_FLIGHT_MAX: usize = 2;

/// Jobs of one step at most: a part, a commit, and what follows once it is settled.
const JOBS_MAX: usize = 3;

/// Places in a channel to or from the thread. It is never full: a step in flight has at most [`JOBS_MAX`] jobs that are
/// not answered.
pub(super) const QUEUE_MAX: usize = IN_FLIGHT_MAX * JOBS_MAX;

/// One step in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub step: u64,
    pub phase: Phase,
    /// Nobody will ask for more. A writer alone settles at the offer.
    pub settled: bool,
    /// Jobs that the thread has not answered.
    pub jobs: usize,
    /// On the lead, what the commit will store besides tensors.
    pub extras: Option<Extras>,
}

/// How far this rank has come with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Writing,
    Written,
    Committing,
    Committed,
    Failed,
}

impl Flight {
    pub const fn new(step: u64, settled: bool) -> Self {
        Self { step, phase: Phase::Writing, settled, jobs: 0, extras: None }
    }

    /// Whether its place is free again.
    pub const fn over(&self) -> bool {
        self.settled && self.jobs == 0
    }

    /// What the thread's answer means for the step.
    pub const fn answered(&mut self, outcome: Option<&Outcome>) {
        self.jobs -= 1;
        self.phase = match outcome {
            Some(Outcome::Written { .. }) => Phase::Written,
            Some(Outcome::Committed { .. }) => Phase::Committed,
            Some(Outcome::Failed { .. }) => Phase::Failed,
            Some(Outcome::Retained { .. }) | None => self.phase,
        };
    }

    /// Hands over what the commit stores, or says why there can be none now.
    pub fn begin_commit(&mut self) -> Result<Extras, &'static str> {
        match self.phase {
            Phase::Written => {
                self.phase = Phase::Committing;
                self.extras.take().ok_or("its state was not kept")
            }
            Phase::Writing => Err("this rank's own part is not reported as written yet"),
            Phase::Failed => Err("it has failed on this rank; settle it and offer it again"),
            Phase::Committing | Phase::Committed => Err("its parts were handed in before"),
        }
    }
}
