//! Payloads that no encoder writes are refused by name and place, and whatever is not refused is finite.

use proptest::prelude::*;

use super::inputs::{Chance, gradient_and_residual};
use super::*;
use crate::codec::layout::Planes;

/// Where the planes of a payload begin: scales at 0, then bitmaps, then values.
fn planes(codec: Codec, elements: usize) -> (usize, usize) {
    let scales = if matches!(codec, Codec::Fp32 | Codec::Bf16) { 0 } else { 2 * elements.div_ceil(BLOCK) };
    let sparse = matches!(codec, Codec::Sparse24Int8 | Codec::Sparse24Int4);
    (scales, scales + if sparse { elements.div_ceil(8) } else { 0 })
}

/// Three blocks and a tail of so many elements, all of them ones and twos: the scales are finite, no value is zero.
fn sound(codec: Codec, tail: usize) -> (usize, Vec<u8>) {
    let y: Vec<f32> = (0..3 * BLOCK + tail).map(|i| if i % 4 < 2 { 2.0 } else { 1.0 }).collect();
    (y.len(), encode(codec, &y).1)
}

/// Refuses the payload after `spoil`, and says that `what` stands in that block.
fn check(codec: Codec, tail: usize, block: usize, what: &str, spoil: impl Fn(&mut [u8], usize, usize)) {
    let (elements, mut payload) = sound(codec, tail);
    assert!(Payload::new(codec, elements, &payload[..]).is_ok(), "the control: {codec}");
    let (bitmap, values) = planes(codec, elements);
    spoil(&mut payload, bitmap, values);
    for level in Level::available() {
        let fault = level.fault(codec, Planes::of(codec, &payload, elements), elements);
        assert_eq!(fault, Some((block, what)), "{codec} at {level} with a tail of {tail}");
    }
    match Payload::new(codec, elements, &payload[..]) {
        Err(PayloadError::Value { codec: of, block: at, what: found }) => {
            assert_eq!((of, at, found), (codec, block, what), "{codec} with a tail of {tail}");
        }
        other => panic!("{codec} with a tail of {tail}: {what} was expected in block {block}, {other:?} came"),
    }
}

const BLOCKS: [Codec; 4] = [Codec::Int8, Codec::Int4, Codec::Sparse24Int8, Codec::Sparse24Int4];
const SPARSE: [Codec; 2] = [Codec::Sparse24Int8, Codec::Sparse24Int4];
const SCALE: &str = "a scale out of range";
const BITMAP: &str = "a bitmap that does not keep two of every four";

#[test]
fn a_payload_of_another_length_is_refused() {
    for codec in Codec::ALL {
        for n in [0, 1, 127, 128, 129, 300] {
            let payload = encode(codec, &vec![1.0; n]).1;
            let mut longer = payload.clone();
            longer.push(0);
            let mut lengths = vec![&longer[..]];
            lengths.extend((0..payload.len()).map(|cut| &payload[..cut]));
            for bytes in lengths {
                let error = Payload::new(codec, n, bytes).expect_err("another length");
                let (expected, found) = (payload.len(), bytes.len());
                assert_eq!(error, PayloadError::Length { codec, elements: n, expected, found });
            }
            // Of other elements: every number that changes the length.
            for elements in (0..400).filter(|&elements| codec.payload_bytes(elements) != payload.len()) {
                assert!(matches!(Payload::new(codec, elements, &payload[..]), Err(PayloadError::Length { .. })));
            }
        }
    }
}

#[test]
fn an_error_says_what_came_and_where() {
    let (elements, mut payload) = sound(Codec::Int8, 10);
    let message = Payload::new(Codec::Int8, elements, &payload[1..]).expect_err("cut").to_string();
    assert!(message.contains("a int8 payload of 394 elements has 402 bytes, 401 came"), "{message}");
    payload[8 + 130] = 0x80;
    let message = Payload::new(Codec::Int8, elements, &payload[..]).expect_err("-128").to_string();
    assert!(message.contains("a int8 payload has the value -128 in block 1"), "{message}");
}

