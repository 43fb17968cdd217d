//! The commands on models that are there: `export` and `generate`.

use std::borrow::Cow;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use checkpoint::export::Dtype;
use clap::{Args, ValueEnum};

use super::print;
use crate::error::{Error, Result};
use crate::export::Export;
use crate::generate::{Ending, Sampling, Source, generate, prompt_tokens};
use crate::recipe::resolved::DeviceKeys;
use crate::step::plain_model;
use crate::weights::Weights;
use crate::{device, log};

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
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
pub(super) struct Generate {
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

pub(super) fn export(args: &ExportArgs) -> Result<ExitCode> {
    let Format::Hf = args.format;
    let weights = Weights::open(&args.what, &args.runs_dir)?;
    let tokenizer = weights.tokenizer()?;
    let export = Export {
        config: &weights.config,
        tokenizer: &weights.tokenizer_json,
        end_of_text: &weights.end_of_text,
        end_of_text_id: tokenizer.end_of_text(),
        dtype: args.dtype.parse::<Dtype>()?,
    };
    let parameters = weights.read(&weights.config)?;
    let bytes = export.write(&args.out, |index| Ok(Cow::Borrowed(&parameters[index])))?;
    print(&format!("{} exported to {} ({:.1} MB)\n", weights.path.display(), args.out.display(), bytes as f64 / 1e6))
}

pub(super) fn say(args: &Generate) -> Result<ExitCode> {
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
    let ending = generate(Source::Model(&model), &tokenizer, ids, args.max_tokens, sampling, |text| {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    })?;
    print("\n")?;
    if ending == Ending::Context {
        log::say(&format!("stopped: the model's context of {} tokens is full", weights.config.max_position_embeddings));
    }
    Ok(ExitCode::SUCCESS)
}

fn at_least_zero(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| (0.0..=100.0).contains(x)).ok_or_else(|| "expected a number from 0 to 100".into())
}

fn probability(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0).ok_or_else(|| "expected a number above 0, up to 1".into())
}
