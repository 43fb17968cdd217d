//! What a rank keeps of the optimiser's state: all of it, or with a sharded optimiser what it owns (Rajbhandari et al. 2020,
//! <https://arxiv.org/abs/1910.02054>).
//!
//! Of every parameter each rank owns a shard, the one whose gradients it adds. With a sharded optimiser it keeps moments
//! of that alone: 8 bytes for each element that it owns. The parameters that it computes with are its replica, of the whole
//! model. Where parameters travel as they are, the replica is the master too; where they travel as `int8` the owner keeps
//! its shard as it is beside the replica, 4 bytes more for each element that it owns.
//!
//! In a checkpoint `NAME` is the master, and `NAME.replica` the replica where both differ.

use std::ops::Range;

use checkpoint::CheckpointError;
use checkpoint::reader::{Checkpoint, Want};
use checkpoint::writer::{PieceSpec, Snapshot};
use compression::Codec;
use parallel::collective::SubGroup;
use parallel::data::Parameter;
use parallel::data::rules::codec_of;
use parallel::data::shard::shard;

use super::residuals::{parts, site};
use super::{Share, State};
use crate::error::Result;

/// What one rank keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharding {
    rank: usize,
    ranks: usize,
    codec: Codec,
}

impl Sharding {
    /// Every rank keeps all of it.
    pub const NONE: Self = Self { rank: 0, ranks: 1, codec: Codec::Fp32 };

    /// Each of `ranks` keeps what it owns, and parameters travel in this codec. One rank owns everything.
    #[must_use]
    pub const fn of(rank: usize, ranks: usize, codec: Codec) -> Self {
        Self { rank, ranks, codec }
    }

    /// Whether other ranks keep something that this one does not.
    #[must_use]
    pub const fn is_on(self) -> bool {
        self.ranks > 1
    }

    /// Of a parameter with so many elements, those that this rank keeps moments of.
    #[must_use]
    pub fn owned(self, elements: usize) -> Range<usize> {
        shard(elements, self.rank, self.ranks)
    }

    /// Whether owners keep a master of this parameter that is not their replica.
    #[must_use]
    pub fn has_master(self, parameter: &Parameter) -> bool {
        self.is_on() && codec_of(parameter, self.codec).is_lossy()
    }

    /// What a rank stores of moments: with others it owns each element once; else all have the same, and share the writing.
    fn stored(self, elements: usize, share: &Share) -> Range<usize> {
        if self.is_on() { self.owned(elements) } else { shard(elements, share.index, share.of) }
    }
}

/// The tensor in which a replica lies that is not the master.
#[must_use]
pub fn replica_name(parameter: &str) -> String {
    format!("{parameter}.replica")
}

impl State {
    /// What a rank keeps of a state whose optimiser has seen nothing.
    #[must_use]
    pub fn sharded(mut self, parameters: &[Parameter], sharding: Sharding) -> Self {
        if sharding.is_on() {
            for moments in self.m.iter_mut().chain(&mut self.v) {
                *moments = vec![0.0; sharding.owned(moments.len()).len()];
            }
        }
        for ((parameter, master), weights) in parameters.iter().zip(&mut self.masters).zip(&self.weights) {
            *master = match sharding.has_master(parameter) {
                true => weights[sharding.owned(weights.len())].to_vec(),
                false => Vec::new(),
            };
        }
        Self { sharding, ..self }
    }

    /// This rank's shard of a parameter, as it is.
    #[must_use]
    pub fn master(&self, index: usize) -> &[f32] {
        match self.masters[index].is_empty() {
            true => &self.weights[index][self.sharding.owned(self.weights[index].len())],
            false => &self.masters[index],
        }
    }

    /// Bytes of moments and masters, which a sharded optimiser divides by the ranks.
    #[must_use]
    pub fn optimizer_bytes(&self) -> usize {
        let elements = self.m.iter().chain(&self.v).chain(&self.masters).map(Vec::len);
        size_of::<f32>() * elements.sum::<usize>()
    }
}

