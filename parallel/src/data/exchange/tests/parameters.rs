//! Owners that keep sums and send parameters.

use proptest::prelude::*;

use super::*;
use crate::data::shard::{Ways, payload_bytes_both_ways};
use crate::frame::HEADER_BYTES;

/// When an owner updates what it owns.
#[derive(Clone, Copy, PartialEq)]
enum Update {
    AfterTheVote,
    /// A control.
    BeforeTheVote,
}

/// A rank: its side, its parameters, and what it owns of them as it is.
struct Rank {
    side: Exchange,
    replicas: Vec<Vec<f32>>,
    masters: Vec<Vec<f32>>,
    /// The control: what the codec left out is forgotten.
    forgets: bool,
}

impl Rank {
    fn new(side: Exchange) -> Self {
        // A zero below zero travels too.
        let at_first = |tensor| gradient(9, 99, tensor).into_iter().enumerate();
        let replicas: Vec<Vec<f32>> = (0..TENSORS)
            .map(|tensor| at_first(tensor).map(|(i, x)| if i % 7 == 3 { -0.0 } else { x }).collect())
            .collect();
        let masters = (0..TENSORS).map(|tensor| replicas[tensor][side.owned(tensor)].to_vec()).collect();
        Self { side, replicas, masters, forgets: false }
    }

    /// Turns the sums that it owns into what it sends of the parameters. A sum of 0 changes nothing.
    fn update(&mut self) {
        for tensor in 0..TENSORS {
            let (codec, own) = (self.side.parameter_codec(tensor), self.side.owned(tensor));
            let replica = &self.replicas[tensor][own];
            let places = self.side.own_mut(tensor).iter_mut().zip(&mut self.masters[tensor]).zip(replica);
            for ((place, master), replica) in places {
                if self.forgets {
                    *master = *replica;
                }
                if *place != 0.0 {
                    *master -= 0.1 * *place;
                }
                *place = if codec == Some(Codec::Fp32) { *master } else { *master - replica };
            }
        }
    }

    /// What came enters the replicas.
    fn adopt(&mut self) {
        for tensor in 0..TENSORS {
            let codec = self.side.parameter_codec(tensor);
            let pairs = self.replicas[tensor].iter_mut().zip(self.side.sum(tensor));
            match codec {
                Some(Codec::Fp32) => pairs.for_each(|(replica, came)| *replica = came),
                _ => pairs.for_each(|(replica, more)| *replica += more),
            }
        }
    }

    fn bits(&self) -> Vec<u32> {
        self.replicas.iter().flatten().map(|x| x.to_bits()).collect()
    }
}

fn of(ranks: usize, members: usize, chunk_blocks: usize, codec: Codec, parameters: Codec) -> Vec<Rank> {
    let group = |rank| Group { members, ..group(rank, ranks, chunk_blocks) };
    let side = |rank| Exchange::new(plan(), group(rank), codec).sending_parameters(parameters);
    (0..ranks).map(side).map(Rank::new).collect()
}

/// Delivers frames until none is under way; what is of which way is counted by sender.
fn deliver(
    ranks: &mut [Rank],
    waiting: &mut Vec<(usize, Outgoing)>,
    pick: &mut dyn FnMut(usize) -> usize,
) -> Vec<usize> {
    let mut sent = vec![0; ranks.len()];
    while !waiting.is_empty() {
        let (from, out) = waiting.swap_remove(pick(waiting.len()));
        sent[from] += out.frame.len();
        ranks[out.to].side.receive(from, &out.frame, &mut |next| waiting.push((out.to, next))).expect("good frames");
        ranks[from].side.left(out.to, &mut |next| waiting.push((from, next)));
    }
    sent
}

