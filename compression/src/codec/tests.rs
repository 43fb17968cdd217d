//! The invariants of the codecs, each with the control that breaks it.

use proptest::prelude::*;

use super::*;
use crate::ledger::{Exact, lost};

fn encode(codec: Codec, y: &[f32]) -> (Found, Vec<u8>, Vec<f32>) {
    let (mut payload, mut left) = (Vec::new(), vec![0.0; y.len()]);
    let found = codec.encode(y, &vec![0.0; y.len()], &mut payload, &mut left);
    (found, payload, left)
}

fn decode(codec: Codec, payload: &[u8], n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n];
    codec.decode(payload, &mut out).expect("our own payload");
    out
}

/// Numbers of very different sizes, zeros and negative zeros among them.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1.0f32..1.0,
        2 => (any::<u32>(), -140i32..120).prop_map(|(m, e)| {
            let x = (m as f32 / 4e9 + 0.5) * 2.0f32.powi(e);
            if m % 2 == 0 { x } else { -x }
        }),
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => any::<u32>().prop_map(|m| f32::from_bits(m % 0x80_0000)),
    ]
}

#[test]
fn every_name_leads_back_to_its_codec_and_no_other_name_does() {
    for codec in Codec::ALL {
        assert_eq!(Codec::from_name(codec.name()), Some(codec));
    }
    assert_eq!(Codec::from_name("FP32"), None);
    assert_eq!(Codec::from_name("int9"), None);
}

#[test]
fn the_sizes_are_those_of_the_table() {
    for (codec, bits_per_block) in [(Codec::Fp32, 32 * 128), (Codec::Bf16, 16 * 128), (Codec::Int8, 1040)] {
        assert_eq!(8 * codec.payload_bytes(128 * 10), 10 * bits_per_block);
        assert_eq!(codec.payload_bytes(0), 0);
    }
    assert_eq!(Codec::Int8.payload_bytes(129), 129 + 4);
}

/// Everything that was decoded and the last residual, less all gradients, in exact arithmetic that also counts each
/// addition's own rounding.
fn ledger(codec: Codec, steps: &[Vec<f32>], feedback: bool) -> Exact {
    let n = steps[0].len();
    let mut exact = Exact::default();
    let mut residual = vec![0.0; n];
    for gradient in steps {
        let (mut payload, mut left) = (Vec::new(), vec![0.0; n]);
        let _ = codec.encode(gradient, &residual, &mut payload, &mut left);
        for ((g, r), sent) in gradient.iter().zip(&residual).zip(decode(codec, &payload, n)) {
            exact.add(sent);
            exact.add(-*g);
            exact.add(lost(*g, *r));
        }
        if feedback {
            residual = left;
        }
    }
    residual.iter().for_each(|r| exact.add(*r));
    exact
}

#[test]
fn the_ledger_does_not_balance_without_feedback() {
    let steps = vec![vec![1.0, 0.3, 0.77]; 3];
    for codec in [Codec::Bf16, Codec::Int8] {
        assert!(ledger(codec, &steps, true).is_zero());
        assert!(!ledger(codec, &steps, false).is_zero());
    }
}

proptest! {
    /// Invariant 1.
    #[test]
    fn what_is_sent_and_what_is_left_are_the_input_bit_for_bit(y in prop::collection::vec(number(), 0..400)) {
        for codec in Codec::ALL {
            let (found, payload, left) = encode(codec, &y);
            prop_assert_eq!(found, Found::Finite);
            prop_assert_eq!(payload.len(), codec.payload_bytes(y.len()));
            for ((y, sent), left) in y.iter().zip(decode(codec, &payload, y.len())).zip(left) {
                prop_assert_eq!((sent + left).to_bits(), (y + 0.0).to_bits());
                prop_assert_eq!(lost(sent, left), 0.0);
            }
        }
    }

    /// Invariant 2, for one sender.
    #[test]
    fn the_ledger_balances_over_a_run(steps in prop::collection::vec(prop::collection::vec(number(), 130), 1..12)) {
        for codec in [Codec::Bf16, Codec::Int8] {
            prop_assert!(ledger(codec, &steps, true).is_zero());
        }
    }

    /// Invariant 4.
    #[test]
    fn a_power_of_two_goes_through(y in prop::collection::vec(-1.0f32..1.0, 1..300), k in -60i32..60) {
        let factor = 2.0f32.powi(k);
        // Values of one size, so that no block crosses a border.
        let y: Vec<f32> = y.iter().map(|x| x + 2.0 * x.signum()).collect();
        let scaled: Vec<f32> = y.iter().map(|x| x * factor).collect();
        for codec in Codec::ALL {
            let (_, payload, left) = encode(codec, &y);
            let (_, scaled_payload, scaled_left) = encode(codec, &scaled);
            let times = |values: Vec<f32>| values.iter().map(|x| (x * factor).to_bits()).collect::<Vec<_>>();
            let bits = |values: Vec<f32>| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(times(decode(codec, &payload, y.len())), bits(decode(codec, &scaled_payload, y.len())));
            prop_assert_eq!(times(left), bits(scaled_left));
        }
    }

    /// Invariant 5, within one tensor: a cut on block borders changes no bit.
    #[test]
    fn a_cut_on_a_block_border_changes_no_bit(y in prop::collection::vec(number(), 1..700), blocks in 1usize..4) {
        for codec in Codec::ALL {
            let whole = decode(codec, &encode(codec, &y).1, y.len());
            let pieces: Vec<f32> =
                y.chunks(blocks * BLOCK).flat_map(|y| decode(codec, &encode(codec, y).1, y.len())).collect();
            prop_assert_eq!(whole, pieces);
        }
    }

    #[test]
    fn bytes_from_anywhere_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), n in 0usize..300) {
        for codec in Codec::ALL {
            let mut sum = vec![1.0f32; n];
            match codec.decode_add(&bytes, &mut sum) {
                Ok(()) => prop_assert!(sum.iter().all(|x| x.is_finite())),
                Err(_) => prop_assert!(sum.iter().all(|&x| x == 1.0), "nothing was written"),
            }
        }
    }
}

