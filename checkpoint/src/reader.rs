//! Lists, opens, verifies and loads checkpoints.
//!
//! Nothing that a checkpoint says is believed before it is checked: the manifest by its own hash when it is opened, each
//! file by the manifest's hash before its first byte is used. [`Checkpoint::load`] hashes the very bytes that it hands
//! over. [`Checkpoint::tensor`] and [`Checkpoint::region`] hash a file once and copy from its mapping later: a file that
//! somebody changes in place in between is not noticed, and none of ours ever is.
//!
//! - `audit`: everything that is damaged.
//! - `load`: many ranges at once.
//! - `once`: reads and hashes a file in one go.
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
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use compression::RegionError;
use serde_json::Value;

use crate::disk::{self, Disk, RealDisk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{FileEntry, Manifest, TensorEntry};

pub use audit::{Audit, Damage, audit};
pub use load::Want;
use once::Place;
use stored::{Content, Header, Stored, check_file, check_hash, check_size};

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

/// An open checkpoint. Its manifest is checked; its files are mapped, and their hashes checked, when first needed.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// The safetensors files whose hashes were found right.
    shards: Mutex<BTreeMap<String, Arc<Checked>>>,
}

/// A safetensors file whose hash was found right.
#[derive(Debug)]
struct Checked {
    header: Header,
    content: Content,
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
        Ok(Self { path: path.to_path_buf(), manifest, shards: Mutex::default() })
    }

    /// A checkpoint that is somewhere else, of which only the manifest is here: what needs its files is an error.
    #[must_use]
    pub fn described(path: PathBuf, manifest: Manifest) -> Self {
        Self { path, manifest, shards: Mutex::default() }
    }

    /// The manifest of the checkpoint in the folder `path`; its files may be there or not.
    fn manifest_of(path: &Path) -> Result<Manifest, CheckpointError> {
        let file = path.join(layout::MANIFEST);
        let text = fs::read(&file).map_err(CheckpointError::io("read the manifest", &file))?;
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
            if let Some(checked) = check_file(&self.path, name, entry, &self.manifest.pieces_in(name))? {
                self.keep(name, checked);
            }
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

    /// Copies the tensor `name` into `out`, put together from its pieces. The first tensor of a file waits until the
    /// whole file is hashed.
    ///
    /// # Errors
    /// No such tensor, another shape than `shape`, an `out` of another length, elements that no piece holds, or a file
    /// that is not as the manifest says. `out` is as it was then, or NaN where a packed file is forged.
    pub fn tensor(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), CheckpointError> {
        let entry = self.tensor_entry(name, shape)?;
        let (expected, found) = (entry.elements(), out.len());
        if expected != found {
            let (tensor, shape) = (name.to_owned(), shape.to_vec());
            return Err(CheckpointError::Elements { tensor, shape, expected, found });
        }
        self.present(name, entry, &(0..expected))?;
        self.copy(name, entry, 0..expected, out)
    }

    /// Copies the elements `range` of the tensor `name`, row-major, into `out`. Files that hold none of them are not
    /// touched.
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
        let entry = self.wanted(name, shape, &range, out.len())?;
        self.copy(name, entry, range, out)
    }

    /// The tensor of this name and shape, all of whose elements `range` are there, and as many as the caller has places.
    fn wanted(
        &self,
        name: &str,
        shape: &[usize],
        range: &Range<usize>,
        places: usize,
    ) -> Result<&TensorEntry, CheckpointError> {
        let entry = self.tensor_entry(name, shape)?;
        let elements = entry.elements();
        if range.start > range.end || range.end > elements {
            let source = RegionError::Flat { start: range.start, end: range.end, elements };
            return Err(CheckpointError::Region { path: self.path.clone(), tensor: name.to_owned(), source });
        }
        if range.len() != places {
            return Err(CheckpointError::Slice { tensor: name.to_owned(), range: range.clone(), found: places });
        }
        self.present(name, entry, range)
    }

    fn present<'a>(
        &self,
        name: &str,
        entry: &'a TensorEntry,
        range: &Range<usize>,
    ) -> Result<&'a TensorEntry, CheckpointError> {
        let absent = entry.absent(range);
        if absent.is_empty() {
            return Ok(entry);
        }
        let (path, tensor, count) = (self.path.clone(), name.to_owned(), entry.elements());
        Err(CheckpointError::Absent { path, tensor, absent, count })
    }

    fn copy(
        &self,
        name: &str,
        entry: &TensorEntry,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        // Every piece is checked before the first is copied.
        let mut shards = Vec::new();
        for piece in entry.pieces_of(&range) {
            let shard = self.shard(&piece.file)?;
            let start = shard.header.piece(name, entry, piece)?;
            shards.push((shard, start as usize, piece));
        }
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        let bytes_of = |range: Range<usize>| range.start * size_of::<f32>()..range.end * size_of::<f32>();
        for (shard, piece_start, piece) in shards {
            let held = piece.range();
            let (start, end) = (held.start.max(range.start), held.end.min(range.end));
            let to = bytes_of(start - range.start..end - range.start);
            let from = bytes_of(start - held.start..end - held.start);
            match &shard.content {
                Content::Mapped(mapped) => out[to].copy_from_slice(&mapped.bytes()[piece_start..][from]),
                Content::Packed(packed) => {
                    let place = ((piece_start + from.start) as u64, Place::Wanted(&mut out[to]));
                    if let Err(fault) = packed.fill(vec![place]) {
                        bytemuck::cast_slice_mut(out).fill(f32::NAN);
                        return Err(fault);
                    }
                }
            }
        }
        Ok(())
    }

    /// The bytes of the small file `name` that was stored inside the checkpoint.
    ///
    /// # Errors
    /// No such file, or one that is not as the manifest says.
    pub fn attachment(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let entry = self.entry(name)?;
        let path = self.path.join(name);
        let bytes = fs::read(&path).map_err(CheckpointError::io("read the file", &path))?;
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

    fn shards(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Checked>>> {
        // Only whole entries are ever put in, so that a panic elsewhere leaves nothing half done.
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, name: &str) -> Result<Arc<Checked>, CheckpointError> {
        if let Some(shard) = self.shards().get(name) {
            return Ok(Arc::clone(shard));
        }
        // Not under the lock: while it hashes, a thread of the pool may be given another tensor to load and would wait
        // for itself. Two that come here at once both hash the file.
        let stored = Stored::open(&self.path, name, self.entry(name)?)?;
        Ok(self.keep(name, stored.check_tensors(|_| Ok(Vec::new()))?))
    }

    /// Keeps a file whose hash was found right.
    fn keep(&self, name: &str, checked: Checked) -> Arc<Checked> {
        let shard = Arc::new(checked);
        self.shards().insert(name.to_owned(), Arc::clone(&shard));
        shard
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, CheckpointError> {
        self.manifest.files.get(name).ok_or_else(|| CheckpointError::NoFile {
            path: self.path.clone(),
            name: name.to_owned(),
            present: self.manifest.files.keys().cloned().collect(),
        })
    }
}

#[cfg(test)]
mod load_tests;
#[cfg(test)]
mod packed_tests;
#[cfg(test)]
mod piece_tests;
#[cfg(test)]
mod tests;
