//! A call of a collective operation: what all members of a sub-group must agree on.

use std::fmt;

/// What an operation does; [`SubGroup`](super::SubGroup) has its shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// One member's elements go to all.
    Broadcast,
    /// All members get the reduction of all.
    AllReduce,
    /// All members get the elements of all.
    AllGather,
    /// Each member gets its block of the reduction.
    ReduceScatter,
    /// Each member gets its block of every member.
    AllToAll,
    /// One member's elements go to another.
    Send,
    /// Nobody leaves before all have come.
    Barrier,
}

impl Operation {
    pub(super) const ALL: [Self; 7] = [
        Self::Broadcast,
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::Send,
        Self::Barrier,
    ];

    /// As it is written in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Send => "send",
            Self::Barrier => "barrier",
        }
    }

    pub(super) const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter)
    }
}

/// The type of the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// 32-bit integers.
    I32,
    /// 64-bit integers.
    I64,
    /// Bytes.
    U8,
}

impl Dtype {
    pub(super) const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::I32, Self::I64, Self::U8];

    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
            Self::I64 => 8,
            Self::U8 => 1,
        }
    }

    /// As it is written in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
        }
    }
}

/// How elements of several members become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum, in rank order. Integers wrap.
    Sum,
    /// The largest. NaN wins; 0.0 is above -0.0.
    Max,
    /// The smallest. NaN wins; -0.0 is below 0.0.
    Min,
}

impl Reduction {
    pub(super) const ALL: [Self; 3] = [Self::Sum, Self::Max, Self::Min];

    /// As it is written in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
        }
    }
}

/// A call of an operation: what all members must agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which operation.
    pub operation: Operation,
    /// Of which elements.
    pub dtype: Dtype,
    /// How they are reduced, where they are.
    pub reduction: Option<Reduction>,
    /// Changes whenever the group of ranks does.
    pub epoch: u32,
    /// Which sub-group.
    pub group: u64,
    /// Which operation of the sub-group; of a send, which one this way.
    pub sequence: u64,
    /// How many elements, as the operation counts them.
    pub elements: u64,
    /// The rank that gives, in a broadcast; 0 elsewhere.
    pub root: u32,
    /// Where in the program it is.
    pub site: String,
}

/// As in "all_reduce 17 (sum of 4096 bf16) of model.layers.3.mlp/forward".
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation.name(), self.sequence)?;
        let (elements, dtype) = (self.elements, self.dtype.name());
        match (self.operation, self.reduction) {
            (Operation::Barrier, _) => {}
            (Operation::Broadcast, _) => write!(f, " ({elements} {dtype} from rank {})", self.root)?,
            (_, Some(reduction)) => write!(f, " ({} of {elements} {dtype})", reduction.name())?,
            (_, None) => write!(f, " ({elements} {dtype})")?,
        }
        write!(f, " of {}", if self.site.is_empty() { "no site" } else { &self.site })
    }
}
