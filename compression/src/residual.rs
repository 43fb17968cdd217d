//! What error feedback remembers, addressed by logical tensor and region, and how it follows a change of the mesh.
//!
//! There are two sides. A sender remembers, for each region that it encodes, what it left out; the owner of a region
//! remembers what it left out of the sum. Both are addressed by tensor and [`Region`], never by bucket, so that buckets,
//! world size and mesh may change: [`recut`] folds everything that all sides remember of a tensor into what the owners of
//! another mesh remember. Nothing is lost but what f32 additions round, and every such rounding can be entered in a
//! ledger.
//!
//! Memory: [`Codec::encode`](crate::Codec::encode) replaces a gradient by what it left out, so a sender has its gradient's
//! buffer and one more of 4 bytes an element; the two change places when a step counts. An owner has two of 4 bytes for
//! each element that it owns. So N ranks need 4 + 8 / N bytes an element each, beside the gradient. A bucket in which nothing
//! travels in a lossy codec needs 4 / N: the place of its sums.

use thiserror::Error;

use crate::ledger::lost;
use crate::region::{Region, RegionError, elements};

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Of the sums of a region.
    Owner,
    /// Of this rank's own gradient.
    Sender {
        /// Which rank.
        rank: usize,
    },
}

/// What one side left out of one region of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// Whose it is.
    pub side: Side,
    /// Which part of the tensor.
    pub region: Region,
    /// One for each element of the region, in row-major order.
    pub values: Vec<f32>,
}

/// Why residuals cannot be used. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResidualError {
    /// There are not as many values as elements.
    #[error("{side:?}: a residual of {expected} elements was expected, {found} came: it is of another shape")]
    Length {
        /// Whose.
        side: Side,
        /// Elements of the region.
        expected: usize,
        /// Values.
        found: usize,
    },
    /// The region is not one of the tensor.
    #[error("{side:?}: {error}")]
    Region {
        /// Whose.
        side: Side,
        /// What is wrong.
        error: RegionError,
    },
    /// One side remembers an element twice, or two of the new owners have it.
    #[error("{side:?}: element {element} of the tensor is there twice")]
    Twice {
        /// Whose.
        side: Side,
        /// Its place in the whole tensor, row-major.
        element: usize,
    },
    /// No new owner has an element.
    #[error("element {element} of the tensor has no owner: what was left out of it would be lost")]
    Missing {
        /// Its place in the whole tensor, row-major.
        element: usize,
    },
}

impl Residual {
    fn check(&self, shape: &[usize]) -> Result<(), ResidualError> {
        let side = self.side;
        self.region.check(shape).map_err(|error| ResidualError::Region { side, error })?;
        match (self.region.len(), self.values.len()) {
            (expected, found) if expected != found => Err(ResidualError::Length { side, expected, found }),
            _ => Ok(()),
        }
    }
}

