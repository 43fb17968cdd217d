//! Bytes that were checked, and how they are decoded and added.

use thiserror::Error;

use super::layout::Planes;
use super::{Codec, bf16, block, fp32};
use crate::BLOCK;
use crate::kernel::{Level, Stores};

/// Why a payload cannot be decoded. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PayloadError {
    /// The payload has not the length that its codec gives to so many elements.
    #[error("a {codec} payload of {elements} elements has {expected} bytes, {found} came: it was cut, or is another's")]
    Length {
        /// The codec.
        codec: Codec,
        /// Elements that were expected.
        elements: usize,
        /// Bytes that were expected.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A value that no encoder writes.
    #[error("a {codec} payload has {what} in block {block}, which no encoder writes: it was damaged on its way")]
    Value {
        /// The codec.
        codec: Codec,
        /// Which block, counted from 0.
        block: usize,
        /// What stands there.
        what: &'static str,
    },
}

/// The payload of some elements. Whoever has one knows that it was checked: decoding cannot fail, and every element is
/// finite. `B` holds the bytes: a slice, or whatever shares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload<B> {
    codec: Codec,
    elements: usize,
    bytes: B,
}

/// What an owner adds.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a, B> {
    /// What another rank sent.
    Encoded(&'a Payload<B>),
    /// Its own.
    Values(&'a [f32]),
}

impl<B: AsRef<[u8]>> Payload<B> {
    /// Checks the payload of so many elements.
    ///
    /// # Errors
    /// No encoder of this codec makes these bytes of so many elements.
    pub fn new(codec: Codec, elements: usize, bytes: B) -> Result<Self, PayloadError> {
        // No slice has more elements; beyond, sizes would wrap around.
        let elements = elements.min(isize::MAX as usize / size_of::<f32>());
        let (expected, found) = (codec.payload_bytes(elements), bytes.as_ref().len());
        if expected != found {
            return Err(PayloadError::Length { codec, elements, expected, found });
        }
        let payload = Self { codec, elements, bytes };
        match payload.fault() {
            Some((block, what)) => Err(PayloadError::Value { codec, block, what }),
            None => Ok(payload),
        }
    }

    /// How the elements are written.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// How many there are.
    #[must_use]
    pub const fn elements(&self) -> usize {
        self.elements
    }

    /// Replaces `out` by the elements.
    ///
    /// # Panics
    /// When `out` has not so many.
    pub fn decode(&self, out: &mut [f32]) {
        self.decode_with(Level::best(), Stores::for_bytes(size_of_val(out)), out);
    }

    /// As [`decode`](Self::decode), with these instructions and stores. The bits are the same with all.
    ///
    /// # Panics
    /// As [`decode`](Self::decode).
    pub fn decode_with(&self, level: Level, stores: Stores, out: &mut [f32]) {
        self.check_length(out);
        level.decode(self.codec, stores, self.planes(), out);
    }

    /// Adds the elements to `sum`.
    ///
    /// # Panics
    /// When `sum` has not so many.
    pub fn decode_add(&self, sum: &mut [f32]) {
        self.decode_add_with(Level::best(), sum);
    }

    /// As [`decode_add`](Self::decode_add), with these instructions. The bits are the same with all.
    ///
    /// # Panics
    /// As [`decode_add`](Self::decode_add).
    pub fn decode_add_with(&self, level: Level, sum: &mut [f32]) {
        self.check_length(sum);
        level.add(self.codec, self.planes(), sum);
    }

    /// As [`decode`](Self::decode), by all threads of rayon's pool.
    ///
    /// # Panics
    /// As [`decode`](Self::decode).
    pub fn par_decode(&self, out: &mut [f32]) {
        self.check_length(out);
        Level::best().par_decode(self.codec, Stores::for_bytes(size_of_val(out)), self.planes(), out);
    }

    /// As [`decode_add`](Self::decode_add), by all threads of rayon's pool.
    ///
    /// # Panics
    /// As [`decode_add`](Self::decode_add).
    pub fn par_decode_add(&self, sum: &mut [f32]) {
        self.check_length(sum);
        Level::best().par_add(self.codec, self.planes(), sum);
    }

    /// Replaces `out` by as many elements from `start` on, which begin a block and end one, or end with the last.
    ///
    /// # Panics
    /// When there are not so many, or they begin or end within a block.
    pub fn decode_part(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        let ends = end.is_multiple_of(BLOCK) || end == self.elements;
        assert!(start.is_multiple_of(BLOCK) && ends && end <= self.elements, "{start}..{end} of {}", self.elements);
        let (_, rest) = self.planes().split_at(self.codec, start);
        let (planes, _) = rest.split_at(self.codec, out.len());
        Level::best().decode(self.codec, Stores::for_bytes(size_of_val(out)), planes, out);
    }

    /// A copy whose bytes are in `buffer`.
    #[must_use]
    pub fn copy_to(&self, mut buffer: Vec<u8>) -> Payload<Vec<u8>> {
        buffer.clear();
        buffer.extend_from_slice(self.bytes.as_ref());
        Payload { codec: self.codec, elements: self.elements, bytes: buffer }
    }

    /// The bytes.
    pub const fn bytes(&self) -> &B {
        &self.bytes
    }

    /// The bytes alone.
    #[must_use]
    pub fn into_bytes(self) -> B {
        self.bytes
    }

    pub(crate) fn planes(&self) -> Planes<'_> {
        Planes::of(self.codec, self.bytes.as_ref(), self.elements)
    }

    fn check_length(&self, out: &[f32]) {
        assert_eq!(out.len(), self.elements, "a payload of {} elements", self.elements);
    }

    /// The first block that no encoder writes, and why.
    fn fault(&self) -> Option<(usize, &'static str)> {
        Level::best().fault(self.codec, self.planes(), self.elements)
    }
}

