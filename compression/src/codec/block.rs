//! One block, element by element: the reference that every faster kernel must equal bit for bit.
//!
//! A block of up to 128 elements has one scale `s`, a bfloat16 rounded **up** from `largest |y| / q_max`, and whole
//! multiples `q` of it. The scale has 8 significant bits and a multiple at most 7, so `q * s` is exact in f32, and so is
//! what is left, `y - q * s`: error feedback (Seide et al. 2014; Karimireddy et al. 2019,
//! <https://arxiv.org/abs/1901.09847>) loses nothing. A sparse codec sends the two largest of every four elements (2:4,
//! Mishra et al. 2021, <https://arxiv.org/abs/2104.08378>); the other two stay behind whole, and come back slowly:
//! of each residual a part is held back ([`Format::hold`]).

use super::layout::{Format, Planes, PlanesMut, Width};
use super::{Found, TOO_LARGE, bf16};
use crate::BLOCK;

/// Blocks with a smaller scale are sent as zeros: 1 / scale, and what is left of the block, stay normal numbers.
pub(crate) const SCALE_MIN: f32 = f32::from_bits((127 - 100) << 23);

/// In a block whose `y` are smaller, residuals below 2^126 become residuals below 2^126: at most 31 / 32 of one is held, to
/// which less than the other thirty-second is added. So new ones are looked at in no other blocks than those from here on.
pub(crate) const LOOK_FROM: f32 = f32::from_bits((127 + 121) << 23);

/// Adding and subtracting 1.5 * 2^23 rounds half to even, for absolute values below 2^22.
const ROUND: f32 = 12_582_912.0;

/// In a block of zeros the two that count as the largest are the first two: ties go to the lower index.
const FIRST_TWO: u8 = 0b0011_0011;

/// The scale of a block, as it is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) bits: u16,
    pub(crate) value: f32,
    pub(crate) inverse: f32,
}

impl Scale {
    /// The scale of a block whose largest absolute value this is; `None` when the block is sent as zeros.
    #[inline(always)]
    pub(crate) fn of(largest: f32, width: Width) -> Option<Self> {
        let bits = bf16::round_up(largest / width.q_max());
        let value = bf16::value(bits);
        (value >= SCALE_MIN).then(|| Self { bits, value, inverse: 1.0 / value })
    }

    /// The largest that an encoder writes.
    fn bits_max(width: Width) -> u16 {
        bf16::round_up(f32::from_bits(TOO_LARGE.to_bits() - 1) / width.q_max())
    }
}

/// The bits of the largest absolute value. Without their signs, floats are in the order of their bits, and infinities
/// and NaN come last; a compiler makes wide instructions of integers' maximum, and not of floats'.
#[inline(always)]
pub(crate) fn largest(values: &[f32]) -> u32 {
    values.iter().fold(0, |largest, value| largest.max((value.to_bits() & 0x7fff_ffff).cast_signed())).cast_unsigned()
}

/// Encodes the block whose gradient is `values`, which becomes the new residual.
pub(crate) fn encode(format: Format, values: &mut [f32], residual: &[f32], out: &mut PlanesMut<'_>) -> Found {
    let hold = format.hold();
    for (value, r) in values.iter_mut().zip(residual) {
        // What is released is exact (Sterbenz 1974). Adding zero turns -0.0 into 0.0, which has one encoding only.
        *value = (*value + (r - r * hold)) + 0.0;
    }
    let largest_y = largest(values);
    if largest_y >= TOO_LARGE.to_bits() {
        return Found::NonFinite;
    }
    encode_sum(format, values, f32::from_bits(largest_y), out);
    if hold == 0.0 {
        return Found::Finite;
    }
    for (value, r) in values.iter_mut().zip(residual) {
        *value += r * hold;
    }
    // Else it could become so large that no step after it could be sent.
    let is_too_large = largest_y >= LOOK_FROM.to_bits() && largest(values) >= TOO_LARGE.to_bits();
    if is_too_large { Found::NonFinite } else { Found::Finite }
}

