//! A second encoder and decoder, bit by bit from `docs/payload-format.md`; it shares no code with the first.

use super::Encoded;
use crate::{Codec, Found};

/// The rules of the format, of which a test may change one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Rounds the quotient to a whole number.
    pub(super) round: fn(f32) -> f32,
    /// `y / scale` in place of `y * (1 / scale)`.
    pub(super) divides: bool,
    /// Rounds a number of units of bf16.
    pub(super) round_scale: fn(f64) -> f64,
    /// Of equal elements the later one is kept.
    pub(super) later_wins: bool,
    /// Blocks with a smaller scale are sent as zeros.
    pub(super) scale_min: f64,
    /// -0.0 stays as it is.
    pub(super) keeps_negative_zero: bool,
    /// 32 times the part of a residual that a sparse codec holds back.
    pub(super) held: f64,
    /// A new residual that is too large is not seen.
    pub(super) sees_y_alone: bool,
}

pub(super) const RULES: Rules = Rules {
    round: f32::round_ties_even,
    divides: false,
    round_scale: f64::ceil,
    later_wins: false,
    // 2^-100.
    scale_min: 1.0 / (1u128 << 100) as f64,
    keeps_negative_zero: false,
    held: 31.0,
    sees_y_alone: false,
};

/// 127 or 7, and whether two of four are sent.
fn shape(codec: Codec) -> Option<(f32, bool)> {
    match codec {
        Codec::Fp32 | Codec::Bf16 => None,
        Codec::Int8 => Some((127.0, false)),
        Codec::Int4 => Some((7.0, false)),
        Codec::Sparse24Int8 => Some((127.0, true)),
        Codec::Sparse24Int4 => Some((7.0, true)),
    }
}

/// The upper half of an f32 that is a bf16.
fn upper_half(x: f64) -> [u8; 2] {
    let bits = (x as f32).to_bits();
    assert!(bits & 0xffff == 0 && f64::from(x as f32) == x, "{x:e} is a bf16");
    ((bits >> 16) as u16).to_le_bytes()
}

/// `x`, not negative, as a whole number of units of bf16, rounded.
fn to_bf16(x: f64, round: fn(f64) -> f64) -> f64 {
    // Eight significant bits; below 2^-126 the unit stays 2^-133.
    let mut unit = 2.0f64.powi(-133);
    while x / unit >= 256.0 {
        unit *= 2.0;
    }
    round(x / unit) * unit
}

/// Encodes by the rules.
pub(super) fn encode(codec: Codec, gradient: &[f32], residual: &[f32], rules: &Rules) -> Encoded {
    let is_sparse = shape(codec).is_some_and(|(_, sparse)| sparse);
    // A product of 24 and 5 bits is exact in f64, so that it is rounded once.
    let hold = |r: &f32| if is_sparse { (f64::from(*r) * rules.held / 32.0) as f32 } else { 0.0 };
    let zero = if rules.keeps_negative_zero { -0.0 } else { 0.0 };
    let released = |r: &f32| (f64::from(*r) - f64::from(hold(r))) as f32;
    let y: Vec<f32> = gradient.iter().zip(residual).map(|(g, r)| (g + released(r)) + zero).collect();
    let can_be_sent = |x: &f32| f64::from(x.abs()) < 2.0f64.powi(126);
    if !y.iter().all(can_be_sent) {
        return Encoded::new(Found::NonFinite, &[], &[]);
    }
    let encoded = encode_sum(codec, &y, rules);
    let next: Vec<f32> = encoded.left.iter().zip(residual).map(|(left, r)| f32::from_bits(*left) + hold(r)).collect();
    let looks = |y: &[f32]| y.iter().any(|y| f64::from(y.abs()) >= 2.0f64.powi(121));
    let is_too_large = |(y, next): (&[f32], &[f32])| looks(y) && !next.iter().all(can_be_sent);
    if is_sparse && !rules.sees_y_alone && y.chunks(128).zip(next.chunks(128)).any(is_too_large) {
        return Encoded::new(Found::NonFinite, &[], &[]);
    }
    if is_sparse { Encoded::new(Found::Finite, &encoded.payload, &next) } else { encoded }
}

