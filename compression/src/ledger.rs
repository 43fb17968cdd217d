//! Exact sums of f32, to prove that error feedback loses nothing.
//!
//! Over any run, everything that was decoded and all residuals together are the sum of all gradients, once each f32
//! addition's own rounding is entered too. Proofs keep this ledger; training does not need it.

use crate::Codec;

/// Limbs of 32 bits: 278 bits for the range of f32, and 64 or more for carries.
const LIMBS: usize = 14;

/// The exact value of a sum of finite f32: a fixed-point number in units of 2^-149, the smallest f32.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exact([i64; LIMBS]);

impl Exact {
    /// Adds `x`, without rounding.
    ///
    /// # Panics
    /// When `x` is not finite.
    pub fn add(&mut self, x: f32) {
        assert!(x.is_finite(), "{x} has no place in a ledger");
        let bits = x.to_bits();
        let (exponent, fraction) = (bits >> 23 & 0xff, i128::from(bits & 0x7f_ffff));
        let mantissa = if exponent == 0 { fraction } else { fraction | 0x80_0000 };
        let shift = exponent.max(1) as usize - 1;
        let shifted = mantissa << (shift % 32);
        let signed = if x.is_sign_negative() { -shifted } else { shifted };
        self.0[shift / 32] += (signed & 0xffff_ffff) as i64;
        self.0[shift / 32 + 1] += (signed >> 32) as i64;
        for limb in 0..LIMBS - 1 {
            self.0[limb + 1] += self.0[limb] >> 32;
            self.0[limb] &= 0xffff_ffff;
        }
    }

    /// Whether the sum is exactly 0.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|&limb| limb == 0)
    }
}

/// What the rounded sum `a + b` leaves out, exactly, while nothing overflows (Knuth 1969, TwoSum).
#[must_use]
pub fn lost(a: f32, b: f32) -> f32 {
    let sum = a + b;
    let b_part = sum - a;
    (a - (sum - b_part)) + (b - b_part)
}

/// What the two additions of an encoder leave out of one element, exactly, while nothing overflows: of gradient and what is
/// released of the residual, and of what is left and what is held of it. `sent` is what a decoder reads.
#[must_use]
pub fn lost_in_encoding(codec: Codec, gradient: f32, residual: f32, sent: f32) -> [f32; 2] {
    let held = residual * codec.hold();
    let released = residual - held;
    [lost(gradient, released), lost((gradient + released) - sent, held)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_and_their_negatives_cancel_in_any_order(bits in prop::collection::vec(any::<u32>(), 0..50)) {
            let numbers: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|x| x.is_finite()).collect();
            let mut exact = Exact::default();
            numbers.iter().for_each(|x| exact.add(*x));
            numbers.iter().rev().for_each(|x| exact.add(-*x));
            prop_assert!(exact.is_zero());
        }

        #[test]
        fn a_rounded_sum_and_what_it_lost_are_the_sum(a in -1e30f32..1e30, b in -1e-3f32..1e-3) {
            let mut exact = Exact::default();
            [a, b, -(a + b), -lost(a, b)].into_iter().for_each(|x| exact.add(x));
            prop_assert!(exact.is_zero());
        }
    }

    #[test]
    fn the_smallest_difference_shows() {
        let mut exact = Exact::default();
        [f32::MAX, f32::from_bits(1), -f32::MAX].into_iter().for_each(|x| exact.add(x));
        assert!(!exact.is_zero());
        exact.add(-f32::from_bits(1));
        assert!(exact.is_zero());
    }
}
