//! f32, little-endian: nothing is left out.

/// Writes `y`, all of it finite, of which nothing is left.
#[inline(always)]
pub(crate) fn encode(y: &mut [f32], payload: &mut [u8]) {
    for (bytes, y) in payload.chunks_exact_mut(4).zip(y) {
        bytes.copy_from_slice(&y.to_le_bytes());
        *y = 0.0;
    }
}

#[inline(always)]
pub(crate) fn decode(payload: &[u8], out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    for (out, bytes) in out.iter_mut().zip(payload.chunks_exact(4)) {
        put(out, f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    }
}

/// Whether an element is infinite or NaN.
#[inline(always)]
pub(crate) fn has_non_finite(payload: &[u8]) -> bool {
    let bad = |bytes: &[u8]| u16::from_le_bytes([bytes[2], bytes[3]]) & 0x7f80 == 0x7f80;
    payload.chunks_exact(4).fold(false, |found, bytes| found | bad(bytes))
}
