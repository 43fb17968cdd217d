//! Every key that a recipe may have. The reader, `--set`, `--resume` and `docs/recipe.md` all follow this one table.

use std::fmt::Write as _;

use super::raw::Value;

/// What may happen to a key when a run is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The run would be another run: `--resume` refuses a change.
    Fixed,
    /// May change at a resume; the steps after it follow the new value, and `events.jsonl` says so.
    Resumable,
    /// Changes nothing that is computed.
    Free,
    /// Belongs to the machine, not to the run.
    Local,
}

/// The type and the bounds of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A whole number within bounds, both included.
    Integer(i64, i64),
    /// A number within bounds, both included.
    Real(f64, f64),
    /// `true` or `false`.
    Flag,
    /// Any text.
    Text,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// A list of whole numbers within bounds, both included; not an empty one.
    Integers(i64, i64),
}

/// What a key has when it is not written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fallback {
    /// It must be written.
    Required,
    /// It stays without a value.
    Empty,
    /// A whole number.
    Integer(i64),
    /// A number.
    Real(f64),
    /// A truth value.
    Flag(bool),
    /// A text or a choice.
    Text(&'static str),
    /// An empty list.
    NoTexts,
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// Type and bounds.
    pub kind: Kind,
    /// What it has when not written.
    pub default: Fallback,
    /// What a resume may do to it.
    pub tag: Tag,
    /// What it means, with units.
    pub about: &'static str,
}

const fn key(name: &'static str, kind: Kind, default: Fallback, tag: Tag, about: &'static str) -> Key {
    Key { name, kind, default, tag, about }
}

/// The largest count a recipe may ask for: every product of two stays inside 64 bits.
const MANY: i64 = 1 << 31;

/// Backends by name, and the cargo feature that builds each (`flex` is always there).
pub const BACKENDS: &[&str] = &["flex", "libtorch", "libtorch-cuda", "vulkan", "metal", "cuda", "rocm", "cpu"];

use Fallback::{
    Empty, Flag as DefaultFlag, Integer as DefaultInteger, NoTexts, Real as DefaultReal, Required, Text as DefaultText,
};
use Kind::{Choice, Flag, Integer, Integers, Real, Text, Texts};
use Tag::{Fixed, Free, Local, Resumable};

