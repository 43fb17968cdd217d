//! The types of elements: how they are written, and how they are reduced.

use half::bf16;

use super::call::{Dtype, Reduction};

mod sealed {
    pub trait Sealed {}
}

/// A type of elements: `f32`, `bf16`, `i32`, `i64` and `u8`.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its name on the wire.
    const DTYPE: Dtype;
    /// What it is summed in: f32 for bf16, itself for all others.
    type Wide: Copy;
    /// Exact.
    fn widen(self) -> Self::Wide;
    /// Rounds to nearest, ties to even. Every NaN becomes the same one, so that all members have the same bits.
    fn narrow(wide: Self::Wide) -> Self;
    /// The reduction of two. Integer sums wrap.
    fn reduce(reduction: Reduction, one: Self::Wide, other: Self::Wide) -> Self::Wide;
    /// Writes the elements, little-endian, into as many bytes as they take.
    fn write(elements: &[Self], bytes: &mut [u8]);
    /// The elements of bytes, little-endian.
    fn read(bytes: &[u8]) -> impl Iterator<Item = Self>;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $wide:ty, $widen:expr, $narrow:expr, $reduce:expr) => {
        impl sealed::Sealed for $type {}

        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;
            type Wide = $wide;

            fn widen(self) -> $wide {
                $widen(self)
            }

            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }

            fn reduce(reduction: Reduction, one: $wide, other: $wide) -> $wide {
                $reduce(reduction, one, other)
            }

            fn write(elements: &[Self], bytes: &mut [u8]) {
                assert_eq!(bytes.len(), size_of_val(elements), "room for the elements");
                for (bytes, element) in bytes.chunks_exact_mut(size_of::<Self>()).zip(elements) {
                    bytes.copy_from_slice(&element.to_le_bytes());
                }
            }

            fn read(bytes: &[u8]) -> impl Iterator<Item = Self> {
                let whole = |bytes: &[u8]| bytes.try_into().expect("chunks of its size");
                bytes.chunks_exact(size_of::<Self>()).map(move |bytes| Self::from_le_bytes(whole(bytes)))
            }
        }
    };
    (integer $type:ty, $dtype:ident) => {
        element!($type, $dtype, $type, |value| value, |wide| wide, |reduction, one: $type, other: $type| {
            match reduction {
                Reduction::Sum => one.wrapping_add(other),
                Reduction::Max => one.max(other),
                Reduction::Min => one.min(other),
            }
        });
    };
}

element!(f32, F32, f32, |value| value, one_nan, reduce_floats);
element!(bf16, Bf16, f32, bf16::to_f32, |wide| bf16::from_f32(one_nan(wide)), reduce_floats);
element!(integer i32, I32);
element!(integer i64, I64);
element!(integer u8, U8);

/// Which NaN an addition gives is the processor's and the compiler's choice.
const fn one_nan(value: f32) -> f32 {
    if value.is_nan() { f32::NAN } else { value }
}

fn reduce_floats(reduction: Reduction, one: f32, other: f32) -> f32 {
    if reduction == Reduction::Sum || one.is_nan() || other.is_nan() {
        return one + other;
    }
    let one_is_above = one.total_cmp(&other).is_gt();
    if one_is_above == (reduction == Reduction::Max) { one } else { other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_ordered_with_their_signs_and_nan_wins() {
        let check = |reduction, one: f32, other: f32, expected: f32| {
            for (one, other) in [(one, other), (other, one)] {
                let found = f32::narrow(f32::reduce(reduction, one, other));
                assert_eq!(found.to_bits(), expected.to_bits(), "{reduction:?} of {one} and {other}");
            }
        };
        check(Reduction::Max, -0.0, 0.0, 0.0);
        check(Reduction::Min, -0.0, 0.0, -0.0);
        check(Reduction::Max, f32::NEG_INFINITY, -1.0, -1.0);
        check(Reduction::Min, f32::NEG_INFINITY, -1.0, f32::NEG_INFINITY);
        let other_nan = f32::from_bits(0xffc0_1234);
        for reduction in [Reduction::Sum, Reduction::Max, Reduction::Min] {
            check(reduction, other_nan, f32::INFINITY, f32::NAN);
            check(reduction, other_nan, other_nan, f32::NAN);
        }
        check(Reduction::Sum, f32::INFINITY, f32::NEG_INFINITY, f32::NAN);
    }

    #[test]
    fn bfloat16_rounds_once_at_the_end_to_the_nearest_and_ties_to_even() {
        let sum = |parts: &[f32]| {
            let wide = parts.iter().map(|&part| bf16::from_f32(part).widen());
            bf16::narrow(wide.reduce(|sum, part| bf16::reduce(Reduction::Sum, sum, part)).expect("parts")).to_f32()
        };
        // The last place of 256 in bf16 is 2. Rounded at every step, the ones would all be lost.
        assert_eq!(sum(&[256.0, 1.0]), 256.0);
        assert_eq!(sum(&[258.0, 1.0]), 260.0);
        assert_eq!(sum(&[256.0, 1.0, 1.0]), 258.0);
        assert_eq!(sum(&[256.0, 1.0, 1.0, 1.0, 1.0]), 260.0);
    }

    #[test]
    fn integers_wrap() {
        assert_eq!(u8::reduce(Reduction::Sum, 250, 10), 4);
        assert_eq!(i32::reduce(Reduction::Sum, i32::MAX, 1), i32::MIN);
        assert_eq!(i64::reduce(Reduction::Max, i64::MIN, -1), -1);
        assert_eq!(u8::reduce(Reduction::Min, 250, 10), 10);
    }
}
