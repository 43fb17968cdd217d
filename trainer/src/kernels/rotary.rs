//! The rotary embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>), in Hugging Face's layout: element i of a
//! head turns together with element i + E/2. Shapes: B batch, T tokens, H heads, E elements a head.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use parallel::tap::fused;
use rayon::prelude::*;

use super::{on_host, tensor, values};

/// Cosines and sines of T positions, `[T, E / 2]` each.
#[derive(Debug, PartialEq)]
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// The angles of `count` positions from `start` on, for heads of `elements` elements.
    #[must_use]
    pub fn new(theta: f64, elements: usize, start: usize, count: usize) -> Self {
        let half = elements / 2;
        let rates: Vec<f64> = (0..half).map(|i| libm::pow(theta, -((2 * i) as f64) / elements as f64)).collect();
        let angle = |i: usize| (start + i / half) as f64 * rates[i % half];
        let cos = (0..count * half).map(|i| libm::cos(angle(i)) as f32).collect();
        let sin = (0..count * half).map(|i| libm::sin(angle(i)) as f32).collect();
        Self { cos, sin, half }
    }
}

/// Splits `[B, T, H * E]` into heads, `[B, H, T, E]`, each rotated by its position.
#[must_use]
pub fn rotate(x: Tensor<3>, heads: usize, angles: &Arc<Angles>) -> Tensor<4> {
    if !on_host(&x.device()) {
        return reference(x, heads, angles);
    }
    let angles = angles.clone();
    fused(x, move |x| {
        let ([b, t, d], device) = (x.dims(), x.device());
        let shape = [b, t, heads, d / heads];
        let y = forward(&values(x), shape, &angles);
        let angles = angles.clone();
        let backward = move |gradient: Tensor<4>| {
            let device = gradient.device();
            tensor(backward(&values(gradient), shape, &angles), [b, t, d], &device)
        };
        (tensor(y, [b, heads, t, d / heads], &device), backward)
    })
}

/// Heads that a thread takes at a time.
const HEADS_A_PIECE: usize = 128;

fn forward(x: &[f32], [_, t, h, e]: [usize; 4], angles: &Angles) -> Vec<f32> {
    let half = angles.half;
    let mut y = vec![0.0; x.len()];
    y.par_chunks_mut(e).with_min_len(HEADS_A_PIECE).enumerate().for_each(|(row, y)| {
        let (at, head, batch) = (row % t, row / t % h, row / t / h);
        let x = &x[((batch * t + at) * h + head) * e..][..e];
        let (cos, sin) = (&angles.cos[at * half..][..half], &angles.sin[at * half..][..half]);
        let (left, right) = x.split_at(half);
        let (y_left, y_right) = y.split_at_mut(half);
        for i in 0..half {
            y_left[i] = left[i] * cos[i] - right[i] * sin[i];
            y_right[i] = right[i] * cos[i] + left[i] * sin[i];
        }
    });
    y
}

/// The transpose of the forward: the rotation the other way round.
fn backward(g: &[f32], [_, t, h, e]: [usize; 4], angles: &Angles) -> Vec<f32> {
    let half = angles.half;
    let mut out = vec![0.0; g.len()];
    out.par_chunks_mut(e).with_min_len(HEADS_A_PIECE).enumerate().for_each(|(row, out)| {
        let (head, at, batch) = (row % h, row / h % t, row / h / t);
        let g = &g[((batch * h + head) * t + at) * e..][..e];
        let (cos, sin) = (&angles.cos[at * half..][..half], &angles.sin[at * half..][..half]);
        let (left, right) = g.split_at(half);
        let (out_left, out_right) = out.split_at_mut(half);
        for i in 0..half {
            out_left[i] = left[i] * cos[i] + right[i] * sin[i];
            out_right[i] = right[i] * cos[i] - left[i] * sin[i];
        }
    });
    out
}

/// The same in burn's operations.
#[must_use]
pub fn reference(x: Tensor<3>, heads: usize, angles: &Angles) -> Tensor<4> {
    let [b, t, d] = x.dims();
    let (e, half) = (d / heads, angles.half);
    let x = x.reshape([b, t, heads, e]).swap_dims(1, 2);
    let table = |values: &[f32], device: &Device| {
        let half_table = Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, 1, t, half]), device);
        Tensor::cat(vec![half_table.clone(), half_table], 3)
    };
    let (cos, sin) = (table(&angles.cos, &x.device()), table(&angles.sin, &x.device()));
    let turned = Tensor::cat(vec![x.clone().narrow(3, half, half).neg(), x.clone().narrow(3, 0, half)], 3);
    x * cos + turned * sin
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{numbers, same};

    #[test]
    fn it_equals_its_reference() {
        let device = Device::flex().autodiff();
        for (shape, heads, start) in [([2, 5, 24], 3, 0), ([1, 1, 8], 1, 9), ([3, 40, 16], 4, 2)] {
            let angles = Arc::new(Angles::new(10_000.0, shape[2] / heads, start, shape[1]));
            let x = numbers(shape, 5, &device);
            same(&[x], |x| rotate(x[0].clone(), heads, &angles), |x| reference(x[0].clone(), heads, &angles));
        }
    }
}
