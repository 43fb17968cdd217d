//! Groups of ranks in one thread; frames are delivered in whatever order the test says.

use compression::Side;
use compression::ledger::{Exact, lost, lost_in_encoding};

use super::*;
use crate::data::Parameter;
use crate::data::rules::may_leave_rows;

mod ahead;
mod frames;
mod left_out;
mod meshes;
mod nodes;
mod order;
mod parameters;
mod untouched;
mod window;

/// Tensors of the plan; the last one is a table, of rows of so many elements.
const TENSORS: usize = 4;
const TABLE: usize = 3;
const ROW: usize = 256;

fn plan() -> Arc<Plan> {
    let parameter = |name: &str, shape: &[usize]| Parameter { name: name.into(), shape: shape.to_vec() };
    let parameters = vec![
        parameter("matrix", &[300, 256]),
        parameter("norm", &[77]),
        parameter("small", &[3, 50]),
        parameter("model.embed_tokens.weight", &[300, ROW]),
    ];
    Arc::new(Plan::new(parameters, 1 << 18).expect("small"))
}

fn group(rank: usize, ranks: usize, chunk_blocks: usize) -> Group {
    Group { rank, ranks, members: 1, window: usize::MAX, epoch: 1, chunk_blocks }
}

fn side(rank: usize, ranks: usize, chunk_blocks: usize, codec: Codec) -> Exchange {
    Exchange::new(plan(), group(rank, ranks, chunk_blocks), codec)
}

/// Whether a rank touches a row of the table: an eighth of them in a step, another eighth in the next one.
const fn touches(rank: usize, step: u64, row: usize) -> bool {
    row % 8 == (rank + 2 * step as usize) % 8
}

/// Another gradient for every rank, step and tensor; of the table, zeros in the rows that the step does not touch.
fn gradient(rank: usize, step: u64, tensor: usize) -> Vec<f32> {
    let mut values = dense(rank, step, tensor);
    if tensor == TABLE {
        let rows = values.chunks_mut(ROW).enumerate();
        rows.filter(|(row, _)| !touches(rank, step, *row)).for_each(|(_, values)| values.fill(0.0));
    }
    values
}

/// As [`gradient`], but that every row is touched.
fn dense(rank: usize, step: u64, tensor: usize) -> Vec<f32> {
    let n: usize = plan().parameters()[tensor].shape.iter().product();
    let mut x = (rank as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (step << 20) ^ (tensor as u64) << 40;
    let mut next = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() * 0.01).collect()
}

/// Gives one bucket of gradients.
fn give(side: &mut Exchange, bucket: usize, gradient: impl Fn(usize) -> Vec<f32>, out: &mut dyn FnMut(Outgoing)) {
    let plan = side.plan().clone();
    let values = plan.buckets()[bucket].parameters.iter().flat_map(|&tensor| gradient(tensor)).collect();
    side.give(bucket, values, out);
}

/// What a side left out of one tensor: as a sender, and as the owner of its shard.
fn residuals(side: &Exchange, tensor: usize) -> [Vec<f32>; 2] {
    let elements = side.plan().parameters()[tensor].elements();
    let Group { rank, ranks, .. } = side.group();
    [(Side::Sender { rank }, elements), (Side::Owner, shard(elements, rank, ranks).len())].map(|(which, n)| {
        let mut values = vec![f32::NAN; n];
        side.copy_residual(tensor, which, 0, &mut values);
        values
    })
}

/// Runs one step; `pick` chooses which of the waiting frames is delivered next. Returns the verdict and the bytes that
/// each rank sent.
fn step(
    sides: &mut [Exchange],
    number: u64,
    gradient: impl Fn(usize, usize) -> Vec<f32>,
    mut pick: impl FnMut(usize) -> usize,
) -> (Verdict, Vec<usize>) {
    let mut waiting = Vec::new();
    let mut sent = vec![0; sides.len()];
    for side in sides.iter_mut() {
        side.begin(number);
    }
    for bucket in 0..sides[0].plan().buckets().len() {
        for (rank, side) in sides.iter_mut().enumerate() {
            give(side, bucket, |tensor| gradient(rank, tensor), &mut |out| waiting.push((rank, out)));
        }
    }
    while !waiting.is_empty() {
        let (from, out) = waiting.swap_remove(pick(waiting.len()));
        sent[from] += out.frame.len();
        sides[out.to].receive(from, &out.frame, &mut |next| waiting.push((out.to, next))).expect("good frames");
        sides[from].left(out.to, &mut |next| waiting.push((from, next)));
    }
    let votes: Vec<Vote> = sides.iter().map(Exchange::vote).collect();
    let verdicts: Vec<Verdict> = sides.iter_mut().map(|side| side.close(&votes).0).collect();
    assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]));
    (verdicts[0], sent)
}