/// The table, in the order of the sections.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key("model.hidden_size", Integer(2, 65_536), Empty, Fixed, "width of the residual stream; required unless `model.from` is given"),
    key("model.intermediate_size", Integer(1, 1 << 20), Empty, Fixed, "width of the SwiGLU; required unless `model.from` is given"),
    key("model.num_hidden_layers", Integer(1, 1024), Empty, Fixed, "decoder layers; required unless `model.from` is given"),
    key("model.num_attention_heads", Integer(1, 1024), Empty, Fixed, "query heads; required unless `model.from` is given"),
    key("model.num_key_value_heads", Integer(1, 1024), Empty, Fixed, "key and value heads, a divisor of the query heads; the number of query heads unless written"),
    key("model.max_position_embeddings", Integer(1, 1 << 24), Empty, Fixed, "longest context in tokens; `train.seq_len` unless written"),
    key("model.rope_theta", Real(1.0, 1e12), Empty, Fixed, "base of the rotary embedding; 10000 unless written"),
    key("model.rms_norm_eps", Real(1e-12, 1e-2), Empty, Fixed, "added to the mean square in RMSNorm; 1e-5 unless written"),
    key("model.tie_word_embeddings", Flag, Empty, Fixed, "whether the head is the embedding table; true unless written"),
    key("model.initializer_range", Real(1e-6, 1.0), DefaultReal(0.02), Fixed, "standard deviation of the initial weights"),
    key("model.from", Text, Empty, Fixed, "a run, checkpoint or export of Tributary to take weights and tokenizer from"),
    key("tokenizer.vocab_size", Integer(257, 1 << 24), Empty, Fixed, "tokens of a byte-level BPE that is trained on the training text; required unless another tokenizer is given"),
    key("tokenizer.file", Text, Empty, Fixed, "a `tokenizer.json` to use as it is"),
    key("tokenizer.end_of_text", Text, Empty, Fixed, "the token between documents; what comes with `model.from`, or `<|endoftext|>`, unless written"),
    key("data.source", Choice(&["crates", "text", "jsonl"]), Required, Fixed, "`crates`: Rust sources of crates in the local cargo registry; `text`: one document a file; `jsonl`: one document a line"),
    key("data.train", Texts, NoTexts, Fixed, "what to train on: `name@version` for crates, else paths"),
    key("data.jsonl_field", Text, DefaultText("text"), Fixed, "the field of a JSON line that holds the document"),
    key("data.blake3", Text, Empty, Fixed, "BLAKE3 of the whole corpus, training and held-out; required for crates, checked wherever it is written"),
    key("data.cache_dir", Text, DefaultText("runs/.cache"), Local, "where tokenizers and tokens are kept between runs"),
    key("train.steps", Integer(1, MANY), Required, Resumable, "optimiser steps"),
    key("train.stop_at_step", Integer(1, MANY), Empty, Free, "stop in good order, with a checkpoint, after this step; `--resume` goes on"),
    key("train.seq_len", Integer(1, 1 << 24), Required, Fixed, "tokens a sequence"),
    key("train.micro_batch_size", Integer(1, 1 << 20), Required, Resumable, "sequences a forward pass"),
    key("train.micro_batches", Integer(1, 1 << 20), DefaultInteger(1), Resumable, "forward and backward passes a step, whose gradients add up"),
    key("train.seed", Integer(0, i64::MAX), DefaultInteger(1), Fixed, "of the initial weights and of the order of the data"),
    key("train.clip_norm", Real(0.0, 1e9), DefaultReal(1.0), Resumable, "largest global norm of the gradient; 0 for no clipping"),
    key("train.skip_max", Integer(1, MANY), DefaultInteger(20), Resumable, "steps in a row that may be skipped for non-finite gradients before the run ends"),
    key("eval.files", Texts, NoTexts, Fixed, "held-out text, of the same kind as `data.train`"),
    key("eval.every", Integer(0, MANY), DefaultInteger(0), Free, "steps between two evaluations; 0 for none but the last"),
    key("eval.windows", Integer(0, MANY), DefaultInteger(64), Free, "windows of `train.seq_len` tokens an evaluation during training; 0 for all. The last evaluation takes all"),
    key("optimizer.beta1", Real(0.0, 0.999_999), DefaultReal(0.9), Resumable, "AdamW's decay of the first moment"),
    key("optimizer.beta2", Real(0.0, 0.999_999_9), DefaultReal(0.95), Resumable, "AdamW's decay of the second moment"),
    key("optimizer.eps", Real(1e-16, 1.0), DefaultReal(1e-8), Resumable, "added to the root of the second moment"),
    key("optimizer.weight_decay", Real(0.0, 10.0), DefaultReal(0.1), Resumable, "decoupled decay, times the learning rate; 1-D tensors are exempt"),
    key("optimizer.sharded", Flag, DefaultFlag(false), Resumable, "whether each rank keeps moments of what it owns alone and sends updated parameters, not sums of gradients: 8 bytes a parameter are divided by the ranks, and ranks may compute on different backends; with one rank nothing changes"),
    key("schedule.learning_rate", Real(0.0, 100.0), Required, Resumable, "peak, reached after the warm-up"),
    key("schedule.warmup_steps", Integer(0, MANY), DefaultInteger(0), Resumable, "steps of linear warm-up"),
    key("schedule.min_learning_rate", Real(0.0, 100.0), DefaultReal(0.0), Resumable, "where the cosine ends, at `train.steps`"),
    key("parallel.data", Integer(1, 1024), DefaultInteger(1), Resumable, "data-parallel ranks, a process each; every rank computes `train.micro_batches` of its own"),
    key("parallel.pipeline", Integer(1, 1024), DefaultInteger(1), Resumable, "stages of a pipeline: ranks that hold one model together, each some of its layers, and hand on activations. `parallel.data` x `parallel.pipeline` x `parallel.tensor` processes"),
    key("parallel.schedule", Choice(&["1f1b", "gpipe", "interleaved"]), DefaultText("1f1b"), Resumable, "in which order a stage works on its micro-batches: `1f1b` keeps the activations of as many as there are stages, `gpipe` of all; `interleaved` is `1f1b` with several pieces of the model a stage, for less waiting and more messages"),
    key("parallel.virtual_stages", Integer(1, 1024), DefaultInteger(1), Resumable, "pieces of the model that each stage has; 2 or more with the `interleaved` schedule, for which the stages must divide the micro-batches"),
    key("parallel.layers", Integers(1, 1024), Empty, Resumable, "layers of every piece of the pipeline, in the order of the model; unless written such that the costliest piece does as few operations as can be"),
    key("parallel.activation_codec", Choice(&["fp32", "bf16", "int8"]), DefaultText("fp32"), Resumable, "how activations and their gradients travel between stages; what is left out is lost"),
    key("parallel.tensor", Integer(1, 1024), DefaultInteger(1), Resumable, "ranks that hold one model together, each a part of every layer, and work on the same batch; they follow each other, so that they are of one machine. `parallel.data` x `parallel.tensor` processes"),
    key("parallel.sequence", Flag, DefaultFlag(false), Resumable, "whether norms and what lies between layers are cut between the tensor ranks too, by tokens: less memory, for the same bytes; the tensor ranks must divide `train.seq_len`"),
    key("parallel.micro_batches", Integers(1, 1 << 20), Empty, Resumable, "forward and backward passes a step of each rank, in rank order, in place of `train.micro_batches`: for machines of unequal speed"),
    key("parallel.bucket_bytes_max", Integer(4, 1 << 34), DefaultInteger(4 << 20), Free, "bytes of f32 gradient a bucket, which leaves as soon as it is full"),
    key("parallel.group", Integer(1, 1024), DefaultInteger(1), Resumable, "ranks of a machine, which are consecutive: they add their gradients in f32 before these are compressed and leave the machine, once for all of them; a divisor of `parallel.data`"),
    key("parallel.chunk_elements", Integer(1 << 14, 1 << 20), DefaultInteger(1 << 18), Free, "elements of a frame, a multiple of 128; as `int8` the default takes 260 KiB. A frame must pass a link within `parallel.peer_timeout_s`"),
    key("parallel.window_chunks", Integer(1, 1 << 20), DefaultInteger(16), Free, "frames that are encoded and under way to one rank; what is to follow waits as gradient, without memory of its own"),
    key("parallel.congestion_control", Text, Empty, Local, "TCP's congestion control for what ranks send each other: the name of one that the machine has, or `system` for the one that it would choose; `cubic` unless written, if it is there"),
    key("parallel.peer_timeout_s", Real(1.0, 86_400.0), DefaultReal(30.0), Free, "when a rank is lost, all others have ended after so many seconds; three quarters of it in silence count as lost"),
    key("parallel.join_timeout_s", Real(1.0, 604_800.0), DefaultReal(300.0), Free, "seconds in which all ranks must have joined and read their text"),
    key("parallel.verify_every", Integer(0, MANY), DefaultInteger(50), Free, "steps between two comparisons of all ranks' parameters by hash, which also come before every checkpoint; 0 for none but the last"),
    key("parallel.pin", Flag, DefaultFlag(true), Local, "whether each local rank keeps to its share of the cores"),
    key("compression.codec", Choice(&["auto", "fp32", "bf16", "int8", "sparse24-int8", "int4", "sparse24-int4"]), DefaultText("int8"), Resumable, "how gradients travel between ranks, with what is left out added to later ones; `auto` measures and chooses; with one rank nothing travels"),
    key("compression.parameter_codec", Choice(&["fp32", "int8"]), DefaultText("fp32"), Resumable, "how parameters travel from their owners with `optimizer.sharded`: `fp32` as they are; `int8` what they differ by from what all have, and what is left out of that is in the next difference"),
    key("compression.warmup_steps", Integer(0, MANY), Empty, Resumable, "the first steps of a run, which travel as `int8` where the codec has fewer bits; unless written `schedule.warmup_steps` where the recipe names a `sparse24` codec, which needs it, else 0"),
    key("compression.zstd", Choice(&["off", "auto"]), DefaultText("off"), Free, "`auto`: payloads travel in zstd frames where that saves more time on the link than it takes, bucket by bucket; it changes nothing that is computed"),
    key("compression.threads", Integer(0, 1024), DefaultInteger(0), Local, "threads that encode and add, beside those that compute; 0 for one where the processor itself computes, and else for at most four"),
    key("checkpoint.every", Integer(0, MANY), DefaultInteger(100), Free, "steps between two checkpoints; 0 for none but the last"),
    key("checkpoint.keep_last", Integer(0, MANY), DefaultInteger(2), Free, "checkpoints to keep; 0 for all"),
    key("checkpoint.keep_every", Integer(0, MANY), DefaultInteger(0), Free, "checkpoints of every so many steps stay for ever, whatever `keep_last` says; 0 for none"),
    key("checkpoint.keep_best", Integer(0, 1024), DefaultInteger(0), Free, "this many with the lowest `eval_loss` stay, of those whose step was evaluated; 0 for none"),
    key("checkpoint.when_busy", Choice(&["skip", "wait"]), DefaultText("skip"), Free, "when two checkpoints are still being written: leave this one out, or wait until there is room"),
    key("checkpoint.write_bytes_per_s_max", Integer(0, 1 << 40), DefaultInteger(0), Local, "bytes a second that a rank writes while training goes on; 0 for no limit. The checkpoint at a run's end is never held back"),
    key("checkpoint.grace_s", Real(1.0, 86_400.0), DefaultReal(25.0), Free, "seconds that a signalled run has to write its checkpoint; Kubernetes kills after 30"),
    key("checkpoint.residuals", Choice(&["exact", "folded"]), DefaultText("exact"), Free, "what ranks left out of gradients: `exact` stores 4 bytes a parameter for each sender and for the owners, and a resume is bitwise; `folded` stores 4 bytes a parameter once, for which ranks add it up over the network at every checkpoint, and a resume is not bitwise"),
    key("checkpoint.zstd", Choice(&["off", "on"]), DefaultText("off"), Free, "`on`: ranks' files are zstd frames of shuffled bytes, smaller by what the exponents of weights and moments have in common, for more work of the thread that writes and of a resume; it changes nothing that is computed"),
    key("checkpoint.read_back", Flag, DefaultFlag(true), Local, "whether each rank reads its file of a new checkpoint from the disk again, and compares its hash, before the checkpoint counts and older ones are removed; `false` looks at the lengths of files"),
    key("checkpoint.upload_to", Text, Empty, Local, "where copies of committed checkpoints are kept, below the run's name: `s3://BUCKET/PREFIX`, `gs://...`, `az://...` or `file:///FOLDER`; the environment has the credentials; nothing is copied unless written"),
    key("checkpoint.upload_wait_s", Real(0.0, 604_800.0), DefaultReal(600.0), Local, "seconds that a run waits at its end for the last copy"),
    key("device.backend", Choice(BACKENDS), DefaultText("flex"), Local, "which backend of burn computes"),
    key("device.index", Integer(0, 1024), DefaultInteger(0), Local, "which device of that backend"),
    key("device.threads", Integer(0, 4096), DefaultInteger(0), Local, "threads that compute; 0 for all cores"),
    key("metrics.runs_dir", Text, DefaultText("runs"), Local, "where run folders are made"),
    key("metrics.tensorboard", Flag, DefaultFlag(true), Free, "whether to write TensorBoard event files"),
    key("metrics.prometheus_port", Integer(0, 65_535), Empty, Local, "where `http://127.0.0.1:PORT/metrics` shows the numbers of all ranks to Prometheus; 0 lets the system choose; nothing is served unless written"),
    key("metrics.log_every", Integer(1, MANY), DefaultInteger(10), Free, "steps between two lines where there is no terminal for a progress bar"),
    key("export.at_end", Flag, DefaultFlag(true), Free, "whether the finished run is exported to `runs/NAME/export`"),
    key("export.dtype", Choice(&["f32", "bf16", "f16"]), DefaultText("f32"), Free, "type of the exported weights"),
    key("export.prompt", Text, Empty, Free, "print a sample that continues this text at the end"),
    key("export.sample_tokens", Integer(1, 1 << 20), DefaultInteger(96), Free, "tokens of the sample"),
    key("export.temperature", Real(0.0, 100.0), DefaultReal(0.0), Free, "of the sample; 0 is greedy"),
];

