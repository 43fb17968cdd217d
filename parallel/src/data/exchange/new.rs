//! A side of the sum before its first step, and those that are the controls of proofs.

use std::sync::Arc;

use compression::{BLOCK, Codec, Workers};

use super::{Bucket, CHUNK_BLOCKS_MAX, Exchange, Flush, Group, Held, Inner, Queue, Tensor, Untouched, chunks};
use crate::data::norm::SquaredNorm;
use crate::data::plan::Plan;
use crate::data::rules::{codec_of, may_leave_rows};
use crate::data::shard::shard;

impl Exchange {
    /// A side that has left out nothing yet.
    ///
    /// # Panics
    /// When the rank is not in the group, nodes do not divide it, chunks are empty or larger than a frame, or the window is
    /// closed.
    #[must_use]
    pub fn new(plan: Arc<Plan>, group: Group, codec: Codec) -> Self {
        assert!(group.rank < group.ranks && (1..=CHUNK_BLOCKS_MAX).contains(&group.chunk_blocks), "{group:?}");
        assert!(group.members > 0 && group.ranks.is_multiple_of(group.members) && group.window > 0, "{group:?}");
        let nodes = group.nodes();
        let tensors = plan.parts().iter().map(|part| {
            let elements = part.region.len();
            let chunks = |owner| chunks(shard(elements, owner, group.ranks), group.chunk_blocks).count();
            // A rank without mates waits for none.
            let places = if nodes.members > 1 { nodes.members } else { 0 };
            let inner = Inner { parts: vec![None; places], summed: false };
            Tensor {
                codec: codec_of(&part.whole, codec),
                may_leave_rows: may_leave_rows(&part.whole),
                inner: (0..nodes.count()).map(|node| vec![inner.clone(); chunks(nodes.peer(node))]).collect(),
                owner: Vec::new(),
                reduced: Vec::new(),
                added: vec![false; chunks(group.rank)],
                parts: vec![vec![None; nodes.count()]; chunks(group.rank)],
                arrived: vec![Vec::new(); chunks(group.rank)],
                sum: Held::new(elements, group.ranks, group.chunk_blocks),
                done: (0..group.ranks).map(|owner| vec![false; chunks(owner)]).collect(),
                missing: 0,
            }
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let longest = tensors.iter().map(|tensor| tensor.sum.len()).max().unwrap_or(0);
        Self {
            buckets: plan.buckets().iter().map(|_| Bucket::default()).collect(),
            zeros: vec![0.0; longest.min(group.chunk_blocks * BLOCK)],
            plan,
            group,
            step: 0,
            codec,
            flush: Flush::No,
            tensors,
            finite: true,
            missing: 0,
            own_missing: 0,
            unsent: 0,
            queues: (0..group.ranks).map(|_| Queue::default()).collect(),
            parameters: None,
            broken: false,
            norm: SquaredNorm::default(),
            decided: false,
            completed: Vec::new(),
            payload: Vec::new(),
            scratch: Vec::new(),
            decoded: Vec::new(),
            workers: Workers::none(),
            untouched: Untouched::default(),
            feedback: true,
            by_arrival: false,
        }
    }

    /// A side that forgets what it left out: the control of error feedback's proofs, and of no other use.
    #[must_use]
    pub const fn without_feedback(mut self) -> Self {
        self.feedback = false;
        self
    }

    /// A side that adds parts in the order of their arrival: the control of equal bits' proofs, and of no other use.
    #[must_use]
    pub const fn in_order_of_arrival(mut self) -> Self {
        self.by_arrival = true;
        self
    }

    /// A side that encodes, adds and decodes with these threads, to the same bits.
    #[must_use]
    pub fn with_workers(mut self, workers: Workers) -> Self {
        self.workers = workers;
        self
    }

    /// Forgets what this rank left out as an owner: the control of a test, and of no other use.
    pub fn forget_owner(&mut self) {
        self.tensors.iter_mut().for_each(|tensor| tensor.owner = Vec::new());
    }
}
