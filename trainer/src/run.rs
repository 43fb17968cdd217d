//! One run from recipe to exported model.
//!
//! - [`folder`]: the run's folder, its lock and its `run.json`.
//! - [`metrics`]: `metrics.jsonl` and `events.jsonl`; [`tensorboard`]: event files.
//! - [`progress`]: what a person sees.
//! - [`mod@evaluate`]: the loss on held-out text.
//! - [`signals`]: being asked to stop.
//! - [`codec`]: which codec gradients travel in.
//! - [`save`]: checkpoints of a run, and the way back from them; [`room`]: whether there is room for one more.
//! - [`join`]: a rank's way into a run over several processes; [`group`]: its tie to the others; [`ender`]: how its process
//!   ends with theirs.
//! - [`trace`]: a picture of what each rank does when.
//! - [`start`]: everything before the first step; `step`: one step.
//! - [`merge`]: the whole model, where ranks hold parts of it.
//! - [`upload`]: copies of checkpoints in a store.
//! - [`finish`]: what happens after the last step.

pub mod codec;
pub mod ender;
pub mod evaluate;
pub mod finish;
pub mod folder;
pub mod group;
pub mod join;
pub mod merge;
pub mod metrics;
pub mod progress;
pub mod room;
pub mod save;
pub mod signals;
pub mod start;
mod step;
pub mod tensorboard;
pub mod trace;
pub mod upload;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use checkpoint::store::{Settings, Uploader};
use checkpoint::writer::Writer;
use indicatif::DecimalBytes;
use parallel::transport::Counted;

use crate::data::Data;
use crate::error::{Error, Result};
use crate::log::RunLog;
use crate::model::Config;
use crate::plan;
use crate::recipe::resolved::Parallel;
use crate::recipe::{Raw, Recipe};
use crate::state::State;
use crate::state::mesh::Mesh;
use crate::step::Stepper;
use crate::tamper::Tamper;

use codec::Codecs;
use evaluate::{Place, evaluate};
use folder::{Folder, Status};
use group::Group;
use metrics::Metrics;
use progress::Progress;
use signals::Stop;
use trace::Tracing;

/// What `tributary train` was asked for.
#[derive(Debug)]
pub struct Request {
    /// The recipe as written.
    pub raw: Raw,
    /// The recipe as validated.
    pub recipe: Recipe,
    /// The run's name.
    pub name: String,
    /// Whether to go on with a run that exists.
    pub resume: bool,
    /// Whether it may go on from an earlier checkpoint, where the newest is damaged.
    pub resume_from_earlier: bool,
    /// Whether it may go on without what ranks had left out of gradients, where nobody has that any more.
    pub resume_without_residuals: bool,
    /// Cargo's folder of unpacked sources.
    pub registry: PathBuf,
    /// Where log lines go once there is a folder.
    pub log: RunLog,
    /// How many steps are to be traced, if any.
    pub trace_steps: Option<u64>,
    /// Whether a codec that the run chose before is to be chosen anew.
    pub choose_codec_anew: bool,
    /// Of the environment, what stores want to know.
    pub store: Settings,
    /// Faults for tests.
    pub tamper: Tamper,
}

/// How a run ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every step was taken.
    Done,
    /// `train.stop_at_step`: as asked.
    Stopped,
    /// A signal, here or at another rank.
    Signalled,
}

/// What a rank has at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// How it ended.
    pub ended: Ended,
    /// The last step that was taken.
    pub step: u64,
    /// BLAKE3 of all parameters.
    pub parameter_hash: String,
}

