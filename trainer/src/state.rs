//! The state of a run: where it starts, how it is named, and its way into a checkpoint and back.
//!
//! - [`sharding`]: what a rank keeps of the optimiser's state.
//! - [`mesh`]: the ranks that wrote a checkpoint; [`share`]: which part of it is a rank's to write.
//! - [`folders`]: a checkpoint in the folders of several machines.
//! - [`residuals`]: what they left out of gradients, onto the same ranks or others; [`slices`]: the same where ranks hold
//!   parts of a model; [`folding`]: what all have left out, added up for a checkpoint.

pub mod folders;
pub mod folding;
pub mod mesh;
pub mod residuals;
pub mod sharding;
pub mod share;
pub mod slices;

use std::sync::Arc;

use checkpoint::Manifest;
use checkpoint::reader::{Checkpoint, Want};
use checkpoint::writer::{Snapshot, TensorSpec};
use compression::Codec;
use parallel::data::exchange::Exchange;
use parallel::data::owed::Owed;
use parallel::data::rules::may_be_lossy;
use parallel::data::{Parameter, Part};
use serde::{Deserialize, Serialize};

use crate::cut::is_table;
use crate::error::{Error, Result};
use crate::model::config::LAYERS_MAX;
use crate::model::{Config, init};
use crate::recipe::raw::{self, Reader};

use mesh::Mesh;
use residuals::{Kept, owner_name, sides};
use sharding::Sharding;
pub use share::{Share, pieces};

/// Everything that a step changes: together with the recipe it decides every later step.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Parameters in the order of the plan, all of them: with a sharded optimiser this rank's replicas.
    pub weights: Vec<Vec<f32>>,
    /// AdamW's first moments, of what this rank keeps.
    pub m: Vec<Vec<f32>>,
    /// AdamW's second moments, of what this rank keeps.
    pub v: Vec<Vec<f32>>,
    /// What this rank owns of each parameter, where it is not the replica's part; else nothing.
    pub masters: Vec<Vec<f32>>,
    /// What this rank keeps.
    pub sharding: Sharding,
    /// Steps that were taken, skipped ones included: the schedule and the data follow this.
    pub step: u64,
    /// Updates that were applied: AdamW's t.
    pub updates: u64,
    /// Steps in a row that were skipped.
    pub skips: u64,
    /// The last step that was applied.
    pub good_step: u64,
}

/// What a checkpoint holds beside tensors: enough to go on, and enough to export without the run's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Steps that were taken.
    pub step: u64,
    /// Updates that were applied.
    pub updates: u64,
    /// Steps in a row that were skipped.
    pub skips: u64,
    /// The last step that was applied.
    pub good_step: u64,
    /// Data cursor: samples that were read from the run's order.
    pub samples: u64,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Loss of the last step whose loss was finite, in nats a token.
    pub loss: Option<f64>,
    /// Loss on held-out text after this very step, if it was evaluated: by it retention knows the best.
    #[serde(default)]
    pub eval_loss: Option<f64>,
    /// Key of the weights and of the data's order.
    pub seed: u64,
    /// BLAKE3 of the text, training and held-out.
    pub corpus_hash: String,
    /// The recipe's hash, over everything that decides what is computed.
    pub recipe_hash: String,
    /// The model's shape.
    pub model: Config,
    /// The token between documents.
    pub end_of_text: String,
    /// How gradients travelled; `None` where an older version wrote it, and with one rank, unless it keeps what several
    /// had left out.
    #[serde(default)]
    pub compression: Option<Travelled>,
    /// The ranks that wrote it; `None` where an older version did.
    #[serde(default)]
    pub mesh: Option<Mesh>,
}

/// How gradients travelled up to a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Travelled {
    /// In its step.
    pub codec: Codec,
    /// Whether what was left out is in it, of every tensor of which something may be.
    pub residuals: bool,
    /// Whether it is there added up, and no longer by rank.
    #[serde(default)]
    pub folded: bool,
    /// What `auto` chose.
    pub chosen: Option<Chosen>,
}

/// What `compression.codec = "auto"` chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// In force from the step after `step` on.
    pub codec: Codec,
    /// The step whose ballots carried the choice.
    pub step: u64,
}

