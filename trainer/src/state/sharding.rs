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

use checkpoint::reader::Want;
use checkpoint::writer::{PieceSpec, Snapshot};
use compression::Codec;
use parallel::collective::SubGroup;
use parallel::data::rules::codec_of;
use parallel::data::shard::shard;
use parallel::data::{Parameter, Part};

use super::residuals::{parts, site};
use super::share::Own;
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
}

/// The tensor in which a replica lies that is not the master.
#[must_use]
pub fn replica_name(parameter: &str) -> String {
    format!("{parameter}.replica")
}

impl State {
    /// What a rank keeps of a state whose optimiser has seen nothing. `wholes` are the parameters of which it holds all, or
    /// parts.
    #[must_use]
    pub fn sharded<'a>(mut self, wholes: impl IntoIterator<Item = &'a Parameter>, sharding: Sharding) -> Self {
        if sharding.is_on() {
            for moments in self.m.iter_mut().chain(&mut self.v) {
                *moments = vec![0.0; sharding.owned(moments.len()).len()];
            }
        }
        for ((parameter, master), weights) in wholes.into_iter().zip(&mut self.masters).zip(&self.weights) {
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

/// The tensors that a rank reads of each parameter: its replica, which may be the master, the master, and both moments.
pub(super) fn names(has: impl Fn(&str) -> bool, parts: &[Part], sharding: Sharding) -> Vec<[String; 4]> {
    let names = |part: &Part| {
        let name = &part.whole.name;
        let replica = replica_name(name);
        let differs = sharding.has_master(&part.whole) && has(&replica);
        [if differs { replica } else { name.clone() }, name.clone(), format!("{name}.m"), format!("{name}.v")]
    };
    parts.iter().map(names).collect()
}

/// What a rank reads into a state that has the places for it. Any rank may have written any part of that, with a sharded
/// optimiser or without.
pub(super) fn wants<'a>(parts: &'a [Part], names: &'a [[String; 4]], state: &'a mut State) -> Vec<Want<'a>> {
    let State { weights, m, v, masters, sharding, .. } = state;
    let mut wants = Vec::new();
    let each = parts.iter().zip(names).zip(weights).zip(masters).zip(m.iter_mut().zip(v));
    for ((((part, [replica, master, first, second]), weights), masters), (m, v)) in each {
        let shape = &part.whole.shape[..];
        let own = part.region.part(sharding.owned(weights.len()));
        wants.push(Want { tensor: replica, shape, region: part.region.clone(), out: weights });
        if !masters.is_empty() {
            wants.push(Want { tensor: master, shape, region: own.clone(), out: masters });
        }
        wants.push(Want { tensor: first, shape, region: own.clone(), out: m });
        wants.push(Want { tensor: second, shape, region: own, out: v });
    }
    wants
}

/// What of a parameter that this rank holds it writes as the owner: of those that hold the same part and own the same of it
/// one does.
fn owned(own: &Own, sharding: Sharding) -> Range<usize> {
    if own.part.counts { sharding.owned(own.part.region.len()) } else { 0..0 }
}

/// What a rank of several writes of parameters and moments, in the order of [`put`].
pub(super) fn pieces(share: &Share) -> Vec<PieceSpec> {
    let sharding = share.sharding;
    let has_master = |own: &&Own| sharding.has_master(&own.part.whole);
    let piece = |own: &Own, tensor: String, range: Range<usize>| PieceSpec {
        tensor,
        shape: own.part.whole.shape.clone(),
        region: own.part.region.part(range),
    };
    let name = |own: &Own, suffix: &str| format!("{}{suffix}", own.part.whole.name);
    let parameter = |own: &Own| if has_master(&own) { owned(own, sharding) } else { own.range.clone() };
    let moments = |own: &Own| if sharding.is_on() { owned(own, sharding) } else { own.range.clone() };
    let parameters = share.own.iter().map(|own| piece(own, name(own, ""), parameter(own)));
    let first = share.own.iter().map(|own| piece(own, name(own, ".m"), moments(own)));
    let second = share.own.iter().map(|own| piece(own, name(own, ".v"), moments(own)));
    let replicas = share.own.iter().filter(has_master);
    let replicas = replicas.map(|own| piece(own, replica_name(&own.part.whole.name), own.range.clone()));
    parameters.chain(first).chain(second).chain(replicas).collect()
}

/// Copies parameters and moments into a snapshot whose pieces begin with those of [`pieces`]. Returns their number.
pub(super) fn put(state: &State, snapshot: &mut Snapshot<'_>, share: &Share) -> usize {
    let sharding = share.sharding;
    let mut next = 0;
    let mut copy = |values: &[f32]| {
        snapshot.tensor(next).copy_from_slice(values);
        next += 1;
    };
    let has_master = |own: &Own| sharding.has_master(&own.part.whole);
    for (index, own) in share.own.iter().enumerate() {
        match has_master(own) {
            true => copy(if own.part.counts { state.master(index) } else { &[] }),
            false => copy(&state.weights[index][own.range.clone()]),
        }
    }
    for (moments, own) in state.m.iter().chain(&state.v).zip(share.own.iter().cycle()) {
        match sharding.is_on() {
            // They are what it owns.
            true => copy(if own.part.counts { moments } else { &[] }),
            false => copy(&moments[own.range.clone()]),
        }
    }
    for (index, own) in share.own.iter().enumerate().filter(|(_, own)| has_master(own)) {
        copy(&state.weights[index][own.range.clone()]);
    }
    next
}

/// What a rank holds of a parameter as its owners have it, on the first of those that sum gradients, where that is not the
/// replica; `None` on all others, and where it is. All of them call it in the same order between the same steps.
///
/// # Errors
/// A rank is lost.
pub fn gather(all: &SubGroup, part: &Part, index: usize, state: &State) -> Result<Option<Vec<f32>>> {
    let sharding = state.sharding;
    if !sharding.has_master(&part.whole) {
        return Ok(None);
    }
    let (site, elements) = (site("masters", &part.whole.name), part.region.len());
    let of = |owner| shard(elements, owner, sharding.ranks);
    let members = all.members();
    let mut gathered = None;
    if sharding.rank > 0 {
        let start = of(sharding.rank).start;
        for part in parts(&of(sharding.rank)) {
            all.send(&site, members[0], &state.masters[index][part.start - start..part.end - start])?;
        }
    } else {
        let mut masters = vec![0.0; elements];
        masters[of(0)].copy_from_slice(&state.masters[index]);
        for (owner, &member) in members.iter().enumerate().skip(1) {
            for part in parts(&of(owner)) {
                all.receive(&site, member, &mut masters[part])?;
            }
        }
        gathered = Some(masters);
    }
    // Who sends does not wait: without this it would be ahead by the whole model.
    all.barrier(&site)?;
    Ok(gathered)
}

#[cfg(test)]
mod tests;
