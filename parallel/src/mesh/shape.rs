//! What of a model is cut, and how.
//!
//! | | cut |
//! | --- | --- |
//! | query heads | evenly: a head is the smallest part of attention, and an uneven one makes all wait for the largest |
//! | key and value heads | evenly; where there are fewer than ranks, each is on as many ranks as its query heads are |
//! | feed-forward width, vocabulary | contiguous, sizes differing by one at the most ([`cut`]): nothing that travels has the size of a part, for an all-reduce sums whole activations, so nothing has to be padded |
//! | a sequence, where sequence parallelism is on | evenly, for an all-gather takes as much of each rank |
//! | layers | by their costs; a stage has at least one |

use std::ops::Range;

use super::fault::MeshFault;
use super::{Axis, Mesh};

/// What a mesh asks of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Tokens of a sequence, where sequence parallelism cuts it.
    pub sequence: Option<usize>,
}

/// Everything that keeps the model from this mesh.
pub(super) fn faults(mesh: Mesh, model: &Shape, virtual_stages: usize) -> Vec<MeshFault> {
    let (tensor, stages) = (mesh.size(Axis::Tensor), mesh.size(Axis::Pipeline));
    let &Shape { heads, key_value_heads, layers, vocabulary, feed_forward, sequence } = model;
    let mut faults = Vec::new();
    let mut check = |holds: bool, fault: MeshFault| {
        if !holds {
            faults.push(fault);
        }
    };
    let divides = |parts: usize, whole: usize| whole != 0 && whole.is_multiple_of(parts);
    check(divides(tensor, heads), MeshFault::Heads { heads, tensor });
    let shares = divides(tensor, key_value_heads) || (key_value_heads != 0 && divides(key_value_heads, tensor));
    check(shares, MeshFault::KeyValueHeads { heads: key_value_heads, tensor });
    let interleaves = virtual_stages == 1 || (virtual_stages > 1 && stages > 1);
    check(interleaves, MeshFault::VirtualStages { stages, virtual_stages });
    let pieces = stages.saturating_mul(virtual_stages);
    check(layers >= pieces, MeshFault::Layers { layers, stages, virtual_stages });
    check(vocabulary >= tensor, MeshFault::Vocabulary { vocabulary, tensor });
    check(feed_forward >= tensor, MeshFault::FeedForward { feed_forward, tensor });
    if let Some(sequence) = sequence {
        check(divides(tensor, sequence), MeshFault::Sequence { sequence, tensor });
    }
    faults
}

/// The part of `whole` things that `rank` of `ranks` has: contiguous, in rank order, sizes differing by one at the most.
///
/// # Panics
/// When `rank` is not below `ranks`.
#[must_use]
pub fn cut(whole: usize, rank: usize, ranks: usize) -> Range<usize> {
    assert!(rank < ranks, "rank {rank} of {ranks}");
    whole * rank / ranks..whole * (rank + 1) / ranks
}

/// The key and value heads that `rank` of `ranks` tensor ranks has: those that its query heads look at.
///
/// # Panics
/// When `rank` is not below `ranks`, or there is no head. What [`Mesh::check`] refuses is not asked for here.
#[must_use]
pub fn key_value_heads(heads: usize, rank: usize, ranks: usize) -> Range<usize> {
    assert!(heads > 0, "a model without key and value heads");
    let own = cut(heads, rank, ranks);
    own.start..own.end.max(own.start + 1)
}

/// How many of `ranks` tensor ranks have each key and value head.
///
/// # Panics
/// When there is no head.
#[must_use]
pub const fn replicas(heads: usize, ranks: usize) -> usize {
    assert!(heads > 0, "a model without key and value heads");
    if heads < ranks { ranks / heads } else { 1 }
}
