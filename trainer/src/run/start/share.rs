//! What of a checkpoint is a rank's to write, and what of a gradient to send.

use compression::{Codec, Workers};
use parallel::data::plan::{Parameter, Plan};
use parallel::data::shard::payload_bytes_sent;

use crate::device;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::recipe::resolved::{CodecChoice, Residuals};
use crate::run::join::Met;
use crate::state::residuals::Kept;
use crate::state::{Held, Share};

/// Which part of a checkpoint this rank writes. `held` is what the checkpoint that it goes on from has.
pub fn share(met: &Met, rank: usize, codec: CodecChoice, (residuals, held): (Residuals, Held)) -> Share {
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
    Share { rank, ranks, index, of: mates.len(), kept }
}

/// Bytes that a rank would send a step if everything travelled as f32.
pub fn f32_bytes(plan: &Plan, share: &Share) -> u64 {
    let elements = |parameter: &Parameter| parameter.shape.iter().product();
    let tensors: Vec<_> = plan.parameters().iter().map(|parameter| (elements(parameter), Codec::Fp32)).collect();
    payload_bytes_sent(&tensors, share.rank, share.ranks) as u64
}

/// The threads that encode. Beside a processor that computes, more than one would only take its cores away.
///
/// # Errors
/// The system refuses them.
pub fn workers(recipe: &Recipe) -> Result<Workers> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match (recipe.compression.threads, device::is_host(&recipe.device.backend)) {
        (0, true) => 1,
        (0, false) => cores.min(4),
        (threads, _) => threads,
    };
    Workers::new(threads).map_err(|error| Error::Usage(format!("compression.threads = {threads}: {error}")))
}
