//! Our streaming writer of [safetensors](https://github.com/huggingface/safetensors) files; the `safetensors` crate
//! reads them. It holds no more than one chunk in memory beyond the caller's values, and hashes what it writes, so that
//! the hash in the manifest is of the bytes meant, not of the bytes that came back from a disk.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::path::Path;
use std::str::FromStr;

use compression::region::{RegionError, elements};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::disk::{Disk, DiskFile};
use crate::error::CheckpointError;
use crate::tree::{Subtrees, Tree, TreeHasher};

/// Elements that are converted, hashed and written at a time: 1 MiB of f32.
const CHUNK: usize = 1 << 18;

/// The key that the format keeps for free text.
const METADATA: &str = "__metadata__";

/// How values are stored. Checkpoints are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision: what training holds.
    F32,
    /// The upper half of an f32, rounded to nearest, ties to even.
    Bf16,
    /// IEEE half precision, rounded to nearest, ties to even.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name inside safetensors files and manifests.
    #[must_use]
    pub const fn tag(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }
}

impl Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for Dtype {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(CheckpointError::UnknownType { found: text.to_owned() }),
        }
    }
}

/// The other type with a wider range, as the end of a sentence.
pub(crate) const fn wider(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => " or bf16",
        Dtype::F32 | Dtype::Bf16 => "",
    }
}

/// One tensor to be written.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Its key in the file.
    pub name: &'a str,
    /// Sizes of its dimensions.
    pub shape: &'a [usize],
    /// Its elements, row-major.
    pub values: &'a [f32],
}

/// Its key and its sizes alone.
pub type Outline<'a> = (&'a str, &'a [usize]);

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Size of the file.
    pub bytes: u64,
    /// Its BLAKE3 hash in lower-case hex.
    pub blake3: String,
    /// The values of its blocks, if it has several.
    pub subtrees: Option<Subtrees>,
}

/// Writes and syncs a file of these tensors, in name order. `metadata` is the format's free text; empty leaves it out.
///
/// # Errors
/// A name that cannot be used, values that do not fit their shape or their type, or what the disk says.
pub fn write(
    disk: &dyn Disk,
    path: &Path,
    entries: &[Entry<'_>],
    dtype: Dtype,
    metadata: &[(&str, &str)],
) -> Result<Written, CheckpointError> {
    let outlines = outlines(path, entries)?;
    write_as_given(disk, path, &outlines, (dtype, metadata), |index| Ok(Cow::Borrowed(entries[index].values)))
}

/// As [`write()`], of tensors whose elements `give` has, by their index in `outlines`, when their turn comes: it is asked for
/// each once, in name order, which is the file's. So no more than one of them need be in memory.
///
/// # Errors
/// Those of [`write()`], and those of `give`. What was written before then stays.
pub fn write_as_given<'v, E: From<CheckpointError>>(
    disk: &dyn Disk,
    path: &Path,
    outlines: &[Outline<'_>],
    (dtype, metadata): (Dtype, &[(&str, &str)]),
    mut give: impl FnMut(usize) -> Result<Cow<'v, [f32]>, E>,
) -> Result<Written, E> {
    let order = order(outlines)?;
    let sorted: Vec<Outline<'_>> = order.iter().map(|&index| outlines[index]).collect();
    let header = header(path, &sorted, dtype, metadata)?;
    let mut file = HashedFile::create(disk, path)?;
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(&header)?;
    let mut scratch = Vec::new();
    for (index, (name, shape)) in order.into_iter().zip(sorted) {
        let values = give(index)?;
        Entry { name, shape, values: &values }.check(path)?;
        for chunk in values.chunks(CHUNK) {
            let out_of_range =
                |value| CheckpointError::Range { path: path.to_path_buf(), tensor: name.to_owned(), value, dtype };
            file.write(encode(chunk, dtype, &mut scratch).map_err(out_of_range)?)?;
        }
    }
    Ok(file.finish()?)
}

/// Writes and syncs a small file.
pub(crate) fn write_bytes(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<Written, CheckpointError> {
    let mut file = HashedFile::create(disk, path)?;
    file.write(bytes)?;
    file.finish()
}

/// Refuses names that a safetensors file cannot hold, or not all of them.
pub(crate) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), CheckpointError> {
    let mut seen = BTreeSet::new();
    for name in names {
        let fault = |why| Err(CheckpointError::TensorName { name: name.to_owned(), why });
        if name.is_empty() {
            return fault("it is empty");
        }
        if name == METADATA {
            return fault("safetensors files keep it for themselves");
        }
        if !seen.insert(name) {
            return fault("two tensors have it");
        }
    }
    Ok(())
}

#[derive(Serialize)]
#[serde(untagged)]
enum HeaderEntry<'a> {
    Metadata(BTreeMap<&'a str, &'a str>),
    Tensor { dtype: &'static str, shape: &'a [usize], data_offsets: [usize; 2] },
}

