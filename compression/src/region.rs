//! The address of a part of one tensor.
//!
//! A region is a box (`start..end` for each dimension) of the tensor in its exported layout, and a flat row-major
//! interval of the elements inside that box. Tensor and pipeline parallelism cut boxes; data parallelism and sharded
//! optimisers cut flat intervals, always on borders of [`BLOCK`](crate::BLOCK) elements counted from the box's origin.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

mod shared;

pub use shared::Shared;

/// A box of a tensor, and an interval of that box's elements in row-major order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Region {
    /// First index of the box in each dimension.
    pub start: Vec<usize>,
    /// One past the last index of the box in each dimension.
    pub end: Vec<usize>,
    /// First element of the flat interval, counted inside the box.
    pub flat_start: usize,
    /// One past the last element of the flat interval, counted inside the box.
    pub flat_end: usize,
}

/// Why a region does not fit the tensor that it is said to be part of.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegionError {
    /// The box and the tensor have different numbers of dimensions.
    #[error("the region has {start} and {end} dimensions (start, end), the tensor has {tensor}")]
    Rank {
        /// Dimensions of `start`.
        start: usize,
        /// Dimensions of `end`.
        end: usize,
        /// Dimensions of the tensor.
        tensor: usize,
    },
    /// One dimension of the box is empty the wrong way round or leaves the tensor.
    #[error("dimension {dim}: the region takes {start}..{end}, the tensor has {size} there")]
    Box {
        /// Which dimension.
        dim: usize,
        /// The region's first index.
        start: usize,
        /// The region's end.
        end: usize,
        /// The tensor's size.
        size: usize,
    },
    /// The flat interval leaves the box.
    #[error("the region takes elements {start}..{end} of a box of {elements}")]
    Flat {
        /// First element.
        start: usize,
        /// One past the last element.
        end: usize,
        /// Elements of the box.
        elements: usize,
    },
    /// The number of elements does not fit the address space.
    #[error("a tensor of shape {shape:?} has more elements than can be addressed")]
    Overflow {
        /// The tensor's shape.
        shape: Vec<usize>,
    },
}

impl Region {
    /// The whole of a tensor of this shape.
    ///
    /// # Errors
    /// [`RegionError::Overflow`] when the number of elements does not fit a `usize`.
    pub fn whole(shape: &[usize]) -> Result<Self, RegionError> {
        Ok(Self { start: vec![0; shape.len()], end: shape.to_vec(), flat_start: 0, flat_end: elements(shape)? })
    }

    /// Elements that the region holds.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.flat_end.saturating_sub(self.flat_start)
    }

    /// Whether the region holds no element.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The interval `range` of a tensor of this shape; [`check`](Self::check) says whether the tensor has so many elements.
    #[must_use]
    pub fn interval(shape: &[usize], range: Range<usize>) -> Self {
        Self { start: vec![0; shape.len()], end: shape.to_vec(), flat_start: range.start, flat_end: range.end }
    }

    /// All of the box `start..end`. It may be of any tensor: [`check`](Self::check) says whether it lies in one.
    ///
    /// # Errors
    /// A box that is empty the wrong way round, or has more elements than can be addressed.
    pub fn of_box(start: Vec<usize>, end: Vec<usize>) -> Result<Self, RegionError> {
        if start.len() != end.len() {
            return Err(RegionError::Rank { start: start.len(), end: end.len(), tensor: end.len() });
        }
        if let Some(dim) = (0..start.len()).find(|&dim| start[dim] > end[dim]) {
            return Err(RegionError::Box { dim, start: start[dim], end: end[dim], size: end[dim] });
        }
        let sizes: Vec<usize> = start.iter().zip(&end).map(|(start, end)| end - start).collect();
        let flat_end = elements(&sizes)?;
        Ok(Self { start, end, flat_start: 0, flat_end })
    }

    /// Sizes of the box.
    #[must_use]
    pub fn sizes(&self) -> Vec<usize> {
        self.start.iter().zip(&self.end).map(|(start, end)| end - start).collect()
    }

    /// Whether the interval is all of the box.
    #[must_use]
    pub fn is_box(&self) -> bool {
        self.flat_start == 0 && elements(&self.sizes()) == Ok(self.flat_end)
    }

    /// Whether the box is all of a tensor of this shape.
    #[must_use]
    pub fn is_interval(&self, shape: &[usize]) -> bool {
        self.end == shape && self.start.iter().all(|&start| start == 0)
    }

    /// A part of the region: those of its elements that `range` counts from its first one on.
    ///
    /// # Panics
    /// A range that leaves the region.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} elements", self.len());
        let (flat_start, flat_end) = (self.flat_start + range.start, self.flat_start + range.end);
        Self { start: self.start.clone(), end: self.end.clone(), flat_start, flat_end }
    }

    /// The places of the region's elements in the whole tensor, row-major, as runs in ascending order; together they are
    /// as many as the region's elements. The region lies inside a tensor of this shape.
    pub fn runs(&self, shape: &[usize]) -> impl Iterator<Item = Range<usize>> + use<> {
        // A run is a row of the box, that is of its last dimension; of several, where it has all of those behind them.
        let (mut row, mut dims) = (1, shape.len());
        while dims > 0 {
            dims -= 1;
            row *= self.end[dims] - self.start[dims];
            if (self.start[dims], self.end[dims]) != (0, shape[dims]) {
                break;
            }
        }
        let (start, end, shape) = (self.start.clone(), self.end.clone(), shape.to_vec());
        let (flat_start, flat_end) = (self.flat_start, self.flat_end);
        let first = flat_start.checked_div(row).unwrap_or(0);
        let rows = if row == 0 || flat_start == flat_end { first } else { flat_end.div_ceil(row) };
        (first..rows).map(move |number| {
            // The row's place: its coordinates in the box, without the dimensions that it has, in mixed radix.
            let (mut rest, mut place, mut stride) = (number, 0, 1);
            for dim in (0..shape.len()).rev() {
                if dim >= dims {
                    place += start[dim] * stride;
                } else {
                    let size = end[dim] - start[dim];
                    place += (start[dim] + rest % size) * stride;
                    rest /= size;
                }
                stride *= shape[dim];
            }
            let inside = flat_start.max(number * row) - number * row..flat_end.min((number + 1) * row) - number * row;
            place + inside.start..place + inside.end
        })
    }

    /// Checks that the region lies inside a tensor of this shape.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, shape: &[usize]) -> Result<(), RegionError> {
        if self.start.len() != shape.len() || self.end.len() != shape.len() {
            return Err(RegionError::Rank { start: self.start.len(), end: self.end.len(), tensor: shape.len() });
        }
        for (dim, &size) in shape.iter().enumerate() {
            let (start, end) = (self.start[dim], self.end[dim]);
            if start > end || end > size {
                return Err(RegionError::Box { dim, start, end, size });
            }
        }
        elements(shape)?;
        let inside: usize = self.start.iter().zip(&self.end).map(|(start, end)| end - start).product();
        if self.flat_start > self.flat_end || self.flat_end > inside {
            return Err(RegionError::Flat { start: self.flat_start, end: self.flat_end, elements: inside });
        }
        Ok(())
    }
}

