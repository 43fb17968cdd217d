//! Everything before the first step: whatever can be refused is refused here, then the run begins.
//!
//! - `newest`: the checkpoint to go on from; `bring`: where it is in a store alone.
//! - `rank`: what is different for one rank of several; `peers`: its way to the others; `restart`: what a checkpoint of other ranks had left out;
//!   `share`: its part of what all write and send; `exchange`: how its gradients are summed. `books`: what is written for
//!   people.

mod books;
mod bring;
mod exchange;
mod newest;
mod peers;
pub mod rank;
mod restart;
mod share;

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use checkpoint::disk::RealDisk;
use checkpoint::reader::{self, Checkpoint, Want};
use checkpoint::store::{Seat, Uploader};
use checkpoint::writer::{Retention, Writer};
use parallel::coordinator::state::RankNumbers;
use parallel::data::{Part, Plan};
use parallel::mesh;
use parallel::progress::Progress;

use super::codec::Codecs;
use super::folder::{Folder, Status, make_durably};
use super::group::Group;
use super::join::host;
use super::save::same_text;
use super::signals::{Manner, Stop};
use super::trace::Tracing;
use super::{Left, Request, Run, upload};
use crate::cut::Cut;
use crate::data::{self, Data};
use crate::device;
use crate::error::{Error, Result};
use crate::generate::prompt_tokens;
use crate::log::say;
use crate::model::Config;
use crate::prometheus::Port;
use crate::recipe::Recipe;
use crate::recipe::resolved::TokenizerSource;
use crate::state::folders::Folders;
use crate::state::mesh::Mesh;
use crate::state::sharding::Sharding;
use crate::state::{self, State};
use crate::step::Stepper;
use crate::weights::Weights;

use books::Books;
pub use bring::bring;
use newest::{Loaded, Newest};
pub use rank::train_rank;
use restart::Restart;

/// Trains in this process alone.
///
/// # Errors
/// Everything that can go wrong; the run's folder then says `failed`, and its checkpoints are as they were.
pub fn train(request: Request) -> Result<Left> {
    let started = Instant::now();
    device::compute(request.recipe.device.threads, || train_alone(request, started))
}

fn train_alone(request: Request, started: Instant) -> Result<Left> {
    let stop = Stop::default();
    let manner = Manner { grace_s: request.recipe.checkpoint.grace_s, second_ends: true };
    stop.listen(manner, || {}).map_err(Error::io("listen for signals in", "this process"))?;
    let runs = request.recipe.metrics.runs_dir.clone();
    // Whatever can be refused is refused before a new folder is made, and before a text is read if it needs none.
    bring(&request, 0, &[0])?;
    let existing = match request.resume {
        true => Folder::resume(&runs, &request.name, &request.raw)?,
        false => Folder::check_free(&runs, &request.name).map(|()| None)?,
    };
    if request.resume && existing.is_none() {
        say(&format!("run {}: there is nothing to resume, so it starts from the beginning", request.name));
    }
    make_runs(&runs)?;
    let port = Port::open(request.recipe.metrics.prometheus_port)?;
    let Newest { checkpoint: newest, loaded, set_aside } = match &existing {
        Some((folder, _)) => newest::newest(folder, request.resume_from_earlier, true)?,
        None => Newest::default(),
    };
    let ready = prepare(&request, newest.as_ref())?;
    let whole = Cut::new(&request.recipe, &ready.config)?.parts(&ready.config, 0)?;
    let folders = newest.as_ref().map(|newest| Folders::one(&request.name, newest));
    let begun = ready.begin(&request, (folders.as_ref(), loaded), (&whole, Sharding::NONE))?;
    let resumed = existing.is_some();
    let (folder, changed) = match existing {
        Some(existing) => existing,
        None => (Folder::create(&runs, &request.name)?, Vec::new()),
    };
    let mesh = Mesh { data: 1, pipeline: 1, tensor: 1, group: 1, hosts: vec![host()] };
    let open = || {
        folder.keep_recipe(&request.raw)?;
        request.log.open(&folder.file("logs/rank-0.log"))?;
        let stepper = Stepper::new(&ready.config, &ready.device, request.recipe.parallel.bucket_bytes_max)?;
        request.tamper.prepare(0, &stepper);
        let restart = Restart { request: &request, mesh: &mesh, rank: 0, others: None };
        let (owed, regained) = restart.owed(folders.as_ref(), stepper.plan())?;
        let owes = owed.has_place();
        stepper.stream().owe(owed);
        let tracing = begin_trace(&request, folder.path(), 0, stepper.plan(), begun.state.step)?;
        let stepper = stepper.traced(tracing.as_ref().map(Tracing::trace).cloned());
        let mut specs = state::specs(&ready.config);
        if owes {
            specs.extend(state::owner_specs(&ready.config));
        }
        let writer = Writer::new(Arc::new(RealDisk), folder.checkpoints(), specs, retention(&request.recipe))?;
        writer.pack(request.recipe.checkpoint.zstd);
        writer.read_back(request.recipe.checkpoint.read_back);
        let uploader =
            upload::start(&request, folder.checkpoints(), (Seat::Shared, vec![Seat::Shared]), begun.state.step)?;
        let mut books = Books::open(&request, &folder, resumed.then_some(begun.state.step), &changed)?;
        books.set_aside(&set_aside);
        books.regained(&regained, begun.state.step);
        Ok((stepper, (writer, uploader), books, tracing))
    };
    let (stepper, (writer, uploader), mut books, tracing) = match open() {
        Ok(opened) => opened,
        Err(error) => {
            if !resumed {
                folder.abandon();
            }
            return Err(error);
        }
    };
    let _endpoint = match port {
        Some(port) => {
            books.serves(&port.url(), begun.state.step);
            let progress = stepper.progress().clone();
            Some(port.serve(Arc::new(move || vec![alone(&progress)]))?)
        }
        None => None,
    };
    let (books, group, codecs) = (Some(books), None, None);
    let parts =
        Parts { request, started, stop, ready, begun, stepper, writer, uploader, books, group, mesh, codecs, tracing };
    let mut run = parts.run();
    work(&mut run, Some(&folder))
}

