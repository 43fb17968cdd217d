//! What one rank holds of a parameter: all of it, or a box where several ranks hold one model together.

use std::ops::Range;

use compression::Region;
use compression::region::RegionError;

use super::plan::Parameter;

/// One rank's part of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The parameter as it is exported.
    pub whole: Parameter,
    /// The box that this rank holds, all of its elements.
    pub region: Region,
    /// Whether this rank's part counts in sums over all ranks' parts: of those that several hold, one does.
    pub counts: bool,
}

impl Part {
    /// All of it.
    ///
    /// # Errors
    /// More elements than the address space has.
    pub fn whole(parameter: Parameter) -> Result<Self, RegionError> {
        let region = Region::whole(&parameter.shape)?;
        Ok(Self { whole: parameter, region, counts: true })
    }

    /// The indices `range` of one dimension, and all of the others.
    ///
    /// # Errors
    /// There are no such indices.
    pub fn slice(parameter: Parameter, dim: usize, range: Range<usize>) -> Result<Self, RegionError> {
        let mut region = Region::whole(&parameter.shape)?;
        (region.start[dim], region.end[dim]) = (range.start, range.end);
        region.flat_end = region.start.iter().zip(&region.end).map(|(start, end)| end.saturating_sub(*start)).product();
        region.check(&parameter.shape)?;
        Ok(Self { whole: parameter, region, counts: true })
    }

    /// The same, of which another rank's copy counts if `counts` is false.
    #[must_use]
    pub const fn counting(mut self, counts: bool) -> Self {
        self.counts = counts;
        self
    }

    /// The part as a parameter of its own, under the same name.
    #[must_use]
    pub fn parameter(&self) -> Parameter {
        let shape = self.region.start.iter().zip(&self.region.end).map(|(start, end)| end - start).collect();
        Parameter { name: self.whole.name.clone(), shape }
    }

    /// Whether it is all of the parameter.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.region.len() == self.whole.elements()
    }

    /// The part's elements of those of the whole.
    #[must_use]
    pub fn take(&self, whole: &[f32]) -> Vec<f32> {
        assert_eq!(whole.len(), self.whole.elements(), "all of {}", self.whole.name);
        self.region.runs(&self.whole.shape).flat_map(|run| &whole[run]).copied().collect()
    }

    /// Puts the part's elements where they belong in the whole.
    pub fn put(&self, values: &[f32], whole: &mut [f32]) {
        assert_eq!(values.len(), self.region.len(), "a part of {}", self.whole.name);
        let mut rest = values;
        for run in self.region.runs(&self.whole.shape) {
            let (these, others) = rest.split_at(run.len());
            whole[run].copy_from_slice(these);
            rest = others;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter() -> Parameter {
        Parameter { name: "o_proj".into(), shape: vec![2, 4] }
    }

    #[test]
    fn parts_of_rows_and_of_columns_put_the_whole_together_again() {
        let whole: Vec<f32> = (0..8).map(|i| i as f32).collect();
        for (dim, cuts) in [(0, [0, 1, 2]), (1, [0, 3, 4])] {
            let mut again = vec![-1.0; 8];
            for pair in cuts.windows(2) {
                let part = Part::slice(parameter(), dim, pair[0]..pair[1]).expect("inside");
                let values = part.take(&whole);
                assert_eq!(values.len(), part.parameter().elements());
                part.put(&values, &mut again);
            }
            assert_eq!(again, whole);
        }
        let columns = Part::slice(parameter(), 1, 1..3).expect("inside");
        assert_eq!((columns.take(&whole), columns.parameter().shape), (vec![1.0, 2.0, 5.0, 6.0], vec![2, 2]));
        assert!(!columns.is_whole() && Part::whole(parameter()).expect("small").is_whole());
    }

    #[test]
    fn indices_that_there_are_not_are_refused() {
        assert!(Part::slice(parameter(), 1, 3..5).is_err());
    }
}
