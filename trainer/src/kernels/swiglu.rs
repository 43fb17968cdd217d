//! SwiGLU's product (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::activation::silu;
use parallel::tap::fused_pair;
use rayon::prelude::*;

use super::exp::sigmoid;
use super::{PIECE, on_host, tensor, values};

/// `silu(gate) * up`, element by element.
#[must_use]
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    if !on_host(&gate.device()) {
        return reference(gate, up);
    }
    fused_pair(gate, up, |gate, up| {
        let (shape, device) = (gate.dims(), gate.device());
        let kept = Arc::new((values(gate), values(up)));
        let y = tensor(forward(&kept.0, &kept.1), shape, &device);
        let backward = move |gradient: Tensor<3>| {
            let device = gradient.device();
            let (dgate, dup) = backward(values(gradient), &kept.0, &kept.1);
            (tensor(dgate, shape, &device), tensor(dup, shape, &device))
        };
        (y, backward)
    })
}

fn forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; gate.len()];
    y.par_chunks_mut(PIECE).zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE))).for_each(|(y, (gate, up))| {
        for (y, (gate, up)) in y.iter_mut().zip(gate.iter().zip(up)) {
            *y = gate * sigmoid(*gate) * up;
        }
    });
    y
}

/// With s the sigmoid of the gate: `dgate = g up s (1 + gate (1 - s))`, `dup = g gate s`.
fn backward(mut g: Vec<f32>, gate: &[f32], up: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut dup = vec![0.0; g.len()];
    let inputs = gate.par_chunks(PIECE).zip(up.par_chunks(PIECE));
    g.par_chunks_mut(PIECE).zip(dup.par_chunks_mut(PIECE)).zip(inputs).for_each(|((g, dup), (gate, up))| {
        for ((g, dup), (gate, up)) in g.iter_mut().zip(dup).zip(gate.iter().zip(up)) {
            let s = sigmoid(*gate);
            *dup = *g * gate * s;
            *g *= up * (s * (1.0 + gate * (1.0 - s)));
        }
    });
    (g, dup)
}

/// The same in burn's operations.
#[must_use]
pub fn reference(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    silu(gate) * up
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::kernels::tests::{numbers, same};

    #[test]
    fn it_equals_its_reference() {
        let device = Device::flex().autodiff();
        let inputs = [numbers([2, 3, 41], 1, &device).mul_scalar(3.0), numbers([2, 3, 41], 2, &device)];
        same(&inputs, |x| swiglu(x[0].clone(), x[1].clone()), |x| reference(x[0].clone(), x[1].clone()));
    }
}