/// What the owners of `regions` remember when the mesh changes: for each element what its owner remembered, plus what
/// the senders did, in the order of their ranks. Senders start at zero. What an addition rounded away is handed to
/// `rounded`, which a proof enters in its ledger. Memory: 8 bytes an element of the tensor, beside what is returned.
///
/// # Errors
/// A residual or a region that does not fit a tensor of this shape, an element that one side remembers twice, or regions
/// that are not the whole tensor once.
pub fn recut(
    shape: &[usize],
    residuals: &[Residual],
    regions: &[Region],
    mut rounded: impl FnMut(f32),
) -> Result<Vec<Vec<f32>>, ResidualError> {
    let owner = Side::Owner;
    let outside = |error| ResidualError::Region { side: owner, error };
    residuals.iter().try_for_each(|residual| residual.check(shape))?;
    regions.iter().try_for_each(|region| region.check(shape).map_err(outside))?;
    let n = elements(shape).map_err(outside)?;
    let mut order: Vec<&Residual> = residuals.iter().collect();
    order.sort_by_key(|residual| residual.side);
    let (mut folded, mut seen) = (vec![0.0f32; n], vec![0u32; n]);
    let mut sides = 0;
    for (at, Residual { side, region, values }) in order.iter().enumerate() {
        // Sides come one after the other, so that the number of the last one that had an element is enough.
        sides += u32::from(at == 0 || order[at - 1].side != *side);
        for (element, value) in region.runs(shape).flatten().zip(values) {
            if seen[element] == sides {
                return Err(ResidualError::Twice { side: *side, element });
            }
            seen[element] = sides;
            rounded(lost(folded[element], *value));
            folded[element] += value;
        }
    }
    seen.fill(0);
    for element in regions.iter().flat_map(|region| region.runs(shape).flatten()) {
        if seen[element] == 1 {
            return Err(ResidualError::Twice { side: owner, element });
        }
        seen[element] = 1;
    }
    if let Some(element) = seen.iter().position(|&seen| seen == 0) {
        return Err(ResidualError::Missing { element });
    }
    let cut = |region: &Region| region.runs(shape).flat_map(|run| &folded[run]).copied().collect();
    Ok(regions.iter().map(cut).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::Exact;

    fn part(side: Side, start: [usize; 2], end: [usize; 2], values: Vec<f32>) -> Residual {
        let inside = (end[0] - start[0]) * (end[1] - start[1]);
        let region = Region { start: start.to_vec(), end: end.to_vec(), flat_start: 0, flat_end: inside };
        Residual { side, region, values }
    }

    #[test]
    fn two_senders_and_column_owners_become_row_owners() {
        let kept = [
            part(Side::Sender { rank: 1 }, [0, 0], [2, 2], vec![10.0, 20.0, 30.0, 40.0]),
            part(Side::Owner, [0, 0], [2, 1], vec![1.0, 3.0]),
            part(Side::Sender { rank: 0 }, [0, 0], [2, 2], vec![100.0, 200.0, 300.0, 400.0]),
            part(Side::Owner, [0, 1], [2, 2], vec![2.0, 4.0]),
        ];
        let rows = [0, 1].map(|row| part(Side::Owner, [row, 0], [row + 1, 2], Vec::new()).region);
        let cut = recut(&[2, 2], &kept, &rows, |_| {}).expect("they fit");
        assert_eq!(cut, [vec![111.0, 222.0], vec![333.0, 444.0]]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let short = part(Side::Owner, [0, 0], [2, 1], vec![1.0]);
        let error = recut(&[2, 2], &[short], &[], |_| {}).expect_err("one value of two");
        assert_eq!(error, ResidualError::Length { side: Side::Owner, expected: 2, found: 1 });
        let outside = part(Side::Sender { rank: 3 }, [0, 0], [3, 1], vec![1.0; 3]);
        let error = recut(&[2, 2], &[outside], &[], |_| {}).expect_err("a row too many").to_string();
        assert!(error.contains("rank: 3") && error.contains("dimension 0: the region takes 0..3"), "{error}");
        let twice = [0, 1].map(|start| part(Side::Owner, [start, 0], [2, 1], vec![1.0; 2 - start]));
        let error = recut(&[2, 2], &twice, &[], |_| {}).expect_err("row 1 has two owners");
        assert_eq!(error, ResidualError::Twice { side: Side::Owner, element: 2 });
    }

    #[test]
    fn new_owners_that_leave_something_out_or_share_it_are_refused() {
        let rows = [0, 1].map(|row| part(Side::Owner, [row, 0], [row + 1, 2], Vec::new()).region);
        assert_eq!(recut(&[2, 2], &[], &rows[..1], |_| {}), Err(ResidualError::Missing { element: 2 }));
        let again = [rows[0].clone(), rows[1].clone(), rows[1].clone()];
        let error = recut(&[2, 2], &[], &again, |_| {});
        assert_eq!(error, Err(ResidualError::Twice { side: Side::Owner, element: 2 }));
    }

    proptest! {
        /// Whatever is remembered before is remembered after, with the roundings.
        #[test]
        fn nothing_is_lost_by_another_cut(
            values in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 12), 1..5),
            column in 0usize..5,
            row in 0usize..4,
        ) {
            let mut exact = Exact::default();
            values.iter().flatten().for_each(|value| exact.add(*value));
            let side = |rank: usize| if rank == 0 { Side::Owner } else { Side::Sender { rank } };
            let kept: Vec<_> =
                values.iter().enumerate().map(|(rank, values)| part(side(rank), [0, 0], [3, 4], values.clone())).collect();
            let boxes = [[0, 0, row, column], [0, column, row, 4], [row, 0, 3, column], [row, column, 3, 4]];
            let regions = boxes.map(|[a, b, c, d]| part(Side::Owner, [a, b], [c.max(a), d.max(b)], Vec::new()).region);
            let mut roundings = Vec::new();
            let cut = recut(&[3, 4], &kept, &regions, |rounded| roundings.push(rounded)).expect("they fit");
            roundings.iter().for_each(|rounded| exact.add(-*rounded));
            let all: Vec<f32> = cut.concat();
            all.iter().for_each(|value| exact.add(-*value));
            prop_assert_eq!(all.len(), 12);
            prop_assert!(exact.is_zero());
            // The control: one owner's part is forgotten.
            if let Some(value) = cut[3].first().filter(|value| **value != 0.0) {
                exact.add(*value);
                prop_assert!(!exact.is_zero());
            }
        }
    }
}