/// What a run can go on with of how its gradients travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Whether the checkpoint has what was left out.
    pub residuals: bool,
    /// Whether it has only the sum of it.
    pub folded: bool,
    /// What `auto` chose.
    pub chosen: Option<Chosen>,
    /// Whether its step sent everything and counted: all residuals are zero.
    sent: bool,
}

impl Held {
    /// Whether something may be left out that was not sent yet.
    #[must_use]
    pub const fn has_unsent(&self) -> bool {
        self.residuals && !self.sent
    }
}

impl State {
    /// The state before the first step.
    #[must_use]
    pub fn initial(config: &Config, seed: u64) -> Self {
        let parameters = config.parameters();
        let weights = parameters.iter().map(|parameter| {
            let mut values = vec![1.0; parameter.shape.iter().product()];
            if parameter.shape.len() > 1 {
                init::normal(seed, &parameter.name, config.initializer_range, &mut values);
            }
            values
        });
        Self::fresh(weights.collect())
    }

    /// The same, of the parts that a rank holds.
    #[must_use]
    pub fn initial_parts(config: &Config, parts: &[Part], seed: u64) -> Self {
        let weights = parts.iter().map(|part| match part.whole.shape.len() {
            1 => vec![1.0; part.region.len()],
            _ => init::normal_part(seed, part, config.initializer_range),
        });
        Self::fresh(weights.collect())
    }

    /// These weights, with an optimiser that has seen nothing.
    #[must_use]
    pub fn fresh(weights: Vec<Vec<f32>>) -> Self {
        let zeros = || weights.iter().map(|w| vec![0.0; w.len()]).collect();
        let (m, v, masters) = (zeros(), zeros(), vec![Vec::new(); weights.len()]);
        Self { weights, m, v, masters, sharding: Sharding::NONE, step: 0, updates: 0, skips: 0, good_step: 0 }
    }

    /// BLAKE3 of all parameters, little-endian, in the order of their names.
    #[must_use]
    pub fn parameter_hash(&self, config: &Config) -> blake3::Hash {
        let hash = hash_of(config, |index, hasher| {
            hasher.add(&self.weights[index]);
            Ok(())
        });
        hash.expect("nothing fails")
    }

    /// The same of what this rank holds, of parts of the model or of all of it.
    #[must_use]
    pub fn hash_of_parts(&self, parts: &[Part]) -> blake3::Hash {
        let mut order: Vec<usize> = (0..parts.len()).collect();
        order.sort_by(|&a, &b| parts[a].whole.name.cmp(&parts[b].whole.name));
        let mut hasher = Hasher::default();
        order.into_iter().for_each(|index| hasher.add(&self.weights[index]));
        hasher.0.finalize()
    }

    /// What ranks compare: the parameters' hash; where this rank holds a part of the model, the beginnings of three hashes: of
    /// what it holds (16 bytes), of those parameters that it holds whole, as all of its stage do (8), and of its part of the embedding
    /// table, which another stage may hold too (8).
    #[must_use]
    pub fn fingerprint(&self, config: &Config, parts: &[Part]) -> [u8; 32] {
        if parts.len() == config.parameters().len() && parts.iter().all(Part::is_whole) {
            return *self.parameter_hash(config).as_bytes();
        }
        let of = |wanted: &dyn Fn(&Part) -> bool| {
            let mut hasher = Hasher::default();
            self.weights.iter().zip(parts).filter(|(_, part)| wanted(part)).for_each(|(values, _)| hasher.add(values));
            *hasher.finish().as_bytes()
        };
        let mut all = of(&|_| true);
        all[16..24].copy_from_slice(&of(&|part| part.is_whole() && !is_table(&part.whole.name))[..8]);
        all[24..].copy_from_slice(&of(&|part| is_table(&part.whole.name))[..8]);
        all
    }

    /// Copies everything into a snapshot whose tensors are those of [`specs`], and, where something was owed when this
    /// process began, of [`owner_specs`].
    pub fn snapshot(&self, snapshot: &mut Snapshot<'_>, config: &Config, owed: &Owed) {
        let mut next = 0;
        for values in self.tensors() {
            snapshot.tensor(next).copy_from_slice(values);
            next += 1;
        }
        let lossy = config.parameters().into_iter().enumerate().filter(|(_, parameter)| may_be_lossy(parameter));
        for (index, _) in lossy.filter(|_| owed.has_place()) {
            put(snapshot.tensor(next), owed.of(index));
            next += 1;
        }
    }

