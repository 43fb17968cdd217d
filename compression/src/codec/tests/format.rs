//! Names, sizes, and payloads written out by hand: these pin the format of `docs/payload-format.md`.

use super::*;

#[test]
fn every_name_leads_back_to_its_codec_and_no_other_name_does() {
    for codec in Codec::ALL {
        assert_eq!(Codec::from_name(codec.name()), Some(codec));
        assert_eq!(codec.to_string(), codec.name());
    }
    for name in ["", "FP32", "int9", "int8 ", "sparse24", "sparse24-int2"] {
        assert_eq!(Codec::from_name(name), None, "{name}");
    }
}

#[test]
fn whole_blocks_have_the_bits_an_element_of_the_table() {
    let table = [
        (Codec::Fp32, 32.0),
        (Codec::Bf16, 16.0),
        (Codec::Int8, 8.125),
        (Codec::Sparse24Int8, 5.125),
        (Codec::Int4, 4.125),
        (Codec::Sparse24Int4, 3.125),
    ];
    for (codec, bits) in table {
        for blocks in [1, 2, 10, 524_288] {
            assert_eq!((8 * codec.payload_bytes(128 * blocks)) as f64, bits * (128 * blocks) as f64, "{codec}");
        }
    }
}

#[test]
fn any_number_of_elements_has_the_bytes_that_are_counted_one_by_one() {
    for n in 0..1000 {
        let scales = (0..n).filter(|i| i % 128 == 0).count() * 2;
        let bitmap = (0..n).filter(|i| i % 8 == 0).count();
        let kept = (0..n).filter(|i| i % 4 < 2).count();
        let halves = |values: usize| (0..values).filter(|i| i % 2 == 0).count();
        let expected = [
            (Codec::Fp32, 4 * n),
            (Codec::Bf16, 2 * n),
            (Codec::Int8, scales + n),
            (Codec::Int4, scales + halves(n)),
            (Codec::Sparse24Int8, scales + bitmap + kept),
            (Codec::Sparse24Int4, scales + bitmap + halves(kept)),
        ];
        for (codec, bytes) in expected {
            assert_eq!(codec.payload_bytes(n), bytes, "{codec} of {n}");
        }
    }
    // A few of them written out.
    assert_eq!([1, 5, 127, 129, 131].map(|n| Codec::Int4.payload_bytes(n)), [3, 5, 66, 69, 70]);
    assert_eq!([1, 5, 127, 129, 131].map(|n| Codec::Sparse24Int8.payload_bytes(n)), [4, 6, 82, 86, 87]);
    assert_eq!([1, 5, 127, 129, 131].map(|n| Codec::Sparse24Int4.payload_bytes(n)), [4, 5, 50, 54, 54]);
}

/// The payload of `y`, and what is left of it.
fn check(codec: Codec, y: &[f32], payload: &[u8], left: &[f32]) {
    let (found, written, rest) = encode(codec, y);
    assert_eq!(found, Found::Finite);
    assert_eq!(written, payload, "{codec} of {y:?}");
    assert_eq!(bits(&rest), bits(left), "what {codec} leaves of {y:?}: {rest:?}");
    let sent: Vec<f32> = y.iter().zip(left).map(|(y, left)| y - left + 0.0).collect();
    assert_eq!(bits(&decode(codec, payload, y.len())), bits(&sent), "what {codec} sends of {y:?}");
}

#[test]
fn nothing_has_an_empty_payload() {
    for codec in Codec::ALL {
        check(codec, &[], &[], &[]);
    }
}

#[test]
fn fp32_and_bf16_payloads_written_by_hand() {
    check(Codec::Fp32, &[1.0, -0.0, -2.5], &[0, 0, 0x80, 0x3f, 0, 0, 0, 0, 0, 0, 0x20, 0xc0], &[0.0; 3]);
    // 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between two: the even one is below, and above. 1 + 2^-8 + 2^-23 does not.
    let ulp = 2.0f32.powi(-7);
    check(
        Codec::Bf16,
        &[1.0 + ulp / 2.0, 1.0 + 1.5 * ulp, 1.0 + ulp / 2.0 + f32::EPSILON, -0.0, -3.0],
        &[0x80, 0x3f, 0x82, 0x3f, 0x81, 0x3f, 0, 0, 0x40, 0xc0],
        &[ulp / 2.0, -ulp / 2.0, -ulp / 2.0 + f32::EPSILON, 0.0, 0.0],
    );
}

#[test]
fn int8_payloads_written_by_hand() {
    // The scale is 127 / 127 = 1, 0x3f80; halves go to the even multiple.
    check(
        Codec::Int8,
        &[127.0, 0.5, 1.5, -0.5, -2.5, -0.0],
        &[0x80, 0x3f, 127, 0, 2, 0, 0xfe, 0],
        &[0.0, 0.5, -0.5, -0.5, -0.5, 0.0],
    );
    // 128 / 127 = 1.00787 lies between the bf16 1 + 2^-7 = 1.0078125 and 1 + 2^-6: up it goes, to 0x3f82 = 1.015625.
    // 128 / 1.015625 = 126.03.
    check(Codec::Int8, &[-128.0], &[0x82, 0x3f, 0x82], &[-128.0 + 126.0 * 1.015_625]);
    // Every scale comes before every value: blocks of scale 1, 2 and 0.
    let mut y = vec![0.0f32; 300];
    (y[3], y[128], y[255], y[299]) = (127.0, -254.0, 4.0, 1e-35);
    let mut payload = vec![0; 306];
    payload[..6].copy_from_slice(&[0x80, 0x3f, 0x00, 0x40, 0, 0]);
    (payload[6 + 3], payload[6 + 128], payload[6 + 255]) = (127, 0x81, 2);
    let mut left = vec![0.0; 300];
    left[299] = 1e-35;
    check(Codec::Int8, &y, &payload, &left);
}

