//! Several ranks a node.

use proptest::prelude::*;

use super::*;
use crate::data::shard::{Sent, payload_bytes};
use crate::frame::HEADER_BYTES;

fn of_nodes(nodes: usize, members: usize, chunk_blocks: usize, window: usize, codec: Codec) -> Vec<Exchange> {
    let ranks = nodes * members;
    let side = |rank| Exchange::new(plan(), Group { members, window, ..group(rank, ranks, chunk_blocks) }, codec);
    (0..ranks).map(side).collect()
}

/// The sum in f32 of some ranks' gradients, in their order.
fn summed(ranks: impl Iterator<Item = usize>, number: u64, tensor: usize) -> Vec<f32> {
    let mut sum = vec![0.0f32; gradient(0, number, tensor).len()];
    ranks.for_each(|rank| sum.iter_mut().zip(gradient(rank, number, tensor)).for_each(|(sum, g)| *sum += g));
    sum
}

#[test]
fn fp32_over_nodes_is_the_sum_of_the_nodes_sums_bitwise() {
    for (nodes, members) in [(2, 2), (3, 2), (2, 3), (1, 3)] {
        let mut sides = of_nodes(nodes, members, 7, usize::MAX, Codec::Fp32);
        step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |n| n - 1);
        for tensor in 0..TENSORS {
            let mut expected = vec![0.0f32; gradient(0, 1, tensor).len()];
            for node in 0..nodes {
                let sum = summed(node * members..(node + 1) * members, 1, tensor);
                expected.iter_mut().zip(sum).for_each(|(all, sum)| *all += sum);
            }
            assert!(sides.iter().all(|side| side.sum(tensor) == expected), "{nodes} nodes of {members}");
        }
        // The control: one rank after the other gives other bits.
        if nodes > 1 {
            assert_ne!(sides[0].sum(0), summed(0..nodes * members, 1, 0));
        }
    }
}

