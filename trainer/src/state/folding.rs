//! What all ranks have left out, added up for a checkpoint that keeps it once.
//!
//! A sender's part lies on its rank for the whole tensor, and what is stored is an owner's shard: so each rank sends every
//! other that one's shard of what it left out, as f32, which is what a reduction of the gradient without a codec sends. The
//! run itself goes on with what it has, so that its bits do not depend on when it was stored.

use compression::Side;
use parallel::collective::SubGroup;
use parallel::data::exchange::Exchange;
use parallel::data::rules::may_be_lossy;
use parallel::data::shard::shard;

use super::residuals::{added_up, inside, site};
use crate::error::Result;

/// Elements that a rank sends another at once, so that little waits beside the tensor itself.
const PART: usize = 4 << 20;

/// This rank's shard of what all sides left out, of every tensor that may travel in a lossy codec, in their order. `all` are the
/// ranks that sum their gradients; they call it between the same steps. Memory: what is returned, and of one tensor a part from each rank.
///
/// # Errors
/// A rank is lost.
pub fn fold(all: &SubGroup, exchange: &Exchange) -> Result<Vec<Vec<f32>>> {
    let (group, plan) = (exchange.group(), exchange.plan());
    let parts = plan.parameters().iter().zip(plan.parts()).enumerate();
    let lossy = parts.filter(|(_, (_, part))| may_be_lossy(&part.whole));
    lossy
        .map(|(index, (parameter, _))| {
            let shards: Vec<_> = (0..group.ranks).map(|rank| shard(parameter.elements(), rank, group.ranks)).collect();
            let longest = shards.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
            let own = shards[group.rank].clone();
            let mut folded = vec![0.0; own.len()];
            exchange.copy_residual(index, Side::Owner, 0, &mut folded);
            for start in (0..longest).step_by(PART) {
                let block = PART.min(longest - start);
                // Shards differ by a block of the codec; the shorter ones are filled up with zeros, and these not taken.
                let of = |rank: usize| {
                    let shard = &shards[rank];
                    (shard.start + start).min(shard.end)..(shard.start + start + block).min(shard.end)
                };
                let (mut gives, mut takes) = (vec![0.0; block * group.ranks], vec![0.0; block * group.ranks]);
                for (rank, place) in gives.chunks_mut(block).enumerate() {
                    let (of, side) = (of(rank), Side::Sender { rank: group.rank });
                    exchange.copy_residual(index, side, of.start, &mut place[..of.len()]);
                }
                all.all_to_all(&site("checkpoint", &parameter.name), &gives, &mut takes)?;
                let here = of(group.rank);
                let place = &mut folded[here.start - own.start..here.end - own.start];
                let owner = inside(&here, Side::Owner, &here, place.to_vec());
                let senders = takes
                    .chunks(block)
                    .enumerate()
                    .map(|(rank, values)| inside(&here, Side::Sender { rank }, &here, values[..here.len()].to_vec()));
                let kept: Vec<_> = [owner].into_iter().chain(senders).collect();
                place.copy_from_slice(&added_up(here.len(), &kept));
            }
            Ok(folded)
        })
        .collect()
}