/// Encodes what is to be sent, all of it finite.
fn encode_sum(codec: Codec, y: &[f32], rules: &Rules) -> Encoded {
    let mut left = y.to_vec();
    let (mut scales, mut bitmap, mut values, mut nibbles) = (vec![], vec![], vec![], vec![]);
    let Some((q_max, sparse)) = shape(codec) else {
        for y in &mut left {
            if codec == Codec::Fp32 {
                values.extend(y.to_le_bytes());
                *y = 0.0;
            } else {
                let sent = to_bf16(f64::from(y.abs()), f64::round_ties_even).copysign(f64::from(*y));
                values.extend(upper_half(sent));
                *y = (f64::from(*y) - sent) as f32;
            }
        }
        return Encoded::new(Found::Finite, &values, &left);
    };
    for (block, left) in y.chunks(128).zip(left.chunks_mut(128)) {
        let largest = block.iter().fold(0.0f32, |largest, y| largest.max(y.abs()));
        let mut scale = to_bf16(f64::from(largest / q_max), rules.round_scale);
        if scale < rules.scale_min {
            scale = 0.0;
        }
        scales.extend(upper_half(scale));
        for group in 0..block.len().div_ceil(4) {
            let places = 4 * group..block.len().min(4 * group + 4);
            let mut order: Vec<usize> = places.clone().collect();
            if rules.later_wins {
                order.reverse();
            }
            // A stable sort, the largest first. All of a block of zeros count as equal.
            let size = |at: usize| if scale == 0.0 { 0.0 } else { block[at].abs() };
            order.sort_by(|&a, &b| size(b).total_cmp(&size(a)));
            let kept = if sparse { &order[..order.len().min(2)] } else { &order[..] };
            for at in places {
                if sparse {
                    bitmap.push(kept.contains(&at));
                }
                if !kept.contains(&at) {
                    continue;
                }
                let mut q = 0.0;
                if scale != 0.0 {
                    let quotient =
                        if rules.divides { block[at] / scale as f32 } else { block[at] * (1.0 / scale as f32) };
                    q = (rules.round)(quotient).clamp(-q_max, q_max);
                }
                nibbles.push(q as i8);
                let rest = f64::from(block[at]) - f64::from(q) * scale;
                assert!(f64::from(rest as f32) == rest, "what is left is an f32");
                left[at] = rest as f32;
            }
            // The last byte of a bitmap is filled up with zeros.
            if sparse && group + 1 == block.len().div_ceil(4) {
                bitmap.resize(bitmap.len().next_multiple_of(8), false);
            }
        }
        if q_max == 127.0 {
            values.extend(nibbles.drain(..).map(|q| q as u8));
        } else {
            values.extend(nibbles.chunks(2).map(|q| q[0] as u8 & 15 | (*q.get(1).unwrap_or(&0) as u8 & 15) << 4));
            nibbles.clear();
        }
    }
    let bytes = bitmap.chunks(8).map(|bits| bits.iter().rev().fold(0u8, |byte, &bit| 2 * byte + u8::from(bit)));
    Encoded::new(Found::Finite, &[scales, bytes.collect(), values].concat(), &left)
}

/// Decodes what an encoder has written.
pub(super) fn decode(codec: Codec, payload: &[u8], elements: usize) -> Vec<f32> {
    let float = |bytes: [u8; 4]| f32::from_le_bytes(bytes);
    let bf16 = |at: usize| float([0, 0, payload[at], payload[at + 1]]);
    let Some((q_max, sparse)) = shape(codec) else {
        return (0..elements)
            .map(|i| {
                if codec == Codec::Bf16 { bf16(2 * i) } else { float(payload[4 * i..4 * i + 4].try_into().expect("4")) }
            })
            .collect();
    };
    let bitmap = 2 * elements.div_ceil(128);
    let values = bitmap + if sparse { elements.div_ceil(8) } else { 0 };
    let mut next = 0;
    (0..elements)
        .map(|i| {
            if sparse && payload[bitmap + i / 8] >> (i % 8) & 1 == 0 {
                return 0.0;
            }
            let q = if q_max == 127.0 {
                i32::from(payload[values + next] as i8)
            } else {
                let nibble = i32::from(payload[values + next / 2] >> (4 * (next % 2)) & 15);
                if nibble < 8 { nibble } else { nibble - 16 }
            };
            next += 1;
            (f64::from(q) * f64::from(bf16(2 * (i / 128)))) as f32
        })
        .collect()
}
