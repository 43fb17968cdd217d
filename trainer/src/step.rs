//! One training step, from tokens to new weights.

use std::sync::Arc;
use std::time::Instant;

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};
use compression::Codec;
use parallel::data::engine::{Engine, Packed};
use parallel::data::exchange::Verdict;
use parallel::data::{Gradient, GradientStream, Plan, Sum, Timing};
use parallel::note::Ballot;
use parallel::progress::{Progress, Stage};
use parallel::tap::Emit;
use parallel::trace::{Label, Trace, Track};
use parallel::transport::Counted;

use crate::error::{Error, Result};
use crate::model::{Config, Hook, Leaf, Llama};
use crate::optimizer::{self, AdamW};
use crate::recipe::Recipe;
use crate::state::State;

/// Tokens and the tokens that follow them, `[batch, seq]` each, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// What the model sees.
    pub inputs: Vec<i32>,
    /// What it should say.
    pub targets: Vec<i32>,
    /// Rows.
    pub rows: usize,
}

/// What a rank tells the others with its vote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word {
    /// Whether somebody asked it to stop.
    pub stop: bool,
    /// Whether it cannot take a snapshot now.
    pub busy: bool,
    /// BLAKE3 of its parameters before this step, where they are compared.
    pub parameters: Option<[u8; 32]>,
    /// The codec that all ranks are to use from the next step on; only rank 0 says it.
    pub codec: Option<Codec>,
}

/// What a step did. Everything but seconds and bytes is the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The mean cross entropy of the tokens of all ranks in nats, before the update.
    pub loss: f64,
    /// The global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Whether the update was left out because something was not finite.
    pub skipped: bool,
    /// Tokens that all ranks predicted.
    pub tokens: u64,
    /// Whether any rank was asked to stop.
    pub stop: bool,
    /// Whether any rank cannot take a snapshot.
    pub busy: bool,
    /// Seconds of the forward passes.
    pub forward_s: f64,
    /// Seconds of the backward passes.
    pub backward_s: f64,
    /// The rank whose forward and backward passes took longest, and their seconds.
    pub slowest_rank: usize,
    /// See `slowest_rank`.
    pub slowest_compute_s: f64,
    /// Seconds from the last `backward()`'s return to the complete sum.
    pub exposed_s: f64,
    /// Seconds of encoding, on another thread.
    pub encode_s: f64,
    /// Seconds that this rank waited for the sum after its last backward pass.
    pub wait_s: f64,
    /// The part of the way of the gradients that was over when the last backward pass returned; `None` with one rank.
    pub overlap: Option<f64>,
    /// Bytes at the sockets so far. Some of a step's bytes leave after it, and some of the next one's come before it.
    pub wire: Counted,
    /// Seconds of the last backward pass in which gradients could travel behind it; 0 with one rank.
    pub window_s: f64,
    /// What zstd served, on this rank.
    pub packed: Packed,
    /// What rank 0 said that all ranks are to use from the next step on.
    pub codec_chosen: Option<Codec>,
    /// Seconds of the whole step.
    pub step_s: f64,
}

/// Runs steps on one device.
#[derive(Debug)]
pub struct Stepper {
    config: Config,
    device: Device,
    plan: Arc<Plan>,
    stream: Arc<GradientStream>,
    hooks: Vec<Hook>,
    progress: Arc<Progress>,
    trace: Option<Arc<Trace>>,
}

impl Stepper {
    /// A stepper for this model; `device` is without autodiff.
    ///
    /// # Errors
    /// A model whose parameters do not fit the address space.
    pub fn new(config: &Config, device: &Device, bucket_bytes_max: usize) -> Result<Self> {
        let plan = Plan::new(config.parameters(), bucket_bytes_max).map_err(|e| Error::Usage(e.to_string()))?;
        Ok(Self::with(config, device, GradientStream::new(Arc::new(plan)), Arc::default()))
    }