#[test]
fn int4_payloads_written_by_hand() {
    // The scale is 7 / 7 = 1; the first of two values is the lower half of a byte; half a byte is left over.
    check(Codec::Int4, &[7.0, 0.5, 1.5, -0.5, -2.5], &[0x80, 0x3f, 0x07, 0x02, 0x0e], &[0.0, 0.5, -0.5, -0.5, -0.5]);
    check(Codec::Int4, &[-7.0, 3.0], &[0x80, 0x3f, 0x39], &[0.0; 2]);
}

#[test]
fn sparse24_int8_payloads_written_by_hand() {
    // The largest of each four: the second and the fourth; the first two of four equal ones, whatever their signs; both
    // of a group of two.
    check(
        Codec::Sparse24Int8,
        &[1.0, -127.0, 0.0, 3.0, 2.0, -2.0, 2.0, -2.0, 0.0, 5.0],
        &[0x80, 0x3f, 0b0011_1010, 0b0000_0011, 0x81, 3, 2, 0xfe, 0, 5],
        &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 0.0, 0.0],
    );
    // One, three and four elements in a block of scale 1; the first of equal ones is kept beside the largest.
    check(Codec::Sparse24Int8, &[127.0], &[0x80, 0x3f, 0b0001, 127], &[0.0]);
    check(Codec::Sparse24Int8, &[1.0, 1.0, 127.0], &[0x80, 0x3f, 0b0101, 1, 127], &[0.0, 1.0, 0.0]);
    check(Codec::Sparse24Int8, &[0.0, 1.0, -1.0, 127.0], &[0x80, 0x3f, 0b1010, 1, 127], &[0.0, 0.0, -1.0, 0.0]);
    // A block of zeros keeps the first two of four, with and without a tail.
    check(Codec::Sparse24Int8, &[0.0, -0.0, 1e-35, 0.0, 0.0], &[0, 0, 0b1_0011, 0, 0, 0], &[0.0, 0.0, 1e-35, 0.0, 0.0]);
}

#[test]
fn sparse24_int4_payloads_written_by_hand() {
    check(
        Codec::Sparse24Int4,
        &[1.0, -7.0, 0.0, 3.0, 2.0, -2.0, 2.0, -2.0, 5.0],
        &[0x80, 0x3f, 0b0011_1010, 0b1, 0x39, 0xe2, 0x05],
        &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 0.0],
    );
    // Scales, then bitmaps, then values: the second block is one element of twice the scale.
    let mut y = vec![0.0f32; 129];
    (y[0], y[127], y[128]) = (7.0, -1.0, -14.0);
    let mut payload = vec![0; 4 + 17 + 33];
    payload[..4].copy_from_slice(&[0x80, 0x3f, 0x00, 0x40]);
    payload[4..20].fill(0b0011_0011);
    // Of the last four the first and the fourth are kept.
    (payload[19], payload[20]) = (0b1001_0011, 0b1);
    (payload[21], payload[21 + 31], payload[21 + 32]) = (0x07, 0xf0, 0x09);
    check(Codec::Sparse24Int4, &y, &payload, &[0.0; 129]);
}

#[test]
fn the_residual_is_added_before_encoding_and_stays_as_it_was() {
    let residual = [7.0, 0.0, -0.5];
    let (_, payload, left) = encode_with_residual(Codec::Int8, &[120.0, 0.25, 0.5], &residual);
    assert_eq!(payload, [0x80, 0x3f, 127, 0, 0]);
    assert_eq!(bits(&left), bits(&[0.0, 0.25, 0.0]));
    assert_eq!(residual, [7.0, 0.0, -0.5]);
}

#[test]
fn a_scale_of_two_to_the_minus_100_is_sent_and_a_smaller_one_is_not() {
    let least = 2.0f32.powi(-100);
    for (codec, q_max) in [(Codec::Int8, 127.0), (Codec::Int4, 7.0)] {
        check(codec, &[q_max * least], &[0x80, 0x0d, q_max as u8], &[0.0]);
        // Rounding up to 2^-100 counts; the bf16 below does not.
        let below = q_max * f32::from_bits(0x0d7f_0000);
        check(codec, &[below], &[0, 0, 0], &[below]);
        let between = q_max * f32::from_bits(0x0d7f_8000);
        assert_eq!(encode(codec, &[between]).1[..2], [0x80, 0x0d]);
    }
}

#[test]
#[should_panic(expected = "a residual for every element")]
fn a_residual_of_another_length_is_a_mistake_of_the_caller() {
    let _ = Codec::Int8.encode(&mut [0.0; 3], &[0.0; 2], &mut [0; 5]);
}

#[test]
#[should_panic(expected = "a int8 payload of 3 elements")]
fn a_payload_of_another_length_is_a_mistake_of_the_caller() {
    let _ = Codec::Int8.encode(&mut [0.0; 3], &[0.0; 3], &mut [0; 4]);
}