/// A run at work.
struct Run {
    recipe: Recipe,
    recipe_toml: String,
    recipe_hash: String,
    config: Config,
    device: Device,
    data: Data,
    stepper: Stepper,
    state: State,
    tokens: u64,
    writer: Writer,
    /// Copies checkpoints to a store, on whoever commits them.
    uploader: Option<Uploader>,
    /// The run's files and what a person sees; one rank of several has them.
    metrics: Option<Metrics>,
    progress: Option<Progress>,
    /// The other ranks, if there are any.
    group: Option<Group>,
    /// All ranks, as checkpoints name them.
    mesh: Mesh,
    /// What gradients travel in; `None` with one rank.
    codecs: Option<Codecs>,
    tracing: Option<Tracing>,
    tamper: Tamper,
    /// Whether any rank was asked to stop, and whether any cannot take a snapshot, as of the last step.
    stopping: bool,
    busy: bool,
    stop: Stop,
    started: Instant,
    wall_before_s: f64,
    last_loss: Option<f64>,
    /// Buckets that zstd packs, as of the last step whose gradients have arrived.
    zstd_buckets: usize,
    /// Bytes at the sockets as of the last line of metrics.
    counted: Counted,
    /// Seconds of the snapshots since the last line of metrics.
    stall_s: f64,
    /// The newest checkpoint that was committed, and what went wrong with those after it.
    committed: Option<u64>,
    failure: Option<Error>,
    /// The first step of this process compares all ranks' parameters.
    first: bool,
    /// The step that was evaluated last, and its loss on held-out text.
    evaluated: Option<(u64, f64)>,
    /// The hash of all parameters at the end, where ranks hold parts of them.
    merged: Option<blake3::Hash>,
}

/// The mesh, as `run.json` says it.
fn mesh(recipe: &Recipe) -> String {
    let Parallel { data, pipeline, tensor, .. } = recipe.parallel;
    format!("{data} x {pipeline} x {tensor}")
}

impl Run {
    /// The loop over steps, and the end. `folder` is there on the rank that keeps the run's files.
    fn go(&mut self, folder: Option<&Folder>) -> Result<Ended> {
        self.say_what();
        self.keep_summary(folder, Status::Running)?;
        let last = self.recipe.train.stop_at_step.unwrap_or(u64::MAX).min(self.recipe.train.steps);
        if self.state.step < last {
            self.measure_link()?;
        }
        while self.state.step < last && !self.stopping() {
            let mut line = self.step()?;
            let step = line.step;
            if due(step, self.recipe.eval.every) {
                // Not to be stopped: the line must be the same in a run that nobody interrupts.
                let evaluation = self.evaluate(self.recipe.eval.windows, &Stop::default())?;
                line.eval_loss = evaluation.map(|evaluation| evaluation.loss());
                self.evaluated = line.eval_loss.map(|loss| (step, loss)).or(self.evaluated);
            }
            line.checkpoint_stall_s = std::mem::take(&mut self.stall_s);
            let due = due(step, self.recipe.checkpoint.every) && step < last;
            // The line comes first: a checkpoint never knows of a step that the metrics do not.
            if let (Some(metrics), Some(progress)) = (&mut self.metrics, &mut self.progress) {
                metrics.step(&line)?;
                progress.step(&line, self.group.as_ref().and_then(|group| group.f32_bytes));
            }
            self.give_up_after(self.recipe.train.skip_max)?;
            if due {
                if self.recipe.parallel.verify_every > 0 {
                    self.compare()?;
                }
                self.checkpoint_in_passing()?;
            }
            let outcomes = self.writer.outcomes();
            self.note(outcomes, ", training goes on");
            self.hear_of_uploads();
            self.listen(Duration::ZERO)?;
            if self.state.step < last && !self.stopping() {
                self.agree_on_codec()?;
            }
            if let Some(tracing) = &mut self.tracing {
                tracing.after(step)?;
            }
        }
        if let Some(progress) = &self.progress {
            progress.finish();
        }
        // Whoever was asked to stop may be behind.
        let packed = self.stepper.settle(&mut self.state)?;
        self.note_zstd(packed.as_ref());
        self.compare()?;
        self.last_checkpoint()?;
        if let Some(tracing) = &mut self.tracing {
            tracing.end()?;
        }
        if let Some(metrics) = &mut self.metrics {
            metrics.flush()?;
        }
        let ended = match () {
            () if self.state.step >= self.recipe.train.steps => Ended::Done,
            () if self.stopping() => Ended::Signalled,
            () => Ended::Stopped,
        };
        if ended == Ended::Done && finish::finish(self, folder)? {
            self.finish_uploads();
            return Ok(Ended::Done);
        }
        self.merge()?;
        self.say_goodbye();
        self.keep_summary(folder, Status::Interrupted)?;
        self.say(&match self.state.step {
            0 => "stopped before the first step: go on with --resume".to_owned(),
            step => format!("stopped after step {step}, with a checkpoint: go on with --resume"),
        });
        self.finish_uploads();
        Ok(if ended == Ended::Stopped { ended } else { Ended::Signalled })
    }