    /// The stepper of one rank of several. The engine's plan is [`Plan::new`] of the model's parameters.
    #[must_use]
    pub fn across(config: &Config, device: &Device, engine: Engine) -> Self {
        let progress = engine.progress().clone();
        Self::with(config, device, GradientStream::across(engine), progress)
    }

    fn with(config: &Config, device: &Device, stream: GradientStream, progress: Arc<Progress>) -> Self {
        let (plan, stream) = (stream.plan().clone(), Arc::new(stream));
        let hooks = plan.parameters().iter().enumerate().map(|(index, parameter)| {
            let stream = stream.clone();
            match parameter.shape.len() {
                1 => Hook::new(Emit::new::<1>(move |gradient| take(&stream, index, gradient))),
                _ => Hook::new(Emit::new::<2>(move |gradient| take(&stream, index, gradient))),
            }
        });
        let hooks = hooks.collect();
        Self { config: config.clone(), device: device.clone().autodiff(), plan, stream, hooks, progress, trace: None }
    }

    /// The same, and it records what it does, if that is wanted.
    #[must_use]
    pub fn traced(self, trace: Option<Arc<Trace>>) -> Self {
        Self { trace, ..self }
    }

    /// The way to the other ranks; `None` with one.
    #[must_use]
    pub fn engine(&self) -> Option<&Engine> {
        self.stream.engine()
    }

    /// The way of the gradients.
    #[must_use]
    pub const fn stream(&self) -> &Arc<GradientStream> {
        &self.stream
    }

    /// How far this rank is.
    #[must_use]
    pub const fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// From the next step on, keeps a copy of this rank's own gradients.
    pub fn keep_own_gradients(&self) {
        self.stream.keep_own();
    }

    /// From the next step on, no gradient leaves before the end of the backward pass.
    pub fn be_late(&self) {
        self.stream.be_late();
    }

    /// From the next step on, gradients travel in this codec where their kind allows it. To be called between steps.
    pub fn set_codec(&self, codec: Codec) {
        if let Some(engine) = self.engine() {
            engine.exchange().set_codec(codec);
        }
    }

    /// This rank's own gradient of a parameter in the last step; `None` unless it is kept.
    #[must_use]
    pub fn own_gradient(&self, index: usize) -> Option<Vec<f32>> {
        self.stream.own(index)
    }

