//! What a manifest says of a file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::HASH_DIGITS;
use crate::error::CheckpointError;
use crate::layout;
use crate::tree::{BLOCK, Subtrees, Tree};

/// One file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// Its BLAKE3 hash in lower-case hex.
    pub blake3: String,
    /// Of a packed file, the size of the safetensors file that it stands for; left out of the text of all others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked_bytes: Option<u64>,
    /// The values of its blocks, with which a part of it can be checked alone; left out of the text of files of one block,
    /// and of all that builds wrote before there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subtrees: Option<Subtrees>,
}

impl FileEntry {
    /// What the file would be if it were not packed.
    #[must_use]
    pub fn plain_bytes(&self) -> u64 {
        self.unpacked_bytes.unwrap_or(self.bytes)
    }

    /// Its hash, if it is of one block, so that the hash alone proves it.
    pub(crate) fn one_block(&self) -> Option<blake3::Hash> {
        (self.bytes <= BLOCK).then(|| blake3::Hash::from_hex(&self.blake3).ok()).flatten()
    }

    /// The values of its blocks, if they are here.
    ///
    /// # Errors
    /// Values that are not those of a file of this size and hash.
    pub(crate) fn tree(&self) -> Result<Option<Tree>, String> {
        self.subtrees.as_ref().map(|subtrees| subtrees.tree(self.bytes, &self.blake3)).transpose()
    }
}

/// Checks that a file's name is plain and its hash one, and that the values of its blocks make that hash.
pub(crate) fn check_file(name: &str, file: &FileEntry, path: &Path) -> Result<(), CheckpointError> {
    if let Some(why) = layout::fault_of_file_name(name) {
        return Err(CheckpointError::FileName { path: path.to_path_buf(), name: name.to_owned(), why });
    }
    let fault = |why| CheckpointError::ManifestText { path: path.to_path_buf(), why: format!("file {name}: {why}") };
    let digits = file.blake3.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    if !digits || file.blake3.len() != HASH_DIGITS {
        return Err(fault(format!("expected {HASH_DIGITS} lower-case hex digits, found {:?}", file.blake3)));
    }
    file.tree().map(|_| ()).map_err(fault)
}
