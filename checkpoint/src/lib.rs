//! What survives a crash: snapshots of a training run, and the folders that leave it.
//!
//! A checkpoint is a folder of safetensors files and a manifest that names every byte of them. It is written by a
//! thread of its own while training goes on, and it exists from one atomic rename on. `docs/checkpoint-format.md` draws
//! the format and says what a reader must check.
//!
//! - [`disk`]: the one seam to the file system, real and simulated.
//! - [`safetensors_file`]: our streaming writer of safetensors files, hashing as it writes.
//! - `packed`: the same files as zstd frames of shuffled bytes.
//! - [`manifest`]: what a checkpoint holds, where each piece lies, and the hash of every file.
//! - `tree`: hashes of blocks, so that a part of a file can be checked alone.
//! - [`layout`]: the names inside the folder of checkpoints, and which of them count.
//! - [`writer`]: two host buffers, one thread, the commit, retention; for a process alone or for one rank of several.
//! - [`reader`]: lists, opens, verifies and loads checkpoints.
//! - [`inspect`]: what is in one, for people. [`compare`]: how two differ.
//! - [`damaged`]: the newest checkpoint that is whole, and what becomes of those that are not.
//! - [`store`]: copies in an object store.
//! - [`export`]: Hugging Face folders, written at once or not at all, and read back.
//! - [`error`]: everything that can go wrong, with what to do about it.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that unwraps says where it stands"))]

pub mod compare;
pub mod damaged;
pub mod disk;
pub mod error;
pub mod export;
pub mod inspect;
pub mod layout;
pub mod manifest;
mod mapped;
mod packed;
pub mod reader;
mod regular;
pub mod safetensors_file;
pub mod store;
mod tree;
pub mod writer;

pub use disk::{Disk, RealDisk, SimulatedDisk};
pub use error::CheckpointError;
pub use manifest::Manifest;
pub use reader::{Checkpoint, list};
pub use safetensors_file::Dtype;
pub use tree::Subtrees;
pub use writer::{Attachment, Member, Offer, Outcome, Part, PieceSpec, Retention, Snapshot, TensorSpec, Writer};

/// Tensors are written and mapped as they lie in memory, and the format is little-endian.
const _: () =
    assert!(cfg!(target_endian = "little"), "checkpoints are read and written on little-endian machines only");
