//! The codecs: how the elements of one tensor become bytes and back.
//!
//! - `layout`: where the parts of a payload lie.
//! - `block`: the block codecs, element by element: the reference of every faster kernel.
//! - `bf16`, `fp32`: the codecs without blocks.
//! - `payload`: bytes that were checked, and how they are decoded and added.
//! - `owner`: an owner's sum, its encoding and its decoding in one pass.
//!
//! `docs/payload-format.md` draws every payload byte by byte. A lossy codec quantises blocks of [`BLOCK`](crate::BLOCK)
//! elements; what it leaves out of a block is returned exactly, so that nothing is lost if it is added to later
//! gradients (error feedback: Seide et al. 2014; Karimireddy et al. 2019, <https://arxiv.org/abs/1901.09847>).

pub(crate) mod bf16;
pub(crate) mod block;
pub(crate) mod fp32;
pub(crate) mod layout;
mod owner;
pub(crate) mod payload;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::kernel::{Level, Stores};
use layout::PlanesMut;

pub use owner::Owned;
pub(crate) use owner::Passed;
pub use payload::{Part, Payload, PayloadError, par_reduce, reduce};

/// How the elements of a tensor become bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// 32 bits an element: the reference that every other codec is compared with.
    #[serde(rename = "fp32")]
    Fp32,
    /// 16 bits an element: bfloat16, rounded half to even.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8.125 bits an element: one bf16 scale a block, rounded up, and whole multiples of it from -127 to 127.
    #[serde(rename = "int8")]
    Int8,
    /// 4.125 bits an element: as `int8`, from -7 to 7.
    #[serde(rename = "int4")]
    Int4,
    /// 5.125 bits an element: the two largest of every four, as `int8`, and a bit for each element that says which.
    #[serde(rename = "sparse24-int8")]
    Sparse24Int8,
    /// 3.125 bits an element: the two largest of every four, as `int4`, and a bit for each element that says which.
    #[serde(rename = "sparse24-int4")]
    Sparse24Int4,
}

/// What an encoder found in its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Found {
    /// Every element can be sent.
    Finite,
    /// An element of `y`, or of the new residual, is NaN, infinite, or at least 2^126: neither the payload nor what became
    /// of the values is to be used, and the step is to be skipped by all. The old residual is as it was.
    NonFinite,
}

/// From here on an absolute value counts as not finite: sums and scales would overflow.
pub const TOO_LARGE: f32 = f32::from_bits((127 + 126) << 23);

impl Codec {
    /// Every codec, in the order in which a user should read them: from the most bits to the fewest.
    pub const ALL: [Self; 6] = [Self::Fp32, Self::Bf16, Self::Int8, Self::Sparse24Int8, Self::Int4, Self::Sparse24Int4];

    /// The name that recipes, metrics and frames use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Sparse24Int8 => "sparse24-int8",
            Self::Sparse24Int4 => "sparse24-int4",
        }
    }

    /// The codec of that name, or `None`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// The codec of the second stage, which carries the owner's sum back to all ranks. Where the first stage sends two
    /// of four elements, the sum of several ranks has more than two; so the second stage of every codec of fewer bits
    /// than `int8` is `int8`.
    #[must_use]
    pub const fn second_stage(self) -> Self {
        match self {
            Self::Fp32 => Self::Fp32,
            Self::Bf16 => Self::Bf16,
            Self::Int8 | Self::Int4 | Self::Sparse24Int8 | Self::Sparse24Int4 => Self::Int8,
        }
    }

    /// Whether encoding leaves something out, so that there is a residual to keep.
    #[must_use]
    pub const fn is_lossy(self) -> bool {
        !matches!(self, Self::Fp32)
    }

    /// The part of a residual that stays behind in each step: 31 / 32 where two of four elements are sent, else 0. The
    /// rest of it is added to the gradient.
    #[must_use]
    pub const fn hold(self) -> f32 {
        match self.format() {
            Some(format) => format.hold(),
            None => 0.0,
        }
    }

    /// Encodes `y` into `payload`; `values` becomes the new residual. With `held = residual * hold`, rounded,
    ///
    /// ```text
    /// y = (values + (residual - held)) + 0.0
    /// decode(payload) + left == y, bit for bit
    /// new residual = left + held
    /// ```
    ///
    /// where [`hold`](Self::hold) is 0 in all codecs but the sparse ones: there `y` is gradient and residual, and the new
    /// residual is what is left. `residual - held` is exact. The slices start on a block border of their tensor. The
    /// values of a large payload are written past the caches if they lie on a multiple of 64 bytes. Nothing is allocated.
    ///
    /// The new residual takes the place of the gradient, which is needed no more, and the old one stays as it was. So a
    /// step that is skipped leaves no trace, and a step that counts makes the one buffer the residual and the other the
    /// next gradient's: 8 bytes an element for both.
    ///
    /// # Panics
    /// When the slices differ in length, or the payload has not [`payload_bytes`](Self::payload_bytes).
    pub fn encode(self, values: &mut [f32], residual: &[f32], payload: &mut [u8]) -> Found {
        self.encode_with(Level::best(), Stores::for_bytes(payload.len()), values, residual, payload)
    }

    /// As [`encode`](Self::encode), with these instructions and stores. The bits are the same with all.
    ///
    /// # Panics
    /// As [`encode`](Self::encode).
    pub fn encode_with(
        self,
        level: Level,
        stores: Stores,
        values: &mut [f32],
        residual: &[f32],
        payload: &mut [u8],
    ) -> Found {
        let out = self.check_lengths(values, residual, payload);
        level.encode(self, stores, values, residual, out)
    }

    /// As [`encode`](Self::encode), by all threads of rayon's pool.
    ///
    /// # Panics
    /// As [`encode`](Self::encode).
    pub fn par_encode(self, values: &mut [f32], residual: &[f32], payload: &mut [u8]) -> Found {
        let stores = Stores::for_bytes(payload.len());
        let out = self.check_lengths(values, residual, payload);
        Level::best().par_encode(self, stores, values, residual, out)
    }

    /// Writes the payload of `elements` zeros.
    ///
    /// # Panics
    /// When the payload has not [`payload_bytes`](Self::payload_bytes).
    pub fn write_zeros(self, elements: usize, payload: &mut [u8]) {
        assert_eq!(payload.len(), self.payload_bytes(elements), "a {self} payload of {elements} elements");
        match self.format() {
            Some(format) => block::write_zeros(format, elements, &mut PlanesMut::of(self, payload, elements)),
            None => payload.fill(0),
        }
    }

    fn check_lengths<'a>(self, values: &[f32], residual: &[f32], payload: &'a mut [u8]) -> PlanesMut<'a> {
        let n = values.len();
        assert_eq!(residual.len(), n, "a residual for every element");
        assert_eq!(payload.len(), self.payload_bytes(n), "a {self} payload of {n} elements");
        PlanesMut::of(self, payload, n)
    }
}

/// Whether no value is infinite or NaN.
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    block::largest(values) < f32::INFINITY.to_bits()
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
pub(crate) mod tests;
