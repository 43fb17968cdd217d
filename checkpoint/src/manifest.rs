//! What a checkpoint holds, where each piece of each tensor lies, and the size and hash of every file.
//!
//! The text carries its own hash, taken over the text itself with sixty-four zeros in the hash's place: every byte
//! counts, and checking it needs no canonical form of JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::CheckpointError;
use crate::safetensors_file;

mod file;
mod tensor;

pub use file::FileEntry;
pub(crate) use file::check_file;
pub use tensor::{BOX_DIMS_MAX, BOXES_MAX, Piece, TensorEntry};
pub(crate) use tensor::{difference, stored_shape};

/// What [`Manifest::format`] says.
pub const FORMAT: &str = "tributary-checkpoint";

/// The version of a checkpoint none of whose files is packed.
pub const VERSION: u64 = 1;

/// The version of a checkpoint with a packed file, and the newest that this build reads. Builds from before there were
/// packed files refuse it by its number.
pub const PACKED_VERSION: u64 = 2;

/// The one type of tensors in checkpoints.
pub const DTYPE: &str = "F32";

/// Everything that stands before the hash, in every version.
const PREFIX: &[u8] = b"{\n  \"blake3\": \"";
const HASH_DIGITS: usize = 64;

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`], or [`PACKED_VERSION`] if some file is packed.
    pub version: u64,
    /// Optimiser steps done.
    pub step: u64,
    /// What the manifests of one commit have in common when several folders hold its parts; empty, and left out of the
    /// text, where a process commits alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Every file but the manifest, by its name in the folder.
    pub files: BTreeMap<String, FileEntry>,
    /// What the trainer keeps besides tensors: the data cursor, the random key and the like. Opaque here.
    pub state: Value,
}

#[derive(Serialize, Deserialize)]
struct Envelope<Body> {
    blake3: String,
    body: Body,
}

impl Manifest {
    /// Elements of all tensors that no file here is said to hold: another machine may have them.
    #[must_use]
    pub fn absent_count(&self) -> usize {
        self.tensors.values().map(TensorEntry::absent_count).fold(0, usize::saturating_add)
    }

    /// The text of `manifest.json`. `path` is for messages.
    ///
    /// # Errors
    /// A manifest that [`parse`](Self::parse) would refuse.
    pub fn render(&self, path: &Path) -> Result<Vec<u8>, CheckpointError> {
        self.check(path)?;
        let envelope = Envelope { blake3: "0".repeat(HASH_DIGITS), body: self };
        let json = |source| CheckpointError::Json { path: path.to_path_buf(), source };
        let mut text = serde_json::to_vec_pretty(&envelope).map_err(json)?;
        text.push(b'\n');
        assert!(text.starts_with(PREFIX), "the hash is the first key of the envelope");
        let hash = blake3::hash(&text).to_hex();
        text[PREFIX.len()..][..HASH_DIGITS].copy_from_slice(hash.as_bytes());
        Ok(text)
    }

    /// Reads the text of a `manifest.json` and checks all of it. `path` is for messages.
    ///
    /// # Errors
    /// A damaged text, a newer version, or the first thing in it that makes no sense.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        check_hash(text, path)?;
        let fault = |why: String| CheckpointError::ManifestText { path: path.to_path_buf(), why };
        let envelope: Envelope<Value> = serde_json::from_slice(text).map_err(|why| fault(why.to_string()))?;
        let format = envelope.body.get("format").and_then(Value::as_str);
        if format != Some(FORMAT) {
            return Err(fault(format!("its format is {}", format.unwrap_or("not given"))));
        }
        // The version first: a newer one may have another shape altogether.
        let version = envelope.body.get("version").and_then(Value::as_u64);
        match version {
            Some(VERSION | PACKED_VERSION) => {}
            Some(found) if found > PACKED_VERSION => {
                return Err(CheckpointError::Version { path: path.to_path_buf(), found, supported: PACKED_VERSION });
            }
            _ => return Err(fault(format!("expected version {VERSION} or {PACKED_VERSION}, found {version:?}"))),
        }
        let manifest: Self = serde_json::from_value(envelope.body).map_err(|why| fault(why.to_string()))?;
        manifest.check(path)?;
        Ok(manifest)
    }

    /// The pieces that lie in `file`, each with the name of its tensor, in name order.
    #[must_use]
    pub fn pieces_in(&self, file: &str) -> Vec<(&str, &Piece)> {
        let pieces = self
            .tensors
            .iter()
            .flat_map(|(name, tensor)| tensor.pieces.iter().map(move |piece| (name.as_str(), piece)));
        pieces.filter(|(_, piece)| piece.file == file).collect()
    }

    /// The files in which no tensor lies.
    #[must_use]
    pub fn attachments(&self) -> BTreeMap<&String, &FileEntry> {
        let shards: BTreeSet<&String> =
            self.tensors.values().flat_map(|tensor| &tensor.pieces).map(|piece| &piece.file).collect();
        self.files.iter().filter(|(name, _)| !shards.contains(name)).collect()
    }

    /// The version of a checkpoint of these files.
    #[must_use]
    pub fn version_of(files: &BTreeMap<String, FileEntry>) -> u64 {
        if files.values().any(|file| file.unpacked_bytes.is_some()) { PACKED_VERSION } else { VERSION }
    }

    /// Checks that names stay inside the folder and that the pieces of every tensor fit together.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        for (name, file) in &self.files {
            check_file(name, file, path)?;
        }
        let expected = Self::version_of(&self.files);
        if self.version != expected {
            let why = format!("version {} does not go with its files, which make it version {expected}", self.version);
            return Err(CheckpointError::ManifestText { path: path.to_path_buf(), why });
        }
        safetensors_file::check_names(self.tensors.keys().map(String::as_str))?;
        for (name, tensor) in &self.tensors {
            tensor.check(name, path)?;
            if let Some(piece) = tensor.pieces.iter().find(|piece| !self.files.contains_key(&piece.file)) {
                let why = format!("a piece lies in {:?}, which is not among the files", piece.file);
                return Err(tensor.fault(name, path, why));
            }
        }
        Ok(())
    }
}

fn check_hash(text: &[u8], path: &Path) -> Result<(), CheckpointError> {
    let damaged = |expected: &[u8], found| CheckpointError::ManifestHash {
        path: path.to_path_buf(),
        expected: String::from_utf8_lossy(expected).into_owned(),
        found,
    };
    let hash = text.strip_prefix(PREFIX).and_then(|rest| rest.get(..HASH_DIGITS));
    let Some(hash) = hash else {
        return Err(damaged(b"nothing", blake3::hash(text).to_hex().to_string()));
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(PREFIX).update(&[b'0'; HASH_DIGITS]).update(&text[PREFIX.len() + HASH_DIGITS..]);
    let found = hasher.finalize().to_hex();
    if found.as_bytes() == hash { Ok(()) } else { Err(damaged(hash, found.to_string())) }
}

/// A text whose hash is right, whatever it says.
#[cfg(test)]
pub(crate) fn sealed(body: &Value) -> Vec<u8> {
    let mut text = PREFIX.to_vec();
    text.extend_from_slice(&[b'0'; HASH_DIGITS]);
    text.extend_from_slice(format!("\", \"body\": {body}}}").as_bytes());
    let hash = blake3::hash(&text).to_hex();
    text[PREFIX.len()..][..HASH_DIGITS].copy_from_slice(hash.as_bytes());
    text
}

#[cfg(test)]
mod tests;