fn sums(side: &Exchange) -> Vec<u32> {
    (0..TENSORS).flat_map(|tensor| side.sum(tensor)).map(f32::to_bits).collect()
}

fn state(side: &Exchange) -> Vec<u32> {
    (0..TENSORS).flat_map(|tensor| residuals(side, tensor).concat()).map(f32::to_bits).collect()
}

#[test]
fn a_pulse_on_one_rank_reaches_all_in_the_same_step() {
    for codec in Codec::ALL {
        let run = |pulse: f32| {
            let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 16, codec)).collect();
            let with = |rank, tensor| {
                let mut gradient = gradient(rank, 1, tensor);
                gradient[60] += if rank == 1 { pulse } else { 0.0 };
                gradient
            };
            step(&mut sides, 1, with, |n| n / 2);
            sides.iter().map(sums).collect::<Vec<_>>()
        };
        let (quiet, loud) = (run(0.0), run(1.0));
        assert!((0..3).all(|rank| loud[rank] == loud[0] && loud[rank] != quiet[rank]));
    }
}

#[test]
fn a_nan_on_one_rank_makes_all_skip_and_leaves_no_trace() {
    for codec in Codec::ALL {
        // In a shard of another rank, and in its own.
        for at in [5, 76_700] {
            let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 16, codec)).collect();
            let mut never: Vec<_> = (0..3).map(|rank| side(rank, 3, 16, codec)).collect();
            let good = |number: u64| move |rank, tensor| gradient(rank, number, tensor);
            step(&mut sides, 1, good(1), |_| 0);
            step(&mut never, 1, good(1), |_| 0);
            let poisoned = |rank, tensor| {
                let mut gradient = gradient(rank, 2, tensor);
                if rank == 2 && tensor == 0 {
                    gradient[at] = f32::NAN;
                }
                gradient
            };
            assert_eq!(step(&mut sides, 2, poisoned, |n| n - 1).0, Verdict::Skip, "{codec} {at}");
            assert_eq!(step(&mut sides, 3, good(3), |_| 0).0, Verdict::Commit);
            step(&mut never, 3, good(3), |_| 0);
            for (a, b) in sides.iter().zip(&never) {
                assert_eq!((sums(a), state(a)), (sums(b), state(b)));
            }
        }
    }
}

#[test]
fn a_sum_that_overflows_is_skipped_although_every_gradient_was_finite() {
    let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 16, Codec::Int8)).collect();
    let huge = |_, tensor| vec![f32::MAX / 2.9 / 1.5; gradient(0, 1, tensor).len()];
    assert_eq!(step(&mut sides, 1, huge, |_| 0).0, Verdict::Skip);
}

/// What is added to a gradient of what was left out before: of a table, nothing where a block's gradient is zero.
fn sent_of(parameter: &Parameter, gradient: &[f32], residual: &[f32]) -> Vec<f32> {
    let mut residual = residual.to_vec();
    if may_leave_rows(parameter) {
        for (residual, gradient) in residual.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)) {
            if gradient.iter().all(|&g| g == 0.0) {
                residual.fill(0.0);
            }
        }
    }
    residual
}

