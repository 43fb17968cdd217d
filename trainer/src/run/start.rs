//! Everything before the first step: whatever can be refused is refused here, then the run begins.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use checkpoint::disk::RealDisk;
use checkpoint::reader::{self, Checkpoint};
use checkpoint::writer::{Member, Retention, Writer};
use compression::Codec;
use parallel::control::ControlError;
use parallel::data::engine::{Engine, Inbox};
use parallel::data::exchange::{self, Exchange, codec_of};
use parallel::data::plan::Plan;
use parallel::data::shard::payload_bytes_sent;
use parallel::transport::{Incoming, grpc};
use parallel::wire::control::{Held, Leaving, Property};
use serde_json::json;

use super::folder::{Folder, Status};
use super::group::Group;
use super::join::{Joined, Met, addresses};
use super::metrics::Metrics;
use super::progress::Progress;
use super::save::{newest_good, same_text};
use super::signals::{Manner, Stop, TRY_AGAIN};
use super::{Ended, Left, Request, Run};
use crate::data::{self, Data};
use crate::device;
use crate::error::{Error, Result};
use crate::generate::prompt_tokens;
use crate::log::say;
use crate::model::Config;
use crate::recipe::Recipe;
use crate::recipe::resolved::TokenizerSource;
use crate::state::{self, Share, State};
use crate::step::Stepper;
use crate::weights::Weights;

/// Blocks of a chunk: 256 KiB as `int8`, the size that `docs/benchmarks.md` measured.
const CHUNK_BLOCKS: usize = 2048;

/// Trains in this process alone.
///
/// # Errors
/// Everything that can go wrong; the run's folder then says `failed`, and its checkpoints are as they were.
pub fn train(request: Request) -> Result<Left> {
    let started = Instant::now();
    device::set_threads(request.recipe.device.threads);
    let stop = Stop::default();
    let manner = Manner { grace_s: request.recipe.checkpoint.grace_s, second_ends: true };
    stop.listen(manner, || {}).map_err(Error::io("listen for signals in", "this process"))?;
    let runs = request.recipe.metrics.runs_dir.clone();
    // Whatever can be refused is refused before a new folder is made, and before a text is read if it needs none.
    let existing = match request.resume {
        true => Folder::resume(&runs, &request.name, &request.raw)?,
        false => Folder::check_free(&runs, &request.name).map(|()| None)?,
    };
    if request.resume && existing.is_none() {
        say(&format!("run {}: there is nothing to resume, so it starts from the beginning", request.name));
    }
    make_runs(&runs)?;
    let newest = match &existing {
        Some((folder, _)) => newest_good(folder)?,
        None => None,
    };
    let ready = prepare(&request, newest.as_ref())?;
    let begun = ready.begin(&request, newest.as_ref())?;
    let resumed = existing.is_some();
    let (folder, changed) = match existing {
        Some(existing) => existing,
        None => (Folder::create(&runs, &request.name)?, Vec::new()),
    };
    let open = || {
        folder.keep_recipe(&request.raw)?;
        request.log.open(&folder.file("logs/rank-0.log"))?;
        let stepper = Stepper::new(&ready.config, &ready.device, request.recipe.parallel.bucket_bytes_max)?;
        let writer = Writer::new(
            Arc::new(RealDisk),
            folder.checkpoints(),
            state::specs(&ready.config),
            retention(&request.recipe),
        )?;
        let books = Books::open(&request, &folder, resumed.then_some(begun.state.step), &changed)?;
        Ok((stepper, writer, books))
    };
    let (stepper, writer, books) = match open() {
        Ok(opened) => opened,
        Err(error) => {
            if !resumed {
                folder.abandon();
            }
            return Err(error);
        }
    };
    let parts = Parts { request, started, stop, ready, begun, stepper, writer, books: Some(books), group: None };
    let mut run = parts.run();
    work(&mut run, Some(&folder))
}

