//! Cross entropy. Shapes: N tokens, V vocabulary.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, TensorData};
use parallel::tap::fused;
use rayon::prelude::*;

use super::exp::exp;
use super::{on_host, rows_a_piece, tensor, values};

/// The sum over all tokens of `log(sum(exp(logits))) - logits[target]`, in nats: `[N, V]` and `[N]` to `[1]`.
///
/// # Panics
/// On the host, when a target is not below V.
#[must_use]
pub fn cross_entropy(logits_nv: Tensor<2>, targets_n: Tensor<1, Int>) -> Tensor<1> {
    let device = logits_nv.device();
    if !on_host(&device) {
        return reference(logits_nv, targets_n);
    }
    let targets: Arc<Vec<usize>> = Arc::new(targets_n.into_data().iter::<i64>().map(|id| id as usize).collect());
    fused(logits_nv, move |logits_nv| {
        let shape = logits_nv.dims();
        let device = logits_nv.device();
        let mut rows = values(logits_nv);
        // From here on `rows` holds exp(logit - largest), and `sums` their sums: all that the backward needs.
        let (loss, sums) = forward(&mut rows, &targets, shape[1]);
        let (rows, targets) = (Arc::new(rows), targets.clone());
        let loss = tensor(vec![loss], [1], &device);
        let backward = move |gradient: Tensor<1>| {
            let device = gradient.device();
            let scale = values(gradient)[0];
            tensor(backward(&rows, &sums, &targets, scale), shape, &device)
        };
        (loss, backward)
    })
}

fn forward(rows: &mut [f32], targets: &[usize], width: usize) -> (f32, Vec<f32>) {
    let piece = rows_a_piece(width);
    let each = |(row, &target): (&mut [f32], &usize)| {
        let chosen = row[target];
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = exponentials(row, largest);
        // A row with NaN has no largest element to speak of; the sum is NaN and says so.
        (sum, libm::log(f64::from(sum)) + f64::from(largest) - f64::from(chosen))
    };
    let results: Vec<(f32, f64)> =
        rows.par_chunks_mut(width).with_min_len(piece).zip(targets.par_iter()).map(each).collect();
    let loss: f64 = results.iter().map(|(_, loss)| loss).sum();
    (loss as f32, results.into_iter().map(|(sum, _)| sum).collect())
}

/// Replaces every element by `exp(x - largest)` and returns the sum: 16 partial sums, added in order, so that the loop
/// can run in SIMD with the same bits everywhere.
pub(super) fn exponentials(row: &mut [f32], largest: f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            let e = exp(*x - largest);
            *x = e;
            *sum += e;
        }
    }
    let mut total = sums.iter().sum::<f32>();
    for x in chunks.into_remainder() {
        *x = exp(*x - largest);
        total += *x;
    }
    total
}

fn backward(rows: &[f32], sums: &[f32], targets: &[usize], scale: f32) -> Vec<f32> {
    let width = rows.len() / targets.len().max(1);
    let mut out = vec![0.0; rows.len()];
    out.par_chunks_mut(width.max(1))
        .with_min_len(rows_a_piece(width))
        .zip(rows.par_chunks(width.max(1)))
        .zip(sums.par_iter().zip(targets))
        .for_each(|((out, row), (sum, &target))| {
            let factor = scale / sum;
            for (out, x) in out.iter_mut().zip(row) {
                *out = x * factor;
            }
            out[target] -= scale;
        });
    out
}

/// The same in burn's operations.
#[must_use]
pub fn reference(logits_nv: Tensor<2>, targets_n: Tensor<1, Int>) -> Tensor<1> {
    let [n, _] = logits_nv.dims();
    log_softmax(logits_nv, 1).gather(1, targets_n.reshape([n, 1])).sum().neg()
}

/// Targets as a tensor.
#[must_use]
pub fn targets(ids: &[i32], device: &burn::tensor::Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), device)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::kernels::tests::{numbers, same};

    #[test]
    fn it_equals_its_reference() {
        let device = Device::flex().autodiff();
        let ids = targets(&[0, 36, 7, 7, 12], &device);
        let logits = numbers([5, 37], 1, &device).mul_scalar(5.0);
        same(&[logits], |x| cross_entropy(x[0].clone(), ids.clone()), |x| reference(x[0].clone(), ids.clone()));
    }

    #[test]
    fn huge_logits_stay_finite_and_a_nan_shows() {
        let device = Device::flex();
        let loss = |rows: Vec<f32>| values(cross_entropy(tensor(rows, [1, 3], &device), targets(&[1], &device)))[0];
        assert_eq!(loss(vec![1e4, 0.0, -1e4]), 1e4);
        assert!(loss(vec![0.0, 1.0, f32::NAN]).is_nan());
        assert!(!loss(vec![0.0, 1.0, f32::INFINITY]).is_finite());
    }
}