#[test]
fn a_scale_that_no_encoder_writes_is_refused() {
    let least = 0x0d80u16;
    for codec in BLOCKS {
        for block in 0..4 {
            let set = |bits: u16| {
                move |payload: &mut [u8], _: usize, _: usize| {
                    payload[2 * block..2 * block + 2].copy_from_slice(&bits.to_le_bytes());
                }
            };
            // A denormal, below 2^-100, infinite, NaN, the largest bf16, negative zero, a negative one.
            for bits in [1, least - 1, 0x7f80, 0x7fc0, 0x7f7f, 0x8000, 0xbf80] {
                check(codec, 10, block, SCALE, set(bits));
            }
        }
        // The largest that an encoder writes, and the next.
        let (elements, mut payload) = sound(codec, 0);
        let largest = u16::from_le_bytes(
            encode(codec, &[f32::from_bits(TOO_LARGE.to_bits() - 1)]).1[..2].try_into().expect("two"),
        );
        for (bits, is_sound) in [(least, true), (largest, true), (largest + 1, false), (least - 1, false)] {
            payload[2..4].copy_from_slice(&bits.to_le_bytes());
            assert_eq!(Payload::new(codec, elements, &payload[..]).is_ok(), is_sound, "{codec} {bits:x}");
        }
    }
}

#[test]
fn values_under_a_scale_of_zero_are_refused() {
    for codec in [Codec::Int8, Codec::Int4] {
        for block in 0..4 {
            check(codec, 10, block, "values without a scale", |payload, _, _| {
                payload[2 * block..2 * block + 2].fill(0);
            });
        }
    }
    for codec in SPARSE {
        check(codec, 10, 1, "values without a scale", |payload, bitmap, _| {
            payload[2..4].fill(0);
            payload[bitmap + 16..bitmap + 32].fill(0b0011_0011);
        });
        // Sound to the last bit, but the bitmap of a block of zeros is always the same.
        check(codec, 10, 1, "a bitmap other than the first two of four, without a scale", |payload, bitmap, _| {
            payload[2..4].fill(0);
            payload[bitmap + 20] = 0b0101_0011;
        });
    }
}

#[test]
fn the_value_that_has_no_opposite_is_refused() {
    for (codec, kept) in [(Codec::Int8, 128), (Codec::Sparse24Int8, 64)] {
        for at in [0, kept - 1, kept, 2 * kept + 3, 3 * kept] {
            check(codec, 3, at / kept, "the value -128", |payload, _, values| payload[values + at] = 0x80);
        }
    }
    for (codec, bytes) in [(Codec::Int4, 64), (Codec::Sparse24Int4, 32)] {
        for at in [0, bytes - 1, bytes, 2 * bytes + 3, 3 * bytes] {
            for spoiled in [0x18, 0x81] {
                check(codec, 3, at / bytes, "the value -8", |payload, _, values| payload[values + at] = spoiled);
            }
        }
    }
}

#[test]
fn a_bitmap_that_does_not_keep_two_of_every_four_is_refused() {
    for codec in SPARSE {
        for at in [0, 15, 16, 40] {
            for byte in (0..=255u8).filter(|byte| (byte & 15).count_ones() != 2 || (byte >> 4).count_ones() != 2) {
                check(codec, 7, at / 16, BITMAP, |payload, bitmap, _| payload[bitmap + at] = byte);
            }
        }
        // Every other byte is one that an encoder may write.
        let (elements, mut payload) = sound(codec, 0);
        let (bitmap, _) = planes(codec, elements);
        for byte in (0..=255u8).filter(|byte| (byte & 15).count_ones() == 2 && (byte >> 4).count_ones() == 2) {
            payload[bitmap + 20] = byte;
            assert!(Payload::new(codec, elements, &payload[..]).is_ok(), "{codec} {byte:b}");
        }
    }
}

#[test]
fn a_bitmap_of_a_tail_keeps_what_is_there_and_has_no_bits_beyond() {
    for codec in SPARSE {
        for tail in 1..8u32 {
            let counts = [tail.min(4).min(2), tail.saturating_sub(4).min(2)];
            for byte in 0..=255u8 {
                let kept = [(byte & 15).count_ones(), (byte >> 4).count_ones()];
                if u32::from(byte) >> tail == 0 && kept == counts {
                    let (elements, mut payload) = sound(codec, tail as usize);
                    payload[planes(codec, elements).0 + 48] = byte;
                    assert!(Payload::new(codec, elements, &payload[..]).is_ok(), "{codec} {tail} {byte:b}");
                } else {
                    check(codec, tail as usize, 3, BITMAP, |payload, bitmap, _| payload[bitmap + 48] = byte);
                }
            }
        }
    }
}