/// Trains as one rank of several.
///
/// # Errors
/// Everything that can go wrong here or at another rank. The coordinator is told what went wrong here.
pub fn train_rank(request: Request, joined: Joined) -> Result<Left> {
    let started = Instant::now();
    device::set_threads(request.recipe.device.threads);
    let runs = request.recipe.metrics.runs_dir.clone();
    let rank = joined.rank();
    let mut folder = None;
    let met = ready_to_meet(&request, &runs).and_then(|ready| {
        let hold = || hold(&request, &runs, &mut folder);
        let met = joined.meet(properties(&request, &ready), hold)?;
        Ok((ready, met))
    });
    let (ready, met) = match met {
        Ok(met) => met,
        Err(error) => return Err(fail(joined, folder, error)),
    };
    let (ender, peer_timeout_s) = (joined.ender.clone(), joined.control.welcome().peer_timeout_s);
    let mut run = match open_rank(request, joined, ready, &met, folder.as_ref(), started) {
        Ok(run) => run,
        Err((joined, error)) => return Err(fail(*joined, folder, error)),
    };
    let keeper = folder.as_ref().filter(|_| rank == 0).map(|opened| &opened.folder);
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| work(&mut run, keeper)));
    let Some(group) = run.group.take() else { return result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) };
    let result = match result {
        Ok(result) => result,
        Err(panic) => {
            let error = Some("it panicked, which is a fault of the program: its standard error says where".to_owned());
            group.leave(Leaving { step: run.state.step, parameter_hash: String::new(), error, code: 1 });
            std::panic::resume_unwind(panic)
        }
    };
    let result = result.map_err(|error| group.explain(error, peer_timeout_s));
    match &result {
        Ok(left) => group.leave(Leaving {
            step: left.step,
            parameter_hash: left.parameter_hash.clone(),
            error: None,
            code: if left.ended == Ended::Signalled { TRY_AGAIN.into() } else { 0 },
        }),
        Err(Error::Verdict(verdict, _)) => {
            run.writer.abandon();
            ender.say(verdict);
        }
        Err(error) => {
            // Said before anything that may wait for a disk.
            let (code, error) = (error.exit_code().into(), Some(error.to_string()));
            group.leave(Leaving { step: run.state.step, parameter_hash: String::new(), error, code });
            run.writer.abandon();
        }
    }
    result
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
    }
    let ended = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let parameter_hash = run.state.parameter_hash(&run.config).to_hex().to_string();
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

/// What a run writes for people.
struct Books {
    metrics: Metrics,
    progress: Progress,
    wall_before_s: f64,
}

struct Parts {
    request: Request,
    started: Instant,
    stop: Stop,
    ready: Ready,
    begun: Begun,
    stepper: Stepper,
    writer: Writer,
    books: Option<Books>,
    group: Option<Group>,
}

fn make_runs(runs: &Path) -> Result<()> {
    std::fs::create_dir_all(runs).map_err(|source| {
        let key = "metrics.runs_dir";
        Error::Folder { key, path: runs.to_owned(), source }
    })
}

const fn retention(recipe: &Recipe) -> Retention {
    Retention { keep_last: recipe.checkpoint.keep_last }
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
    Ok(reader::list(&checkpoints)?.pop().and_then(|(_, path)| Checkpoint::open(&path).ok()))
}

fn ready_to_meet(request: &Request, runs: &Path) -> Result<Ready> {
    make_runs(runs)?;
    prepare(request, peek(request)?.as_ref())
}

/// What must be the same at every rank.
fn properties(request: &Request, ready: &Ready) -> Vec<Property> {
    let property = |name: &str, value: String| Property { name: name.into(), value };
    let tokenizer = blake3::hash(&ready.data.tokenizer.json()).to_hex().to_string();
    vec![
        property("the text of [data] and [eval] (BLAKE3)", ready.data.corpus_hash.clone()),
        property("the tokenizer (BLAKE3)", tokenizer),
        property(
            "device.backend (a mixture needs the sharded optimiser, which is not there yet)",
            request.recipe.device.backend.clone(),
        ),
        property("the processor's architecture", std::env::consts::ARCH.into()),
    ]
}

/// The run's folder on the lead of it.
struct RunFolder {
    folder: Folder,
    /// What differs from the recipe that the run had.
    changed: Vec<String>,
    is_new: bool,
}

/// Opens the run's folder on the lead of it, and says which checkpoints are there and good.
fn hold(request: &Request, runs: &Path, keep: &mut Option<RunFolder>) -> Result<Vec<Held>> {
    let existing = match request.resume {
        true => Folder::resume(runs, &request.name, &request.raw)?,
        false => None,
    };
    if request.resume && existing.is_none() {
        say(&format!("run {}: there is nothing to resume here, so it starts from the beginning", request.name));
    }
    let is_new = existing.is_none();
    let (folder, changed) = match existing {
        Some(existing) => existing,
        None => (Folder::create(runs, &request.name)?, Vec::new()),
    };
    let held = || {
        folder.keep_recipe(&request.raw)?;
        // A lead's writer puts the folder in order: what was set aside counts under its own name from then on.
        let member = Member { rank: 0, lead: true };
        drop(Writer::member(Arc::new(RealDisk), folder.checkpoints(), Vec::new(), member, retention(&request.recipe))?);
        newest_good(&folder)?;
        let open = |(step, path): (u64, std::path::PathBuf)| {
            let id = Checkpoint::open(&path).ok()?.id().to_owned();
            Some(Held { step, id })
        };
        Ok(reader::list(&folder.checkpoints())?.into_iter().filter_map(open).collect())
    };
    let held = held();
    if held.is_err() && is_new {
        folder.abandon();
    }
    *keep = Some(RunFolder { folder, changed, is_new });
    held
}

