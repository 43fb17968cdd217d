//! The host buffer of one snapshot, while it is being filled.

use std::ops::Range;

/// A host buffer to be filled. Every tensor or piece must be asked for; one that is not fails the snapshot.
#[derive(Debug)]
pub struct Snapshot<'a> {
    ranges: &'a [Range<usize>],
    values: &'a mut [f32],
    filled: &'a mut [bool],
}

impl<'a> Snapshot<'a> {
    /// Where tensor or piece `index` of those that the writer was made with goes, row-major. It holds what an earlier
    /// snapshot left.
    ///
    /// # Panics
    /// When there is no such tensor or piece.
    pub fn tensor(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.ranges.len(), "tensor {index} of {}", self.ranges.len());
        self.filled[index] = true;
        &mut self.values[self.ranges[index].clone()]
    }

    /// Has `values` filled, and returns the first that was left out. Those without elements need no filling.
    pub(super) fn fill(
        ranges: &'a [Range<usize>],
        values: &'a mut [f32],
        fill: impl FnOnce(&mut Snapshot<'_>),
    ) -> Option<usize> {
        let mut filled: Vec<bool> = ranges.iter().map(Range::is_empty).collect();
        fill(&mut Snapshot { ranges, values, filled: &mut filled });
        filled.iter().position(|&filled| !filled)
    }
}

/// A host buffer for tensors in these ranges, end to end. Every page of it is there: what is not zero has to be written.
pub(super) fn buffer(ranges: &[Range<usize>]) -> Vec<f32> {
    vec![f32::NAN; ranges.last().map_or(0, |range| range.end)]
}
