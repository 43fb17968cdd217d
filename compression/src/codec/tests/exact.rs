//! Nothing is lost: what is sent and what is left are the input, over a step and over a run.

use proptest::prelude::*;

use super::inputs::{Chance, gradient_and_residual, number};
use super::*;
use crate::ledger::{Exact, lost, lost_in_encoding};

/// Whether what is sent and what is left are `y`, bit for bit and as real numbers.
fn balances(y: &[f32], sent: &[f32], left: &[f32]) -> bool {
    y.iter()
        .zip(sent)
        .zip(left)
        .all(|((y, sent), left)| (sent + left).to_bits() == (y + 0.0).to_bits() && lost(*sent, *left) == 0.0)
}

/// Invariant 1 for a gradient and what is released of a residual; and the new residual is what is left and what was held.
fn check_balance(codec: Codec, gradient: &[f32], residual: &[f32]) -> Result<(), TestCaseError> {
    let split: Vec<[f32; 2]> = residual.iter().map(|r| split(codec, *r)).collect();
    let whole = |([released, held], r): (&[f32; 2], &f32)| released + held == *r && lost(*released, *held) == 0.0;
    prop_assert!(split.iter().zip(residual).all(whole), "{}: a residual is split exactly", codec);
    let y: Vec<f32> = gradient.iter().zip(&split).map(|(g, [released, _])| g + released).collect();
    let (found, payload, next) = encode_with_residual(codec, gradient, residual);
    if !can_be_sent(&y) {
        prop_assert_eq!(found, Found::NonFinite, "{}", codec);
        return Ok(());
    }
    // Without a past nothing is held, so that what is left is seen.
    let (_, alone, left) = encode(codec, &y);
    prop_assert!(balances(&y, &decode(codec, &alone, y.len()), &left), "{}", codec);
    let expected: Vec<f32> = left.iter().zip(&split).map(|(left, [_, held])| (left + held) + 0.0).collect();
    prop_assert_eq!(found == Found::NonFinite, is_seen(&y, &expected), "{}", codec);
    if can_be_sent(residual) {
        prop_assert_eq!(found == Found::Finite, can_be_sent(&expected), "{}: what is not seen is not there", codec);
    }
    if found == Found::Finite {
        prop_assert!(payload == alone && bits(&next) == bits(&expected), "{}", codec);
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_is_sent_and_what_is_left_are_the_input_bit_for_bit(
        y in prop::collection::vec((number(), number()), 0..700),
    ) {
        let (gradient, residual): (Vec<f32>, Vec<f32>) = y.into_iter().unzip();
        for codec in Codec::ALL {
            check_balance(codec, &gradient, &residual)?;
        }
    }

    #[test]
    fn what_is_sent_and_what_is_left_are_a_hard_input_bit_for_bit(input in gradient_and_residual()) {
        for codec in Codec::ALL {
            check_balance(codec, &input.0, &input.1)?;
        }
    }
}

#[test]
fn what_is_sent_and_what_is_left_are_the_input_at_every_length() {
    let (gradient, residual) = (Chance::new(1).normals(700), Chance::new(2).normals(700));
    for codec in Codec::ALL {
        for n in 0..=gradient.len() {
            check_balance(codec, &gradient[..n], &residual[..n]).unwrap_or_else(|error| panic!("{n}: {error}"));
        }
    }
}

/// The control: any value of a payload that is not the encoder's own spoils the balance.
#[test]
fn a_payload_with_one_bit_changed_does_not_balance() {
    let y = Chance::new(3).normals(300);
    for codec in Codec::ALL {
        let (_, payload, left) = encode(codec, &y);
        let mut noticed = 0;
        for at in 0..payload.len() {
            let mut changed = payload.clone();
            changed[at] ^= 1;
            let Ok(changed) = Payload::new(codec, y.len(), changed) else { continue };
            let mut sent = vec![0.0; y.len()];
            changed.decode(&mut sent);
            assert!(!balances(&y, &sent, &left), "{codec} byte {at}");
            noticed += 1;
        }
        assert!(noticed > payload.len() / 3, "{codec}: only {noticed} changes were decoded at all");
    }
}

/// The control: why a scale has 8 bits. With all 24 a product with it is rounded, and what a fused instruction leaves of
/// the unrounded product does not fit it.
#[test]
fn a_scale_of_24_bits_would_lose_bits() {
    let y = Chance::new(4).normals(128);
    let scale_of = |bits: u32| f32::from_bits((y.iter().fold(0.0f32, |a, b| a.max(b.abs())) / 127.0).to_bits() & bits);
    let of_a_scale = |scale: f32| -> (Vec<f32>, Vec<f32>) {
        let quotient = |y: &f32| (y * (1.0 / scale)).round_ties_even();
        y.iter().map(|y| (quotient(y) * scale, quotient(y).mul_add(-scale, *y))).unzip()
    };
    let (sent, left) = of_a_scale(scale_of(0xffff_0000));
    assert!(balances(&y, &sent, &left));
    let (sent, left) = of_a_scale(scale_of(0xffff_ffff));
    assert!(!balances(&y, &sent, &left));
}

/// What may be wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Run {
    Right,
    WithoutFeedback,
    /// What is lost when a held residual is added to what is left is not entered.
    OneRounding,
    /// Residuals change although the step is skipped.
    SkipsCount,
}