/// Runs a step and enters it: what all ranks decoded, less all gradients, in exact arithmetic that also counts the
/// rounding of every addition: of residuals to gradients, and of parts to sums. A step that is skipped counts as nothing.
fn booked(exact: &mut Exact, sides: &mut [Exchange], number: u64, given: impl Fn(usize, usize) -> Vec<f32>) -> Verdict {
    let ranks = sides.len();
    let before: Vec<_> = sides.iter().map(|side| [0, 1, 2, 3].map(|tensor| residuals(side, tensor))).collect();
    let (verdict, _) = step(sides, number, &given, |n| n / 2);
    if verdict == Verdict::Skip {
        return verdict;
    }
    for (tensor, parameter) in sides[0].plan().parameters().iter().enumerate() {
        let codec = codec_of(parameter, sides[0].codec());
        for owner in 0..ranks {
            let owned = shard(parameter.elements(), owner, ranks);
            let mut sum = vec![0.0f32; owned.len()];
            for (rank, before) in before.iter().enumerate() {
                let gradient = &given(rank, tensor)[owned.clone()];
                gradient.iter().for_each(|g| exact.add(-*g));
                let mut part = gradient.to_vec();
                if rank != owner {
                    let residual = &sent_of(parameter, gradient, &before[tensor][0][owned.clone()]);
                    let mut payload = vec![0; codec.payload_bytes(owned.len())];
                    let _ = codec.encode(&mut gradient.to_vec(), residual, &mut payload);
                    Payload::new(codec, owned.len(), payload).expect("our own").decode(&mut part);
                    enter_encoding(exact, codec, [gradient, residual, &part]);
                }
                for (sum, part) in sum.iter_mut().zip(&part) {
                    exact.add(lost(*sum, *part));
                    *sum += part;
                }
            }
            let residual = &before[owner][tensor][1];
            sum.iter().zip(residual).for_each(|(sum, r)| exact.add(lost(*sum, *r)));
        }
        sides[0].sum(tensor).iter().for_each(|x| exact.add(*x));
    }
    verdict
}

/// Enters what the additions of an encoder rounded: gradient, residual and what was sent.
fn enter_encoding(exact: &mut Exact, codec: Codec, [gradient, residual, sent]: [&[f32]; 3]) {
    for ((g, r), sent) in gradient.iter().zip(residual).zip(sent) {
        lost_in_encoding(codec, *g, *r, *sent).into_iter().for_each(|lost| exact.add(lost));
    }
}

/// Enters what is remembered; one owner's part is forgotten in the control, as by a careless resume.
fn remembered(exact: &mut Exact, sides: &[Exchange], forget: bool) {
    for (rank, side) in sides.iter().enumerate() {
        for tensor in 0..TENSORS {
            let [sender, owner] = residuals(side, tensor);
            sender.iter().for_each(|r| exact.add(*r));
            if !(forget && rank == 0) {
                owner.iter().for_each(|r| exact.add(*r));
            }
        }
    }
}

fn ledger(codec: Codec, forget: bool) -> Exact {
    let mut exact = Exact::default();
    let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 32, codec)).collect();
    for number in 1..6 {
        // Step 3 is skipped.
        let given = |rank: usize, tensor: usize| {
            let mut gradient = gradient(rank, number, tensor);
            if number == 3 && rank == 1 && tensor == 0 {
                gradient[9] = f32::INFINITY;
            }
            gradient
        };
        let verdict = booked(&mut exact, &mut sides, number, given);
        assert_eq!(verdict == Verdict::Skip, number == 3);
    }
    remembered(&mut exact, &sides, forget);
    exact
}

#[test]
fn the_ledger_of_all_ranks_and_both_stages_balances_over_a_run_with_a_skip() {
    for codec in Codec::ALL {
        assert!(ledger(codec, false).is_zero(), "{codec}");
    }
    assert!(!ledger(Codec::Int8, true).is_zero(), "the control");
}

#[test]
fn error_does_not_grow_with_the_number_of_ranks() {
    // Invariant 6: the relative error of one step's sum, without feedback from earlier steps.
    let error = |ranks: usize, codec: Codec| {
        let mut sides: Vec<_> = (0..ranks).map(|rank| side(rank, ranks, 64, codec)).collect();
        step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |_| 0);
        let mut exact = vec![0.0f64; sides[0].sum(0).len()];
        for rank in 0..ranks {
            exact.iter_mut().zip(gradient(rank, 1, 0)).for_each(|(sum, g)| *sum += f64::from(g));
        }
        let difference: f64 = exact.iter().zip(sides[0].sum(0)).map(|(a, b)| (a - f64::from(b)).powi(2)).sum();
        (difference / exact.iter().map(|x| x * x).sum::<f64>()).sqrt()
    };
    for codec in [Codec::Int8, Codec::Int4, Codec::Sparse24Int8, Codec::Sparse24Int4] {
        let (two, eight) = (error(2, codec), error(8, codec));
        assert!(eight < 1.5 * two, "{codec}: {two} {eight}");
    }
}
