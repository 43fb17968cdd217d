//! The two additions: of a node's members, and of the nodes.

use std::ops::Range;

use compression::{Found, Owned, Part, Payload};

use super::{Exchange, Job};
use crate::frame::Phase;

impl Exchange {
    /// Adds the node's parts of a chunk as soon as all of them are here, and passes the sum on.
    pub(super) fn add_members(&mut self, index: usize, node: usize, chunk: usize) {
        let nodes = self.group.nodes();
        let owner = nodes.peer(node);
        let Some(range) = self.chunk(index, owner, chunk) else { return };
        let (place, lies) = (nodes.place(nodes.rank), self.lies(index, &range));
        let Some(given) = &mut self.buckets[self.plan.slot(index).bucket].given else { return };
        let inner = &mut self.tensors[index].inner[node][chunk];
        let missing = |(from, part): (usize, &Option<_>)| from != place && part.is_none();
        if inner.summed || inner.parts.iter().enumerate().any(missing) {
            return;
        }
        if nodes.members > 1 {
            let own = &mut given[lies];
            let parts: Vec<_> =
                inner.parts.iter().map(|part| part.as_ref().map_or(Part::Values(own), Part::Encoded)).collect();
            self.scratch.resize(range.len(), 0.0);
            self.workers.reduce(&parts, &mut self.scratch);
            own.copy_from_slice(&self.scratch);
            // Their memory goes back as soon as they are added.
            inner.parts.fill(None);
        }
        inner.summed = true;
        if owner == nodes.rank {
            self.reduce(index, chunk);
        } else {
            self.queues[owner].push(Job::Encode(Phase::Scatter, index, range));
        }
    }

    /// Adds a chunk of our own shard as soon as every node's part is here.
    pub(super) fn reduce(&mut self, index: usize, chunk: usize) {
        let nodes = self.group.nodes();
        let (rank, node, whole) = (nodes.rank, nodes.node(nodes.rank), self.owned(index));
        let Some(range) = self.chunk(index, rank, chunk) else { return };
        let lies = self.lies(index, &range);
        let Some(given) = &self.buckets[self.plan.slot(index).bucket].given else { return };
        let tensor = &mut self.tensors[index];
        let missing = |(from, part): (usize, &Option<_>)| from != node && part.is_none();
        let is_first = tensor.inner[node][chunk].summed && !tensor.added[chunk];
        if !is_first || tensor.parts[chunk].iter().enumerate().any(missing) {
            return;
        }
        let part =
            |from: usize| tensor.parts[chunk][from].as_ref().map_or(Part::Values(&given[lies.clone()]), Part::Encoded);
        let parts: Vec<_> = match self.by_arrival {
            false => (0..nodes.count()).map(part).collect(),
            true => tensor.arrived[chunk].iter().copied().chain([node]).map(part).collect(),
        };
        let inside = range.start - whole.start..range.end - whole.start;
        let (sum, second) = (&mut tensor.reduced[inside.clone()], tensor.codec.second_stage());
        let (mut found, mut payload) = (Found::Finite, Vec::new());
        if self.parameters.is_some() {
            self.workers.reduce(&parts, sum);
        } else {
            let residual =
                if tensor.owner.is_empty() { &self.zeros[..sum.len()] } else { &tensor.owner[inside.clone()] };
            payload = tensor.sum.buffer(rank, chunk, second.payload_bytes(sum.len()));
            self.decoded.resize(sum.len(), 0.0);
            let to = Owned { codec: second, sum, residual, payload: &mut payload, decoded: &mut self.decoded };
            found = match tensor.may_leave_rows {
                true => self.untouched.pass_on(&self.workers, &parts, to),
                false => self.workers.pass_on(&parts, to),
            };
        }
        // Their memory goes back as soon as they are added.
        tensor.parts[chunk].fill(None);
        tensor.added[chunk] = true;
        self.own_missing -= 1;
        if self.parameters.is_some() {
            return self.keep(index, inside);
        }
        if found == Found::NonFinite {
            self.finite = false;
            second.write_zeros(range.len(), &mut payload);
            self.decoded.fill(0.0);
        }
        // Every rank decodes the same.
        if self.plan.parts()[index].counts {
            self.norm.add(&self.decoded);
        }
        self.tell(index, &range, &payload);
        self.have(index, chunk, Payload::new(second, range.len(), payload).expect("an encoder's payload"));
    }

    /// What all ranks make of a chunk of our own shard is here.
    pub(super) fn have(&mut self, index: usize, chunk: usize, payload: Payload<Vec<u8>>) {
        self.tensors[index].sum.put(self.group.rank, chunk, payload);
        self.arrived(index, self.group.rank, chunk);
    }

    /// Queues a payload of our own shard, for all that this rank sends it to.
    pub(super) fn tell(&mut self, index: usize, range: &Range<usize>, payload: &[u8]) {
        if self.group.ranks > 1 {
            let frame = self.frame(Phase::Gather, index, range, payload);
            let told = self.group.nodes().told();
            told.for_each(|to| self.queues[to].push(Job::Ready(index, range.start, frame.clone())));
        }
    }
}
