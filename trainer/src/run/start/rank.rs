//! One rank of several: it meets the others, agrees with them where to start, connects, and trains.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::disk::RealDisk;
use checkpoint::reader::{self, Checkpoint};
use checkpoint::store::{Seat, Uploader};
use checkpoint::writer::{Member, Writer};
use compression::Codec;
use parallel::collective::{CollectiveError, Collectives, Mailbox, Place, SubGroup};
use parallel::control::{ControlError, beat};
use parallel::data::engine::{Engine, Inbox, Members};
use parallel::data::plan::Plan;
use parallel::mesh::Axis;
use parallel::transport::grpc::GrpcTransport;
use parallel::wire::control::{Held as HeldCheckpoint, Leaving, Property};

use super::exchange::{exchange, group};
use super::newest::{self, Loaded, SetAside};
use super::peers;
use super::restart::{self, Restart};
use super::share::{f32_bytes, sharding, share};
use super::{Begun, Books, Parts, Ready, begin_trace, bring, make_runs, peek, prepare, retention, work};
use crate::cut::Cut;
use crate::device;
use crate::error::{Error, Result};
use crate::log::say;
use crate::recipe::resolved::CodecChoice;
use crate::replica::Replica;
use crate::run::codec::Codecs;
use crate::run::folder::Folder;
use crate::run::group::Group;
use crate::run::join::{Joined, Met, failed, leave_with};
use crate::run::signals::TRY_AGAIN;
use crate::run::trace::Tracing;
use crate::run::{Ended, Left, Request, Run, upload};
use crate::state::folders::Folders;
use crate::state::mesh::Mesh;
use crate::state::{self, Share};
use crate::step::Stepper;

/// Trains as one rank of several.
///
/// # Errors
/// Everything that can go wrong here or at another rank. The coordinator is told what went wrong here.
pub fn train_rank(request: Request, joined: Joined) -> Result<Left> {
    let started = Instant::now();
    device::compute(request.recipe.device.threads, || train_as(request, joined, started))
}

fn train_as(request: Request, joined: Joined, started: Instant) -> Result<Left> {
    let runs = request.recipe.metrics.runs_dir.clone();
    let rank = joined.rank();
    let mut folder = None;
    let met = ready_to_meet(&request, &runs).and_then(|ready| {
        let hold = |lead_of: &[usize]| hold(&request, (rank, lead_of), &mut folder);
        let met = joined.meet(properties(&request, &ready, rank), hold)?;
        Ok((ready, met))
    });
    let (ready, met) = match met {
        Ok(met) => met,
        Err(error) => return Err(fail(joined, folder, error)),
    };
    let (ender, peer_timeout_s) = (joined.ender.clone(), joined.control.welcome().peer_timeout_s);
    let loaded = folder.as_mut().and_then(|folder| folder.loaded.take());
    let mut run = match open_rank(request, joined, ready, (&met, folder.as_ref(), loaded), started) {
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
            group.leave(Leaving { step: run.state.step, error, code: 1, ..Leaving::default() });
            std::panic::resume_unwind(panic)
        }
    };
    let result = result.map_err(|error| group.explain(error, peer_timeout_s));
    // The last numbers, which a heartbeat may not have carried yet.
    group.control.say(beat(run.stepper.progress()));
    match &result {
        Ok(left) => group.leave(Leaving {
            step: left.step,
            parameter_hash: left.parameter_hash.clone(),
            error: None,
            code: if left.ended == Ended::Signalled { TRY_AGAIN.into() } else { 0 },
            between_ranks: false,
        }),
        Err(Error::Verdict(verdict, _)) => {
            ender.say(verdict);
            run.writer.abandon();
        }
        Err(error) => {
            // Said before anything that may wait for a disk.
            group.leave(failed(run.state.step, error));
            run.writer.abandon();
        }
    }
    result
}

fn ready_to_meet(request: &Request, runs: &Path) -> Result<Ready> {
    make_runs(runs)?;
    prepare(request, peek(request)?.as_ref())
}

