//! Where a frame belongs.

use std::ops::Range;

use compression::BLOCK;

use super::{Exchange, ExchangeError, Group};
use crate::data::shard::shard;
use crate::frame::{Header, Phase};

impl Exchange {
    /// Where a frame belongs: tensor, owner, chunk of the owner's shard, and elements.
    pub(super) fn place(
        &self,
        from: usize,
        header: &Header,
    ) -> Result<(usize, usize, usize, Range<usize>), ExchangeError> {
        let (Group { rank, ranks, .. }, nodes) = (self.group, self.group.nodes());
        let index = header.tensor as usize;
        let name = self.plan.parameters().get(index).map_or("no parameter", |parameter| &parameter.name);
        let misplaced = |what: String| {
            let place = format!("bucket {}, parameter {name}, element {}", header.bucket, header.start);
            ExchangeError::Place { from, step: self.step, place, what }
        };
        if from >= ranks || from == rank {
            return Err(misplaced(format!("expected another rank of {ranks}, this is rank {rank}")));
        }
        let Some(tensor) = self.tensors.get(index) else {
            return Err(misplaced(format!("expected one of {} parameters, found number {index}", self.tensors.len())));
        };
        let codec = self.codec_in(header.phase, index);
        if header.codec != codec {
            return Err(misplaced(format!("expected {codec}, found {}", header.codec)));
        }
        let (near, level) = (nodes.node(from) == nodes.node(rank), nodes.place(from) == nodes.place(rank));
        let holds = |owner: &usize| {
            shard(tensor.sum.len(), *owner, ranks).contains(&usize::try_from(header.start).unwrap_or(usize::MAX))
        };
        let owner = match header.phase {
            Phase::Inner => (0..ranks).find(holds).filter(|&owner| near && nodes.adds(owner) == rank),
            Phase::Scatter => Some(rank).filter(|_| level && !near),
            Phase::Gather => (0..ranks).find(holds).filter(|&owner| owner != rank && nodes.hands(owner) == from),
        };
        let Some(owner) = owner else {
            return Err(misplaced(format!("rank {from} has no such part to send to this rank {rank}")));
        };
        let first = shard(tensor.sum.len(), owner, ranks).start as u64;
        let chunk = header.start.saturating_sub(first) as usize / (self.group.chunk_blocks * BLOCK);
        let fits = |range: &Range<usize>| {
            range.start as u64 == header.start && range.len() as u64 == u64::from(header.elements)
        };
        let Some(range) = self.chunk(index, owner, chunk).filter(fits) else {
            return Err(misplaced(format!("no chunk of rank {owner}'s shard has these {} elements", header.elements)));
        };
        let second = match header.phase {
            Phase::Inner => {
                let inner = &tensor.inner[nodes.node(owner)][chunk];
                inner.summed || inner.parts[nodes.place(from)].is_some()
            }
            Phase::Scatter => tensor.added[chunk] || tensor.parts[chunk][nodes.node(from)].is_some(),
            Phase::Gather => tensor.done[owner][chunk],
        };
        if second {
            return Err(misplaced("a second frame for one chunk".into()));
        }
        Ok((index, owner, chunk, range))
    }
}
