//! One training step, from tokens to new weights.
//!
//! - `passes`: forward and backward; `staged`: the same where a rank has a stage of a pipeline.
//! - `taps`: how gradients leave a backward pass; `replicas`: whether ranks hold the same parameters.
//! - `report`: what a step did.
//! - `owned`: what a sharded optimiser does with what a rank owns, once all have voted.
//! - `update`: what happens to the parameters when all ranks have voted, at the end of the step or in the next one.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};
use compression::Codec;
use parallel::data::engine::{Engine, Packed};
use parallel::data::exchange::Verdict;
use parallel::data::{GradientStream, Plan, Voted};
use parallel::note::Ballot;
use parallel::progress::{Progress, Stage};
use parallel::trace::{Label, Trace, Track};

use crate::cut::is_table;
use crate::error::{Error, Result};
use crate::model::{Config, Hook};
use crate::optimizer::{self, AdamW};
use crate::recipe::Recipe;
use crate::replica::Replica;
use crate::state::State;

use self::passes::Passed;
use self::report::loss;
use self::staged::Table;
use self::taps::hooks;
use self::update::{Behind, Due, Ended, Updater};

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
    /// The other ranks that hold this model, where several hold it together.
    replica: Option<Replica>,
    /// The gradient of a tied table that another stage has too.
    table: Option<Arc<Table>>,
    /// The step and the pass of its stage before which this process dies, if a test wants that.
    dies_at: OnceLock<(u64, usize)>,
    /// The last step, if it was decided and not [settled](Self::settle).
    due: Mutex<Option<Due>>,
}

impl Stepper {
    /// A stepper for this model; `device` is without autodiff.
    ///
    /// # Errors
    /// A model whose parameters do not fit the address space.
    pub fn new(config: &Config, device: &Device, bucket_bytes_max: usize) -> Result<Self> {
        let plan = Plan::new(config.parameters(), bucket_bytes_max).map_err(|e| Error::Usage(e.to_string()))?;
        Ok(Self::with(config, device, GradientStream::new(Arc::new(plan)), None))
    }

    /// The stepper of one rank of several. The engine's plan is [`Plan::new`] of the model's parameters, or
    /// [`Plan::of_parts`] of what this rank holds of the model.
    #[must_use]
    pub fn across(config: &Config, device: &Device, engine: Engine, replica: Option<Replica>) -> Self {
        Self::with(config, device, GradientStream::across(engine), replica)
    }

    fn with(config: &Config, device: &Device, stream: GradientStream, replica: Option<Replica>) -> Self {
        let progress = stream.engine().map(|engine| engine.progress().clone()).unwrap_or_default();
        let (plan, stream) = (stream.plan().clone(), Arc::new(stream));
        let ties = replica.as_ref().and_then(Replica::stage).is_some_and(crate::pipeline::Stage::ties);
        let table = plan.parameters().iter().position(|parameter| ties && is_table(&parameter.name));
        let table = table.map(|index| Arc::new(Table::new(index)));
        let hooks = hooks(&stream, replica.as_ref().and_then(Replica::slice), table.as_ref());
        let (config, device) = (config.clone(), device.clone().autodiff());
        Self {
            config,
            device,
            plan,
            stream,
            hooks,
            progress,
            trace: None,
            replica,
            table,
            dies_at: OnceLock::new(),
            due: Mutex::default(),
        }
    }

