//! What cannot be sent is found wherever it stands; what can be sent stays finite.

use super::inputs::{Chance, LARGEST};
use super::*;

const BAD: [f32; 7] = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, TOO_LARGE, -TOO_LARGE];

fn found_at(level: Level, codec: Codec, values: &[f32], residual: &[f32]) -> Found {
    let mut payload = vec![0; codec.payload_bytes(values.len())];
    codec.encode_with(level, Stores::Cached, &mut values.to_vec(), residual, &mut payload)
}

#[test]
fn a_value_that_cannot_be_sent_is_found_wherever_it_stands() {
    let good = Chance::new(11).normals(3 * BLOCK + 77);
    let zeros = vec![0.0; good.len()];
    for level in Level::available() {
        for codec in Codec::ALL {
            assert_eq!(found_at(level, codec, &good, &zeros), Found::Finite, "the control: {codec} {level}");
            for at in 0..good.len() {
                let mut values = good.clone();
                values[at] = BAD[at % BAD.len()];
                assert_eq!(found_at(level, codec, &values, &zeros), Found::NonFinite, "{codec} {level} {at}");
            }
            for at in [0, 63, 64, 127, 128, 300, 383, 384, 387, 460] {
                for bad in BAD {
                    let (mut values, mut residual) = (good.clone(), zeros.clone());
                    values[at] = bad;
                    assert_eq!(found_at(level, codec, &values, &zeros), Found::NonFinite, "{codec} {level} {bad}");
                    residual[at] = bad;
                    // Of 2^126 a sparse codec holds less than that, and sends what it releases.
                    let held = SPARSE.contains(&codec) && bad.abs() == TOO_LARGE;
                    let expected = if held { Found::Finite } else { Found::NonFinite };
                    assert_eq!(found_at(level, codec, &good, &residual), expected, "{codec} {level} {bad}");
                }
            }
        }
    }
}

#[test]
fn a_sum_that_cannot_be_sent_is_found_although_both_its_parts_can() {
    for level in Level::available() {
        for codec in Codec::ALL.into_iter().filter(|codec| !SPARSE.contains(codec)) {
            for at in [0, 200, 270] {
                let (mut values, mut residual) = (vec![1.0f32; 300], vec![1.0f32; 300]);
                (values[at], residual[at]) = (TOO_LARGE / 2.0, TOO_LARGE / 2.0);
                assert_eq!(found_at(level, codec, &values, &residual), Found::NonFinite, "{codec} {level} {at}");
                residual[at] = LARGEST - TOO_LARGE / 2.0;
                assert_eq!(found_at(level, codec, &values, &residual), Found::Finite, "{codec} {level} {at}");
            }
        }
    }
}

#[test]
fn a_new_residual_that_is_too_large_is_found_although_what_is_sent_is_not() {
    for level in Level::available() {
        for codec in SPARSE {
            for at in [0, 200, 268] {
                let (mut values, mut residual) = (vec![1.0f32; 300], vec![1.0f32; 300]);
                // The two largest of the group, which are sent. The other stays behind, where as much is held.
                values[at + 1..at + 3].fill(LARGEST);
                (values[at], residual[at]) = (TOO_LARGE / 2.0, TOO_LARGE / 2.0);
                residual[at + 1..at + 3].fill(0.0);
                assert_eq!(found_at(level, codec, &values, &residual), Found::NonFinite, "{codec} {level} {at}");
                residual[at] = LARGEST - TOO_LARGE / 2.0;
                assert_eq!(found_at(level, codec, &values, &residual), Found::Finite, "{codec} {level} {at}");
            }
        }
    }
}

/// So no residual is ever so large that only gradients against it could go on.
#[test]
fn whatever_a_step_has_left_the_next_one_can_be_sent_if_its_gradient_is_zero() {
    let mut chance = Chance::new(12);
    for codec in Codec::ALL {
        let mut residual: Vec<f32> = (0..300)
            .map(|_| f32::from_bits((LARGEST.to_bits() - chance.bits() % 3) | chance.bits() & 1 << 31))
            .collect();
        for _ in 0..50 {
            let (found, _, next) = encode_with_residual(codec, &[0.0; 300], &residual);
            assert_eq!(found, Found::Finite, "{codec}");
            residual = next;
        }
    }
}

#[test]
fn the_largest_values_that_can_be_sent_are_decoded_as_finite_values() {
    let y: Vec<f32> =
        (0..300u32).map(|i| if i % 3 == 0 { -LARGEST } else { f32::from_bits(LARGEST.to_bits() - i) }).collect();
    for codec in Codec::ALL {
        let (found, payload, left) = encode(codec, &y);
        assert_eq!(found, Found::Finite);
        let sent = decode(codec, &payload, y.len());
        assert!(all_finite(&sent) && all_finite(&left), "{codec}");
        assert!(sent.iter().any(|x| x.abs() > LARGEST * 0.99), "{codec} sends them");
        assert_eq!(bits(&sent.iter().zip(&left).map(|(a, b)| a + b).collect::<Vec<_>>()), bits(&y));
        // The owner of a sum finds it too large, but it does not overflow.
        let payload = Payload::new(codec, y.len(), payload).expect("our own");
        let mut sum = vec![0.0; y.len()];
        reduce(&[Part::Encoded(&payload), Part::Encoded(&payload)], &mut sum);
        assert!(all_finite(&sent) && encode(codec.second_stage(), &sum).0 == Found::NonFinite, "{codec}");
    }
}

#[test]
fn whether_all_values_are_finite_is_seen_at_any_place_of_any_length() {
    for n in 0..70 {
        let mut values = vec![f32::MAX; n];
        assert!(all_finite(&values));
        for at in 0..n {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[at] = bad;
                assert!(!all_finite(&values), "{bad} at {at} of {n}");
                values[at] = -f32::MAX;
            }
        }
    }
}