/// One step: the verdict, and the bytes that each rank sent before the votes and after them.
fn step(
    ranks: &mut [Rank],
    number: u64,
    gradient: impl Fn(usize, usize) -> Vec<f32>,
    pick: &mut dyn FnMut(usize) -> usize,
    update: Update,
) -> (Verdict, [Vec<usize>; 2]) {
    let mut waiting = Vec::new();
    ranks.iter_mut().for_each(|rank| rank.side.begin(number));
    for bucket in 0..plan().buckets().len() {
        for (number, rank) in ranks.iter_mut().enumerate() {
            give(&mut rank.side, bucket, |tensor| gradient(number, tensor), &mut |out| waiting.push((number, out)));
        }
    }
    let there = deliver(ranks, &mut waiting, pick);
    assert!(ranks.iter().all(|rank| rank.side.is_reduced() && !rank.side.is_complete()));
    if update == Update::BeforeTheVote {
        ranks.iter_mut().for_each(Rank::update);
    }
    let votes: Vec<Vote> = ranks.iter().map(|rank| rank.side.vote()).collect();
    let verdicts: Vec<Verdict> = ranks.iter_mut().map(|rank| rank.side.close(&votes).0).collect();
    assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]));
    if verdicts[0] == Verdict::Commit {
        if update == Update::AfterTheVote {
            ranks.iter_mut().for_each(Rank::update);
        }
        for tensor in 0..TENSORS {
            for (number, rank) in ranks.iter_mut().enumerate() {
                rank.side.publish(tensor, &mut |out| waiting.push((number, out)));
            }
        }
    } else {
        for (number, rank) in ranks.iter_mut().enumerate() {
            rank.side.pump(&mut |out| waiting.push((number, out)));
        }
    }
    let back = deliver(ranks, &mut waiting, pick);
    assert!(ranks.iter().all(|rank| rank.side.is_complete()));
    if verdicts[0] == Verdict::Commit {
        ranks.iter_mut().for_each(Rank::adopt);
    }
    (verdicts[0], [there, back])
}

fn plain(ranks: &mut [Rank], number: u64) -> [Vec<usize>; 2] {
    let given = |rank, tensor| gradient(rank, number, tensor);
    let (verdict, sent) = step(ranks, number, given, &mut |n| n / 2, Update::AfterTheVote);
    assert_eq!(verdict, Verdict::Commit);
    sent
}

#[test]
fn with_fp32_the_replicas_are_those_of_ranks_that_send_sums_to_the_last_bit() {
    for (ranks, members) in [(2, 1), (3, 1), (4, 2), (3, 3)] {
        let mut sharded = of(ranks, members, 7, Codec::Fp32, Codec::Fp32);
        let group = |rank| Group { members, ..group(rank, ranks, 64) };
        let mut sides: Vec<_> = (0..ranks).map(|rank| Exchange::new(plan(), group(rank), Codec::Fp32)).collect();
        let mut whole = Rank::new(side(0, 1, 7, Codec::Fp32)).replicas;
        for number in 1..4 {
            plain(&mut sharded, number);
            super::step(&mut sides, number, |rank, tensor| gradient(rank, number, tensor), |_| 0);
            for (tensor, whole) in whole.iter_mut().enumerate() {
                let pairs = whole.iter_mut().zip(sides[0].sum(tensor));
                pairs.filter(|(_, sum)| *sum != 0.0).for_each(|(parameter, sum)| *parameter -= 0.1 * sum);
            }
            let expected: Vec<u32> = whole.iter().flatten().map(|x| x.to_bits()).collect();
            assert!(sharded.iter().all(|rank| rank.bits() == expected), "{ranks} ranks, {members} a node");
            let norm = |sides: &mut dyn Iterator<Item = SquaredNorm>| {
                sides.fold(SquaredNorm::default(), |mut all, part| {
                    all.merge(&part);
                    all
                })
            };
            let norms = [norm(&mut sides.iter().map(Exchange::norm)), norm(&mut sharded.iter().map(|r| r.side.norm()))];
            assert_eq!(norms[0], norms[1]);
        }
    }
}