/// Encodes the block whose elements are `y`, which becomes what is left of it.
fn encode_sum(format: Format, y: &mut [f32], largest: f32, out: &mut PlanesMut<'_>) {
    let Some(scale) = Scale::of(largest, format.width) else {
        write_zeros(format, y.len(), out);
        return;
    };
    out.scales.copy_from_slice(&scale.bits.to_le_bytes());
    let mut values = [0u8; BLOCK];
    let mut kept = 0;
    if format.sparse {
        let mut nibbles = [0u8; BLOCK / 4];
        for (group, nibble) in y.chunks_mut(4).zip(&mut nibbles) {
            *nibble = two_largest(group);
            for (at, y) in group.iter_mut().enumerate() {
                if *nibble >> at & 1 == 1 {
                    values[kept] = quantise(y, &scale, format.width);
                    kept += 1;
                }
            }
        }
        for (byte, pair) in out.bitmap.iter_mut().zip(nibbles.chunks_exact(2)) {
            *byte = pair[0] | pair[1] << 4;
        }
    } else {
        kept = y.len();
        for (y, value) in y.iter_mut().zip(&mut values) {
            *value = quantise(y, &scale, format.width);
        }
    }
    match format.width {
        Width::Eight => out.values.copy_from_slice(&values[..kept]),
        Width::Four => {
            for (byte, pair) in out.values.iter_mut().zip(values.chunks_exact(2)) {
                *byte = pair[0] & 0xf | pair[1] << 4;
            }
        }
    }
}

/// What stands for a block whose elements all stay behind.
pub(crate) fn write_zeros(format: Format, elements: usize, out: &mut PlanesMut<'_>) {
    out.scales.fill(0);
    out.values.fill(0);
    if format.sparse {
        out.bitmap.fill(FIRST_TWO);
        if let (Some(last), rest @ 1..) = (out.bitmap.last_mut(), elements % 8) {
            *last &= ((1u16 << rest) - 1) as u8;
        }
    }
}

/// The multiple of the scale that is nearest to `y`, ties to even, in two's complement; `y` becomes what is left.
#[inline(always)]
fn quantise(y: &mut f32, scale: &Scale, width: Width) -> u8 {
    // The bounds are whole, so that it is the same to clamp before rounding.
    let shifted = (*y * scale.inverse).clamp(-width.q_max(), width.q_max()) + ROUND;
    *y = (*y - (shifted - ROUND) * scale.value) + 0.0;
    // The low byte of the shifted number is the multiple.
    shifted.to_bits() as u8
}

/// Which two of up to four elements are the largest without their signs, a bit each; ties go to the lower index. Fewer
/// than two are all kept.
fn two_largest(group: &[f32]) -> u8 {
    let size = |at: usize| group[at].to_bits() & 0x7fff_ffff;
    let beats = |at: usize, other: usize| size(at) > size(other) || size(at) == size(other) && at < other;
    (0..group.len())
        .filter(|&at| (0..group.len()).filter(|&other| other != at && beats(other, at)).count() < 2)
        .fold(0, |bits, at| bits | 1 << at)
}

/// Hands each element's value to `put`: 0 for one that was not sent.
#[inline(always)]
pub(crate) fn decode(format: Format, planes: Planes<'_>, out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    let s = bf16::value(u16::from_le_bytes([planes.scales[0], planes.scales[1]]));
    if !format.sparse {
        for (at, out) in out.iter_mut().enumerate() {
            put(out, value(format.width, planes.values, at) * s);
        }
        return;
    }
    for (group, out) in out.chunks_mut(4).enumerate() {
        let nibble = planes.bitmap[group / 2] >> (group % 2 * 4);
        // Whatever the bitmap says, a group has two places among the values.
        let mut next = 2 * group;
        for (at, out) in out.iter_mut().enumerate() {
            let is_kept = nibble >> at & 1 == 1 && next < 2 * group + 2;
            put(out, if is_kept { value(format.width, planes.values, next) * s } else { 0.0 });
            next += usize::from(is_kept);
        }
    }
}

