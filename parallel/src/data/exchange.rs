//! One rank's part in one step's sum: a state machine without sockets, threads or clocks.
//!
//! Gradients and frames go in, frames come out; whoever drives it moves them. Each tensor is cut into one shard an owner
//! ([`shard`](super::shard)) and each shard into chunks:
//!
//! 1. scatter: a rank encodes its gradient's chunk, with what it left out before (its residual as a sender), and sends
//!    it to the owner. Its own shard needs no encoding.
//! 2. The owner waits until a chunk has come from every rank, adds them **in rank order**, whatever the order of their
//!    arrival, and encodes the sum with what it left out before (its residual as an owner).
//! 3. gather: the owner sends the encoded sum to all and, like them, goes on with what a decoder reads. So all ranks
//!    have the same bits.
//!
//! The step ends with a vote: if any rank found a value that is not finite, all skip the step, and no residual changes.
//!
//! Encoding replaces a gradient by what it leaves out. So a bucket's buffer comes in as this rank's gradient, and if the
//! step counts it stays as the new residual, while the old residual's buffer goes back to be filled with the next
//! gradient. If the step is skipped the buffer goes back, and the old residual is as it was.

mod error;
mod place;
mod residual;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use compression::codec::{all_finite, reduce};
use compression::{BLOCK, Codec, Found, Part, Payload};

use super::plan::Plan;
use super::rules::codec_of;
use super::shard::shard;
use crate::frame::{Header, PAYLOAD_BYTES_MAX, Phase};

pub use error::ExchangeError;

/// A frame that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The rank that it goes to.
    pub to: usize,
    /// The bucket that it is of.
    pub bucket: usize,
    /// Header and payload. The frames of one sum to all ranks share their bytes.
    pub frame: Bytes,
}

/// Who we are in the group, and how tensors are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// This rank.
    pub rank: usize,
    /// Ranks of the group.
    pub ranks: usize,
    /// Changes whenever the group does.
    pub epoch: u32,
    /// Blocks of a chunk.
    pub chunk_blocks: usize,
}

/// What a rank found in a step; every rank sends its vote to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The step.
    pub step: u64,
    /// Whether everything was finite: gradients, sums and encodes.
    pub finite: bool,
}

/// What all ranks do with the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The sum counts, and so do the new residuals.
    Commit,
    /// Nothing of this step counts.
    Skip,
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
    payload: Vec<u8>,
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
    /// What this rank left out of the sums that it owns; empty for nothing.
    owner: Vec<f32>,
    /// The sum of our own shard, and then what is left out of it.
    reduced: Vec<f32>,
    /// For each chunk of our own shard, what the other ranks sent.
    parts: Vec<Vec<Option<Payload<Bytes>>>>,
    /// For each of them, the ranks in the order in which their parts came; kept for a control only.
    arrived: Vec<Vec<usize>>,
    /// The sum, as far as `done` says.
    sum: Vec<f32>,
    /// For each chunk of each shard, whether its sum is here.
    done: Vec<Vec<bool>>,
}

/// One bucket of the plan.
#[derive(Debug, Default)]
struct Bucket {
    /// What this rank left out when it sent to owners, zero in its own shards; empty for nothing.
    sender: Vec<f32>,
    /// Once it was given: our own gradient in our own shards, and what is left of it in all others.
    given: Option<Vec<f32>>,
}

