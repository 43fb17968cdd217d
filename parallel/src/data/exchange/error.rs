//! Why a sum cannot be completed.

use compression::PayloadError;
use thiserror::Error;

use crate::frame::FrameError;

/// Why the sum cannot be completed. Nothing was taken from the frame.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExchangeError {
    /// Not a frame of this step.
    #[error("rank {from}, step {step}: {error}")]
    Frame {
        /// Who sent it.
        from: usize,
        /// The step that was running here.
        step: u64,
        /// What is wrong.
        error: FrameError,
    },
    /// A payload that its codec does not write.
    #[error("rank {from}, step {step}, parameter {parameter}: {error}")]
    Payload {
        /// Who sent it.
        from: usize,
        /// The step.
        step: u64,
        /// The parameter's logical name.
        parameter: String,
        /// What is wrong.
        error: PayloadError,
    },
    /// A frame that has no place here: another cut of the tensor, another owner, another codec, or a second one.
    #[error("rank {from}, step {step}, {place}: {what}; do all ranks run the same recipe and build?")]
    Place {
        /// Who sent it.
        from: usize,
        /// The step.
        step: u64,
        /// Where it claims to belong.
        place: String,
        /// Expected, found.
        what: String,
    },
}

impl ExchangeError {
    /// The same, of the rank that sent it as the run counts ranks.
    #[must_use]
    pub(crate) fn sent_by(mut self, rank: usize) -> Self {
        let (Self::Frame { from, .. } | Self::Payload { from, .. } | Self::Place { from, .. }) = &mut self;
        *from = rank;
        self
    }
}