/// The first block that no encoder writes, and why.
#[inline(always)]
pub(crate) fn first_fault(codec: Codec, mut planes: Planes<'_>, elements: usize) -> Option<(usize, &'static str)> {
    if codec.format().is_some_and(|format| block::is_plain(format, planes, elements)) {
        return None;
    }
    for number in 0..elements.div_ceil(BLOCK) {
        let elements = BLOCK.min(elements - number * BLOCK);
        let here;
        (here, planes) = planes.split_at(codec, elements);
        let what = match (codec.format(), codec) {
            (Some(format), _) => block::fault(format, here, elements),
            (None, Codec::Fp32) if fp32::has_non_finite(here.values) => Some("a value that is not finite"),
            (None, Codec::Bf16) if bf16::has_non_finite(here.values) => Some("a value that is not finite"),
            _ => None,
        };
        if let Some(what) = what {
            return Some((number, what));
        }
    }
    None
}

/// `sum` becomes zero plus every part, in their order: whoever owns a shard adds what all ranks sent, in the order of
/// their ranks. Memory is passed over once.
///
/// # Panics
/// When a part has not as many elements as `sum`.
pub fn reduce<B: AsRef<[u8]>>(parts: &[Part<'_, B>], sum: &mut [f32]) {
    check_parts(parts, sum);
    Level::best().reduce(parts, 0, sum);
}

/// As [`reduce`], by all threads of rayon's pool.
///
/// # Panics
/// As [`reduce`].
pub fn par_reduce<B: AsRef<[u8]> + Sync>(parts: &[Part<'_, B>], sum: &mut [f32]) {
    check_parts(parts, sum);
    Level::best().par_reduce(parts, 0, sum);
}

pub(super) fn check_parts<B: AsRef<[u8]>>(parts: &[Part<'_, B>], sum: &[f32]) {
    for part in parts {
        let elements = match part {
            Part::Encoded(payload) => payload.elements,
            Part::Values(values) => values.len(),
        };
        assert_eq!(elements, sum.len(), "every part has the elements of the sum");
    }
}