fn value(width: Width, values: &[u8], at: usize) -> f32 {
    match width {
        Width::Eight => f32::from(values[at] as i8),
        Width::Four => f32::from(((values[at / 2] << (4 - at % 2 * 4)) as i8) >> 4),
    }
}

/// What in a block of `elements` no encoder writes.
#[inline(always)]
pub(crate) fn fault(format: Format, planes: Planes<'_>, elements: usize) -> Option<&'static str> {
    let bits = u16::from_le_bytes([planes.scales[0], planes.scales[1]]);
    if bits != 0 && !((SCALE_MIN.to_bits() >> 16) as u16..=Scale::bits_max(format.width)).contains(&bits) {
        return Some("a scale out of range");
    }
    if format.sparse
        && let Some(what) = bitmap_fault(planes.bitmap, elements, bits == 0)
    {
        return Some(what);
    }
    if bits == 0 && any(planes.values, |byte| byte != 0) {
        return Some("values without a scale");
    }
    match format.width {
        Width::Eight => any(planes.values, |byte| byte == 0x80).then_some("the value -128"),
        // Low half and high half: 8 is the only one whose sign bit stands alone.
        Width::Four if any(planes.values, |byte| byte & 0x0f == 0x08 || byte & 0xf0 == 0x80) => Some("the value -8"),
        Width::Four if format.kept(elements) % 2 == 1 && planes.values.last().is_some_and(|last| last >> 4 != 0) => {
            Some("half a byte after the last value")
        }
        Width::Four => None,
    }
}

/// Whether whole blocks have nothing that looks like a fault, in wide passes over the planes; if not, blocks are looked at one
/// by one: where one of them is zeros, too, as in a table.
#[inline(always)]
pub(crate) fn is_plain(format: Format, planes: Planes<'_>, elements: usize) -> bool {
    let scales = (SCALE_MIN.to_bits() >> 16) as u16..=Scale::bits_max(format.width);
    let in_range = |scale: &[u8]| scales.contains(&u16::from_le_bytes([scale[0], scale[1]]));
    let is_fault = |byte: u8| match format.width {
        Width::Eight => byte == 0x80,
        Width::Four => byte & 0x0f == 0x08 || byte & 0xf0 == 0x80,
    };
    elements.is_multiple_of(BLOCK)
        && planes.scales.chunks_exact(2).fold(true, |all, scale| all & in_range(scale))
        && !any(planes.values, is_fault)
        && (!format.sparse || !any(planes.bitmap, |byte| fours(byte) != 0x22))
}

/// Whether it is so of any byte. Without an early end, so that a compiler makes wide instructions of it.
#[inline(always)]
fn any(bytes: &[u8], is: impl Fn(u8) -> bool) -> bool {
    bytes.iter().fold(0u8, |found, &byte| found | u8::from(is(byte))) != 0
}

/// How many bits of each half of a byte are ones, in that half.
#[inline(always)]
const fn fours(byte: u8) -> u8 {
    let pairs = byte - (byte >> 1 & 0x55);
    (pairs & 0x33) + (pairs >> 2 & 0x33)
}

#[inline(always)]
fn bitmap_fault(bitmap: &[u8], elements: usize, zeros: bool) -> Option<&'static str> {
    let whole = elements / 8;
    if zeros && any(&bitmap[..whole], |byte| byte != FIRST_TWO) {
        return Some("a bitmap other than the first two of four, without a scale");
    }
    let mut wrong = any(&bitmap[..whole], |byte| fours(byte) != 0x22);
    if let (Some(&last), rest @ 1..) = (bitmap.last(), elements % 8) {
        let of = |elements: usize| elements.min(2) as u32;
        let (low, high) = (rest.min(4), rest.saturating_sub(4));
        wrong |= u32::from(last) >> rest != 0
            || (last & 0xf).count_ones() != of(low)
            || (last >> 4).count_ones() != of(high)
            || zeros && u32::from(last) != u32::from(FIRST_TWO) & ((1 << rest) - 1);
    }
    wrong.then_some("a bitmap that does not keep two of every four")
}
