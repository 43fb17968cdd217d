//! The command line. The environment is read here and nowhere below.
//!
//! - `checkpoints`: the commands on checkpoints that are there.
//! - `models`: the commands on models that are there.
//! - `secret`: what keeps strangers out of a run.

mod checkpoints;
mod models;
mod secret;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use parallel::control::By;
use parallel::coordinator::state::Ending as RunEnding;

use crate::allocator;
use crate::bench;
use crate::error::{Error, Result};
use crate::launch::{self, Orders, Ranks, World};
use crate::log::{self, RunLog};
use crate::recipe::fault::Origin;
use crate::recipe::resolved::CodecChoice;
use crate::recipe::{self, Raw, keys};
use crate::run::ender::Ender;
use crate::run::join::{self, Ticket};
use crate::run::signals::{Manner, Stop};
use crate::run::{self, Ended, signals};
use crate::tamper::Tamper;

/// Trains language models across machines joined by ordinary networks.
#[derive(Debug, Parser)]
#[command(name = "tributary", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train as a recipe says
    Train(Train),
    /// Host the coordinator of a run whose workers join from other machines
    Coordinator(CoordinatorArgs),
    /// Be one rank of a run
    Worker(WorkerArgs),
    /// Write a model in Hugging Face's format
    Export(models::ExportArgs),
    /// Continue a prompt with an exported model
    Generate(models::Generate),
    /// Print what a checkpoint holds: tensors, sizes, hashes, state
    Inspect(checkpoints::Inspect),
    /// Hash every file of a checkpoint, or of all of a run's; the exit code is 1 where something is damaged
    Verify(checkpoints::Verify),
    /// Work with checkpoints
    #[command(subcommand)]
    Checkpoint(checkpoints::Group),
    /// Measure this machine; prints one JSON object a line with --json
    #[command(subcommand)]
    Bench(Bench),
    /// Print every key of a recipe as Markdown
    Keys,
}

#[derive(Debug, Args)]
struct Train {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Override a key of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Name of the run; the recipe's file name unless given
    #[arg(long)]
    name: Option<String>,
    /// Go on with the run of that name from its newest checkpoint
    #[arg(long)]
    resume: bool,
    /// As --resume; where the newest checkpoint is damaged, from the newest one that is whole. What is damaged is kept under
    /// another name
    #[arg(long)]
    resume_from_earlier: bool,
    /// Start again from the newest checkpoint, so many times, when a rank was lost
    #[arg(long, default_value_t = 0)]
    restarts: u32,
    /// Let ranks connect beyond loopback, neither encrypted nor authenticated, whether TRIBUTARY_JOIN_SECRET is set or not:
    /// for isolated networks
    #[arg(long)]
    trusted_network: bool,
    #[command(flatten)]
    trace: TraceArgs,
}

#[derive(Debug, Args)]
struct TraceArgs {
    /// Write a picture of what each rank does when: trace.json in the run's folder, for https://ui.perfetto.dev
    #[arg(long)]
    trace: bool,
    /// How many steps --trace shows, from the first one on that is taken
    #[arg(long, value_name = "N", default_value_t = 20, requires = "trace", value_parser = clap::value_parser!(u32).range(1..))]
    trace_steps: u32,
}

impl TraceArgs {
    fn steps(&self) -> Option<u64> {
        self.trace.then_some(self.trace_steps.into())
    }
}

#[derive(Debug, Args)]
struct CoordinatorArgs {
    #[command(flatten)]
    train: Train,
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:29400")]
    listen: std::net::SocketAddr,
}

