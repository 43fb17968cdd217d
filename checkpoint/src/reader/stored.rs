//! One file of a checkpoint: open, as long as the manifest says, and not believed before its hash is found right.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype as StoredType, SafeTensorError};

use super::Checked;
use super::once::{self, Place};
use super::packed::Packed;
use crate::error::CheckpointError;
use crate::manifest::{DTYPE, FileEntry, Piece, TensorEntry};
use crate::mapped::Mapped;

/// The longest header that is read; the `safetensors` crate has the same bound.
pub(super) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A piece of the tensor of that name.
pub(super) type Held<'a> = (&'a str, &'a TensorEntry, &'a Piece);

#[derive(Debug)]
pub(super) struct Stored<'a> {
    file: File,
    path: PathBuf,
    entry: &'a FileEntry,
}

/// Where the tensors of a file are.
#[derive(Debug)]
pub enum Content {
    /// In the file as they are.
    Mapped(Mapped),
    /// In its frames.
    Packed(Packed),
}

/// The header of a safetensors file.
#[derive(Debug)]
pub struct Header {
    /// Everything up to the first tensor.
    bytes: Vec<u8>,
    metadata: Metadata,
    path: PathBuf,
}

impl<'a> Stored<'a> {
    pub fn open(folder: &Path, name: &str, entry: &'a FileEntry) -> Result<Self, CheckpointError> {
        let path = folder.join(name);
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CheckpointError::FileMissing { path: path.clone() },
            _ => CheckpointError::Io { operation: "open the file", path: path.clone(), source },
        })?;
        let metadata = file.metadata().map_err(CheckpointError::io("look at the file", &path))?;
        check_size(&path, entry, metadata.len())?;
        Ok(Self { file, path, entry })
    }

    /// Reads all of it once, what `places` want to where it belongs, and compares the hash.
    pub fn check(&self, places: Vec<(u64, Place<'_>)>) -> Result<(), CheckpointError> {
        let found = once::read(&self.file, self.entry.bytes, places);
        let found = found.map_err(CheckpointError::io("read the file", &self.path))?;
        check_hash(&self.path, self.entry, found)
    }

    /// [`check`](Self::check) of a safetensors file. `places` says from its header what is wanted; where that cannot be,
    /// and the file is damaged, then the damage is the news. A packed file is hashed before anything of it is looked at.
    pub fn check_tensors<'b>(
        &self,
        places: impl FnOnce(&Header) -> Result<Vec<(u64, Place<'b>)>, CheckpointError>,
    ) -> Result<Checked, CheckpointError> {
        if let Some(unpacked) = self.entry.unpacked_bytes {
            self.check(Vec::new())?;
            let (packed, header) = Packed::open(&self.file, &self.path, self.entry, unpacked)?;
            packed.fill(places(&header)?)?;
            return Ok(Checked { header, content: Content::Packed(packed) });
        }
        let found = self.header().and_then(|header| places(&header).map(|places| (header, places)));
        match found {
            Ok((header, places)) => {
                let mut places: Vec<(u64, Place<'_>)> = places;
                places.push((0, Place::Read(&header.bytes)));
                self.check(places)?;
                let content = Content::Mapped(Mapped::of(&self.file, &self.path)?);
                Ok(Checked { header, content })
            }
            Err(fault) => self.check(Vec::new()).and(Err(fault)),
        }
    }

    /// Reads the header. Nothing in it may be believed before the whole file is checked, with these very bytes.
    fn header(&self) -> Result<Header, CheckpointError> {
        let fault = |source| CheckpointError::Safetensors { path: self.path.clone(), source };
        let read = |bytes: &mut [u8]| {
            self.file.read_exact_at(bytes, 0).map_err(CheckpointError::io("read the file", &self.path))
        };
        let mut length = [0; size_of::<u64>()];
        if self.entry.bytes < length.len() as u64 {
            return Err(fault(SafeTensorError::HeaderTooSmall));
        }
        read(&mut length)?;
        let bytes = u64::from_le_bytes(length).saturating_add(length.len() as u64);
        if bytes > self.entry.bytes.min(HEADER_BYTES_MAX) {
            return Err(fault(SafeTensorError::InvalidHeaderLength));
        }
        let mut bytes = vec![0; bytes as usize];
        read(&mut bytes)?;
        Header::parse(bytes, &self.path, self.entry.bytes)
    }
}

/// Checks a file that holds these pieces: its size and hash, and that the pieces are in it as the manifest says. Returns
/// it as it was found, if it holds any. Every frame of a packed file is unpacked once.
pub(super) fn check_file(
    folder: &Path,
    name: &str,
    entry: &FileEntry,
    held: &[Held<'_>],
) -> Result<Option<Checked>, CheckpointError> {
    let stored = Stored::open(folder, name, entry)?;
    if held.is_empty() {
        return stored.check(Vec::new()).map(|()| None);
    }
    let pieces = |header: &Header| {
        held.iter().try_for_each(|&(tensor, entry, piece)| header.piece(tensor, entry, piece).map(|_| ()))?;
        Ok(Vec::new())
    };
    let checked = stored.check_tensors(pieces)?;
    if let Content::Packed(packed) = &checked.content {
        packed.check()?;
    }
    Ok(Some(checked))
}

impl Header {
    /// `bytes`: everything up to the first tensor, of a safetensors file of `file_bytes`.
    pub fn parse(bytes: Vec<u8>, path: &Path, file_bytes: u64) -> Result<Self, CheckpointError> {
        let fault = |source| CheckpointError::Safetensors { path: path.to_path_buf(), source };
        // This also checks that the tensors lie end to end, and that each has the bytes of its shape.
        let metadata: Metadata = serde_json::from_slice(&bytes[size_of::<u64>()..])
            .map_err(|source| fault(SafeTensorError::InvalidHeaderDeserialization(source)))?;
        if (bytes.len() + metadata.data_len()) as u64 != file_bytes {
            return Err(fault(SafeTensorError::MetadataIncompleteBuffer));
        }
        Ok(Self { bytes, metadata, path: path.to_path_buf() })
    }

    /// Where in the file the piece begins, which has the type and shape that it must have there.
    pub fn piece(&self, tensor: &str, entry: &TensorEntry, piece: &Piece) -> Result<u64, CheckpointError> {
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
        let expected = entry.stored_shape(piece);
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