#[test]
fn inside_one_node_nothing_is_left_out_whatever_the_codec() {
    let mut sides = of_nodes(1, 3, 16, usize::MAX, Codec::Sparse24Int4);
    step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |_| 0);
    assert!(sides.iter().all(|side| side.sum(0) == summed(0..3, 1, 0) && side.residuals(0).is_empty()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Invariant 5, over several steps with feedback.
    #[test]
    fn any_order_any_chunks_any_window_and_any_threads_give_every_rank_the_same_bits(
        nodes in 1usize..4,
        members in 1usize..4,
        chunk_blocks in 1usize..400,
        window in 1usize..9,
        threads in 1usize..3,
        picks in prop::collection::vec(any::<u16>(), 64),
    ) {
        for codec in Codec::ALL {
            let mut expected = of_nodes(nodes, members, 64, usize::MAX, codec);
            let workers = Workers::new(threads).expect("threads");
            let mut found: Vec<_> = of_nodes(nodes, members, chunk_blocks, window, codec)
                .into_iter()
                .map(|side| side.with_workers(workers.clone()))
                .collect();
            let mut turn = 0;
            for number in 1..4 {
                step(&mut expected, number, |rank, tensor| gradient(rank, number, tensor), |_| 0);
                step(&mut found, number, |rank, tensor| gradient(rank, number, tensor), |n| {
                    turn += 1;
                    picks[turn % picks.len()] as usize * 31 % n
                });
                for (a, b) in expected.iter().zip(&found) {
                    prop_assert_eq!(sums(a), sums(&found[0]));
                    prop_assert_eq!(state(a), state(b));
                }
            }
        }
    }
}

#[test]
fn what_is_sent_inside_and_across_is_the_formula_and_a_header_a_frame() {
    for (codec, (nodes, members)) in [(Codec::Int8, (2, 2)), (Codec::Sparse24Int4, (3, 2)), (Codec::Int4, (1, 4))] {
        let mut sides = of_nodes(nodes, members, 64, usize::MAX, codec);
        let tensors: Vec<(usize, Codec)> =
            plan().parameters().iter().map(|p| (p.shape.iter().product(), codec_of(p, codec))).collect();
        let mut found = vec![Sent::default(); sides.len()];
        let mut waiting = Vec::new();
        sides.iter_mut().for_each(|side| side.begin(1));
        for bucket in 0..sides[0].plan().buckets().len() {
            for (rank, side) in sides.iter_mut().enumerate() {
                give(side, bucket, |tensor| dense(rank, 1, tensor), &mut |out| waiting.push((rank, out)));
            }
        }
        while let Some((from, Outgoing { to, frame, .. })) = waiting.pop() {
            let bytes = frame.len() - HEADER_BYTES;
            let nodes = sides[from].group().nodes();
            let sent = &mut found[from];
            *(if nodes.node(from) == nodes.node(to) { &mut sent.inside } else { &mut sent.across }) += bytes;
            sides[to].receive(from, &frame, &mut |next| waiting.push((to, next))).expect("good frames");
        }
        for (rank, found) in found.into_iter().enumerate() {
            assert_eq!(found, payload_bytes(&tensors, sides[rank].group().nodes()), "{codec}, rank {rank}");
        }
    }
}

/// As `booked` of one rank a node: what all decoded, less all gradients, and every rounding.
pub(super) fn booked_of_nodes(exact: &mut Exact, sides: &mut [Exchange], number: u64) {
    let before: Vec<_> = sides.iter().map(|side| [0, 1, 2, 3].map(|tensor| residuals(side, tensor))).collect();
    step(sides, number, |rank, tensor| gradient(rank, number, tensor), |n| n / 2);
    for (tensor, parameter) in plan().parameters().iter().enumerate() {
        let codec = codec_of(parameter, sides[0].codec());
        for (owner, side) in sides.iter().enumerate() {
            let nodes = side.group().nodes();
            let owned = shard(parameter.elements(), owner, nodes.ranks);
            let mut sum = vec![0.0f32; owned.len()];
            let add = |exact: &mut Exact, sum: &mut [f32], part: &[f32]| {
                for (sum, part) in sum.iter_mut().zip(part) {
                    exact.add(lost(*sum, *part));
                    *sum += part;
                }
            };
            for node in 0..nodes.count() {
                let mut part = vec![0.0f32; owned.len()];
                for rank in node * nodes.members..(node + 1) * nodes.members {
                    add(exact, &mut part, &gradient(rank, number, tensor)[owned.clone()]);
                }
                if node != nodes.node(owner) {
                    let residual = &sent_of(parameter, &part, &before[nodes.peer(node)][tensor][0][owned.clone()]);
                    let mut payload = vec![0; codec.payload_bytes(owned.len())];
                    let gradient = part.clone();
                    let _ = codec.encode(&mut part.clone(), residual, &mut payload);
                    Payload::new(codec, owned.len(), payload).expect("our own").decode(&mut part);
                    enter_encoding(exact, codec, [&gradient, residual, &part]);
                }
                add(exact, &mut sum, &part);
            }
            let residual = &before[owner][tensor][1];
            add(exact, &mut sum, residual);
        }
        for rank in 0..sides.len() {
            gradient(rank, number, tensor).iter().for_each(|g| exact.add(-*g));
        }
        sides[0].sum(tensor).iter().for_each(|x| exact.add(*x));
    }
}

#[test]
fn the_ledger_balances_and_a_nodes_residual_counts_once() {
    for codec in [Codec::Int8, Codec::Sparse24Int8, Codec::Int4] {
        let ledger = |twice: bool| {
            let mut exact = Exact::default();
            let mut sides = of_nodes(2, 2, 32, 3, codec);
            (1..4).for_each(|number| booked_of_nodes(&mut exact, &mut sides, number));
            remembered(&mut exact, &sides, false);
            if twice {
                residuals(&sides[1], 0)[0].iter().for_each(|r| exact.add(*r));
            }
            exact
        };
        assert!(ledger(false).is_zero(), "{codec}");
        assert!(!ledger(true).is_zero(), "the control: one member's residual counts twice");
    }
}

#[test]
fn a_nan_of_any_member_makes_all_skip_and_leaves_no_trace() {
    let good = |number: u64| move |rank, tensor| gradient(rank, number, tensor);
    // In a shard of every rank.
    for at in [0, 20_000, 39_000, 76_700] {
        let [mut sides, mut never] = [(); 2].map(|()| of_nodes(2, 2, 16, usize::MAX, Codec::Int4));
        step(&mut sides, 1, good(1), |_| 0);
        step(&mut never, 1, good(1), |_| 0);
        let poisoned = |rank, tensor| {
            let mut gradient = gradient(rank, 2, tensor);
            if (rank, tensor) == (3, 0) {
                gradient[at] = f32::NAN;
            }
            gradient
        };
        assert_eq!(step(&mut sides, 2, poisoned, |n| n - 1).0, Verdict::Skip, "{at}");
        step(&mut sides, 3, good(3), |_| 0);
        step(&mut never, 3, good(3), |_| 0);
        for (a, b) in sides.iter().zip(&never) {
            assert_eq!((sums(a), state(a)), (sums(b), state(b)));
        }
    }
}

#[test]
fn frames_take_no_way_but_their_own() {
    let mut sides = of_nodes(2, 2, 64, usize::MAX, Codec::Int8);
    sides.iter_mut().for_each(|side| side.begin(1));
    let mut sent = Vec::new();
    let bucket_of_matrix = 2;
    give(&mut sides[1], bucket_of_matrix, |tensor| gradient(1, 1, tensor), &mut |out| sent.push(out));
    let to_mate = sent.iter().find(|out| out.phase == Phase::Inner).expect("rank 0 adds half of it").frame.clone();
    let mut take = |to: usize, from| sides[to].receive(from, &to_mate, &mut |_| {}).map_err(|error| error.to_string());
    let refused = |taken: Result<Phase, String>| taken.expect_err("another way").contains("no such part");
    assert!(refused(take(2, 1)), "from another node");
    assert!(refused(take(0, 2)), "from another node");
    assert_eq!(take(0, 1), Ok(Phase::Inner));
    assert!(take(0, 1).expect_err("again").contains("a second frame"));
}

#[test]
fn who_is_waited_for_is_named_on_every_part_of_the_way() {
    const TABLE: usize = 0;
    let mut sides = of_nodes(2, 2, 1 << 10, usize::MAX, Codec::Int8);
    sides.iter_mut().for_each(|side| side.begin(1));
    let mut waiting = Vec::new();
    for (rank, side) in sides.iter_mut().enumerate() {
        for bucket in 0..side.plan().buckets().len() {
            give(side, bucket, |tensor| gradient(rank, 1, tensor), &mut |out| waiting.push((rank, out)));
        }
    }
    // Its mate first, then the other node's peer, then who hands it the sums.
    assert_eq!(sides[0].first_missing_of(TABLE), Some(1));
    let mut later = Vec::new();
    for (from, out) in waiting {
        sides[out.to].receive(from, &out.frame, &mut |next| later.push((out.to, next))).expect("good frames");
    }
    assert_eq!(sides[0].first_missing_of(TABLE), Some(2));
    let (scatter, gather): (Vec<_>, Vec<_>) = later.into_iter().partition(|(_, out)| out.phase == Phase::Scatter);
    let mut last = gather;
    for (from, out) in scatter {
        sides[out.to].receive(from, &out.frame, &mut |next| last.push((out.to, next))).expect("good frames");
    }
    assert_eq!(sides[0].first_missing_of(TABLE), Some(1));
    while let Some((from, out)) = last.pop() {
        sides[out.to].receive(from, &out.frame, &mut |next| last.push((out.to, next))).expect("good frames");
    }
    assert!(sides.iter().all(|side| side.is_complete() && side.first_missing().is_none()));
}
