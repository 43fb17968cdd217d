//! The command line. The environment is read here and nowhere below.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use checkpoint::export::Dtype;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::allocator;
use crate::bench;
use crate::device;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::generate::{Ending, Sampling, generate, prompt_tokens};
use crate::log::{self, RunLog};
use crate::recipe::resolved::DeviceKeys;
use crate::recipe::{self, keys};
use crate::run::{self, Ended, signals};
use crate::step::plain_model;
use crate::weights::Weights;

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
    /// Write a model in Hugging Face's format
    Export(ExportArgs),
    /// Continue a prompt with an exported model
    Generate(Generate),
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
}

#[derive(Debug, Args)]
struct ExportArgs {
    /// A run (folder or name) or a checkpoint
    #[arg(value_name = "RUN|CHECKPOINT")]
    what: PathBuf,
    /// The format
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// Type of the weights
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
    dtype: String,
    /// The folder to make
    #[arg(long)]
    out: PathBuf,
    /// Where runs are looked for by name
    #[arg(long, default_value = "runs")]
    runs_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Hugging Face's folder: config.json, model.safetensors, tokenizer.json
    Hf,
}

#[derive(Debug, Args)]
struct Generate {
    /// An exported folder
    dir: PathBuf,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// At most so many tokens
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0, value_parser = at_least_zero)]
    temperature: f64,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_parser = probability)]
    top_p: f64,
    /// Names the stream of random numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which backend computes
    #[arg(long, default_value = "flex")]
    backend: String,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// One training step
    Step(bench::Step),
}

/// Runs the command of this process and returns its exit code: 0 done, 1 failed, 2 bad usage or recipe, 75 try again.
#[must_use]
pub fn main() -> ExitCode {
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
    match run(cli.command, log) {
        Ok(code) => code,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            log::say(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command, log: RunLog) -> Result<ExitCode> {
    match command {
        Command::Train(args) => train(args, log),
        Command::Export(args) => export(&args),
        Command::Generate(args) => say(&args),
        Command::Bench(Bench::Step(args)) => bench::step(&args).map(|()| ExitCode::SUCCESS),
        Command::Keys => print(&keys::markdown()),
    }
}

fn train(args: Train, log: RunLog) -> Result<ExitCode> {
    let path = args.recipe.display().to_string();
    let text = std::fs::read_to_string(&args.recipe)
        .map_err(|error| Error::Usage(format!("{path}: expected a recipe, a TOML file in UTF-8: {error}")))?;
    let (raw, recipe) = recipe::read(&path, &text, &args.sets)?;
    let stem = args.recipe.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let request = run::Request {
        raw,
        recipe,
        name: args.name.unwrap_or(stem),
        resume: args.resume,
        registry: registry(std::env::var_os("CARGO_HOME"), std::env::var_os("HOME")),
        log,
    };
    Ok(match run::start::train(request)? {
        Ended::Done | Ended::Stopped => ExitCode::SUCCESS,
        Ended::Signalled => ExitCode::from(signals::TRY_AGAIN),
    })
}

/// Cargo's folder of unpacked sources.
fn registry(cargo_home: Option<OsString>, home: Option<OsString>) -> PathBuf {
    let cargo = cargo_home.map(PathBuf::from).or_else(|| home.map(|home| PathBuf::from(home).join(".cargo")));
    cargo.unwrap_or_else(|| PathBuf::from(".cargo")).join("registry").join("src")
}

fn export(args: &ExportArgs) -> Result<ExitCode> {
    let Format::Hf = args.format;
    let weights = Weights::open(&args.what, &args.runs_dir)?;
    let tokenizer = weights.tokenizer()?;
    let export = Export {
        config: &weights.config,
        weights: &weights.read(&weights.config)?,
        tokenizer: &weights.tokenizer_json,
        end_of_text: &weights.end_of_text,
        end_of_text_id: tokenizer.end_of_text(),
        dtype: args.dtype.parse::<Dtype>()?,
    };
    let bytes = export.write(&args.out)?;
    print(&format!("{} exported to {} ({:.1} MB)\n", weights.path.display(), args.out.display(), bytes as f64 / 1e6))
}

fn say(args: &Generate) -> Result<ExitCode> {
    device::available(&args.backend).map_err(|why| Error::Usage(format!("--backend: {why}")))?;
    if !args.dir.join("config.json").is_file() {
        return Err(Error::Usage(format!(
            "{}: expected an exported folder with a config.json; make one with `tributary export RUN --out DIR`",
            args.dir.display()
        )));
    }
    let weights = Weights::open(&args.dir, Path::new(""))?;
    let tokenizer = weights.tokenizer()?;
    let device = device::open(&DeviceKeys { backend: args.backend.clone(), index: 0, threads: 0 })?;
    let model = plain_model(&weights.config, &device, &weights.read(&weights.config)?);
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let longest = weights.config.max_position_embeddings;
    let ids = prompt_tokens(&tokenizer, "--prompt", &args.prompt, longest)?;
    let ending = generate(&model, &tokenizer, ids, args.max_tokens, sampling, |text| {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    })?;
    print("\n")?;
    if ending == Ending::Context {
        log::say(&format!("stopped: the model's context of {} tokens is full", weights.config.max_position_embeddings));
    }
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> Result<ExitCode> {
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::io("write", "standard output"))?;
    Ok(ExitCode::SUCCESS)
}

fn at_least_zero(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| (0.0..=100.0).contains(x)).ok_or_else(|| "expected a number from 0 to 100".into())
}

fn probability(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0).ok_or_else(|| "expected a number above 0, up to 1".into())
}
