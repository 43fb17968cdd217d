//! What another rank has not sent yet.

use super::Exchange;

impl Exchange {
    /// The first thing in the order of the backward pass that another rank has not sent yet: the rank, and the
    /// parameter. `None` when nothing is missing, or what is missing is our own.
    #[must_use]
    pub fn first_missing(&self) -> Option<(usize, usize)> {
        self.backwards().find_map(|index| self.first_missing_of(index).map(|rank| (rank, index)))
    }

    /// The same, of one rank.
    pub(crate) fn first_missing_of_rank(&self, rank: usize) -> Option<usize> {
        self.backwards().find(|&index| self.late_with(index).contains(&rank))
    }

    /// The parameters in the order of the backward pass.
    fn backwards(&self) -> impl Iterator<Item = usize> {
        self.plan.buckets().iter().flat_map(|bucket| &bucket.parameters).copied()
    }

    pub(super) fn first_missing_of(&self, index: usize) -> Option<usize> {
        self.late_with(index).first().copied()
    }

    /// Who has not sent all of a parameter. Whoever has not sent its part delays the sum of every other, so those come first.
    fn late_with(&self, index: usize) -> Vec<usize> {
        let (nodes, tensor) = (self.group.nodes(), &self.tensors[index]);
        let member = |&mate: &usize| {
            let lacks = |parts: &[Option<_>]| parts[nodes.place(mate)].is_none();
            tensor.inner.iter().flatten().any(|inner| !inner.summed && lacks(&inner.parts))
        };
        let waits = |chunk: usize| !tensor.added[chunk];
        let part = |&peer: &usize| {
            nodes.place(peer) == nodes.place(nodes.rank)
                && (0..tensor.parts.len()).any(|chunk| waits(chunk) && tensor.parts[chunk][nodes.node(peer)].is_none())
        };
        // Parameters are nobody's fault before the votes.
        let is_due = self.parameters.is_none() || self.decided;
        let late = |owner: &usize| is_due && tensor.done[*owner].iter().any(|done| !done);
        let sums = nodes.others().filter(late).map(|owner| nodes.hands(owner));
        let peers = nodes.others().filter(|&other| nodes.node(other) != nodes.node(nodes.rank));
        nodes.mates().filter(member).chain(peers.filter(part)).chain(sums).collect()
    }
}
