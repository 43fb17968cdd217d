//! One run from recipe to exported model.
//!
//! - [`folder`]: the run's folder, its lock and its `run.json`.
//! - [`metrics`]: `metrics.jsonl` and `events.jsonl`; [`tensorboard`]: event files.
//! - [`progress`]: what a person sees.
//! - [`evaluate`]: the loss on held-out text.
//! - [`signals`]: being asked to stop.
//! - [`finish`]: what happens after the last step.

pub mod evaluate;
pub mod finish;
pub mod folder;
pub mod metrics;
pub mod progress;
pub mod signals;
pub mod tensorboard;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use checkpoint::disk::RealDisk;
use checkpoint::reader::{self, Checkpoint};
use checkpoint::writer::{Offer, Outcome, Retention, Writer};
use serde_json::json;

use crate::data::{self, Data, order};
use crate::device;
use crate::error::{Error, Result};
use crate::log::RunLog;
use crate::model::Config;
use crate::recipe::{Raw, Recipe};
use crate::state::{self, Meta};
use crate::step::{Report, State, Stepper, untouched};
use crate::weights::Weights;

use evaluate::{Place, evaluate};
use folder::{Folder, Status, Summary};
use metrics::{Line, Metrics};
use progress::Progress;
use signals::Stop;

/// What `tributary train` was asked for.
#[derive(Debug)]
pub struct Order {
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
    /// The newest checkpoint that was committed, and what went wrong with those after it.
    committed: Option<u64>,
    failure: Option<checkpoint::CheckpointError>,
}

/// Trains as ordered.
///
/// # Errors
/// Everything that can go wrong; the run's folder then says `failed`, and its checkpoints are as they were.
pub fn train(order: Order) -> Result<Ended> {
    let started = Instant::now();
    let recipe = &order.recipe;
    device::set_threads(recipe.device.threads);
    let stop =
        Stop::on_signals(recipe.checkpoint.grace_s).map_err(Error::io("listen for signals in", "this process"))?;
    let runs = &recipe.metrics.runs_dir;
    // A name that is taken should be said before the text is read.
    if !order.resume && runs.join(&order.name).exists() {
        Folder::create(runs, &order.name, &order.raw)?;
    }
    let from = recipe.model.from.as_ref().map(|from| Weights::open(from, runs)).transpose()?;
    let data = data::prepare(recipe, from.as_ref().map(|from| from.tokenizer.as_slice()), &order.registry)?;
    let config = shape(recipe, &data, from.as_ref())?;
    let (folder, changed) = match order.resume {
        true => Folder::resume(runs, &order.name, &order.raw)?,
        false => (Folder::create(runs, &order.name, &order.raw)?, Vec::new()),
    };
    order.log.open(&folder.file("logs/rank-0.log"))?;
    let old = folder.summary().filter(|_| order.resume);
    let parts = Parts { order, started, stop, data, config, from, changed };
    let result = Run::open(&folder, parts).and_then(|mut run| run.go(&folder));
    if result.is_err() {
        let mut summary = folder.summary().or(old).unwrap_or_else(|| Summary {
            status: Status::Failed,
            step: 0,
            loss: None,
            held_out_bits_per_byte: None,
            parameter_hash: None,
            tokens: 0,
            wall_s: started.elapsed().as_secs_f64(),
            mesh: MESH.into(),
            codec: String::new(),
            version: crate::VERSION.into(),
        });
        summary.status = Status::Failed;
        // The error that ended the run is the one to report.
        let _ = folder.write_summary(&summary);
    }
    result
}

/// What a run is put together from.
struct Parts {
    order: Order,
    started: Instant,
    stop: Stop,
    data: Data,
    config: Config,
    from: Option<Weights>,
    /// What a resume changed of the recipe.
    changed: Vec<String>,
}

const MESH: &str = "1 x 1 x 1";

