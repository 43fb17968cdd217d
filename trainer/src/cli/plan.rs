//! `tributary plan`: what a recipe would take.
//!
//! - `text`: what it prints for people.

mod text;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use compression::Codec;
use parallel::mesh::{Axis, Mesh};
use parallel::pipeline::Kind;
use parallel::pipeline::split::split;
use serde_json::{Value, json};

use super::print;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::plan::search::{Found, search};
use crate::plan::time::Figures;
use crate::plan::{Plan, Shape, calibrate};
use crate::recipe::resolved::TokenizerSource;
use crate::recipe::{self, Recipe};
use crate::run::start::shape;
use crate::weights::Weights;
use crate::{device, log};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Override a key of the recipe; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// What a rank may take, as in 16GiB; a plan that takes more is refused. This machine's memory unless given
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory: Option<usize>,
    /// Cut every layer for so many ranks, in place of the recipe's parallel.tensor
    #[arg(long, value_name = "RANKS")]
    tensor: Option<usize>,
    /// Cut the model into so many stages, in place of the recipe's parallel.pipeline
    #[arg(long, value_name = "RANKS")]
    pipeline: Option<usize>,
    /// In which order stages work, in place of the recipe's parallel.schedule
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// Pieces of each stage, for the interleaved schedule, in place of the recipe's parallel.virtual_stages
    #[arg(long, value_name = "PIECES")]
    virtual_stages: Option<usize>,
    /// Share out the optimiser's state among replicas, as the recipe's optimizer.sharded does
    #[arg(long)]
    sharded: bool,
    /// List the meshes of so many ranks for the same step, the best first
    #[arg(long, value_name = "RANKS", conflicts_with_all = ["tensor", "pipeline", "sharded", "virtual_stages"])]
    search: Option<usize>,
    /// Take so many real steps of this model on this machine's device, to predict the time of a step
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "flops")]
    calibrate: Option<u32>,
    /// Floating-point operations a second that a rank does in a step, to predict its time, as in 2.5e12
    #[arg(long, value_name = "PER_SECOND", value_parser = rate)]
    flops: Option<f64>,
    /// Bytes a second of a rank's link, each way, as in 125e6 for 1 Gbit/s
    #[arg(long, value_name = "BYTES_PER_S", value_parser = rate)]
    link: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Schedule {
    #[value(name = "gpipe")]
    GPipe,
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    Interleaved,
}

pub(super) fn plan(args: &Args) -> Result<ExitCode> {
    let path = args.recipe.display().to_string();
    let text = std::fs::read_to_string(&args.recipe)
        .map_err(|error| Error::Usage(format!("{path}: expected a recipe, a TOML file in UTF-8: {error}")))?;
    let (_, recipe) = recipe::read(&path, &text, &args.sets)?;
    let config = config(&recipe)?;
    let keys = &recipe.parallel;
    let (stages, tensor) = (args.pipeline.unwrap_or(keys.pipeline), args.tensor.unwrap_or(keys.tensor));
    let mesh = Mesh::new(keys.data, stages, tensor)
        .map_err(|faults| Error::Usage(format!("plan: {}", faults.to_string().replace('\n', "\nplan: "))))?;
    let kind = args.schedule.map_or(keys.schedule, |schedule| match schedule {
        Schedule::GPipe => Kind::GPipe,
        Schedule::OneForwardOneBackward => Kind::OneForwardOneBackward,
        Schedule::Interleaved => Kind::Interleaved,
    });
    // Pieces of stages that the recipe has, and no other ones.
    let virtual_stages = match (args.virtual_stages, kind) {
        (Some(pieces), _) => pieces,
        (None, Kind::Interleaved) => keys.virtual_stages,
        (None, _) => 1,
    };
    // What a device other than the processor has is not known here.
    let here = || machine_bytes().filter(|_| device::is_host(&recipe.device.backend));
    let memory = args.memory.or_else(&here);
    // The flag adds to a recipe that does not say so.
    let sharded = recipe.optimizer.sharded.or(args.sharded.then_some(Codec::Fp32));
    let shape = Shape { mesh, schedule: kind, virtual_stages, sharded };
    if args.calibrate.is_some() {
        // What cannot be is said before any step is taken.
        if args.search.is_none() {
            Plan::new(&recipe, &config, shape, None)?;
        }
        if let Some(why) = here().and_then(|memory| calibrate::too_large(&recipe, &config, memory)) {
            let what = "--calibrate takes steps of the whole model on this machine, where";
            return Err(Error::Usage(format!("{what} {why}; give --flops in its place")));
        }
    }
    let flops_per_s = match args.calibrate {
        Some(steps) => {
            Some(device::compute(recipe.device.threads, || calibrate::flops_per_s(&recipe, &config, steps))?)
        }
        None => args.flops,
    };
    if flops_per_s.is_none() && args.link.is_some() {
        return Err(Error::Usage("--link: expected --calibrate or --flops beside it".into()));
    }
    let figures = flops_per_s.map(|flops_per_s| Figures { flops_per_s, link_bytes_per_s: args.link });
    if let Some(ranks) = args.search {
        let found = search(&recipe, &config, ranks, figures.as_ref(), memory)?;
        return tell_found(args, ranks, &found);
    }
    let plan = Plan::new(&recipe, &config, shape, figures.as_ref())?;
    let split = match args.calibrate {
        Some(passes) if plan.layers.len() > 1 => {
            let costs = device::compute(recipe.device.threads, || calibrate::layer_costs(&recipe, &config, passes))?;
            let split = split(&costs, plan.layers.len()).map_err(|error| Error::Usage(format!("plan: {error}")))?;
            Some((costs, split.iter().map(ExactSizeIterator::len).collect::<Vec<_>>()))
        }
        _ => None,
    };
    print(&if args.json {
        let mut object = object(&plan, true);
        if let Some((costs, layers)) = &split {
            let [layer_s, before_s, after_s] = [costs.layers[0], costs.before, costs.after].map(|ns| ns as f64 / 1e9);
            object["measured"] =
                json!({ "layer_s": layer_s, "embedding_s": before_s, "head_s": after_s, "layers": layers });
        }
        format!("{object}\n")
    } else {
        text::plan(&plan, &recipe, figures.as_ref()) + &split.map_or_else(String::new, |split| text::split(&split))
    })?;
    match memory.and_then(|memory| plan.too_large(memory)) {
        Some(why) => {
            log::say(&format!("error: {path}: {why}"));
            Ok(ExitCode::FAILURE)
        }
        None => Ok(ExitCode::SUCCESS),
    }
}