/// Makes the text of a run ready for the ranks that will follow, so that it is tokenised once.
///
/// # Errors
/// Everything that can be refused before there is a rank.
pub fn prepare_text(request: &Request) -> Result<()> {
    let runs = &request.recipe.metrics.runs_dir;
    if !request.resume {
        Folder::check_free(runs, &request.name)?;
    }
    make_runs(runs)?;
    read_text(request, peek(request)?.as_ref()).map(|_| ())
}

/// The loop of a run, whose folder says so when it fails.
fn work(run: &mut Run, folder: Option<&Folder>) -> Result<Left> {
    // A backend may panic in the middle of a step; the run's folder should say that it failed all the same.
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| run.go(folder)));
    if !matches!(result, Ok(Ok(_))) {
        if let Some(progress) = &run.progress {
            progress.finish();
        }
        // The error that ended the run is the one to report.
        let _ = run.keep_summary(folder, Status::Failed);
        // What was good before it failed is worth as much as ever. Of several ranks the others are about to end this one.
        if run.group.is_none() {
            run.finish_uploads();
        }
    }
    let ended = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let parameter_hash = run.parameter_hash().expect("a run that ends in good order has put its parts together");
    Ok(Left { ended, step: run.state.step, parameter_hash })
}

/// What a run needs before it is known where it starts.
struct Ready {
    device: Device,
    data: Data,
    config: Config,
    from: Option<Weights>,
}

/// Where a run starts.
struct Begun {
    state: State,
    tokens: u64,
    last_loss: Option<f64>,
    committed: Option<u64>,
}

struct Parts {
    request: Request,
    started: Instant,
    stop: Stop,
    ready: Ready,
    begun: Begun,
    stepper: Stepper,
    writer: Writer,
    uploader: Option<Uploader>,
    books: Option<Books>,
    group: Option<Group>,
    mesh: Mesh,
    codecs: Option<Codecs>,
    tracing: Option<Tracing>,
}

/// What the only rank says of itself.
fn alone(progress: &Progress) -> RankNumbers {
    let (mark, numbers) = (progress.mark(), progress.numbers());
    let (host, pid) = (host(), std::process::id());
    RankNumbers { rank: 0, host, pid, at: mark.text, waits: mark.waits, numbers }
}

