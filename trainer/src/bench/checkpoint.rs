//! `tributary bench checkpoint`: what a checkpoint costs training, and how fast it is written and read, against copies and
//! plain files of the same bytes in the same run.
//!
//! A round does everything once, one after the other, so that whatever else the machine does meets all of it alike: a copy
//! of the state by one thread into memory that is there, a plain file, a checkpoint by itself, steps beside one, and steps
//! beside a thread that writes a plain file. Before and after each of these there are as many steps with nothing beside
//! them, and a ratio is that to those. What counts is the median over the rounds, of ratios within a round. The ratio of as
//! many steps with nothing beside them shows what the machine itself does.
//!
//! One checkpoint more a round is held back and let go on in turns, many times: a machine that changes its speed within a
//! second does so in both.
//!
//! - `work`: the step, and the plain file. `slices`: steps beside a checkpoint in turns. `load`: how fast it is read.

mod load;
mod slices;
mod work;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use checkpoint::reader::{Checkpoint, Want};
use checkpoint::writer::{Offer, Outcome, Retention, TensorSpec, Writer};
use checkpoint::{CheckpointError, RealDisk};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;

use super::at_least_one;
use crate::error::{Error, Result};
use load::Loads;
use slices::Slices;
use work::{Work, error_of_median, mean, median, plain_write_s};

/// Elements of a tensor at the most: a matrix of a middling model.
const TENSOR_MAX: usize = 1 << 22;
/// Steps with nothing beside them, before and after those beside something, as long as nobody knows how many those are.
const QUIET_STEPS: usize = 6;

/// What is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// Parameters; AdamW's moments make it three times as many values
    #[arg(long, default_value_t = 100_000_000, value_parser = super::elements)]
    elements: usize,
    /// Rounds whose median counts, after one that warms up
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    rounds: usize,
    /// Milliseconds of a step, about
    #[arg(long, default_value_t = 20, value_parser = at_least_one)]
    step_ms: usize,
    /// On which disk: a folder in this one is made, and removed
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// Pack it: zstd frames of shuffled bytes, as `checkpoint.zstd = "on"` does
    #[arg(long)]
    zstd: bool,
    /// Measure nothing but how fast the checkpoint in this folder is loaded, once in this process
    #[arg(long, conflicts_with_all = ["elements", "rounds", "step_ms", "folder", "zstd", "keep"])]
    load: Option<PathBuf>,
    /// Leave the last checkpoint there, for others to read
    #[arg(long)]
    keep: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Parameters and moments.
struct State {
    specs: Vec<TensorSpec>,
    tensors: Vec<Vec<f32>>,
}

/// What one round found; seconds, but for the ratio of the means.
struct Round {
    memcpy_s: f64,
    plain_write_s: f64,
    write_s: f64,
    /// Bytes of all files, over what they were if none were packed.
    stored_ratio: f64,
    copy_s: f64,
    /// In the call, and the excess of the step after it.
    stall_s: f64,
    quiet_step_s: f64,
    /// Steps beside a checkpoint, over those beside nothing before and after: of the medians, and of the means.
    busy_step_ratio: f64,
    busy_mean_ratio: f64,
    busy_steps: usize,
    /// Steps beside a plain file, over those beside nothing before and after.
    plain_step_ratio: f64,
    /// As many steps beside nothing as those beside a checkpoint, over those before and after: what the machine itself does
    /// to the ratios.
    idle_step_ratio: f64,
    /// Steps in turns with nothing, and beside a checkpoint that is held back in between.
    idle_slices: Slices,
    slices: Slices,
}