/// A rank that cannot start says so, and takes away a folder that it had just made.
fn fail(joined: Joined, folder: Option<RunFolder>, error: Error) -> Error {
    let lost = match &error {
        Error::Transport(error) => error.lost(),
        _ => None,
    };
    let ended = match (&error, lost) {
        (Error::Control(ControlError::Ended(ending)), _) => Some(ending.clone()),
        (_, Some(rank)) => {
            // The coordinator knows better who is to blame.
            joined.control.reporter().lost(rank, &error.to_string());
            Some(joined.control.ending(Duration::from_secs_f64(joined.control.welcome().peer_timeout_s)))
        }
        _ => None,
    };
    // The others hear of it first: they may be about to open files in a folder that goes away.
    let error = match ended {
        Some(ending) => {
            joined.ender.say(&ending.verdict);
            Error::Verdict(ending.verdict, ending.code)
        }
        None => {
            super::join::leave_with(joined.control, &error);
            error
        }
    };
    if let Some(RunFolder { folder, is_new: true, .. }) = folder
        && !folder.file("run.json").exists()
        && reader::list(&folder.checkpoints()).is_ok_and(|list| list.is_empty())
    {
        folder.abandon();
    }
    error
}

/// From an agreed start to a run that is ready for its first step. On failure the line to the coordinator comes back.
fn open_rank(
    request: Request,
    mut joined: Joined,
    ready: Ready,
    met: &Met,
    folder: Option<&RunFolder>,
    started: Instant,
) -> std::result::Result<Run, (Box<Joined>, Error)> {
    let opened = connect(&request, &mut joined, &ready, met, folder);
    match opened {
        Ok((begun, stepper, writer, books, group)) => {
            let Joined { control, ender, stop, .. } = joined;
            let (share, transport, f32_bytes) = group;
            let (saving, committing, writing) = Default::default();
            let group = Group { share, control, transport, ender, f32_bytes, saving, committing, writing };
            Ok(Parts { request, started, stop, ready, begun, stepper, writer, books, group: Some(group) }.run())
        }
        Err(error) => Err((Box::new(joined), error)),
    }
}

type Opened = (Begun, Stepper, Writer, Option<Books>, (Share, Arc<grpc::GrpcTransport>, Option<u64>));

