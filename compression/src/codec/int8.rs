//! 8 bits an element: whole multiples, from -127 to 127, of one bfloat16 scale a block.
//!
//! The scale is rounded up, so that the largest element of a block stays within 127 multiples. It has 8 significant bits
//! and a multiple 7, so their product is exact in f32, and so is the difference to the element.

use super::bf16;
use crate::BLOCK;

const Q_MAX: f32 = 127.0;

/// Blocks with a smaller scale are sent as zeros: 1 / scale, and what is left of the block, stay normal numbers.
const SCALE_MIN: f32 = f32::from_bits((127 - 100) << 23);

/// Adding and subtracting 1.5 * 2^23 rounds half to even, for absolute values below 2^22.
const ROUND: f32 = 12_582_912.0;

pub(super) fn encode(y: &mut [f32], payload: &mut [u8]) {
    let (scales, values) = payload.split_at_mut(2 * y.len().div_ceil(BLOCK));
    let blocks = y.chunks_mut(BLOCK).zip(values.chunks_mut(BLOCK)).zip(scales.chunks_exact_mut(2));
    for ((y, values), scale) in blocks {
        let largest = f32::from_bits(super::largest(y).cast_unsigned());
        let bits = bf16::round_up(largest / Q_MAX);
        let s = bf16::value(bits);
        if s < SCALE_MIN {
            // The payload is zeros already; all of the block stays behind.
            continue;
        }
        scale.copy_from_slice(&bits.to_le_bytes());
        let inverse = 1.0 / s;
        for (y, value) in y.iter_mut().zip(values) {
            // The bounds are whole, so that it is the same to clamp before rounding.
            let shifted = (*y * inverse).clamp(-Q_MAX, Q_MAX) + ROUND;
            // The low byte of the shifted number is the multiple in two's complement.
            *value = shifted.to_bits() as u8;
            *y = (*y - (shifted - ROUND) * s) + 0.0;
        }
    }
}

pub(super) fn each(payload: &[u8], out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    let (scales, values) = payload.split_at(2 * out.len().div_ceil(BLOCK));
    let blocks = out.chunks_mut(BLOCK).zip(values.chunks(BLOCK)).zip(scales.chunks_exact(2));
    for ((out, values), scale) in blocks {
        let s = bf16::value(u16::from_le_bytes([scale[0], scale[1]]));
        for (out, value) in out.iter_mut().zip(values) {
            put(out, f32::from(*value as i8) * s);
        }
    }
}

pub(super) fn fault(payload: &[u8], elements: usize) -> Option<(usize, &'static str)> {
    let (scales, values) = payload.split_at(2 * elements.div_ceil(BLOCK));
    for (block, (scale, values)) in scales.chunks_exact(2).zip(values.chunks(BLOCK)).enumerate() {
        let bits = u16::from_le_bytes([scale[0], scale[1]]);
        let s = bf16::value(bits);
        if bits != 0 && !(SCALE_MIN..super::TOO_LARGE).contains(&s) {
            return Some((block, "a scale out of range"));
        }
        if bits == 0 && values.iter().any(|&value| value != 0) {
            return Some((block, "values without a scale"));
        }
        if values.contains(&0x80) {
            return Some((block, "the value -128"));
        }
    }
    None
}