/// Measures.
///
/// # Errors
/// The disk fails.
pub fn checkpoint(options: &Options) -> Result<()> {
    if let Some(path) = &options.load {
        let loads = load::here(path)?;
        return say(&match options.json {
            true => json!(loads).to_string(),
            false => format!(
                "loaded in {:.3} s into new memory, in {:.3} s into memory that is there; a plain read takes {:.3} s",
                loads.load_s, loads.load_again_s, loads.read_s
            ),
        });
    }
    let state = State::new(options.elements);
    let bytes = state.bytes();
    let folder = tempfile::Builder::new().prefix("bench-checkpoint-").tempdir_in(&options.folder);
    let folder = folder.map_err(Error::io("make a folder in", &options.folder))?;
    let checkpoints = folder.path().join("checkpoints");
    let new = || Writer::new(Arc::new(RealDisk), checkpoints.clone(), state.specs.clone(), Retention::last(1));
    let mut writer = new()?;
    writer.pack(options.zstd);
    let mut work = Work::new(options.step_ms);
    let mut copy: Vec<Vec<f32>> = state.tensors.iter().map(|tensor| vec![1.0; tensor.len()]).collect();
    let mut rounds = Vec::new();
    let mut quiet_steps = QUIET_STEPS;
    for number in 0..=options.rounds as u64 {
        rounds.push(round(number, &state, &mut copy, &mut writer, (&mut work, quiet_steps), folder.path())?);
        quiet_steps = rounds.last().map_or(quiet_steps, |round: &Round| round.busy_steps.max(QUIET_STEPS));
    }
    drop(copy);
    let first = rounds.remove(0);
    drop(writer);
    let path = checkpoints.join(format!("step-{:08}", 3 * options.rounds + 3));
    assert!(loaded(&path, &state.specs)? == state.tensors, "what is loaded is what was saved");
    drop(state);
    let loads = load::in_processes(&path, options.rounds)?;
    if options.keep {
        let _ = folder.keep();
    }
    report(options, bytes, &first, &rounds, &loads, &path)
}

impl State {
    fn new(elements: usize) -> Self {
        let lengths = (0..elements.div_ceil(TENSOR_MAX)).map(|i| TENSOR_MAX.min(elements - i * TENSOR_MAX));
        let named = |suffix: &'static str| {
            let spec = move |(i, length)| TensorSpec { name: format!("parameter.{i:04}{suffix}"), shape: vec![length] };
            lengths.clone().enumerate().map(spec)
        };
        let specs: Vec<TensorSpec> = ["", ".m", ".v"].into_iter().flat_map(named).collect();
        let tensors = specs.par_iter().enumerate().map(|(index, spec)| {
            let mut x = (index as u32).wrapping_mul(0x9E37_79B9) | 1;
            let value = |_| {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                x as f32 * 1e-10
            };
            (0..spec.shape[0]).map(value).collect()
        });
        let tensors = tensors.collect();
        Self { specs, tensors }
    }

    fn bytes(&self) -> usize {
        size_of::<f32>() * self.tensors.iter().map(Vec::len).sum::<usize>()
    }

    fn offer(&self, writer: &mut Writer, step: u64) -> Result<f64> {
        let start = Instant::now();
        let offer = writer.offer(step, json!({ "step": step }), Vec::new(), |snapshot| {
            for (index, values) in self.tensors.iter().enumerate() {
                snapshot.tensor(index).copy_from_slice(values);
            }
        });
        match offer {
            Offer::Taken { .. } => Ok(start.elapsed().as_secs_f64()),
            Offer::Busy => Err(Error::Usage("bench checkpoint: nothing is in flight, and the writer is busy".into())),
        }
    }
}

