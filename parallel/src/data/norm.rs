//! The squared norm of a gradient, of which every rank knows a part.
//!
//! The squares of a block of 128 elements, counted from the tensor's origin, are added in f64 in a fixed order; sums of
//! blocks are added exactly, as a fixed-point number. No shard, chunk or rank cuts a block, so the norm has the same bits
//! whoever adds which blocks, in whatever order, on however many ranks. An element costs one multiplication and one
//! addition, and a block a handful of integer operations.

use compression::BLOCK;

/// 32-bit digits of the number: in units of 2^-298, the square of the smallest f32, up to 2^303, which 2^40 blocks of the
/// largest squares do not reach.
pub const DIGITS: usize = 20;

/// The exponent of a unit.
const UNIT: i32 = -298;
/// Additions between two carries: a digit of 32 bits has room for so many in its 64.
const CARRY_EVERY: usize = 1 << 24;

/// A sum of squares, to the last bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SquaredNorm {
    digits: [u64; DIGITS],
    /// Something that is not finite was added: the sum means nothing.
    broken: bool,
}

impl SquaredNorm {
    /// Adds the squares of a part of a tensor that begins where a block does.
    pub fn add(&mut self, values: &[f32]) {
        for blocks in values.chunks(CARRY_EVERY * BLOCK) {
            blocks.chunks(BLOCK).for_each(|block| self.add_block(squares(block)));
            self.carry();
        }
    }

    /// Adds what another has added.
    pub fn merge(&mut self, other: &Self) {
        self.digits.iter_mut().zip(other.digits).for_each(|(digit, other)| *digit += other);
        self.broken |= other.broken;
        self.carry();
    }

    /// The norm: the root of the sum, rounded to the nearest f64; NaN when something was not finite.
    #[must_use]
    pub fn root(&self) -> f64 {
        if self.broken {
            return f64::NAN;
        }
        let Some(top) = self.digits.iter().rposition(|&digit| digit > 0) else { return 0.0 };
        let low = top.saturating_sub(3);
        // Four digits have at least 97 bits, of which an f64 keeps 53; whatever lies below counts as one bit more.
        let kept = (low..=top).rev().fold(0u128, |kept, at| kept << 32 | u128::from(self.digits[at]));
        let below = self.digits[..low].iter().any(|&digit| digit > 0);
        libm::ldexp((kept | u128::from(below)) as f64, UNIT + 32 * low as i32).sqrt()
    }

    /// Its digits, the lowest first; `None` when something was not finite.
    #[must_use]
    pub fn digits(&self) -> Option<[u32; DIGITS]> {
        (!self.broken).then(|| self.digits.map(|digit| u32::try_from(digit).expect("every change ends with a carry")))
    }

    /// The number with these digits, wherever they come from.
    #[must_use]
    pub fn of_digits(digits: [u32; DIGITS]) -> Self {
        Self { digits: digits.map(u64::from), broken: false }
    }

    fn add_block(&mut self, sum: f64) {
        if sum == 0.0 {
            return;
        }
        if !sum.is_finite() {
            self.broken = true;
            return;
        }
        let bits = sum.to_bits();
        let mantissa = u128::from(bits & ((1 << 52) - 1) | 1 << 52);
        // Squares are whole multiples of the unit, and rounding leaves them so: no bit falls off below.
        let shift = (bits >> 52) as i32 - 1075 - UNIT;
        let (at, shifted) = match usize::try_from(shift) {
            Ok(shift) => (shift / 32, mantissa << (shift % 32)),
            Err(_) => (0, mantissa >> -shift),
        };
        for (place, digit) in self.digits[at..].iter_mut().take(3).enumerate() {
            *digit += (shifted >> (32 * place)) as u64 & 0xffff_ffff;
        }
    }

    fn carry(&mut self) {
        let mut carry = 0;
        for digit in &mut self.digits {
            let sum = *digit + carry;
            (*digit, carry) = (sum & 0xffff_ffff, sum >> 32);
        }
        // More than the squares of any model: it came from elsewhere.
        self.broken |= carry > 0;
    }
}

/// The sum of a block's squares in eight lanes, which a processor adds side by side.
fn squares(block: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    let (eights, rest) = block.as_chunks::<8>();
    for eight in eights {
        for (lane, x) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[f32]) -> SquaredNorm {
        let mut norm = SquaredNorm::default();
        norm.add(values);
        norm
    }

    proptest! {
        #[test]
        fn any_cut_at_blocks_and_any_order_gives_the_same_bits(
            values in prop::collection::vec(any::<f32>().prop_filter("finite", |x| x.is_finite()), 1..2000),
            cuts in prop::collection::vec(0usize..16, 0..4),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * BLOCK).min(values.len())).collect();
            cuts.extend([0, values.len()]);
            cuts.sort_unstable();
            let mut parts: Vec<SquaredNorm> = cuts.windows(2).map(|pair| of(&values[pair[0]..pair[1]])).collect();
            parts.reverse();
            let mut whole = SquaredNorm::default();
            parts.iter().for_each(|part| whole.merge(part));
            prop_assert_eq!(whole, of(&values));
            prop_assert_eq!(SquaredNorm::of_digits(whole.digits().expect("finite")), whole);
        }

        #[test]
        fn it_is_the_norm(values in prop::collection::vec(-1e3f32..1e3, 1..2000)) {
            let plain = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            prop_assert!((of(&values).root() - plain).abs() <= 1e-13 * plain);
        }
    }

    #[test]
    fn sums_of_f64_depend_on_the_cut_and_these_do_not() {
        // The control: a large square swallows small ones that come after it, and not their sum.
        let values: Vec<f32> = (0..64 * BLOCK).map(|i| if i == 0 { 1e8 } else { 1e-1 }).collect();
        let plain = |blocks: &mut dyn Iterator<Item = &[f32]>| blocks.map(squares).sum::<f64>();
        let (forward, backward) = (plain(&mut values.chunks(BLOCK)), plain(&mut values.rchunks(BLOCK)));
        assert_ne!(forward.to_bits(), backward.to_bits());
        let mut parts = SquaredNorm::default();
        values.rchunks(BLOCK).for_each(|block| parts.add(block));
        assert_eq!(parts, of(&values));
    }

    #[test]
    fn the_ends_of_the_range_are_exact() {
        assert_eq!(of(&[f32::MAX; 3]).root(), (3.0 * f64::from(f32::MAX).powi(2)).sqrt());
        let least = f32::from_bits(1);
        assert_eq!(of(&[least]).root(), f64::from(least));
        assert_eq!(of(&[0.0, -0.0]).root(), 0.0);
        assert_eq!(of(&[-3.0, 4.0]).root(), 5.0);
        for broken in [f32::NAN, f32::INFINITY] {
            let mut norm = of(&[1.0]);
            norm.merge(&of(&[broken]));
            assert!(norm.root().is_nan() && norm.digits().is_none());
        }
    }
}
