//! The way of a gradient: out of the backward pass, into buckets, and (from the second process on) between ranks.
//!
//! - [`tap`]: closures on the forward value and on the backward gradient, the primitive that everything rests on.
//! - [`collective`]: all-reduce and its kin on sub-groups of the ranks, called from the training thread.
//! - [`frame`]: what is around a payload on its way.
//! - [`coordinator`]: who is part of a run, and whether everybody is alive; [`control`]: a worker's side of it.
//! - [`mesh`]: which ranks belong together: data x pipeline x tensor.
//! - [`pipeline`]: which rank computes what, in which order, where a model is cut into stages.
//! - [`data`]: data parallelism: the static plan of buckets, the buckets, and the stream that hands back the sum.
//! - [`note`]: small messages between ranks: votes, and numbers that all of them gather.
//! - [`tensor`]: tensor parallelism: what ranks that hold one model together exchange inside a forward and a backward pass.
//! - [`transport`]: the way to the other ranks.
//! - [`progress`]: how far a rank is; [`trace`]: what it does when, for a picture.
//!
//! Nothing here knows a model: parameters are logical names with shapes.

// Upstream marks its LibTorch backend deprecated; here it is a feature, and the yardstick on CPUs.
#![cfg_attr(feature = "libtorch", allow(deprecated))]

pub mod collective;
pub mod control;
pub mod coordinator;
pub mod data;
pub mod frame;
pub mod mesh;
pub mod note;
pub mod pipeline;
pub mod progress;
#[cfg(test)]
mod simulation;
pub mod tap;
pub mod tensor;
pub mod trace;
pub mod transport;
pub mod wire;
