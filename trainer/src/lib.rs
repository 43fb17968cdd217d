//! Tributary's trainer: from a recipe to an exported model.
//!
//! - [`cli`]: the command line of the binary `tributary`.
//! - [`recipe`]: what a run should do, one TOML file.
//! - [`data`]: from text to batches of tokens.
//! - [`model`]: a Llama-style decoder as plain burn modules.
//! - [`kernels`]: fused operations with their own backward.
//! - [`device`]: from `[device]` to a burn device.
//! - [`step`]: one training step; [`optimizer`]: AdamW and the schedule; [`state`]: what a step changes.
//! - [`run`]: a run from its folder to its end.
//! - [`cut`]: how a model is cut between ranks; [`replica`]: those that hold one together; [`tensor`]: the parts of a layer,
//!   [`pipeline`]: the stages.
//! - [`weights`]: weights that exist already; [`export`]: Hugging Face's format; [`generate`]: text from a model.
//! - [`plan`]: what a recipe would take, before anything is run.
//! - [`launch`]: the process that starts the ranks and watches over them.
//! - [`prometheus`]: the numbers of all ranks for Prometheus.
//! - [`tamper`]: faults for tests.
//! - [`mod@bench`]: speed of this machine.
//! - [`allocator`]: of the binary; [`rng`]: random numbers without state; [`log`]: where log lines go; [`error`]: everything that can go wrong.

// Upstream marks its LibTorch backend deprecated; here it is a feature, and the yardstick on CPUs.
#![cfg_attr(feature = "libtorch", allow(deprecated))]

pub mod allocator;
pub mod bench;
pub mod cli;
pub mod cut;
pub mod data;
pub mod device;
pub mod error;
pub mod export;
pub mod generate;
pub mod kernels;
pub mod launch;
pub mod log;
pub mod model;
pub mod optimizer;
pub mod pipeline;
pub mod plan;
pub mod prometheus;
pub mod recipe;
pub mod replica;
pub mod rng;
pub mod run;
pub mod state;
pub mod step;
pub mod tamper;
pub mod tensor;
pub mod weights;

/// The version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
