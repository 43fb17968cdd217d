//! Pipeline parallelism: which rank computes what, in which order. No run uses it yet.
//!
//! A model is cut into pieces of consecutive layers; rank r of P has piece r, or with V virtual stages the pieces r, P + r,
//! 2P + r and so on. A micro-batch goes forward through all pieces and backward through them again.
//!
//! - [`schedule`]: in which order a rank does its part, as a pure function: GPipe, 1F1B, interleaved 1F1B.
//! - [`timeline`]: all ranks' schedules on a simulated clock: how long, who waits, what is in the way.
//! - [`mod@execute`]: a rank's part of a step, over the ranks of its pipeline.
//! - [`split`]: which layers make a piece, so that the costliest piece costs as little as can be.
//!
//! Every schedule is made for the same semantics: a rank does one action after the other, what it sends leaves without
//! waiting for anybody, and before an action it waits for that action's input. What a rank sends to another arrives in the
//! order in which it was sent, and that is the order in which it is used.

use thiserror::Error;

pub use self::schedule::in_flight;

pub mod execute;
pub mod schedule;
pub mod split;
pub mod timeline;

/// In which order the micro-batches go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All forward passes, then all backward passes ([Huang et al. 2019](https://arxiv.org/abs/1811.06965)). Every
    /// micro-batch's activations are kept.
    GPipe,
    /// A backward pass as soon as there can be one, then one forward and one backward in turn (PipeDream-flush,
    /// [Narayanan et al. 2021](https://arxiv.org/abs/2006.09503)). As long as GPipe, with the activations of no more micro-batches than
    /// stages.
    OneForwardOneBackward,
    /// The same with several pieces a rank ([Narayanan et al. 2021](https://arxiv.org/abs/2104.04473), section 2.2): a
    /// shorter bubble for more messages and some more activations.
    Interleaved,
}

/// Why there is no such pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PipelineError {
    /// Nothing to do, or nobody to do it.
    #[error(
        "expected at least 1 stage, 1 virtual stage and 1 micro-batch, found {stages}, {virtual_stages} and {micro_batches}"
    )]
    Empty {
        /// Ranks.
        stages: usize,
        /// Pieces a rank.
        virtual_stages: usize,
        /// Micro-batches a step.
        micro_batches: usize,
    },
    /// Only the interleaved schedule has several pieces a rank.
    #[error("{kind:?}: expected 1 virtual stage, found {virtual_stages}; several are for the interleaved schedule")]
    VirtualStages {
        /// The schedule.
        kind: Kind,
        /// Pieces a rank.
        virtual_stages: usize,
    },
    /// Nothing to interleave.
    #[error(
        "interleaved: expected at least 2 stages and 2 virtual stages, found {stages} and {virtual_stages}; 1F1B serves \
         there"
    )]
    Interleaves {
        /// Ranks.
        stages: usize,
        /// Pieces a rank.
        virtual_stages: usize,
    },
    /// Micro-batches go through the pieces of a rank in groups of as many as there are stages.
    #[error(
        "interleaved: expected a multiple of the {stages} stages as number of micro-batches, found {micro_batches}; {} \
         would do, or 1F1B", .micro_batches.next_multiple_of(*.stages)
    )]
    Groups {
        /// Ranks.
        stages: usize,
        /// Micro-batches a step.
        micro_batches: usize,
    },
}

/// Which way a micro-batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// From the tokens to the loss.
    Forward,
    /// From the loss to the gradients.
    Backward,
}

/// What a rank does next: it waits for the input, computes, and sends the output on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Action {
    /// Which way.
    pub pass: Pass,
    /// Which of the rank's pieces, from 0.
    pub piece: usize,
    /// Which micro-batch.
    pub micro_batch: usize,
}

/// A pipeline that can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    kind: Kind,
    stages: usize,
    virtual_stages: usize,
    micro_batches: usize,
}

