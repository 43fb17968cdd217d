//! The recipe as validated: typed, complete, consistent with itself.

use std::path::PathBuf;

use checkpoint::export::Dtype;
use checkpoint::store::Place;
use compression::Codec;
use parallel::mesh::Mesh;
use parallel::pipeline::Kind;

use super::checks;
use super::fault::Fault;
use super::raw::{Raw, Reader};

/// A recipe that may be run.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// `[model]`: the shape, as far as it is written.
    pub model: ModelKeys,
    /// `[tokenizer]`.
    pub tokenizer: Tokenizer,
    /// `[data]`, and the held-out files of `[eval]`.
    pub data: Data,
    /// `[train]`.
    pub train: Train,
    /// `[eval]`.
    pub eval: Eval,
    /// `[optimizer]`.
    pub optimizer: Optimizer,
    /// `[schedule]`.
    pub schedule: Schedule,
    /// `[parallel]`.
    pub parallel: Parallel,
    /// `[compression]`.
    pub compression: Compression,
    /// `[checkpoint]`.
    pub checkpoint: Checkpoint,
    /// `[device]`.
    pub device: DeviceKeys,
    /// `[metrics]`.
    pub metrics: Metrics,
    /// `[export]`.
    pub export: Export,
}

/// `[model]`. What is not written comes from `from`, or from a default once the vocabulary is known.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelKeys {
    /// `hidden_size`
    pub hidden_size: Option<usize>,
    /// `intermediate_size`
    pub intermediate_size: Option<usize>,
    /// `num_hidden_layers`
    pub num_hidden_layers: Option<usize>,
    /// `num_attention_heads`
    pub num_attention_heads: Option<usize>,
    /// `num_key_value_heads`
    pub num_key_value_heads: Option<usize>,
    /// `max_position_embeddings`
    pub max_position_embeddings: Option<usize>,
    /// `rope_theta`
    pub rope_theta: Option<f64>,
    /// `rms_norm_eps`
    pub rms_norm_eps: Option<f64>,
    /// `tie_word_embeddings`
    pub tie_word_embeddings: Option<bool>,
    /// `initializer_range`
    pub initializer_range: f64,
    /// `from`
    pub from: Option<PathBuf>,
}

/// `[tokenizer]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokenizer {
    /// Where it comes from.
    pub source: TokenizerSource,
    /// The token between documents, if it is written.
    pub end_of_text: Option<String>,
}

/// Where the tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A byte-level BPE of this many tokens, trained on the training text.
    Train {
        /// Tokens, the special one included.
        vocab_size: usize,
    },
    /// A file in Hugging Face's format.
    File(PathBuf),
    /// The one that lies beside the weights of `model.from`.
    From,
}

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// The kind of the text.
    pub source: Source,
    /// What to train on.
    pub train: Vec<String>,
    /// What to hold out, from `[eval]`.
    pub held_out: Vec<String>,
    /// BLAKE3 of the corpus, if it is to be checked.
    pub blake3: Option<String>,
    /// Where tokenizers and tokens are kept.
    pub cache_dir: PathBuf,
}

/// The kind of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Rust sources of crates in the local cargo registry.
    Crates,
    /// One document a file.
    Text,
    /// One document a line of JSON.
    Jsonl {
        /// The field that holds the document.
        field: String,
    },
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Train {
    /// Optimiser steps.
    pub steps: u64,
    /// The step after which to stop in good order.
    pub stop_at_step: Option<u64>,
    /// Tokens a sequence.
    pub seq_len: usize,
    /// Sequences a forward pass.
    pub micro_batch_size: usize,
    /// Of weights and order.
    pub seed: u64,
    /// Largest global norm; `None` for no clipping.
    pub clip_norm: Option<f64>,
    /// Skipped steps in a row that end the run.
    pub skip_max: u64,
}

/// `[eval]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eval {
    /// Steps between evaluations; 0 for none but the last.
    pub every: u64,
    /// Windows an evaluation; 0 for all.
    pub windows: usize,
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Where each rank keeps moments of what it owns alone: what parameters travel in.
    pub sharded: Option<Codec>,
}

