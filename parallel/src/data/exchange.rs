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

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use compression::codec::all_finite;
use compression::{BLOCK, Codec, Found, PayloadError, Residual};
use thiserror::Error;

use super::plan::{Parameter, Plan};
use super::shard::shard;
use crate::frame::{FrameError, HEADER_BYTES, Header, Phase};

/// A frame that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The rank that it goes to.
    pub to: usize,
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

/// Why the sum cannot be completed. Nothing was taken from the frame.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExchangeError {
    /// Not a frame of this step.
    #[error("rank {from}: {error}")]
    Frame {
        /// Who sent it.
        from: usize,
        /// What is wrong.
        error: FrameError,
    },
    /// A payload that its codec does not write.
    #[error("rank {from}, step {step}, parameter {parameter}: {error}")]
    Payload {
        /// Who sent it.
        from: usize,
        /// The step.
        step: u64,
        /// The parameter's logical name.
        parameter: String,
        /// What is wrong.
        error: PayloadError,
    },
    /// A frame that has no place here: another cut of the tensor, another owner, another codec, or a second one.
    #[error("rank {from}, step {step}, {place}: {what}; do all ranks run the same recipe and build?")]
    Place {
        /// Who sent it.
        from: usize,
        /// The step.
        step: u64,
        /// Where it claims to belong.
        place: String,
        /// Expected, found.
        what: String,
    },
}

/// Tensors of fewer elements travel as `fp32`: they are a small part of the bytes and sensitive.
pub const SMALL_ELEMENTS: usize = 64 << 10;

/// The codec that a parameter's gradient travels in when the recipe asks for `codec`.
#[must_use]
pub fn codec_of(parameter: &Parameter, codec: Codec) -> Codec {
    let elements: usize = parameter.shape.iter().product();
    if parameter.shape.len() < 2 || elements < SMALL_ELEMENTS { Codec::Fp32 } else { codec }
}

/// A rank's side of the sum.
#[derive(Debug)]
pub struct Exchange {
    plan: Arc<Plan>,
    group: Group,
    step: u64,
    tensors: Vec<Tensor>,
    finite: bool,
    /// Chunks of all tensors whose sum is not here yet, and how many of them are our own.
    missing: usize,
    own_missing: usize,
    payload: Vec<u8>,
    feedback: bool,
}

/// One tensor of the plan.
#[derive(Debug)]
struct Tensor {
    codec: Codec,
    /// What this rank left out when it sent to owners; zero in its own shard.
    sender: Residual,
    /// What this rank left out of the sums that it owns.
    owner: Residual,
    /// Our own gradient of our own shard, and whether it is here.
    own: Vec<f32>,
    given: bool,
    /// For each chunk of our own shard, what the other ranks sent.
    parts: Vec<Vec<Option<Bytes>>>,
    /// The sum, as far as `done` says.
    sum: Vec<f32>,
    /// For each chunk of each shard, whether its sum is here.
    done: Vec<Vec<bool>>,
}

impl Exchange {
    /// A side that has left out nothing yet.
    ///
    /// # Panics
    /// When the rank is not in the group, or chunks are empty.
    #[must_use]
    pub fn new(plan: Arc<Plan>, group: Group, codec: Codec) -> Self {
        assert!(group.rank < group.ranks && group.chunk_blocks > 0, "{group:?}");
        let tensors = plan.parameters().iter().map(|parameter| {
            let elements = parameter.shape.iter().product();
            let owned = shard(elements, group.rank, group.ranks).len();
            let chunks = |owner| chunks(shard(elements, owner, group.ranks), group.chunk_blocks).count();
            Tensor {
                codec: codec_of(parameter, codec),
                sender: Residual::zeros(elements),
                owner: Residual::zeros(owned),
                own: vec![0.0; owned],
                given: false,
                parts: vec![vec![None; group.ranks]; chunks(group.rank)],
                sum: vec![0.0; elements],
                done: (0..group.ranks).map(|owner| vec![false; chunks(owner)]).collect(),
            }
        });
        let tensors = tensors.collect();
        let payload = Vec::new();
        Self { plan, group, step: 0, tensors, finite: true, missing: 0, own_missing: 0, payload, feedback: true }
    }

    /// A side that forgets what it left out: the control of error feedback's proofs, and of no other use.
    #[must_use]
    pub const fn without_feedback(mut self) -> Self {
        self.feedback = false;
        self
    }

