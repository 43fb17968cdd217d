//! Who owns which part of a tensor, and what that costs on the wire.
//!
//! In a group of N ranks every tensor is cut into N shards, one an owner, on block borders, as evenly as blocks allow;
//! with fewer blocks than ranks some owners have none. An owner receives its shard from every node, adds them in the order
//! of the nodes, and sends the sum to everybody (Rabenseifner 2004's reduce-scatter and all-gather, direct instead of in a
//! ring, so that a sum is encoded once and not at every hop).

use std::ops::Range;

use compression::{BLOCK, Codec};

use super::nodes::Nodes;

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

/// Payload bytes that a rank sends in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// To other members of its node.
    pub inside: usize,
    /// To other nodes.
    pub across: usize,
}

/// What a tensor travels in: its gradient to the owners, and what comes back from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    /// Elements of the tensor.
    pub elements: usize,
    /// To the owners.
    pub there: Codec,
    /// From them: the sum, or with a sharded optimiser the parameters.
    pub back: Codec,
}

/// Payload bytes that a rank sends in one step; `tensors` are (elements, codec) of every tensor, whose sum comes back.
#[must_use]
pub fn payload_bytes(tensors: &[(usize, Codec)], nodes: Nodes) -> Sent {
    let ways = |&(elements, there): &(usize, Codec)| Ways { elements, there, back: there.second_stage() };
    payload_bytes_both_ways(&tensors.iter().map(ways).collect::<Vec<_>>(), nodes)
}

/// Payload bytes that a rank sends in one step.
///
/// Across: of every shard that it adds for its node and does not own, the node's sum once; the sum that it owns, or the
/// parameters, once to every other node. Inside: as f32 whatever other members add; to every mate the sum that it owns, and
/// those that it has from other nodes.
#[must_use]
pub fn payload_bytes_both_ways(tensors: &[Ways], nodes: Nodes) -> Sent {
    let mut sent = Sent::default();
    let all_inside = nodes.members > 1 && nodes.count() == 1;
    let of = |codec| if all_inside { Codec::Fp32 } else { codec };
    for &Ways { elements, there, back } in tensors {
        for owner in 0..nodes.ranks {
            let shard = shard(elements, owner, nodes.ranks).len();
            let back = of(back).payload_bytes(shard);
            if nodes.adds(owner) != nodes.rank {
                sent.inside += Codec::Fp32.payload_bytes(shard);
                continue;
            }
            sent.inside += (nodes.members - 1) * back;
            sent.across +=
                if owner == nodes.rank { (nodes.count() - 1) * back } else { of(there).payload_bytes(shard) };
        }
    }
    sent
}

/// As [`payload_bytes`], where every rank is a node: the shards that `rank` does not own, once, and the shard that it owns
/// to everybody else.
#[must_use]
pub fn payload_bytes_sent(tensors: &[(usize, Codec)], rank: usize, ranks: usize) -> usize {
    payload_bytes(tensors, Nodes { rank, ranks, members: 1 }).across
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
    fn what_leaves_a_node_of_several_falls_by_their_number() {
        for codec in Codec::ALL {
            let across = |members| -> usize {
                let sent = |rank| payload_bytes(&[(1 << 20, codec)], Nodes { rank, ranks: 8, members }).across;
                // Of the node of rank 0, whose number of ranks is another each time: what crosses from four ranks.
                (0..4).map(sent).sum()
            };
            // One rank a node sends 7/8 of the tensor twice; four a node together as much as one rank of two would.
            let both = codec.payload_bytes(1 << 20) + codec.second_stage().payload_bytes(1 << 20);
            assert_eq!(across(4), both / 2, "{codec}");
            assert!(across(1) > 4 * across(4) * 8 / 10, "{codec}");
        }
    }

    #[test]
    fn inside_one_node_everything_travels_as_it_is() {
        let sent = payload_bytes(&[(1 << 20, Codec::Int4)], Nodes { rank: 1, ranks: 4, members: 4 });
        assert_eq!(sent, Sent { inside: 2 * 3 * (1 << 20), across: 0 });
    }

    #[test]
    fn int8_both_ways_is_about_a_quarter_of_f32() {
        let bytes = |codec| payload_bytes_sent(&[(1 << 20, codec)], 0, 2) as f64;
        assert!((bytes(Codec::Int8) / bytes(Codec::Fp32) - 8.125 / 32.0).abs() < 1e-3);
    }
}