/// One step of a run: each rank's gradient, and whether a vote skips it.
type Step = (Vec<Vec<f32>>, bool);

/// All gradients of the steps that count, less everything that was decoded after the second stage and all residuals on
/// both sides, in exact arithmetic that also counts each addition's own rounding.
fn ledger(codec: Codec, steps: &[Step], run: Run) -> Exact {
    let (ranks, n) = (steps[0].0.len(), steps[0].0[0].len());
    let mut exact = Exact::default();
    let (mut senders, mut owner) = (vec![vec![0.0; n]; ranks], vec![0.0; n]);
    for (gradients, skipped) in steps {
        let mut entries = Vec::new();
        let mut enter_sum = |a: &[f32], b: &[f32]| entries.extend(a.iter().zip(b).map(|(a, b)| -lost(*a, *b)));
        let mut encoded = Vec::new();
        let (mut sum, mut all_left, mut skip) = (vec![0.0; n], Vec::new(), *skipped);
        for (gradient, residual) in gradients.iter().zip(&senders) {
            let (found, payload, left) = encode_with_residual(codec, gradient, residual);
            skip |= found == Found::NonFinite;
            if found == Found::Finite {
                let sent = decode(codec, &payload, n);
                for ((g, r), sent) in gradient.iter().zip(residual).zip(&sent) {
                    let [in_y, in_residual] = lost_in_encoding(codec, *g, *r, *sent);
                    encoded.extend([-in_y, if run == Run::OneRounding { 0.0 } else { -in_residual }]);
                }
                enter_sum(&sum, &sent);
                Payload::new(codec, n, payload).expect("our own").decode_add(&mut sum);
            }
            all_left.push(left);
        }
        let (found, payload, left) = encode_with_residual(codec.second_stage(), &sum, &owner);
        skip |= found == Found::NonFinite;
        if !skip {
            enter_sum(&sum, &owner);
            entries.extend(decode(codec.second_stage(), &payload, n).iter().map(|x| -x));
            entries.iter().chain(&encoded).chain(gradients.iter().flatten()).for_each(|x| exact.add(*x));
        }
        if run != Run::WithoutFeedback && (!skip || run == Run::SkipsCount) {
            (senders, owner) = (all_left, left);
        }
    }
    senders.iter().chain([&owner]).flatten().for_each(|r| exact.add(-*r));
    exact
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_ledger_of_both_stages_balances_over_a_run_with_skipped_steps(
        steps in (1usize..4, 1usize..200).prop_flat_map(|(ranks, n)| {
            let gradients = prop::collection::vec(prop::collection::vec(number(), n), ranks);
            prop::collection::vec((gradients, prop::bool::weighted(0.2)), 1..8)
        }),
        broken in prop::option::of((0usize..8, prop::sample::select(vec![f32::NAN, f32::INFINITY, TOO_LARGE]))),
    ) {
        let mut steps = steps;
        if let Some((step, bad)) = broken {
            // One element of one rank: the whole step counts as nothing.
            let (step, n) = (step % steps.len(), steps[0].0[0].len());
            steps[step].0[0][n / 2] = bad;
        }
        for codec in Codec::ALL {
            prop_assert!(ledger(codec, &steps, Run::Right).is_zero(), "{}", codec);
        }
    }
}