#[test]
fn half_a_byte_after_the_last_value_is_refused() {
    let what = "half a byte after the last value";
    for tail in [1, 3, 5, 9] {
        check(Codec::Int4, tail, 3, what, |payload, _, _| *payload.last_mut().expect("bytes") |= 0x10);
    }
    // An odd number is kept of one element beyond whole fours only.
    for tail in [1, 5, 9] {
        check(Codec::Sparse24Int4, tail, 3, what, |payload, _, _| *payload.last_mut().expect("bytes") |= 0x10);
    }
}

#[test]
fn a_number_that_is_not_finite_is_refused() {
    let what = "a value that is not finite";
    for at in [0usize, 127, 128, 300, 385] {
        for bits in [0x7f80u16, 0xff80, 0x7fc1, 0xffff] {
            let [low, high] = bits.to_le_bytes();
            check(Codec::Fp32, 5, at / 128, what, |payload, _, _| {
                payload[4 * at + 2..][..2].copy_from_slice(&[low, high]);
            });
            check(Codec::Bf16, 5, at / 128, what, |payload, _, _| payload[2 * at..][..2].copy_from_slice(&[low, high]));
        }
    }
}

/// Decodes at every level what is not refused: one result, and it is finite. Every level refuses the same.
fn decode_or_refuse(codec: Codec, elements: usize, bytes: &[u8]) -> Result<bool, TestCaseError> {
    if bytes.len() == codec.payload_bytes(elements) {
        let planes = Planes::of(codec, bytes, elements);
        let expected = Level::PORTABLE.fault(codec, planes, elements);
        for level in Level::available() {
            prop_assert_eq!(level.fault(codec, planes, elements), expected, "{} at {}", codec, level);
        }
        prop_assert_eq!(Payload::new(codec, elements, bytes).is_ok(), expected.is_none());
    }
    let Ok(payload) = Payload::new(codec, elements, bytes) else { return Ok(false) };
    let mut first: Option<Vec<u32>> = None;
    for level in Level::available() {
        let (mut out, mut sum) = (vec![f32::NAN; elements], vec![0.0; elements]);
        payload.decode_with(level, Stores::Cached, &mut out);
        payload.decode_add_with(level, &mut sum);
        prop_assert!(all_finite(&out), "{} at {}", codec, level);
        prop_assert!(out.iter().zip(&sum).all(|(a, b)| a == b), "{} at {}", codec, level);
        let out = bits(&out);
        prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "{} at {}", codec, level);
    }
    Ok(true)
}

proptest! {
    #[test]
    fn bytes_from_anywhere_are_decoded_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..700),
        elements in 0usize..400,
    ) {
        for codec in Codec::ALL {
            decode_or_refuse(codec, elements, &bytes)?;
            // Of the right length, so that more than the length is looked at.
            let of_length: Vec<u8> = bytes.iter().copied().cycle().take(codec.payload_bytes(elements)).collect();
            if of_length.len() == codec.payload_bytes(elements) {
                decode_or_refuse(codec, elements, &of_length)?;
            }
        }
    }

    #[test]
    fn a_payload_with_some_bytes_changed_is_decoded_or_refused(
        (gradient, residual) in gradient_and_residual(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        for codec in Codec::ALL {
            let (found, mut payload, _) = encode_with_residual(codec, &gradient, &residual);
            prop_assume!(found == Found::Finite && !payload.is_empty());
            prop_assert!(decode_or_refuse(codec, gradient.len(), &payload)?, "an encoder's own is not refused");
            for (at, byte) in &changes {
                let at = at.index(payload.len());
                payload[at] = *byte;
            }
            decode_or_refuse(codec, gradient.len(), &payload)?;
        }
    }
}

/// The control of both: changed bytes are refused often and decoded often, so that neither property is empty.
#[test]
fn of_changed_payloads_some_are_decoded_and_some_refused() {
    let y = Chance::new(13).normals(200);
    for codec in Codec::ALL {
        let payload = encode(codec, &y).1;
        let (mut refused, mut decoded) = (0, 0);
        for at in 0..payload.len() {
            for byte in [0x80, 0x7f, 0xff, 0x00, 0x35] {
                let mut changed = payload.clone();
                changed[at] = byte;
                let is_decoded = decode_or_refuse(codec, y.len(), &changed).expect("one finite result");
                *(if is_decoded { &mut decoded } else { &mut refused }) += 1;
            }
        }
        assert!(decoded > 50, "{codec}: {decoded} of {refused}");
        assert!(refused > 0 || matches!(codec, Codec::Fp32 | Codec::Bf16), "{codec}: {refused} of {decoded}");
    }
}
