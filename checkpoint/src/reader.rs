//! Lists, opens, verifies and loads checkpoints.
//!
//! Nothing that a checkpoint says is believed before it is checked: the manifest by its own hash when it is opened, each
//! file by the manifest's hash before its first byte is used.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use safetensors::Dtype as StoredType;
use serde_json::Value;

use crate::disk::{self, Disk, RealDisk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{DTYPE, FileEntry, Manifest};
use crate::mapped::{Mapped, Shard};

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
    shards: Mutex<BTreeMap<String, Arc<Shard>>>,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`: reads its manifest, and looks that every file it names is there and as
    /// long as it says.
    ///
    /// # Errors
    /// The first of these that is not so.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = path.join(layout::MANIFEST);
        let text = fs::read(&file).map_err(CheckpointError::io("read the manifest", &file))?;
        let manifest = Manifest::parse(&text, &file)?;
        let named = path.file_name().and_then(|name| name.to_str()).and_then(layout::step_of);
        if let Some(expected) = named
            && expected != manifest.step
        {
            return Err(CheckpointError::Step { path: path.to_path_buf(), expected, found: manifest.step });
        }
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

    /// Hashes every file anew, on all cores, and looks that every tensor is where the manifest says. Files that the
    /// manifest does not name are ignored. Returns the bytes hashed.
    ///
    /// # Errors
    /// The first file, in name order, or tensor that is not as the manifest says.
    pub fn verify(&self) -> Result<u64, CheckpointError> {
        self.shards().clear();
        let mut bytes = 0;
        for (name, entry) in &self.manifest.files {
            if self.manifest.tensors.values().any(|tensor| tensor.pieces.iter().any(|piece| piece.file == *name)) {
                self.shard(name)?;
            } else {
                self.map(name)?;
            }
            bytes += entry.bytes;
        }
        for name in self.manifest.tensors.keys() {
            self.with_piece(name, |_, _| Ok(()))?;
        }
        Ok(bytes)
    }

    /// Copies the tensor `name` into `out`. The first tensor of a file waits until the whole file is hashed.
    ///
    /// # Errors
    /// No such tensor, another shape than `shape`, an `out` of another length, or a file that is not as the manifest
    /// says.
    pub fn tensor(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), CheckpointError> {
        self.with_piece(name, |found, bytes| {
            let tensor = || name.to_owned();
            if found != shape {
                let (path, expected, found) = (self.path.clone(), shape.to_vec(), found.to_vec());
                return Err(CheckpointError::TensorShape { path, tensor: tensor(), expected, found });
            }
            let (expected, found) = (bytes.len() / size_of::<f32>(), out.len());
            if expected != found {
                return Err(CheckpointError::Elements { tensor: tensor(), shape: shape.to_vec(), expected, found });
            }
            bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
            Ok(())
        })
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
        check_hash(&path, entry, blake3::hash(&bytes).to_hex().to_string())?;
        Ok(bytes)
    }

    /// Finds the one piece of a tensor, and hands over the tensor's shape and the piece's bytes.
    fn with_piece<T>(
        &self,
        name: &str,
        take: impl FnOnce(&[usize], &[u8]) -> Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        let missing = || CheckpointError::NoTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            count: self.manifest.tensors.len(),
        };
        let entry = self.manifest.tensors.get(name).ok_or_else(missing)?;
        let piece = entry.pieces.first().ok_or_else(missing)?;
        let shard = self.shard(&piece.file)?;
        let (info, bytes) = shard.find(&piece.key)?;
        let (path, tensor) = (|| shard.path().to_path_buf(), || name.to_owned());
        if info.dtype != StoredType::F32 {
            let found = info.dtype.to_string();
            return Err(CheckpointError::TensorType { path: path(), tensor: tensor(), expected: DTYPE, found });
        }
        if info.shape != entry.shape {
            let (expected, found) = (entry.shape.clone(), info.shape.clone());
            return Err(CheckpointError::TensorShape { path: path(), tensor: tensor(), expected, found });
        }
        take(&entry.shape, bytes)
    }

    fn shards(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Shard>>> {
        // Only whole entries are ever put in, so that a panic elsewhere leaves nothing half done.
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, name: &str) -> Result<Arc<Shard>, CheckpointError> {
        if let Some(shard) = self.shards().get(name) {
            return Ok(Arc::clone(shard));
        }
        // Not under the lock: while it hashes, a thread of the pool may be given another tensor to load and would wait
        // for itself. Two that come here at once both hash the file.
        let shard = Arc::new(Shard::parse(self.map(name)?)?);
        self.shards().insert(name.to_owned(), Arc::clone(&shard));
        Ok(shard)
    }

    /// Maps a file and checks it against the manifest.
    fn map(&self, name: &str) -> Result<Mapped, CheckpointError> {
        let entry = self.entry(name)?;
        let path = self.path.join(name);
        let mapped = Mapped::open(&path)?;
        check_size(&path, entry, mapped.len())?;
        check_hash(&path, entry, mapped.blake3())?;
        Ok(mapped)
    }

    fn entry(&self, name: &str) -> Result<&FileEntry, CheckpointError> {
        self.manifest.files.get(name).ok_or_else(|| CheckpointError::NoFile {
            path: self.path.clone(),
            name: name.to_owned(),
            present: self.manifest.files.keys().cloned().collect(),
        })
    }
}

fn check_size(path: &Path, entry: &FileEntry, found: u64) -> Result<(), CheckpointError> {
    let expected = entry.bytes;
    let right = found == expected;
    right.then_some(()).ok_or_else(|| CheckpointError::FileSize { path: path.to_path_buf(), expected, found })
}

fn check_hash(path: &Path, entry: &FileEntry, found: String) -> Result<(), CheckpointError> {
    if found == entry.blake3 {
        return Ok(());
    }
    Err(CheckpointError::FileHash { path: path.to_path_buf(), expected: entry.blake3.clone(), found })
}

#[cfg(test)]
mod tests;
