//! What a checkpoint holds, where each piece of each tensor lies, and the size and hash of every file.
//!
//! The text carries its own hash, taken over the text itself with sixty-four zeros in the hash's place: every byte
//! counts, and checking it needs no canonical form of JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use compression::Region;
use compression::region::elements;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::CheckpointError;
use crate::{layout, safetensors_file};

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

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// [`DTYPE`].
    pub dtype: String,
    /// Sizes of the dimensions of the whole tensor.
    pub shape: Vec<usize>,
    /// Where its elements lie: flat intervals of the whole tensor, ascending, none twice. What none of them holds, another
    /// machine has stored.
    pub pieces: Vec<Piece>,
}

/// A part of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// A safetensors file of the checkpoint.
    pub file: String,
    /// The key in that file.
    pub key: String,
    /// Which part of the tensor this is.
    pub region: Region,
}

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
}

impl FileEntry {
    /// What the file would be if it were not packed.
    #[must_use]
    pub fn plain_bytes(&self) -> u64 {
        self.unpacked_bytes.unwrap_or(self.bytes)
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<Body> {
    blake3: String,
    body: Body,
}

impl Manifest {
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

    /// The pieces that lie in `file`, each with the name and entry of its tensor, in name order.
    #[must_use]
    pub fn pieces_in(&self, file: &str) -> Vec<(&str, &TensorEntry, &Piece)> {
        let pieces = self
            .tensors
            .iter()
            .flat_map(|(name, tensor)| tensor.pieces.iter().map(move |piece| (name.as_str(), tensor, piece)));
        pieces.filter(|(_, _, piece)| piece.file == file).collect()
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

impl TensorEntry {
    /// Elements of the whole tensor.
    #[must_use]
    pub fn elements(&self) -> usize {
        // Of a manifest that was parsed or rendered the product is known to fit; a saturated one is more than any slice
        // can hold.
        elements(&self.shape).unwrap_or(usize::MAX)
    }

    /// The shape under which a piece lies in its file: the tensor's own when it is the whole, else its length.
    #[must_use]
    pub fn stored_shape(&self, piece: &Piece) -> Vec<usize> {
        stored_shape(&self.shape, self.elements(), &piece.range())
    }

    /// The pieces that hold some of these elements.
    pub fn pieces_of(&self, range: &Range<usize>) -> impl Iterator<Item = &Piece> {
        let Range { start, end } = *range;
        let first = self.pieces.partition_point(|piece| piece.region.flat_end <= start);
        let until_end = self.pieces[first..].iter().take_while(move |piece| piece.region.flat_start < end);
        until_end.filter(move |piece| piece.region.flat_start.max(start) < piece.region.flat_end.min(end))
    }

    /// Those of these elements that no piece holds, ascending.
    #[must_use]
    pub fn absent(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let (mut absent, mut next) = (Vec::new(), range.start);
        for piece in self.pieces_of(range) {
            if next < piece.region.flat_start {
                absent.push(next..piece.region.flat_start);
            }
            next = piece.region.flat_end;
        }
        if next < range.end {
            absent.push(next..range.end);
        }
        absent
    }

    /// How many of all its elements no piece holds.
    #[must_use]
    pub fn absent_count(&self) -> usize {
        self.absent(&(0..self.elements())).iter().map(ExactSizeIterator::len).sum()
    }

    /// The elements that some piece holds, ascending.
    #[must_use]
    pub fn held(&self) -> Vec<Range<usize>> {
        self.pieces.iter().map(Piece::range).collect()
    }

    /// Checks that every piece is a flat interval of the tensor, and that they ascend and share no element and no place.
    pub(crate) fn check(&self, name: &str, path: &Path) -> Result<(), CheckpointError> {
        if self.dtype != DTYPE {
            let (path, tensor, found) = (path.to_path_buf(), name.to_owned(), self.dtype.clone());
            return Err(CheckpointError::TensorType { path, tensor, expected: DTYPE, found });
        }
        let fault = |why| self.fault(name, path, why);
        let region = |source| CheckpointError::Region { path: path.to_path_buf(), tensor: name.to_owned(), source };
        let whole = Region::whole(&self.shape).map_err(region)?;
        let mut places = BTreeSet::new();
        for Piece { file, key, region: found } in &self.pieces {
            found.check(&self.shape).map_err(region)?;
            if (&found.start, &found.end) != (&whole.start, &whole.end) {
                let (start, end) = (&found.start, &found.end);
                return Err(fault(format!(
                    "the piece in {file} is of the box {start:?} to {end:?}; this build does not put tensors together \
                     from boxes, only from flat intervals of the whole"
                )));
            }
            if !places.insert((file, key)) {
                return Err(fault(format!("two of its pieces lie in {file} under the key {key:?}")));
            }
        }
        for pair in self.pieces.windows(2) {
            let ((a, in_a), (b, in_b)) = ((pair[0].range(), &pair[0].file), (pair[1].range(), &pair[1].file));
            if b.start < a.start {
                return Err(fault(format!("its pieces do not ascend: elements {a:?} stand before {b:?}")));
            }
            if b.start < a.end {
                return Err(fault(format!("its pieces overlap: elements {a:?} in {in_a} and {b:?} in {in_b}")));
            }
        }
        Ok(())
    }

    fn fault(&self, name: &str, path: &Path, why: String) -> CheckpointError {
        CheckpointError::Pieces { path: path.to_path_buf(), tensor: name.to_owned(), shape: self.shape.clone(), why }
    }
}

impl Piece {
    /// The elements of the whole tensor that it holds.
    #[must_use]
    pub const fn range(&self) -> Range<usize> {
        self.region.flat_start..self.region.flat_end
    }
}

/// The shape under which the elements `range` of a tensor lie in a file.
pub(crate) fn stored_shape(shape: &[usize], elements: usize, range: &Range<usize>) -> Vec<usize> {
    if *range == (0..elements) { shape.to_vec() } else { vec![range.len()] }
}

/// Checks that a file's name is plain and its hash one.
pub(crate) fn check_file(name: &str, file: &FileEntry, path: &Path) -> Result<(), CheckpointError> {
    if let Some(why) = layout::fault_of_file_name(name) {
        return Err(CheckpointError::FileName { path: path.to_path_buf(), name: name.to_owned(), why });
    }
    let digits = file.blake3.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    if !digits || file.blake3.len() != HASH_DIGITS {
        let why = format!("file {name}: expected {HASH_DIGITS} lower-case hex digits, found {:?}", file.blake3);
        return Err(CheckpointError::ManifestText { path: path.to_path_buf(), why });
    }
    Ok(())
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

#[cfg(test)]
mod tests;
