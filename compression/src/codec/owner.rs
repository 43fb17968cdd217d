//! What the owner of a shard does with what all ranks sent of it, in one pass over memory.

use super::layout::PlanesMut;
use super::payload::check_parts;
use super::{Codec, Part};

/// [`Owned`] with lengths that fit, as a kernel takes it.
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

/// A chunk of a shard at its owner, and where what follows from it goes. All have the elements of `sum`.
#[derive(Debug)]
pub struct Owned<'a> {
    /// What the sum is sent in.
    pub codec: Codec,
    /// The sum of all parts, and then what was left out of it: the owner's new residual.
    pub sum: &'a mut [f32],
    /// What the owner left out before.
    pub residual: &'a [f32],
    /// The sum and the residual, encoded.
    pub payload: &'a mut [u8],
    /// What the payload decodes to.
    pub decoded: &'a mut [f32],
}

impl<'a> Owned<'a> {
    /// The same with the payload's planes.
    ///
    /// # Panics
    /// When lengths differ.
    pub(crate) fn checked<B: AsRef<[u8]>>(self, parts: &[Part<'_, B>]) -> Passed<'a> {
        let Self { codec, sum, residual, payload, decoded } = self;
        check_parts(parts, sum);
        assert_eq!(decoded.len(), sum.len(), "a place for every element");
        let payload = codec.check_lengths(sum, residual, payload);
        Passed { codec, sum, residual, payload, decoded }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::reduce;
    use crate::{BLOCK, Found, Payload, Workers};

    /// What was found, the bits of the new residual, the payload, and the bits of what it decodes to.
    type Left = (Found, Vec<u32>, Vec<u8>, Vec<u32>);

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

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
        let to =
            Owned { codec: second, sum: &mut sum, residual: &residual, payload: &mut payload, decoded: &mut decoded };
        let found = workers.pass_on(&parts, to);
        let at_once = (found, bits(&sum), payload, bits(&decoded));
        let (mut sum, mut payload, mut decoded) = fresh();
        reduce(&parts, &mut sum);
        let found = second.encode(&mut sum, &residual, &mut payload);
        if found == Found::Finite {
            Payload::new(second, n, &payload[..]).expect("an encoder's payload").decode(&mut decoded);
        }
        [at_once, (found, bits(&sum), payload, bits(&decoded))]
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
