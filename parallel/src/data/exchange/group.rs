//! Who takes part in a sum, and how tensors are cut.

use crate::data::nodes::Nodes;

/// Who we are in the group, and how tensors are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// This rank.
    pub rank: usize,
    /// Ranks of the group.
    pub ranks: usize,
    /// Ranks of a node, a divisor of `ranks`; 1 when every rank is a node of its own.
    pub members: usize,
    /// Changes whenever the group does.
    pub epoch: u32,
    /// Blocks of a chunk.
    pub chunk_blocks: usize,
    /// Frames that may be under way to one rank.
    pub window: usize,
}

impl Group {
    /// Which ranks are of one node.
    #[must_use]
    pub const fn nodes(&self) -> Nodes {
        Nodes { rank: self.rank, ranks: self.ranks, members: self.members }
    }
}
