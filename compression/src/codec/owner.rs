//! What the owner of a shard does with what all ranks sent of it, in one pass over memory.

use super::layout::PlanesMut;
use super::payload::check_parts;
use super::{Codec, Found, Part};
use crate::kernel::Level;

/// Where it goes. All have the elements of `sum`.
#[derive(Debug)]
pub(crate) struct Passed<'a> {
    pub(crate) codec: Codec,
    pub(crate) sum: &'a mut [f32],
    pub(crate) residual: &'a [f32],
    pub(crate) payload: PlanesMut<'a>,
    pub(crate) decoded: &'a mut [f32],
}

impl Passed<'_> {
    /// The first `elements`, which are whole blocks or everything, and the rest.
    pub(crate) fn split_at(self, elements: usize) -> (Self, Self) {
        let Self { codec, sum, residual, payload, decoded } = self;
        let (sum, sum_rest) = sum.split_at_mut(elements);
        let (residual, residual_rest) = residual.split_at(elements);
        let (payload, payload_rest) = payload.split_at(codec, elements);
        let (decoded, decoded_rest) = decoded.split_at_mut(elements);
        (
            Self { codec, sum, residual, payload, decoded },
            Self { codec, sum: sum_rest, residual: residual_rest, payload: payload_rest, decoded: decoded_rest },
        )
    }
}

impl Codec {
    /// As [`reduce`](super::reduce) of `parts` into `sum`, [`encode`](Self::encode) of that into `payload`, which makes `sum` the new
    /// residual, and [`decode`](super::Payload::decode) of what was written into `decoded`: the same bits, but a piece after the other, so
    /// that what one leaves is in the first cache when the next needs it. Where something is not finite `payload` and `decoded` hold
    /// whatever they hold.
    ///
    /// # Panics
    /// When something has not the elements of `sum`, or the payload has not [`payload_bytes`](Self::payload_bytes).
    pub fn pass_on<B: AsRef<[u8]>>(
        self,
        parts: &[Part<'_, B>],
        sum: &mut [f32],
        residual: &[f32],
        payload: &mut [u8],
        decoded: &mut [f32],
    ) -> Found {
        Level::best().pass_on(parts, 0, self.passed(parts, sum, residual, payload, decoded))
    }

    /// As [`pass_on`](Self::pass_on), by all threads of rayon's pool.
    ///
    /// # Panics
    /// As [`pass_on`](Self::pass_on).
    pub fn par_pass_on<B: AsRef<[u8]> + Sync>(
        self,
        parts: &[Part<'_, B>],
        sum: &mut [f32],
        residual: &[f32],
        payload: &mut [u8],
        decoded: &mut [f32],
    ) -> Found {
        Level::best().par_pass_on(parts, 0, self.passed(parts, sum, residual, payload, decoded))
    }

    fn passed<'a, B: AsRef<[u8]>>(
        self,
        parts: &[Part<'_, B>],
        sum: &'a mut [f32],
        residual: &'a [f32],
        payload: &'a mut [u8],
        decoded: &'a mut [f32],
    ) -> Passed<'a> {
        check_parts(parts, sum);
        assert_eq!(decoded.len(), sum.len(), "a place for every element");
        let payload = self.check_lengths(sum, residual, payload);
        Passed { codec: self, sum, residual, payload, decoded }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::reduce;
    use crate::{BLOCK, Payload, Workers};

    /// What was found, the new residual, the payload, and what it decodes to.
    type Left = (Found, Vec<f32>, Vec<u8>, Vec<f32>);

    /// The two ways, for two parts that were encoded and one that was not.
    fn both(codec: Codec, second: Codec, values: &[f32], workers: &Workers) -> [Left; 2] {
        let n = values.len();
        let encoded: Vec<Payload<Vec<u8>>> = [1.0, -0.3]
            .map(|by| {
                let (mut payload, mut values) = (vec![0; codec.payload_bytes(n)], values.to_vec());
                values.iter_mut().for_each(|value| *value = (*value * by).clamp(-1e30, 1e30));
                let _ = codec.encode(&mut values, &vec![0.0; n], &mut payload);
                Payload::new(codec, n, payload).expect("an encoder's payload")
            })
            .into();
        let parts = [Part::Encoded(&encoded[0]), Part::Values(values), Part::Encoded(&encoded[1])];
        let residual: Vec<f32> = values.iter().rev().map(|value| (value * 0.01).clamp(-1e30, 1e30)).collect();
        let fresh = || (vec![f32::NAN; n], vec![7; second.payload_bytes(n)], vec![f32::NAN; n]);
        let (mut sum, mut payload, mut decoded) = fresh();
        let found = workers.pass_on(second, &parts, &mut sum, &residual, &mut payload, &mut decoded);
        let at_once = (found, sum, payload, decoded);
        let (mut sum, mut payload, mut decoded) = fresh();
        reduce(&parts, &mut sum);
        let found = second.encode(&mut sum, &residual, &mut payload);
        if found == Found::Finite {
            Payload::new(second, n, &payload[..]).expect("an encoder's payload").decode(&mut decoded);
        }
        [at_once, (found, sum, payload, decoded)]
    }

    proptest! {
        #[test]
        fn one_pass_has_the_bits_of_three(
            (first, second) in (prop::sample::select(&Codec::ALL[..]), prop::sample::select(&Codec::ALL[..])),
            n in 0usize..40_000,
            seed in any::<u32>(),
        ) {
            let noise = |at: usize| ((at as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1u32 << 24) as f32 - 0.5;
            let values: Vec<f32> = (0..n).map(noise).collect();
            let [at_once, apart] = both(first, second, &values, &Workers::none());
            prop_assert!(at_once == apart, "{} then {}, {} elements", first, second, n);
        }
    }

    #[test]
    fn threads_change_no_bit_and_what_is_not_finite_is_found_wherever_it_lies() {
        let workers = Workers::new(3).expect("threads");
        let mut values: Vec<f32> = (0..1200 * BLOCK + 5).map(|at| (at as f32 * 0.37).sin()).collect();
        let [at_once, apart] = both(Codec::Int8, Codec::Int8, &values, &workers);
        assert!(at_once == apart && at_once.0 == Found::Finite);
        for at in [0, 700 * BLOCK, values.len() - 1] {
            let before = std::mem::replace(&mut values[at], f32::INFINITY);
            for workers in [&Workers::none(), &workers] {
                assert_eq!(
                    both(Codec::Fp32, Codec::Int8, &values, workers).map(|it| it.0),
                    [Found::NonFinite; 2],
                    "{at}"
                );
            }
            values[at] = before;
        }
    }
}
