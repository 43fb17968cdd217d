//! Why a mesh cannot be.

use std::fmt;

use thiserror::Error;

use super::{Axis, Mesh};

/// One fault: what was expected, what came, how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MeshFault {
    /// An axis without a rank.
    #[error("expected at least 1 rank on the axis {axis}, found 0")]
    Empty {
        /// Which.
        axis: Axis,
    },
    /// More ranks than a run may have.
    #[error("expected at most {max} ranks, found {} x {} x {}", .sizes[0], .sizes[1], .sizes[2])]
    TooMany {
        /// Ranks on every axis.
        sizes: [usize; Axis::ALL.len()],
        /// The bound.
        max: usize,
    },
    /// The run has another number of ranks.
    #[error("expected {} ranks for {mesh}, found {ranks}", .mesh.ranks())]
    Ranks {
        /// The mesh.
        mesh: Mesh,
        /// Ranks in the run.
        ranks: usize,
    },
    /// Query heads that cannot be shared out.
    #[error("expected the tensor ranks to divide the {heads} query heads, found {tensor}; {}", divisors(.heads))]
    Heads {
        /// Query heads.
        heads: usize,
        /// Ranks on the axis.
        tensor: usize,
    },
    /// Key and value heads that can neither be shared out nor be repeated evenly.
    #[error(
        "expected the {tensor} tensor ranks to divide the {heads} key-value heads, or to be a multiple of them, so that \
         each rank has as many or each head is on as many ranks"
    )]
    KeyValueHeads {
        /// Key and value heads.
        heads: usize,
        /// Ranks on the axis.
        tensor: usize,
    },
    /// Fewer layers than pieces of the pipeline.
    #[error(
        "expected at least a layer for each of {stages} stages x {virtual_stages} virtual stages, found {layers} layers"
    )]
    Layers {
        /// Layers.
        layers: usize,
        /// Ranks on the axis.
        stages: usize,
        /// Pieces a rank.
        virtual_stages: usize,
    },
    /// Virtual stages without a pipeline, or none at all.
    #[error(
        "expected 1 virtual stage, or several with at least 2 stages, found {virtual_stages} with {stages} \
         {}", if *.stages == 1 { "stage" } else { "stages" }
    )]
    VirtualStages {
        /// Ranks on the axis.
        stages: usize,
        /// Pieces a rank.
        virtual_stages: usize,
    },
    /// Fewer tokens in the vocabulary than ranks.
    #[error("expected at least a token of the vocabulary for each of {tensor} tensor ranks, found {vocabulary}")]
    Vocabulary {
        /// Tokens.
        vocabulary: usize,
        /// Ranks on the axis.
        tensor: usize,
    },
    /// A feed-forward layer that is narrower than ranks are many.
    #[error("expected a feed-forward layer at least as wide as the {tensor} tensor ranks, found {feed_forward}")]
    FeedForward {
        /// Its width.
        feed_forward: usize,
        /// Ranks on the axis.
        tensor: usize,
    },
    /// A sequence that cannot be cut evenly.
    #[error(
        "expected the {tensor} tensor ranks to divide a sequence of {sequence} tokens, for sequence parallelism gives \
         each as many"
    )]
    Sequence {
        /// Tokens of a sequence.
        sequence: usize,
        /// Ranks on the axis.
        tensor: usize,
    },
}

fn divisors(heads: &usize) -> String {
    let list: Vec<String> = (1..=*heads).filter(|n| heads.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    format!("{} would", list.join(", "))
}

/// Every fault of a mesh, a line each.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct MeshFaults(Vec<MeshFault>);

impl MeshFaults {
    /// # Errors
    /// There are some.
    pub(super) fn none_of(faults: Vec<MeshFault>) -> Result<(), Self> {
        if faults.is_empty() { Ok(()) } else { Err(Self(faults)) }
    }

    /// One by one.
    #[must_use]
    pub fn all(&self) -> &[MeshFault] {
        &self.0
    }
}

impl fmt::Display for MeshFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            write!(f, "{}{fault}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}
