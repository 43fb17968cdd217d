//! The kernels over whole blocks, made of what [`Simd`] does to half a block.
//!
//! A block goes through registers once: gradient and residual are read, and values and what is left written, a single
//! time; what is left replaces the gradient, so that no other memory is touched. Everything here is inlined into functions that turn the instructions on.

use super::Stores;
use super::simd::Simd;
use crate::BLOCK;
use crate::codec::block::{self, LOOK_FROM, Scale};
use crate::codec::layout::{Format, Planes, PlanesMut, Width};
use crate::codec::{Found, TOO_LARGE, bf16};

const HALF: usize = BLOCK / 2;

/// How far ahead memory is asked for: a page. The processor's own prefetching ends at the borders of pages.
const AHEAD: usize = 8 * BLOCK;
/// What is dense keeps everything.
const ALL: u64 = u64::MAX;

/// Encodes whole blocks.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn encode<S: Simd>(
    format: Format,
    stores: Stores,
    values: &mut [f32],
    residual: &[f32],
    out: &mut PlanesMut<'_>,
) -> Found {
    let n = values.len();
    assert!(n.is_multiple_of(BLOCK) && residual.len() == n, "whole blocks");
    let (value_bytes, bitmap_bytes) = (format.value_bytes(BLOCK), format.bitmap_bytes(BLOCK));
    assert!(out.scales.len() == Format::scale_bytes(n) && out.values.len() == format.value_bytes(n), "the planes");
    assert_eq!(out.bitmap.len(), format.bitmap_bytes(n), "the planes");
    let stream = streams(stores, out.values);
    let mut found = Found::Finite;
    for at in 0..n / BLOCK {
        // SAFETY: the assertions above keep every pointer inside its slice.
        unsafe {
            let (y, r) = (values.as_mut_ptr().add(at * BLOCK), residual.as_ptr().add(at * BLOCK));
            S::prefetch(y.wrapping_add(AHEAD));
            S::prefetch(r.wrapping_add(AHEAD));
            let (held_low, released_low) = split::<S>(format, S::load(r));
            let (held_high, released_high) = split::<S>(format, S::load(r.add(HALF)));
            let low = add_released::<S>(format, S::load(y), released_low);
            let high = add_released::<S>(format, S::load(y.add(HALF)), released_high);
            let largest = S::largest(low, high);
            if largest >= TOO_LARGE.to_bits() {
                found = Found::NonFinite;
                break;
            }
            let to = out.values.as_mut_ptr().add(at * value_bytes);
            let Some(scale) = Scale::of(f32::from_bits(largest), format.width) else {
                if !remember::<S>(format, largest, y, [low, high], [held_low, held_high]) {
                    found = Found::NonFinite;
                    break;
                }
                let mut zeros = PlanesMut {
                    scales: &mut out.scales[2 * at..2 * at + 2],
                    bitmap: &mut out.bitmap[at * bitmap_bytes..(at + 1) * bitmap_bytes],
                    values: &mut out.values[at * value_bytes..(at + 1) * value_bytes],
                };
                block::write_zeros(format, BLOCK, &mut zeros);
                continue;
            };
            out.scales.as_mut_ptr().add(2 * at).cast::<[u8; 2]>().write(scale.bits.to_le_bytes());
            let kept = if format.sparse { [S::two_largest(low), S::two_largest(high)] } else { [ALL; 2] };
            let (low, left_low) = S::quantise(low, kept[0], scale.inverse, scale.value);
            let (high, left_high) = S::quantise(high, kept[1], scale.inverse, scale.value);
            if !remember::<S>(format, largest, y, [left_low, left_high], [held_low, held_high]) {
                found = Found::NonFinite;
                break;
            }
            if format.sparse {
                let bitmap = out.bitmap.as_mut_ptr().add(at * bitmap_bytes).cast::<[[u8; 8]; 2]>();
                bitmap.write([kept[0].to_le_bytes(), kept[1].to_le_bytes()]);
            }
            match (format.sparse, format.width) {
                (false, Width::Eight) => {
                    put_bytes::<S>(stream, to, low);
                    put_bytes::<S>(stream, to.add(HALF), high);
                }
                (false, Width::Four) => {
                    put_half::<S>(stream, to, S::nibbles(low));
                    put_half::<S>(stream, to.add(HALF / 2), S::nibbles(high));
                }
                (true, Width::Eight) => {
                    put_bytes::<S>(stream, to, S::compress(low, kept[0], high, kept[1]));
                }
                (true, Width::Four) => {
                    put_half::<S>(stream, to, S::nibbles(S::compress(low, kept[0], high, kept[1])));
                }
            }
        }
    }
    if stream {
        // SAFETY: the caller vouches for the instructions.
        unsafe { S::fence() };
    }
    found
}

/// What of a residual stays behind, and what is added to the gradient: exactly the rest (Sterbenz 1974).
#[inline(always)]
unsafe fn split<S: Simd>(format: Format, residual: S::Floats) -> (S::Floats, S::Floats) {
    // SAFETY: the caller's.
    unsafe {
        if format.hold() == 0.0 {
            return (S::zero(), residual);
        }
        let held = S::times(residual, format.hold());
        (held, S::subtract(residual, held))
    }
}

/// Gradient and what is released of the residual, without -0.0, which would be another encoding of nothing.
#[inline(always)]
unsafe fn add_released<S: Simd>(format: Format, gradient: S::Floats, released: S::Floats) -> S::Floats {
    // SAFETY: the caller's.
    unsafe {
        let sum = S::add(gradient, released);
        // A difference is never -0.0 (of equal numbers it is 0.0), and a sum only if both its parts are. A residual may be.
        if format.hold() == 0.0 { S::add(sum, S::zero()) } else { sum }
    }
}