/// The model's shape, compared with the weights that it starts from.
fn shape(recipe: &Recipe, data: &Data, from: Option<&Weights>) -> Result<Config> {
    let known = from.map(|from| &from.config);
    let config = Config::from_keys(&recipe.model, data.tokenizer.vocab_size(), recipe.train.seq_len, known)
        .ok_or_else(|| Error::Usage("[model]: expected every size, or `model.from`".into()))?;
    config.check().map_err(|what| Error::Usage(format!("[model]: {what}")))?;
    if recipe.train.seq_len > config.max_position_embeddings {
        return Err(Error::Usage(format!(
            "train.seq_len: expected at most model.max_position_embeddings = {}, found {}",
            config.max_position_embeddings, recipe.train.seq_len
        )));
    }
    Ok(config)
}

impl Run {
    fn open(folder: &Folder, parts: Parts) -> Result<Self> {
        let Parts { order, started, stop, data, config, from, changed } = parts;
        let recipe = order.recipe;
        let device = device::open(&recipe.device);
        let stepper = Stepper::new(&config, &device, recipe.bucket_bytes_max)?;
        let newest = if order.resume { newest_good(folder)? } else { None };
        let (state, tokens, last_loss) = match (&newest, from) {
            (Some(checkpoint), _) => {
                let (state, meta) = State::load(checkpoint, &config)?;
                (state, meta.tokens, meta.loss)
            }
            (None, Some(from)) => (State::fresh(from.read(&config)?), 0, None),
            (None, None) => (State::initial(&config, recipe.train.seed), 0, None),
        };
        let writer = Writer::new(
            Arc::new(RealDisk),
            folder.checkpoints(),
            state::specs(&config),
            Retention { keep_last: recipe.checkpoint.keep_last },
        )?;
        let resumed_at = order.resume.then_some(state.step);
        let mut metrics = Metrics::open(folder.path(), resumed_at, recipe.metrics.tensorboard)?;
        let progress = Progress::new(state.step, recipe.train.steps, recipe.metrics.log_every);
        if order.resume {
            metrics.event("resumed", state.step, json!({ "changed": changed }));
            progress.say(&format!("run {}: going on after step {}", folder.name(), state.step));
            for change in &changed {
                progress.say(&format!("changed: {change}"));
            }
        }
        let wall_before_s = folder.summary().map_or(0.0, |summary| summary.wall_s);
        Ok(Self {
            recipe_toml: order.raw.to_toml(),
            recipe_hash: order.raw.hash(),
            committed: newest.map(|checkpoint| checkpoint.step()),
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
            wall_before_s: if order.resume { wall_before_s } else { 0.0 },
            last_loss,
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
            if due(step, self.recipe.eval.every) && step < self.recipe.train.steps {
                line.eval_loss = self.evaluate(self.recipe.eval.windows)?.map(|evaluation| evaluation.loss());
            }
            let due = due(step, self.recipe.checkpoint.every) && step < last;
            // The line comes first: a checkpoint never knows of a step that the metrics do not.
            self.metrics.step(&line)?;
            self.progress.step(&line);
            if due {
                self.checkpoint();
            }
            let outcomes = self.writer.outcomes();
            self.note(outcomes);
        }
        self.progress.finish();
        self.last_checkpoint()?;
        let ended = match () {
            () if self.state.step >= self.recipe.train.steps => Ended::Done,
            () if self.stop.asked() => Ended::Signalled,
            () => Ended::Stopped,
        };
        if ended == Ended::Done && finish::finish(self, folder)? {
            return Ok(Ended::Done);
        }
        folder.write_summary(&self.summary(Status::Interrupted))?;
        let step = self.state.step;
        self.progress.say(&format!("stopped after step {step}, with a checkpoint: go on with --resume"));
        Ok(if ended == Ended::Stopped { ended } else { Ended::Signalled })
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

    fn evaluate(&self, windows: usize) -> Result<Option<evaluate::Evaluation>> {
        let Some(tokens) = &self.data.held_out else { return Ok(None) };
        let place = Place {
            config: &self.config,
            device: &self.device,
            seq_len: self.recipe.train.seq_len,
            rows: self.recipe.train.micro_batch_size,
            step: self.state.step,
            stop: &self.stop,
        };
        evaluate(&place, &self.state.weights, tokens, windows)
    }

    /// Offers a snapshot; the writer does the rest while training goes on. Returns the seconds of the stall.
    fn checkpoint(&mut self) -> f64 {
        let meta = Meta {
            step: self.state.step,
            updates: self.state.updates,
            skips: self.state.skips,
            good_step: self.state.good_step,
            samples: self.state.step * (self.recipe.train.micro_batch_size * self.recipe.train.micro_batches) as u64,
            tokens: self.tokens,
            loss: self.last_loss,
            seed: self.recipe.train.seed,
            recipe_hash: self.recipe_hash.clone(),
            model: self.config.clone(),
            end_of_text: self.data.tokenizer.end_of_text_name().to_owned(),
        };
        let attachments = state::attachments(self.data.tokenizer.json(), &self.recipe_toml);
        let state = &self.state;
        match self.writer.offer(meta.step, json!(meta), attachments, |snapshot| state.snapshot(snapshot)) {
            Offer::Taken { copy_s } => copy_s,
            Offer::Busy => {
                let why = "two snapshots are being written";
                self.metrics.event("snapshot_skipped", self.state.step, json!({ "why": why }));
                0.0
            }
        }
    }

    /// The checkpoint that a run must not end without.
    fn last_checkpoint(&mut self) -> Result<()> {
        let outcomes = self.writer.flush();
        self.note(outcomes);
        if self.state.step > 0 && self.committed != Some(self.state.step) {
            self.checkpoint();
            let outcomes = self.writer.flush();
            self.note(outcomes);
        }
        match self.failure.take() {
            Some(failure) if self.committed != Some(self.state.step) && self.state.step > 0 => Err(failure.into()),
            _ => Ok(()),
        }
    }

    fn note(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Committed { step, path, bytes, seconds, removed } => {
                    self.committed = Some(step);
                    let fields = json!({ "path": path, "bytes": bytes, "seconds": seconds, "removed": removed });
                    self.metrics.event("checkpoint", step, fields);
                }
                Outcome::Failed { step, error } => {
                    let kept =
                        self.committed.map_or("there is none before it".into(), |s| format!("step {s}'s is kept"));
                    self.metrics.event("checkpoint_failed", step, json!({ "error": error.to_string() }));
                    self.progress.say(&format!(
                        "the checkpoint of step {step} was not written ({kept}), training goes on: {error}"
                    ));
                    self.failure = Some(error);
                }
            }
        }
    }