fn round(
    number: u64,
    state: &State,
    copy: &mut [Vec<f32>],
    writer: &mut Writer,
    (work, quiet_steps): (&mut Work, usize),
    folder: &Path,
) -> Result<Round> {
    let start = Instant::now();
    for (from, to) in state.tensors.iter().zip(copy) {
        to.copy_from_slice(from);
    }
    let memcpy_s = start.elapsed().as_secs_f64();
    let plain_write_s = plain_write_s(folder, &state.tensors)?;
    let mut quiet = [(); 4].map(|()| Vec::new());
    quiet[0] = work.steps_s(quiet_steps);
    let beside_plain = std::thread::scope(|scope| {
        let writing = scope.spawn(|| work::plain_write_s(folder, &state.tensors));
        let steps = steps_until(work, || writing.is_finished());
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|_| steps)
    })?;
    quiet[1] = work.steps_s(quiet_steps);
    // Beside steps: the call, the step after it, and those until the checkpoint is there.
    // It is read from the disk again, as a run does it.
    writer.read_back(true);
    let copy_s = state.offer(writer, 3 * number + 1)?;
    let mut outcome = Ok(None);
    let busy = steps_until(work, || {
        outcome = committed(writer.outcomes());
        !matches!(outcome, Ok(None))
    });
    outcome?;
    quiet[2] = work.steps_s(quiet_steps);
    let idle = work.steps_s(busy.len());
    quiet[3] = work.steps_s(quiet_steps);
    // By itself, and only written.
    writer.read_back(false);
    state.offer(writer, 3 * number + 2)?;
    let (write_s, stored_ratio) = committed(writer.flush())?.unwrap_or((f64::NAN, f64::NAN));
    // In turns.
    hold(writer, true);
    state.offer(writer, 3 * number + 3)?;
    let slices = Slices::measure(work, |on| {
        hold(writer, !on);
        committed(writer.outcomes()).map(|outcome| outcome.is_some())
    })?;
    hold(writer, false);
    // The last of them does not count.
    let mut left = slices.busy() + 1;
    let idle_slices = Slices::measure(work, |on| {
        left -= usize::from(on);
        Ok(left == 0)
    })?;
    let around = |at: usize| quiet[at..at + 2].concat();
    let quiet_step_s = median(&mut around(1));
    let stall_s = copy_s + (busy[0] - quiet_step_s).max(0.0);
    let ratio = |steps: &[f64], at: usize| median(&mut steps.to_vec()) / median(&mut around(at));
    Ok(Round {
        memcpy_s,
        plain_write_s,
        write_s,
        stored_ratio,
        copy_s,
        stall_s,
        quiet_step_s,
        busy_step_ratio: ratio(&busy, 1),
        busy_mean_ratio: mean(&busy) / mean(&around(1)),
        busy_steps: busy.len(),
        plain_step_ratio: ratio(&beside_plain, 0),
        idle_step_ratio: ratio(&idle, 2),
        idle_slices,
        slices,
    })
}

/// Whether a checkpoint is kept from going on: it writes next to nothing.
fn hold(writer: &Writer, on: bool) {
    const UNLIMITED: u64 = 0;
    writer.limit(if on { 1 } else { UNLIMITED });
}

/// Takes steps until something is over, one at least; the last of several was beside it in part only, and is left out.
fn steps_until(work: &mut Work, mut over: impl FnMut() -> bool) -> Vec<f64> {
    let mut steps = vec![work.step_s()];
    while !over() {
        steps.push(work.step_s());
    }
    if steps.len() > 1 {
        steps.pop();
    }
    steps
}

/// Seconds of the checkpoint that was committed, if one was, and its bytes over what they were if none were packed.
fn committed(outcomes: Vec<Outcome>) -> Result<Option<(f64, f64)>> {
    let mut found = None;
    for outcome in outcomes {
        match outcome {
            Outcome::Committed { seconds, bytes, unpacked_bytes, .. } => {
                found = Some((seconds, bytes as f64 / unpacked_bytes as f64));
            }
            Outcome::Failed { error, .. } => return Err(error.into()),
            Outcome::Written { .. } | Outcome::Retained { .. } => {}
        }
    }
    Ok(found)
}

/// All that a checkpoint holds.
fn loaded(path: &Path, specs: &[TensorSpec]) -> std::result::Result<Vec<Vec<f32>>, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    let mut values: Vec<Vec<f32>> = specs.iter().map(|spec| vec![0.0; spec.shape.iter().product()]).collect();
    let mut wants: Vec<_> =
        specs.iter().zip(&mut values).map(|(spec, values)| Want::all(&spec.name, &spec.shape, values)).collect();
    checkpoint.load(&mut wants)?;
    drop(wants);
    Ok(values)
}