/// The key of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The section of a `section.key`.
#[must_use]
pub fn section(name: &str) -> &str {
    name.split_once('.').map_or(name, |(section, _)| section)
}

/// The sections in the order of the table.
#[must_use]
pub fn sections() -> Vec<&'static str> {
    let mut sections: Vec<&str> = KEYS.iter().map(|key| section(key.name)).collect();
    sections.dedup();
    sections
}

impl Kind {
    /// What a reader should write, as the object of "expected".
    #[must_use]
    pub fn expectation(self) -> String {
        match self {
            Integer(min, max) if min == max => format!("{min}"),
            Integer(min, i64::MAX) => format!("an integer of at least {min}"),
            Integer(min, max) => format!("an integer from {min} to {max}"),
            Real(min, max) => format!("a number from {min} to {max}"),
            Flag => "true or false".into(),
            Text => "a string".into(),
            Choice(words) => format!("one of {}", words.join(", ")),
            Texts => "a list of strings".into(),
            Integers(min, max) => format!("a list of integers from {min} to {max}"),
        }
    }
}

impl Fallback {
    /// The value, where there is one.
    #[must_use]
    pub fn value(self) -> Option<Value> {
        match self {
            Required | Empty => None,
            DefaultInteger(x) => Some(Value::Integer(x)),
            DefaultReal(x) => Some(Value::Real(x)),
            DefaultFlag(x) => Some(Value::Flag(x)),
            DefaultText(x) => Some(Value::Text(x.into())),
            NoTexts => Some(Value::Texts(Vec::new())),
        }
    }
}