/// Elements of a tensor of this shape, without wrapping around.
///
/// # Errors
/// [`RegionError::Overflow`] when the product does not fit a `usize`.
pub fn elements(shape: &[usize]) -> Result<usize, RegionError> {
    shape
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))
        .ok_or_else(|| RegionError::Overflow { shape: shape.to_vec() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_region_that_leaves_its_tensor_is_named() {
        let whole = Region::whole(&[4, 6]).expect("small");
        assert_eq!(whole.len(), 24);
        assert_eq!(whole.check(&[4, 6]), Ok(()));
        assert_eq!(whole.check(&[4]), Err(RegionError::Rank { start: 2, end: 2, tensor: 1 }));
        assert_eq!(whole.check(&[4, 5]), Err(RegionError::Box { dim: 1, start: 0, end: 6, size: 5 }));
        let long = Region { flat_end: 25, ..whole };
        assert_eq!(long.check(&[4, 6]), Err(RegionError::Flat { start: 0, end: 25, elements: 24 }));
        assert!(matches!(Region::whole(&[usize::MAX, 2]), Err(RegionError::Overflow { .. })));
    }

    #[test]
    fn the_runs_of_a_box_are_its_rows() {
        let region = Region { start: vec![1, 0, 2], end: vec![3, 2, 5], flat_start: 2, flat_end: 11 };
        let runs: Vec<_> = region.runs(&[3, 2, 6]).collect();
        // Elements 2..11 of a box of 2 x 2 x 3.
        assert_eq!(runs, [16..17, 20..23, 26..29, 32..34]);
        let whole = Region { flat_start: 3, ..Region::whole(&[2, 3, 4]).expect("small") };
        assert!(whole.runs(&[2, 3, 4]).eq(std::iter::once(3..24)));
        let planes = Region { start: vec![1, 1, 0], end: vec![3, 2, 4], flat_start: 1, flat_end: 8 };
        assert_eq!(planes.runs(&[3, 2, 4]).collect::<Vec<_>>(), [13..16, 20..24]);
        let mut runs = Region::whole(&[]).expect("one element").runs(&[]);
        assert_eq!((runs.next(), runs.next()), (Some(0..1), None));
        assert_eq!(Region::whole(&[3, 0]).expect("none").runs(&[3, 0]).flatten().count(), 0);
    }

    proptest! {
        #[test]
        fn every_box_inside_the_shape_is_accepted(dims in prop::collection::vec((0usize..9, 0usize..9, 0usize..9), 0..4)) {
            let shape: Vec<usize> = dims.iter().map(|(a, b, c)| a + b + c).collect();
            let start: Vec<usize> = dims.iter().map(|(a, _, _)| *a).collect();
            let end: Vec<usize> = dims.iter().map(|(a, b, _)| a + b).collect();
            let inside = dims.iter().map(|(_, b, _)| *b).product();
            let region = Region { start, end, flat_start: 0, flat_end: inside };
            prop_assert_eq!(region.check(&shape), Ok(()));
            let outside = Region { flat_end: inside + 1, ..region };
            prop_assert!(outside.check(&shape).is_err());
        }
    }
}