/// What a rank records for a picture, if that is wanted.
fn begin_trace(
    request: &Request,
    folder: &Path,
    rank: usize,
    plan: &Arc<Plan>,
    before: u64,
) -> Result<Option<Tracing>> {
    request.trace_steps.map(|steps| Tracing::begin(folder, rank, plan.clone(), before, steps)).transpose()
}

fn make_runs(runs: &Path) -> Result<()> {
    make_durably(runs).map_err(|error| match error {
        Error::Io { source, .. } => Error::Folder { key: "metrics.runs_dir", path: runs.to_owned(), source },
        other => other,
    })
}

/// Which checkpoints a run keeps.
pub const fn retention(recipe: &Recipe) -> Retention {
    let keys = &recipe.checkpoint;
    Retention { keep_last: keys.keep_last, keep_every: keys.keep_every, keep_best: keys.keep_best }
}

/// The weights that a run starts from, and its text. `newest` is a checkpoint of the run, if there is one.
fn read_text(request: &Request, newest: Option<&Checkpoint>) -> Result<(Option<Weights>, Data)> {
    let recipe = &request.recipe;
    not_behind(request, newest)?;
    let from = match (&recipe.model.from, newest) {
        // What a run started from may be gone by now; its own checkpoints have all that it needs.
        (Some(_), Some(newest)) => Some(Weights::checkpoint(Checkpoint::open(newest.path())?)?),
        (Some(from), None) => Some(Weights::open(from, &recipe.metrics.runs_dir)?),
        (None, _) => None,
    };
    if let Some(from) = &from {
        fits(recipe, from)?;
    }
    let given = from.as_ref().map(|from| (from.tokenizer_json.as_slice(), from.end_of_text.as_str()));
    let data = data::prepare(recipe, given, &request.registry)?;
    Ok((from, data))
}

/// Everything that needs no other rank.
fn prepare(request: &Request, newest: Option<&Checkpoint>) -> Result<Ready> {
    let recipe = &request.recipe;
    let device = device::open(&recipe.device)?;
    let (from, data) = read_text(request, newest)?;
    let config = shape(recipe, data.tokenizer.vocab_size(), from.as_ref())?;
    if let Some(prompt) = &recipe.export.prompt {
        prompt_tokens(&data.tokenizer, "export.prompt", prompt, config.max_position_embeddings)?;
    }
    Ok(Ready { device, data, config, from })
}

/// The newest checkpoint of the run here, not verified yet: only to know its tokenizer.
fn peek(request: &Request) -> Result<Option<Checkpoint>> {
    let checkpoints = request.recipe.metrics.runs_dir.join(&request.name).join("checkpoints");
    if !request.resume {
        return Ok(None);
    }
    Ok(reader::list(&checkpoints)?.into_iter().rev().find_map(|(_, path)| Checkpoint::open(&path).ok()))
}

