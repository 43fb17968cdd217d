//! What a manifest says of a tensor: its shape, and the pieces in which it lies.
//!
//! A piece is any box of the tensor, or an interval of such a box. No element is in two pieces: replicas share the writing,
//! and a reader that found an element twice could not know which of the two counts.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use compression::Region;
use compression::region::elements;
use serde::{Deserialize, Serialize};

use super::DTYPE;
use crate::error::CheckpointError;

/// Pieces of a tensor at the most, unless all of them are intervals of the whole: of others each is compared with each.
pub const BOXES_MAX: usize = 4096;

/// Dimensions of a tensor that is cut in other pieces than intervals of the whole, at the most.
pub const BOX_DIMS_MAX: usize = 8;

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// [`DTYPE`].
    pub dtype: String,
    /// Sizes of the dimensions of the whole tensor.
    pub shape: Vec<usize>,
    /// Where its elements lie: parts of the whole tensor in the order of their first elements, no element twice. What none
    /// of them holds, another machine has stored.
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

impl TensorEntry {
    /// Elements of the whole tensor.
    #[must_use]
    pub fn elements(&self) -> usize {
        // Of a manifest that was parsed or rendered the product is known to fit; a saturated one is more than any slice
        // can hold.
        elements(&self.shape).unwrap_or(usize::MAX)
    }

    /// Whether every piece is an interval of the whole.
    fn is_cut_flat(&self) -> bool {
        self.pieces.iter().all(|piece| piece.region.is_interval(&self.shape))
    }

