//! Why a step cannot be completed, and who hears of it at once.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::data::exchange::ExchangeError;
use crate::note::NoteError;
use crate::transport::Loss;

/// Why a step cannot be completed. Every later request fails with the same.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EngineError {
    /// A rank is gone.
    #[error(transparent)]
    Lost(#[from] Loss),
    /// What a rank sent cannot be used.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// What a rank sent cannot be used.
    #[error("rank {from}, step {step}: {error}")]
    Note {
        /// Who sent it.
        from: usize,
        /// The step that was running here.
        step: u64,
        /// What is wrong.
        error: NoteError,
    },
    /// A rank sent what nobody waits for.
    #[error("rank {from}, step {step}: {what}; do all ranks run the same recipe and build?")]
    OutOfTurn {
        /// Who sent it.
        from: usize,
        /// The step that was running here.
        step: u64,
        /// Expected, found.
        what: String,
    },
    /// What a rank sent cannot be used, as its reader found before it came here.
    #[error("rank {from}, step {step}: {what}")]
    Unreadable {
        /// Who sent it.
        from: usize,
        /// The step that was running here.
        step: u64,
        /// What is wrong.
        what: String,
    },
    /// Somebody ended the run.
    #[error("{0}")]
    Aborted(String),
    /// The thread is no more, which is a fault of the program.
    #[error("the thread that exchanges gradients has died; please report this")]
    Gone,
}

/// Who hears of the first fault, in the engine's thread.
#[derive(Clone, Default)]
pub(super) struct OnFault(Option<Arc<Hear>>);

type Hear = dyn Fn(&EngineError) + Send + Sync;

impl OnFault {
    pub(super) fn new(on_fault: impl Fn(&EngineError) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(on_fault)))
    }

    pub(super) fn tell(&self, fault: &EngineError) {
        if let (Some(on_fault), false) = (&self.0, matches!(fault, EngineError::Aborted(_))) {
            on_fault(fault);
        }
    }
}

impl fmt::Debug for OnFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnFault").field(&self.0.is_some()).finish()
    }
}
