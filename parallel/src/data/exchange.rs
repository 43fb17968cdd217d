//! One rank's part in one step's sum: a state machine without sockets, threads or clocks.
//!
//! Gradients and frames go in, frames come out; whoever drives it moves them. Each tensor is cut into one shard an owner
//! ([`shard`](super::shard)) and each shard into chunks:
//!
//! 1. inner: where several ranks are a node ([`nodes`](super::nodes)), a rank sends its gradient's chunk as f32 to the
//!    member that adds the node's parts of it, in rank order.
//! 2. scatter: that member encodes the node's sum, with what it left out before (its residual as a sender), and sends it
//!    to the owner. Where every rank is a node, the node's sum is its gradient. An owner's own node needs no encoding.
//! 3. The owner waits until a chunk has come from every node, adds them **in the order of the nodes**, whatever the order
//!    of their arrival, and encodes the sum with what it left out before (its residual as an owner).
//! 4. gather: the owner sends the encoded sum to its mates and to its peer in every other node, which hands the same bytes
//!    on to its mates. All go on with what a decoder reads, the owner too. So all ranks have the same bits. It is kept as it
//!    came (`held`), and decoded where it is read.
//!
//! A rank votes as soon as its own shards are reduced: if any rank found a value that is not finite, in what it encodes or in
//! what it has added, all skip the step, and no residual changes. With the vote travels what a rank's own shards add to the
//! squared norm, so that everybody knows the clipped gradient's scale before the sums of the other owners are here: they
//! travel on, first what the next forward pass needs first, while that begins.
//!
//! What was left out of a table's row waits until a step touches the row again; `untouched` has the details.
//!
//! Encoding replaces a gradient by what it leaves out. So a bucket's buffer comes in as this rank's gradient, and if the
//! step counts it stays as the new residual, while the old residual's buffer goes back to be filled with the next
//! gradient. If the step is skipped the buffer goes back, and the old residual is as it was.
//!
//! With a sharded optimiser an owner keeps its sum as it is. Once all have voted for the step it updates its shards, and
//! sends **parameters** where it would have sent the sum; `parameters` has the details.
//!
//! A chunk is encoded when it may leave: no more than a window of frames is under way to one rank
//! ([`left`](Exchange::left)), and what waits behind it is the gradient itself, which takes no memory of its own.

mod error;
mod group;
mod held;
mod missing;
mod new;
mod parameters;
mod place;
mod queue;
mod residual;
mod send;
mod sum;
mod untouched;
mod vote;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use compression::{BLOCK, Codec, Payload, Workers};

use super::norm::SquaredNorm;
use super::plan::Plan;
use super::rules::codec_of;
use super::shard::shard;
use crate::frame::{Header, PAYLOAD_BYTES_MAX, Phase};

pub use error::ExchangeError;
pub use group::Group;
use held::Held;
use queue::{Job, Queue};
use untouched::Untouched;
pub use vote::{Verdict, Vote};

/// A frame that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The rank that it goes to.
    pub to: usize,
    /// The bucket that it is of.
    pub bucket: usize,
    /// Which part of the way it is on.
    pub phase: Phase,
    /// Header and payload. The frames of one sum to all ranks share their bytes.
    pub frame: Bytes,
}

/// The most blocks of a chunk: as `fp32` they fill a frame.
pub const CHUNK_BLOCKS_MAX: usize = PAYLOAD_BYTES_MAX / size_of::<f32>() / BLOCK;

/// A rank's side of the sum.
#[derive(Debug)]
pub struct Exchange {
    plan: Arc<Plan>,
    group: Group,
    step: u64,
    /// What tensors travel in, where their kind allows it; and whether this step sends everything as it is.
    codec: Codec,
    flush: Flush,
    tensors: Vec<Tensor>,
    buckets: Vec<Bucket>,
    finite: bool,
    /// Chunks of all tensors whose sum is not here yet, and how many of them are our own.
    missing: usize,
    own_missing: usize,
    /// Chunks of this step that are not encoded yet.
    unsent: usize,
    /// What waits for each rank and is under way to it.
    queues: Vec<Queue>,
    /// What parameters travel in from their owners, where their kind allows it; nothing where sums travel.
    parameters: Option<Codec>,
    /// Whether a parameter of ours was not finite, and could not be sent: no step counts any more.
    broken: bool,
    /// What our own shards' sums add to the squared norm.
    norm: SquaredNorm,
    /// Whether all have voted.
    decided: bool,
    /// Tensors whose sum is here since somebody asked.
    completed: Vec<usize>,
    payload: Vec<u8>,
    /// A node's sum of a chunk.
    scratch: Vec<f32>,
    /// What all ranks make of a chunk of ours.
    decoded: Vec<f32>,
    workers: Workers,
    untouched: Untouched,
    /// As long as the longest chunk.
    zeros: Vec<f32>,
    feedback: bool,
    by_arrival: bool,
}

/// Whether a step sends everything uncompressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    No,
    /// The next step that begins does.
    Asked,
    /// This one does, and if it is skipped the next.
    Now,
}