    /// What a rank keeps of its parts that a checkpoint holds, which says `meta` of itself. `has` says whether it has a tensor, and
    /// `load` reads what is wanted: as [`Checkpoint::load`], [`Checkpoint::load_and_verify`] where nobody has verified it
    /// yet, or [`Folders::load`](folders::Folders::load) where it is in several folders.
    ///
    /// # Errors
    /// A tensor that is missing, damaged, or of another shape.
    pub fn load<E>(
        (meta, parts, sharding): (&Meta, &[Part], Sharding),
        has: impl Fn(&str) -> bool,
        load: impl FnOnce(&mut [Want<'_>]) -> std::result::Result<(), E>,
    ) -> std::result::Result<Self, E> {
        let state = Self::fresh(parts.iter().map(|part| vec![0.0; part.region.len()]).collect());
        let mut state = state.sharded(parts.iter().map(|part| &part.whole), sharding);
        (state.step, state.updates, state.skips, state.good_step) =
            (meta.step, meta.updates, meta.skips, meta.good_step);
        let names = sharding::names(has, parts, sharding);
        load(&mut sharding::wants(parts, &names, &mut state))?;
        Ok(state)
    }

    /// Copies this rank's share of everything, and what it left out of gradients and sums, into a snapshot whose pieces
    /// are those of [`pieces`]. `folded` is its shard of everything, where that is kept.
    pub fn snapshot_share(&self, snapshot: &mut Snapshot<'_>, share: &Share, exchange: &Exchange, folded: &[Vec<f32>]) {
        let mut next = sharding::put(self, snapshot, share);
        let of_lossy = share.own.iter().filter(|own| own.may_be_lossy());
        for (values, _) in folded.iter().zip(of_lossy).filter(|(_, own)| own.part.counts) {
            snapshot.tensor(next).copy_from_slice(values);
            next += 1;
        }
        let exact = share.kept == Kept::Exact;
        for (index, _) in share.own.iter().enumerate().filter(|(_, own)| exact && own.leaves_out()) {
            for side in sides(share.data, share.replicas) {
                exchange.copy_residual(index, side, 0, snapshot.tensor(next));
                next += 1;
            }
        }
    }

    fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        self.weights.iter().chain(&self.m).chain(&self.v).map(Vec::as_slice)
    }
}

/// BLAKE3 of f32 numbers.
#[derive(Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Adds these, little-endian.
    pub fn add(&mut self, values: &[f32]) {
        #[cfg(target_endian = "little")]
        self.0.update_rayon(bytemuck::cast_slice(values));
        #[cfg(target_endian = "big")]
        values.iter().for_each(|value| _ = self.0.update(&value.to_le_bytes()));
    }

    /// Of all that was added.
    #[must_use]
    pub fn finish(&self) -> blake3::Hash {
        self.0.finalize()
    }
}

/// BLAKE3 of all parameters, of which `add` adds one after the other, in the order of their names.
///
/// # Errors
/// Those of `add`.
pub fn hash_of(config: &Config, mut add: impl FnMut(usize, &mut Hasher) -> Result<()>) -> Result<blake3::Hash> {
    let parameters = config.parameters();
    let mut order: Vec<usize> = (0..parameters.len()).collect();
    order.sort_by(|&a, &b| parameters[a].name.cmp(&parameters[b].name));
    let mut hasher = Hasher::default();
    order.into_iter().try_for_each(|index| add(index, &mut hasher))?;
    Ok(hasher.finish())
}

/// What was left out, or zeros for nothing.
fn put(tensor: &mut [f32], values: Option<&[f32]>) {
    match values {
        Some(values) => tensor.copy_from_slice(values),
        None => tensor.fill(0.0),
    }
}

/// The tensors of a checkpoint: parameters (`NAME`), then both moments (`NAME.m`, `NAME.v`).
#[must_use]
pub fn specs(config: &Config) -> Vec<TensorSpec> {
    named(&config.parameters().iter().collect::<Vec<_>>())
}

