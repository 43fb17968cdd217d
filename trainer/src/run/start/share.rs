//! What of a checkpoint is a rank's to write, and what of a gradient to send.

use compression::Codec;
use parallel::data::Part;
use parallel::data::plan::{Parameter, Plan};
use parallel::data::shard::{payload_bytes_sent, shard};
use parallel::mesh::Axis;

use crate::cut::Cut;
use crate::error::Result;
use crate::model::Config;
use crate::recipe::Recipe;
use crate::recipe::resolved::{CodecChoice, Residuals};
use crate::run::join::Met;
use crate::state::residuals::Kept;
use crate::state::sharding::Sharding;
use crate::state::share::Own;
use crate::state::{Held, Share};

/// Which part of a checkpoint this rank writes. `held` is what the checkpoint that it goes on from has.
///
/// # Errors
/// A model whose parameters do not fit the address space.
pub fn share(
    (met, config): (&Met, &Config),
    (cut, rank, sharding): (&Cut, usize, Sharding),
    codec: CodecChoice,
    (residuals, held): (Residuals, Held),
) -> Result<Share> {
    let axes = cut.mesh();
    let (ranks, replicas) = (axes.ranks(), axes.size(Axis::Data));
    let mates: Vec<usize> = (0..ranks).filter(|&other| met.lead_of[other] == met.lead_of[rank]).collect();
    // All replicas are cut alike.
    let replica = axes.replica(0);
    let all: Vec<Vec<Part>> = replica.clone().map(|rank| cut.parts(config, rank)).collect::<Result<_>>()?;
    let of = |rank: usize| &all[rank % replica.len()];
    let own = |part: &Part| {
        let holds = |&mate: &usize| {
            of(mate).iter().any(|other| other.whole.name == part.whole.name && other.region == part.region)
        };
        let holders: Vec<usize> = mates.iter().copied().filter(holds).collect();
        let place = holders.iter().position(|&holder| holder == rank).unwrap_or(0);
        Own { part: part.clone(), range: shard(part.region.len(), place, holders.len()) }
    };
    let own = of(rank).iter().map(own).collect();
    // What a checkpoint kept is sent with the first step that counts; until then it has to be kept on.
    let kept = match held.has_unsent() || (replicas > 1 && codec != CodecChoice::Fixed(Codec::Fp32)) {
        false => Kept::Nothing,
        // One replica has no sum to take.
        true if residuals == Residuals::Folded && replicas > 1 => Kept::Folded,
        true => Kept::Exact,
    };
    Ok(Share { rank, ranks, data: axes.coordinates(rank).on(Axis::Data), replicas, own, kept, sharding })
}

/// What this rank, one of so many that sum gradients, keeps of the optimiser's state.
pub fn sharding(recipe: &Recipe, data: usize, replicas: usize) -> Sharding {
    match recipe.optimizer.sharded {
        // Inside a machine everything travels as it is.
        Some(_) if recipe.parallel.group == replicas => Sharding::of(data, replicas, Codec::Fp32),
        Some(codec) => Sharding::of(data, replicas, codec),
        None => Sharding::NONE,
    }
}

/// Bytes that one of so many replicas would send a step if everything travelled as f32.
pub fn f32_bytes(plan: &Plan, rank: usize, ranks: usize) -> u64 {
    let elements = |parameter: &Parameter| parameter.shape.iter().product();
    let tensors: Vec<_> = plan.parameters().iter().map(|parameter| (elements(parameter), Codec::Fp32)).collect();
    payload_bytes_sent(&tensors, rank, ranks) as u64
}