    /// What is summed.
    #[must_use]
    pub const fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Takes one step: the sum of the gradients of all micro-batches of all ranks, clipped, applied by AdamW. Every micro-batch
    /// of every rank has as many tokens. `tamper` may change a loss before it goes backward; training passes
    /// [`untouched`], tests inject faults with it.
    ///
    /// # Errors
    /// Gradients that do not add up, a device that fails, a rank that is lost or whose parameters differ. A step that is
    /// not finite is no error: it is skipped.
    pub fn step(
        &self,
        state: &mut State,
        recipe: &Recipe,
        batches: &[Batch],
        word: Word,
        tamper: impl Fn(usize, Tensor<1>) -> Tensor<1>,
    ) -> Result<Report> {
        let start = Instant::now();
        let step = state.step + 1;
        let own: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        // Other ranks may have more micro-batches, or fewer.
        let tokens = match self.engine() {
            Some(_) => own / batches.len() * recipe.parallel.micro_batches.iter().sum::<usize>(),
            None => own,
        };
        let (mut loss, mut forward_s, mut backward_s) = (0.0, 0.0, 0.0);
        self.progress.begin(step);

        let model = self.model(&state.weights);
        self.stream.begin(step, batches.len());
        for (index, batch) in batches.iter().enumerate() {
            let forward = Instant::now();
            self.stream.begin_micro_batch(index);
            let [inputs, targets] = batch.tensors(&self.device);
            // Divided by the tokens of the whole step, so that the sum of the gradients is the gradient.
            let part = tamper(index, model.loss(inputs, targets).div_scalar(tokens as f64));
            let value = part.clone().inner();
            forward_s += forward.elapsed().as_secs_f64();
            self.span(forward, Label { micro_batch: Some(index), ..Label::new("forward", step) });
            self.progress.enter(Stage::Backward);
            let backward = Instant::now();
            part.backward();
            backward_s += backward.elapsed().as_secs_f64();
            self.span(backward, Label { micro_batch: Some(index), ..Label::new("backward", step) });
            loss += scalar(value, step)?;
        }
        let exposed = Instant::now();
        self.progress.enter(Stage::Waiting);
        // While the others' gradients travel there is time for it.
        drop(model);
        let Word { stop, busy, parameters, codec } = word;
        let (finite, compute_s) = (loss.is_finite(), forward_s + backward_s);
        let finished = self.stream.finish(Ballot { finite, stop, busy, loss, compute_s, parameters, codec })?;
        self.span(exposed, Label::new("wait", step));
        let update = Instant::now();
        self.progress.enter(Stage::Updating);

        let (sum, ballots) = (&finished.sum, &finished.ballots);
        let hashes: Vec<_> = ballots.iter().map(|ballot| ballot.parameters).collect();
        same_parameters(&hashes, state.step)?;
        let loss: f64 = ballots.iter().fold(0.0, |sum, ballot| sum + ballot.loss);
        let slowest =
            (0..ballots.len()).max_by(|&a, &b| ballots[a].compute_s.total_cmp(&ballots[b].compute_s)).unwrap_or(0);
        let grad_norm = global_norm(sum);
        let learning_rate = optimizer::learning_rate(&recipe.schedule, step, recipe.train.steps);
        // With several ranks the votes have covered both; a sum that is finite has a finite norm.
        let skipped = finished.verdict == Verdict::Skip || !(grad_norm.is_finite() && loss.is_finite());
        state.step = step;
        if skipped {
            state.skips += 1;
        } else {
            state.skips = 0;
            state.good_step = step;
            state.updates += 1;
            self.apply(state, recipe, sum, learning_rate, clip_factor(grad_norm, recipe.train.clip_norm));
            self.stream.owed().settle();
        }
        self.span(update, Label::new("update", step));
        self.span(start, Label::new("step", step));
        let (exposed_s, overlap) = hidden(&finished.timing, exposed);
        Ok(Report {
            loss,
            grad_norm: if skipped { f64::NAN } else { grad_norm },
            learning_rate,
            skipped,
            tokens: tokens as u64,
            stop: ballots.iter().any(|ballot| ballot.stop),
            busy: ballots.iter().any(|ballot| ballot.busy),
            forward_s,
            backward_s,
            slowest_rank: slowest,
            slowest_compute_s: ballots[slowest].compute_s,
            exposed_s,
            encode_s: finished.timing.encode_s,
            wait_s: finished.timing.wait_s,
            overlap,
            wire: self.stream.counted(),
            window_s: finished
                .timing
                .span
                .map_or(0.0, |(first, _)| exposed.saturating_duration_since(first).as_secs_f64()),
            packed: finished.packed,
            codec_chosen: ballots[0].codec,
            step_s: start.elapsed().as_secs_f64(),
        })
    }

    /// Enters a span that ends now.
    fn span(&self, begin: Instant, label: Label) {
        if let Some(trace) = &self.trace {
            trace.span(Track::Compute, begin, label);
        }
    }

    fn apply(&self, state: &mut State, recipe: &Recipe, sum: &Sum<'_>, learning_rate: f64, scale: f32) {
        for (index, parameter) in self.plan.parameters().iter().enumerate() {
            let decay = parameter.shape.len() > 1;
            AdamW::new(&recipe.optimizer, learning_rate, state.updates, scale, decay).update(&mut optimizer::Range {
                weights: &mut state.weights[index],
                gradients: sum.parameter(index),
                m: &mut state.m[index],
                v: &mut state.v[index],
            });
        }
    }

    /// The model of these weights, with a tap on every parameter.
    fn model(&self, weights: &[Vec<f32>]) -> Llama {
        let mut next = 0;
        Llama::build(&self.config, &self.device, &mut |name, shape| {
            let index = next;
            next += 1;
            assert_eq!(self.plan.parameters()[index].name, name, "the builder follows the plan");
            Leaf { data: TensorData::new(weights[index].clone(), shape.to_vec()), hook: self.hooks[index].clone() }
        })
    }
}

