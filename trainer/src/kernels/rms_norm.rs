//! RMSNorm (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>). Shapes: R rows, D width.

use std::sync::Arc;

use burn::Tensor;
use parallel::tap::fused_pair;
use rayon::prelude::*;

use super::{on_host, rows_a_piece, tensor, values};

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension: `[B, T, D]` and `[D]` to `[B, T, D]`.
#[must_use]
pub fn rms_norm(x: Tensor<3>, weight: Tensor<1>, eps: f64) -> Tensor<3> {
    if !on_host(&x.device()) {
        return reference(x, weight, eps);
    }
    fused_pair(x, weight, move |x, weight| {
        let (shape, device) = (x.dims(), x.device());
        let (x, weight) = (values(x), values(weight));
        let (y, inverse) = forward(&x, &weight, eps as f32);
        let kept = Arc::new((x, weight, inverse));
        let backward = move |gradient: Tensor<3>| {
            let device = gradient.device();
            let (x, weight, inverse) = &*kept;
            let (dx, dw) = backward(&values(gradient), x, weight, inverse);
            (tensor(dx, shape, &device), tensor(dw, [shape[2]], &device))
        };
        (tensor(y, shape, &device), backward)
    })
}

/// The output, and `1 / sqrt(mean(x²) + eps)` of every row.
fn forward(x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let mut y = vec![0.0; x.len()];
    let rows = y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_a_piece(width));
    let inverse = rows
        .map(|(y, x)| {
            let mean_square = dot(x, x) / width as f32;
            let inverse = 1.0 / (mean_square + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse * w;
            }
            inverse
        })
        .collect();
    (y, inverse)
}

/// `dx = i (g w) - x i³ / D sum(g w x)`, `dw = sum over rows of g x i`, with i the inverse root.
fn backward(g: &[f32], x: &[f32], weight: &[f32], inverse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let piece = rows_a_piece(width);
    let mut dx = vec![0.0; x.len()];
    let pieces = dx.par_chunks_mut(width * piece).zip(x.par_chunks(width * piece));
    let partial: Vec<Vec<f32>> = pieces
        .zip(g.par_chunks(width * piece).zip(inverse.par_chunks(piece)))
        .map(|((dx, x), (g, inverse))| {
            let mut dw = vec![0.0; width];
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((dx, x), (g, &i)) in rows.zip(g.chunks_exact(width).zip(inverse)) {
                for (dx, (g, w)) in dx.iter_mut().zip(g.iter().zip(weight)) {
                    *dx = g * w;
                }
                let factor = dot(dx, x) * i * i * i / width as f32;
                for ((dx, dw), (x, g)) in dx.iter_mut().zip(&mut dw).zip(x.iter().zip(g)) {
                    *dx = *dx * i - x * factor;
                    *dw += g * x * i;
                }
            }
            dw
        })
        .collect();
    let mut dw = vec![0.0; width];
    for partial in partial {
        for (dw, partial) in dw.iter_mut().zip(partial) {
            *dw += partial;
        }
    }
    (dx, dw)
}

/// A dot product in 16 partial sums, so that it can run in SIMD with the same bits everywhere.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The same in burn's operations.
#[must_use]
pub fn reference(x: Tensor<3>, weight: Tensor<1>, eps: f64) -> Tensor<3> {
    let mean_square = (x.clone() * x.clone()).mean_dim(2);
    x / (mean_square + eps).sqrt() * weight.unsqueeze()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::kernels::tests::{numbers, same};

    #[test]
    fn it_equals_its_reference() {
        let device = Device::flex().autodiff();
        for [b, t, d] in [[2, 3, 8], [1, 1, 37], [3, 700, 20]] {
            let x = numbers([b, t, d], 1, &device);
            let weight = numbers([d], 2, &device);
            let with = |weight: Tensor<1>| (weight.clone(), weight);
            let (w1, w2) = with(weight.clone());
            same(
                std::slice::from_ref(&x),
                move |x| rms_norm(x[0].clone(), w1.clone(), 1e-5),
                move |x| reference(x[0].clone(), w2.clone(), 1e-5),
            );
            let (x1, x2) = (x.clone(), x);
            same(
                &[weight],
                move |w| rms_norm(x1.clone(), w[0].clone(), 1e-5),
                move |w| reference(x2.clone(), w[0].clone(), 1e-5),
            );
        }
    }
}
