//! Reads an exported folder back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype as StoredType;

use super::MODEL;
use crate::disk::{self, RealDisk};
use crate::error::CheckpointError;
use crate::layout;
use crate::mapped::{Mapped, Shard};
use crate::regular;

/// An opened Hugging Face folder with one `model.safetensors`.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    model: Shard,
}

impl Folder {
    /// Opens the folder `dir` and reads the header of its [`MODEL`].
    ///
    /// # Errors
    /// No such file, or one that is no safetensors file.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let model = dir.join(MODEL);
        if let Err(source) = fs::metadata(&model)
            && source.kind() == io::ErrorKind::NotFound
        {
            let present = disk::names(&RealDisk, dir)?;
            return Err(CheckpointError::NoFile { path: dir.to_path_buf(), name: MODEL.to_owned(), present });
        }
        Ok(Self { path: dir.to_path_buf(), model: Shard::parse(Mapped::open(&model)?)? })
    }

    /// The content of the small file `name`.
    ///
    /// # Errors
    /// A name that leads out of the folder, no such file, or what the file system says.
    pub fn file(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        if let Some(why) = layout::fault_of_file_name(name) {
            return Err(CheckpointError::FileName { path: self.path.clone(), name: name.to_owned(), why });
        }
        let path = self.path.join(name);
        match regular::read(&path, layout::SMALL_BYTES_MAX) {
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => {
                let present = disk::names(&RealDisk, &self.path)?;
                Err(CheckpointError::NoFile { path: self.path.clone(), name: name.to_owned(), present })
            }
            other => other.map_err(CheckpointError::io("read the file", &path)),
        }
    }

    /// Names and shapes of all tensors, in name order.
    #[must_use]
    pub fn names(&self) -> Vec<(String, Vec<usize>)> {
        let mut names: Vec<_> = self.model.tensors().collect();
        names.sort_unstable();
        names
    }

    /// The shape and the elements of the tensor `name`, as f32 whatever it is stored as.
    ///
    /// # Errors
    /// No such tensor, or one of a type other than F32, BF16 and F16.
    pub fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), CheckpointError> {
        let (info, bytes) = self.model.find(name)?;
        // Files of other writers need not be aligned, so that the elements are put together from bytes.
        let halves = bytes.as_chunks().0.iter().copied();
        let values = match info.dtype {
            StoredType::F32 => bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect(),
            StoredType::BF16 => halves.map(|half| bf16::from_le_bytes(half).to_f32()).collect(),
            StoredType::F16 => halves.map(|half| f16::from_le_bytes(half).to_f32()).collect(),
            other => {
                let (path, tensor, found) = (self.model.path().to_path_buf(), name.to_owned(), other.to_string());
                return Err(CheckpointError::TensorType { path, tensor, expected: "F32, BF16 or F16", found });
            }
        };
        Ok((info.shape.clone(), values))
    }
}