/// Compares the ranks' hashes of the parameters after step `step`, where they were sent.
///
/// # Errors
/// They differ.
pub fn same_parameters(hashes: &[Option<[u8; 32]>], step: u64) -> Result<()> {
    let text = |hash: [u8; 32]| blake3::Hash::from_bytes(hash).to_hex().to_string();
    match hashes.iter().position(|hash| *hash != hashes[0]) {
        Some(rank) => {
            let hashes = [0, rank].map(|rank| hashes[rank].map_or_else(|| "none".into(), text));
            Err(Error::Replicas { step, rank, hashes })
        }
        None => Ok(()),
    }
}

/// Seconds from `exposed`, when the last backward pass returned, to the whole sum; and the part of the gradients' way
/// that was over by then.
fn hidden(timing: &Timing, exposed: Instant) -> (f64, Option<f64>) {
    let Some((first, last)) = timing.span else { return (0.0, None) };
    let exposed_s = last.saturating_duration_since(exposed).as_secs_f64();
    let whole_s = last.saturating_duration_since(first).as_secs_f64();
    (exposed_s, (whole_s > 0.0).then(|| (1.0 - exposed_s / whole_s).max(0.0)))
}

/// What training passes as `tamper`.
#[must_use]
pub fn untouched(_: usize, loss: Tensor<1>) -> Tensor<1> {
    loss
}

/// The model of these weights without taps, for evaluation and generation.
#[must_use]
pub fn plain_model(config: &Config, device: &Device, weights: &[Vec<f32>]) -> Llama {
    let mut weights = weights.iter();
    Llama::build(config, device, &mut |_, shape| {
        let values = weights.next().expect("one vector for each parameter of the list").clone();
        Leaf { data: TensorData::new(values, shape.to_vec()), hook: Hook::default() }
    })
}

fn take<const D: usize>(stream: &GradientStream, index: usize, gradient: Tensor<D>) -> Option<Tensor<D>> {
    let elements = gradient.shape().num_elements();
    stream.add(index, Gradient::Device(Box::new(gradient.reshape([elements]))));
    None
}

impl Batch {
    /// `[inputs, targets]` on the device.
    #[must_use]
    pub fn tensors(&self, device: &Device) -> [Tensor<2, Int>; 2] {
        let shape = [self.rows, self.targets.len() / self.rows];
        [&self.inputs, &self.targets].map(|ids| Tensor::from_data(TensorData::new(ids.clone(), shape), device))
    }
}

/// Reads a tensor of one element.
///
/// # Errors
/// The device failed.
pub fn scalar(x: Tensor<1>, step: u64) -> Result<f64> {
    let failed = |what: String| Error::Device { step, what };
    let data = x.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    data.iter::<f64>().next().ok_or_else(|| failed("the loss has no element".into()))
}

/// The L2 norm of the whole gradient: f64 sums of each parameter, added in logical order.
fn global_norm(sum: &Sum<'_>) -> f64 {
    use rayon::prelude::*;
    // Fixed pieces, summed one by one and then in order: the same bits at any number of threads.
    const PIECE: usize = 1 << 15;
    let total: f64 = sum
        .parameters()
        .map(|values| {
            let pieces: Vec<f64> = values.par_chunks(PIECE).map(squares).collect();
            pieces.iter().sum::<f64>()
        })
        .sum();
    total.sqrt()
}

/// The sum of squares in eight lanes, which a processor adds side by side.
fn squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    let (eights, rest) = values.as_chunks::<8>();
    for eight in eights {
        for (lane, x) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
}

/// What the gradient is multiplied with so that its norm is at most `limit`.
fn clip_factor(norm: f64, limit: Option<f64>) -> f32 {
    match limit {
        Some(limit) if norm > limit => (limit / norm) as f32,
        _ => 1.0,
    }
}

#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod tests;
