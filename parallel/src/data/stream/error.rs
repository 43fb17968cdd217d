//! What can be wrong with the gradients of a step.

use thiserror::Error;

use crate::data::engine::EngineError;

/// Why a step's gradients do not add up. All but the last are faults of the program, not of the data.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The gradient has not the parameter's number of elements.
    #[error("step {step}, parameter {parameter}: the gradient has {found} elements, the parameter has {expected}")]
    Size {
        /// The step.
        step: u64,
        /// The parameter's logical name.
        parameter: String,
        /// Elements of the parameter.
        expected: usize,
        /// Elements that came.
        found: usize,
    },
    /// A parameter gave its gradient twice in one micro-batch, as a weight does that is tapped at two places.
    #[error(
        "step {step}, parameter {parameter}: a second gradient in micro-batch {micro_batch}; tap a tied weight once"
    )]
    Twice {
        /// The step.
        step: u64,
        /// The parameter's logical name.
        parameter: String,
        /// Which micro-batch.
        micro_batch: usize,
    },
    /// A device tensor could not be read back as f32.
    #[error("step {step}, parameter {parameter}: the gradient could not be read as f32: {why}")]
    Read {
        /// The step.
        step: u64,
        /// The parameter's logical name.
        parameter: String,
        /// What the backend said.
        why: String,
    },
    /// The other ranks.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
