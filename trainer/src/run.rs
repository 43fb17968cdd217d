//! One run from recipe to exported model.
//!
//! - [`folder`]: the run's folder, its lock and its `run.json`.
//! - [`metrics`]: `metrics.jsonl` and `events.jsonl`; [`tensorboard`]: event files.
//! - [`progress`]: what a person sees.
//! - [`mod@evaluate`]: the loss on held-out text.
//! - [`signals`]: being asked to stop.
//! - [`save`]: checkpoints of a run, and the way back from them.
//! - [`start`]: everything before the first step.
//! - [`finish`]: what happens after the last step.

pub mod evaluate;
pub mod finish;
pub mod folder;
pub mod metrics;
pub mod progress;
pub mod save;
pub mod signals;
pub mod start;
pub mod tensorboard;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use checkpoint::disk::RealDisk;
use checkpoint::writer::{Retention, Writer};
use serde_json::json;

use crate::data::{Data, order};
use crate::error::{Error, Result};
use crate::log::RunLog;
use crate::model::Config;
use crate::recipe::{Raw, Recipe};
use crate::state;
use crate::state::State;
use crate::step::{Report, Stepper, untouched};

use evaluate::{Place, evaluate};
use folder::{Folder, Status};
use metrics::{Line, Metrics};
use progress::Progress;
use signals::Stop;

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
    /// Cargo's folder of unpacked sources.
    pub registry: PathBuf,
    /// Where log lines go once there is a folder.
    pub log: RunLog,
}

/// How a run ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every step was taken.
    Done,
    /// `train.stop_at_step`: as asked.
    Stopped,
    /// A signal.
    Signalled,
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
    metrics: Metrics,
    progress: Progress,
    stop: Stop,
    started: Instant,
    wall_before_s: f64,
    last_loss: Option<f64>,
    /// Seconds of the snapshots since the last line of metrics.
    stall_s: f64,
    /// The newest checkpoint that was committed, and what went wrong with those after it.
    committed: Option<u64>,
    failure: Option<checkpoint::CheckpointError>,
}

/// What a run is put together from.
struct Parts {
    request: Request,
    started: Instant,
    stop: Stop,
    device: Device,
    data: Data,
    config: Config,
    state: State,
    tokens: u64,
    last_loss: Option<f64>,
    committed: Option<u64>,
    /// Whether the run's folder was there before.
    resumed: bool,
    /// What a resume changed of the recipe.
    changed: Vec<String>,
}

const MESH: &str = "1 x 1 x 1";

impl Run {
    fn open(folder: &Folder, parts: Parts) -> Result<Self> {
        let Parts {
            request,
            started,
            stop,
            device,
            data,
            config,
            state,
            tokens,
            last_loss,
            committed,
            resumed,
            changed,
        } = parts;
        let recipe = request.recipe;
        folder.keep_recipe(&request.raw)?;
        request.log.open(&folder.file("logs/rank-0.log"))?;
        let stepper = Stepper::new(&config, &device, recipe.bucket_bytes_max)?;
        let writer = Writer::new(
            Arc::new(RealDisk),
            folder.checkpoints(),
            state::specs(&config),
            Retention { keep_last: recipe.checkpoint.keep_last },
        )?;
        let resumed_at = resumed.then_some(state.step);
        let mut metrics = Metrics::open(folder.path(), resumed_at, recipe.metrics.tensorboard)?;
        let progress = Progress::new(state.step, recipe.train.steps, recipe.metrics.log_every);
        if resumed {
            metrics.event("resumed", state.step, json!({ "changed": changed }));
            progress.say(&format!("run {}: going on after step {}", folder.name(), state.step));
            for change in &changed {
                progress.say(&format!("changed: {change}"));
            }
        }
        let wall_before_s = folder.summary().map_or(0.0, |summary| summary.wall_s);
        Ok(Self {
            recipe_toml: request.raw.to_toml(),
            recipe_hash: request.raw.hash(),
            committed,
            config,
            device,
            data,
            stepper,
            state,
            tokens,
            writer,
            metrics,
            progress,
            stop,
            started,
            wall_before_s: if resumed { wall_before_s } else { 0.0 },
            last_loss,
            stall_s: 0.0,
            failure: None,
            recipe,
        })
    }

