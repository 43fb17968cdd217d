//! What no key shows alone: faults between the keys of a recipe.

use checkpoint::store::Place;
use compression::BLOCK;
use parallel::mesh::{Mesh, MeshFault, MeshFaults, Shape};
use parallel::pipeline::split::given;
use parallel::pipeline::{Pipeline, PipelineError};

use super::fault::{Fault, Origin};
use super::raw::{Raw, Reader};
use super::resolved::schedule;

/// Adds every fault between keys. Keys that are at fault themselves have no value, and are left out.
pub fn all(raw: &Raw, faults: &mut Vec<Fault>) {
    model_faults(raw, faults);
    data_faults(raw, faults);
    schedule_faults(raw, faults);
    mesh_faults(raw, faults);
    pipeline_faults(raw, faults);
    share_faults(raw, faults);
    sharding_faults(raw, faults);
    retention_faults(raw, faults);
    upload_faults(raw, faults);
    device_faults(raw, faults);
}

fn model_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    let absent = |name: &str, faults: &[Fault]| raw.get(name).is_none() && !faults.iter().any(|f| f.key == name);
    if keys.text("model.from").is_none() {
        for name in
            ["model.hidden_size", "model.intermediate_size", "model.num_hidden_layers", "model.num_attention_heads"]
        {
            if absent(name, faults) {
                faults.push(Fault::new(Origin::Absent, name, "missing: expected a size, or `model.from`"));
            }
        }
        if absent("tokenizer.vocab_size", faults) && absent("tokenizer.file", faults) {
            faults.push(Fault::new(
                Origin::Absent,
                "tokenizer.vocab_size",
                "missing: expected the size of a vocabulary to train, or `tokenizer.file`, or `model.from`",
            ));
        }
    } else if keys.count("tokenizer.vocab_size").is_some() {
        faults.push(
            Fault::new(
                raw.origin("tokenizer.vocab_size"),
                "tokenizer.vocab_size",
                "a new tokenizer cannot serve weights that were trained with another",
            )
            .help("leave it out: the tokenizer comes with `model.from`"),
        );
    }
    if keys.count("tokenizer.vocab_size").is_some() && keys.text("tokenizer.file").is_some() {
        faults.push(Fault::new(
            raw.origin("tokenizer.file"),
            "tokenizer.file",
            "expected either a file or `tokenizer.vocab_size`, found both",
        ));
    }
    if let (Some(hidden), Some(heads)) = (keys.count("model.hidden_size"), keys.count("model.num_attention_heads"))
        && (hidden % heads != 0 || (hidden / heads) % 2 != 0)
    {
        faults.push(Fault::new(
            raw.origin("model.num_attention_heads"),
            "model.num_attention_heads",
            format!("expected an even number of elements a head (rotary embedding), found {hidden} / {heads}"),
        ));
    }
    if let (Some(heads), Some(shared)) =
        (keys.count("model.num_attention_heads"), keys.count("model.num_key_value_heads"))
        && heads % shared != 0
    {
        faults.push(Fault::new(
            raw.origin("model.num_key_value_heads"),
            "model.num_key_value_heads",
            format!("expected a divisor of the {heads} query heads, found {shared}"),
        ));
    }
    if let (Some(longest), Some(seq)) = (keys.count("model.max_position_embeddings"), keys.count("train.seq_len"))
        && seq > longest
    {
        faults.push(Fault::new(
            raw.origin("train.seq_len"),
            "train.seq_len",
            format!("expected at most model.max_position_embeddings = {longest}, found {seq}"),
        ));
    }
}