impl Exchange {
    /// A side that has left out nothing yet.
    ///
    /// # Panics
    /// When the rank is not in the group, or chunks are empty or larger than a frame.
    #[must_use]
    pub fn new(plan: Arc<Plan>, group: Group, codec: Codec) -> Self {
        assert!(group.rank < group.ranks && (1..=CHUNK_BLOCKS_MAX).contains(&group.chunk_blocks), "{group:?}");
        let tensors = plan.parameters().iter().map(|parameter| {
            let elements = parameter.elements();
            let chunks = |owner| chunks(shard(elements, owner, group.ranks), group.chunk_blocks).count();
            Tensor {
                codec: codec_of(parameter, codec),
                owner: Vec::new(),
                reduced: Vec::new(),
                parts: vec![vec![None; group.ranks]; chunks(group.rank)],
                arrived: vec![Vec::new(); chunks(group.rank)],
                sum: vec![0.0; elements],
                done: (0..group.ranks).map(|owner| vec![false; chunks(owner)]).collect(),
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
            payload: Vec::new(),
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

    /// Forgets what this rank left out as an owner: the control of a test, and of no other use.
    pub fn forget_owner(&mut self) {
        self.tensors.iter_mut().for_each(|tensor| tensor.owner = Vec::new());
    }

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
    /// sent with the next gradient, whatever the codec; one that leaves nothing out sends all of it.
    pub const fn set_codec(&mut self, codec: Codec) {
        self.codec = codec;
    }

    /// The next step that counts sends everything uncompressed, with everything that was left out: all residuals are
    /// zero after it.
    pub const fn flush(&mut self) {
        self.flush = Flush::Asked;
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
        self.buckets.iter_mut().for_each(|bucket| bucket.given = None);
        for (tensor, parameter) in self.tensors.iter_mut().zip(self.plan.parameters()) {
            tensor.codec = if flushes { Codec::Fp32 } else { codec_of(parameter, self.codec) };
            tensor.parts.iter_mut().flatten().for_each(|part| *part = None);
            tensor.arrived.iter_mut().for_each(Vec::clear);
            tensor.done.iter_mut().flatten().for_each(|done| *done = false);
            tensor.reduced.resize(shard(tensor.sum.len(), rank, self.group.ranks).len(), 0.0);
            self.missing += tensor.done.iter().map(Vec::len).sum::<usize>();
            self.own_missing += tensor.done[rank].len();
        }
    }

    /// Gives this rank's gradient of one bucket, and hands the frames that follow from it to `out` one by one, first
    /// those to the next rank (so that every link has one inflow at a time).
    ///
    /// # Panics
    /// When the gradient has not the bucket's length, or was given before.
    pub fn give(&mut self, bucket: usize, mut values: Vec<f32>, out: &mut dyn FnMut(Outgoing)) {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        let plan = self.plan.clone();
        assert!(self.buckets[bucket].given.is_none(), "one gradient a step");
        assert_eq!(values.len(), plan.buckets()[bucket].elements, "the plan's shape");
        for &index in &plan.buckets()[bucket].parameters {
            let gradient = &mut values[plan.slot(index).range.clone()];
            for to in (1..ranks).map(|k| (rank + k) % ranks) {
                for range in chunks(shard(gradient.len(), to, ranks), chunk_blocks) {
                    self.encode(index, &range, &mut gradient[range.clone()]);
                    out(Outgoing { to, bucket, frame: self.frame(Phase::Scatter, index, &range) });
                }
            }
            self.finite &= all_finite(&gradient[self.owned(index)]);
        }
        self.buckets[bucket].given = Some(values);
        for &index in &plan.buckets()[bucket].parameters {
            for chunk in 0..self.tensors[index].parts.len() {
                self.reduce(index, chunk, out);
            }
        }
    }

    /// Encodes a chunk of our gradient, with what was left out before.
    fn encode(&mut self, index: usize, range: &Range<usize>, values: &mut [f32]) {
        let (codec, slot) = (self.tensors[index].codec, self.plan.slot(index));
        let sender = &self.buckets[slot.bucket].sender;
        let residual = match sender.is_empty() {
            true => &self.zeros[..values.len()],
            false => &sender[slot.range.start + range.start..slot.range.start + range.end],
        };
        self.payload.resize(codec.payload_bytes(values.len()), 0);
        if codec.encode(values, residual, &mut self.payload) == Found::NonFinite {
            // The owner must not wait: it gets zeros, and the vote makes everybody skip.
            self.finite = false;
            codec.write_zeros(values.len(), &mut self.payload);
        }
    }

    /// Takes a frame that `from` sent, hands the frames that follow from it to `out`, and says which way it went.
    ///
    /// # Errors
    /// A frame that is damaged or has no place here; nothing is taken from it.
    pub fn receive(
        &mut self,
        from: usize,
        frame: &Bytes,
        out: &mut dyn FnMut(Outgoing),
    ) -> Result<Phase, ExchangeError> {
        let wrong = |error| ExchangeError::Frame { from, error };
        let (header, payload) = Header::read(frame).map_err(wrong)?;
        header.check_now(self.group.epoch, self.step).map_err(wrong)?;
        let (index, owner, chunk, range) = self.place(from, &header)?;
        let payload = Payload::new(header.codec, range.len(), payload).map_err(|error| {
            let parameter = self.plan.parameters()[index].name.clone();
            ExchangeError::Payload { from, step: self.step, parameter, error }
        })?;
        let tensor = &mut self.tensors[index];
        match header.phase {
            Phase::Scatter => {
                tensor.parts[chunk][from] = Some(payload);
                if self.by_arrival {
                    tensor.arrived[chunk].push(from);
                }
                self.reduce(index, chunk, out);
            }
            Phase::Gather => {
                payload.decode(&mut tensor.sum[range]);
                tensor.done[owner][chunk] = true;
                self.missing -= 1;
            }
        }
        Ok(header.phase)
    }

    /// Whether every sum that this rank owns is reduced and encoded, so that it can vote.
    #[must_use]
    pub const fn is_reduced(&self) -> bool {
        self.own_missing == 0
    }

    /// The first thing in the order of the backward pass that another rank has not sent yet: the rank, and the
    /// parameter. `None` when nothing is missing, or what is missing is our own.
    #[must_use]
    pub fn first_missing(&self) -> Option<(usize, usize)> {
        let Group { rank, ranks, .. } = self.group;
        let others = || (0..ranks).filter(move |&other| other != rank);
        let of = |index: usize| {
            let tensor = &self.tensors[index];
            let waits = |chunk: usize, other: usize| !tensor.done[rank][chunk] && tensor.parts[chunk][other].is_none();
            let part = |other: &usize| (0..tensor.parts.len()).any(|chunk| waits(chunk, *other));
            let sum = |other: &usize| tensor.done[*other].iter().any(|done| !done);
            // Whoever has not sent its part delays the sum of every other.
            others().find(part).or_else(|| others().find(sum)).map(|other| (other, index))
        };
        self.plan.buckets().iter().flat_map(|bucket| &bucket.parameters).find_map(|&index| of(index))
    }

    /// Whether the whole sum is here.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// What this rank found. To be sent once its last owned chunk is reduced.
    #[must_use]
    pub const fn vote(&self) -> Vote {
        Vote { step: self.step, finite: self.finite }
    }

    /// Ends the step as all ranks' votes say, and gives back buffers for the next gradients, one a bucket. They may be
    /// empty, and hold whatever they hold.
    ///
    /// # Panics
    /// When the sum is not complete, or the votes are not one of each rank for this step.
    pub fn close(&mut self, votes: &[Vote]) -> (Verdict, Vec<Vec<f32>>) {
        assert!(self.is_complete(), "{} chunks are missing", self.missing);
        assert!(votes.len() == self.group.ranks && votes.iter().all(|vote| vote.step == self.step), "{votes:?}");
        let verdict = if votes.iter().all(|vote| vote.finite) { Verdict::Commit } else { Verdict::Skip };
        if verdict == Verdict::Commit {
            if self.flush == Flush::Now {
                self.flush = Flush::No;
            }
            self.commit();
        }
        let buffers = self.buckets.iter_mut().map(|bucket| bucket.given.take().unwrap_or_default());
        (verdict, buffers.collect())
    }

    /// The sum of one tensor over all ranks, the same bits on each.
    #[must_use]
    pub fn sum(&self, index: usize) -> &[f32] {
        &self.tensors[index].sum
    }

    /// The elements of a tensor that this rank owns.
    fn owned(&self, index: usize) -> Range<usize> {
        shard(self.tensors[index].sum.len(), self.group.rank, self.group.ranks)
    }

    /// Adds a chunk of our own shard as soon as every rank's part is here.
    fn reduce(&mut self, index: usize, chunk: usize, out: &mut dyn FnMut(Outgoing)) {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        let (whole, slot) = (self.owned(index), self.plan.slot(index).clone());
        let Some(range) = chunks(whole.clone(), chunk_blocks).nth(chunk) else { return };
        let Some(given) = &self.buckets[slot.bucket].given else { return };
        let tensor = &mut self.tensors[index];
        let missing = |(from, part): (usize, &Option<_>)| from != rank && part.is_none();
        if tensor.done[rank][chunk] || tensor.parts[chunk].iter().enumerate().any(missing) {
            return;
        }
        let own = &given[slot.range.clone()][range.clone()];
        let part = |from: usize| tensor.parts[chunk][from].as_ref().map_or(Part::Values(own), Part::Encoded);
        let parts: Vec<_> = match self.by_arrival {
            false => (0..ranks).map(part).collect(),
            true => tensor.arrived[chunk].iter().copied().chain([rank]).map(part).collect(),
        };
        let inside = range.start - whole.start..range.end - whole.start;
        let sum = &mut tensor.reduced[inside.clone()];
        reduce(&parts, sum);
        let second = tensor.codec.second_stage();
        let residual = if tensor.owner.is_empty() { &self.zeros[..sum.len()] } else { &tensor.owner[inside] };
        self.payload.resize(second.payload_bytes(sum.len()), 0);
        if second.encode(sum, residual, &mut self.payload) == Found::NonFinite {
            self.finite = false;
            second.write_zeros(range.len(), &mut self.payload);
        }
        let payload = Payload::new(second, range.len(), &self.payload).expect("an encoder's payload");
        payload.decode(&mut tensor.sum[range.clone()]);
        tensor.done[rank][chunk] = true;
        // Their memory goes back as soon as they are added.
        tensor.parts[chunk].fill(None);
        self.missing -= 1;
        self.own_missing -= 1;
        if ranks > 1 {
            let frame = self.frame(Phase::Gather, index, &range);
            let bucket = slot.bucket;
            (1..ranks).for_each(|k| out(Outgoing { to: (rank + k) % ranks, bucket, frame: frame.clone() }));
        }
    }

    fn frame(&self, phase: Phase, index: usize, range: &Range<usize>) -> Bytes {
        let codec = match phase {
            Phase::Scatter => self.tensors[index].codec,
            Phase::Gather => self.tensors[index].codec.second_stage(),
        };
        let header = Header {
            phase,
            codec,
            epoch: self.group.epoch,
            step: self.step,
            bucket: self.plan.slot(index).bucket as u32,
            tensor: index as u32,
            start: range.start as u64,
            elements: range.len() as u32,
        };
        header.frame(&self.payload)
    }
}

/// The chunks of a shard.
fn chunks(shard: Range<usize>, chunk_blocks: usize) -> impl Iterator<Item = Range<usize>> {
    let size = chunk_blocks * BLOCK;
    (shard.start..shard.end).step_by(size).map(move |start| start..(start + size).min(shard.end))
}

#[cfg(test)]
mod tests;
