//! What of a checkpoint is a rank's to write, and what of a gradient to send.

use compression::Codec;
use parallel::data::plan::{Parameter, Plan};
use parallel::data::shard::payload_bytes_sent;

use crate::recipe::Recipe;
use crate::recipe::resolved::{CodecChoice, Residuals};
use crate::run::join::Met;
use crate::state::residuals::Kept;
use crate::state::sharding::Sharding;
use crate::state::{Held, Share};

/// Which part of a checkpoint this rank writes. `held` is what the checkpoint that it goes on from has.
pub fn share(
    met: &Met,
    codec: CodecChoice,
    (residuals, held): (Residuals, Held),
    (rank, sharding): (usize, Sharding),
) -> Share {
    let ranks = met.lead_of.len();
    let mates: Vec<usize> = (0..ranks).filter(|&other| met.lead_of[other] == met.lead_of[rank]).collect();
    let index = mates.iter().position(|&mate| mate == rank).unwrap_or(0);
    // What a checkpoint kept is sent with the first step that counts; until then it has to be kept on.
    let kept = match held.has_unsent() || (ranks > 1 && codec != CodecChoice::Fixed(Codec::Fp32)) {
        false => Kept::Nothing,
        // One rank has no sum to take.
        true if residuals == Residuals::Folded && ranks > 1 => Kept::Folded,
        true => Kept::Exact,
    };
    Share { rank, ranks, index, of: mates.len(), kept, sharding }
}

/// What this rank keeps of the optimiser's state.
pub fn sharding(recipe: &Recipe, rank: usize, ranks: usize) -> Sharding {
    match recipe.optimizer.sharded {
        // Inside a machine everything travels as it is.
        Some(_) if recipe.parallel.group == ranks => Sharding::of(rank, ranks, Codec::Fp32),
        Some(codec) => Sharding::of(rank, ranks, codec),
        None => Sharding::NONE,
    }
}

/// Bytes that a rank would send a step if everything travelled as f32.
pub fn f32_bytes(plan: &Plan, share: &Share) -> u64 {
    let elements = |parameter: &Parameter| parameter.shape.iter().product();
    let tensors: Vec<_> = plan.parameters().iter().map(|parameter| (elements(parameter), Codec::Fp32)).collect();
    payload_bytes_sent(&tensors, share.rank, share.ranks) as u64
}