    /// Whether to stop in good order. Ranks stop together: what counts is what all of them heard in the last step's votes.
    fn stopping(&self) -> bool {
        if self.group.is_some() { self.stopping } else { self.stop.asked() }
    }

    fn keep_summary(&self, folder: Option<&Folder>, status: Status) -> Result<()> {
        match (folder, &self.metrics) {
            (Some(folder), Some(_)) => folder.write_summary(&self.summary(status)),
            _ => Ok(()),
        }
    }

    /// Says something to people, above the bar; on other ranks to the log.
    fn say(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.say(text),
            None => tracing::info!("{text}"),
        }
    }

    /// As [`say`](Self::say), and on other ranks to their standard error too.
    fn warn(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.say(text),
            None => tracing::warn!("{text}"),
        }
    }

    /// Writes down what is not a step.
    fn event(&mut self, kind: &str, step: u64, fields: serde_json::Value) {
        match &mut self.metrics {
            Some(metrics) => metrics.event(kind, step, fields),
            None => tracing::info!(kind, step, %fields),
        }
    }

    /// Ends the run when too many steps in a row were skipped.
    fn give_up_after(&self, skip_max: u64) -> Result<()> {
        let (step, skips, good) = (self.state.step, self.state.skips, self.state.good_step);
        if skips >= skip_max { Err(Error::NotFinite { step, skips, skip_max, good }) } else { Ok(()) }
    }

    fn say_what(&self) {
        let millions = self.config.parameter_count() as f64 / 1e6;
        let (train, ranks) = (&self.recipe.train, self.recipe.parallel.mesh().ranks());
        let batch = train.seq_len * train.micro_batch_size * self.recipe.parallel.micro_batches.iter().sum::<usize>();
        let over = match ranks {
            1 => String::new(),
            _ if ranks > self.recipe.parallel.data => format!(", {ranks} ranks: {}", self.recipe.parallel.mesh()),
            _ => format!(", {ranks} ranks"),
        };
        self.say(&format!(
            "{millions:.2} M parameters, {batch} tokens a step, {:.2} M tokens of text ({:.1} MB), on {}{over}",
            self.data.train.len() as f64 / 1e6,
            self.data.train.text_bytes() as f64 / 1e6,
            self.recipe.device.backend
        ));
        let packed = if self.recipe.checkpoint.zstd { " before packing" } else { "" };
        let bytes = plan::checkpoint_bytes_of(&self.recipe, &self.config);
        self.say(&format!("a checkpoint is {}{packed}", DecimalBytes(bytes as u64)));
    }

    /// This rank, and how many there are.
    fn place(&self) -> (usize, usize) {
        self.group.as_ref().map_or((0, 1), |group| (group.share.rank, group.share.ranks))
    }

    /// The loss on held-out text; ranks share the work. `None` when there is no such text, or when somebody asked to stop.
    fn evaluate(&self, windows: usize, stop: &Stop) -> Result<Option<evaluate::Evaluation>> {
        let Some(tokens) = &self.data.held_out else { return Ok(None) };
        assert!(self.stepper.is_settled(), "the parameters are of the step before");
        let start = Instant::now();
        let place = Place {
            config: &self.config,
            device: &self.device,
            seq_len: self.recipe.train.seq_len,
            rows: self.recipe.train.micro_batch_size,
            step: self.state.step,
            stop,
            engine: self.stepper.engine(),
            replica: self.stepper.replica(),
            progress: self.stepper.progress(),
        };
        let evaluation = evaluate(&place, &self.state.weights, tokens, windows);
        self.span("evaluate", start);
        evaluation
    }

    /// Enters a span that ends now into the trace, if there is one.
    fn span(&self, name: &'static str, begin: Instant) {
        if let Some(tracing) = &self.tracing {
            tracing.span(name, begin, self.state.step);
        }
    }
}

/// Whether something that happens every `every` steps happens at `step`; 0 is never.
const fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
