//! The way of gradients out of a backward pass, and models without it.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use parallel::data::{Gradient, GradientStream};
use parallel::tap::Emit;
use parallel::tensor::TensorGroup;

use super::staged::Table;
use crate::model::{Config, Hook, Leaf, Llama, Piece, Values};
use crate::replica::Replica;
use crate::tensor::Slice;

/// A hook for every parameter of the plan. `table` is a tied one, whose gradient another stage has too.
pub(super) fn hooks(stream: &Arc<GradientStream>, slice: Option<&Slice>, table: Option<&Arc<Table>>) -> Vec<Hook> {
    let hook = |(index, parameter): (usize, &parallel::data::Parameter)| {
        let table = table.filter(|table| table.index == index).cloned();
        let take = Take { stream: stream.clone(), index, sums: summed(slice, &parameter.name), table };
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
    /// Where it waits for the end of the step, if another stage has the rest of it.
    table: Option<Arc<Table>>,
}

impl Take {
    fn gradient<const D: usize>(&self, gradient: Tensor<D>) -> Option<Tensor<D>> {
        let gradient = match &self.sums {
            Some((group, site)) => group.sum(gradient, site),
            None => gradient,
        };
        match &self.table {
            Some(table) => {
                self.stream.read(self.index, gradient, |values| table.add(values));
                None
            }
            None => take(&self.stream, self.index, gradient),
        }
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

/// The same of what a rank of a replica holds, piece by piece, whose ranks run it together.
#[must_use]
pub fn plain_pieces(replica: &Replica, config: &Config, device: &Device, weights: &[Vec<f32>]) -> Vec<Llama> {
    let (parts, slice) = (replica.parts(), replica.slice());
    let build = |piece: &Piece| {
        let model = Llama::build_piece(config, piece.clone(), device, &mut |name, _| {
            let found = weights.iter().zip(parts).find(|(_, part)| part.whole.name == name);
            let (values, part) = found.expect("one vector for each parameter of this rank's pieces");
            let values = Values::Now(TensorData::new(values.clone(), part.parameter().shape));
            Leaf { values, hook: Hook::default().then(slice.and_then(|slice| slice.after(name))) }
        });
        model.over(slice.map(Slice::rows))
    };
    match replica.stage() {
        Some(stage) => stage.pieces().iter().map(build).collect(),
        None => vec![build(&Piece::whole(config))],
    }
}