#[test]
fn what_senders_leave_out_is_what_they_leave_out_without_it() {
    for codec in Codec::ALL {
        let mut sharded = of(3, 1, 16, codec, Codec::Int8);
        let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 16, codec)).collect();
        for number in 1..4 {
            plain(&mut sharded, number);
            super::step(&mut sides, number, |rank, tensor| gradient(rank, number, tensor), |_| 0);
            for (tensor, (rank, side)) in
                (0..TENSORS).flat_map(|tensor| sharded.iter().zip(&sides).map(move |x| (tensor, x)))
            {
                let [sender, owner] = residuals(&rank.side, tensor);
                assert_eq!(sender, residuals(side, tensor)[0], "{codec}");
                assert!(owner.iter().all(|left| *left == 0.0), "owners leave nothing out of sums");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// Invariant 5, over several steps with feedback in both stages.
    #[test]
    fn any_order_and_any_chunks_give_every_rank_the_same_replicas(
        nodes in 1usize..4,
        members in 1usize..3,
        chunk_blocks in 1usize..400,
        picks in prop::collection::vec(any::<u16>(), 64),
    ) {
        prop_assume!(nodes * members > 1);
        for (codec, parameters) in [(Codec::Fp32, Codec::Int8), (Codec::Int8, Codec::Fp32), (Codec::Sparse24Int4, Codec::Int8)] {
            let mut expected = of(nodes * members, members, 64, codec, parameters);
            let mut found = of(nodes * members, members, chunk_blocks, codec, parameters);
            let mut turn = 0;
            for number in 1..4 {
                plain(&mut expected, number);
                let mut pick = |n| {
                    turn += 1;
                    picks[turn % picks.len()] as usize * 31 % n
                };
                step(&mut found, number, |rank, tensor| gradient(rank, number, tensor), &mut pick, Update::AfterTheVote);
                for (a, b) in expected.iter().zip(&found) {
                    prop_assert!(a.bits() == found[0].bits() && b.bits() == found[0].bits());
                    prop_assert_eq!(&a.masters, &b.masters);
                    prop_assert_eq!(state(&a.side), state(&b.side));
                }
            }
        }
    }
}

#[test]
fn a_nan_on_one_rank_sends_no_parameter_and_leaves_no_trace_but_where_owners_do_not_wait_for_the_votes() {
    for parameters in [Codec::Fp32, Codec::Int8] {
        let [mut found, mut never] = [(); 2].map(|()| of(3, 1, 16, Codec::Int8, parameters));
        let poisoned = |rank: usize, tensor| {
            let mut gradient = gradient(rank, 2, tensor);
            gradient[70] = if rank == 2 { f32::NAN } else { 0.0 };
            gradient
        };
        for ranks in [&mut found, &mut never] {
            plain(ranks, 1);
        }
        let (verdict, [there, back]) = step(&mut found, 2, poisoned, &mut |n| n - 1, Update::AfterTheVote);
        assert!(verdict == Verdict::Skip && there.iter().all(|sent| *sent > 0) && back == [0; 3]);
        for ranks in [&mut found, &mut never] {
            plain(ranks, 3);
        }
        for (a, b) in found.iter().zip(&never) {
            assert!(a.bits() == b.bits() && a.masters == b.masters && state(&a.side) == state(&b.side));
        }
        // The control: the NaN, which is in rank 2's own shard of one of them, is in a master now.
        let poisoned = |rank: usize, tensor| {
            let mut gradient = gradient(rank, 4, tensor);
            gradient.fill(if rank == 2 { f32::NAN } else { 0.0 });
            gradient
        };
        let (verdict, _) = step(&mut found, 4, poisoned, &mut |_| 0, Update::BeforeTheVote);
        assert_eq!(verdict, Verdict::Skip);
        assert!(found.iter().any(|rank| rank.masters.iter().flatten().any(|x| x.is_nan())));
    }
}

#[test]
fn what_was_sent_and_what_master_and_replica_differ_by_is_the_master_bit_for_bit() {
    let ledger = |forget: bool| {
        let mut exact = Exact::default();
        let mut ranks = of(3, 1, 32, Codec::Sparse24Int8, Codec::Int8);
        ranks.iter().for_each(|rank| rank.replicas[0][rank.side.owned(0)].iter().for_each(|x| exact.add(*x)));
        for number in 1..6 {
            let before = ranks[0].replicas[0].clone();
            // Step 3 is skipped.
            let given = |rank: usize, tensor| {
                let mut gradient = gradient(rank, number, tensor);
                gradient[5] = if number == 3 && rank == 1 { f32::INFINITY } else { gradient[5] };
                gradient
            };
            let (verdict, _) = step(&mut ranks, number, given, &mut |_| 0, Update::AfterTheVote);
            if verdict == Verdict::Skip || (forget && number == 4) {
                assert!(verdict == Verdict::Commit || number == 3);
                continue;
            }
            for (replica, more) in before.iter().zip(ranks[0].side.sum(0)) {
                exact.add(more);
                exact.add(-lost(*replica, more));
            }
        }
        for rank in &ranks {
            for (master, replica) in rank.masters[0].iter().zip(&rank.replicas[0][rank.side.owned(0)]) {
                exact.add(master - replica);
                exact.add(lost(*master, -*replica));
                exact.add(-*master);
            }
        }
        exact.is_zero()
    };
    assert!(ledger(false));
    assert!(!ledger(true), "the control: one step's parameters are not entered");
}

#[test]
fn small_updates_reach_the_replicas_by_what_was_left_out_and_without_it_never() {
    let run = |forgets: bool| {
        let mut ranks = of(2, 1, 64, Codec::Fp32, Codec::Int8);
        for rank in &mut ranks {
            rank.forgets = forgets;
            rank.replicas.iter_mut().chain(&mut rank.masters).for_each(|values| values.fill(0.0));
        }
        // One element of each block moves so much that the others are less than half of what int8 can say.
        let given = |_: usize, tensor| -> Vec<f32> {
            (0..gradient(0, 1, tensor).len()).map(|i| if i % BLOCK == 0 { 0.5 } else { 5e-4 }).collect()
        };
        for number in 1..101 {
            step(&mut ranks, number, given, &mut |_| 0, Update::AfterTheVote);
        }
        assert_eq!(ranks[0].bits(), ranks[1].bits());
        // The sum of both, times the rate.
        let (expected, quantum) = (-0.1 * 1e-3 * 100.0f32, 0.1 / 127.0f32);
        let others = ranks[0].replicas[0].iter().enumerate().filter(|(i, _)| i % BLOCK != 0);
        others.map(|(_, x)| (x - expected).abs()).fold(0.0, f32::max) <= quantum
    };
    assert!(run(false));
    assert!(!run(true), "the control: without it the replicas drift");
}

#[test]
fn what_is_sent_is_the_formula_for_both_ways_and_a_header_a_frame() {
    for codec in Codec::ALL {
        for (parameters, members) in [(Codec::Fp32, 1), (Codec::Int8, 1), (Codec::Int8, 2)] {
            let mut ranks = of(4, members, 64, codec, parameters);
            let given = |rank, tensor| dense(rank, 1, tensor);
            let (_, [there, back]) = step(&mut ranks, 1, given, &mut |n| n / 2, Update::AfterTheVote);
            let tensors: Vec<Ways> = (plan().parameters().iter())
                .map(|p| Ways { elements: p.elements(), there: codec_of(p, codec), back: codec_of(p, parameters) })
                .collect();
            let frames = |owner: usize| -> usize {
                tensors.iter().map(|ways| chunks(shard(ways.elements, owner, 4), 64).count()).sum()
            };
            for (rank, side) in ranks.iter().map(|rank| &rank.side).enumerate() {
                let nodes = side.group().nodes();
                let out: usize = (0..4).filter(|&owner| owner != rank).map(frames).sum();
                let relayed = (0..4).filter(|&owner| owner != rank && nodes.adds(owner) == rank).map(frames);
                let own = nodes.told().count() * frames(rank);
                let relayed = if members > 1 { relayed.sum::<usize>() * (members - 1) } else { 0 };
                let sent = payload_bytes_both_ways(&tensors, nodes);
                let expected = sent.inside + sent.across + HEADER_BYTES * (out + own + relayed);
                assert_eq!(there[rank] + back[rank], expected, "{codec}, {parameters}, rank {rank}");
            }
        }
    }
}

#[test]
fn what_owners_of_sums_had_left_out_is_added_to_the_first_sum_that_counts() {
    let mut ranks = of(2, 1, 64, Codec::Int8, Codec::Fp32);
    let left: Vec<f32> = gradient(7, 7, 0)[ranks[1].side.owned(0)].to_vec();
    ranks[1].side.restore(0, &vec![0.0; 76_800], left.clone()).expect("its shard");
    let nothing = |poison: bool| {
        move |rank, tensor: usize| vec![if poison && rank == 0 { f32::NAN } else { 0.0 }; gradient(0, 1, tensor).len()]
    };
    assert_eq!(step(&mut ranks, 1, nothing(true), &mut |_| 0, Update::AfterTheVote).0, Verdict::Skip);
    assert_eq!(ranks[1].side.tensors[0].owner, left, "a step that is skipped adds nothing");
    let before = ranks[0].replicas[0].clone();
    step(&mut ranks, 2, nothing(false), &mut |_| 0, Update::AfterTheVote);
    let own = ranks[1].side.owned(0);
    let expected: Vec<f32> = before[own.clone()].iter().zip(&left).map(|(x, g)| x - 0.1 * g).collect();
    assert_eq!(ranks[0].replicas[0][own.clone()], expected);
    assert_eq!(ranks[0].replicas[0][..own.start], before[..own.start]);
    assert!(ranks.iter().all(|rank| !rank.side.may_owe(0, Side::Owner)), "once");
}

#[test]
fn a_parameter_that_is_not_finite_is_not_sent_and_no_step_counts_any_more() {
    for parameters in [Codec::Fp32, Codec::Int8] {
        let mut ranks = of(2, 1, 64, Codec::Fp32, parameters);
        ranks[1].masters[0][3] = f32::INFINITY;
        plain(&mut ranks, 1);
        assert!(ranks[0].bits() == ranks[1].bits() && ranks[0].replicas.iter().flatten().all(|x| x.is_finite()));
        let given = |rank, tensor| gradient(rank, 2, tensor);
        assert_eq!(step(&mut ranks, 2, given, &mut |_| 0, Update::AfterTheVote).0, Verdict::Skip);
    }
}

#[test]
fn parameters_twice_and_in_another_codec_are_refused_by_name() {
    let frames = |parameters| {
        let mut ranks = of(2, 1, 1 << 10, Codec::Fp32, parameters);
        let mut waiting = Vec::new();
        ranks.iter_mut().for_each(|rank| rank.side.begin(1));
        for bucket in 0..plan().buckets().len() {
            for (number, rank) in ranks.iter_mut().enumerate() {
                give(&mut rank.side, bucket, |t| gradient(number, 1, t), &mut |out| waiting.push((number, out)));
            }
        }
        deliver(&mut ranks, &mut waiting, &mut |_| 0);
        let votes: Vec<Vote> = ranks.iter().map(|rank| rank.side.vote()).collect();
        ranks.iter_mut().for_each(|rank| _ = rank.side.close(&votes));
        ranks[1].update();
        ranks[1].side.publish(0, &mut |out| waiting.push((1, out)));
        (ranks, waiting.into_iter().map(|(_, out)| out.frame).collect::<Vec<_>>())
    };
    let ((mut ranks, good), (_, foreign)) = (frames(Codec::Int8), frames(Codec::Fp32));
    let mut take = |frame: &Bytes| ranks[0].side.receive(1, frame, &mut |_| {}).map_err(|error| error.to_string());
    assert!(take(&foreign[0]).expect_err("another codec").contains("expected int8, found fp32"));
    take(&good[0]).expect("the first");
    assert!(take(&good[0]).expect_err("again").contains("a second frame for one chunk"));
}