impl Pipeline {
    /// `stages` ranks with `virtual_stages` pieces each, and `micro_batches` micro-batches a step.
    ///
    /// # Errors
    /// There is no such schedule.
    pub const fn new(
        kind: Kind,
        stages: usize,
        virtual_stages: usize,
        micro_batches: usize,
    ) -> Result<Self, PipelineError> {
        if stages == 0 || virtual_stages == 0 || micro_batches == 0 {
            return Err(PipelineError::Empty { stages, virtual_stages, micro_batches });
        }
        match kind {
            Kind::GPipe | Kind::OneForwardOneBackward if virtual_stages != 1 => {
                return Err(PipelineError::VirtualStages { kind, virtual_stages });
            }
            Kind::Interleaved if stages < 2 || virtual_stages < 2 => {
                return Err(PipelineError::Interleaves { stages, virtual_stages });
            }
            Kind::Interleaved if !micro_batches.is_multiple_of(stages) => {
                return Err(PipelineError::Groups { stages, micro_batches });
            }
            _ => {}
        }
        Ok(Self { kind, stages, virtual_stages, micro_batches })
    }

    /// The schedule's kind.
    #[must_use]
    pub const fn kind(self) -> Kind {
        self.kind
    }

    /// Ranks.
    #[must_use]
    pub const fn stages(self) -> usize {
        self.stages
    }

    /// Pieces a rank.
    #[must_use]
    pub const fn virtual_stages(self) -> usize {
        self.virtual_stages
    }

    /// Micro-batches a step.
    #[must_use]
    pub const fn micro_batches(self) -> usize {
        self.micro_batches
    }

    /// Pieces of the model.
    #[must_use]
    pub const fn pieces(self) -> usize {
        self.stages * self.virtual_stages
    }

    /// Which piece of the model a rank's piece is.
    #[must_use]
    pub const fn place(self, rank: usize, piece: usize) -> usize {
        piece * self.stages + rank
    }

    /// What a rank does in a step.
    ///
    /// # Panics
    /// When there is no such rank.
    #[must_use]
    pub fn schedule(self, rank: usize) -> Vec<Action> {
        schedule::schedule(self, rank)
    }

    /// Whose action gives this one its input: activations for a forward pass, their gradient for a backward pass. `None`
    /// where the input is the tokens, or the loss.
    #[must_use]
    pub const fn before(self, rank: usize, action: Action) -> Option<(usize, Action)> {
        let place = self.place(rank, action.piece);
        match action.pass {
            Pass::Forward if place == 0 => None,
            Pass::Backward if place + 1 == self.pieces() => None,
            Pass::Forward => Some(self.at(place - 1, action)),
            Pass::Backward => Some(self.at(place + 1, action)),
        }
    }

    /// Whose action takes what this one gives; `None` where that is the loss, or nobody.
    #[must_use]
    pub const fn after(self, rank: usize, action: Action) -> Option<(usize, Action)> {
        let place = self.place(rank, action.piece);
        match action.pass {
            Pass::Forward if place + 1 == self.pieces() => None,
            Pass::Backward if place == 0 => None,
            Pass::Forward => Some(self.at(place + 1, action)),
            Pass::Backward => Some(self.at(place - 1, action)),
        }
    }

    const fn at(self, place: usize, action: Action) -> (usize, Action) {
        (place % self.stages, Action { piece: place / self.stages, ..action })
    }

    /// The time in which a rank does nothing, in parts of the time in which it computes, where all pieces cost the same
    /// and messages take no time: `(P - 1) / (V M)`.
    #[must_use]
    pub fn bubble(self) -> f64 {
        (self.stages - 1) as f64 / (self.virtual_stages * self.micro_batches) as f64
    }

    /// The most forward passes of which a rank keeps the activations at the same time, each of one of its pieces.
    ///
    /// # Panics
    /// When there is no such rank.
    #[must_use]
    pub fn in_flight_max(self, rank: usize) -> usize {
        let all = self.micro_batches * self.virtual_stages;
        match self.kind {
            Kind::GPipe => all,
            Kind::OneForwardOneBackward | Kind::Interleaved => all.min(schedule::warm_up(self, rank) + 1),
        }
    }
}

#[cfg(test)]
mod tests;
