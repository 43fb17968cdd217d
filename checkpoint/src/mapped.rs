//! Files mapped for reading, and safetensors files among them.

use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::CheckpointError;
use crate::regular;

/// A whole file, mapped.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
}

impl Mapped {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = regular::open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CheckpointError::FileMissing { path: path.to_path_buf() },
            _ => CheckpointError::Io { operation: "open the file", path: path.to_path_buf(), source },
        })?;
        // SAFETY: a committed file is never changed in place: writer and exporter make new files under other names, and
        // retention unlinks, which leaves a mapping whole. Whoever else cuts the file meanwhile ends this process by
        // SIGBUS; the bytes are only ever read as numbers and checked text.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map the file", path))?;
        Ok(Self { path: path.to_path_buf(), map })
    }
}

/// A safetensors file, mapped, with its header read.
#[derive(Debug)]
pub struct Shard {
    mapped: Mapped,
    metadata: Metadata,
    data_start: usize,
}

impl Shard {
    pub fn parse(mapped: Mapped) -> Result<Self, CheckpointError> {
        let fault = |source| CheckpointError::Safetensors { path: mapped.path.clone(), source };
        // This also checks that the tensors lie end to end and fill the file exactly.
        let (header_bytes, metadata) = SafeTensors::read_metadata(&mapped.map).map_err(fault)?;
        Ok(Self { mapped, metadata, data_start: size_of::<u64>() + header_bytes })
    }

    /// Names and shapes, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        self.metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone()))
    }

    pub fn path(&self) -> &Path {
        &self.mapped.path
    }

    pub fn find(&self, name: &str) -> Result<(&TensorInfo, &[u8]), CheckpointError> {
        let missing = || CheckpointError::NoTensor {
            path: self.mapped.path.clone(),
            tensor: name.to_owned(),
            count: self.metadata.offset_keys().len(),
        };
        let info = self.metadata.info(name).ok_or_else(missing)?;
        let (start, end) = info.data_offsets;
        Ok((info, &self.mapped.map[self.data_start..][start..end]))
    }
}
