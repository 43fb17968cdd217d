//! Who owns which part of a tensor, and what that costs on the wire.
//!
//! In a group of N ranks every tensor is cut into N shards, one an owner, on block borders, as evenly as blocks allow;
//! with fewer blocks than ranks some owners have none. An owner receives its shard from everybody, adds them in rank
//! order, and sends the sum to everybody (Rabenseifner 2004's reduce-scatter and all-gather, direct instead of in a
//! ring, so that a sum is encoded once and not at every hop).

use std::ops::Range;

use compression::{BLOCK, Codec};

/// The elements of a tensor that `rank` of `ranks` owns.
///
/// # Panics
/// When `rank` is not below `ranks`.
#[must_use]
pub fn shard(elements: usize, rank: usize, ranks: usize) -> Range<usize> {
    assert!(rank < ranks, "rank {rank} of {ranks}");
    let blocks = elements.div_ceil(BLOCK);
    // Rounding down at both ends: shards differ by one block at the most.
    let border = |rank: usize| (blocks * rank / ranks * BLOCK).min(elements);
    border(rank)..border(rank + 1)
}

/// Payload bytes that `rank` sends in one step: the shards that it does not own, once, and the shard that it owns to
/// everybody else. `tensors` are (elements, codec) of every tensor.
#[must_use]
pub fn payload_bytes_sent(tensors: &[(usize, Codec)], rank: usize, ranks: usize) -> usize {
    let one = |&(elements, codec): &(usize, Codec)| {
        let others = (0..ranks).filter(|&owner| owner != rank);
        let scatter: usize = others.map(|owner| codec.payload_bytes(shard(elements, owner, ranks).len())).sum();
        let owned = codec.second_stage().payload_bytes(shard(elements, rank, ranks).len());
        scatter + (ranks - 1) * owned
    };
    tensors.iter().map(one).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shards_cover_a_tensor_once_on_block_borders_and_evenly(elements in 0usize..100_000, ranks in 1usize..12) {
            let shards: Vec<_> = (0..ranks).map(|rank| shard(elements, rank, ranks)).collect();
            prop_assert_eq!(shards[0].start, 0);
            prop_assert_eq!(shards[ranks - 1].end, elements);
            for pair in shards.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!(pair[0].end % BLOCK == 0 || pair[0].end == elements);
            }
            let blocks = |shard: &Range<usize>| shard.len().div_ceil(BLOCK);
            let (min, max) = (shards.iter().map(blocks).min(), shards.iter().map(blocks).max());
            prop_assert!(max.unwrap_or(0) - min.unwrap_or(0) <= 1);
        }

        #[test]
        fn all_that_is_sent_is_every_payload_once_to_its_owner_and_from_it(elements in 0usize..20_000, ranks in 1usize..6) {
            for codec in Codec::ALL {
                let sent: usize = (0..ranks).map(|rank| payload_bytes_sent(&[(elements, codec)], rank, ranks)).sum();
                let both = |n| codec.payload_bytes(n) + codec.second_stage().payload_bytes(n);
                let shards: usize = (0..ranks).map(|owner| both(shard(elements, owner, ranks).len())).sum();
                prop_assert_eq!(sent, (ranks - 1) * shards);
            }
        }
    }

    #[test]
    fn int8_both_ways_is_about_a_quarter_of_f32() {
        let bytes = |codec| payload_bytes_sent(&[(1 << 20, codec)], 0, 2) as f64;
        assert!((bytes(Codec::Int8) / bytes(Codec::Fp32) - 8.125 / 32.0).abs() < 1e-3);
    }
}