    fn summary(&self, status: Status) -> Summary {
        let hash = (status != Status::Running).then(|| self.state.parameter_hash(&self.config));
        Summary {
            status,
            step: self.state.step,
            loss: self.last_loss,
            held_out_bits_per_byte: None,
            parameter_hash: hash,
            tokens: self.tokens,
            wall_s: self.wall_before_s + self.started.elapsed().as_secs_f64(),
            mesh: MESH.into(),
            codec: self.recipe.codec.to_string(),
            version: crate::VERSION.into(),
        }
    }
}

/// Whether something that happens every `every` steps happens at `step`; 0 is never.
const fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The newest checkpoint of the run, verified whole; `None` when it was killed before the first.
fn newest_good(folder: &Folder) -> Result<Option<Checkpoint>> {
    let Some((_, path)) = reader::list(&folder.checkpoints())?.pop() else { return Ok(None) };
    let open = || {
        let checkpoint = Checkpoint::open(&path)?;
        checkpoint.verify()?;
        Ok::<_, checkpoint::CheckpointError>(checkpoint)
    };
    open().map(Some).map_err(|error| Error::Run {
        name: folder.name().into(),
        what: format!(
            "its newest checkpoint is damaged: {error}\nremove {} to resume from the one before it",
            path.display()
        ),
    })
}
