//! The passes of a rank that has a stage of a pipeline: in the order of its schedule, each piece and micro-batch a graph of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use burn::Tensor;
use burn::tensor::TensorData;
use parallel::data::Gradient;
use parallel::pipeline::{Action, Pass};
use parallel::progress::Stage as Doing;
use parallel::tap::backward_from;
use parallel::trace::Label;

use super::passes::Passed;
use super::update::{Behind, WAIT_S_MIN};
use super::{Batch, Stepper, scalar};
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::pipeline::Stage;
use crate::state::State;

/// This rank's gradient of a tied table, over the micro-batches of a step.
#[derive(Debug)]
pub(super) struct Table {
    /// Its place among the parameters.
    pub(super) index: usize,
    sum: Mutex<Vec<f32>>,
}

impl Table {
    pub(super) fn new(index: usize) -> Self {
        Self { index, sum: Mutex::default() }
    }

    /// Adds a micro-batch's.
    pub(super) fn add(&self, gradient: &[f32]) {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        if sum.is_empty() {
            sum.extend_from_slice(gradient);
        } else {
            sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
        }
    }

    /// All of it; the next step begins with nothing.
    fn take(&self) -> Vec<f32> {
        std::mem::take(&mut *self.sum.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a forward pass leaves for its backward pass.
struct Kept {
    /// What came in, where it was activations.
    input: Option<Tensor<3>>,
    output: Output,
}

enum Output {
    Activations(Tensor<3>),
    Loss(Tensor<1>),
}

impl Stepper {
    /// This rank's passes of a step, whose loss it divides by `tokens`.
    pub(super) fn staged(
        &self,
        (stage, state): (&Stage, &mut State),
        (batches, tokens): (&[Batch], usize),
        behind: Option<&Arc<Behind>>,
        tamper: impl Fn(usize, Tensor<1>) -> Tensor<1>,
    ) -> Result<Passed> {
        let step = state.step + 1;
        let mut passed = Passed::default();
        if !stage.is_first() {
            // Until the first activations come there is nothing else to do.
            passed.before = self.catch_up(state, behind.map(|behind| &**behind))?;
        }
        let models: Vec<Llama> = stage
            .pieces()
            .iter()
            .map(|piece| self.piece(piece.clone(), &state.weights, behind.filter(|_| passed.before.is_none())))
            .collect();
        let shape = self.activations(&batches[0]);
        let mut kept: HashMap<(usize, usize), Kept> = HashMap::new();
        let (mut unseen, mut done) = (models.len(), 0);
        let started = Instant::now();
        let mut ended = started;
        let waited = stage.run(step, (batches.len(), shape.iter().product()), |action, input| {
            let Action { pass, piece: number, micro_batch } = action;
            let label = |name| Label { micro_batch: Some(micro_batch), ..Label::new(name, step) };
            let start = Instant::now();
            if start.duration_since(ended).as_secs_f64() > WAIT_S_MIN {
                self.span(ended, label("wait"));
            }
            if self.dies_at.get() == Some(&(step, done)) {
                std::process::abort();
            }
            done += 1;
            match pass {
                Pass::Forward => {
                    self.progress.enter(Doing::Forward);
                    let batch = &batches[micro_batch];
                    let input = input.map(|values| self.leaf(values, shape));
                    let (pass, out) = self.piece_forward(&models[number], (batch, input), (tokens, step), |loss| {
                        tamper(micro_batch, loss)
                    })?;
                    kept.insert((number, micro_batch), pass);
                    let mut update_s = 0.0;
                    if micro_batch == 0 {
                        unseen -= 1;
                        if unseen == 0 {
                            // Every parameter was used: the step before is over, and this one's gradients may come.
                            if passed.before.is_none() {
                                passed.before = self.catch_up(state, behind.map(|behind| &**behind))?;
                                update_s = passed.before.as_ref().map_or(0.0, super::update::Ended::spent_s);
                            }
                            self.stream.begin(step, batches.len());
                            passed.first_forward_s = started.elapsed().as_secs_f64();
                        }
                    }
                    self.check(step)?;
                    passed.forward_s += start.elapsed().as_secs_f64() - update_s;
                    self.span(start, label("forward"));
                    ended = Instant::now();
                    Ok(out)
                }
                Pass::Backward => {
                    self.progress.enter(Doing::Backward);
                    self.stream.begin_micro_batch(micro_batch);
                    let pass = kept.remove(&(number, micro_batch)).expect("its forward pass came before");
                    let (loss, out) = self.piece_backward(pass, input.map(|values| self.plain(values, shape)), step)?;
                    passed.loss += loss;
                    self.check(step)?;
                    passed.backward_s += start.elapsed().as_secs_f64();
                    self.span(start, label("backward"));
                    ended = Instant::now();
                    Ok(out)
                }
            }
        })?;
        passed.stage_wait_s = Some(waited.as_secs_f64());
        if let Some(table) = &self.table {
            self.progress.enter(Doing::Waiting);
            let mut gradient = table.take();
            stage.tie(&mut gradient)?;
            self.stream.begin_micro_batch(batches.len() - 1);
            self.stream.add(table.index, Gradient::Host(&gradient));
        }
        Ok(passed)
    }

    fn piece_forward(
        &self,
        model: &Llama,
        (batch, input): (&Batch, Option<Tensor<3>>),
        (tokens, step): (usize, u64),
        tamper: impl FnOnce(Tensor<1>) -> Tensor<1>,
    ) -> Result<(Kept, Option<Vec<f32>>)> {
        let [inputs, targets] = batch.tensors(&self.device);
        let length = batch.targets.len() / batch.rows;
        let x = input.clone().unwrap_or_else(|| model.embed(inputs));
        let y = model.decode(x, length, None);
        if !model.piece().last {
            let out = values(y.clone().inner(), step)?;
            return Ok((Kept { input, output: Output::Activations(y) }, Some(out)));
        }
        // Divided by the tokens of the whole step, so that the sum of the gradients is the gradient.
        let part = tamper(model.loss_behind(y, targets).div_scalar(tokens as f64));
        Ok((Kept { input, output: Output::Loss(part) }, None))
    }

    /// The loss, where this was its pass, and the gradient of what came in.
    fn piece_backward(
        &self,
        Kept { input, output }: Kept,
        gradient: Option<Tensor<3>>,
        step: u64,
    ) -> Result<(f64, Option<Vec<f32>>)> {
        let (loss, mut gradients) = match (output, gradient) {
            (Output::Loss(part), _) => {
                let value = part.clone().inner();
                let gradients = part.backward();
                (scalar(value, step)?, gradients)
            }
            (Output::Activations(y), Some(gradient)) => (0.0, backward_from(y, gradient)),
            (Output::Activations(_), None) => unreachable!("whoever took the activations sends their gradient"),
        };
        let Some(input) = input else { return Ok((loss, None)) };
        let missing = || Error::Device { step, what: "the gradient of a stage's input is missing".into() };
        let gradient = input.grad_remove(&mut gradients).ok_or_else(missing)?;
        Ok((loss, Some(values(gradient, step)?)))
    }

    /// `[B, T, D]` of what travels between stages; where tensor ranks cut sequences, `T` is this rank's part.
    fn activations(&self, batch: &Batch) -> [usize; 3] {
        let slice = self.replica.as_ref().and_then(|replica| replica.slice());
        let parts = slice.map_or(1, |slice| slice.token_parts());
        [batch.rows, batch.targets.len() / batch.rows / parts, self.config.hidden_size]
    }

    /// What came from another stage, as the beginning of a graph.
    fn leaf(&self, values: Vec<f32>, shape: [usize; 3]) -> Tensor<3> {
        Tensor::from_data(TensorData::new(values, shape), &self.device).require_grad()
    }

    /// The same, outside of every graph.
    fn plain(&self, values: Vec<f32>, shape: [usize; 3]) -> Tensor<3> {
        Tensor::from_data(TensorData::new(values, shape), &self.device).inner()
    }
}

/// Reads a tensor back.
///
/// # Errors
/// The device failed.
pub fn values(x: Tensor<3>, step: u64) -> Result<Vec<f32>> {
    let failed = |what: String| Error::Device { step, what };
    let data = x.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    data.convert::<f32>().try_into_vec::<f32>().map_err(|error| failed(format!("{error:?}")))
}
