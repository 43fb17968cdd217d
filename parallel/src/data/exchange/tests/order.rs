//! Orders of adding and of arrival: which of them change bits, and which do not.

use super::*;

#[test]
fn fp32_over_ranks_is_the_sum_in_rank_order_bitwise() {
    for ranks in [1, 2, 3, 4] {
        let mut sides: Vec<_> = (0..ranks).map(|rank| side(rank, ranks, 7, Codec::Fp32)).collect();
        let (verdict, _) = step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |n| n - 1);
        assert_eq!(verdict, Verdict::Commit);
        for tensor in 0..TENSORS {
            let mut expected = vec![0.0f32; gradient(0, 1, tensor).len()];
            for rank in 0..ranks {
                expected.iter_mut().zip(gradient(rank, 1, tensor)).for_each(|(sum, g)| *sum += g);
            }
            assert_eq!(sides[0].sum(tensor), expected);
        }
        // The control: another order of ranks gives other bits, so the order is what makes them equal.
        if ranks == 3 {
            let [a, b, c] = [0, 1, 2].map(|rank| gradient(rank, 1, 0));
            let other: Vec<f32> = a.iter().zip(&b).zip(&c).map(|((a, b), c)| (c + b) + a).collect();
            assert_ne!(sides[0].sum(0), other);
        }
    }
}

/// All orders of some ranks.
fn orders(ranks: &[usize]) -> Vec<Vec<usize>> {
    if ranks.is_empty() {
        return vec![Vec::new()];
    }
    let first = |&first: &usize| {
        let rest: Vec<usize> = ranks.iter().copied().filter(|&rank| rank != first).collect();
        orders(&rest).into_iter().map(move |rest| [vec![first], rest].concat())
    };
    ranks.iter().flat_map(first).collect()
}

#[test]
fn every_order_in_which_four_ranks_can_arrive_gives_the_same_bits() {
    let sums_of = |codec: Codec, order: &[usize], chunk_blocks: usize, by_arrival: bool| {
        let side = |rank| side(rank, 4, chunk_blocks, codec);
        let side = |rank| if by_arrival { side(rank).in_order_of_arrival() } else { side(rank) };
        let mut sides: Vec<_> = (0..4).map(side).collect();
        sides.iter_mut().for_each(|side| side.begin(1));
        let mut waiting = Vec::new();
        for bucket in 0..sides[0].plan().buckets().len() {
            for (rank, side) in sides.iter_mut().enumerate() {
                give(side, bucket, |tensor| gradient(rank, 1, tensor), &mut |out| waiting.push((rank, out)));
            }
        }
        // Everything of one rank comes before anything of the next one, and the sums last.
        waiting.sort_by_key(|(from, _)| order.iter().position(|rank| rank == from));
        let mut sums_sent = Vec::new();
        for (from, out) in waiting {
            sides[out.to].receive(from, &out.frame, &mut |next| sums_sent.push((out.to, next))).expect("good frames");
        }
        for (from, out) in sums_sent {
            sides[out.to].receive(from, &out.frame, &mut |_| panic!("nothing follows")).expect("good frames");
        }
        sides.iter().map(sums).collect::<Vec<_>>()
    };
    let all = orders(&[0, 1, 2, 3]);
    assert_eq!(all.len(), 24);
    // Each order with chunks of another size, from one block to a whole shard and more.
    let mut chance = 5u32;
    let mut chunk_blocks = || {
        chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        1 + (chance >> 16) as usize % (1 << (1 + (chance >> 24) % 9))
    };
    for codec in Codec::ALL {
        let found: Vec<_> = all.iter().map(|order| sums_of(codec, order, chunk_blocks(), false)).collect();
        assert!(found.iter().flatten().all(|sums| *sums == found[0][0]), "{codec}");
    }
    // The control: added in the order of arrival, they differ.
    let found: Vec<_> = all.iter().map(|order| sums_of(Codec::Fp32, order, 32, true)).collect();
    assert!(found.iter().any(|sums| sums[0] != found[0][0]));
}