    /// The pieces that may hold some of this region's elements; of intervals of the whole those that do.
    pub(crate) fn near<'a>(&'a self, region: &Region) -> impl Iterator<Item = &'a Piece> + use<'a> {
        let all = &self.pieces[..];
        let near = match region.is_interval(&self.shape) && self.is_cut_flat() {
            true => {
                let first = all.partition_point(|piece| piece.region.flat_end <= region.flat_start);
                let behind = all.partition_point(|piece| piece.region.flat_start < region.flat_end);
                &all[first..behind.max(first)]
            }
            false => all,
        };
        near.iter().filter(|piece| !piece.region.is_empty())
    }

    /// Those of these elements, counted in the whole, that no piece holds, ascending.
    #[must_use]
    pub fn absent(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        difference(std::slice::from_ref(range), &self.held())
    }

    /// How many of a region's elements some piece holds.
    pub(crate) fn held_of(&self, region: &Region) -> usize {
        self.near(region).map(|piece| piece.region.overlap(region)).sum()
    }

    /// How many of all its elements no piece holds.
    #[must_use]
    pub fn absent_count(&self) -> usize {
        self.elements() - self.pieces.iter().map(|piece| piece.region.len()).sum::<usize>()
    }

    /// The elements that some piece holds, ascending, counted in the whole; ranges that touch are one.
    #[must_use]
    pub fn held(&self) -> Vec<Range<usize>> {
        if self.absent_count() == 0 {
            return Vec::from_iter((self.elements() > 0).then(|| 0..self.elements()));
        }
        let mut runs: Vec<Range<usize>> =
            self.pieces.iter().flat_map(|piece| piece.region.runs(&self.shape)).filter(|run| !run.is_empty()).collect();
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|next, run| {
            let touches = run.end == next.start;
            run.end = if touches { next.end } else { run.end };
            touches
        });
        runs
    }

    /// Puts the pieces into the order that a manifest has them in. Each lies in the shape.
    pub(crate) fn sort(&mut self) {
        let shape = &self.shape;
        self.pieces.sort_by_cached_key(|piece| piece.first(shape));
    }

    /// Checks that every piece lies in the tensor, and that they ascend and share no element and no place.
    pub(crate) fn check(&self, name: &str, path: &Path) -> Result<(), CheckpointError> {
        if self.dtype != DTYPE {
            let (path, tensor, found) = (path.to_path_buf(), name.to_owned(), self.dtype.clone());
            return Err(CheckpointError::TensorType { path, tensor, expected: DTYPE, found });
        }
        let fault = |why| Err(self.fault(name, path, why));
        let region = |source| CheckpointError::Region { path: path.to_path_buf(), tensor: name.to_owned(), source };
        elements(&self.shape).map_err(region)?;
        let mut places = BTreeSet::new();
        for Piece { file, key, region: found } in &self.pieces {
            found.check(&self.shape).map_err(region)?;
            if !places.insert((file, key)) {
                return fault(format!("two of its pieces lie in {file} under the key {key:?}"));
            }
        }
        let filled: Vec<&Piece> = self.pieces.iter().filter(|piece| !piece.region.is_empty()).collect();
        let flat = self.is_cut_flat();
        // Of intervals the empty ones ascend too, so that one can be looked for.
        let place = |piece: &Piece| if flat { Some(piece.region.flat_start) } else { piece.first(&self.shape) };
        let ordered = if flat { &self.pieces.iter().collect() } else { &filled };
        for pair in ordered.windows(2) {
            if place(pair[0]) > place(pair[1]) {
                let [a, b] = [pair[0], pair[1]].map(|piece| self.words(piece));
                return fault(format!("its pieces do not ascend: {a} stand before {b}"));
            }
        }
        if let Some((a, b)) = self.overlap(&filled).map_err(|why| self.fault(name, path, why))? {
            let [in_a, in_b] = [&a.file, &b.file];
            return fault(format!("its pieces overlap: {} in {in_a} and {} in {in_b}", self.words(a), self.words(b)));
        }
        Ok(())
    }

    /// Two pieces that have an element in common, if there are any; each has an element, and they are in order.
    fn overlap<'a>(&self, pieces: &[&'a Piece]) -> Result<Option<(&'a Piece, &'a Piece)>, String> {
        if self.is_cut_flat() {
            let pair = pieces.windows(2).find(|pair| pair[1].region.flat_start < pair[0].region.flat_end);
            return Ok(pair.map(|pair| (pair[0], pair[1])));
        }
        let (count, dims) = (pieces.len(), self.shape.len());
        if count > BOXES_MAX || dims > BOX_DIMS_MAX {
            return Err(format!(
                "{count} pieces of {dims} dimensions; in other pieces than intervals of the whole it has {BOXES_MAX} of \
                 {BOX_DIMS_MAX} at the most"
            ));
        }
        let behind = |index: usize| pieces[index + 1..].iter().map(move |&other| (pieces[index], other));
        let mut pairs = (0..count).flat_map(behind);
        Ok(pairs.find(|(a, b)| a.region.overlap(&b.region) > 0))
    }

    /// Which elements a piece holds, as words.
    fn words(&self, piece: &Piece) -> String {
        let Region { start, end, flat_start, flat_end } = &piece.region;
        match piece.region.is_interval(&self.shape) {
            true => format!("elements {flat_start}..{flat_end}"),
            false => format!("elements {flat_start}..{flat_end} of the box {start:?} to {end:?}"),
        }
    }

    pub(super) fn fault(&self, name: &str, path: &Path, why: String) -> CheckpointError {
        CheckpointError::Pieces { path: path.to_path_buf(), tensor: name.to_owned(), shape: self.shape.clone(), why }
    }
}

impl Piece {
    /// The place of its first element in the whole, if it has any; it lies in the shape.
    fn first(&self, shape: &[usize]) -> Option<usize> {
        self.region.runs(shape).next().map(|run| run.start)
    }

    /// The shape under which it lies in its file.
    #[must_use]
    pub fn stored_shape(&self) -> Vec<usize> {
        stored_shape(&self.region)
    }
}

/// The shape under which a part of a tensor lies in a file: that of its box where it is all of it, else its length.
pub(crate) fn stored_shape(region: &Region) -> Vec<usize> {
    if region.is_box() { region.sizes() } else { vec![region.len()] }
}

/// What is in `ranges` and not in `others`; both ascend.
pub(crate) fn difference(ranges: &[Range<usize>], others: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut rest, mut next) = (Vec::new(), 0);
    for range in ranges {
        let mut start = range.start;
        while next < others.len() && others[next].end <= start {
            next += 1;
        }
        // The last one that is looked at may go on behind this range.
        for other in others[next..].iter().take_while(|other| other.start < range.end) {
            if start < other.start {
                rest.push(start..other.start);
            }
            start = start.max(other.end);
        }
        if start < range.end {
            rest.push(start..range.end);
        }
    }
    rest
}
