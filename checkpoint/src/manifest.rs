//! What a checkpoint holds, where each piece of each tensor lies, and the size and hash of every file.
//!
//! The text carries its own hash, taken over the text itself with sixty-four zeros in the hash's place: every byte
//! counts, and checking it needs no canonical form of JSON.

use std::collections::BTreeMap;
use std::path::Path;

use compression::Region;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::CheckpointError;
use crate::{layout, safetensors_file};

/// What [`Manifest::format`] says.
pub const FORMAT: &str = "tributary-checkpoint";

/// The version that this build reads and writes.
pub const VERSION: u64 = 1;

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
    /// [`VERSION`].
    pub version: u64,
    /// Optimiser steps done.
    pub step: u64,
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
    /// Where its elements lie. They cover it exactly.
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
            Some(VERSION) => {}
            Some(found) if found > VERSION => {
                return Err(CheckpointError::Version { path: path.to_path_buf(), found, supported: VERSION });
            }
            _ => return Err(fault(format!("expected version {VERSION}, found {version:?}"))),
        }
        let manifest: Self = serde_json::from_value(envelope.body).map_err(|why| fault(why.to_string()))?;
        manifest.check(path)?;
        Ok(manifest)
    }

    /// Checks that names stay inside the folder and that the pieces of every tensor cover it.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        for (name, file) in &self.files {
            if let Some(why) = layout::fault_of_file_name(name) {
                return Err(CheckpointError::FileName { path: path.to_path_buf(), name: name.clone(), why });
            }
            let digits = file.blake3.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
            if !digits || file.blake3.len() != HASH_DIGITS {
                let why = format!("file {name}: expected {HASH_DIGITS} lower-case hex digits, found {:?}", file.blake3);
                return Err(CheckpointError::ManifestText { path: path.to_path_buf(), why });
            }
        }
        safetensors_file::check_names(self.tensors.keys().map(String::as_str))?;
        self.tensors.iter().try_for_each(|(name, tensor)| self.check_tensor(name, tensor, path))
    }

    fn check_tensor(&self, name: &str, entry: &TensorEntry, path: &Path) -> Result<(), CheckpointError> {
        let (path, tensor) = (|| path.to_path_buf(), || name.to_owned());
        if entry.dtype != DTYPE {
            let found = entry.dtype.clone();
            return Err(CheckpointError::TensorType { path: path(), tensor: tensor(), expected: DTYPE, found });
        }
        let region = |source| CheckpointError::Region { path: path(), tensor: tensor(), source };
        let pieces = |why| CheckpointError::Pieces { path: path(), tensor: tensor(), shape: entry.shape.clone(), why };
        let whole = Region::whole(&entry.shape).map_err(region)?;
        for piece in &entry.pieces {
            piece.region.check(&entry.shape).map_err(region)?;
            if !self.files.contains_key(&piece.file) {
                return Err(pieces(format!("and one lies in {:?}, which is not among the files", piece.file)));
            }
        }
        match &entry.pieces[..] {
            [piece] if piece.region == whole => Ok(()),
            [piece] => Err(pieces(format!("the only one holds {} elements: {:?}", piece.region.len(), piece.region))),
            several => Err(pieces(format!("found {}", several.len()))),
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest() -> Manifest {
        let region = Region::whole(&[2, 3]).unwrap();
        let piece = Piece { file: "rank-0000.safetensors".into(), key: "w".into(), region };
        let tensor = TensorEntry { dtype: DTYPE.into(), shape: vec![2, 3], pieces: vec![piece] };
        let file = FileEntry { bytes: 96, blake3: "ab".repeat(32) };
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            step: 7,
            tensors: BTreeMap::from([("w".into(), tensor)]),
            files: BTreeMap::from([("rank-0000.safetensors".into(), file)]),
            state: json!({ "cursor": 18_446_744_073_709_551_615_u64, "scale": 0.1 }),
        }
    }

    fn path() -> &'static Path {
        Path::new("/runs/a/manifest.json")
    }

    /// A text whose hash is right, whatever it says.
    fn sealed(body: &Value) -> Vec<u8> {
        let mut text = PREFIX.to_vec();
        text.extend_from_slice(&[b'0'; HASH_DIGITS]);
        text.extend_from_slice(format!("\", \"body\": {body}}}").as_bytes());
        let hash = blake3::hash(&text).to_hex();
        text[PREFIX.len()..][..HASH_DIGITS].copy_from_slice(hash.as_bytes());
        text
    }

    #[test]
    fn a_manifest_comes_back_as_it_was() {
        let text = manifest().render(path()).unwrap();
        assert_eq!(Manifest::parse(&text, path()).unwrap(), manifest());
    }

    #[test]
    fn every_flipped_bit_of_the_text_is_noticed() {
        let mut text = manifest().render(path()).unwrap();
        for index in 0..text.len() {
            for bit in 0..8 {
                text[index] ^= 1 << bit;
                let fault = Manifest::parse(&text, path()).expect_err("a flipped bit");
                assert!(matches!(fault, CheckpointError::ManifestHash { .. }), "{fault}");
                text[index] ^= 1 << bit;
            }
            let cut = Manifest::parse(&text[..index], path()).unwrap_err().to_string();
            assert!(cut.contains("/runs/a/manifest.json"), "{cut}");
        }
        // The control: with the hash taken anew, the same kind of change passes.
        let mut body = serde_json::to_value(manifest()).unwrap();
        body["step"] = json!(6);
        assert_eq!(Manifest::parse(&sealed(&body), path()).unwrap().step, 6);
    }

    /// Sets `pointer` of an otherwise good manifest to `value` and expects a message with all of `words`.
    fn check(pointer: &str, value: Value, words: &[&str]) {
        let mut body = serde_json::to_value(manifest()).unwrap();
        *body.pointer_mut(pointer).unwrap() = value;
        let message = Manifest::parse(&sealed(&body), path()).unwrap_err().to_string();
        for word in ["/runs/a/manifest.json"].iter().chain(words) {
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn another_version_or_format_is_named() {
        check("/version", json!(2), &["version 2", "reads version 1", "update"]);
        check("/version", json!(0), &["expected version 1"]);
        check("/version", json!("1"), &["expected version 1"]);
        check("/format", json!("torch"), &["tributary-checkpoint", "torch"]);
        check("/tensors", json!([]), &["expected a map"]);
    }

    #[test]
    fn a_file_name_that_climbs_out_is_named() {
        for name in ["../../etc/passwd", "/etc/passwd", "a/b", "..", ""] {
            check("/files", json!({ name: { "bytes": 1, "blake3": "00" } }), &[&format!("{name:?}"), "plain name"]);
        }
        check("/files/rank-0000.safetensors/blake3", json!("AB".repeat(32)), &["64 lower-case hex digits"]);
    }

    #[test]
    fn a_shape_that_overflows_is_named() {
        check("/tensors/w/shape", json!([usize::MAX, 3]), &["tensor w", "more elements than can be addressed"]);
        check("/tensors/w/shape", json!([2, 4]), &["tensor w", "exactly one piece", "[2, 4]", "holds 6 elements"]);
        check("/tensors/w/shape", json!([2]), &["tensor w", "the tensor has 1"]);
    }

    #[test]
    fn pieces_that_do_not_cover_the_tensor_are_named() {
        let piece = serde_json::to_value(&manifest().tensors["w"].pieces[0]).unwrap();
        check("/tensors/w/pieces", json!([]), &["tensor w", "found 0"]);
        check("/tensors/w/pieces", json!([piece, piece]), &["tensor w", "found 2"]);
        check("/tensors/w/pieces/0/region/flat_end", json!(5), &["tensor w", "holds 5 elements"]);
        check("/tensors/w/pieces/0/region/flat_end", json!(7), &["tensor w", "elements 0..7 of a box of 6"]);
        check("/tensors/w/pieces/0/file", json!("rank-0001.safetensors"), &["tensor w", "not among the files"]);
        check("/tensors/w/dtype", json!("I8"), &["tensor w", "expected F32", "I8"]);
    }
}
