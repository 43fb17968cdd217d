//! Which layers make a piece.
//!
//! The step waits for the costliest piece, so the split is the one whose costliest piece costs least; of all that are as
//! good, one whose pieces are near their mean. Costs are whole numbers (nanoseconds that were measured, or operations
//! that were counted), so that all ranks come to the same split.

use std::ops::Range;

use thiserror::Error;

/// What layers cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerCosts {
    /// Of the layers, first to last.
    pub layers: Vec<u64>,
    /// Of what stands before the first layer and is in its piece: the embedding.
    pub before: u64,
    /// Of what stands behind the last layer and is in its piece: the norm, the head and the loss.
    pub after: u64,
}

/// Why there is no split.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SplitError {
    /// A piece would be empty.
    #[error("expected at least a layer for each of {pieces} pieces and at least 1 piece, found {layers} layers")]
    Layers {
        /// Layers there are.
        layers: usize,
        /// Pieces that were asked for.
        pieces: usize,
    },
    /// A split that was given, and is none.
    #[error("expected {pieces} pieces of at least a layer, {layers} together, found {found:?}")]
    Given {
        /// Layers there are.
        layers: usize,
        /// Pieces that were asked for.
        pieces: usize,
        /// Layers of each piece.
        found: Vec<usize>,
    },
    /// Costs whose sum is no number.
    #[error("expected costs whose sum is below 2^64")]
    Costs,
}

/// The layers of every piece, in order: contiguous, none empty.
///
/// Whether no piece has to cost more than some limit is seen by filling pieces one after the other; the least such
/// limit is found by halving. So it takes no more than 64 passes over the layers.
///
/// # Errors
/// Fewer layers than pieces, no piece, or costs that do not add up.
pub fn split(costs: &LayerCosts, pieces: usize) -> Result<Vec<Range<usize>>, SplitError> {
    let layers = costs.layers.len();
    if pieces == 0 || layers < pieces {
        return Err(SplitError::Layers { layers, pieces });
    }
    let costs = with_ends(costs)?;
    let (mut low, mut high) = (costs.iter().copied().max().unwrap_or(0), costs.iter().sum());
    while low < high {
        let middle = low + (high - low) / 2;
        if needed(&costs, middle)[0] <= pieces { high = middle } else { low = middle + 1 }
    }
    Ok(near_the_mean(&costs, pieces, low))
}

/// A split that somebody gave, as the numbers of layers.
///
/// # Errors
/// It does not hold every layer once, or has another number of pieces, or an empty one.
pub fn given(layers: usize, pieces: usize, counts: &[usize]) -> Result<Vec<Range<usize>>, SplitError> {
    let sum = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
    if counts.len() != pieces || pieces == 0 || counts.contains(&0) || sum != Some(layers) {
        return Err(SplitError::Given { layers, pieces, found: counts.to_vec() });
    }
    let ends = counts.iter().scan(0, |end, count| {
        let start = *end;
        *end += count;
        Some(start..*end)
    });
    Ok(ends.collect())
}

/// What every piece costs, those at the ends with what stands before and behind.
#[must_use]
pub fn piece_costs(costs: &LayerCosts, pieces: &[Range<usize>]) -> Vec<u64> {
    let mut sums: Vec<u64> = pieces.iter().map(|piece| costs.layers[piece.clone()].iter().sum()).collect();
    if let Some(first) = sums.first_mut() {
        *first += costs.before;
    }
    if let Some(last) = sums.last_mut() {
        *last += costs.after;
    }
    sums
}

/// The first layer with what stands before it, the last with what stands behind.
fn with_ends(costs: &LayerCosts) -> Result<Vec<u64>, SplitError> {
    let all = costs.layers.iter().chain([&costs.before, &costs.after]);
    all.copied().try_fold(0u64, u64::checked_add).ok_or(SplitError::Costs)?;
    let mut layers = costs.layers.clone();
    let last = layers.len() - 1;
    layers[0] += costs.before;
    layers[last] += costs.after;
    Ok(layers)
}

/// For each layer, how many pieces it and those behind it need, none costlier than `limit`, which no layer is; and 0 for
/// none.
fn needed(costs: &[u64], limit: u64) -> Vec<usize> {
    let mut needed = vec![0; costs.len() + 1];
    let (mut end, mut sum) = (costs.len(), 0);
    for start in (0..costs.len()).rev() {
        sum += costs[start];
        while sum > limit {
            end -= 1;
            sum -= costs[end];
        }
        // A piece from here reaches as far as it may: no other has fewer behind it.
        needed[start] = needed[end] + 1;
    }
    needed
}