#[derive(Debug, Args)]
struct WorkerArgs {
    /// The coordinator
    #[arg(long, value_name = "HOST:PORT")]
    join: Vec<String>,
    /// Override a local key of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// The rank to be; the lowest that is free unless given
    #[arg(long)]
    rank: Option<usize>,
    /// Seconds to wait for the coordinator
    #[arg(long, default_value_t = 60.0, value_parser = seconds)]
    join_timeout_s: f64,
    /// Let ranks connect beyond loopback, neither encrypted nor authenticated, whether TRIBUTARY_JOIN_SECRET is set or not:
    /// for isolated networks
    #[arg(long)]
    trusted_network: bool,
    #[command(flatten)]
    trace: TraceArgs,
    /// A launcher of this program started it: the recipe comes from its standard input, whose end is the launcher's
    #[arg(long, hide = true)]
    supervised: bool,
    /// The launcher says how the run ended
    #[arg(long, hide = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The kernels of the codecs, against copies of the same elements
    Codec(bench::codec::Options),
    /// The sum of gradients over ranks, against a plain TCP copy and the rate of the line
    Aggregate(bench::aggregate::Options),
    /// What a checkpoint costs training, and how fast it is written and read
    Checkpoint(bench::checkpoint::Options),
    /// One training step
    Step(bench::step::Step),
}

/// Runs the command of this process and returns its exit code: 0 done, 1 failed, 2 bad usage or recipe, 75 try again.
#[must_use]
pub fn main() -> ExitCode {
    main_with(Tamper::default())
}

