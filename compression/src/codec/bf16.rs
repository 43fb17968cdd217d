//! bfloat16: the upper half of an f32, rounded half to even.

/// The nearest bfloat16, ties to even. The value is finite and below 2^126, so that it does not become infinite.
#[inline(always)]
fn round(y: f32) -> u16 {
    let bits = y.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The smallest bfloat16 that is not below `x`, which is not negative.
#[inline(always)]
pub(crate) fn round_up(x: f32) -> u16 {
    ((x.to_bits() + 0xffff) >> 16) as u16
}

/// The value of a bfloat16.
#[inline(always)]
pub(crate) fn value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Encodes `y`, all of it finite, which becomes what is left.
#[inline(always)]
pub(crate) fn encode(y: &mut [f32], payload: &mut [u8]) {
    for (bytes, y) in payload.chunks_exact_mut(2).zip(y) {
        let rounded = round(*y);
        bytes.copy_from_slice(&rounded.to_le_bytes());
        // Exact: both have the same exponent or neighbouring ones, and the difference is the bits that were cut off.
        *y = (*y - value(rounded)) + 0.0;
    }
}

#[inline(always)]
pub(crate) fn decode(payload: &[u8], out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    for (out, bytes) in out.iter_mut().zip(payload.chunks_exact(2)) {
        put(out, value(u16::from_le_bytes([bytes[0], bytes[1]])));
    }
}

/// Whether an element is infinite or NaN.
#[inline(always)]
pub(crate) fn has_non_finite(payload: &[u8]) -> bool {
    let bad = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7f80 == 0x7f80;
    payload.chunks_exact(2).fold(false, |found, bytes| found | bad(bytes))
}
