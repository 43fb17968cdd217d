//! One file of a checkpoint. What is read of it is hashed where it lands, and only as much is read as is asked for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype as StoredType, SafeTensorError};

use super::once::{self, Fault, Place, Proof};
use super::packed::Packed;
use crate::error::CheckpointError;
use crate::manifest::{DTYPE, FileEntry, Piece};
use crate::regular;

/// The longest header that is read; the `safetensors` crate has the same bound.
pub(super) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A piece of the tensor of that name.
pub(super) type Held<'a> = (&'a str, &'a Piece);

/// A file, and what is known of it by now.
#[derive(Debug)]
pub(super) struct Stored {
    path: PathBuf,
    entry: FileEntry,
    /// Open, so that it can be read when its name is gone; `None` where too many others are.
    file: Option<File>,
    proof: OnceLock<Proof>,
    content: OnceLock<Content>,
}

/// Where the tensors of a file are.
#[derive(Debug)]
pub(super) enum Content {
    /// In the file as they are.
    Plain(Header),
    /// In its frames.
    Packed(Packed, Header),
}

/// The header of a safetensors file.
#[derive(Debug)]
pub struct Header {
    /// Everything up to the first tensor.
    bytes: Vec<u8>,
    metadata: Metadata,
    path: PathBuf,
}

impl Stored {
    /// `stays`: whether it is to stay open.
    pub fn open(folder: &Path, name: &str, entry: &FileEntry, stays: bool) -> Result<Self, CheckpointError> {
        let (path, entry, proof) = (folder.join(name), entry.clone(), OnceLock::new());
        match entry.tree() {
            Ok(Some(tree)) => _ = proof.set(Proof::Blocks(tree)),
            Ok(None) => {}
            Err(why) => return Err(CheckpointError::ManifestText { path, why: format!("file {name}: {why}") }),
        }
        let file = open(&path, &entry)?;
        Ok(Self { path, entry, file: stays.then_some(file), proof, content: OnceLock::new() })
    }

    /// The file, as long as the manifest says.
    pub fn reading(&self) -> Result<Reading<'_>, CheckpointError> {
        let file = match &self.file {
            Some(file) => file.try_clone().map_err(CheckpointError::io("open the file", &self.path))?,
            None => open(&self.path, &self.entry)?,
        };
        check_size(&self.path, &self.entry, length(&file, &self.path)?)?;
        Ok(Reading { stored: self, file })
    }
}

/// A file that is being read.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    stored: &'a Stored,
    pub file: File,
}

impl<'a> Reading<'a> {
    pub fn path(&self) -> &'a Path {
        &self.stored.path
    }

    pub fn entry(&self) -> &'a FileEntry {
        &self.stored.entry
    }

    /// Hashes all of it anew.
    pub fn check(&self) -> Result<(), CheckpointError> {
        let Stored { path, entry, proof, .. } = self.stored;
        let (found, found_proof) =
            once::hash(&self.file, entry.bytes).map_err(CheckpointError::io("read the file", path))?;
        check_hash(path, entry, found)?;
        // One that was there proves the same.
        let _ = proof.set(found_proof);
        Ok(())
    }

    /// Reads `places`, and checks the blocks that hold them and the bytes `also`. Where nothing proves a block, as in files of
    /// earlier builds, the whole file is hashed before, once. Returns the bytes read.
    pub fn read(&self, places: Vec<Place<'_>>, also: &[Range<u64>]) -> Result<u64, CheckpointError> {
        let Stored { path, entry, proof, .. } = self.stored;
        let mut before = 0;
        if proof.get().is_none() {
            match entry.one_block() {
                Some(hash) => _ = proof.set(Proof::Whole(hash)),
                None => {
                    self.check()?;
                    before = entry.bytes;
                }
            }
        }
        let proof = proof.get().expect("it was set");
        once::read(&self.file, entry.bytes, proof, places, also).map(|read| before + read).map_err(
            |fault| match fault {
                Fault::Io(source) => CheckpointError::Io { operation: "read the file", path: path.clone(), source },
                Fault::Damaged(range) => CheckpointError::FileRange { path: path.clone(), range },
            },
        )
    }

    /// Where its tensors are, from bytes that were checked.
    pub fn content(&self) -> Result<&'a Content, CheckpointError> {
        let Stored { entry, content, .. } = self.stored;
        if content.get().is_none() {
            let found = match entry.unpacked_bytes {
                Some(unpacked) => {
                    Packed::open(self, unpacked).map(|(packed, header)| Content::Packed(packed, header))?
                }
                None => Content::Plain(self.header()?),
            };
            // Another thread may have found the same.
            let _ = content.set(found);
        }
        Ok(content.get().expect("it was set"))
    }

    fn header(&self) -> Result<Header, CheckpointError> {
        let (path, file_bytes) = (self.path(), self.entry().bytes);
        let fault = |source| CheckpointError::Safetensors { path: path.to_path_buf(), source };
        let mut length = [0; size_of::<u64>()];
        if file_bytes < length.len() as u64 {
            self.read(Vec::new(), std::slice::from_ref(&(0..file_bytes)))?;
            return Err(fault(SafeTensorError::HeaderTooSmall));
        }
        self.read(vec![(0, &mut length)], &[])?;
        let bytes = u64::from_le_bytes(length).saturating_add(length.len() as u64);
        if bytes > file_bytes.min(HEADER_BYTES_MAX) {
            return Err(fault(SafeTensorError::InvalidHeaderLength));
        }
        let mut bytes = vec![0; bytes as usize];
        self.read(vec![(0, &mut bytes)], &[])?;
        Header::parse(bytes, path, file_bytes)
    }

    /// Checks that the file holds these pieces as the manifest says; every frame of a packed one is unpacked once. Its bytes
    /// were checked before.
    pub fn check_pieces(&self, held: &[Held<'_>]) -> Result<(), CheckpointError> {
        if held.is_empty() {
            return Ok(());
        }
        let content = self.content()?;
        let (Content::Plain(header) | Content::Packed(_, header)) = content;
        held.iter().try_for_each(|&(tensor, piece)| header.piece(tensor, piece).map(|_| ()))?;
        match content {
            Content::Plain(_) => Ok(()),
            Content::Packed(packed, _) => packed.check(&self.file),
        }
    }
}

