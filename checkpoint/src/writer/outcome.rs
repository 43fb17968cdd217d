//! What a caller gives to a writer, and what it hears from it.

use std::path::PathBuf;
use std::sync::Arc;

use super::Part;
use crate::error::CheckpointError;

/// What became of an offered snapshot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Offer {
    /// It is copied and will be written.
    Taken {
        /// Seconds that the copy took.
        copy_s: f64,
    },
    /// Two steps are in flight, or, of a [`Member`](super::Member), this very step; nothing was copied.
    Busy,
}

/// What the thread has done, or could not do.
#[derive(Debug)]
pub enum Outcome {
    /// A member's part is on the disk; the step is in flight still. The lead of the folder needs the part.
    Written {
        /// The step.
        step: u64,
        /// What was written.
        part: Part,
        /// Seconds that the writing took.
        seconds: f64,
    },
    /// The checkpoint is on the disk and survives a crash.
    Committed {
        /// The step.
        step: u64,
        /// Its folder.
        path: PathBuf,
        /// Bytes of all its files.
        bytes: u64,
        /// Bytes that they would have if none were packed.
        unpacked_bytes: u64,
        /// Seconds from the start of the writing to the commit; of a lead, from the start of the commit.
        seconds: f64,
        /// Older checkpoints that retention removed thereafter; of a lead none, which retains when the step is settled.
        removed: Vec<u64>,
    },
    /// Older checkpoints were removed after a step was settled as kept.
    Retained {
        /// The step.
        step: u64,
        /// The steps removed.
        removed: Vec<u64>,
    },
    /// The checkpoint, or a member's part of it, is not known to be on the disk; earlier ones are as they were. When the
    /// very last sync failed, a whole checkpoint may stand there all the same.
    Failed {
        /// The step.
        step: u64,
        /// Why.
        error: CheckpointError,
    },
}

/// A small extra file stored inside the checkpoint, such as `tokenizer.json` or `recipe.toml`.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Its plain name.
    pub name: String,
    /// Its content.
    pub bytes: Arc<[u8]>,
}
