//! The mesh of ranks: data x pipeline x tensor.
//!
//! Rank = (d * P + p) * T + t. What a rank says most to whom it says it lies nearest: a tensor group are neighbours, which
//! belong into one machine; stages of a pipeline follow, which only hand on activations; and replicas are outermost, for
//! what they exchange is compressed. ([Narayanan et al. 2021](https://arxiv.org/abs/2104.04473), section 3, gives
//! the reasons for tensor inside and pipeline across machines.)
//!
//! - `shape`: what of a model has to be cut, and how it is.
//! - `placement`: which groups cross machines, and which order of ranks lets the fewest cross.
//! - `fault`: what cannot be.
//!
//! Everything here is arithmetic: no rank talks to another. Members of a group go to
//! [`Collectives::sub_group`](crate::collective::Collectives::sub_group).

use std::fmt;
use std::ops::Range;

pub use self::fault::{MeshFault, MeshFaults};
pub use self::placement::{Crossing, arrange, crossings};
pub use self::shape::{Shape, cut, key_value_heads, replicas};

mod fault;
mod placement;
mod shape;

/// The most ranks of a mesh.
pub const RANKS_MAX: usize = 1024;

/// One way in which ranks differ. A new axis (experts, context) is a line here and one in [`Axis::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Axis {
    /// Replicas, each with a part of the batch.
    Data,
    /// Stages, each with some of the layers.
    Pipeline,
    /// Parts of every layer.
    Tensor,
}

impl Axis {
    /// All, the outermost first: the order of ranks.
    pub const ALL: [Self; 3] = [Self::Data, Self::Pipeline, Self::Tensor];

    /// As in a recipe.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Pipeline => "pipeline",
            Self::Tensor => "tensor",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a rank is on every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coordinates([usize; Axis::ALL.len()]);

impl Coordinates {
    /// The place on an axis, from 0.
    #[must_use]
    pub const fn on(self, axis: Axis) -> usize {
        self.0[axis as usize]
    }

    /// The same place but for one axis.
    #[must_use]
    pub const fn with(mut self, axis: Axis, place: usize) -> Self {
        self.0[axis as usize] = place;
        self
    }
}

/// How many ranks there are on every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mesh([usize; Axis::ALL.len()]);

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<String> = Axis::ALL.iter().map(|&axis| format!("{axis} {}", self.size(axis))).collect();
        f.write_str(&sizes.join(" x "))
    }
}

impl Mesh {
    /// One rank.
    pub const ONE: Self = Self([1; Axis::ALL.len()]);

    /// # Errors
    /// Every axis without a rank, and more than [`RANKS_MAX`] ranks.
    pub fn new(data: usize, pipeline: usize, tensor: usize) -> Result<Self, MeshFaults> {
        let sizes = [data, pipeline, tensor];
        let empty = Axis::ALL.into_iter().filter(|&axis| sizes[axis as usize] == 0);
        let mut faults: Vec<MeshFault> = empty.map(|axis| MeshFault::Empty { axis }).collect();
        let ranks = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        if ranks.is_none_or(|ranks| ranks > RANKS_MAX) {
            faults.push(MeshFault::TooMany { sizes, max: RANKS_MAX });
        }
        MeshFaults::none_of(faults).map(|()| Self(sizes))
    }

    /// Ranks on an axis.
    #[must_use]
    pub const fn size(self, axis: Axis) -> usize {
        self.0[axis as usize]
    }

    /// All ranks.
    #[must_use]
    pub fn ranks(self) -> usize {
        self.0.iter().product()
    }

    /// Where a rank is.
    ///
    /// # Panics
    /// When the mesh has no such rank.
    #[must_use]
    pub fn coordinates(self, rank: usize) -> Coordinates {
        assert!(rank < self.ranks(), "rank {rank} of {self}");
        let (mut places, mut rest) = ([0; Axis::ALL.len()], rank);
        for (place, size) in places.iter_mut().zip(self.0).rev() {
            (*place, rest) = (rest % size, rest / size);
        }
        Coordinates(places)
    }

    /// The rank there.
    ///
    /// # Panics
    /// When it is outside of the mesh.
    #[must_use]
    pub fn rank(self, at: Coordinates) -> usize {
        assert!(at.0.iter().zip(self.0).all(|(&place, size)| place < size), "{at:?} of {self}");
        at.0.iter().zip(self.0).fold(0, |rank, (place, size)| rank * size + place)
    }

    /// The rank at another place of an axis.
    ///
    /// # Panics
    /// As [`coordinates`](Self::coordinates) and [`rank`](Self::rank).
    #[must_use]
    pub fn beside(self, rank: usize, axis: Axis, place: usize) -> usize {
        self.rank(self.coordinates(rank).with(axis, place))
    }

    /// The sub-group of an axis that a rank is in: the ranks that differ from it there alone, in the order of the axis,
    /// which is that of ranks.
    ///
    /// # Panics
    /// When the mesh has no such rank.
    #[must_use]
    pub fn group(self, axis: Axis, rank: usize) -> Vec<usize> {
        (0..self.size(axis)).map(|place| self.beside(rank, axis, place)).collect()
    }

    /// All sub-groups of an axis, by their first rank.
    #[must_use]
    pub fn groups(self, axis: Axis) -> Vec<Vec<usize>> {
        let first = |&rank: &usize| self.coordinates(rank).on(axis) == 0;
        (0..self.ranks()).filter(first).map(|rank| self.group(axis, rank)).collect()
    }

    /// The ranks that hold one replica of the model together, this one among them. They follow each other.
    ///
    /// # Panics
    /// When the mesh has no such rank.
    #[must_use]
    pub fn replica(self, rank: usize) -> Range<usize> {
        let each = self.size(Axis::Pipeline) * self.size(Axis::Tensor);
        let data = self.coordinates(rank).on(Axis::Data);
        data * each..(data + 1) * each
    }

    /// The ranks on the first and the last stage of this rank's pipeline, which share a tied embedding. One rank where
    /// there is one stage.
    ///
    /// # Panics
    /// When the mesh has no such rank.
    #[must_use]
    pub fn ends(self, rank: usize) -> Vec<usize> {
        let mut ends = vec![0, self.size(Axis::Pipeline) - 1];
        ends.dedup();
        ends.into_iter().map(|stage| self.beside(rank, Axis::Pipeline, stage)).collect()
    }

    /// Whether a run of so many ranks can train this model on this mesh, each rank of a pipeline with `virtual_stages`
    /// pieces of the model (1 without interleaving).
    ///
    /// # Errors
    /// All faults at once.
    pub fn check(self, ranks: usize, model: &Shape, virtual_stages: usize) -> Result<(), MeshFaults> {
        let mut faults = Vec::new();
        if self.ranks() != ranks {
            faults.push(MeshFault::Ranks { mesh: self, ranks });
        }
        faults.extend(shape::faults(self, model, virtual_stages));
        MeshFaults::none_of(faults)
    }
}

#[cfg(test)]
mod tests;