fn data_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    if keys.texts("data.train").is_empty() && !faults.iter().any(|fault| fault.key == "data.train") {
        faults.push(Fault::new(raw.origin("data.train"), "data.train", "expected at least one text to train on"));
    }
    if keys.text("data.source").as_deref() == Some("crates") {
        for name in ["data.train", "eval.files"] {
            for item in keys.texts(name).iter().filter(|item| item.split('@').filter(|x| !x.is_empty()).count() != 2) {
                faults.push(Fault::new(raw.origin(name), name, format!("expected name@version, found \"{item}\"")));
            }
        }
        if raw.get("data.blake3").is_none() && !faults.iter().any(|fault| fault.key == "data.blake3") {
            faults.push(
                Fault::new(Origin::Absent, "data.blake3", "missing: a corpus of crates is pinned by its hash")
                    .help("write any 64 hex digits; the error that follows tells the right ones"),
            );
        }
    }
    if let Some(hash) = keys.text("data.blake3")
        && (hash.len() != 64 || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        faults.push(Fault::new(
            raw.origin("data.blake3"),
            "data.blake3",
            format!("expected 64 hexadecimal digits, found \"{hash}\""),
        ));
    }
}

fn sharding_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    let name = "compression.parameter_codec";
    let is_lossy = keys.text(name).is_some_and(|codec| codec != "fp32");
    if is_lossy && keys.flag("optimizer.sharded") == Some(false) {
        let what = "expected \"fp32\": without optimizer.sharded no parameters travel, sums of gradients do";
        faults
            .push(Fault::new(raw.origin(name), name, what).help("write `optimizer.sharded = true` to send parameters"));
    }
}

fn schedule_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    if let (Some(steps), Some(warmup)) = (keys.count("train.steps"), keys.count("schedule.warmup_steps"))
        && warmup > steps
    {
        faults.push(Fault::new(
            raw.origin("schedule.warmup_steps"),
            "schedule.warmup_steps",
            format!("expected at most train.steps = {steps}, found {warmup}"),
        ));
    }
    if let (Some(peak), Some(end)) = (keys.real("schedule.learning_rate"), keys.real("schedule.min_learning_rate"))
        && end > peak
    {
        faults.push(Fault::new(
            raw.origin("schedule.min_learning_rate"),
            "schedule.min_learning_rate",
            format!("expected at most schedule.learning_rate = {peak}, found {end}"),
        ));
    }
}

/// What the mesh asks of the model, as far as the recipe says it. What comes with `model.from`, and how many tokens the
/// vocabulary really has, is known later, and checked again.
fn mesh_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    let sizes = ["parallel.data", "parallel.pipeline", "parallel.tensor", "parallel.virtual_stages"];
    let [Some(data), Some(stages), Some(tensor), Some(virtual_stages)] = sizes.map(|name| keys.count(name)) else {
        return;
    };
    let mut add = |found: &MeshFaults| {
        let fault = |fault: &MeshFault| {
            let name = match fault {
                MeshFault::VirtualStages { .. } => "parallel.virtual_stages",
                MeshFault::Layers { .. } => "parallel.pipeline",
                _ if tensor == 1 && stages > 1 => "parallel.pipeline",
                _ => "parallel.tensor",
            };
            Fault::new(raw.origin(name), name, fault.to_string())
        };
        faults.extend(found.all().iter().map(fault));
    };
    let mesh = match Mesh::new(data, stages, tensor) {
        Ok(mesh) => mesh,
        Err(found) => return add(&found),
    };
    let known = |key: &str, unless: usize| keys.count(key).unwrap_or(unless);
    let heads = known("model.num_attention_heads", tensor);
    let sequence = keys.flag("parallel.sequence").filter(|&on| on).and_then(|_| keys.count("train.seq_len"));
    let shape = Shape {
        heads,
        key_value_heads: keys.count("model.num_key_value_heads").unwrap_or(heads),
        layers: known("model.num_hidden_layers", stages * virtual_stages),
        vocabulary: known("tokenizer.vocab_size", tensor),
        feed_forward: known("model.intermediate_size", tensor),
        sequence,
    };
    if let Err(found) = mesh.check(mesh.ranks(), &shape, virtual_stages) {
        add(&found);
    }
}

