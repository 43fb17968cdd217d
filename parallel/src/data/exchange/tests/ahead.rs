//! Steps that are decided while sums still travel.

use super::*;
use crate::data::norm::SquaredNorm;

/// One step in which all vote as soon as they can, before any sum has come anywhere; sums are delivered last first.
fn step_that_is_decided_first(sides: &mut [Exchange], number: u64) {
    let (mut gradients, mut sums) = (Vec::new(), Vec::new());
    sides.iter_mut().for_each(|side| side.begin(number));
    for bucket in 0..sides[0].plan().buckets().len() {
        for (rank, side) in sides.iter_mut().enumerate() {
            give(side, bucket, |tensor| gradient(rank, number, tensor), &mut |out| gradients.push((rank, out)));
        }
    }
    while let Some((from, out)) = gradients.pop() {
        if out.phase == Phase::Gather {
            sums.push((from, out));
            continue;
        }
        sides[out.to].receive(from, &out.frame, &mut |next| gradients.push((out.to, next))).expect("good frames");
    }
    assert!(sides.iter().all(|side| side.is_reduced() && !side.is_complete()));
    let votes: Vec<Vote> = sides.iter().map(Exchange::vote).collect();
    sides.iter_mut().for_each(|side| assert_eq!(side.close(&votes).0, Verdict::Commit));
    let mut completed = vec![Vec::new(); sides.len()];
    while let Some((from, out)) = sums.pop() {
        sides[out.to].receive(from, &out.frame, &mut |next| sums.push((out.to, next))).expect("good frames");
        completed[out.to].extend(sides[out.to].take_completed());
    }
    for (side, mut completed) in sides.iter().zip(completed) {
        assert!(side.is_complete());
        completed.sort_unstable();
        assert_eq!(completed, [0, 1, 2, 3], "each tensor is told once");
    }
}

fn norm(values: impl Iterator<Item = Vec<f32>>) -> SquaredNorm {
    let mut norm = SquaredNorm::default();
    values.for_each(|values| norm.add(&values));
    norm
}

#[test]
fn a_step_that_is_decided_before_its_sums_are_here_has_the_same_sums_and_residuals() {
    for codec in Codec::ALL {
        for members in [1, 2] {
            let side = |rank| Exchange::new(plan(), Group { members, ..group(rank, 4, 8) }, codec);
            let [mut first, mut last]: [Vec<Exchange>; 2] = [(); 2].map(|()| (0..4).map(side).collect());
            for number in 1..4 {
                step_that_is_decided_first(&mut first, number);
                step(&mut last, number, |rank, tensor| gradient(rank, number, tensor), |_| 0);
                for (a, b) in first.iter().zip(&last) {
                    assert_eq!(sums(a), sums(b), "{codec}, step {number}");
                    assert_eq!(state(a), state(b), "{codec}, step {number}");
                }
            }
        }
    }
}

#[test]
fn what_owners_add_to_the_norm_is_the_norm_of_the_sum() {
    for (ranks, codec) in [(1, Codec::Fp32), (2, Codec::Int8), (3, Codec::Sparse24Int4), (4, Codec::Bf16)] {
        let mut sides: Vec<_> = (0..ranks).map(|rank| side(rank, ranks, 7, codec)).collect();
        step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |n| n - 1);
        let mut whole = SquaredNorm::default();
        sides.iter().for_each(|side| whole.merge(&side.norm()));
        assert_eq!(whole, norm((0..TENSORS).map(|tensor| sides[0].sum(tensor).to_vec())));
        // The control: one owner's part left out.
        let mut less = SquaredNorm::default();
        sides[1..].iter().for_each(|side| less.merge(&side.norm()));
        assert_ne!(less, whole);
    }
}

#[test]
#[should_panic(expected = "chunks are not reduced")]
fn a_step_is_not_decided_before_this_ranks_sums_are_reduced() {
    let mut side = side(0, 2, 7, Codec::Int8);
    side.begin(1);
    let votes = [Vote { step: 1, finite: true }; 2];
    side.close(&votes);
}