    /// Forgets what this rank left out as an owner: the control of a test, and of no other use.
    pub fn forget_owner(&mut self) {
        for tensor in &mut self.tensors {
            tensor.owner = Residual::zeros(tensor.own.len());
        }
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

    /// Goes on with what a checkpoint kept of one tensor: what this rank left out as a sender, and as an owner.
    ///
    /// # Panics
    /// When the lengths are not those of [`residuals`](Self::residuals).
    pub fn restore(&mut self, index: usize, sender: Vec<f32>, owner: Vec<f32>) {
        let tensor = &mut self.tensors[index];
        assert!(sender.len() == tensor.sum.len() && owner.len() == tensor.own.len(), "the plan's shape");
        tensor.sender = Residual::restore(sender);
        tensor.owner = Residual::restore(owner);
    }

    /// The codec that one tensor travels in.
    #[must_use]
    pub fn codec(&self, index: usize) -> Codec {
        self.tensors[index].codec
    }

    /// Starts a step.
    pub fn begin(&mut self, step: u64) {
        self.step = step;
        self.finite = true;
        self.missing = 0;
        self.own_missing = 0;
        let rank = self.group.rank;
        for tensor in &mut self.tensors {
            tensor.given = false;
            tensor.parts.iter_mut().flatten().for_each(|part| *part = None);
            tensor.done.iter_mut().flatten().for_each(|done| *done = false);
            self.missing += tensor.done.iter().map(Vec::len).sum::<usize>();
            self.own_missing += tensor.done[rank].len();
        }
    }

    /// Gives this rank's gradient of one tensor, and hands the frames that follow from it to `out` one by one, first
    /// those to the next rank (so that every link has one inflow at a time).
    ///
    /// # Errors
    /// A part that another rank sent before cannot be decoded.
    ///
    /// # Panics
    /// When the gradient has not the tensor's length, or was given before.
    pub fn give(&mut self, index: usize, gradient: &[f32], out: &mut dyn FnMut(Outgoing)) -> Result<(), ExchangeError> {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        assert!(!self.tensors[index].given, "one gradient a step");
        assert_eq!(gradient.len(), self.tensors[index].sum.len(), "the plan's shape");
        for to in (1..ranks).map(|k| (rank + k) % ranks) {
            for range in chunks(shard(gradient.len(), to, ranks), chunk_blocks) {
                let tensor = &mut self.tensors[index];
                let (old, new) = tensor.sender.split(range.clone());
                let found = tensor.codec.encode(&gradient[range.clone()], old, &mut self.payload, new);
                self.finite &= found == Found::Finite;
                if found == Found::NonFinite {
                    // The owner must not wait: it gets zeros, and the vote makes everybody skip.
                    self.payload.fill(0);
                }
                out(Outgoing { to, frame: self.frame(Phase::Scatter, index, &range) });
            }
        }
        let own = shard(gradient.len(), rank, ranks);
        self.finite &= all_finite(&gradient[own.clone()]);
        let tensor = &mut self.tensors[index];
        tensor.own.copy_from_slice(&gradient[own]);
        tensor.given = true;
        for chunk in 0..self.tensors[index].parts.len() {
            self.reduce(index, chunk, out)?;
        }
        Ok(())
    }

    /// Takes a frame that `from` sent, and hands the frames that follow from it to `out`.
    ///
    /// # Errors
    /// A frame that is damaged or has no place here.
    pub fn receive(&mut self, from: usize, frame: &Bytes, out: &mut dyn FnMut(Outgoing)) -> Result<(), ExchangeError> {
        let wrong = |error| ExchangeError::Frame { from, error };
        let (header, payload) = Header::read(frame).map_err(wrong)?;
        header.check_now(self.group.epoch, self.step).map_err(wrong)?;
        let (index, owner, chunk, range) = self.place(from, &header)?;
        match header.phase {
            Phase::Scatter => {
                self.tensors[index].parts[chunk][from] = Some(frame.slice(HEADER_BYTES..));
                self.reduce(index, chunk, out)?;
            }
            Phase::Gather => {
                let (step, tensor) = (self.step, &mut self.tensors[index]);
                let parameter = || self.plan.parameters()[index].name.clone();
                header.codec.decode(payload, &mut tensor.sum[range]).map_err(|error| ExchangeError::Payload {
                    from,
                    step,
                    parameter: parameter(),
                    error,
                })?;
                tensor.done[owner][chunk] = true;
                self.missing -= 1;
            }
        }
        Ok(())
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
            let part = |other: &usize| tensor.parts.iter().any(|parts| parts[*other].is_none());
            let sum = |other: &usize| tensor.done[*other].iter().any(|done| !done);
            // Whoever has not sent its part delays the sum of every other.
            let late = others().find(|other| !tensor.done[rank].iter().all(|&done| done) && part(other));
            late.or_else(|| others().find(sum)).map(|other| (other, index))
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

    /// Ends the step as all ranks' votes say.
    ///
    /// # Panics
    /// When the sum is not complete, or the votes are not one of each rank for this step.
    pub fn close(&mut self, votes: &[Vote]) -> Verdict {
        assert!(self.is_complete(), "{} chunks are missing", self.missing);
        assert!(votes.len() == self.group.ranks && votes.iter().all(|vote| vote.step == self.step), "{votes:?}");
        if votes.iter().any(|vote| !vote.finite) {
            return Verdict::Skip;
        }
        for tensor in self.tensors.iter_mut().filter(|_| self.feedback) {
            tensor.sender.commit();
            tensor.owner.commit();
        }
        Verdict::Commit
    }

    /// The sum of one tensor over all ranks, the same bits on each.
    #[must_use]
    pub fn sum(&self, index: usize) -> &[f32] {
        &self.tensors[index].sum
    }

    /// What this rank's committed steps left out of one tensor: as a sender over the whole tensor, and as the owner of
    /// its shard.
    #[must_use]
    pub fn residuals(&self, index: usize) -> [&[f32]; 2] {
        [self.tensors[index].sender.committed(), self.tensors[index].owner.committed()]
    }

    /// Adds a chunk of our own shard as soon as every rank's part is here.
    fn reduce(&mut self, index: usize, chunk: usize, out: &mut dyn FnMut(Outgoing)) -> Result<(), ExchangeError> {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        let tensor = &mut self.tensors[index];
        let whole = shard(tensor.sum.len(), rank, ranks);
        let Some(range) = chunks(whole.clone(), chunk_blocks).nth(chunk) else { return Ok(()) };
        let others = tensor.parts[chunk].iter().enumerate().filter(|&(from, _)| from != rank);
        if !tensor.given || tensor.done[rank][chunk] || others.clone().any(|(_, part)| part.is_none()) {
            return Ok(());
        }
        let inside = range.start - whole.start..range.end - whole.start;
        let mut sum = vec![0.0f32; range.len()];
        for (from, part) in tensor.parts[chunk].iter().enumerate() {
            match part {
                Some(part) if from != rank => tensor.codec.decode_add(part, &mut sum).map_err(|error| {
                    let parameter = self.plan.parameters()[index].name.clone();
                    ExchangeError::Payload { from, step: self.step, parameter, error }
                })?,
                _ => sum.iter_mut().zip(&tensor.own[inside.clone()]).for_each(|(sum, own)| *sum += own),
            }
        }
        let second = tensor.codec.second_stage();
        let (old, new) = tensor.owner.split(inside);
        let found = second.encode(&sum, old, &mut self.payload, new);
        self.finite &= found == Found::Finite;
        if found == Found::NonFinite {
            self.payload.fill(0);
        }
        let decoded = second.decode(&self.payload, &mut tensor.sum[range.clone()]);
        assert_eq!(decoded, Ok(()), "an encoder's payload can be decoded");
        tensor.done[rank][chunk] = true;
        // Their memory goes back as soon as they are added.
        tensor.parts[chunk].iter_mut().for_each(|part| *part = part.take().map(|_| Bytes::new()));
        self.missing -= 1;
        self.own_missing -= 1;
        if ranks > 1 {
            let frame = self.frame(Phase::Gather, index, &range);
            (1..ranks).for_each(|k| out(Outgoing { to: (rank + k) % ranks, frame: frame.clone() }));
        }
        Ok(())
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
        let mut frame = Vec::new();
        header.write(&self.payload, &mut frame);
        frame.into()
    }

    /// Where a frame belongs: tensor, owner, chunk of the owner's shard, and elements.
    fn place(&self, from: usize, header: &Header) -> Result<(usize, usize, usize, Range<usize>), ExchangeError> {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        let index = header.tensor as usize;
        let name = self.plan.parameters().get(index).map_or("no parameter", |parameter| &parameter.name);
        let misplaced = |what: String| {
            let place = format!("{name}, element {}", header.start);
            ExchangeError::Place { from, step: self.step, place, what }
        };
        if from >= ranks || from == rank {
            return Err(misplaced(format!("expected another rank of {ranks}, this is rank {rank}")));
        }
        let Some(tensor) = self.tensors.get(index) else {
            return Err(misplaced(format!("expected one of {} parameters, found number {index}", self.tensors.len())));
        };
        let (owner, codec) = match header.phase {
            Phase::Scatter => (rank, tensor.codec),
            Phase::Gather => (from, tensor.codec.second_stage()),
        };
        if header.codec != codec {
            return Err(misplaced(format!("expected {codec}, found {}", header.codec)));
        }
        let mut list = chunks(shard(tensor.sum.len(), owner, ranks), chunk_blocks).enumerate();
        let fits = |range: &Range<usize>| {
            range.start as u64 == header.start && range.len() as u64 == u64::from(header.elements)
        };
        let Some((chunk, range)) = list.find(|(_, range)| fits(range)) else {
            return Err(misplaced(format!("no chunk of rank {owner}'s shard has these {} elements", header.elements)));
        };
        let second = match header.phase {
            Phase::Scatter => tensor.parts[chunk][from].is_some(),
            Phase::Gather => tensor.done[owner][chunk],
        };
        if second {
            return Err(misplaced("a second frame for one chunk".into()));
        }
        Ok((index, owner, chunk, range))
    }
}

/// The chunks of a shard.
fn chunks(shard: Range<usize>, chunk_blocks: usize) -> impl Iterator<Item = Range<usize>> {
    let size = chunk_blocks * BLOCK;
    (shard.start..shard.end).step_by(size).map(move |start| start..(start + size).min(shard.end))
}

#[cfg(test)]
mod tests;