/// The table as Markdown, for `docs/recipe.md`.
#[must_use]
pub fn markdown() -> String {
    let mut out = String::new();
    for wanted in sections() {
        let _ =
            write!(out, "### `[{wanted}]`\n\n| key | expects | default | tag | |\n| --- | --- | --- | --- | --- |\n");
        for key in KEYS.iter().filter(|key| section(key.name) == wanted) {
            let default = match key.default {
                Required => "required".to_owned(),
                Empty => "—".to_owned(),
                other => other.value().map_or_else(String::new, |value| format!("`{}`", value.to_toml())),
            };
            let name = &key.name[wanted.len() + 1..];
            let tag = format!("{:?}", key.tag).to_lowercase();
            let _ = writeln!(out, "| `{name}` | {} | {default} | {tag} | {} |", key.kind.expectation(), key.about);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_satisfies_its_own_kind_and_no_name_stands_twice() {
        for (i, key) in KEYS.iter().enumerate() {
            assert!(KEYS[..i].iter().all(|other| other.name != key.name), "{}", key.name);
            assert_eq!(key.name.split('.').count(), 2, "{}", key.name);
            if let Some(value) = key.default.value() {
                assert_eq!(value.check(key.kind), Ok(()), "{}", key.name);
            }
        }
    }

    #[test]
    fn the_documentation_shows_the_table_as_it_is() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/recipe.md");
        let page = std::fs::read_to_string(path).expect("docs/recipe.md is in the repository");
        assert!(page.contains(&markdown()), "docs/recipe.md is stale: put the output of `tributary keys` into it");
    }
}
