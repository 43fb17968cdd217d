//! From the recipe as written to the typed one.

use std::path::PathBuf;

use checkpoint::store::Place;
use compression::Codec;

use super::{
    Checkpoint, CodecChoice, Compression, Data, DeviceKeys, Eval, Export, Metrics, ModelKeys, Optimizer, Parallel,
    Recipe, Residuals, Schedule, Source, Tokenizer, TokenizerSource, Train, WhenBusy, Zstd, schedule,
};
use crate::recipe::checks;
use crate::recipe::fault::Fault;
use crate::recipe::raw::{Raw, Reader};

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
            congestion_control: keys.text("parallel.congestion_control"),
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
            read_back: keys.flag("checkpoint.read_back")?,
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