#[test]
fn the_ledger_balances_neither_without_feedback_nor_when_a_skipped_step_counts() {
    let mut chance = Chance::new(5);
    let mut steps: Vec<Step> = (0..6).map(|step| ((0..3).map(|_| chance.normals(150)).collect(), step == 2)).collect();
    steps[4].0[1][149] = f32::NAN;
    for codec in LOSSY {
        assert!(ledger(codec, &steps, Run::Right).is_zero(), "{codec}");
        assert!(!ledger(codec, &steps, Run::WithoutFeedback).is_zero(), "{codec}");
        assert!(!ledger(codec, &steps[..4], Run::SkipsCount).is_zero(), "{codec}");
        assert_eq!(ledger(codec, &steps, Run::OneRounding).is_zero(), !SPARSE.contains(&codec), "{codec}");
    }
    assert!(ledger(Codec::Fp32, &steps, Run::WithoutFeedback).is_zero(), "nothing is left, so nothing is fed back");
}

/// Numbers within a factor of 2^22 of each other, so that a block crosses no border unless its largest does.
fn of_one_size() -> impl Strategy<Value = Vec<f32>> {
    let number = (1.0f32..2.0, -22i32..=0, any::<bool>());
    let number = number.prop_map(|(m, e, plus)| if plus { m * 2.0f32.powi(e) } else { -m * 2.0f32.powi(e) });
    prop::collection::vec(number, 1..400).prop_map(|mut y| {
        y.iter_mut().step_by(BLOCK).for_each(|first| *first = 1.25 * first.signum());
        y
    })
}

/// The decoded and the left values of `factor` times gradient and residual, divided by `factor`.
fn through(codec: Codec, y: &[f32], residual: &[f32], factor: f32) -> Option<[Vec<u32>; 2]> {
    let [scaled, residual] = [y, residual].map(|x| x.iter().map(|x| x * factor).collect::<Vec<f32>>());
    let (found, payload, left) = encode_with_residual(codec, &scaled, &residual);
    let back = |values: Vec<f32>| values.iter().map(|x| (x / factor).to_bits()).collect();
    (found == Found::Finite).then(|| [back(decode(codec, &payload, y.len())), back(left)])
}

/// A residual of that size, which makes no block's largest element smaller.
fn residual_of(y: &[f32]) -> Vec<f32> {
    let mut residual: Vec<f32> = y.iter().rev().map(|y| y * 0.75).collect();
    residual.iter_mut().zip(y).step_by(BLOCK).for_each(|(r, y)| *r = y * 0.5);
    residual
}

proptest! {
    #[test]
    fn a_power_of_two_goes_through(y in of_one_size(), k in -93i32..=124) {
        let (factor, zeros) = (2.0f32.powi(k), vec![0.0; y.len()]);
        for codec in Codec::ALL {
            for residual in [&zeros, &residual_of(&y)] {
                prop_assert_eq!(through(codec, &y, residual, 1.0), through(codec, &y, residual, factor), "{}", codec);
            }
            // As bytes: nothing but the exponent of the scales changes.
            let scaled: Vec<f32> = y.iter().map(|x| x * factor).collect();
            let (payload, scaled) = (encode(codec, &y).1, encode(codec, &scaled).1);
            let scales = if codec == Codec::Fp32 || codec == Codec::Bf16 { continue } else { 2 * y.len().div_ceil(BLOCK) };
            prop_assert_eq!(&payload[scales..], &scaled[scales..]);
            for (a, b) in payload[..scales].chunks_exact(2).zip(scaled[..scales].chunks_exact(2)) {
                let bits = |x: &[u8]| i32::from(u16::from_le_bytes([x[0], x[1]]));
                prop_assert_eq!(bits(a) + (k << 7), bits(b));
            }
        }
    }

    /// The control.
    #[test]
    fn a_power_of_two_does_not_go_through_a_border(y in of_one_size()) {
        let through = |codec, factor| through(codec, &y, &vec![0.0; y.len()], factor);
        for codec in LOSSY {
            prop_assert_eq!(through(codec, 2.0f32.powi(126)), None, "{}: from 2^126 on it is not finite", codec);
        }
        for codec in [Codec::Int8, Codec::Int4, Codec::Sparse24Int8, Codec::Sparse24Int4] {
            let below = through(codec, 2.0f32.powi(-102)).expect("finite");
            prop_assert_ne!(&below, &through(codec, 1.0).expect("finite"), "{}", codec);
            prop_assert!(below[0].iter().all(|&x| x == 0), "{}: below 2^-100 it stays behind", codec);
        }
    }
}

