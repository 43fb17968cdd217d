//! The codecs: how the elements of one tensor become bytes and back.
//!
//! `docs/payload-format.md` draws every payload byte by byte. A lossy codec quantises blocks of [`BLOCK`]
//! elements; what it leaves out of a block is returned exactly, so that nothing is lost if it is added to the next
//! gradient (error feedback: Seide et al. 2014; Karimireddy et al. 2019, <https://arxiv.org/abs/1901.09847>).
//!
//! This file is the scalar reference. Faster kernels must give the same bits.

mod bf16;
mod int8;

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::BLOCK;

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
}

/// What an encoder found in its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Found {
    /// Every element can be sent.
    Finite,
    /// An element is NaN, infinite, or at least 2^126: the payload and the residual are not to be used, the step is to
    /// be skipped by all.
    NonFinite,
}

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

impl Codec {
    /// Every codec of this build, in the order in which a user should read them.
    pub const ALL: [Self; 3] = [Self::Fp32, Self::Bf16, Self::Int8];

    /// The name that recipes, metrics and frames use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// The codec of that name, or `None`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// The codec of the second stage, which carries the owner's sum back to all ranks.
    #[must_use]
    pub const fn second_stage(self) -> Self {
        self
    }

    /// Whether encoding leaves something out, so that there is a residual to keep.
    #[must_use]
    pub const fn is_lossy(self) -> bool {
        !matches!(self, Self::Fp32)
    }

    /// Bytes of the payload of `elements` elements, framing not counted.
    #[must_use]
    pub const fn payload_bytes(self, elements: usize) -> usize {
        match self {
            Self::Fp32 => 4 * elements,
            Self::Bf16 => 2 * elements,
            Self::Int8 => 2 * elements.div_ceil(BLOCK) + elements,
        }
    }

    /// Encodes `y = (gradient + residual) + 0.0` into `payload`, which is replaced, and writes what is left out to
    /// `left`: `decode(payload) + left == y`, bit for bit. The slices start on a block border of their tensor.
    ///
    /// # Panics
    /// When the three slices differ in length.
    pub fn encode(self, gradient: &[f32], residual: &[f32], payload: &mut Vec<u8>, left: &mut [f32]) -> Found {
        let n = gradient.len();
        assert!(
            residual.len() == n && left.len() == n,
            "{n} gradients, {} and {} residuals",
            residual.len(),
            left.len()
        );
        payload.clear();
        payload.resize(self.payload_bytes(n), 0);
        for ((left, g), r) in left.iter_mut().zip(gradient).zip(residual) {
            // Adding 0.0 turns -0.0 into 0.0, which has one encoding only.
            *left = (g + r) + 0.0;
        }
        if largest(left) >= TOO_LARGE.to_bits().cast_signed() {
            return Found::NonFinite;
        }
        match self {
            Self::Fp32 => {
                for (bytes, y) in payload.chunks_exact_mut(4).zip(&mut *left) {
                    bytes.copy_from_slice(&y.to_le_bytes());
                    *y = 0.0;
                }
            }
            Self::Bf16 => bf16::encode(left, payload),
            Self::Int8 => int8::encode(left, payload),
        }
        Found::Finite
    }

    /// Replaces `out` by the payload's elements.
    ///
    /// # Errors
    /// A payload that no encoder of this codec made from so many elements; `out` is as it was.
    pub fn decode(self, payload: &[u8], out: &mut [f32]) -> Result<(), PayloadError> {
        self.check(payload, out.len())?;
        self.each(payload, out, |out, value| *out = value);
        Ok(())
    }

    /// Adds the payload's elements to `sum`.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_add(self, payload: &[u8], sum: &mut [f32]) -> Result<(), PayloadError> {
        self.check(payload, sum.len())?;
        self.each(payload, sum, |sum, value| *sum += value);
        Ok(())
    }

    fn check(self, payload: &[u8], elements: usize) -> Result<(), PayloadError> {
        let (expected, found) = (self.payload_bytes(elements), payload.len());
        if expected != found {
            return Err(PayloadError::Length { codec: self, elements, expected, found });
        }
        let fault = match self {
            Self::Fp32 => fp32_fault(payload),
            Self::Bf16 => bf16::fault(payload),
            Self::Int8 => int8::fault(payload, elements),
        };
        fault.map_or(Ok(()), |(block, what)| Err(PayloadError::Value { codec: self, block, what }))
    }

    fn each(self, payload: &[u8], out: &mut [f32], put: impl Fn(&mut f32, f32)) {
        match self {
            Self::Fp32 => {
                for (out, bytes) in out.iter_mut().zip(payload.chunks_exact(4)) {
                    put(out, f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
                }
            }
            Self::Bf16 => bf16::each(payload, out, put),
            Self::Int8 => int8::each(payload, out, put),
        }
    }
}

/// The bits of the largest absolute value. Without their signs, floats are in the order of their bits, and infinities
/// and NaN come last; a compiler makes wide instructions of integers' maximum, and not of floats'.
fn largest(values: &[f32]) -> i32 {
    values.iter().fold(0, |largest, value| largest.max((value.to_bits() & 0x7fff_ffff).cast_signed()))
}

/// Whether no value is infinite or NaN.
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    largest(values) < f32::INFINITY.to_bits().cast_signed()
}

/// From here on an absolute value counts as not finite: sums and scales would overflow.
pub const TOO_LARGE: f32 = f32::from_bits((127 + 126) << 23);

fn fp32_fault(payload: &[u8]) -> Option<(usize, &'static str)> {
    let bad = |bytes: &[u8]| !f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).is_finite();
    payload.chunks_exact(4).position(bad).map(|at| (at / BLOCK, "a value that is not finite"))
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
