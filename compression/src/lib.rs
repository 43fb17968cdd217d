//! How a block of gradient becomes bytes and back, and what error feedback remembers.
//!
//! This crate knows no tensor library and no network: slices in, bytes out, so that checkpoints and exports can use
//! the very same kernels as the gradients.
//!
//! - [`codec`]: the family of codecs: encode, decode, decode-and-add, and the exact size of what each one writes.
//! - [`kernel`]: which instructions do it, on how many threads; the bits are the same with all.
//! - [`residual`]: what error feedback remembers, and how it follows a change of the mesh.
//! - [`cost`]: which codec gives the shortest step.
//! - [`weights`]: matrices in few bits, for export.
//! - [`workers`]: threads for codecs.
//! - [`ledger`]: exact sums of f32, to prove that nothing is lost.
//! - [`region`]: the address of a part of a tensor, shared by gradients, checkpoints and manifests.

pub mod codec;
pub mod cost;
pub mod kernel;
pub mod ledger;
pub mod region;
pub mod residual;
pub mod weights;
pub mod workers;

pub use codec::{Codec, Found, Owned, Part, Payload, PayloadError};
pub use kernel::{Level, Stores};
pub use region::{Region, RegionError};
pub use residual::{Residual, ResidualError, Side};
pub use weights::{Quantised, WeightsError};
pub use workers::Workers;

/// Elements a block: each block has one scale, and every cut of a tensor falls on a block border.
pub const BLOCK: usize = 128;