/// Pieces none of which costs more than `limit`, each as near the mean of what is left as it may be.
fn near_the_mean(costs: &[u64], pieces: usize, limit: u64) -> Vec<Range<usize>> {
    let needed = needed(costs, limit);
    let (mut start, mut rest) = (0, costs.iter().sum::<u64>());
    let mut split = Vec::with_capacity(pieces);
    for left in (0..pieces).rev() {
        let mean = rest as f64 / (left + 1) as f64;
        let (mut sum, mut best) = (0, None::<(f64, usize, u64)>);
        // The last piece takes all that is left; the others leave a layer at least for each that follows.
        for end in start + 1..=costs.len() - left {
            sum += costs[end - 1];
            let may = sum <= limit && needed[end] <= left && (left > 0 || end == costs.len());
            let distance = (sum as f64 - mean).abs();
            if may && best.is_none_or(|(least, ..)| distance < least) {
                best = Some((distance, end, sum));
            }
        }
        let (_, end, sum) = best.expect("the limit is one that so many pieces can keep");
        split.push(start..end);
        (start, rest) = (end, rest - sum);
    }
    split
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least maximum over all splits.
    fn by_trying_all(costs: &[u64], pieces: usize) -> u64 {
        if pieces == 1 {
            return costs.iter().sum();
        }
        let first = |end: usize| costs[..end].iter().sum::<u64>().max(by_trying_all(&costs[end..], pieces - 1));
        (1..=costs.len() - (pieces - 1)).map(first).min().expect("at least one")
    }

    fn costs(layers: &[u64], before: u64, after: u64) -> LayerCosts {
        LayerCosts { layers: layers.to_vec(), before, after }
    }

    proptest! {
        #[test]
        fn no_split_has_a_cheaper_costliest_piece(
            layers in prop::collection::vec(0u64..20, 1..10), before in 0u64..40, after in 0u64..40, pieces in 1usize..6,
        ) {
            prop_assume!(layers.len() >= pieces);
            let costs = costs(&layers, before, after);
            let found = split(&costs, pieces).expect("enough layers");
            prop_assert_eq!(found.len(), pieces);
            prop_assert!(found[0].start == 0 && found[pieces - 1].end == layers.len());
            prop_assert!(found.windows(2).all(|pair| pair[0].end == pair[1].start));
            prop_assert!(found.iter().all(|piece| !piece.is_empty()));
            let costliest = piece_costs(&costs, &found).into_iter().max().unwrap_or(0);
            let all = with_ends(&costs).expect("small");
            prop_assert_eq!(costliest, by_trying_all(&all, pieces));
            let counts: Vec<usize> = found.iter().map(ExactSizeIterator::len).collect();
            prop_assert_eq!(given(layers.len(), pieces, &counts), Ok(found));
        }

        #[test]
        fn layers_of_one_cost_are_shared_out_evenly(layers in 1usize..200, pieces in 1usize..20) {
            prop_assume!(layers >= pieces);
            let found = split(&costs(&vec![7; layers], 0, 0), pieces).expect("enough layers");
            let sizes = || found.iter().map(ExactSizeIterator::len);
            prop_assert!(sizes().max().unwrap_or(0) - sizes().min().unwrap_or(0) <= 1);
        }
    }

    #[test]
    fn a_costly_head_leaves_the_last_piece_fewer_layers() {
        let sizes = |after| -> Vec<usize> {
            split(&costs(&[10; 8], 0, after), 2).expect("enough").iter().map(ExactSizeIterator::len).collect()
        };
        assert_eq!(sizes(40), [6, 2]);
        // The control: a head that costs nothing.
        assert_eq!(sizes(0), [4, 4]);
    }

    #[test]
    fn what_cannot_be_split_is_said() {
        assert_eq!(split(&costs(&[1, 1], 0, 0), 3), Err(SplitError::Layers { layers: 2, pieces: 3 }));
        assert_eq!(split(&costs(&[1, 1], 0, 0), 0), Err(SplitError::Layers { layers: 2, pieces: 0 }));
        assert_eq!(split(&costs(&[u64::MAX], 1, 0), 1), Err(SplitError::Costs));
        for counts in [&[2, 2][..], &[0, 3], &[1, 1, 1], &[usize::MAX, 4]] {
            let error = given(3, 2, counts).expect_err("no split of three layers in two");
            assert!(
                error.to_string().starts_with("expected 2 pieces of at least a layer, 3 together, found "),
                "{error}"
            );
        }
    }
}