/// As [`main`], with faults for tests.
#[must_use]
pub fn main_with(tamper: Tamper) -> ExitCode {
    allocator::keep_blocks();
    // A file that grows past a limit is an error to report, not a signal to die of. Nothing else runs yet.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let filter = std::env::var("TRIBUTARY_LOG").ok();
    let log = RunLog::install(filter.as_deref());
    match run(cli.command, log, tamper) {
        Ok(code) => code,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            log::say(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command, log: RunLog, tamper: Tamper) -> Result<ExitCode> {
    match command {
        Command::Train(args) => train(&args, log, tamper),
        Command::Coordinator(args) => coordinator(&args, log),
        Command::Worker(args) => worker(args, log, tamper),
        Command::Export(args) => models::export(&args),
        Command::Generate(args) => models::say(&args),
        Command::Inspect(args) => checkpoints::inspect(&args),
        Command::Verify(args) => checkpoints::verify(&args),
        Command::Checkpoint(group) => checkpoints::group(&group),
        Command::Bench(Bench::Codec(args)) => bench::codec::codec(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(Bench::Aggregate(args)) => aggregate(&args),
        Command::Bench(Bench::Checkpoint(args)) => bench::checkpoint::checkpoint(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(Bench::Step(args)) => bench::step::step(&args).map(|()| ExitCode::SUCCESS),
        Command::Keys => print(&keys::markdown()),
    }
}

fn train(args: &Train, log: RunLog, tamper: Tamper) -> Result<ExitCode> {
    let ranks = ranks(|name| std::env::var(name).ok())?;
    let request = request(args, log, tamper)?;
    let several = request.recipe.parallel.mesh().ranks() > 1;
    let world = match ranks {
        // One rank needs nobody to join it.
        Some(ranks) if ranks.ranks > 1 || several => World::Ranks(ranks),
        _ => World::Local,
    };
    if world == World::Local && !several && args.restarts == 0 {
        return Ok(code(run::start::train(request)?.ended));
    }
    launch(request, args, world)
}

fn coordinator(args: &CoordinatorArgs, log: RunLog) -> Result<ExitCode> {
    if args.train.trace.trace {
        let why = "--trace: a coordinator has nothing to record; give it to each worker, or to `tributary train`";
        return Err(Error::Usage(why.into()));
    }
    let request = request(&args.train, log, Tamper::default())?;
    let world = World::Elsewhere { listen: args.listen };
    launch(request, &args.train, world)
}

fn aggregate(args: &bench::aggregate::Options) -> Result<ExitCode> {
    let security = secret::security(args.trusted_network, |name| std::env::var_os(name))?;
    secret::warn_of_plain(&security, |name| std::env::var_os(name));
    bench::aggregate::aggregate(args, &security).map(|()| ExitCode::SUCCESS)
}

fn launch(request: run::Request, args: &Train, world: World) -> Result<ExitCode> {
    let security = secret::security(args.trusted_network, |name| std::env::var_os(name))?;
    secret::warn_of_plain(&security, |name| std::env::var_os(name));
    launch::launch(Orders { request, restarts: args.restarts, world, security }).map(ExitCode::from)
}

fn request(args: &Train, log: RunLog, tamper: Tamper) -> Result<run::Request> {
    let path = args.recipe.display().to_string();
    let text = std::fs::read_to_string(&args.recipe)
        .map_err(|error| Error::Usage(format!("{path}: expected a recipe, a TOML file in UTF-8: {error}")))?;
    let (raw, recipe) = recipe::read(&path, &text, &args.sets)?;
    let stem = args.recipe.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = args.name.clone().unwrap_or(stem);
    let by_set = raw.origin("compression.codec") == Origin::Set;
    let choose_codec_anew = by_set && recipe.compression.codec == CodecChoice::Auto;
    let (trace_steps, registry, resume_from_earlier) = (args.trace.steps(), registry(), args.resume_from_earlier);
    let resume = args.resume || resume_from_earlier;
    Ok(run::Request {
        raw,
        recipe,
        name,
        resume,
        resume_from_earlier,
        trace_steps,
        choose_codec_anew,
        registry,
        log,
        tamper,
    })
}

fn worker(args: WorkerArgs, log: RunLog, tamper: Tamper) -> Result<ExitCode> {
    let stop = Stop::default();
    let launcher = std::os::unix::process::parent_id();
    let ender = Ender::new(args.quiet);
    let security = secret::security(args.trusted_network, |name| std::env::var_os(name))?;
    if !args.supervised {
        secret::warn_of_plain(&security, |name| std::env::var_os(name));
    }
    let recipe = if args.supervised { Some(supervised(launcher, ender.clone())?) } else { None };
    let host = std::env::var("HOST_ADDR").ok();
    let host_address = host
        .map(|host| {
            host.parse().map_err(|_| Error::Usage(format!("HOST_ADDR: expected an IP address, found {host:?}")))
        })
        .transpose()?;
    let mut addresses = args.join;
    if addresses.is_empty() {
        let Some(ranks) = ranks(|name| std::env::var(name).ok())? else {
            return Err(Error::Usage("--join: expected HOST:PORT of a coordinator".into()));
        };
        addresses = ranks.ports.iter().map(|port| format!("{}:{port}", ranks.master)).collect();
    }
    let rank = match args.rank {
        Some(rank) => Some(rank),
        None => number("RANK", std::env::var("RANK").ok())?.map(usize::from),
    };
    let ticket = Ticket {
        addresses,
        rank,
        within: Duration::from_secs_f64(args.join_timeout_s),
        recipe,
        sets: args.sets,
        host_address,
        security,
        ender: ender.clone(),
    };
    let joined = join::join(&ticket, &stop)?;
    let manner = Manner { grace_s: joined.recipe.checkpoint.grace_s, second_ends: !args.supervised };
    let tidy = ender.clone();
    stop.listen(manner, move || tidy.tidy_up()).map_err(Error::io("listen for signals in", "this process"))?;
    let welcome = joined.control.welcome();
    let request = run::Request {
        raw: joined.raw.clone(),
        recipe: joined.recipe.clone(),
        name: welcome.name.clone(),
        resume: welcome.resume,
        resume_from_earlier: welcome.resume_from_earlier,
        trace_steps: args.trace.steps(),
        choose_codec_anew: welcome.choose_codec_anew,
        registry: registry(),
        log,
        tamper,
    };
    match run::start::train_rank(request, joined) {
        Ok(left) => Ok(code(left.ended)),
        // It was said already, or the launcher says it.
        Err(Error::Verdict(verdict, code)) => {
            ender.say(&verdict);
            Ok(ExitCode::from(code))
        }
        Err(error) if args.quiet => {
            tracing::info!("{error}");
            Ok(ExitCode::from(error.exit_code()))
        }
        Err(error) => Err(error),
    }
}

/// Reads the launcher's recipe from standard input; when the launcher is gone, this process ends.
fn supervised(launcher: u32, ender: Ender) -> Result<Raw> {
    let mut input = std::io::stdin().lock();
    let mut read = || {
        let mut length = [0; 8];
        input.read_exact(&mut length)?;
        let mut text = Vec::new();
        let length = u64::from_le_bytes(length);
        let count = (&mut input).take(length.min(RECIPE_BYTES_MAX)).read_to_end(&mut text)?;
        if count as u64 == length { Ok(text) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    };
    let text = read().map_err(Error::io("read the recipe from", "standard input"))?;
    let text = String::from_utf8(text).map_err(|error| Error::Usage(format!("the launcher's recipe: {error}")))?;
    let (raw, _) = recipe::raw::read(&text, &[]);
    std::thread::spawn(move || {
        // Nothing more ever comes: the read ends with the launcher.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        // Where the launcher hosts the coordinator, the control plane notices too, and has more to say.
        std::thread::sleep(Duration::from_millis(300));
        let verdict = format!("the launcher (process {launcher}) is gone");
        ender.end(&RunEnding { verdict, code: signals::TRY_AGAIN }, By::Worker);
    });
    Ok(raw)
}

const RECIPE_BYTES_MAX: u64 = 16 << 20;

/// What the environment says of the ranks, as torchrun, Slurm scripts and `hosts.sh` set it; `None` without RANK and
/// WORLD_SIZE.
fn ranks(get: impl Fn(&str) -> Option<String>) -> Result<Option<Ranks>> {
    let number = |name: &str| number(name, get(name));
    let beside = |name: &str, other: &str| Error::Usage(format!("{name}: expected it beside {other}, it is not set"));
    let (rank, ranks) = match (number("RANK")?, number("WORLD_SIZE")?) {
        (Some(rank), Some(ranks)) => (rank, ranks),
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(beside("WORLD_SIZE", "RANK")),
        (None, Some(_)) => return Err(beside("RANK", "WORLD_SIZE")),
    };
    if rank >= ranks {
        return Err(Error::Usage(format!("RANK: expected less than WORLD_SIZE = {ranks}, found {rank}")));
    }
    let needed = |name: &str| beside(name, "RANK and WORLD_SIZE");
    let master = get("MASTER_ADDR").ok_or_else(|| needed("MASTER_ADDR"))?;
    let port = number("MASTER_PORT")?.ok_or_else(|| needed("MASTER_PORT"))?;
    // torchrun keeps MASTER_PORT for itself.
    let other = number("TRIBUTARY_PORT")?.unwrap_or_else(|| port.saturating_add(1));
    Ok(Some(Ranks { rank: rank.into(), ranks: ranks.into(), master, ports: vec![port, other] }))
}

fn number(name: &str, value: Option<String>) -> Result<Option<u16>> {
    let parse = |text: String| {
        text.parse().map_err(|_| Error::Usage(format!("{name}: expected a number up to 65535, found {text:?}")))
    };
    value.map(parse).transpose()
}

fn code(ended: Ended) -> ExitCode {
    match ended {
        Ended::Done | Ended::Stopped => ExitCode::SUCCESS,
        Ended::Signalled => ExitCode::from(signals::TRY_AGAIN),
    }
}

/// Cargo's folder of unpacked sources.
fn registry() -> PathBuf {
    let (cargo_home, home) = (std::env::var_os("CARGO_HOME"), std::env::var_os("HOME"));
    let cargo = cargo_home.map(PathBuf::from).or_else(|| home.map(|home| PathBuf::from(home).join(".cargo")));
    cargo.unwrap_or_else(|| PathBuf::from(".cargo")).join("registry").join("src")
}

fn print(text: &str) -> Result<ExitCode> {
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("write", "standard output"))?;
    Ok(ExitCode::SUCCESS)
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| (0.0..=1e6).contains(x)).ok_or_else(|| "expected seconds, up to a million".into())
}
