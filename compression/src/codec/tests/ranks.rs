//! Sums over many ranks.

use proptest::prelude::*;

use super::inputs::{Chance, gradient_and_residual};
use super::*;

const N: usize = 4096;

/// Gradients of so many ranks whose sum is always the same, but for the rounding of f32. Ranks differ as much as
/// independent samples do.
fn gradients(ranks: usize) -> Vec<Vec<f32>> {
    let mut chance = Chance::new(7);
    let total: Vec<f64> = (0..N).map(|_| chance.normal()).collect();
    let mut noise: Vec<Vec<f64>> = (0..ranks).map(|_| (0..N).map(|_| chance.normal()).collect()).collect();
    for at in 0..N {
        let mean = noise.iter().map(|rank| rank[at]).sum::<f64>() / ranks as f64;
        for rank in &mut noise {
            rank[at] = total[at] / ranks as f64 + (rank[at] - mean) / (ranks as f64).sqrt();
        }
    }
    noise.into_iter().map(|rank| rank.into_iter().map(|x| x as f32).collect()).collect()
}

fn error(gradients: &[Vec<f32>], result: &[f32]) -> f64 {
    norm(
        result.iter().enumerate().map(|(at, result)| {
            f64::from(*result) - gradients.iter().map(|gradient| f64::from(gradient[at])).sum::<f64>()
        }),
    )
}

/// Each rank encodes once, the owner adds and encodes once.
fn two_stages(codec: Codec, gradients: &[Vec<f32>]) -> Vec<f32> {
    let payloads: Vec<_> =
        gradients.iter().map(|gradient| Payload::new(codec, N, encode(codec, gradient).1).expect("our own")).collect();
    let parts: Vec<_> = payloads.iter().map(Part::Encoded).collect();
    let mut sum = vec![0.0; N];
    reduce(&parts, &mut sum);
    decode(codec.second_stage(), &encode(codec.second_stage(), &sum).1, N)
}

/// The control: a ring, in which every rank adds its own gradient to what came and encodes the sum anew.
fn ring(codec: Codec, gradients: &[Vec<f32>]) -> Vec<f32> {
    gradients.iter().fold(vec![0.0; N], |sum, gradient| {
        let sum: Vec<f32> = sum.iter().zip(gradient).map(|(sum, g)| sum + g).collect();
        decode(codec, &encode(codec, &sum).1, N)
    })
}

#[test]
fn the_error_of_a_sum_does_not_grow_with_the_ranks_and_that_of_a_ring_does() {
    for codec in LOSSY {
        let alone = gradients(1);
        let once = error(&alone, &decode(codec, &encode(codec, &alone[0]).1, N));
        let errors = [1, 2, 4, 8, 16].map(|ranks| {
            let gradients = gradients(ranks);
            [two_stages, ring].map(|result| error(&gradients, &result(codec, &gradients)))
        });
        // Two stages of one size each: at most the square root of two, and a little for chance.
        assert!(errors.iter().all(|[sum, _]| *sum < 1.6 * once), "{codec}: {errors:?}, one encode: {once}");
        let [_, [sum_of_2, ring_of_2], .., [sum_of_16, ring_of_16]] = errors;
        assert!(sum_of_16 < 1.05 * sum_of_2, "{codec}: {errors:?}");
        assert!(ring_of_16 > 1.3 * ring_of_2 && ring_of_16 > 1.5 * sum_of_16, "a ring of {codec}: {errors:?}");
    }
}

/// `sum` plus what each part has, one after the other.
fn one_after_the_other(parts: &[Part<'_, Vec<u8>>], elements: usize) -> Vec<f32> {
    let mut sum = vec![0.0; elements];
    for part in parts {
        match part {
            Part::Encoded(payload) => payload.decode_add(&mut sum),
            Part::Values(values) => sum.iter_mut().zip(*values).for_each(|(sum, value)| *sum += value),
        }
    }
    sum
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn reduce_is_the_sum_of_the_parts_in_their_order(
        ranks in prop::collection::vec((gradient_and_residual(), 0..7usize), 0..6),
    ) {
        let elements = ranks.iter().map(|((gradient, _), _)| gradient.len()).min().unwrap_or(9);
        let mut payloads = Vec::new();
        for ((gradient, _), codec) in &ranks {
            // The seventh: this rank's own, as it is.
            let payload = Codec::ALL.get(*codec).map(|codec| {
                let (_, payload, _) = encode(*codec, &gradient[..elements]);
                Payload::new(*codec, elements, payload).expect("our own")
            });
            payloads.push(payload);
        }
        let parts: Vec<Part<'_, Vec<u8>>> = payloads
            .iter()
            .zip(&ranks)
            .map(|(payload, ((gradient, _), _))| match payload {
                Some(payload) => Part::Encoded(payload),
                None => Part::Values(&gradient[..elements]),
            })
            .collect();
        let expected = one_after_the_other(&parts, elements);
        for reduce in [reduce::<Vec<u8>>, par_reduce::<Vec<u8>>] {
            // Whatever stood there is not added.
            let mut sum = vec![f32::NAN; elements];
            reduce(&parts, &mut sum);
            prop_assert_eq!(bits(&sum), bits(&expected));
        }
    }
}

/// The control: the order is part of the result.
#[test]
fn parts_in_another_order_give_another_sum() {
    // Of very different sizes: sums of a few numbers of 8 bits are exact otherwise.
    let gradients: Vec<Vec<f32>> = (0..8).map(|rank| Chance::new(rank).normals(N)).collect();
    let gradients: Vec<Vec<f32>> =
        (0..8).zip(gradients).map(|(rank, g)| g.iter().map(|x| x * 10.0f32.powi(rank)).collect()).collect();
    for codec in Codec::ALL {
        let payloads: Vec<_> = gradients
            .iter()
            .map(|gradient| Payload::new(codec, N, encode(codec, gradient).1).expect("our own"))
            .collect();
        let mut parts: Vec<_> = payloads.iter().map(Part::Encoded).collect();
        let (mut forth, mut back) = (vec![0.0; N], vec![0.0; N]);
        reduce(&parts, &mut forth);
        parts.reverse();
        reduce(&parts, &mut back);
        assert!(bits(&forth) != bits(&back), "{codec}");
    }
}

#[test]
#[should_panic(expected = "every part has the elements of the sum")]
fn a_part_of_another_length_is_a_mistake_of_the_caller() {
    reduce::<Vec<u8>>(&[Part::Values(&[1.0])], &mut [0.0; 2]);
}
