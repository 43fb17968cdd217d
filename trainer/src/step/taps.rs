//! The way of gradients out of a backward pass, and models without it.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use parallel::data::{Gradient, GradientStream};
use parallel::tap::Emit;
use parallel::tensor::TensorGroup;

use crate::error::Result;
use crate::model::{Config, Hook, Leaf, Llama, Values};
use crate::tensor::Slice;

/// A hook for every parameter of the plan.
pub(super) fn hooks(stream: &Arc<GradientStream>, slice: Option<&Slice>) -> Vec<Hook> {
    let hook = |(index, parameter): (usize, &parallel::data::Parameter)| {
        let take = Take { stream: stream.clone(), index, sums: summed(slice, &parameter.name) };
        let emit = match parameter.shape.len() {
            1 => Emit::new::<1>(move |gradient| take.gradient(gradient)),
            _ => Emit::new::<2>(move |gradient| take.gradient(gradient)),
        };
        Hook::new(emit).then(slice.and_then(|slice| slice.after(&parameter.name)))
    };
    stream.plan().parameters().iter().enumerate().map(hook).collect()
}

/// Takes a parameter's gradient out of the backward pass.
struct Take {
    stream: Arc<GradientStream>,
    index: usize,
    /// The ranks that have the rest of this gradient, and where in the program they meet.
    sums: Option<(TensorGroup, String)>,
}

impl Take {
    fn gradient<const D: usize>(&self, gradient: Tensor<D>) -> Option<Tensor<D>> {
        let gradient = match &self.sums {
            Some((group, site)) => group.sum(gradient, site),
            None => gradient,
        };
        take(&self.stream, self.index, gradient)
    }
}

pub(super) fn take<const D: usize>(stream: &GradientStream, index: usize, gradient: Tensor<D>) -> Option<Tensor<D>> {
    let elements = gradient.shape().num_elements();
    stream.add(index, Gradient::Device(Box::new(gradient.reshape([elements]))));
    None
}

fn summed(slice: Option<&Slice>, name: &str) -> Option<(TensorGroup, String)> {
    Some((slice?.sums(name)?.clone(), format!("{name}/gradient")))
}

/// The model of these weights without taps, for evaluation and generation.
#[must_use]
pub fn plain_model(config: &Config, device: &Device, weights: &[Vec<f32>]) -> Llama {
    let mut weights = weights.iter();
    Llama::build(config, device, &mut |_, shape| {
        let values = weights.next().expect("one vector for each parameter of the list").clone();
        Leaf { values: Values::Now(TensorData::new(values, shape.to_vec())), hook: Hook::default() }
    })
}

/// The same of a slice, whose ranks run it together.
///
/// # Errors
/// A model whose parameters do not fit the address space.
pub fn sliced_model(slice: &Slice, config: &Config, device: &Device, weights: &[Vec<f32>]) -> Result<Llama> {
    let parts = slice.parts()?;
    let mut weights = weights.iter().zip(&parts);
    let model = Llama::build(config, device, &mut |name, _| {
        let (values, part) = weights.next().expect("one vector for each parameter of the list");
        let values = Values::Now(TensorData::new(values.clone(), part.parameter().shape));
        Leaf { values, hook: Hook::default().then(slice.after(name)) }
    });
    Ok(model.over(Some(slice.rows())))
}
