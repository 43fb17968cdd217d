//! The recipe as validated: typed, complete, consistent with itself. `build` makes it.

mod build;

use std::path::PathBuf;

use checkpoint::export::Dtype;
use checkpoint::store::Place;
use compression::Codec;
use parallel::mesh::Mesh;
use parallel::pipeline::Kind;

pub use build::resolve;

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
    /// Which congestion control ranks ask for.
    pub congestion_control: Option<String>,
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
    /// Threads that encode and add; 0 for what fits the device.
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
    /// Whether a checkpoint is read again before older ones go.
    pub read_back: bool,
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