    /// The loop over steps, and the end.
    fn go(&mut self, folder: &Folder) -> Result<Ended> {
        self.say_what();
        folder.write_summary(&self.summary(Status::Running))?;
        let last = self.recipe.train.stop_at_step.unwrap_or(u64::MAX).min(self.recipe.train.steps);
        while self.state.step < last && !self.stop.asked() {
            let mut line = self.step()?;
            let step = line.step;
            if due(step, self.recipe.eval.every) {
                // Not to be stopped: the line must be the same in a run that nobody interrupts.
                let evaluation = self.evaluate(self.recipe.eval.windows, &Stop::default())?;
                line.eval_loss = evaluation.map(|evaluation| evaluation.loss());
            }
            line.checkpoint_stall_s = std::mem::take(&mut self.stall_s);
            let due = due(step, self.recipe.checkpoint.every) && step < last;
            // The line comes first: a checkpoint never knows of a step that the metrics do not.
            self.metrics.step(&line)?;
            self.progress.step(&line);
            self.give_up_after(self.recipe.train.skip_max)?;
            if due {
                self.checkpoint();
            }
            let outcomes = self.writer.outcomes();
            self.note(outcomes, ", training goes on");
        }
        self.progress.finish();
        self.last_checkpoint()?;
        self.metrics.flush()?;
        let ended = match () {
            () if self.state.step >= self.recipe.train.steps => Ended::Done,
            () if self.stop.asked() => Ended::Signalled,
            () => Ended::Stopped,
        };
        if ended == Ended::Done && finish::finish(self, folder)? {
            return Ok(Ended::Done);
        }
        folder.write_summary(&self.summary(Status::Interrupted))?;
        self.progress.say(&match self.state.step {
            0 => "stopped before the first step: go on with --resume".to_owned(),
            step => format!("stopped after step {step}, with a checkpoint: go on with --resume"),
        });
        Ok(if ended == Ended::Stopped { ended } else { Ended::Signalled })
    }

    /// Ends the run when too many steps in a row were skipped.
    fn give_up_after(&self, skip_max: u64) -> Result<()> {
        let (step, skips, good) = (self.state.step, self.state.skips, self.state.good_step);
        if skips >= skip_max { Err(Error::NotFinite { step, skips, skip_max, good }) } else { Ok(()) }
    }

    fn say_what(&self) {
        let millions = self.config.parameter_count() as f64 / 1e6;
        let train = &self.recipe.train;
        let batch = train.seq_len * train.micro_batch_size * train.micro_batches;
        self.progress.say(&format!(
            "{millions:.2} M parameters, {batch} tokens a step, {:.2} M tokens of text ({:.1} MB), on {}",
            self.data.train.len() as f64 / 1e6,
            self.data.train.text_bytes() as f64 / 1e6,
            self.recipe.device.backend
        ));
    }

    /// One step and its line of metrics.
    fn step(&mut self) -> Result<Line> {
        let train = &self.recipe.train;
        let windows = self.data.train.windows(train.seq_len);
        let rows = train.micro_batch_size as u64;
        let first = self.state.step * rows * train.micro_batches as u64;
        let batches: Vec<_> = (0..train.micro_batches as u64)
            .map(|micro_batch| {
                let samples = first + micro_batch * rows..first + (micro_batch + 1) * rows;
                let starts: Vec<usize> =
                    samples.map(|sample| order::window(sample, windows, train.seed) as usize * train.seq_len).collect();
                evaluate::batch(&self.data.train, &starts, train.seq_len)
            })
            .collect();
        let report = self.stepper.step(&mut self.state, &self.recipe, &batches, untouched)?;
        self.tokens += report.tokens;
        let finite = |x: f64| x.is_finite().then_some(x);
        self.last_loss = finite(report.loss).or(self.last_loss);
        if report.skipped {
            let fields = json!({ "skips_in_a_row": self.state.skips, "why": "the loss or the gradient is not finite" });
            self.metrics.event("skip", self.state.step, fields);
        }
        Ok(self.line(&report))
    }

    fn line(&self, report: &Report) -> Line {
        let finite = |x: f64| x.is_finite().then_some(x);
        Line {
            step: self.state.step,
            loss: finite(report.loss),
            eval_loss: None,
            learning_rate: report.learning_rate,
            grad_norm: finite(report.grad_norm),
            tokens: self.tokens,
            tokens_per_s: report.tokens as f64 / report.step_s,
            step_s: report.step_s,
            forward_s: report.forward_s,
            backward_s: report.backward_s,
            encode_s: 0.0,
            wait_s: 0.0,
            exposed_s: report.exposed_s,
            overlap: None,
            wire_bytes_sent: 0,
            wire_bytes_received: 0,
            checkpoint_stall_s: 0.0,
            memory_bytes: metrics::memory_bytes(),
        }
    }

    fn evaluate(&self, windows: usize, stop: &Stop) -> Result<Option<evaluate::Evaluation>> {
        let Some(tokens) = &self.data.held_out else { return Ok(None) };
        let place = Place {
            config: &self.config,
            device: &self.device,
            seq_len: self.recipe.train.seq_len,
            rows: self.recipe.train.micro_batch_size,
            step: self.state.step,
            stop,
        };
        evaluate(&place, &self.state.weights, tokens, windows)
    }
}

/// Whether something that happens every `every` steps happens at `step`; 0 is never.
const fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
