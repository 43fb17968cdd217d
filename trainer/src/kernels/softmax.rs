//! The softmax of attention scores, scaled and causally masked. Shapes: B batch, H heads, T queries, S keys.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::TensorData;
use parallel::tap::fused;
use rayon::prelude::*;

use super::cross_entropy::exponentials;
use super::rms_norm::dot;
use super::{on_host, rows_a_piece, tensor, values};

/// `softmax(scores * scale)` over the keys that a query may see: the query in row t stands at position `S - T + t` and
/// sees the keys up to its own. `[B, H, T, S]` to the same shape.
#[must_use]
pub fn causal_softmax(scores: Tensor<4>, scale: f32) -> Tensor<4> {
    if !on_host(&scores.device()) {
        return reference(scores, scale);
    }
    fused(scores, move |scores| {
        let (shape, device) = (scores.dims(), scores.device());
        let mut rows = values(scores);
        forward(&mut rows, shape, scale);
        let kept = Arc::new(rows.clone());
        let backward = move |gradient: Tensor<4>| {
            let device = gradient.device();
            let mut g = values(gradient);
            backward(&mut g, &kept, shape, scale);
            tensor(g, shape, &device)
        };
        (tensor(rows, shape, &device), backward)
    })
}

fn forward(rows: &mut [f32], [_, _, t, s]: [usize; 4], scale: f32) {
    rows.par_chunks_mut(s).with_min_len(rows_a_piece(s)).enumerate().for_each(|(row, x)| {
        let (seen, hidden) = x.split_at_mut(s - t + row % t + 1);
        hidden.fill(0.0);
        for x in &mut *seen {
            *x *= scale;
        }
        let largest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let inverse = 1.0 / exponentials(seen, largest);
        for x in seen {
            *x *= inverse;
        }
    });
}

/// `dx = scale p (g - sum(g p))`
fn backward(g: &mut [f32], p: &[f32], [_, _, t, s]: [usize; 4], scale: f32) {
    g.par_chunks_mut(s).zip(p.par_chunks(s)).with_min_len(rows_a_piece(s)).enumerate().for_each(|(row, (g, p))| {
        let seen = s - t + row % t + 1;
        let (g, hidden) = g.split_at_mut(seen);
        hidden.fill(0.0);
        let sum = dot(g, &p[..seen]);
        for (g, p) in g.iter_mut().zip(p) {
            *g = scale * p * (*g - sum);
        }
    });
}

/// The same in burn's operations.
#[must_use]
pub fn reference(scores: Tensor<4>, scale: f32) -> Tensor<4> {
    let [b, h, t, s] = scores.dims();
    let scores = scores.mul_scalar(scale);
    let scores = if t > 1 {
        let mask: Vec<bool> = (0..t).flat_map(|i| (0..s).map(move |j| j > s - t + i)).collect();
        let mask = Tensor::<4, burn::tensor::Bool>::from_data(TensorData::new(mask, [1, 1, t, s]), &scores.device());
        scores.mask_fill(mask.expand([b, h, t, s]), f32::NEG_INFINITY)
    } else {
        scores
    };
    burn::tensor::activation::softmax(scores, 3)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::kernels::tests::{numbers, same};

    #[test]
    fn it_equals_its_reference() {
        let device = Device::flex().autodiff();
        for shape in [[2, 3, 5, 5], [1, 2, 3, 9], [1, 1, 1, 7], [2, 2, 65, 65]] {
            let scores = numbers(shape, 3, &device).mul_scalar(4.0);
            same(&[scores], |x| causal_softmax(x[0].clone(), 0.5), |x| reference(x[0].clone(), 0.5));
        }
    }
}