fn named(parameters: &[&Parameter]) -> Vec<TensorSpec> {
    let spec = |suffix: &str, parameter: &Parameter| {
        let Parameter { name, shape } = parameter;
        TensorSpec { name: format!("{name}{suffix}"), shape: shape.clone() }
    };
    ["", ".m", ".v"].iter().flat_map(|suffix| parameters.iter().map(move |one| spec(suffix, one))).collect()
}

/// The tensors in which one rank alone keeps what several had left out (`NAME.owner`).
#[must_use]
pub fn owner_specs(config: &Config) -> Vec<TensorSpec> {
    let lossy = config.parameters().into_iter().filter(may_be_lossy);
    lossy.map(|parameter| TensorSpec { name: owner_name(&parameter.name), shape: parameter.shape }).collect()
}

/// What a checkpoint says of how gradients travelled. Older versions did not say it; what they left out
/// is there unless their recipe, which is in the checkpoint, let everything travel as it is.
///
/// # Errors
/// The checkpoint was not written by this trainer.
pub fn held(checkpoint: &Checkpoint) -> Result<Held> {
    let meta = meta(checkpoint)?;
    if let Some(Travelled { codec, residuals, folded, chosen }) = meta.compression {
        let sent = codec == Codec::Fp32 && meta.good_step == meta.step;
        return Ok(Held { residuals, folded, chosen, sent });
    }
    let recipe = checkpoint.attachment("recipe.toml")?;
    let (raw, _) = raw::read(&String::from_utf8_lossy(&recipe), &[]);
    let keys = Reader(&raw);
    let several = keys.count("parallel.data").is_some_and(|ranks| ranks > 1);
    let residuals = several && keys.text("compression.codec").is_some_and(|codec| codec != Codec::Fp32.name());
    Ok(Held { residuals, folded: false, chosen: None, sent: false })
}

/// What a checkpoint says of its run.
///
/// # Errors
/// It was not written by this trainer, or its tensors are not of the model that it names.
pub fn meta(checkpoint: &Checkpoint) -> Result<Meta> {
    let meta: Meta = serde_json::from_value(checkpoint.state().clone()).map_err(|error| Error::Text {
        path: checkpoint.path().join("manifest.json").display().to_string(),
        what: format!("expected the state of a training run: {error}"),
    })?;
    let sound = meta.model.check().and_then(|()| compare(&meta, checkpoint.manifest()));
    sound.map_err(|what| Error::Text { path: checkpoint.path().display().to_string(), what })?;
    Ok(meta)
}

/// Compares the model that a checkpoint names with its tensors. A right hash only says that somebody meant it: before this
/// nothing may be as long as the model.
fn compare(meta: &Meta, manifest: &Manifest) -> std::result::Result<(), String> {
    let (model, count) = (&meta.model, manifest.tensors.len());
    // A machine with a folder of its own has the tensors of some stages there, and of others none.
    let has_stages = meta.mesh.as_ref().is_some_and(|mesh| mesh.pipeline > 1);
    let (most, layers) = (if has_stages { LAYERS_MAX } else { count }, model.num_hidden_layers);
    if layers > most {
        return Err(format!("expected num_hidden_layers of at most {most} with {count} tensors, found {layers}"));
    }
    for Parameter { name, shape } in model.each_parameter() {
        match manifest.tensors.get(&name).map(|tensor| &tensor.shape) {
            Some(found) if *found == shape => {}
            None if has_stages => {}
            found => {
                let found = found.map_or("no such tensor".to_owned(), |found| format!("{found:?}"));
                return Err(format!("{name}: expected {shape:?}, as of the model in its state, found {found}"));
            }
        }
    }
    Ok(())
}

/// Files that travel inside every checkpoint.
#[must_use]
pub fn attachments(tokenizer_json: Arc<[u8]>, recipe_toml: &str) -> Vec<checkpoint::writer::Attachment> {
    let attachment = |name: &str, bytes| checkpoint::writer::Attachment { name: name.into(), bytes };
    vec![attachment("tokenizer.json", tokenizer_json), attachment("recipe.toml", recipe_toml.as_bytes().into())]
}