/// Reads parameters and moments into a state that has their places. Any rank may have written any part of them, with a
/// sharded optimiser or without.
///
/// # Errors
/// A tensor that is missing, damaged, or of another shape.
pub(super) fn load(
    checkpoint: &Checkpoint,
    parameters: &[Parameter],
    state: &mut State,
) -> std::result::Result<(), CheckpointError> {
    let named = |suffix: &str| parameters.iter().map(|p| format!("{}{suffix}", p.name)).collect::<Vec<_>>();
    let (first, second) = (named(".m"), named(".v"));
    let replicas: Vec<String> = (parameters.iter())
        .map(|parameter| {
            let replica = replica_name(&parameter.name);
            let is_there = state.sharding.has_master(parameter) && checkpoint.has(&replica);
            if is_there { replica } else { parameter.name.clone() }
        })
        .collect();
    let State { weights, m, v, masters, sharding, .. } = state;
    let mut wants = Vec::new();
    let each = parameters.iter().zip(weights).zip(masters).zip(m).zip(v).enumerate();
    for (index, ((((parameter, weights), master), m), v)) in each {
        let (shape, own) = (&parameter.shape[..], sharding.owned(weights.len()));
        wants.push(Want::all(&replicas[index], shape, weights));
        if !master.is_empty() {
            wants.push(part(&parameter.name, shape, own.clone(), master));
        }
        wants.push(part(&first[index], shape, own.clone(), m));
        wants.push(part(&second[index], shape, own, v));
    }
    checkpoint.load(&mut wants)
}

/// An interval of a tensor.
const fn part<'a>(tensor: &'a str, shape: &'a [usize], range: Range<usize>, out: &'a mut [f32]) -> Want<'a> {
    Want { tensor, shape, range, out }
}

/// What a rank of several writes of parameters and moments, in the order of [`put`].
pub(super) fn pieces(parameters: &[Parameter], share: &Share) -> Vec<PieceSpec> {
    let sharding = share.sharding;
    let piece =
        |parameter: &Parameter, tensor: String, range| PieceSpec { tensor, shape: parameter.shape.clone(), range };
    let replica = |parameter: &Parameter| shard(parameter.elements(), share.index, share.of);
    let mut pieces = Vec::new();
    for parameter in parameters {
        let range = match sharding.has_master(parameter) {
            true => sharding.owned(parameter.elements()),
            false => replica(parameter),
        };
        pieces.push(piece(parameter, parameter.name.clone(), range));
    }
    for suffix in [".m", ".v"] {
        for parameter in parameters {
            let range = sharding.stored(parameter.elements(), share);
            pieces.push(piece(parameter, format!("{}{suffix}", parameter.name), range));
        }
    }
    for parameter in parameters.iter().filter(|parameter| sharding.has_master(parameter)) {
        pieces.push(piece(parameter, replica_name(&parameter.name), replica(parameter)));
    }
    pieces
}

/// Copies parameters and moments into a snapshot whose pieces begin with those of [`pieces`]. Returns their number.
pub(super) fn put(state: &State, parameters: &[Parameter], snapshot: &mut Snapshot<'_>, share: &Share) -> usize {
    let sharding = share.sharding;
    let mut next = 0;
    let mut copy = |values: &[f32]| {
        snapshot.tensor(next).copy_from_slice(values);
        next += 1;
    };
    let replica = |index: usize| {
        let weights = &state.weights[index];
        &weights[shard(weights.len(), share.index, share.of)]
    };
    for (index, parameter) in parameters.iter().enumerate() {
        copy(if sharding.has_master(parameter) { state.master(index) } else { replica(index) });
    }
    for moments in state.m.iter().chain(&state.v) {
        // Those of a rank that owns its part are that part.
        copy(if sharding.is_on() { moments } else { &moments[shard(moments.len(), share.index, share.of)] });
    }
    for (index, _) in parameters.iter().enumerate().filter(|(_, parameter)| sharding.has_master(parameter)) {
        copy(replica(index));
    }
    next
}

/// The parameters as their owners have them, on rank 0, where they are not the replicas; `None` on all other ranks, and where
/// they are. All ranks call it between the same steps.
///
/// # Errors
/// A rank is lost.
pub fn gather(all: &SubGroup, parameters: &[Parameter], state: &State) -> Result<Option<Vec<Vec<f32>>>> {
    let sharding = state.sharding;
    if !parameters.iter().any(|parameter| sharding.has_master(parameter)) {
        return Ok(None);
    }
    let mut whole = (sharding.rank == 0).then(|| state.weights.clone());
    for (index, parameter) in parameters.iter().enumerate().filter(|(_, parameter)| sharding.has_master(parameter)) {
        let (site, elements) = (site("masters", &parameter.name), parameter.elements());
        let of = |owner| shard(elements, owner, sharding.ranks);
        match &mut whole {
            None => {
                let start = of(sharding.rank).start;
                for part in parts(&of(sharding.rank)) {
                    all.send(&site, 0, &state.masters[index][part.start - start..part.end - start])?;
                }
            }
            Some(whole) => {
                whole[index][of(0)].copy_from_slice(&state.masters[index]);
                for owner in 1..sharding.ranks {
                    for part in parts(&of(owner)) {
                        all.receive(&site, owner, &mut whole[index][part])?;
                    }
                }
            }
        }
        // Who sends does not wait: without this it would be ahead by the whole model.
        all.barrier(&site)?;
    }
    Ok(whole)
}

#[cfg(test)]
mod tests;
