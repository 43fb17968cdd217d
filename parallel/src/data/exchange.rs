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

use compression::{BLOCK, Codec, Found, PayloadError, Residual};
use thiserror::Error;

use super::plan::{Parameter, Plan};
use super::shard::shard;
use crate::frame::{FrameError, Header, Phase};

/// A frame that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The rank that it goes to.
    pub to: usize,
    /// Header and payload. The frames of one sum to all ranks share their bytes.
    pub frame: Arc<[u8]>,
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
    /// Chunks of all tensors whose sum is not here yet.
    missing: usize,
    payload: Vec<u8>,
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
    parts: Vec<Vec<Option<Box<[u8]>>>>,
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
        Self { plan, group, step: 0, tensors, finite: true, missing: 0, payload: Vec::new() }
    }

    /// Starts a step.
    pub fn begin(&mut self, step: u64) {
        self.step = step;
        self.finite = true;
        self.missing = 0;
        for tensor in &mut self.tensors {
            tensor.given = false;
            tensor.parts.iter_mut().flatten().for_each(|part| *part = None);
            tensor.done.iter_mut().flatten().for_each(|done| *done = false);
            self.missing += tensor.done.iter().map(Vec::len).sum::<usize>();
        }
    }

    /// Gives this rank's gradient of one tensor, and returns the frames that follow from it, first those to the next
    /// rank (so that every link has one inflow at a time).
    ///
    /// # Errors
    /// A part that another rank sent before cannot be decoded.
    ///
    /// # Panics
    /// When the gradient has not the tensor's length, or was given before.
    pub fn give(&mut self, index: usize, gradient: &[f32]) -> Result<Vec<Outgoing>, ExchangeError> {
        let Group { rank, ranks, chunk_blocks, .. } = self.group;
        assert!(!self.tensors[index].given, "one gradient a step");
        assert_eq!(gradient.len(), self.tensors[index].sum.len(), "the plan's shape");
        let mut out = Vec::new();
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
                out.push(Outgoing { to, frame: self.frame(Phase::Scatter, index, &range) });
            }
        }
        let own = shard(gradient.len(), rank, ranks);
        self.finite &= gradient[own.clone()].iter().all(|x| x.is_finite());
        let tensor = &mut self.tensors[index];
        tensor.own.copy_from_slice(&gradient[own]);
        tensor.given = true;
        for chunk in 0..self.tensors[index].parts.len() {
            self.reduce(index, chunk, &mut out)?;
        }
        Ok(out)
    }

    /// Takes a frame that `from` sent, and returns the frames that follow from it.
    ///
    /// # Errors
    /// A frame that is damaged or has no place here.
    pub fn receive(&mut self, from: usize, frame: &[u8]) -> Result<Vec<Outgoing>, ExchangeError> {
        let wrong = |error| ExchangeError::Frame { from, error };
        let (header, payload) = Header::read(frame).map_err(wrong)?;
        header.check_now(self.group.epoch, self.step).map_err(wrong)?;
        let (index, owner, chunk, range) = self.place(from, &header)?;
        let mut out = Vec::new();
        match header.phase {
            Phase::Scatter => {
                self.tensors[index].parts[chunk][from] = Some(payload.into());
                self.reduce(index, chunk, &mut out)?;
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
        Ok(out)
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
        for tensor in &mut self.tensors {
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
    fn reduce(&mut self, index: usize, chunk: usize, out: &mut Vec<Outgoing>) -> Result<(), ExchangeError> {
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
        self.missing -= 1;
        if ranks > 1 {
            let frame = self.frame(Phase::Gather, index, &range);
            out.extend((1..ranks).map(|k| Outgoing { to: (rank + k) % ranks, frame: frame.clone() }));
        }
        Ok(())
    }

    fn frame(&self, phase: Phase, index: usize, range: &Range<usize>) -> Arc<[u8]> {
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
