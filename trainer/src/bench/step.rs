//! `tributary bench step`: one training step.

use std::io::Write as _;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::at_least_one;
use crate::device;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::recipe;
use crate::recipe::resolved::DeviceKeys;
use crate::run::metrics::memory_bytes_max;
use crate::state::State;
use crate::step::{Batch, Stepper, Word, untouched};

/// The shape that is measured; the defaults are those of the peer, `torch_ddp.py`.
#[derive(Debug, Args)]
pub struct Step {
    /// Which backend computes
    #[arg(long, default_value = "flex")]
    backend: String,
    /// Sequences a step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Width
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// Query and key-value heads
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Width of the SwiGLU
    #[arg(long, default_value_t = 1376)]
    ffn: usize,
    /// Layers
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Tokens of the vocabulary
    #[arg(long, default_value_t = 2048)]
    vocab: usize,
    /// Steps that are timed
    #[arg(long, default_value_t = 10, value_parser = at_least_one)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Times training steps on one batch, with an untied head as the peer has it.
///
/// # Errors
/// A backend that this build lacks, a shape that is none, a device that fails.
pub fn step(args: &Step) -> Result<()> {
    device::available(&args.backend).map_err(|why| Error::Usage(format!("--backend: {why}")))?;
    device::compute(args.threads, || timed(args))
}

fn timed(args: &Step) -> Result<()> {
    let text = format!(
        "[model]\nhidden_size = {}\nintermediate_size = {}\nnum_hidden_layers = {}\nnum_attention_heads = {}\n\
         tie_word_embeddings = false\n[tokenizer]\nvocab_size = {}\n[data]\nsource = 'text'\ntrain = ['none']\n\
         [train]\nsteps = {}\nseq_len = {}\nmicro_batch_size = {}\n[schedule]\nlearning_rate = 1e-3\n",
        args.hidden,
        args.ffn,
        args.layers,
        args.heads,
        args.vocab,
        args.warmup + args.steps,
        args.seq,
        args.batch
    );
    let (_, recipe) = recipe::read("bench step", &text, &[])?;
    let config = Config::from_keys(&recipe.model, args.vocab, args.seq, None)
        .ok_or_else(|| Error::Usage("bench step: expected every size".into()))?;
    let keys = DeviceKeys { backend: args.backend.clone(), index: 0, threads: args.threads };
    let stepper = Stepper::new(&config, &device::open(&keys)?, recipe.parallel.bucket_bytes_max)?;
    let mut state = State::initial(&config, 1);
    let ids =
        |shift: usize| (0..args.batch * args.seq).map(|i| ((i + shift) * 2_654_435_761 % args.vocab) as i32).collect();
    let batch = [Batch { inputs: ids(0), targets: ids(1), rows: args.batch }];
    let mut seconds = Vec::new();
    for step in 0..args.warmup + args.steps {
        let start = Instant::now();
        stepper.step(&mut state, &recipe, &batch, Word::default(), untouched)?;
        if step >= args.warmup {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let step_s = seconds[seconds.len() / 2];
    let tokens_per_s = (args.batch * args.seq) as f64 / step_s;
    let line = if args.json {
        let threads = if args.threads == 0 { rayon::current_num_threads() } else { args.threads };
        json!({
            "backend": args.backend, "dtype": "f32", "params": config.parameter_count(), "batch": args.batch,
            "seq": args.seq, "threads": threads, "step_s": step_s, "tokens_per_s": tokens_per_s,
            "memory_bytes": memory_bytes_max(),
        })
        .to_string()
    } else {
        let millions = config.parameter_count() as f64 / 1e6;
        format!("{millions:.1} M parameters on {}: {step_s:.4} s a step, {tokens_per_s:.0} tokens/s", args.backend)
    };
    writeln!(std::io::stdout(), "{line}").map_err(Error::io("write", "standard output"))
}
