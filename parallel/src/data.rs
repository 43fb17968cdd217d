//! Data parallelism: every rank computes gradients of its own part of the batch, and all of them apply the sum.
//!
//! - [`part`]: what one rank holds of a parameter.
//! - [`plan`]: which parameter goes into which bucket, fixed before the first step.
//! - [`engine`]: the thread that moves gradients between ranks while the backward pass computes.
//! - [`exchange`]: one rank's part in one step's sum, without sockets, threads or clocks.
//! - [`norm`]: the gradient's norm, of which every rank knows a part.
//! - [`nodes`]: which ranks are of one machine, and the way of a shard between machines.
//! - [`owed`]: what several ranks left out, where one goes on alone.
//! - [`rules`]: which codec a tensor's gradient travels in.
//! - [`shard`]: who owns which part of a tensor, and what that costs on the wire.
//! - [`stream`]: takes gradients out of the backward pass, fills buckets, and hands back the sum.

pub mod engine;
pub mod exchange;
pub mod nodes;
pub mod norm;
pub mod owed;
pub mod part;
pub mod plan;
pub mod rules;
pub mod shard;
pub mod stream;

pub use part::Part;
pub use plan::{Parameter, Plan};
pub use stream::{Complete, Finished, Gradient, GradientStream, StreamError, Sum, Timing, Voted};
