//! Which ranks of the run sum their gradients with this one.
//!
//! All ranks of the run vote, and gather numbers. Where several of them hold one model together, each sums its part with the
//! ranks that hold the same part: these are counted anew, from 0, and everything that is summed speaks of them so.

use std::sync::Arc;

use crate::data::exchange::Group;

/// This rank among all, and the ranks that it sums with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    rank: usize,
    ranks: usize,
    members: Arc<[usize]>,
}

impl Members {
    /// All ranks sum together.
    #[must_use]
    pub fn all(group: Group) -> Self {
        Self { rank: group.rank, ranks: group.ranks, members: (0..group.ranks).collect() }
    }

    /// These ranks of `ranks`, in ascending order, sum together, and `rank` is one of them.
    ///
    /// # Panics
    /// They are not in order, or there are no such ranks.
    #[must_use]
    pub fn new(rank: usize, ranks: usize, members: &[usize]) -> Self {
        let ordered = members.windows(2).all(|pair| pair[0] < pair[1]) && members.iter().all(|&member| member < ranks);
        assert!(ordered && members.contains(&rank), "{members:?} of {ranks} ranks, rank {rank} among them");
        Self { rank, ranks, members: members.into() }
    }

    /// This rank among all.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the run.
    #[must_use]
    pub const fn ranks(&self) -> usize {
        self.ranks
    }

    /// Ranks that sum together.
    #[must_use]
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// The place of a rank of the run among those that sum together.
    pub(super) fn index_of(&self, rank: usize) -> Option<usize> {
        self.members.binary_search(&rank).ok()
    }

    /// All other ranks of the run, the next one first.
    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, ranks) = (self.rank, self.ranks);
        (1..ranks).map(move |k| (rank + k) % ranks)
    }

    /// Whether these are the members of such a group.
    pub(super) fn fit(&self, group: Group) -> bool {
        self.members.len() == group.ranks && self.members.get(group.rank) == Some(&self.rank)
    }
}