fn open(path: &Path, entry: &FileEntry) -> Result<File, CheckpointError> {
    let file = regular::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CheckpointError::FileMissing { path: path.to_path_buf() },
        _ => CheckpointError::Io { operation: "open the file", path: path.to_path_buf(), source },
    })?;
    check_size(path, entry, length(&file, path)?)?;
    Ok(file)
}

fn length(file: &File, path: &Path) -> Result<u64, CheckpointError> {
    Ok(file.metadata().map_err(CheckpointError::io("look at the file", path))?.len())
}

impl Header {
    /// `bytes`: everything up to the first tensor, of a safetensors file of `file_bytes`.
    pub fn parse(bytes: Vec<u8>, path: &Path, file_bytes: u64) -> Result<Self, CheckpointError> {
        let fault = |source| CheckpointError::Safetensors { path: path.to_path_buf(), source };
        // This also checks that the tensors lie end to end, and that each has the bytes of its shape.
        let metadata: Metadata = serde_json::from_slice(&bytes[size_of::<u64>()..])
            .map_err(|source| fault(SafeTensorError::InvalidHeaderDeserialization(source)))?;
        // Each tensor's bytes fit the address space, and the sum of all of them; it may be no file's, with the header before it.
        if bytes.len().checked_add(metadata.data_len()).map(|end| end as u64) != Some(file_bytes) {
            return Err(fault(SafeTensorError::MetadataIncompleteBuffer));
        }
        Ok(Self { bytes, metadata, path: path.to_path_buf() })
    }

    /// Where in the file the piece begins, which has the type and shape that it must have there.
    pub fn piece(&self, tensor: &str, piece: &Piece) -> Result<u64, CheckpointError> {
        let missing = || {
            let (path, tensor, count) = (self.path.clone(), piece.key.clone(), self.metadata.offset_keys().len());
            CheckpointError::NoTensor { path, tensor, count }
        };
        let info: &TensorInfo = self.metadata.info(&piece.key).ok_or_else(missing)?;
        let (path, tensor) = (|| self.path.clone(), || tensor.to_owned());
        if info.dtype != StoredType::F32 {
            let found = info.dtype.to_string();
            return Err(CheckpointError::TensorType { path: path(), tensor: tensor(), expected: DTYPE, found });
        }
        let expected = piece.stored_shape();
        if info.shape != expected {
            let found = info.shape.clone();
            return Err(CheckpointError::TensorShape { path: path(), tensor: tensor(), expected, found });
        }
        Ok((self.bytes.len() + info.data_offsets.0) as u64)
    }
}

pub(super) fn check_size(path: &Path, entry: &FileEntry, found: u64) -> Result<(), CheckpointError> {
    let expected = entry.bytes;
    let right = found == expected;
    right.then_some(()).ok_or_else(|| CheckpointError::FileSize { path: path.to_path_buf(), expected, found })
}

pub(super) fn check_hash(path: &Path, entry: &FileEntry, found: blake3::Hash) -> Result<(), CheckpointError> {
    let found = found.to_hex();
    if found.as_str() == entry.blake3 {
        return Ok(());
    }
    let (expected, found) = (entry.blake3.clone(), found.to_string());
    Err(CheckpointError::FileHash { path: path.to_path_buf(), expected, found })
}
