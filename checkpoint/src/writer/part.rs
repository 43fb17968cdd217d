//! What one rank of several stores, and what becomes of all ranks' parts: the tensors and files of a manifest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use compression::{Region, RegionError};
use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::manifest::{self, DTYPE, FileEntry, Piece, TensorEntry};
use crate::safetensors_file::check_names;
use crate::tree::Subtrees;

/// A tensor that every snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Sizes of its dimensions.
    pub shape: Vec<usize>,
}

/// Which of a tensor's elements one rank stores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceSpec {
    /// The tensor's name in the checkpoint. A rank stores one piece of a tensor at the most.
    pub tensor: String,
    /// Sizes of the dimensions of the whole tensor.
    pub shape: Vec<usize>,
    /// The elements: any box of the tensor, or an interval of one. With none the tensor is named and nothing is stored. No
    /// two ranks store the same element.
    pub region: Region,
}

/// One process among those that write a checkpoint together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its rank, which names its file.
    pub rank: usize,
    /// Whether it is the one member that commits in its folder, puts it in order, and applies retention.
    pub lead: bool,
}

/// What one rank has written for a step: synced, and not yet part of any checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The plain name of its file.
    pub file: String,
    /// The file's size.
    pub bytes: u64,
    /// The file's BLAKE3 hash in lower-case hex.
    pub blake3: String,
    /// Of a packed file, the size of the safetensors file that it stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked_bytes: Option<u64>,
    /// The values of the file's blocks, if it has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subtrees: Option<Subtrees>,
    /// The pieces in the file, each under its tensor's name; those without elements are not in it.
    pub pieces: Vec<PieceSpec>,
}

/// The `tensors` of a manifest.
pub(super) type Tensors = BTreeMap<String, TensorEntry>;
/// The `files` of a manifest.
pub(super) type Files = BTreeMap<String, FileEntry>;

impl PieceSpec {
    /// The elements `range` of a tensor, counted row-major in the whole.
    #[must_use]
    pub fn interval(tensor: impl Into<String>, shape: &[usize], range: Range<usize>) -> Self {
        Self { tensor: tensor.into(), shape: shape.to_vec(), region: Region::interval(shape, range) }
    }

    /// All of a tensor.
    pub(super) fn whole(TensorSpec { name, shape }: TensorSpec, folder: &Path) -> Result<Self, CheckpointError> {
        match Region::whole(&shape) {
            Ok(region) => Ok(Self { tensor: name, shape, region }),
            Err(source) => Err(CheckpointError::Region { path: folder.to_path_buf(), tensor: name, source }),
        }
    }

    /// Checks that the region lies in the shape.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        self.region.check(&self.shape).map_err(|source| self.fault(path, source))
    }

    fn fault(&self, path: &Path, source: RegionError) -> CheckpointError {
        CheckpointError::Region { path: path.to_path_buf(), tensor: self.tensor.clone(), source }
    }

    /// The shape under which the piece lies in its file.
    pub(super) fn stored_shape(&self) -> Vec<usize> {
        manifest::stored_shape(&self.region)
    }
}

/// Checks one rank's pieces, and says where each lies in its host buffer: end to end in their order.
pub(super) fn buffer_ranges(pieces: &[PieceSpec], folder: &Path) -> Result<Vec<Range<usize>>, CheckpointError> {
    check_names(pieces.iter().map(|piece| piece.tensor.as_str()))?;
    let mut end = 0usize;
    let mut ranges = Vec::with_capacity(pieces.len());
    for piece in pieces {
        piece.check(folder)?;
        // A buffer is one allocation, and those end at `isize::MAX` bytes.
        let next = end.checked_add(piece.region.len()).filter(|&next| next <= isize::MAX as usize / size_of::<f32>());
        let next = next.ok_or_else(|| piece.fault(folder, RegionError::Overflow { shape: piece.shape.clone() }))?;
        ranges.push(end..next);
        end = next;
    }
    Ok(ranges)
}

