//! The codecs without blocks, and sums. A compiler makes wide instructions of these loops by itself; they are inlined
//! into functions that turn the instructions on.

use crate::BLOCK;
use crate::codec::{Codec, Found, TOO_LARGE, bf16, block, fp32};

/// `values = (values + residual) + 0.0`.
#[inline(always)]
fn add_residual(values: &mut [f32], residual: &[f32]) {
    for (value, r) in values.iter_mut().zip(residual) {
        // Adding zero turns -0.0 into 0.0, which has one encoding only.
        *value = (*value + r) + 0.0;
    }
}

/// `sum += values`, from zero on when they are the first.
#[inline(always)]
pub(super) fn add_values(values: &[f32], sum: &mut [f32], is_first: bool) {
    if is_first {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum = 0.0 + value);
    } else {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}

/// Encodes a block or less.
#[inline(always)]
pub(super) fn encode_rest(codec: Codec, values: &mut [f32], residual: &[f32], payload: &mut [u8]) -> Found {
    add_residual(values, residual);
    if block::largest(values) >= TOO_LARGE.to_bits() {
        return Found::NonFinite;
    }
    match codec {
        Codec::Fp32 => fp32::encode(values, payload),
        _ => bf16::encode(values, payload),
    }
    Found::Finite
}

#[inline(always)]
pub(super) fn encode(codec: Codec, values: &mut [f32], residual: &[f32], payload: &mut [u8]) -> Found {
    let bytes = codec.payload_bytes(BLOCK);
    let blocks = values.chunks_exact_mut(BLOCK).zip(residual.chunks_exact(BLOCK));
    for ((values, residual), payload) in blocks.zip(payload.chunks_exact_mut(bytes)) {
        if encode_rest(codec, values, residual, payload) == Found::NonFinite {
            return Found::NonFinite;
        }
    }
    Found::Finite
}

#[inline(always)]
pub(super) fn decode(codec: Codec, payload: &[u8], out: &mut [f32]) {
    match codec {
        Codec::Fp32 => fp32::decode(payload, out, |out, value| *out = value),
        _ => bf16::decode(payload, out, |out, value| *out = value),
    }
}

#[inline(always)]
pub(super) fn decode_add(codec: Codec, payload: &[u8], sum: &mut [f32]) {
    match codec {
        Codec::Fp32 => fp32::decode(payload, sum, |sum, value| *sum += value),
        _ => bf16::decode(payload, sum, |sum, value| *sum += value),
    }
}
