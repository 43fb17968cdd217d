//! bfloat16: the upper half of an f32, rounded half to even.

use crate::BLOCK;

/// The nearest bfloat16, ties to even. The value is finite and below 2^126, so that it does not become infinite.
fn round(y: f32) -> u16 {
    let bits = y.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The smallest bfloat16 that is not below `x`, which is not negative.
pub(super) fn round_up(x: f32) -> u16 {
    ((x.to_bits() + 0xffff) >> 16) as u16
}

/// The value of a bfloat16.
pub(super) fn value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

pub(super) fn encode(y: &mut [f32], payload: &mut [u8]) {
    for (bytes, y) in payload.chunks_exact_mut(2).zip(y) {
        let rounded = round(*y);
        bytes.copy_from_slice(&rounded.to_le_bytes());
        // Exact: both have the same exponent or neighbouring ones, and the difference is the bits that were cut off.
        *y = (*y - value(rounded)) + 0.0;
    }
}

pub(super) fn each(payload: &[u8], out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    for (out, bytes) in out.iter_mut().zip(payload.chunks_exact(2)) {
        put(out, value(u16::from_le_bytes([bytes[0], bytes[1]])));
    }
}

pub(super) fn fault(payload: &[u8]) -> Option<(usize, &'static str)> {
    let bad = |bytes: &[u8]| !value(u16::from_le_bytes([bytes[0], bytes[1]])).is_finite();
    payload.chunks_exact(2).position(bad).map(|at| (at / BLOCK, "a value that is not finite"))
}