/// Puts all parts of a step together. They come from other processes: everything that they say is checked, but for the
/// files' content. `path` is the manifest to be, for messages.
pub(super) fn assemble(parts: &[Part], path: &Path) -> Result<(Tensors, Files), CheckpointError> {
    let (mut tensors, mut files) = (Tensors::new(), Files::new());
    for Part { file, bytes, blake3, unpacked_bytes, subtrees, pieces } in parts {
        let (bytes, blake3) = (*bytes, blake3.clone());
        let entry = FileEntry { bytes, blake3, unpacked_bytes: *unpacked_bytes, subtrees: subtrees.clone() };
        manifest::check_file(file, &entry, path)?;
        if files.insert(file.clone(), entry).is_some() {
            let (path, name) = (path.to_path_buf(), file.clone());
            return Err(CheckpointError::FileName { path, name, why: "two parts have it" });
        }
        check_names(pieces.iter().map(|piece| piece.tensor.as_str()))?;
        for piece in pieces {
            piece.check(path)?;
            let PieceSpec { tensor, shape, region } = piece;
            let new = || TensorEntry { dtype: DTYPE.into(), shape: shape.clone(), pieces: Vec::new() };
            let entry = tensors.entry(tensor.clone()).or_insert_with(new);
            if entry.shape != *shape {
                let (path, expected, found) = (path.to_path_buf(), entry.shape.clone(), shape.clone());
                return Err(CheckpointError::TensorShape { path, tensor: tensor.clone(), expected, found });
            }
            if !region.is_empty() {
                entry.pieces.push(Piece { file: file.clone(), key: tensor.clone(), region: region.clone() });
            }
        }
    }
    for (name, entry) in &mut tensors {
        entry.sort();
        entry.check(name, path)?;
    }
    Ok((tensors, files))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    fn piece(range: Range<usize>) -> PieceSpec {
        PieceSpec::interval("w", &[2, 3], range)
    }

    fn part(rank: usize, pieces: Vec<PieceSpec>) -> Part {
        Part {
            file: layout::shard(rank),
            bytes: 8,
            blake3: "ab".repeat(32),
            unpacked_bytes: None,
            subtrees: None,
            pieces,
        }
    }

    fn path() -> &'static Path {
        Path::new("/c/step-00000007.partial/manifest.json")
    }

    #[test]
    fn parts_in_any_order_make_the_same_tensors() {
        let parts = [part(0, vec![piece(4..6)]), part(1, vec![piece(0..3)]), part(2, vec![piece(3..4)])];
        let (tensors, files) = assemble(&parts, path()).unwrap();
        let ranges: Vec<_> =
            tensors["w"].pieces.iter().map(|piece| piece.region.flat_start..piece.region.flat_end).collect();
        assert_eq!(ranges, [0..3, 3..4, 4..6]);
        assert_eq!(files.len(), 3);
        let [a, b, c] = parts;
        assert_eq!(assemble(&[c, a, b], path()).unwrap(), (tensors, files));
    }

    #[test]
    fn a_piece_without_elements_names_its_tensor_alone() {
        let (tensors, files) = assemble(&[part(0, vec![piece(2..2)]), part(1, vec![piece(0..6)])], path()).unwrap();
        assert_eq!((tensors["w"].pieces.len(), files.len()), (1, 2));
        let (tensors, _) = assemble(&[part(0, vec![piece(6..6)])], path()).unwrap();
        assert_eq!((&tensors["w"].shape, tensors["w"].pieces.len()), (&vec![2, 3], 0));
    }

    #[test]
    fn bad_parts_are_named() {
        let check = |parts: &[Part], words: &[&str]| {
            let message = assemble(parts, path()).unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        let good = || part(0, vec![piece(0..3)]);
        let overlapping = part(1, vec![piece(2..6)]);
        check(&[good(), overlapping], &["step-00000007", "tensor w", "overlap", "0..3", "2..6", "rank-0001"]);
        check(&[good(), good()], &["rank-0000.safetensors", "two parts have it"]);
        for name in ["../rank-0001.safetensors", "/etc/passwd", "", "manifest.json"] {
            check(&[good(), Part { file: name.into(), ..part(1, vec![]) }], &[&format!("{name:?}")]);
        }
        check(&[good(), Part { blake3: "xyz".into(), ..part(1, vec![]) }], &["64 lower-case hex digits"]);
        let other = PieceSpec::interval("w", &[3, 2], 3..6);
        check(&[good(), part(1, vec![other])], &["tensor w", "expected shape [2, 3], found [3, 2]"]);
        check(&[good(), part(1, vec![piece(3..7)])], &["tensor w", "elements 3..7 of a box of 6"]);
        check(&[good(), part(1, vec![piece(Range { start: 5, end: 4 })])], &["elements 5..4 of a box of 6"]);
        let huge = PieceSpec::interval("w", &[usize::MAX, 3], 0..0);
        check(&[part(0, vec![huge])], &["more elements than can be addressed"]);
        check(&[part(0, vec![piece(0..2), piece(2..4)])], &["\"w\"", "two tensors have it"]);
        // The control: the same without the fault.
        assemble(&[good(), part(1, vec![piece(3..6)])], path()).unwrap();
    }

    #[test]
    fn a_part_comes_back_from_json() {
        let part = part(3, vec![piece(2..6), piece(0..0)]);
        let text = serde_json::to_string(&part).unwrap();
        assert_eq!(serde_json::from_str::<Part>(&text).unwrap(), part);
    }
}