impl<'a> Entry<'a> {
    const fn outline(&self) -> Outline<'a> {
        (self.name, self.shape)
    }

    /// Whether it has as many elements as its shape says.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        let tensor = || self.name.to_owned();
        let region = |source| CheckpointError::Region { path: path.to_path_buf(), tensor: tensor(), source };
        let (expected, found) = (elements(self.shape).map_err(region)?, self.values.len());
        match expected == found {
            true => Ok(()),
            false => Err(CheckpointError::Elements { tensor: tensor(), shape: self.shape.to_vec(), expected, found }),
        }
    }
}

/// The entries in name order, and their header, if a file can hold them.
pub(crate) fn sorted<'a>(
    path: &Path,
    entries: &'a [Entry<'a>],
) -> Result<(Vec<&'a Entry<'a>>, Vec<u8>), CheckpointError> {
    let outlines = outlines(path, entries)?;
    let order = order(&outlines)?;
    let in_order: Vec<Outline<'_>> = order.iter().map(|&index| outlines[index]).collect();
    let header = header(path, &in_order, Dtype::F32, &[])?;
    Ok((order.into_iter().map(|index| &entries[index]).collect(), header))
}

fn outlines<'a>(path: &Path, entries: &[Entry<'a>]) -> Result<Vec<Outline<'a>>, CheckpointError> {
    entries.iter().map(|entry| entry.check(path).map(|()| entry.outline())).collect()
}

/// In which order a file has them: by name. None of them has a name that a file cannot hold.
fn order(outlines: &[Outline<'_>]) -> Result<Vec<usize>, CheckpointError> {
    check_names(outlines.iter().map(|(name, _)| *name))?;
    let mut order: Vec<usize> = (0..outlines.len()).collect();
    order.sort_unstable_by_key(|&index| outlines[index].0);
    Ok(order)
}

/// The JSON header, with spaces to a multiple of 8 so that the tensors behind it are aligned.
fn header(
    path: &Path,
    sorted: &[Outline<'_>],
    dtype: Dtype,
    metadata: &[(&str, &str)],
) -> Result<Vec<u8>, CheckpointError> {
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert(METADATA, HeaderEntry::Metadata(metadata.iter().copied().collect()));
    }
    let mut end = 0usize;
    for (name, shape) in sorted {
        let region = |source| CheckpointError::Region { path: path.to_path_buf(), tensor: (*name).to_owned(), source };
        let start = end;
        let bytes = elements(shape).map_err(region)?.checked_mul(dtype.bytes());
        let too_large = || region(RegionError::Overflow { shape: shape.to_vec() });
        end = bytes.and_then(|bytes| end.checked_add(bytes)).ok_or_else(too_large)?;
        header.insert(name, HeaderEntry::Tensor { dtype: dtype.tag(), shape, data_offsets: [start, end] });
    }
    let json = |source| CheckpointError::Json { path: path.to_path_buf(), source };
    let mut header = serde_json::to_vec(&header).map_err(json)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// The bytes of a chunk. The error is the first finite value that `dtype` can only store as an infinity.
fn encode<'a>(chunk: &'a [f32], dtype: Dtype, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], f32> {
    let narrow: fn(f32) -> ([u8; 2], bool) = match dtype {
        Dtype::F32 => return Ok(bytemuck::cast_slice(chunk)),
        Dtype::Bf16 => |value| (bf16::from_f32(value).to_le_bytes(), bf16::from_f32(value).is_finite()),
        Dtype::F16 => |value| (f16::from_f32(value).to_le_bytes(), f16::from_f32(value).is_finite()),
    };
    scratch.clear();
    for &value in chunk {
        let (bytes, finite) = narrow(value);
        if value.is_finite() && !finite {
            return Err(value);
        }
        scratch.extend_from_slice(&bytes);
    }
    Ok(scratch)
}

/// A file that is hashed while it is written. The hash runs on the calling thread alone: the other cores are training.
pub(crate) struct HashedFile<'a> {
    path: &'a Path,
    file: Box<dyn DiskFile>,
    hasher: TreeHasher,
}

impl<'a> HashedFile<'a> {
    pub fn create(disk: &dyn Disk, path: &'a Path) -> Result<Self, CheckpointError> {
        let file = disk.create(path).map_err(CheckpointError::io("make the file", path))?;
        Ok(Self { path, file, hasher: TreeHasher::default() })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(CheckpointError::io("write the file", self.path))
    }

    pub fn finish(mut self) -> Result<Written, CheckpointError> {
        self.file.sync().map_err(CheckpointError::io("sync the file", self.path))?;
        let bytes = self.hasher.bytes();
        let (hash, tree) = self.hasher.finish();
        Ok(Written { bytes, blake3: hash.to_hex().to_string(), subtrees: tree.map(Tree::subtrees) })
    }
}

#[cfg(test)]
mod tests;
