//! Why a collective operation cannot be completed.

use thiserror::Error;

use super::message::MessageError;
use crate::transport::Loss;

/// Why an operation cannot be completed. But for [`Call`](Self::Call), which has sent nothing, every later operation of
/// this rank fails with the same.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CollectiveError {
    /// The call makes no sense here.
    #[error("{what}")]
    Call {
        /// What was expected, what came.
        what: String,
    },
    /// A rank is gone.
    #[error(transparent)]
    Lost(#[from] Loss),
    /// Two ranks are at different calls.
    #[error(
        "step {step}: rank {rank} is at {here}, rank {other} at {there}; do all ranks run the same recipe and build?"
    )]
    Disagreement {
        /// This rank.
        rank: usize,
        /// The step that was running here; 0 before the first.
        step: u64,
        /// Where this rank is.
        here: String,
        /// The other rank.
        other: usize,
        /// Where it is.
        there: String,
    },
    /// Another rank saw what is wrong.
    #[error("rank {by} ended it: {what}")]
    Refused {
        /// Who.
        by: usize,
        /// What it saw.
        what: String,
    },
    /// What a rank sent cannot be used.
    #[error("rank {from}: {error}")]
    Message {
        /// Who sent it.
        from: usize,
        /// What is wrong.
        error: MessageError,
    },
    /// A message of another group of ranks, or from nobody of this one.
    #[error(
        "rank {from} sent a collective message of epoch {found}, expected epoch {epoch} and another rank below {ranks}"
    )]
    Stranger {
        /// Who sent it.
        from: usize,
        /// The epoch of the message.
        found: u32,
        /// The epoch that is running.
        epoch: u32,
        /// Ranks in the run.
        ranks: usize,
    },
    /// A rank is further ahead than this one has room for.
    #[error("rank {from} sent {bytes} bytes that nobody here has asked for yet, at most {max} are kept")]
    Flood {
        /// Who sent it.
        from: usize,
        /// Bytes that would have been kept.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// Somebody ended the run.
    #[error("{0}")]
    Aborted(String),
}

impl CollectiveError {
    /// What is wrong, where the sender is named beside it.
    pub(super) fn of_sender(&self) -> String {
        match self {
            Self::Message { error, .. } => error.to_string(),
            other => other.to_string(),
        }
    }

    /// Whether the other members do not know of it, unless this rank tells them.
    pub(super) const fn is_news(&self) -> bool {
        matches!(self, Self::Disagreement { .. } | Self::Message { .. } | Self::Stranger { .. } | Self::Flood { .. })
    }
}