/// What must be the same at every rank.
fn properties(request: &Request, ready: &Ready, rank: usize) -> Vec<Property> {
    let property = |name: &str, value: String| Property { name: name.into(), value };
    let tokenizer = blake3::hash(&ready.data.tokenizer.json()).to_hex().to_string();
    let mut all = vec![
        property("the text of [data] and [eval] (BLAKE3)", ready.data.corpus_hash.clone()),
        property("the tokenizer (BLAKE3)", tokenizer),
        property("the processor's architecture", std::env::consts::ARCH.into()),
    ];
    // Backends round differently. Where owners send parameters, all have what one of them computed.
    if request.recipe.optimizer.sharded.is_none() {
        let backend = request.tamper.backend(rank, &request.recipe.device.backend);
        all.push(property("device.backend (a mixture needs optimizer.sharded = true)", backend));
    }
    all
}

/// The run's folder on the lead of it.
pub struct RunFolder {
    /// The folder itself.
    pub folder: Folder,
    /// What differs from the recipe that the run had.
    pub changed: Vec<String>,
    is_new: bool,
    /// What was newer than the checkpoint that it goes on from, and damaged.
    pub set_aside: Vec<SetAside>,
    /// What is in the newest checkpoint here, until it is taken.
    loaded: Option<Loaded>,
}

/// Opens the run's folder on the lead of it, and says which checkpoints are there and good.
fn hold(
    request: &Request,
    (rank, lead_of): (usize, &[usize]),
    keep: &mut Option<RunFolder>,
) -> Result<Vec<HeldCheckpoint>> {
    bring(request, rank, lead_of)?;
    let runs = &request.recipe.metrics.runs_dir;
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
    let (mut set_aside, mut loaded) = (Vec::new(), None);
    let mut held = || {
        // A lead's writer puts the folder in order: what was set aside counts under its own name from then on.
        let member = Member { rank: 0, lead: true };
        drop(Writer::member(Arc::new(RealDisk), folder.checkpoints(), Vec::new(), member, retention(&request.recipe))?);
        let keys = &request.recipe.parallel;
        let keeps_all = keys.mesh().ranks() == keys.data && request.recipe.optimizer.sharded.is_none();
        let newest = newest::newest(&folder, request.resume_from_earlier, keeps_all)?;
        // Not before it is known that the run goes on: a resume that is refused changes nothing.
        folder.keep_recipe(&request.raw)?;
        (set_aside, loaded) = (newest.set_aside, newest.loaded);
        let verified = newest.checkpoint.map(|newest| newest.step());
        let open = |(step, path): (u64, std::path::PathBuf)| {
            let checkpoint = Checkpoint::open(&path).ok()?;
            // Which one all machines have is not known yet; whoever takes an earlier one wants it whole.
            if request.resume_from_earlier && verified != Some(step) {
                let fault = |error| tracing::warn!("a damaged checkpoint is passed over: {error}");
                checkpoint.verify().map_err(fault).ok()?;
            }
            Some(HeldCheckpoint { step, id: checkpoint.id().to_owned() })
        };
        Ok(reader::list(&folder.checkpoints())?.into_iter().filter_map(open).collect())
    };
    let held: Result<Vec<HeldCheckpoint>> = held();
    if held.is_err() && is_new {
        folder.abandon();
    }
    *keep = Some(RunFolder { folder, changed, is_new, set_aside, loaded });
    held
}

