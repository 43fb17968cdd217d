//! Fused operations with their own backward. Training and generation call the same ones.
//!
//! burn's autodiff records one step for every elementary operation; on the CPU each of them is a single-threaded pass
//! over memory. A kernel here is one parallel pass forward and one backward. It runs on the host where the tensors are
//! (`flex`); on every other device its `reference`, the same mathematics in burn's operations, does the work. Tests
//! compare both, values and gradients.
//!
//! - [`cross_entropy`]: the loss; [`cross_entropy_rows`]: where the rows of the vocabulary are in several places.
//! - [`rms_norm`]: the norm.
//! - [`softmax`]: scaled, causally masked softmax.
//! - [`swiglu`]: `silu(gate) * up`.
//! - [`rotary`]: heads split and rotated by position.
//! - [`exp`]: the exponential that they share.
//!
//! Rows are cut into fixed pieces and sums are added in order, so the bits do not depend on the number of threads.

pub mod cross_entropy;
pub mod cross_entropy_rows;
pub mod exp;
pub mod rms_norm;
pub mod rotary;
pub mod softmax;
pub mod swiglu;

use burn::Tensor;
use burn::backend::DispatchDevice;
use burn::tensor::{Device, TensorData};

/// Elements that a thread should take at a time, at the least.
const PIECE: usize = 1 << 14;

/// Rows of `width` elements that make a piece.
const fn rows_a_piece(width: usize) -> usize {
    let rows = PIECE / if width == 0 { 1 } else { width };
    if rows == 0 { 1 } else { rows }
}

/// Whether the tensors of this device lie in host memory and burn works on them there.
fn on_host(device: &Device) -> bool {
    let mut device = device.as_dispatch();
    loop {
        match device {
            DispatchDevice::Flex(_) => return true,
            DispatchDevice::Autodiff(inner) => device = inner,
            #[allow(unreachable_patterns, reason = "the other variants depend on the features")]
            _ => return false,
        }
    }
}

/// The elements of a host tensor, row-major.
fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    let data = x.into_data();
    data.try_into_vec::<f32>().expect("kernels are called with f32 tensors")
}

/// A host tensor.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    //! One way to compare a kernel with its reference.

    use super::*;

    /// Numbers of about unit size, the same in every run.
    pub fn numbers<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
        let mut out = vec![0.0; shape.iter().product()];
        crate::model::init::normal(seed, "kernels", 1.0, &mut out);
        tensor(out, shape, device)
    }

    /// Compares the outputs of both, and the gradients of a sum in which every output has another weight.
    #[track_caller]
    pub fn same<const D: usize, const E: usize>(
        inputs: &[Tensor<D>],
        kernel: impl Fn(&[Tensor<D>]) -> Tensor<E>,
        reference: impl Fn(&[Tensor<D>]) -> Tensor<E>,
    ) {
        let run = |operation: &dyn Fn(&[Tensor<D>]) -> Tensor<E>| {
            let inputs: Vec<_> = inputs.iter().map(|x| x.clone().detach().require_grad()).collect();
            let out = operation(&inputs);
            let weights = numbers(out.dims(), 99, &out.device());
            let gradients = (out.clone() * weights).sum().backward();
            let mut all = vec![values(out.inner())];
            all.extend(inputs.iter().map(|x| values(x.grad(&gradients).expect("an input"))));
            all
        };
        for (found, expected) in run(&kernel).into_iter().zip(run(&reference)) {
            let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let pairs = found.iter().zip(&expected);
            let difference = pairs.fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
            assert_eq!(found.len(), expected.len());
            assert!(difference <= 2e-6 * largest.max(1e-3), "{difference} of {largest}");
        }
    }
}
