//! What a recipe would take, before anything is run: memory of every rank, bytes of a step, size of a checkpoint.
//!
//! Everything is computed from shapes. No device is opened and nobody is talked to; `docs/plan.md` says what each number
//! is and how near it was to what runs take.
//!
//! - [`part`]: which part of the model a rank has on a mesh.
//! - [`memory`]: what it takes there; [`activations`]: what of it is kept for the backward pass.
//! - [`traffic`]: bytes on every axis.
//! - [`calibrate`]: what this machine takes for real steps.
//! - [`time`]: how long a step takes, from given figures.
//! - [`search`]: the meshes of so many ranks.

pub mod activations;
pub mod calibrate;
pub mod memory;
pub mod part;
pub mod search;
pub mod time;
pub mod traffic;

use compression::Codec;
use parallel::data::rules::{codec_of, may_be_lossy};
use parallel::mesh::{Axis, Mesh};
use parallel::pipeline::{Kind, Pipeline, PipelineError};

use crate::cut::pieces;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::recipe::Recipe;
use crate::recipe::resolved::{CodecChoice, Residuals};
use crate::state::residuals::Kept;

use memory::Memory;
use part::Part;
use time::{Figures, Time};
use traffic::Sent;

/// How a recipe is to be cut, beyond what it says itself.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Ranks on every axis.
    pub mesh: Mesh,
    /// In which order a pipeline works.
    pub schedule: Kind,
    /// Pieces of each of its ranks.
    pub virtual_stages: usize,
    /// Where the owner of a shard alone keeps its moments: what parameters travel in.
    pub sharded: Option<Codec>,
}

/// What one rank takes.
#[derive(Clone, Debug, PartialEq)]
pub struct RankPlan {
    /// Its memory while it trains, at the peak.
    pub memory: Memory,
    /// What it sends in a step.
    pub sent: Sent,
}

/// What a run takes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its ranks.
    pub mesh: Mesh,
    /// Layers of every piece of the pipeline.
    pub layers: Vec<usize>,
    /// Parameters of the model.
    pub parameters: usize,
    /// Sequences and tokens of a step, of all ranks.
    pub sequences: usize,
    /// Tokens of a step, of all ranks.
    pub tokens: usize,
    /// What most gradients travel in; `None` where nothing travels.
    pub codec: Option<Codec>,
    /// Rank by rank.
    pub ranks: Vec<RankPlan>,
    /// Bytes of a checkpoint's tensors, in all files.
    pub checkpoint_bytes: usize,
    /// The time in which a stage does nothing, in parts of the time in which it computes.
    pub bubble: f64,
    /// Floating-point operations of a step, of all ranks.
    pub flops: f64,
    /// How long a step takes, where figures were given.
    pub time: Option<Time>,
}

impl Plan {
    /// Plans a run of this recipe, whose model has this shape.
    ///
    /// # Errors
    /// The mesh does not fit the model or the pipeline does not fit the micro-batches.
    pub fn new(recipe: &Recipe, config: &Config, shape: Shape, figures: Option<&Figures>) -> Result<Self> {
        let Shape { mesh, schedule, virtual_stages, sharded } = shape;
        let wanted = parallel::mesh::Shape {
            heads: config.num_attention_heads,
            key_value_heads: config.num_key_value_heads,
            layers: config.num_hidden_layers,
            vocabulary: config.vocab_size,
            feed_forward: config.intermediate_size,
            sequence: None,
        };
        mesh.check(mesh.ranks(), &wanted, virtual_stages).map_err(|faults| usage(&faults.to_string()))?;
        let keys = &recipe.parallel;
        let most = keys.micro_batches.iter().copied().max().unwrap_or(1);
        let pipeline = Pipeline::new(schedule, mesh.size(Axis::Pipeline), virtual_stages, most);
        let pipeline = pipeline.map_err(|error: PipelineError| usage(&error.to_string()))?;
        let given = keys.layers.as_deref().filter(|_| keys.pipeline * keys.virtual_stages == pipeline.pieces());
        let pieces = pieces(config, recipe.train.seq_len, pipeline.pieces(), given);
        let pieces = pieces.map_err(|error| usage(&error.to_string()))?;
        let parts: Vec<Part> = (0..mesh.ranks()).map(|rank| Part::new(config, mesh, pipeline, &pieces, rank)).collect();
        let sequences = keys.micro_batches.iter().sum::<usize>() * recipe.train.micro_batch_size;
        let codec = codec(recipe, mesh);
        let sharded = sharded.map(|codec| if is_one_machine(recipe, mesh) { Codec::Fp32 } else { codec });
        let ranks: Vec<RankPlan> = parts
            .iter()
            .map(|part| RankPlan {
                memory: Memory::of(recipe, part, codec, sharded),
                sent: Sent::of(recipe, part, codec, sharded),
            })
            .collect();
        let tokens = sequences * recipe.train.seq_len;
        let flops = time::flops(config, recipe.train.seq_len) * tokens as f64;
        let mut plan = Self {
            mesh,
            layers: pieces.iter().map(ExactSizeIterator::len).collect(),
            parameters: config.parameter_count(),
            sequences,
            tokens,
            codec,
            checkpoint_bytes: checkpoint_bytes(recipe, config, mesh, sharded),
            ranks,
            bubble: pipeline.bubble(),
            flops,
            time: None,
        };
        plan.time = figures.map(|figures| Time::of(&plan, recipe, &parts, figures));
        Ok(plan)
    }

