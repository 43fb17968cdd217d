//! Weights in few bits, for export: the same kernels as for gradients, without error feedback.
//!
//! A matrix of `[rows, columns]`, where a row holds the weights of one output, is cut into blocks of 128 along its columns,
//! the input dimension; every row starts a block of its own, and its last block may be shorter. Scales and values lie
//! apart, as the planes of a payload do (`docs/payload-format.md`), row after row: `[rows, ceil(columns / 128)]` bf16 and
//! `[rows, columns]` bytes, or `[rows, ceil(columns / 2)]` bytes of two values each for `int4`.

use rayon::prelude::*;
use thiserror::Error;

use crate::codec::layout::{Format, Planes, PlanesMut};
use crate::codec::{Codec, Found};
use crate::kernel::{Level, Stores};

/// A matrix in few bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantised {
    codec: Codec,
    rows: usize,
    columns: usize,
    /// bf16, little-endian, row after row.
    pub scales: Vec<u8>,
    /// One value a byte, or two, row after row.
    pub values: Vec<u8>,
}

/// Why a matrix cannot be quantised.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WeightsError {
    /// A codec that has no bits for it.
    #[error("weights are quantised as int8 or int4, not as {codec}")]
    Codec {
        /// The codec.
        codec: Codec,
    },
    /// Not as many weights as rows and columns say.
    #[error("{found} weights came for rows of {columns}: expected a multiple, and rows of at least one")]
    Shape {
        /// Weights a row.
        columns: usize,
        /// Weights that came.
        found: usize,
    },
    /// A weight is NaN, infinite, or at least 2^126.
    #[error("row {row} has a weight that is not finite")]
    NonFinite {
        /// The first such row.
        row: usize,
    },
}

/// Quantises rows of `columns` weights.
///
/// # Errors
/// Another codec than `int8` and `int4`, a shape that does not fit, or a weight that is not finite.
pub fn quantise(codec: Codec, weights: &[f32], columns: usize) -> Result<Quantised, WeightsError> {
    let format = match codec.format() {
        Some(format @ Format { sparse: false, .. }) => format,
        _ => return Err(WeightsError::Codec { codec }),
    };
    if columns == 0 || !weights.len().is_multiple_of(columns) {
        return Err(WeightsError::Shape { columns, found: weights.len() });
    }
    let rows = weights.len() / columns;
    let (scale_bytes, value_bytes) = (Format::scale_bytes(columns), format.value_bytes(columns));
    let mut quantised =
        Quantised { codec, rows, columns, scales: vec![0; rows * scale_bytes], values: vec![0; rows * value_bytes] };
    let zeros = vec![0.0; columns];
    let planes = quantised.scales.par_chunks_mut(scale_bytes).zip(quantised.values.par_chunks_mut(value_bytes));
    let bad = weights.par_chunks(columns).zip(planes).enumerate().map_init(Vec::new, |row, (number, (from, to))| {
        // Encoding replaces what it encodes.
        row.clear();
        row.extend_from_slice(from);
        let (scales, values) = to;
        let planes = PlanesMut { scales, bitmap: &mut [], values };
        (Level::best().encode(codec, Stores::Cached, row, &zeros, planes) == Found::NonFinite).then_some(number)
    });
    match bad.flatten().min() {
        Some(row) => Err(WeightsError::NonFinite { row }),
        None => Ok(quantised),
    }
}

impl Quantised {
    /// `int8` or `int4`.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// Rows and columns.
    #[must_use]
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The weights that a reader sees, row after row.
    #[must_use]
    pub fn weights(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        let (scale_bytes, value_bytes) = match self.rows {
            0 => return out,
            rows => (self.scales.len() / rows, self.values.len() / rows),
        };
        let planes = self.scales.par_chunks(scale_bytes).zip(self.values.par_chunks(value_bytes));
        out.par_chunks_mut(self.columns).zip(planes).for_each(|(out, (scales, values))| {
            Level::best().decode(self.codec, Stores::Cached, Planes { scales, bitmap: &[], values }, out);
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize) -> Vec<f32> {
        (0..rows * columns).map(|i| ((i * 37 % 1009) as f32 / 504.5 - 1.0) * (1 + i / columns) as f32).collect()
    }

    #[test]
    fn every_row_is_a_payload_of_its_own() {
        for (codec, columns) in [(Codec::Int8, 300), (Codec::Int4, 300), (Codec::Int4, 129), (Codec::Int8, 1)] {
            let weights = matrix(5, columns);
            let quantised = quantise(codec, &weights, columns).expect("finite");
            assert_eq!(quantised.shape(), [5, columns]);
            let mut payload = vec![0; codec.payload_bytes(columns)];
            let mut expected = Vec::new();
            for (number, row) in weights.chunks(columns).enumerate() {
                let mut left = row.to_vec();
                let _ = codec.encode(&mut left, &vec![0.0; columns], &mut payload);
                let (scales, values) = payload.split_at(Format::scale_bytes(columns));
                assert_eq!(&quantised.scales[number * scales.len()..][..scales.len()], scales);
                assert_eq!(&quantised.values[number * values.len()..][..values.len()], values);
                expected.extend(row.iter().zip(&left).map(|(weight, left)| weight - left));
            }
            assert_eq!(quantised.weights(), expected);
        }
    }

    #[test]
    fn a_weight_is_at_most_half_a_scale_away_and_a_blocks_scale_follows_its_own_row() {
        let weights = matrix(4, 256);
        for (codec, q_max) in [(Codec::Int8, 127.0), (Codec::Int4, 7.0)] {
            let back = quantise(codec, &weights, 256).expect("finite").weights();
            for (block, back) in weights.chunks(128).zip(back.chunks(128)) {
                let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                // A bf16 that is rounded up is at most 1 / 128 larger.
                let half = largest / q_max * (1.0 + 1.0 / 128.0) / 2.0;
                assert!(block.iter().zip(back).all(|(a, b)| (a - b).abs() <= half * 1.000_001));
            }
        }
    }

    #[test]
    fn what_cannot_be_quantised_is_named() {
        assert_eq!(quantise(Codec::Bf16, &[1.0], 1), Err(WeightsError::Codec { codec: Codec::Bf16 }));
        assert_eq!(quantise(Codec::Sparse24Int4, &[1.0], 1), Err(WeightsError::Codec { codec: Codec::Sparse24Int4 }));
        assert_eq!(quantise(Codec::Int4, &[1.0; 5], 2), Err(WeightsError::Shape { columns: 2, found: 5 }));
        assert_eq!(quantise(Codec::Int4, &[], 0), Err(WeightsError::Shape { columns: 0, found: 0 }));
        let mut weights = matrix(3, 200);
        weights[450] = f32::NAN;
        weights[250] = f32::INFINITY;
        assert_eq!(quantise(Codec::Int8, &weights, 200), Err(WeightsError::NonFinite { row: 1 }));
        assert_eq!(quantise(Codec::Int8, &[], 3).map(|quantised| quantised.weights()), Ok(Vec::new()));
    }
}