fn report(
    options: &Options,
    bytes: usize,
    first: &Round,
    rounds: &[Round],
    &Loads { load_s, load_again_s, read_s }: &Loads,
    path: &Path,
) -> Result<()> {
    let of = |what: fn(&Round) -> f64| median(&mut rounds.iter().map(what).collect::<Vec<f64>>());
    let stall_ratio = of(|round| round.stall_s / round.memcpy_s);
    let write_ratio = of(|round| round.plain_write_s / round.write_s);
    let error_of = |what: fn(&Round) -> f64| error_of_median(&rounds.iter().map(what).collect::<Vec<f64>>());
    let busy_ratio = |round: &Round| round.busy_step_ratio;
    let step_ratio = of(busy_ratio);
    let step_mean_ratio = of(|round| round.busy_mean_ratio);
    let all = |of: fn(&Round) -> &Slices| rounds.iter().map(of).collect::<Slices>();
    let (sliced, unsliced) = (all(|round| &round.slices), all(|round| &round.idle_slices));
    let zstd_ratio = options.zstd.then(|| of(|round| round.stored_ratio));
    let gb_per_s = |seconds: f64| bytes as f64 / seconds / 1e9;
    let line = if options.json {
        json!({
            "state_bytes": bytes, "rounds": options.rounds, "memcpy_s": of(|round| round.memcpy_s),
            "copy_s": of(|round| round.copy_s), "stall_s": of(|round| round.stall_s), "stall_ratio": stall_ratio,
            "first_stall_ratio": first.stall_s / first.memcpy_s, "plain_write_s": of(|round| round.plain_write_s),
            "write_s": of(|round| round.write_s), "write_ratio": write_ratio, "step_s": of(|round| round.quiet_step_s),
            "step_ratio": step_ratio, "step_ratio_error": error_of(busy_ratio), "step_mean_ratio": step_mean_ratio,
            "step_mean_ratio_error": error_of(|round| round.busy_mean_ratio),
            "plain_step_ratio": of(|round| round.plain_step_ratio),
            "plain_step_ratio_error": error_of(|round| round.plain_step_ratio),
            "idle_step_ratio": of(|round| round.idle_step_ratio),
            "idle_step_ratio_error": error_of(|round| round.idle_step_ratio),
            "slice_ratio": median(&mut sliced.ratios()), "slice_ratio_error": error_of_median(&sliced.ratios()),
            "slice_sum_ratio": sliced.sum_ratio(), "idle_slice_ratio": median(&mut unsliced.ratios()),
            "idle_slice_ratio_error": error_of_median(&unsliced.ratios()), "idle_slice_sum_ratio": unsliced.sum_ratio(),
            "slices": sliced.busy(),
            "steps_beside": of(|round| round.busy_steps as f64), "load_s": load_s, "load_again_s": load_again_s, "read_s": read_s,
            "load_ratio": load_s / read_s, "zstd_ratio": zstd_ratio, "path": options.keep.then(|| path.display().to_string()),
        })
        .to_string()
    } else {
        format!(
            "{:.2} GB of state, medians of {} rounds\n\
             a snapshot stops training for {:.3} s, {stall_ratio:.2} x memcpy ({:.2} x the first time)\n\
             beside a checkpoint a step takes {step_ratio:.3} x as long (mean {step_mean_ratio:.3}; {} steps each), beside a \
             plain file {:.3} x, beside nothing {:.3} x (the first give or take {:.3})\n\
             beside one that is held back in turns {:.3} x as long, give or take {:.3} ({} turns); in turns with nothing {:.3} x\n\
             written at {:.2} GB/s, {write_ratio:.2} of a plain file{}\n\
             loaded in {load_s:.3} s ({:.2} GB/s), in {load_again_s:.3} s into memory that is there; a plain read takes \
             {read_s:.3} s{}",
            bytes as f64 / 1e9,
            options.rounds,
            of(|round| round.stall_s),
            first.stall_s / first.memcpy_s,
            of(|round| round.busy_steps as f64),
            of(|round| round.plain_step_ratio),
            of(|round| round.idle_step_ratio),
            error_of(busy_ratio),
            median(&mut sliced.ratios()),
            error_of_median(&sliced.ratios()),
            sliced.busy(),
            median(&mut unsliced.ratios()),
            gb_per_s(of(|round| round.write_s)),
            zstd_ratio.map_or_else(String::new, |ratio| format!(", packed to {ratio:.3} of it")),
            gb_per_s(load_s),
            if options.keep { format!("\nkept: {}", path.display()) } else { String::new() },
        )
    };
    say(&line)
}

fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").map_err(Error::io("write", "standard output"))
}