/// One tensor of the plan.
#[derive(Debug)]
struct Tensor {
    /// What it travels in in this step.
    codec: Codec,
    /// Whether a step may leave some of its rows alone.
    may_leave_rows: bool,
    /// What this rank left out of the sums that it owns; empty for nothing.
    owner: Vec<f32>,
    /// The sum of our own shard, and then what is left out of it; or, where parameters travel, what is to be sent.
    reduced: Vec<f32>,
    /// What the other members sent of the shards that this one adds: by the owner's node, chunk, and place.
    inner: Vec<Vec<Inner>>,
    /// For each chunk of our own shard, whether it is added.
    added: Vec<bool>,
    /// For each of them, what the other nodes sent.
    parts: Vec<Vec<Option<Payload<Bytes>>>>,
    /// For each of them, the nodes in the order in which their parts came; kept for a control only.
    arrived: Vec<Vec<usize>>,
    /// The sum, or what came of the parameters, as far as `done` says.
    sum: Held,
    /// For each chunk of each shard, whether that is here, and how many are not.
    done: Vec<Vec<bool>>,
    missing: usize,
}

/// One chunk whose parts this member adds for its node.
#[derive(Clone, Debug)]
struct Inner {
    /// By place in the node; empty with one member.
    parts: Vec<Option<Payload<Bytes>>>,
    /// Whether the bucket's buffer has the node's sum.
    summed: bool,
}

/// One bucket of the plan.
#[derive(Debug, Default)]
struct Bucket {
    /// What this rank left out when it sent to owners; empty for nothing. Where it encodes nothing for one it holds whatever it holds.
    sender: Vec<f32>,
    /// Once it was given: this rank's gradient; then the node's sum, where this member adds it; then what is left of it
    /// where it was sent.
    given: Option<Vec<f32>>,
}

impl Exchange {
    /// What it sums.
    #[must_use]
    pub const fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Who this side is.
    #[must_use]
    pub const fn group(&self) -> Group {
        self.group
    }

    /// From the next step on, tensors travel in another codec where their kind allows it. What was left out before is
    /// sent with the next gradient, whatever the codec (of a table's row, its own next one); one that leaves nothing out sends all of it.
    pub const fn set_codec(&mut self, codec: Codec) {
        self.codec = codec;
    }

    /// The next step that counts sends everything uncompressed, with everything that was left out: all residuals are
    /// zero after it.
    pub const fn flush(&mut self) {
        self.flush = Flush::Asked;
    }