/// The model's shape, as a run would have it. Only a tokenizer or weights that are there already are read.
fn config(recipe: &Recipe) -> Result<Config> {
    let from = match &recipe.model.from {
        Some(from) => Some(Weights::open(from, &recipe.metrics.runs_dir)?),
        None => None,
    };
    let vocabulary = match (&recipe.tokenizer.source, &from) {
        (TokenizerSource::Train { vocab_size }, _) => *vocab_size,
        (TokenizerSource::File(path), _) => {
            let json = std::fs::read(path).map_err(Error::io("read", path))?;
            let end_of_text = recipe.tokenizer.end_of_text.as_deref().unwrap_or("<|endoftext|>");
            Tokenizer::parse(json, end_of_text)?.vocab_size()
        }
        (TokenizerSource::From, Some(from)) => from.config.vocab_size,
        (TokenizerSource::From, None) => return Err(Error::Usage("[model]: expected `model.from`".into())),
    };
    shape(recipe, vocabulary, from.as_ref())
}

fn tell_found(args: &Args, ranks: usize, found: &Found) -> Result<ExitCode> {
    if args.json {
        let plans: Vec<Value> = found.plans.iter().map(|plan| object(plan, false)).collect();
        let (too_large, impossible) = (found.too_large, found.impossible);
        let all = json!({ "ranks": ranks, "meshes": plans, "too_large": too_large, "impossible": impossible });
        print(&format!("{all}\n"))?;
    } else {
        print(&text::found(ranks, found))?;
    }
    if found.plans.is_empty() {
        let Found { too_large, impossible, .. } = found;
        log::say(&format!(
            "error: --search: no mesh of {ranks} ranks serves: {too_large} need more memory than there is, {impossible} do \
             not fit the model or the batch"
        ));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything, in names that stay.
fn object(plan: &Plan, with_ranks: bool) -> Value {
    let size = |axis| plan.mesh.size(axis);
    let most = |of: fn(&crate::plan::RankPlan) -> usize| plan.ranks.iter().map(of).max();
    let mut object = json!({
        "mesh": { "data": size(Axis::Data), "pipeline": size(Axis::Pipeline), "tensor": size(Axis::Tensor) },
        "parameters": plan.parameters,
        "sequences": plan.sequences,
        "tokens": plan.tokens,
        "codec": plan.codec.map(|codec| codec.name()),
        "peak_bytes": plan.peak_bytes(),
        "sent_bytes": most(|rank| rank.sent.bytes()),
        "checkpoint_bytes": plan.checkpoint_bytes,
        "bubble": plan.bubble,
        "layers": plan.layers,
        "step_flops": plan.flops,
        "time": plan.time.map(|time| json!({
            "compute_s": time.compute_s, "bubble_s": time.bubble_s, "tensor_s": time.tensor_s,
            "exposed_s": time.exposed_s, "step_s": time.step_s,
            "tokens_per_s": plan.tokens as f64 / time.step_s,
        })),
    });
    if with_ranks {
        let rank = |(rank, of): (usize, &crate::plan::RankPlan)| {
            let (memory, sent) = (&of.memory, &of.sent);
            json!({
                "rank": rank,
                "peak_bytes": memory.peak_bytes(),
                "parameters_bytes": memory.parameters_bytes,
                "optimizer_bytes": memory.optimizer_bytes,
                "gradients_bytes": memory.gradients_bytes,
                "residuals_bytes": memory.residuals_bytes,
                "activations_bytes": memory.activations_bytes,
                "snapshot_bytes": memory.snapshot_bytes,
                "program_bytes": memory.program_bytes,
                "sent_data_bytes": sent.data_bytes,
                "sent_pipeline_bytes": sent.pipeline_bytes,
                "sent_tensor_bytes": sent.tensor_bytes,
            })
        };
        object["ranks"] = plan.ranks.iter().enumerate().map(rank).collect();
    }
    object
}

/// Memory of this machine, where the system tells it.
fn machine_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// A number of bytes, with or without a unit.
fn bytes(text: &str) -> std::result::Result<usize, String> {
    let expected = || format!("expected a number of bytes, as 16GiB, 500MB or 1073741824, found {text:?}");
    let units = [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
    let units =
        units.into_iter().chain([("kB", 1000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)]);
    let (number, unit) =
        units.filter_map(|(name, unit)| Some((text.strip_suffix(name)?, unit))).next().unwrap_or((text, 1));
    let number: f64 = number.trim().parse().map_err(|_| expected())?;
    let bytes = number * unit as f64;
    if (1.0..=1e18).contains(&bytes) { Ok(bytes as usize) } else { Err(expected()) }
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1.0..=1e21).contains(rate));
    rate.ok_or_else(|| "expected a number of at least 1, as 2.5e12".into())
}