    /// The memory of the rank that takes most.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.memory.peak_bytes()).max().unwrap_or(0)
    }

    /// Why it cannot be run where every rank has so much memory; `None` where it can.
    #[must_use]
    pub fn too_large(&self, memory_bytes: usize) -> Option<String> {
        let (rank, most) = self.ranks.iter().enumerate().max_by_key(|(_, rank)| rank.memory.peak_bytes())?;
        let peak = most.memory.peak_bytes();
        if peak <= memory_bytes {
            return None;
        }
        let (name, bytes) = most.memory.terms().into_iter().max_by_key(|(_, bytes)| *bytes)?;
        Some(format!(
            "it does not fit: rank {rank} would take {peak} bytes at the peak, expected at most {memory_bytes}; \
             {name} are the most of it, {bytes} bytes"
        ))
    }
}

fn usage(what: &str) -> Error {
    Error::Usage(format!("plan: {}", what.replace('\n', "\nplan: ")))
}

/// What most gradients travel in after a warm-up. `auto` begins with `int8`.
fn codec(recipe: &Recipe, mesh: Mesh) -> Option<Codec> {
    if mesh.size(Axis::Data) == 1 {
        return None;
    }
    Some(match recipe.compression.codec {
        _ if is_one_machine(recipe, mesh) => Codec::Fp32,
        CodecChoice::Auto => Codec::Int8,
        CodecChoice::Fixed(codec) => codec,
    })
}

/// Whether all replicas are on one machine, as the recipe has it: inside it everything travels as it is.
fn is_one_machine(recipe: &Recipe, mesh: Mesh) -> bool {
    let group = recipe.parallel.group;
    group > 1 && group == mesh.size(Axis::Data)
}

/// What checkpoints keep of what was left out.
fn kept(recipe: &Recipe, data: usize) -> Kept {
    match (recipe.compression.codec, recipe.checkpoint.residuals) {
        (CodecChoice::Fixed(Codec::Fp32), _) => Kept::Nothing,
        // Inside one machine nothing is left out.
        _ if data == 1 || recipe.parallel.group == data => Kept::Nothing,
        (_, Residuals::Folded) => Kept::Folded,
        (_, Residuals::Exact) => Kept::Exact,
    }
}

/// The bytes of the tensors in a checkpoint of this recipe's run.
#[must_use]
pub fn checkpoint_bytes_of(recipe: &Recipe, config: &Config) -> usize {
    checkpoint_bytes(recipe, config, recipe.parallel.mesh(), recipe.optimizer.sharded)
}

/// Parameters and both moments once, replicas that are not the masters, and what ranks left out.
fn checkpoint_bytes(recipe: &Recipe, config: &Config, mesh: Mesh, sharded: Option<Codec>) -> usize {
    let lossy: usize = config.parameters().iter().filter(|p| may_be_lossy(p)).map(|p| p.elements()).sum();
    let data = mesh.size(Axis::Data);
    let residuals = match kept(recipe, data) {
        Kept::Nothing => 0,
        Kept::Folded => lossy,
        // Every sender all of it, and the owners together all of it once more.
        Kept::Exact => lossy * (data + 1),
    };
    let differs = |p: &&parallel::data::Parameter| sharded.is_some_and(|sent| codec_of(p, sent).is_lossy());
    let replicas: usize =
        if data > 1 { config.parameters().iter().filter(differs).map(|p| p.elements()).sum() } else { 0 };
    size_of::<f32>() * (3 * config.parameter_count() + replicas + residuals)
}

/// Whether something of a parameter that travels in this codec is left out, at the sender and at the owner of its sum.
fn is_lossy(parameter: &parallel::data::Parameter, codec: Option<Codec>) -> [bool; 2] {
    let codec = codec.map(|codec| codec_of(parameter, codec));
    [codec.is_some_and(Codec::is_lossy), codec.is_some_and(|codec| codec.second_stage().is_lossy())]
}

#[cfg(test)]
mod tests;