/// `[schedule]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The peak.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Where the cosine ends.
    pub min_learning_rate: f64,
}

/// `[parallel]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Parallel {
    /// Data-parallel ranks.
    pub data: usize,
    /// Stages of a pipeline.
    pub pipeline: usize,
    /// In which order they work.
    pub schedule: Kind,
    /// Pieces of each stage.
    pub virtual_stages: usize,
    /// Layers of every piece, if somebody says.
    pub layers: Option<Vec<usize>>,
    /// What travels between stages travels in.
    pub activation_codec: Codec,
    /// Ranks that share every layer.
    pub tensor: usize,
    /// Whether they cut sequences too.
    pub sequence: bool,
    /// Forward passes a step, of each rank.
    pub micro_batches: Vec<usize>,
    /// Bytes of f32 gradient a bucket.
    pub bucket_bytes_max: usize,
    /// Ranks of a machine, a divisor of `data`.
    pub group: usize,
    /// Elements of a frame, a multiple of [`compression::BLOCK`].
    pub chunk_elements: usize,
    /// Frames that are under way to one rank.
    pub window_chunks: usize,
    /// Seconds until all have ended when one is lost.
    pub peer_timeout_s: f64,
    /// Seconds until all must have joined.
    pub join_timeout_s: f64,
    /// Steps between two comparisons of the parameters; 0 for none.
    pub verify_every: u64,
    /// Whether local ranks keep to their share of the cores.
    pub pin: bool,
}

impl Parallel {
    /// All ranks.
    ///
    /// # Panics
    /// When the recipe was not checked.
    #[must_use]
    pub fn mesh(&self) -> Mesh {
        Mesh::new(self.data, self.pipeline, self.tensor).expect("a recipe with more ranks than there may be is refused")
    }
}

/// `[compression]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// How gradients travel between ranks.
    pub codec: CodecChoice,
    /// Steps in `int8` where the codec has fewer bits.
    pub warmup_steps: u64,
    /// Whether payloads may stand in zstd frames.
    pub zstd: Zstd,
    /// Threads that encode, add and decode; 0 for what fits the device.
    pub threads: usize,
}

/// Whether payloads may stand in zstd frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zstd {
    /// None does.
    Off,
    /// Those of each bucket where that saves time.
    Auto,
}

/// How gradients are to travel between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecChoice {
    /// In what turns out to give the shortest step.
    Auto,
    /// In this codec.
    Fixed(Codec),
}

/// `[checkpoint]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Steps between two; 0 for none but the last.
    pub every: u64,
    /// How many to keep; 0 for all.
    pub keep_last: usize,
    /// Steps between two that stay; 0 for none.
    pub keep_every: u64,
    /// How many of the best to keep; 0 for none.
    pub keep_best: usize,
    /// What to do when two are being written.
    pub when_busy: WhenBusy,
    /// Bytes a second that a rank writes while training goes on; 0 for no limit.
    pub write_bytes_per_s_max: u64,
    /// Seconds to write one after a signal.
    pub grace_s: f64,
    /// How what ranks left out of gradients is stored.
    pub residuals: Residuals,
    /// Whether ranks' files are packed.
    pub zstd: bool,
    /// Where copies are kept.
    pub upload_to: Option<Place>,
    /// Seconds to wait for the last copy.
    pub upload_wait_s: f64,
}

/// How a checkpoint of several ranks keeps what they left out of gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residuals {
    /// Each sender's and each owner's.
    Exact,
    /// All of it added up.
    Folded,
}

/// What a run does when a checkpoint is due and two are still being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// It leaves this one out.
    Skip,
    /// It waits until there is room.
    Wait,
}

/// `[device]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKeys {
    /// Which backend.
    pub backend: String,
    /// Which of its devices.
    pub index: usize,
    /// Threads; 0 for all cores.
    pub threads: usize,
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Where run folders are made.
    pub runs_dir: PathBuf,
    /// Whether to write TensorBoard files.
    pub tensorboard: bool,
    /// The port for Prometheus on loopback, if there is to be one; 0 lets the system choose.
    pub prometheus_port: Option<u16>,
    /// Steps between two plain lines.
    pub log_every: u64,
}

