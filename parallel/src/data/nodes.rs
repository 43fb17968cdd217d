//! Which ranks are of one machine, and the way of a shard between machines.
//!
//! Consecutive ranks are of one node. Between two nodes every shard goes through one member on each side: its owner, and
//! the members that have the owner's place in their nodes. So each member has an equal part of what crosses.

/// A rank's view of all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// This rank.
    pub rank: usize,
    /// Ranks of all nodes.
    pub ranks: usize,
    /// Ranks of a node, a divisor of `ranks`; 1 when every rank is a node of its own.
    pub members: usize,
}

impl Nodes {
    /// How many nodes there are.
    #[must_use]
    pub const fn count(self) -> usize {
        self.ranks / self.members
    }

    /// The node of a rank.
    #[must_use]
    pub const fn node(self, rank: usize) -> usize {
        rank / self.members
    }

    /// A rank's place in its node.
    #[must_use]
    pub const fn place(self, rank: usize) -> usize {
        rank % self.members
    }

    /// The rank of a node that has this rank's place.
    #[must_use]
    pub const fn peer(self, node: usize) -> usize {
        node * self.members + self.place(self.rank)
    }

    /// The member of this node with this place.
    #[must_use]
    pub const fn member(self, place: usize) -> usize {
        self.node(self.rank) * self.members + place
    }

    /// The member of this node that adds the node's parts of an owner's shard and sends the sum to the owner, or is it.
    #[must_use]
    pub const fn adds(self, owner: usize) -> usize {
        self.member(self.place(owner))
    }

    /// Who hands this rank the sum of another owner's shard: the owner, or the member that has it from the owner.
    #[must_use]
    pub const fn hands(self, owner: usize) -> usize {
        let member = self.adds(owner);
        if member == self.rank { owner } else { member }
    }

    /// The other ranks, the next one first.
    pub fn others(self) -> impl Iterator<Item = usize> {
        (1..self.ranks).map(move |k| (self.rank + k) % self.ranks)
    }

    /// The other members of this node, the next one first.
    pub fn mates(self) -> impl Iterator<Item = usize> {
        (1..self.members).map(move |k| self.member((self.place(self.rank) + k) % self.members))
    }

    /// Whom an owner sends its sum to: its mates, and its peer in every other node.
    pub fn told(self) -> impl Iterator<Item = usize> {
        let near = move |&to: &usize| self.node(to) == self.node(self.rank) || self.place(to) == self.place(self.rank);
        self.others().filter(near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sum_reaches_every_rank_once() {
        for members in [1, 2, 3, 4] {
            for nodes in 1..4 {
                let ranks = members * nodes;
                let view = |rank| Nodes { rank, ranks, members };
                for owner in 0..ranks {
                    let mut had = vec![0; ranks];
                    for to in view(owner).told() {
                        had[to] += 1;
                        assert_eq!(view(to).hands(owner), owner);
                        if view(to).node(to) != view(to).node(owner) {
                            for mate in view(to).mates() {
                                had[mate] += 1;
                                assert_eq!(view(mate).hands(owner), to);
                            }
                        }
                    }
                    let expected: Vec<usize> = (0..ranks).map(|rank| usize::from(rank != owner)).collect();
                    assert_eq!(had, expected, "{nodes} nodes of {members}, owner {owner}");
                }
            }
        }
    }

    #[test]
    fn one_rank_a_node_knows_no_mates() {
        let nodes = Nodes { rank: 2, ranks: 5, members: 1 };
        assert_eq!(nodes.mates().count(), 0);
        assert_eq!(nodes.told().collect::<Vec<_>>(), [3, 4, 0, 1]);
        assert!((0..5).all(|owner| nodes.adds(owner) == 2 && nodes.hands(owner) == owner));
    }
}