/// A rank that cannot start says so, and takes away a folder that it had just made.
fn fail(joined: Joined, folder: Option<RunFolder>, error: Error) -> Error {
    let lost = match &error {
        Error::Transport(error) => error.lost(),
        Error::Collective(CollectiveError::Lost(loss)) => Some(loss.rank),
        _ => None,
    };
    let within = Duration::from_secs_f64(joined.control.welcome().peer_timeout_s);
    let ended = match (&error, lost) {
        (Error::Control(ControlError::Ended(ending)), _) => Some(ending.clone()),
        (Error::Collective(CollectiveError::Aborted(_)), _) => Some(joined.control.ending(within)),
        (_, Some(rank)) => {
            // The coordinator knows better who is to blame.
            joined.control.reporter().lost(rank, &error.to_string());
            Some(joined.control.ending(within))
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
            leave_with(joined.control, &error);
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
    from: (&Met, Option<&RunFolder>, Option<Loaded>),
    started: Instant,
) -> std::result::Result<Run, (Box<Joined>, Error)> {
    match connect(&request, &mut joined, &ready, from) {
        Ok(Connected {
            begun,
            stepper,
            writer,
            uploader,
            books,
            share,
            mesh,
            transport,
            sums,
            f32_bytes,
            codecs,
            tracing,
        }) => {
            let Joined { control, ender, stop, .. } = joined;
            let (saving, committing, writing, bytes) = Default::default();
            let group = Group { share, control, transport, sums, ender, f32_bytes, saving, committing, writing, bytes };
            let group = Some(group);
            let parts = Parts {
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
            };
            Ok(parts.run())
        }
        Err(error) => Err((Box::new(joined), error)),
    }
}

/// A rank that has its start and its connections.
struct Connected {
    begun: Begun,
    stepper: Stepper,
    writer: Writer,
    uploader: Option<Uploader>,
    books: Option<Books>,
    share: Share,
    mesh: Mesh,
    transport: Arc<GrpcTransport>,
    sums: SubGroup,
    f32_bytes: Option<u64>,
    codecs: Option<Codecs>,
    tracing: Option<Tracing>,
}

fn connect(
    request: &Request,
    joined: &mut Joined,
    ready: &Ready,
    (met, folder, loaded): (&Met, Option<&RunFolder>, Option<Loaded>),
) -> Result<Connected> {
    let (rank, recipe) = (joined.rank(), &request.recipe);
    let path = recipe.metrics.runs_dir.join(&request.name);
    let checkpoints = path.join("checkpoints");
    request.log.open(&path.join(format!("logs/rank-{rank}.log")))?;
    // From now on what is half-written there is this group's.
    joined.ender.tidy_checkpoints(&path);
    let from = met.start.from.as_ref().map_or(0, |held| held.step);
    let open = |_| Checkpoint::open(&checkpoints.join(checkpoint::layout::committed(from)));
    let explain = |error| newest::explain(&request.name, from, error);
    let newest = met.start.from.as_ref().map(open).transpose().map_err(|error| explain(error.into()))?;
    let cut = Cut::new(recipe, &ready.config)?;
    let axes = cut.mesh();
    let (data, replicas) = (axes.coordinates(rank).on(Axis::Data), axes.size(Axis::Data));
    let (parts, sharding) = (cut.parts(&ready.config, rank)?, sharding(recipe, data, replicas));
    let held = newest.as_ref().map(state::held).transpose()?.unwrap_or_default();
    let one_machine = recipe.parallel.group == replicas;
    let codec = if one_machine { CodecChoice::Fixed(Codec::Fp32) } else { recipe.compression.codec };
    let share = share((met, &ready.config), (&cut, rank, sharding), codec, (recipe.checkpoint.residuals, held))?;
    let mesh = restart::mesh(recipe, &met.start);
    // What was measured with other ranks says nothing of these.
    let others = newest.as_ref().map(|newest| restart::is_of_others(newest, &mesh)).transpose()?.unwrap_or(false);
    // With one replica nothing travels, and nothing is encoded.
    let chosen = held.chosen.filter(|_| !request.choose_codec_anew && !others);
    let codecs = (replicas > 1).then(|| Codecs::new(recipe.compression, chosen));
    let codecs = if one_machine { codecs.map(Codecs::on_one_machine) } else { codecs };
    let codec = codecs.as_ref().map_or(Codec::Fp32, |codecs| codecs.codec(from + 1));
    let plan = Plan::of_parts(parts.clone(), recipe.parallel.bucket_bytes_max);
    let plan = Arc::new(plan.map_err(|error| Error::Usage(error.to_string()))?);
    // Between parts of a model other things travel too.
    let f32_bytes = (replicas > 1 && replicas == axes.ranks()).then(|| f32_bytes(&plan, data, replicas));
    let mut exchange = exchange(request, plan.clone(), group(recipe, (axes, rank), met), codec)?;
    // The lead's writer puts the folder in order before any other rank can write: all wait for each other below.
    let member = Member { rank, lead: met.lead_of[rank] == rank };
    let pieces = state::pieces(&share);
    let writer = Writer::member(Arc::new(RealDisk), checkpoints.clone(), pieces, member, retention(recipe))?;
    writer.pack(recipe.checkpoint.zstd);
    writer.read_back(recipe.checkpoint.read_back);
    let apart = met.lead_of.iter().any(|&lead| lead != met.lead_of[0]);
    let seat = |rank: usize| if apart { Seat::Machine(rank) } else { Seat::Shared };
    let leads: BTreeSet<usize> = met.lead_of.iter().copied().collect();
    let seats = leads.into_iter().map(seat).collect();
    let uploader = if member.lead { upload::start(request, checkpoints, (seat(rank), seats), from)? } else { None };

    let tracing = begin_trace(request, &path, rank, &plan, from)?;
    let trace = tracing.as_ref().map(Tracing::trace).cloned();
    let inbox = Inbox::new(trace.clone()).telling(peers::at_once(joined.control.reporter()));
    let place = Place { rank, ranks: share.ranks, epoch: met.start.epoch };
    let mailbox = Mailbox::new(place, joined.progress.clone());
    joined.ender.wake(inbox.aborter(), mailbox.clone());
    let transport = Arc::new(peers::meet(joined, &met.start, mailbox.sink(inbox.sink()), trace.clone())?);
    let collectives = Collectives::new(mailbox, transport.clone());
    let all = collectives.sub_group(&(0..share.ranks).collect::<Vec<_>>())?;
    let sums = collectives.sub_group(&axes.group(Axis::Data, rank))?;
    let several = |newest| match apart {
        true => Folders::of_all(&request.name, newest, (&all, &met.lead_of)),
        false => Ok(Folders::one(&request.name, newest)),
    };
    let folders = newest.as_ref().map(several).transpose()?;
    let begun = ready.begin(request, (folders.as_ref(), loaded), (&parts, sharding)).map_err(explain)?;
    let restart = Restart { request, mesh: &mesh, rank, others: apart.then_some(&all) };
    let regained = folders.as_ref().map(|folders| restart.give(folders, held, &mut exchange)).transpose()?;
    let regained = regained.unwrap_or_default();
    let members = Members::new(rank, share.ranks, &axes.group(Axis::Data, rank));
    let engine = Engine::start_among((exchange, members), transport.clone(), inbox, joined.progress.clone())
        .map_err(Error::io("start a thread in", "this process"))?;
    let keys = (recipe.parallel.sequence, recipe.parallel.activation_codec);
    let replica = Replica::new(&collectives, (cut, rank), &ready.config, keys)?;
    let stepper = Stepper::across(&ready.config, &ready.device, engine, replica).traced(trace);
    request.tamper.prepare(rank, &stepper);
    let mut books = match folder {
        Some(folder) if rank == 0 => Some(Books::of_ranks(
            request,
            folder,
            (begun.state.step, held.folded && held.has_unsent()),
            joined.control.welcome(),
        )?),
        _ => None,
    };
    match &mut books {
        Some(books) => books.regained(&regained, begun.state.step),
        None => regained.log(),
    }
    Ok(Connected { begun, stepper, writer, uploader, books, share, mesh, transport, sums, f32_bytes, codecs, tracing })
}