/// A power of two goes through a sparse codec if of no residual what is held is rounded as a denormal: 31 / 32 of it is 0,
/// at least 2^-126, or a multiple of 2^-149.
#[test]
fn a_power_of_two_goes_through_a_residual_unless_what_is_held_of_it_is_rounded_as_a_denormal() {
    let mut chance = Chance::new(6);
    // Residuals from 2^(exponent - 126) on under gradients from 2^-125 on; the first element gives the block its scale.
    let mut goes_through = |exponent: i32, multiple: u32| {
        let mut number = |exponent: i32, multiple: u32| {
            let mantissa = (chance.bits() >> 9 | 0x80_0000) / multiple * multiple;
            mantissa as f32 * 2.0f32.powi(exponent - 23) * f32::MIN_POSITIVE
        };
        let residual: Vec<f32> = (0..BLOCK).map(|_| number(exponent, multiple)).collect();
        let mut y: Vec<f32> = (0..BLOCK).map(|_| number(1, 1)).collect();
        y[0] = 1.0;
        SPARSE.map(|codec| through(codec, &y, &residual, 1.0) == through(codec, &y, &residual, 2.0f32.powi(40)))
    };
    // At least 32 / 31 of 2^-126, or a multiple of 2^-144.
    assert_eq!([goes_through(1, 1), goes_through(2, 1), goes_through(0, 32), goes_through(-3, 256)], [[true; 2]; 4]);
    // The control.
    assert_eq!([goes_through(-1, 1), goes_through(-2, 1)], [[false; 2]; 2]);
}

proptest! {
    /// What rounding the scale up is for: no multiple is clamped, so nothing sent is farther off than half a scale.
    #[test]
    fn a_dense_block_leaves_at_most_half_a_scale_of_each_element(y in prop::collection::vec(-1.0f32..1.0, 1..=BLOCK)) {
        for codec in [Codec::Int8, Codec::Int4] {
            let (_, payload, left) = encode(codec, &y);
            let scale = bf16::value(u16::from_le_bytes([payload[0], payload[1]]));
            prop_assert!(left.iter().all(|left| left.abs() <= scale * 0.500_001), "{}", codec);
        }
    }

    /// The two that are kept of four are sent as in a dense block, the other two stay behind whole.
    #[test]
    fn a_sparse_block_sends_two_of_four_and_leaves_two_whole((y, _) in gradient_and_residual()) {
        for (sparse, dense) in [(Codec::Sparse24Int8, Codec::Int8), (Codec::Sparse24Int4, Codec::Int4)] {
            let (found, payload, left) = encode(sparse, &y);
            let (_, dense_payload, dense_left) = encode(dense, &y);
            prop_assume!(found == Found::Finite);
            let (sent, dense_sent) = (decode(sparse, &payload, y.len()), decode(dense, &dense_payload, y.len()));
            for at in (0..y.len()).step_by(4) {
                let group = at..(at + 4).min(y.len());
                let stays: Vec<usize> = group.clone().filter(|&i| sent[i] == 0.0 && left[i] == y[i]).collect();
                prop_assert!(stays.len() >= group.len().saturating_sub(2));
                for i in group.filter(|i| !stays.contains(i)) {
                    prop_assert_eq!(sent[i].to_bits(), dense_sent[i].to_bits());
                    prop_assert_eq!(left[i].to_bits(), dense_left[i].to_bits());
                    prop_assert!(stays.iter().all(|&other| y[other].abs() <= y[i].abs()));
                }
            }
        }
    }
}