/// `[export]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Export {
    /// Whether to export at the end.
    pub at_end: bool,
    /// Type of the exported weights.
    pub dtype: Dtype,
    /// What the sample continues, if one is wanted.
    pub prompt: Option<String>,
    /// Tokens of the sample.
    pub sample_tokens: usize,
    /// Temperature of the sample.
    pub temperature: f64,
}

fn compression(keys: &Reader<'_>) -> Option<Compression> {
    let codec = match keys.text("compression.codec")?.as_str() {
        "auto" => CodecChoice::Auto,
        name => CodecChoice::Fixed(Codec::from_name(name)?),
    };
    let warmup_steps = match (keys.count("compression.warmup_steps"), codec) {
        (Some(written), _) => written,
        // While the learning rate rises gradients shrink by much, and what comes slowly would be of another size.
        (None, CodecChoice::Fixed(codec)) if codec.hold() > 0.0 => keys.count("schedule.warmup_steps")?,
        (None, _) => 0,
    };
    let zstd = if keys.text("compression.zstd")? == "auto" { Zstd::Auto } else { Zstd::Off };
    Some(Compression { codec, warmup_steps: warmup_steps as u64, zstd, threads: keys.count("compression.threads")? })
}

/// Builds the typed recipe and adds every fault that no key shows alone. `None` when a required key has no value.
pub fn resolve(raw: &Raw, faults: &mut Vec<Fault>) -> Option<Recipe> {
    checks::all(raw, faults);
    let keys = Reader(raw);
    Some(Recipe {
        model: ModelKeys {
            hidden_size: keys.count("model.hidden_size"),
            intermediate_size: keys.count("model.intermediate_size"),
            num_hidden_layers: keys.count("model.num_hidden_layers"),
            num_attention_heads: keys.count("model.num_attention_heads"),
            num_key_value_heads: keys.count("model.num_key_value_heads"),
            max_position_embeddings: keys.count("model.max_position_embeddings"),
            rope_theta: keys.real("model.rope_theta"),
            rms_norm_eps: keys.real("model.rms_norm_eps"),
            tie_word_embeddings: keys.flag("model.tie_word_embeddings"),
            initializer_range: keys.real("model.initializer_range")?,
            from: keys.text("model.from").map(PathBuf::from),
        },
        tokenizer: Tokenizer {
            source: match (keys.count("tokenizer.vocab_size"), keys.text("tokenizer.file")) {
                (Some(vocab_size), _) => TokenizerSource::Train { vocab_size },
                (None, Some(file)) => TokenizerSource::File(file.into()),
                (None, None) => TokenizerSource::From,
            },
            end_of_text: keys.text("tokenizer.end_of_text"),
        },
        data: Data {
            source: match keys.text("data.source")?.as_str() {
                "crates" => Source::Crates,
                "text" => Source::Text,
                _ => Source::Jsonl { field: keys.text("data.jsonl_field")? },
            },
            train: keys.texts("data.train"),
            held_out: keys.texts("eval.files"),
            blake3: keys.text("data.blake3"),
            cache_dir: keys.text("data.cache_dir")?.into(),
        },
        train: Train {
            steps: keys.count("train.steps")? as u64,
            stop_at_step: keys.count("train.stop_at_step").map(|x| x as u64),
            seq_len: keys.count("train.seq_len")?,
            micro_batch_size: keys.count("train.micro_batch_size")?,
            seed: keys.count("train.seed")? as u64,
            clip_norm: keys.real("train.clip_norm").filter(|&norm| norm > 0.0),
            skip_max: keys.count("train.skip_max")? as u64,
        },
        eval: Eval { every: keys.count("eval.every")? as u64, windows: keys.count("eval.windows")? },
        optimizer: Optimizer {
            beta1: keys.real("optimizer.beta1")?,
            beta2: keys.real("optimizer.beta2")?,
            eps: keys.real("optimizer.eps")?,
            weight_decay: keys.real("optimizer.weight_decay")?,
            sharded: match keys.flag("optimizer.sharded")? {
                true => Some(Codec::from_name(&keys.text("compression.parameter_codec")?)?),
                false => None,
            },
        },
        schedule: Schedule {
            learning_rate: keys.real("schedule.learning_rate")?,
            warmup_steps: keys.count("schedule.warmup_steps")? as u64,
            min_learning_rate: keys.real("schedule.min_learning_rate")?,
        },
        parallel: Parallel {
            data: keys.count("parallel.data")?,
            pipeline: keys.count("parallel.pipeline")?,
            schedule: schedule(&keys.text("parallel.schedule")?)?,
            virtual_stages: keys.count("parallel.virtual_stages")?,
            layers: keys.counts("parallel.layers"),
            activation_codec: Codec::from_name(&keys.text("parallel.activation_codec")?)?,
            tensor: keys.count("parallel.tensor")?,
            sequence: keys.flag("parallel.sequence")?,
            micro_batches: match keys.counts("parallel.micro_batches") {
                Some(shares) => shares,
                None => vec![keys.count("train.micro_batches")?; keys.count("parallel.data")?],
            },
            bucket_bytes_max: keys.count("parallel.bucket_bytes_max")?,
            group: keys.count("parallel.group")?,
            chunk_elements: keys.count("parallel.chunk_elements")?,
            window_chunks: keys.count("parallel.window_chunks")?,
            peer_timeout_s: keys.real("parallel.peer_timeout_s")?,
            join_timeout_s: keys.real("parallel.join_timeout_s")?,
            verify_every: keys.count("parallel.verify_every")? as u64,
            pin: keys.flag("parallel.pin")?,
        },
        compression: compression(&keys)?,
        checkpoint: Checkpoint {
            every: keys.count("checkpoint.every")? as u64,
            keep_last: keys.count("checkpoint.keep_last")?,
            keep_every: keys.count("checkpoint.keep_every")? as u64,
            keep_best: keys.count("checkpoint.keep_best")?,
            when_busy: if keys.text("checkpoint.when_busy")? == "wait" { WhenBusy::Wait } else { WhenBusy::Skip },
            write_bytes_per_s_max: keys.count("checkpoint.write_bytes_per_s_max")? as u64,
            grace_s: keys.real("checkpoint.grace_s")?,
            residuals: match keys.text("checkpoint.residuals")? == "folded" {
                true => Residuals::Folded,
                false => Residuals::Exact,
            },
            zstd: keys.text("checkpoint.zstd")? == "on",
            upload_to: keys.text("checkpoint.upload_to").and_then(|url| Place::parse(&url).ok()),
            upload_wait_s: keys.real("checkpoint.upload_wait_s")?,
        },
        device: DeviceKeys {
            backend: keys.text("device.backend")?,
            index: keys.count("device.index")?,
            threads: keys.count("device.threads")?,
        },
        metrics: Metrics {
            runs_dir: keys.text("metrics.runs_dir")?.into(),
            tensorboard: keys.flag("metrics.tensorboard")?,
            prometheus_port: keys.count("metrics.prometheus_port").and_then(|port| u16::try_from(port).ok()),
            log_every: keys.count("metrics.log_every")? as u64,
        },
        export: Export {
            at_end: keys.flag("export.at_end")?,
            dtype: keys.text("export.dtype")?.parse().ok()?,
            prompt: keys.text("export.prompt"),
            sample_tokens: keys.count("export.sample_tokens")?,
            temperature: keys.real("export.temperature")?,
        },
    })
}

/// The schedule of this name.
pub(super) fn schedule(name: &str) -> Option<Kind> {
    match name {
        "gpipe" => Some(Kind::GPipe),
        "1f1b" => Some(Kind::OneForwardOneBackward),
        "interleaved" => Some(Kind::Interleaved),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