    /// The other ranks that hold this model, where several hold it together.
    #[must_use]
    pub const fn replica(&self) -> Option<&Replica> {
        self.replica.as_ref()
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

    /// This process is to die in this step, before the pass of this number in the order of its stage's schedule.
    pub fn die_at(&self, step: u64, pass: usize) {
        _ = self.dies_at.set((step, pass));
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
        let mut report = self.step_ahead(state, recipe, batches, word, tamper)?;
        self.progress.enter(Stage::Updating);
        let update = Instant::now();
        if let Some(ended) = self.bring_up(state)? {
            report.note(ended, 0.0);
        }
        self.span(update, Label::new("update", report.step));
        report.step_s = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// As [`step`](Self::step), up to where all ranks have voted. `state` has the numbers of the step, and its parameters and
    /// moments are those of the step before until the next step or [`settle`](Self::settle): sums still travel.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_ahead(
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
        self.progress.begin(step);
        let behind = self.behind(state, Stage::Forward);
        let work = (batches, tokens);
        let Passed { loss, forward_s, backward_s, first_forward_s, stage_wait_s, before } =
            match self.replica.as_ref().and_then(Replica::stage) {
                Some(stage) => self.staged((stage, state), work, behind.as_ref(), tamper)?,
                None => self.passes(state, work, behind.as_ref(), tamper)?,
            };
        let backward_end = Instant::now();
        self.progress.enter(Stage::Waiting);
        let Word { stop, busy, parameters, codec } = word;
        let (finite, compute_s) = (loss.is_finite(), forward_s + backward_s);
        // Of the ranks that hold one model together several may have the same loss, and one of them says it.
        let loss = if self.replica.as_ref().is_none_or(Replica::speaks) { loss } else { 0.0 };
        let voted = self.stream.vote(Ballot { finite, stop, busy, loss, compute_s, parameters, codec })?;
        // Whoever is stuck from here on keeps the others waiting.
        self.progress.enter(Stage::Updating);
        self.span(backward_end, Label::new("wait", step));

        let hashes: Vec<_> = voted.ballots.iter().map(|ballot| ballot.parameters).collect();
        same_parameters(&hashes, self.places(), state.step)?;
        let rules = self.decide(state, recipe, &voted);
        self.send_owned(state, voted.verdict, rules.as_deref());
        let mut report = Report::of(&voted, state, recipe);
        report.tokens = tokens as u64;
        (report.forward_s, report.backward_s, report.stage_wait_s) = (forward_s, backward_s, stage_wait_s);
        report.wire = self.stream.counted();
        *self.due() = Some(Due { rules, step, backward_end, vote_wait_s: voted.wait_s });
        if let Some(ended) = before {
            report.note(ended, first_forward_s);
        }
        self.span(start, Label::new("step", step));
        report.step_s = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// How ranks that hold one replica of the model together share it.
    #[must_use]
    pub fn places(&self) -> Places {
        self.replica.as_ref().map_or(Places::ONE, Replica::places)
    }

    /// What went wrong in a pass, if something did: inside it nothing can be returned.
    fn check(&self, step: u64) -> Result<()> {
        self.replica.as_ref().map_or(Ok(()), |replica| replica.check(step))
    }

    /// Brings `state` up to its step, whose sums it waits for. Returns what zstd served meanwhile, if it was behind.
    ///
    /// # Errors
    /// A rank is lost, or the run was aborted.
    pub fn settle(&self, state: &mut State) -> Result<Option<Packed>> {
        Ok(self.bring_up(state)?.map(|ended| ended.complete.packed))
    }

    fn bring_up(&self, state: &mut State) -> Result<Option<Ended>> {
        let behind = self.behind(state, Stage::Updating);
        self.catch_up(state, behind.as_deref())
    }

    /// Whether a state is up to its step: parameters and moments count.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.due().is_none()
    }

    /// The parameters of a state that is behind its step, as a forward pass may ask for them.
    fn behind(&self, state: &mut State, stage: Stage) -> Option<Arc<Behind>> {
        let due = self.due().clone()?;
        let (stream, progress, trace) = (self.stream.clone(), self.progress.clone(), self.trace.clone());
        Some(Arc::new(Behind::take(state, due, Updater { stream, progress, stage, trace })))
    }

    fn catch_up(&self, state: &mut State, behind: Option<&Behind>) -> Result<Option<Ended>> {
        let Some(behind) = behind else { return Ok(None) };
        let mut spent = behind.give_back(state)?;
        let start = Instant::now();
        let complete = self.stream.settle()?;
        if self.engine().is_some() {
            spent.wait_s += start.elapsed().as_secs_f64();
        }
        let due = self.due().take().expect("whoever is behind has something due");
        Ok(Some(Ended { complete, spent, due }))
    }

    /// Counts the step, and says what happens to each parameter; nothing when it is skipped.
    fn decide(&self, state: &mut State, recipe: &Recipe, voted: &Voted) -> Option<Arc<[AdamW]>> {
        let step = state.step + 1;
        state.step = step;
        // With several ranks the votes have covered both; a sum that is finite has a finite norm.
        if voted.verdict == Verdict::Skip || !(voted.norm.is_finite() && loss(voted).is_finite()) {
            state.skips += 1;
            return None;
        }
        state.skips = 0;
        state.good_step = step;
        state.updates += 1;
        // What one rank alone owed was in its gradient.
        self.stream.owed().settle();
        let rate = optimizer::learning_rate(&recipe.schedule, step, recipe.train.steps);
        let scale = clip_factor(voted.norm, recipe.train.clip_norm);
        let rule = |decay| AdamW::new(&recipe.optimizer, rate, state.updates, scale, decay);
        Some(self.plan.parameters().iter().map(|parameter| rule(parameter.shape.len() > 1)).collect())
    }

    /// With a sharded optimiser: updates what this rank owns and sends it, first what the next forward pass needs first.
    fn send_owned(&self, state: &mut State, verdict: Verdict, rules: Option<&[AdamW]>) {
        if verdict == Verdict::Skip || !state.sharding.is_on() {
            return;
        }
        let start = Instant::now();
        self.progress.enter(Stage::Updating);
        owned::send(&self.stream, state, rules);
        self.span(start, Label::new("update", state.step));
    }

    fn due(&self) -> MutexGuard<'_, Option<Due>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a span that ends now.
    fn span(&self, begin: Instant, label: Label) {
        if let Some(trace) = &self.trace {
            trace.span(Track::Compute, begin, label);
        }
    }
}

/// What training passes as `tamper`.
#[must_use]
pub fn untouched(_: usize, loss: Tensor<1>) -> Tensor<1> {
    loss
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

/// What the gradient is multiplied with so that its norm is at most `limit`.
fn clip_factor(norm: f64, limit: Option<f64>) -> f32 {
    match limit {
        Some(limit) if norm > limit => (limit / norm) as f32,
        _ => 1.0,
    }
}

mod owned;
mod passes;
mod replicas;
mod report;
mod staged;
mod taps;
mod update;

pub use replicas::{Places, same_parameters};
pub use report::Report;
pub use staged::values;
pub use taps::{plain_model, plain_pieces};
pub(crate) use update::piece_elements;

#[cfg(test)]
mod ahead_tests;
#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod owned_tests;
#[cfg(test)]
mod tests;