#[test]
fn the_control_of_the_first_invariant_a_scale_that_is_rounded_down_loses_the_largest_element() {
    // 127 multiples of the scale below do not reach the block's largest element.
    let largest = 1.0f32;
    let scale_down = bf16::value(((largest / 127.0).to_bits() >> 16) as u16);
    assert!(scale_down * 127.0 + scale_down / 2.0 < largest + scale_down);
    assert!(scale_down * 127.0 < largest, "the clamp would bite");
    assert!(bf16::value(bf16::round_up(largest / 127.0)) * 127.0 >= largest);
}

#[test]
fn non_finite_and_huge_values_are_found_wherever_they_stand() {
    for codec in Codec::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, TOO_LARGE, -TOO_LARGE] {
            for at in [0, 127, 128, 199] {
                let mut y = vec![0.5f32; 200];
                y[at] = bad;
                assert_eq!(encode(codec, &y).0, Found::NonFinite, "{codec} {bad} at {at}");
            }
        }
        let below = f32::from_bits(TOO_LARGE.to_bits() - 1);
        assert_eq!(encode(codec, &[below, -below]).0, Found::Finite);
    }
}

#[test]
fn a_block_of_tiny_values_stays_behind_whole() {
    let y = [1e-32f32, -3e-33, 0.0];
    let (_, payload, left) = encode(Codec::Int8, &y);
    assert!(payload.iter().all(|&byte| byte == 0));
    assert_eq!(left, y);
}

#[test]
fn ties_go_to_the_even_multiple() {
    // The scale is exactly 1: 127 is the largest element.
    let (_, payload, _) = encode(Codec::Int8, &[127.0, 0.5, 1.5, -0.5, -2.5]);
    assert_eq!(payload[2..].iter().map(|&byte| byte as i8).collect::<Vec<_>>(), [127, 0, 2, 0, -2]);
}

#[test]
fn a_payload_that_no_encoder_writes_is_refused_by_name_and_place() {
    let (_, mut payload, _) = encode(Codec::Int8, &vec![1.0; 200]);
    let mut out = vec![7.0; 200];
    let length = Codec::Int8.decode(&payload[1..], &mut out);
    assert!(matches!(length, Err(PayloadError::Length { expected: 204, found: 203, .. })));
    payload[4 + 130] = 0x80;
    let message = Codec::Int8.decode(&payload, &mut out).expect_err("-128").to_string();
    assert!(message.contains("the value -128 in block 1"), "{message}");
    payload[1] = 0x7f;
    payload[0] = 0x80;
    let message = Codec::Int8.decode(&payload, &mut out).expect_err("an infinite scale").to_string();
    assert!(message.contains("a scale out of range in block 0"), "{message}");
    assert!(out.iter().all(|&x| x == 7.0));
}

/// Invariant 3: on f_i(x) = |x|²/2 + b_i x with sum b_i = 0, two ranks, int8 at both stages.
fn distance_from_optimum(feedback: bool, rate: f32) -> f32 {
    const N: usize = 64;
    let bias: Vec<f32> = (0..N).map(|i| 1000.0 * ((i * 37 % 64) as f32 / 32.0 - 1.0)).collect();
    let mut x = vec![1.0f32; N];
    let mut senders = [vec![0.0f32; N], vec![0.0f32; N]];
    let mut owner = vec![0.0f32; N];
    for _ in 0..(40.0 / rate) as usize {
        let mut sum = vec![0.0f32; N];
        let (mut payload, mut left) = (Vec::new(), vec![0.0; N]);
        for (rank, residual) in senders.iter_mut().enumerate() {
            let sign = if rank == 0 { 1.0 } else { -1.0 };
            let gradient: Vec<f32> = x.iter().zip(&bias).map(|(x, b)| x + sign * b).collect();
            let _ = Codec::Int8.encode(&gradient, residual, &mut payload, &mut left);
            Codec::Int8.decode_add(&payload, &mut sum).expect("our own");
            if feedback {
                residual.copy_from_slice(&left);
            }
        }
        let _ = Codec::Int8.encode(&sum, &owner, &mut payload, &mut left);
        if feedback {
            owner.copy_from_slice(&left);
        }
        for (x, g) in x.iter_mut().zip(decode(Codec::Int8, &payload, N)) {
            *x -= rate * g / 2.0;
        }
    }
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

#[test]
fn with_feedback_descent_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    let (coarse, fine) = (distance_from_optimum(true, 0.1), distance_from_optimum(true, 0.01));
    assert!(fine * 5.0 <= coarse, "{coarse} {fine}");
    let (frozen, still_frozen) = (distance_from_optimum(false, 0.1), distance_from_optimum(false, 0.01));
    assert!(frozen > 2.0 * coarse && still_frozen > 10.0 * fine, "{frozen} {still_frozen}");
}