    /// The step under way, or the last one.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.step
    }

    /// What tensors travel in from the next step on, where their kind allows it.
    #[must_use]
    pub const fn codec(&self) -> Codec {
        self.codec
    }

    /// Starts a step.
    pub fn begin(&mut self, step: u64) {
        self.step = step;
        self.finite = true;
        self.missing = 0;
        self.own_missing = 0;
        if self.flush == Flush::Asked {
            self.flush = Flush::Now;
        }
        let (rank, flushes) = (self.group.rank, self.flush == Flush::Now);
        // Inside a node everything travels as it is.
        let codec = if self.group.members > 1 && self.group.nodes().count() == 1 { Codec::Fp32 } else { self.codec };
        self.buckets.iter_mut().for_each(|bucket| bucket.given = None);
        for (tensor, part) in self.tensors.iter_mut().zip(self.plan.parts()) {
            tensor.codec = if flushes { Codec::Fp32 } else { codec_of(&part.whole, codec) };
            tensor.added.fill(false);
            tensor.parts.iter_mut().flatten().for_each(|part| *part = None);
            for inner in tensor.inner.iter_mut().flatten() {
                inner.parts.fill(None);
                inner.summed = false;
            }
            tensor.arrived.iter_mut().for_each(Vec::clear);
            tensor.done.iter_mut().flatten().for_each(|done| *done = false);
            tensor.reduced.resize(shard(tensor.sum.len(), rank, self.group.ranks).len(), 0.0);
            tensor.missing = tensor.done.iter().map(Vec::len).sum::<usize>();
            self.missing += tensor.missing;
            self.own_missing += tensor.added.len();
        }
        // Of every other shard a chunk leaves once: to its owner, or to the member that adds it.
        self.unsent = self.missing - self.own_missing;
        // A step that failed leaves some.
        self.queues.iter_mut().for_each(Queue::clear);
        self.norm = SquaredNorm::default();
        self.decided = false;
        // A tensor without elements has nothing to wait for.
        self.completed = (0..self.tensors.len()).filter(|&index| self.tensors[index].missing == 0).collect();
    }

    /// Gives this rank's gradient of one bucket, and hands the frames that may leave now to `out` one by one, first
    /// those to the next rank (so that every link has one inflow at a time).
    ///
    /// # Panics
    /// When the gradient has not the bucket's length, or was given before.
    pub fn give(&mut self, bucket: usize, values: Vec<f32>, out: &mut dyn FnMut(Outgoing)) {
        let (nodes, plan) = (self.group.nodes(), self.plan.clone());
        assert!(self.buckets[bucket].given.is_none(), "one gradient a step");
        assert_eq!(values.len(), plan.buckets()[bucket].elements, "the plan's shape");
        self.buckets[bucket].given = Some(values);
        for &index in &plan.buckets()[bucket].parameters {
            for owner in nodes.others().chain([nodes.rank]) {
                for (chunk, range) in self.chunks_of(index, owner).enumerate() {
                    match nodes.adds(owner) {
                        member if member == nodes.rank => self.add_members(index, nodes.node(owner), chunk),
                        member => self.queues[member].push(Job::Encode(Phase::Inner, index, range)),
                    }
                }
            }
        }
        self.pump(out);
    }

    /// As [`take`](Self::take), and hands the frames that follow from it to `out`.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn receive(
        &mut self,
        from: usize,
        frame: &Bytes,
        out: &mut dyn FnMut(Outgoing),
    ) -> Result<Phase, ExchangeError> {
        let phase = self.take(from, frame)?;
        self.pump(out);
        Ok(phase)
    }

    /// Takes a frame that `from` sent, and says which way it went. What follows from it waits for
    /// [`pump`](Self::pump).
    ///
    /// # Errors
    /// A frame that is damaged or has no place here; nothing is taken from it.
    pub fn take(&mut self, from: usize, frame: &Bytes) -> Result<Phase, ExchangeError> {
        let wrong = |error| ExchangeError::Frame { from, step: self.step, error };
        let (header, payload) = Header::read(frame).map_err(wrong)?;
        header.check_now(self.group.epoch, self.step).map_err(wrong)?;
        let (nodes, (index, owner, chunk, range)) = (self.group.nodes(), self.place(from, &header)?);
        let payload = Payload::new(header.codec, range.len(), payload).map_err(|error| {
            let parameter = self.plan.parameters()[index].name.clone();
            ExchangeError::Payload { from, step: self.step, parameter, error }
        })?;
        let tensor = &mut self.tensors[index];
        match header.phase {
            Phase::Inner => {
                tensor.inner[nodes.node(owner)][chunk].parts[nodes.place(from)] = Some(payload);
                self.add_members(index, nodes.node(owner), chunk);
            }
            Phase::Scatter => {
                tensor.parts[chunk][nodes.node(from)] = Some(payload);
                if self.by_arrival {
                    tensor.arrived[chunk].push(nodes.node(from));
                }
                self.reduce(index, chunk);
            }
            Phase::Gather => {
                let start = range.start;
                tensor.sum.put_copy(owner, chunk, &payload);
                self.arrived(index, owner, chunk);
                if nodes.adds(owner) == nodes.rank {
                    nodes.mates().for_each(|mate| self.queues[mate].push(Job::Ready(index, start, frame.clone())));
                }
            }
        }
        Ok(header.phase)
    }

    /// Whether the whole sum is here.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// A chunk's sum is here.
    fn arrived(&mut self, index: usize, owner: usize, chunk: usize) {
        let tensor = &mut self.tensors[index];
        tensor.done[owner][chunk] = true;
        tensor.missing -= 1;
        self.missing -= 1;
        if tensor.missing == 0 {
            self.completed.push(index);
        }
    }

    /// The tensors whose whole sum is here since the last call, in the order in which they were complete.
    pub fn take_completed(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.completed)
    }

    /// The sum of one tensor over all ranks, the same bits on each; where parameters travel, what came of them.
    #[must_use]
    pub fn sum(&self, index: usize) -> Vec<f32> {
        let mut sum = vec![0.0; self.tensors[index].sum.len()];
        self.read(index, 0, &mut sum);
        sum
    }

    /// Decodes that sum from `start` on, which begins a block, to the end of a block or of the tensor; by all threads of the
    /// caller's pool.
    ///
    /// # Panics
    /// When it has no such part.
    pub fn read(&self, index: usize, start: usize, out: &mut [f32]) {
        self.tensors[index].sum.read(start, out);
    }

    /// The elements of a tensor that this rank owns.
    fn owned(&self, index: usize) -> Range<usize> {
        shard(self.tensors[index].sum.len(), self.group.rank, self.group.ranks)
    }

    /// The chunks of an owner's shard of a tensor.
    fn chunks_of(&self, index: usize, owner: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        chunks(shard(self.tensors[index].sum.len(), owner, self.group.ranks), self.group.chunk_blocks)
    }

    /// One of them.
    fn chunk(&self, index: usize, owner: usize, number: usize) -> Option<Range<usize>> {
        let shard = shard(self.tensors[index].sum.len(), owner, self.group.ranks);
        let size = self.group.chunk_blocks * BLOCK;
        let start = shard.start + number * size;
        (start < shard.end).then(|| start..(start + size).min(shard.end))
    }

    /// Where a part of a tensor lies in its bucket's buffer.
    fn lies(&self, index: usize, range: &Range<usize>) -> Range<usize> {
        let start = self.plan.slot(index).range.start;
        start + range.start..start + range.end
    }
}

/// The chunks of a shard.
fn chunks(shard: Range<usize>, chunk_blocks: usize) -> impl Iterator<Item = Range<usize>> {
    let size = chunk_blocks * BLOCK;
    (shard.start..shard.end).step_by(size).map(move |start| start..(start + size).min(shard.end))
}

#[cfg(test)]
mod tests;