/// What stages ask of layers and micro-batches.
fn pipeline_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let keys = Reader(raw);
    let (Some(stages), Some(pieces)) = (keys.count("parallel.pipeline"), keys.count("parallel.virtual_stages")) else {
        return;
    };
    let Some(kind) = keys.text("parallel.schedule").and_then(|name| schedule(&name)) else { return };
    let shares = keys.counts("parallel.micro_batches").or_else(|| Some(vec![keys.count("train.micro_batches")?]));
    let shares = shares.unwrap_or_else(|| vec![stages]);
    if let Some(error) = shares.iter().find_map(|&passes| Pipeline::new(kind, stages, pieces, passes).err()) {
        let name = match error {
            PipelineError::Groups { .. } if keys.counts("parallel.micro_batches").is_some() => "parallel.micro_batches",
            PipelineError::Groups { .. } => "train.micro_batches",
            PipelineError::VirtualStages { .. } => "parallel.virtual_stages",
            PipelineError::Interleaves { .. } | PipelineError::Empty { .. } => "parallel.schedule",
        };
        faults.push(Fault::new(raw.origin(name), name, error.to_string()));
    }
    let name = "parallel.layers";
    if let (Some(layers), Some(counts)) = (keys.count("model.num_hidden_layers"), keys.counts(name))
        && let Err(error) = given(layers, stages * pieces, &counts)
    {
        faults.push(Fault::new(raw.origin(name), name, error.to_string()));
    }
    let name = "parallel.activation_codec";
    if stages == 1 && keys.text(name).is_some_and(|codec| codec != "fp32") {
        let what = "expected \"fp32\" where parallel.pipeline is 1: nothing travels between stages";
        faults.push(Fault::new(raw.origin(name), name, what));
    }
}

fn share_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let (name, keys) = ("parallel.group", Reader(raw));
    if let (Some(ranks), Some(group)) = (keys.count("parallel.data"), keys.count(name))
        && !ranks.is_multiple_of(group)
    {
        let what = format!("expected a divisor of parallel.data = {ranks}, found {group}");
        faults.push(Fault::new(raw.origin(name), name, what));
    }
    let name = "parallel.chunk_elements";
    if let Some(elements) = keys.count(name).filter(|elements| !elements.is_multiple_of(BLOCK)) {
        let what = format!("expected a multiple of {BLOCK}, found {elements}");
        faults.push(Fault::new(raw.origin(name), name, what));
    }
    let name = "parallel.micro_batches";
    let (Some(ranks), Some(shares)) = (keys.count("parallel.data"), keys.counts(name)) else { return };
    if shares.len() != ranks {
        let what = format!("expected one number for each of the parallel.data = {ranks} ranks, found {}", shares.len());
        faults.push(Fault::new(raw.origin(name), name, what));
    }
}

/// The best are those with the lowest loss on held-out text: without that there are none.
fn retention_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let (name, keys) = ("checkpoint.keep_best", Reader(raw));
    let Some(wanted) = keys.count(name).filter(|&wanted| wanted > 0) else { return };
    if keys.count("eval.every") == Some(0) || keys.texts("eval.files").is_empty() {
        let what = format!("expected 0 where nothing is evaluated, found {wanted}");
        let help = "write `eval.files`, and `eval.every` such that it comes with `checkpoint.every`";
        faults.push(Fault::new(raw.origin(name), name, what).help(help));
    }
}

fn upload_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    const KEY: &str = "checkpoint.upload_to";
    if let Some(Err(why)) = Reader(raw).text(KEY).map(|url| Place::parse(&url)) {
        faults.push(Fault::new(raw.origin(KEY), KEY, why));
    }
}

fn device_faults(raw: &Raw, faults: &mut Vec<Fault>) {
    let Some(backend) = Reader(raw).text("device.backend") else { return };
    if let Err(why) = crate::device::available(&backend) {
        faults.push(Fault::new(raw.origin("device.backend"), "device.backend", why));
    }
}
