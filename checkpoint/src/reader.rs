//! Lists, opens, verifies and loads checkpoints.
//!
//! Nothing that a checkpoint says is believed before it is checked: the manifest by its own hash when it is opened, each
//! part of a file by what the manifest says of it before its first byte is used. The very bytes that are handed over are
//! hashed, each time. Only the blocks that hold what is wanted are read, so that damage elsewhere is for
//! [`Checkpoint::verify`] to find.
//!
//! - `audit`: everything that is damaged.
//! - `load`: many parts of tensors at once.
//! - `once`: reads and hashes a file, or blocks of it, in one go.
//! - `packed`: a packed file.
//! - `stored`: one file.

mod audit;
mod load;
mod once;
mod packed;
mod stored;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::disk::{self, Disk, RealDisk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{FileEntry, Manifest, TensorEntry, difference};
use crate::regular;

pub use audit::{Audit, Damage, audit};
pub use load::Want;
use stored::{Stored, check_hash, check_size};

/// The committed checkpoints in `folder` with the folder of each, by step ascending. What is being written or removed
/// is not among them. A folder that does not exist has none.
///
/// # Errors
/// What the file system says.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    if !RealDisk.exists(folder).map_err(CheckpointError::io("look for", folder))? {
        return Ok(Vec::new());
    }
    let checkpoints = layout::checkpoints(&disk::names(&RealDisk, folder)?);
    let paths = checkpoints.into_iter().map(|(step, name)| (step, folder.join(name)));
    Ok(paths.filter(|(_, path)| path.is_dir()).collect())
}

/// Elements that are read at a time where all of a tensor is looked at: 16 MiB.
pub(crate) const CHUNK: usize = 1 << 22;

/// Files that stay open at the most; more of them are opened for each read.
const OPEN_MAX: usize = 128;

