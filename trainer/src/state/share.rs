//! Which part of a checkpoint a rank writes: of every tensor its share of what it holds, and what it left out of gradients.

use std::ops::Range;

use checkpoint::writer::PieceSpec;
use compression::Side;
use parallel::data::Part;
use parallel::data::rules::may_be_lossy;
use parallel::data::shard::shard;

use super::residuals::{Kept, folded_name, owner_name, sender_name, sides};
use super::sharding::{self, Sharding};

/// Which part of a checkpoint a rank writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its rank in the run.
    pub rank: usize,
    /// Ranks of the run.
    pub ranks: usize,
    /// Its place among the ranks that sum gradients with it.
    pub data: usize,
    /// How many these are.
    pub replicas: usize,
    /// Of every parameter what is its own.
    pub own: Vec<Own>,
    /// What it writes of what was left out.
    pub kept: Kept,
    /// What it keeps of the optimiser's state.
    pub sharding: Sharding,
}

/// What a rank writes of one parameter, and of its moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// What it holds.
    pub part: Part,
    /// The elements of that which it writes; those that hold the same and see the same folder write the others.
    pub range: Range<usize>,
}

impl Own {
    /// Whether something of the parameter may be left out of gradients.
    pub(super) fn may_be_lossy(&self) -> bool {
        may_be_lossy(&self.part.whole)
    }

    /// The same, and this rank is the one to write it: whoever holds the same part has left out the same.
    pub(super) fn leaves_out(&self) -> bool {
        self.part.counts && self.may_be_lossy()
    }
}

/// The pieces that a rank of several writes: its share of [`specs`](super::specs) (with a sharded optimiser what it
/// owns, and its share of replicas that are no masters), and of every tensor that may travel in a
/// lossy codec what it left out as a sender (`NAME.sender.0001`, all that it holds) and as an owner (`NAME.owner`, its
/// shard). They are the same whatever codec is in force, so that it may change.
#[must_use]
pub fn pieces(share: &Share) -> Vec<PieceSpec> {
    let mut pieces = sharding::pieces(share);
    for Own { part, .. } in share.own.iter().filter(|own| share.kept != Kept::Nothing && own.leaves_out()) {
        let (name, shape) = (&part.whole.name, &part.whole.shape);
        let shard = part.region.part(shard(part.region.len(), share.data, share.replicas));
        let piece = |tensor, region| PieceSpec { tensor, shape: shape.clone(), region };
        if share.kept == Kept::Folded {
            pieces.push(piece(folded_name(name), shard));
            continue;
        }
        pieces.extend(sides(share.data, share.replicas).map(|side| match side {
            Side::Sender { rank } => piece(sender_name(name, rank), part.region.clone()),
            Side::Owner => piece(owner_name(name), shard.clone()),
        }));
    }
    pieces
}