fn connect(
    request: &Request,
    joined: &mut Joined,
    ready: &Ready,
    met: &Met,
    folder: Option<&RunFolder>,
) -> Result<Opened> {
    let (rank, ranks, recipe) = (joined.rank(), met.lead_of.len(), &request.recipe);
    let path = recipe.metrics.runs_dir.join(&request.name);
    request.log.open(&path.join(format!("logs/rank-{rank}.log")))?;
    // From now on what is half-written there is this group's.
    joined.ender.tidy_checkpoints(path.join("checkpoints"));
    let newest = match &met.start.from {
        Some(held) => Some(Checkpoint::open(&path.join("checkpoints").join(checkpoint::layout::committed(held.step)))?),
        None => None,
    };
    let begun = ready.begin(request, newest.as_ref())?;

    let lead = met.lead_of[rank];
    let mates: Vec<usize> = (0..ranks).filter(|&other| met.lead_of[other] == lead).collect();
    let index = mates.iter().position(|&mate| mate == rank).unwrap_or(0);
    let share = Share { rank, ranks, index, of: mates.len() };

    let plan = Plan::new(ready.config.parameters(), recipe.parallel.bucket_bytes_max)
        .map_err(|error| Error::Usage(error.to_string()))?;
    let tensors = |codec: Codec| -> Vec<(usize, Codec)> {
        let of = |p: &parallel::data::Parameter| (p.shape.iter().product(), codec_of(p, codec));
        plan.parameters().iter().map(of).collect()
    };
    // With one rank nothing travels, and nothing is encoded.
    let codec = if ranks == 1 { Codec::Fp32 } else { recipe.codec };
    let f32_bytes = (ranks > 1).then(|| payload_bytes_sent(&tensors(Codec::Fp32), rank, ranks) as u64);
    let epoch = met.start.epoch;
    let mut exchange = Exchange::new(
        Arc::new(plan.clone()),
        exchange::Group { rank, ranks, epoch, chunk_blocks: CHUNK_BLOCKS },
        codec,
    );
    if request.tamper.no_feedback {
        exchange = exchange.without_feedback();
    }
    if let Some(newest) = &newest {
        state::restore_residuals(newest, &mut exchange)?;
        if request.tamper.forget_owner {
            exchange.forget_owner();
        }
    }
    // The lead's writer puts the folder in order before any other rank can write: all wait for each other in `connect`.
    let member = Member { rank, lead: lead == rank };
    let pieces = state::pieces(&ready.config, &share, codec);
    let writer = Writer::member(Arc::new(RealDisk), path.join("checkpoints"), pieces, member, retention(recipe))?;

    let inbox = Inbox::default();
    joined.ender.wake(inbox.aborter());
    // Whoever dies meanwhile is noticed on the control plane; a slow disk is no death.
    let within = Duration::from_secs_f64(recipe.parallel.join_timeout_s);
    let group = grpc::Group {
        rank,
        addresses: addresses(&met.start)?,
        epoch,
        token: met.start.token.clone(),
        connect_within: within,
    };
    let listener = joined.listener.take().expect("a rank connects once");
    // A lost rank is reported at once, also while the training thread computes.
    let (to_engine, reporter) = (inbox.sink(), joined.control.reporter());
    let sink = Arc::new(move |incoming: Incoming| {
        if let Incoming::Lost { rank, why } = &incoming {
            reporter.lost(*rank, why);
        }
        to_engine(incoming);
    });
    let transport = Arc::new(listener.connect(&group, sink)?);
    let engine = Engine::start(exchange, transport.clone(), inbox, joined.progress.clone())
        .map_err(Error::io("start a thread in", "this process"))?;
    let stepper = Stepper::across(&ready.config, &ready.device, engine);
    let books = match folder {
        Some(RunFolder { folder, changed, .. }) if rank == 0 => {
            let resumed = request.resume && folder.file("run.json").exists();
            let mut books = Books::open(request, folder, resumed.then_some(begun.state.step), changed)?;
            let restart = joined.control.welcome().restart;
            if restart > 0 {
                books.metrics.event("restart", begun.state.step, json!({ "restart": restart }));
            }
            Some(books)
        }
        _ => None,
    };
    Ok((begun, stepper, writer, books, (share, transport, f32_bytes)))
}

impl Ready {
    fn begin(&self, request: &Request, newest: Option<&Checkpoint>) -> Result<Begun> {
        not_behind(request, newest)?;
        let (state, tokens, last_loss) = match (newest, &self.from) {
            (Some(newest), _) => {
                same_text(&request.name, newest, &self.data)?;
                let (state, meta) = State::load(newest, &self.config)?;
                (state, meta.tokens, meta.loss)
            }
            (None, Some(from)) => (State::fresh(from.read(&self.config)?), 0, None),
            (None, None) => (State::initial(&self.config, request.recipe.train.seed), 0, None),
        };
        Ok(Begun { state, tokens, last_loss, committed: newest.map(Checkpoint::step) })
    }
}

impl Books {
    fn open(request: &Request, folder: &Folder, resumed_at: Option<u64>, changed: &[String]) -> Result<Self> {
        let recipe = &request.recipe;
        let mut metrics = Metrics::open(folder.path(), resumed_at, recipe.metrics.tensorboard)?;
        let progress = Progress::new(resumed_at.unwrap_or(0), recipe.train.steps, recipe.metrics.log_every);
        if let Some(step) = resumed_at {
            metrics.event("resumed", step, json!({ "changed": changed }));
            progress.say(&format!("run {}: going on after step {step}", folder.name()));
            for change in changed {
                progress.say(&format!("changed: {change}"));
            }
        }
        let before = resumed_at.and_then(|_| folder.summary());
        Ok(Self { metrics, progress, wall_before_s: before.map_or(0.0, |summary| summary.wall_s) })
    }
}

impl Parts {
    fn run(self) -> Run {
        let Self { request, started, stop, ready, begun, stepper, writer, books, group } = self;
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
            metrics,
            progress,
            group,
            tamper: request.tamper,
            stopping: false,
            busy: false,
            stop,
            started,
            wall_before_s,
            last_loss,
            stall_s: 0.0,
            counted: Default::default(),
            committed,
            failure: None,
            first: true,
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
fn shape(recipe: &Recipe, vocab_size: usize, from: Option<&Weights>) -> Result<Config> {
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
    Ok(config)
}