/// Writes the new residual of a whole block: what is left of it and what stayed behind. False if it is too large, of which
/// the bits of the largest `y` tell whether it has to be looked at.
#[inline(always)]
unsafe fn remember<S: Simd>(
    format: Format,
    largest: u32,
    to: *mut f32,
    left: [S::Floats; 2],
    held: [S::Floats; 2],
) -> bool {
    // SAFETY: the caller's, for a whole block.
    unsafe {
        if format.hold() == 0.0 {
            put::<S>(false, to, left);
            return true;
        }
        let residual = [S::add(left[0], held[0]), S::add(left[1], held[1])];
        put::<S>(false, to, residual);
        largest < LOOK_FROM.to_bits() || S::largest(residual[0], residual[1]) < TOO_LARGE.to_bits()
    }
}

/// Whether to write past the caches: only what lies on the right borders can be.
#[inline(always)]
fn streams<T>(stores: Stores, to: &[T]) -> bool {
    stores == Stores::Stream && to.as_ptr().addr().is_multiple_of(64)
}

#[inline(always)]
unsafe fn put<S: Simd>(stream: bool, to: *mut f32, [low, high]: [S::Floats; 2]) {
    // SAFETY: the caller's, for a whole block.
    unsafe {
        if stream {
            S::stream(to, low);
            S::stream(to.add(HALF), high);
        } else {
            S::store(to, low);
            S::store(to.add(HALF), high);
        }
    }
}

#[inline(always)]
unsafe fn put_bytes<S: Simd>(stream: bool, to: *mut u8, bytes: S::Bytes) {
    // SAFETY: the caller's.
    unsafe { if stream { S::stream_bytes(to, bytes) } else { S::store_bytes(to, bytes) } }
}

#[inline(always)]
unsafe fn put_half<S: Simd>(stream: bool, to: *mut u8, bytes: S::Half) {
    // SAFETY: the caller's.
    unsafe { if stream { S::stream_half(to, bytes) } else { S::store_half(to, bytes) } }
}

/// The values of one block as bytes, by halves, and its scale.
///
/// # Safety
/// As for [`encode`]; the planes have block number `at`.
#[inline(always)]
unsafe fn bytes_of<S: Simd>(format: Format, planes: Planes<'_>, at: usize) -> ([S::Bytes; 2], f32) {
    // SAFETY: the caller's.
    unsafe {
        let scale = planes.scales.as_ptr().add(2 * at).cast::<[u8; 2]>().read();
        let values = planes.values.as_ptr().add(at * format.value_bytes(BLOCK));
        let bytes = if format.sparse {
            let bitmap = planes.bitmap.as_ptr().add(at * format.bitmap_bytes(BLOCK)).cast::<[[u8; 8]; 2]>().read();
            let (low, high) = match format.width {
                Width::Eight => (S::load_half(values), S::load_half(values.add(HALF / 2))),
                Width::Four => S::halves(S::unnibble(S::load_half(values))),
            };
            [S::expand(low, u64::from_le_bytes(bitmap[0])), S::expand(high, u64::from_le_bytes(bitmap[1]))]
        } else {
            match format.width {
                Width::Eight => [S::load_bytes(values), S::load_bytes(values.add(HALF))],
                Width::Four => [S::unnibble(S::load_half(values)), S::unnibble(S::load_half(values.add(HALF / 2)))],
            }
        };
        (bytes, bf16::value(u16::from_le_bytes(scale)))
    }
}

fn check_planes(format: Format, planes: &Planes<'_>, elements: usize) {
    assert!(elements.is_multiple_of(BLOCK), "whole blocks");
    assert!(planes.scales.len() == Format::scale_bytes(elements), "the planes");
    assert!(planes.bitmap.len() == format.bitmap_bytes(elements), "the planes");
    assert!(planes.values.len() == format.value_bytes(elements), "the planes");
}

/// Decodes whole blocks.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(format: Format, stores: Stores, planes: Planes<'_>, out: &mut [f32]) {
    check_planes(format, &planes, out.len());
    let stream = streams(stores, out);
    for at in 0..out.len() / BLOCK {
        // SAFETY: the assertions above keep every pointer inside its slice.
        unsafe {
            let (bytes, scale) = bytes_of::<S>(format, planes, at);
            let values = [S::scaled(bytes[0], scale), S::scaled(bytes[1], scale)];
            put::<S>(stream, out.as_mut_ptr().add(at * BLOCK), values);
        }
    }
    if stream {
        // SAFETY: the caller vouches for the instructions.
        unsafe { S::fence() };
    }
}

/// Decodes whole blocks and adds them.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
pub(super) unsafe fn decode_add<S: Simd>(format: Format, planes: Planes<'_>, sum: &mut [f32]) {
    check_planes(format, &planes, sum.len());
    for at in 0..sum.len() / BLOCK {
        // SAFETY: the assertions above keep every pointer inside its slice.
        unsafe {
            S::prefetch(sum.as_ptr().wrapping_add(at * BLOCK + AHEAD));
            let (bytes, scale) = bytes_of::<S>(format, planes, at);
            let (low, high) = (sum.as_mut_ptr().add(at * BLOCK), sum.as_mut_ptr().add(at * BLOCK + HALF));
            S::store(low, S::scaled_add(bytes[0], scale, S::load(low)));
            S::store(high, S::scaled_add(bytes[1], scale, S::load(high)));
        }
    }
}
