//! Where the parts of a payload lie. `docs/payload-format.md` draws them byte by byte.
//!
//! A block codec's payload is planar: all scales, then all bitmaps, then all values. So a kernel reads and writes whole
//! vectors, and any run of whole blocks is a run in each plane.

use super::Codec;
use crate::BLOCK;

/// How a block codec writes a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// How wide a value is.
    pub(crate) width: Width,
    /// Whether two of every four elements are sent, and a bitmap says which.
    pub(crate) sparse: bool,
}

/// Bits of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// From -127 to 127, a byte each.
    Eight,
    /// From -7 to 7, two in a byte.
    Four,
}

impl Width {
    /// The largest multiple of the scale.
    pub(crate) const fn q_max(self) -> f32 {
        match self {
            Self::Eight => 127.0,
            Self::Four => 7.0,
        }
    }

    /// Bytes of so many values.
    pub(crate) const fn bytes(self, values: usize) -> usize {
        match self {
            Self::Eight => values,
            Self::Four => values.div_ceil(2),
        }
    }
}

impl Codec {
    /// How blocks are written; `None` for a codec without blocks.
    pub(crate) const fn format(self) -> Option<Format> {
        let (width, sparse) = match self {
            Self::Fp32 | Self::Bf16 => return None,
            Self::Int8 => (Width::Eight, false),
            Self::Int4 => (Width::Four, false),
            Self::Sparse24Int8 => (Width::Eight, true),
            Self::Sparse24Int4 => (Width::Four, true),
        };
        Some(Format { width, sparse })
    }

    /// Bytes of each plane: scales, bitmap, values. A codec without blocks has values alone.
    const fn plane_bytes(self, elements: usize) -> [usize; 3] {
        match self.format() {
            Some(format) => {
                [Format::scale_bytes(elements), format.bitmap_bytes(elements), format.value_bytes(elements)]
            }
            None if matches!(self, Self::Fp32) => [0, 0, 4 * elements],
            None => [0, 0, 2 * elements],
        }
    }

    /// Bytes of the payload of `elements` elements, framing not counted.
    #[must_use]
    pub const fn payload_bytes(self, elements: usize) -> usize {
        let [scales, bitmap, values] = self.plane_bytes(elements);
        scales + bitmap + values
    }
}

impl Format {
    /// The part of a residual that stays behind in a step; the rest is added to the gradient. A dense block holds nothing
    /// back. What a sparse one leaves out is half of the elements, whole; sent at once it would come late in lumps, and
    /// late gradients take damping from AdamW's first moment (`docs/compression.md`). So it comes slowly: the share that
    /// is released in a step is exact in f32 whatever this is, and 31 / 32 has 5 bits.
    pub(crate) const fn hold(self) -> f32 {
        if self.sparse { 31.0 / 32.0 } else { 0.0 }
    }

    /// Elements of `elements` that have a value: two of every four, and of a last group of fewer the two that are there.
    pub(crate) const fn kept(self, elements: usize) -> usize {
        if !self.sparse {
            return elements;
        }
        let rest = elements % 4;
        elements / 4 * 2 + if rest < 2 { rest } else { 2 }
    }

    pub(crate) const fn scale_bytes(elements: usize) -> usize {
        2 * elements.div_ceil(BLOCK)
    }

    pub(crate) const fn bitmap_bytes(self, elements: usize) -> usize {
        if self.sparse { elements.div_ceil(8) } else { 0 }
    }

    pub(crate) const fn value_bytes(self, elements: usize) -> usize {
        self.width.bytes(self.kept(elements))
    }
}

/// The planes of a payload, or of a run of its blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes<'a> {
    pub(crate) scales: &'a [u8],
    pub(crate) bitmap: &'a [u8],
    pub(crate) values: &'a [u8],
}

impl<'a> Planes<'a> {
    /// The planes of a payload, which has the bytes of its elements.
    pub(crate) fn of(codec: Codec, payload: &'a [u8], elements: usize) -> Self {
        debug_assert_eq!(payload.len(), codec.payload_bytes(elements));
        let [scales, bitmap, _] = codec.plane_bytes(elements);
        let (scales, rest) = payload.split_at(scales);
        let (bitmap, values) = rest.split_at(bitmap);
        Self { scales, bitmap, values }
    }

    /// The planes of the first `elements`, which are whole blocks or everything, and those of the rest.
    pub(crate) fn split_at(self, codec: Codec, elements: usize) -> (Self, Self) {
        let [scales, bitmap, values] = codec.plane_bytes(elements);
        let (scales, scales_rest) = self.scales.split_at(scales);
        let (bitmap, bitmap_rest) = self.bitmap.split_at(bitmap);
        let (values, values_rest) = self.values.split_at(values);
        let rest = Self { scales: scales_rest, bitmap: bitmap_rest, values: values_rest };
        (Self { scales, bitmap, values }, rest)
    }
}

/// As [`Planes`], to be written.
#[derive(Debug)]
pub(crate) struct PlanesMut<'a> {
    pub(crate) scales: &'a mut [u8],
    pub(crate) bitmap: &'a mut [u8],
    pub(crate) values: &'a mut [u8],
}

impl<'a> PlanesMut<'a> {
    /// The same planes, for a shorter time.
    pub(crate) const fn reborrow(&mut self) -> PlanesMut<'_> {
        PlanesMut { scales: self.scales, bitmap: self.bitmap, values: self.values }
    }

    /// What was written.
    pub(crate) const fn read(&self) -> Planes<'_> {
        Planes { scales: self.scales, bitmap: self.bitmap, values: self.values }
    }

    /// The planes of a payload, which has the bytes of its elements.
    pub(crate) fn of(codec: Codec, payload: &'a mut [u8], elements: usize) -> Self {
        debug_assert_eq!(payload.len(), codec.payload_bytes(elements));
        let [scales, bitmap, _] = codec.plane_bytes(elements);
        let (scales, rest) = payload.split_at_mut(scales);
        let (bitmap, values) = rest.split_at_mut(bitmap);
        Self { scales, bitmap, values }
    }

    /// The planes of the first `elements`, which are whole blocks or everything, and those of the rest.
    pub(crate) fn split_at(self, codec: Codec, elements: usize) -> (Self, Self) {
        let [scales, bitmap, values] = codec.plane_bytes(elements);
        let (scales, scales_rest) = self.scales.split_at_mut(scales);
        let (bitmap, bitmap_rest) = self.bitmap.split_at_mut(bitmap);
        let (values, values_rest) = self.values.split_at_mut(values);
        let rest = Self { scales: scales_rest, bitmap: bitmap_rest, values: values_rest };
        (Self { scales, bitmap, values }, rest)
    }
}