/// An open checkpoint. Its manifest is checked; its files are opened when they are first needed, and what is read of them is
/// checked then.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// The files that were needed.
    files: Mutex<BTreeMap<String, Arc<Stored>>>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`: reads its manifest, and looks that every file it names is there and as
    /// long as it says.
    ///
    /// # Errors
    /// The first of these that is not so.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let manifest = Self::manifest_of(path)?;
        for (name, entry) in &manifest.files {
            let file = path.join(name);
            let metadata = fs::metadata(&file).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => CheckpointError::FileMissing { path: file.clone() },
                _ => CheckpointError::Io { operation: "look at the file", path: file.clone(), source },
            })?;
            check_size(&file, entry, metadata.len())?;
        }
        Ok(Self { path: path.to_path_buf(), manifest, files: Mutex::default() })
    }

    /// A checkpoint that is somewhere else, of which only the manifest is here: what needs its files is an error.
    #[must_use]
    pub fn described(path: PathBuf, manifest: Manifest) -> Self {
        Self { path, manifest, files: Mutex::default() }
    }

    /// The manifest of the checkpoint in the folder `path`; its files may be there or not.
    fn manifest_of(path: &Path) -> Result<Manifest, CheckpointError> {
        let file = path.join(layout::MANIFEST);
        let text =
            regular::read(&file, layout::SMALL_BYTES_MAX).map_err(CheckpointError::io("read the manifest", &file))?;
        let manifest = Manifest::parse(&text, &file)?;
        let named = path.file_name().and_then(|name| name.to_str()).and_then(layout::step_of);
        match named {
            Some(expected) if expected != manifest.step => {
                Err(CheckpointError::Step { path: path.to_path_buf(), expected, found: manifest.step })
            }
            _ => Ok(manifest),
        }
    }

    /// What the checkpoint holds.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Optimiser steps done.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What the checkpoints of one commit have in common, one in each folder that the machines do not share. Empty when
    /// one process wrote it alone.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// What the trainer stored besides tensors.
    #[must_use]
    pub const fn state(&self) -> &Value {
        &self.manifest.state
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hashes every file anew, on all cores, and looks that every piece is where the manifest says. Files that the
    /// manifest does not name are ignored. Returns the bytes hashed.
    ///
    /// # Errors
    /// The first file, in name order, or piece that is not as the manifest says.
    pub fn verify(&self) -> Result<u64, CheckpointError> {
        let mut bytes = 0;
        for (name, entry) in &self.manifest.files {
            let stored = self.stored(name)?;
            let reading = stored.reading()?;
            reading.check()?;
            reading.check_pieces(&self.manifest.pieces_in(name))?;
            bytes += entry.bytes;
        }
        Ok(bytes)
    }

    /// Whether the checkpoint names the tensor `name`. On machines without a common folder that does not say that all of
    /// its elements are here: [`region`](Self::region) tells.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.manifest.tensors.contains_key(name)
    }

    /// Copies the tensor `name` into `out`, put together from its pieces.
    ///
    /// # Errors
    /// No such tensor, another shape than `shape`, an `out` of another length, elements that no piece holds, or a file
    /// that is not as the manifest says. `out` is NaN then.
    pub fn tensor(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), CheckpointError> {
        let (expected, found) = (self.tensor_entry(name, shape)?.elements(), out.len());
        if expected != found {
            let (tensor, shape) = (name.to_owned(), shape.to_vec());
            return Err(CheckpointError::Elements { tensor, shape, expected, found });
        }
        self.region(name, shape, 0..expected, out)
    }

    /// Copies the elements `range` of the tensor `name`, row-major, into `out`. Files that hold none of them are not
    /// touched. [`load`](Self::load) takes any box.
    ///
    /// # Errors
    /// Those of [`tensor`](Self::tensor), or a range that leaves the tensor.
    pub fn region(
        &self,
        name: &str,
        shape: &[usize],
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        self.load(&mut [Want::interval(name, shape, range, out)]).map(|_| ())
    }

    /// The tensor of this name and shape, all of whose wanted elements are there, and as many as the caller has places.
    fn wanted(&self, want: &Want<'_>) -> Result<&TensorEntry, CheckpointError> {
        let Want { tensor: name, shape, region, out } = want;
        let entry = self.tensor_entry(name, shape)?;
        let (path, tensor) = (self.path.clone(), (*name).to_owned());
        if let Err(source) = region.check(shape) {
            return Err(CheckpointError::Region { path, tensor, source });
        }
        if region.len() != out.len() {
            return Err(CheckpointError::Slice { tensor, region: region.clone(), found: out.len() });
        }
        if entry.held_of(region) == region.len() {
            return Ok(entry);
        }
        let absent = difference(&region.runs(shape).collect::<Vec<_>>(), &entry.held());
        Err(CheckpointError::Absent { path, tensor, absent, count: entry.elements() })
    }

    /// The elements of a tensor that some piece holds, ascending. That may be a list as long as the tensor, so that no piece may
    /// have more elements than its file has room for.
    pub(crate) fn held(&self, name: &str, entry: &TensorEntry) -> Result<Vec<Range<usize>>, CheckpointError> {
        for piece in &entry.pieces {
            let (elements, room) = (piece.region.len(), self.entry(&piece.file)?.plain_bytes());
            if elements as u64 > room / size_of::<f32>() as u64 {
                let why = format!("its piece of {elements} elements does not fit into {} of {room} bytes", piece.file);
                return Err(entry.fault(name, &self.path, why));
            }
        }
        Ok(entry.held())
    }

    /// Copies the elements of some ranges of the tensor `name`, one after the other, into `out`, which gets as many places.
    /// Many short ranges are read as one, see [`chunks`].
    pub(crate) fn ranges(
        &self,
        name: &str,
        shape: &[usize],
        ranges: &[Range<usize>],
        out: &mut Vec<f32>,
    ) -> Result<(), CheckpointError> {
        out.resize(ranges.iter().map(ExactSizeIterator::len).sum(), 0.0);
        let mut rest = &mut out[..];
        let wants = ranges.iter().map(|range| {
            let (first, more) = mem::take(&mut rest).split_at_mut(range.len());
            rest = more;
            Want::interval(name, shape, range.clone(), first)
        });
        self.load(&mut wants.collect::<Vec<_>>()).map(|_| ())
    }

    /// The bytes of the small file `name` that was stored inside the checkpoint.
    ///
    /// # Errors
    /// No such file, or one that is not as the manifest says.
    pub fn attachment(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let entry = self.entry(name)?;
        let path = self.path.join(name);
        let bytes =
            regular::read(&path, layout::SMALL_BYTES_MAX).map_err(CheckpointError::io("read the file", &path))?;
        check_size(&path, entry, bytes.len() as u64)?;
        check_hash(&path, entry, blake3::hash(&bytes))?;
        Ok(bytes)
    }

    fn tensor_entry(&self, name: &str, shape: &[usize]) -> Result<&TensorEntry, CheckpointError> {
        let (path, tensor) = (|| self.path.clone(), || name.to_owned());
        let count = self.manifest.tensors.len();
        let missing = || CheckpointError::NoTensor { path: path(), tensor: tensor(), count };
        let entry = self.manifest.tensors.get(name).ok_or_else(missing)?;
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            return Err(CheckpointError::TensorShape { path: path(), tensor: tensor(), expected, found });
        }
        Ok(entry)
    }

    fn open_files(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Stored>>> {
        // Only whole entries are ever put in, so that a panic elsewhere leaves nothing half done.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stored(&self, name: &str) -> Result<Arc<Stored>, CheckpointError> {
        let entry = self.entry(name)?;
        let mut files = self.open_files();
        if let Some(stored) = files.get(name) {
            return Ok(Arc::clone(stored));
        }
        let stored = Arc::new(Stored::open(&self.path, name, entry, files.len() < OPEN_MAX)?);
        files.insert(name.to_owned(), Arc::clone(&stored));
        Ok(stored)
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, CheckpointError> {
        self.manifest.files.get(name).ok_or_else(|| CheckpointError::NoFile {
            path: self.path.clone(),
            name: name.to_owned(),
            present: self.manifest.files.keys().cloned().collect(),
        })
    }
}

/// Cuts ranges into lists that are read at a time, each of [`CHUNK`] elements and 64 Ki ranges at the most.
pub(crate) fn chunks(ranges: &[Range<usize>]) -> Vec<Vec<Range<usize>>> {
    const RANGES: usize = 1 << 16;
    let (mut chunks, mut chunk, mut elements) = (Vec::new(), Vec::new(), 0);
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + CHUNK - elements);
            chunk.push(start..end);
            elements += end - start;
            start = end;
            if elements == CHUNK || chunk.len() == RANGES {
                chunks.push(mem::take(&mut chunk));
                elements = 0;
            }
        }
    }
    chunks.extend((!chunk.is_empty()).then_some(chunk));
    chunks
}

#[cfg(test)]
mod box_tests;
#[cfg(test)]
mod load_tests;
#[cfg(test)]
mod packed_tests;
#[cfg(test)]
mod partial_tests;
#[cfg(test)]
mod piece_tests;
#[cfg(test)]
mod tests;
