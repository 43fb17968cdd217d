//! The order of the windows: a seeded permutation that is computed, not stored.
//!
//! A Feistel network over the smallest even number of bits that covers the count, walked until it lands inside the
//! count (cycle walking, Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Each epoch has its own key.

/// A permutation of `0..count`.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    count: u64,
    half_bits: u32,
    key: u64,
}

const ROUNDS: u64 = 6;

impl Permutation {
    /// The permutation of `count` places for this seed and epoch.
    #[must_use]
    pub const fn new(count: u64, seed: u64, epoch: u64) -> Self {
        let bits = 64 - count.saturating_sub(1).leading_zeros();
        Self { count, half_bits: bits.div_ceil(2), key: mix(mix(seed) ^ epoch) }
    }

    /// What stands at `place`.
    ///
    /// # Panics
    /// When `place` is not below the count.
    #[must_use]
    pub fn at(&self, place: u64) -> u64 {
        assert!(place < self.count, "place {place} of {}", self.count);
        let mut x = place;
        loop {
            x = self.encrypt(x);
            // The domain is less than 4 times the count, so this ends after 4 turns on average.
            if x < self.count {
                return x;
            }
        }
    }

    fn encrypt(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(self.key ^ mix(right.wrapping_add(round << 56))) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The window that sample `sample` of the whole run reads: epochs follow each other, each in its own order.
#[must_use]
pub fn window(sample: u64, windows: u64, seed: u64) -> u64 {
    Permutation::new(windows, seed, sample / windows).at(sample % windows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_window_comes_once_an_epoch(count in 1u64..600, seed: u64, epoch in 0u64..4) {
            let mut seen = vec![false; usize::try_from(count).expect("small")];
            for sample in epoch * count..(epoch + 1) * count {
                let place = usize::try_from(window(sample, count, seed)).expect("small");
                prop_assert!(!std::mem::replace(&mut seen[place], true));
            }
            prop_assert!(seen.into_iter().all(|x| x));
        }
    }

    #[test]
    fn seeds_and_epochs_give_other_orders_that_are_not_the_natural_one() {
        let order = |seed, epoch: u64| (0..50).map(|i| window(epoch * 50 + i, 50, seed)).collect::<Vec<_>>();
        let natural: Vec<u64> = (0..50).collect();
        let all = [order(1, 0), order(1, 1), order(2, 0), natural];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
        }
    }
}