impl Ready {
    /// Where a rank that holds these parts starts. `loaded` is what the newest checkpoint holds, where it was read before. Where
    /// that is in several folders, all ranks call it at the same place.
    fn begin(
        &self,
        request: &Request,
        (folders, loaded): (Option<&Folders<'_>>, Option<Loaded>),
        (parts, sharding): (&[Part], Sharding),
    ) -> Result<Begun> {
        let newest = folders.map(Folders::here);
        not_behind(request, newest)?;
        let fresh = |state: State| state.sharded(parts.iter().map(|part| &part.whole), sharding);
        let (state, tokens, last_loss) = match (folders, &self.from) {
            (Some(folders), _) => {
                let newest = folders.here();
                same_text(&request.name, newest, &self.data)?;
                let whole = parts.iter().all(Part::is_whole) && !sharding.is_on();
                let (state, meta) = match loaded.filter(|loaded| whole && loaded.is_of(newest, &self.config)) {
                    Some(Loaded { state, meta, .. }) => {
                        // Others may want some of it.
                        folders.load(&mut [])?;
                        (state, meta)
                    }
                    None => {
                        let meta = state::meta(newest)?;
                        let load = |wants: &mut [Want<'_>]| folders.load(wants);
                        (State::load((&meta, parts, sharding), |name| folders.has(name), load)?, meta)
                    }
                };
                (state, meta.tokens, meta.loss)
            }
            (None, Some(from)) => (fresh(State::fresh(from.read_parts(&self.config, parts)?)), 0, None),
            (None, None) => (fresh(State::initial_parts(&self.config, parts, request.recipe.train.seed)), 0, None),
        };
        Ok(Begun { state, tokens, last_loss, committed: newest.map(Checkpoint::step) })
    }
}

impl Parts {
    fn run(self) -> Run {
        let Self {
            request,
            started,
            stop,
            ready,
            begun,
            stepper,
            writer,
            uploader,
            books,
            group,
            mesh,
            codecs,
            tracing,
        } = self;
        let Ready { device, data, config, from: _ } = ready;
        let Begun { state, tokens, last_loss, committed } = begun;
        let (metrics, progress, wall_before_s) = match books {
            Some(books) => (Some(books.metrics), Some(books.progress), books.wall_before_s),
            None => (None, None, 0.0),
        };
        Run {
            recipe_toml: request.raw.to_toml(),
            recipe_hash: request.raw.hash(),
            recipe: request.recipe,
            config,
            device,
            data,
            stepper,
            state,
            tokens,
            writer,
            uploader,
            metrics,
            progress,
            group,
            mesh,
            codecs,
            tracing,
            tamper: request.tamper,
            stopping: false,
            busy: false,
            stop,
            started,
            wall_before_s,
            last_loss,
            stall_s: 0.0,
            zstd_buckets: 0,
            counted: Default::default(),
            committed,
            failure: None,
            first: true,
            evaluated: None,
            merged: None,
        }
    }
}

/// A resumed run cannot have taken more steps than it is to take.
fn not_behind(request: &Request, newest: Option<&Checkpoint>) -> Result<()> {
    match newest {
        Some(newest) if newest.step() > request.recipe.train.steps => Err(Error::Run {
            name: request.name.clone(),
            what: format!(
                "train.steps: expected at least {}, the step of its newest checkpoint, found {}",
                newest.step(),
                request.recipe.train.steps
            ),
        }),
        _ => Ok(()),
    }
}

/// Compares the weights that a run starts from with its recipe, before any text is read.
fn fits(recipe: &Recipe, from: &Weights) -> Result<()> {
    let config = shape(recipe, from.config.vocab_size, Some(from))?;
    from.check(&config)?;
    if let TokenizerSource::File(path) = &recipe.tokenizer.source
        && std::fs::read(path).map_err(Error::io("read", path))? != from.tokenizer_json
    {
        let what = format!("vocabulary: {} is not the tokenizer that the weights were trained with", path.display());
        return Err(Error::Mismatch { path: from.path.clone(), mismatches: vec![what] });
    }
    Ok(())
}

/// The model's shape, compared with the weights that it starts from.
///
/// # Errors
/// Sizes that are missing or make no model.
pub fn shape(recipe: &Recipe, vocab_size: usize, from: Option<&Weights>) -> Result<Config> {
    let known = from.map(|from| &from.config);
    let config = Config::from_keys(&recipe.model, vocab_size, recipe.train.seq_len, known)
        .ok_or_else(|| Error::Usage("[model]: expected every size, or `model.from`".into()))?;
    config.check().map_err(|what| Error::Usage(format!("[model]: {what}")))?;
    if recipe.train.seq_len > config.max_position_embeddings {
        return Err(Error::Usage(format!(
            "train.seq_len: expected at most model.max_position_embeddings = {}, found {}",
            config.max_position_embeddings, recipe.train.seq_len
        )));
    }
    let mesh = recipe.parallel.mesh();
    let shape = mesh::Shape {
        heads: config.num_attention_heads,
        key_value_heads: config.num_key_value_heads,
        layers: config.num_hidden_layers,
        vocabulary: config.vocab_size,
        feed_forward: config.intermediate_size,
        sequence: recipe.parallel.sequence.then_some(recipe.train.seq_len),
    };
    let fits = mesh.check(mesh.ranks(), &shape, recipe.parallel.virtual_stages);
    fits.map_err(|faults| {
        let (stages, tensor) = (recipe.parallel.pipeline, recipe.parallel.tensor);
        Error::Usage(format!("parallel.pipeline = {stages}, parallel.tensor = {tensor}: {faults}"))
    })?;
    Cut::new(recipe, &config)?.has_room(recipe, &config)?;
    Ok(config)
}
