//! The forward and backward passes of a step, of a rank that has all layers.

use std::sync::Arc;
use std::time::Instant;

use burn::Tensor;
use burn::tensor::TensorData;
use parallel::progress::Stage;
use parallel::trace::Label;

use super::update::{Behind, Ended};
use super::{Batch, Stepper, scalar};
use crate::error::Result;
use crate::model::{Leaf, Llama, Piece, Values};
use crate::replica::Replica;
use crate::state::State;
use crate::tensor::Slice;

/// What the passes of a step gave.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// This rank's part of the mean cross entropy; 0 where it has none.
    pub(super) loss: f64,
    /// Seconds of forward passes.
    pub(super) forward_s: f64,
    /// Seconds of backward passes.
    pub(super) backward_s: f64,
    /// Seconds in which sums of the step before could travel.
    pub(super) first_forward_s: f64,
    /// Seconds that it waited for other stages, where there are some.
    pub(super) stage_wait_s: Option<f64>,
    /// How the step before ended.
    pub(super) before: Option<Ended>,
}

impl Stepper {
    /// This rank's passes of a step, whose loss it divides by `tokens`.
    pub(super) fn passes(
        &self,
        state: &mut State,
        (batches, tokens): (&[Batch], usize),
        behind: Option<&Arc<Behind>>,
        tamper: impl Fn(usize, Tensor<1>) -> Tensor<1>,
    ) -> Result<Passed> {
        let step = state.step + 1;
        let mut passed = Passed::default();
        let model = self.model(&state.weights, behind);
        for (index, batch) in batches.iter().enumerate() {
            let forward = Instant::now();
            let [inputs, targets] = batch.tensors(&self.device);
            // Divided by the tokens of the whole step, so that the sum of the gradients is the gradient.
            let part = tamper(index, model.loss(inputs, targets).div_scalar(tokens as f64));
            let value = part.clone().inner();
            if index == 0 {
                // Every parameter was used: the step before is over, and this one's gradients may come.
                passed.before = self.catch_up(state, behind.map(|behind| &**behind))?;
                passed.forward_s -= passed.before.as_ref().map_or(0.0, Ended::spent_s);
                self.stream.begin(step, batches.len());
            }
            self.check(step)?;
            self.stream.begin_micro_batch(index);
            passed.forward_s += forward.elapsed().as_secs_f64();
            // What comes after it hides nothing: the sums of the step before are here.
            if index == 0 {
                passed.first_forward_s = passed.forward_s;
            }
            self.span(forward, Label { micro_batch: Some(index), ..Label::new("forward", step) });
            self.progress.enter(Stage::Backward);
            let backward = Instant::now();
            part.backward();
            self.check(step)?;
            passed.backward_s += backward.elapsed().as_secs_f64();
            self.span(backward, Label { micro_batch: Some(index), ..Label::new("backward", step) });
            passed.loss += scalar(value, step)?;
        }
        Ok(passed)
    }

    /// The model of these weights, or of those that are `behind`, with a tap on every parameter.
    fn model(&self, weights: &[Vec<f32>], behind: Option<&Arc<Behind>>) -> Llama {
        self.piece(Piece::whole(&self.config), weights, behind)
    }

    /// The same, of a piece of it.
    pub(super) fn piece(&self, piece: Piece, weights: &[Vec<f32>], behind: Option<&Arc<Behind>>) -> Llama {
        let slice = self.replica.as_ref().and_then(Replica::slice);
        Llama::build_piece(&self.config, piece, &self.device, &mut |name, shape| {
            let place = self.plan.parameters().iter().position(|parameter| parameter.name == name);
            let index = place.expect("the plan has every parameter of this rank's pieces");
            let part = &self.plan.parameters()[index].shape;
            assert!(part.len() == shape.len(), "{name}: a part of it has its dimensions");
            let shape = part.clone();
            let values = match behind.cloned() {
                None => Values::Now(TensorData::new(weights[index].clone(), shape)),
                Some(behind) => {
                    let values = move |shape| TensorData::new(behind.values(index), shape);
                    Values::WhenUsed(shape.clone(), Box::new(move || values(shape)))
                }
            };
            Leaf { values, hook: self.hooks[index].clone() }
        })
        .over(slice.map(Slice::rows))
    }
}
