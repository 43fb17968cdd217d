//! From the backward pass to the sum.
//!
//! A step is `begin`, then for each micro-batch `begin_micro_batch` and the taps' calls of `add`, then `vote`. Micro-
//! batches add up in the bucket's buffer in the order in which they ran, starting from zero; a bucket is complete when
//! the last micro-batch has given all of its parameters. With one rank the sum is the buffer itself: nothing is encoded
//! and nothing is sent. With several, a complete bucket goes to the [engine] at once.
//!
//! `vote` waits until all ranks have voted. Then it is decided whether the step counts, and the norm of the sum is known;
//! the sum itself may still be on its way. `with_sum` waits for that of one parameter, which the next forward pass does
//! just before it needs it, and `settle` for all that is left. The next step begins after that. `finish` is `vote` and
//! `settle` at once.

mod buckets;
mod error;
mod outcome;
mod owned;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use burn::Tensor;
use compression::BLOCK;
use rayon::prelude::*;

use super::engine::{self, Engine};
use super::exchange::Verdict;
use super::norm::SquaredNorm;
use super::owed::Owed;
use super::plan::Plan;
use crate::note::Ballot;
use crate::transport::Counted;

use buckets::{State, read};
pub use error::StreamError;
use outcome::Lies;
pub use outcome::{Complete, Finished, Sum, Timing, Voted};

/// A gradient on its way into a bucket, opaque to everything above: where it lies is its own business.
pub enum Gradient<'a> {
    /// Elements in host memory, row-major.
    Host(&'a [f32]),
    /// A tensor on any device; its elements are read back when the bucket takes them.
    Device(Box<Tensor<1>>),
}

/// Takes gradients in any order within a micro-batch and hands back their sum by parameter.
#[derive(Debug)]
pub struct GradientStream {
    plan: Arc<Plan>,
    state: Mutex<State>,
    /// The way to the other ranks, if there are any.
    engine: Option<Engine>,
    /// What several ranks left out before this one was alone. Taken after the state, where both are.
    owed: Mutex<Owed>,
    /// A part of a sum, while somebody reads it.
    decoded: Mutex<Vec<f32>>,
}

impl GradientStream {
    /// A stream with a buffer of 4 bytes for each element of the plan.
    #[must_use]
    pub fn new(plan: Arc<Plan>) -> Self {
        Self::with(plan, None)
    }

    /// One rank's stream of several.
    #[must_use]
    pub fn across(engine: Engine) -> Self {
        let plan = engine.exchange().plan().clone();
        Self::with(plan, Some(engine))
    }

    fn with(plan: Arc<Plan>, engine: Option<Engine>) -> Self {
        let state = State {
            step: 0,
            buffers: plan.buckets().iter().map(|bucket| vec![0.0; bucket.elements]).collect(),
            given: vec![0; plan.parameters().len()],
            missing: vec![0; plan.buckets().len()],
            micro_batch: 0,
            micro_batches: 0,
            own: None,
            late: false,
            complete: Vec::with_capacity(plan.buckets().len()),
            fault: None,
        };
        Self { plan, state: Mutex::new(state), engine, owed: Mutex::default(), decoded: Mutex::default() }
    }

    /// From the next step on, keeps a copy of this rank's own gradient, which the way to the other ranks uses up.
    pub fn keep_own(&self) {
        self.lock().own = Some(vec![Vec::new(); self.plan.buckets().len()]);
    }

    /// From the next step on, no bucket leaves before [`vote`](Self::vote): the control of a test, and of no other use.
    pub fn be_late(&self) {
        self.lock().late = true;
    }

    /// This rank's own gradient of parameter `index` in the last finished step, micro-batches added; `None` unless it is
    /// kept.
    #[must_use]
    pub fn own(&self, index: usize) -> Option<Vec<f32>> {
        let slot = self.plan.slot(index);
        self.lock().own.as_ref().and_then(|own| own[slot.bucket].get(slot.range.clone())).map(<[f32]>::to_vec)
    }

    /// From the next step on, adds what several ranks had left out to this one's gradient, until it is settled.
    pub fn owe(&self, owed: Owed) {
        assert!(self.engine.is_none(), "with other ranks the exchange remembers");
        *self.owed() = owed;
    }

    /// What is still to be added. Whoever takes a step says whether it counted.
    pub fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sum of parameter `index` in the last finished step.
    #[must_use]
    pub fn last_sum(&self, index: usize) -> Vec<f32> {
        let slot = self.plan.slot(index);
        match &self.engine {
            Some(engine) => engine.exchange().sum(index),
            None => self.lock().buffers[slot.bucket][slot.range.clone()].to_vec(),
        }
    }

    /// What is summed.
    #[must_use]
    pub const fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The way to the other ranks; `None` with one.
    #[must_use]
    pub const fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }

    /// Bytes at the sockets so far.
    #[must_use]
    pub fn counted(&self) -> Counted {
        self.engine().map_or_else(Counted::default, Engine::counted)
    }

    /// Starts a step of `micro_batches` micro-batches: nothing was given.
    pub fn begin(&self, step: u64, micro_batches: usize) {
        assert!(micro_batches > 0, "a step has at least one micro-batch");
        let mut state = self.lock();
        state.step = step;
        state.micro_batches = micro_batches;
        state.micro_batch = 0;
        state.fault = None;
        state.complete.clear();
        state.given.fill(0);
        for (buffer, bucket) in state.buffers.iter_mut().zip(self.plan.buckets()) {
            // The engine keeps the buffers of a step that failed.
            buffer.resize(bucket.elements, 0.0);
        }
        for (missing, bucket) in state.missing.iter_mut().zip(self.plan.buckets()) {
            *missing = bucket.parameters.len();
        }
        drop(state);
        if let Some(engine) = self.engine() {
            engine.begin(step);
        }
    }

    /// Says which micro-batch the gradients that follow belong to.
    pub fn begin_micro_batch(&self, micro_batch: usize) {
        let mut state = self.lock();
        assert!(micro_batch < state.micro_batches, "micro-batch {micro_batch} of {}", state.micro_batches);
        state.micro_batch = micro_batch;
    }

    /// Reads a gradient of parameter `index` that is not to be added yet. A fault is kept like those of [`add`](Self::add).
    pub fn read<const D: usize>(&self, index: usize, gradient: Tensor<D>, with: impl FnOnce(&[f32])) {
        let elements = gradient.shape().num_elements();
        let mut state = self.lock();
        let name = &self.plan.parameters()[index].name;
        if let Err(fault) = read(gradient.reshape([elements]), with).map_err(|why| state.unreadable(name, why)) {
            state.fault.get_or_insert(fault);
        }
    }

    /// Adds one micro-batch's gradient of parameter `index`. A fault is kept and returned by [`vote`](Self::vote).
    pub fn add(&self, index: usize, gradient: Gradient<'_>) {
        let mut state = self.lock();
        if state.fault.is_some() {
            return;
        }
        let complete = state.complete.len();
        if let Err(fault) = state.add(&self.plan, index, gradient) {
            state.fault = Some(fault);
        } else if state.complete.len() > complete
            && !state.late
            && let Some(engine) = self.engine()
        {
            let bucket = self.plan.slot(index).bucket;
            engine.give(bucket, state.take(&self.plan, bucket));
        }
    }

    /// The buckets that are complete so far in this step, in the order in which they were.
    #[must_use]
    pub fn complete(&self) -> Vec<usize> {
        self.lock().complete.clone()
    }

    /// Nothing more comes in this step; a parameter that gave nothing has zeros. Waits until all ranks have voted. `ballot` is
    /// what this rank says of the step.
    ///
    /// # Errors
    /// The first fault of the step.
    pub fn vote(&self, ballot: Ballot) -> Result<Voted, StreamError> {
        let start = Instant::now();
        self.close(ballot)?;
        match &self.engine {
            Some(engine) => Ok(self.voted(engine.voted()?, start)),
            None => {
                let norm = self.own_norm().root();
                let finite = ballot.finite && norm.is_finite();
                let verdict = if finite { Verdict::Commit } else { Verdict::Skip };
                Ok(Voted { verdict, ballots: vec![ballot], norm, wait_s: 0.0 })
            }
        }
    }

    fn voted(&self, voted: engine::Voted, start: Instant) -> Voted {
        let engine::Voted { verdict, ballots, norm, buffers } = voted;
        self.lock().buffers = buffers;
        Voted { verdict, ballots, norm: norm.root(), wait_s: start.elapsed().as_secs_f64() }
    }

    /// The norm of what the buckets hold.
    fn own_norm(&self) -> SquaredNorm {
        const PIECE: usize = 256 * BLOCK;
        let state = self.lock();
        let pieces = (0..self.plan.parameters().len()).into_par_iter().flat_map(|index| {
            let slot = self.plan.slot(index);
            state.buffers[slot.bucket][slot.range.clone()].par_chunks(PIECE)
        });
        let of = |mut norm: SquaredNorm, piece: &[f32]| {
            norm.add(piece);
            norm
        };
        // Exact sums: whichever thread adds what, and in whatever order, the bits are the same.
        pieces.fold(SquaredNorm::default, of).reduce(SquaredNorm::default, |mut a, b| {
            a.merge(&b);
            a
        })
    }

    /// Gives `with` a part of the sum of parameter `index` over all micro-batches and ranks, row-major, once it is here; the same
    /// bits on every rank. To be called after the [vote](Self::vote), whose verdict was to commit.
    ///
    /// Between ranks the part is decoded for it, by all threads of the caller's pool, into memory that is used again: what has a few
    /// hundred KiB stays in a cache.
    ///
    /// # Errors
    /// A rank is lost or sends what makes no sense, or the run was aborted.
    ///
    /// # Panics
    /// When the parameter has no such part, or it does not begin and end with blocks of 128 elements or with the parameter.
    pub fn with_sum<R>(
        &self,
        index: usize,
        part: Range<usize>,
        with: impl FnOnce(&[f32]) -> R,
    ) -> Result<R, StreamError> {
        match &self.engine {
            Some(engine) => {
                engine.wait_for(index)?;
                Ok(self.decoded(engine, index, part, with))
            }
            None => {
                let slot = self.plan.slot(index);
                Ok(with(&self.lock().buffers[slot.bucket][slot.range.clone()][part]))
            }
        }
    }

    fn decoded<R>(&self, engine: &Engine, index: usize, part: Range<usize>, with: impl FnOnce(&[f32]) -> R) -> R {
        // It holds whatever a panic elsewhere left in it.
        let mut decoded = self.decoded.lock().unwrap_or_else(PoisonError::into_inner);
        decoded.resize(part.len(), 0.0);
        engine.read(index, part.start, &mut decoded);
        with(&decoded)
    }

    /// Waits until the whole sum is here: the step is over.
    ///
    /// # Errors
    /// As [`with_sum`](Self::with_sum).
    pub fn settle(&self) -> Result<Complete, StreamError> {
        match &self.engine {
            Some(engine) => Ok(engine.settled()?.into()),
            None => Ok(Complete::default()),
        }
    }

    /// [`vote`](Self::vote) and [`settle`](Self::settle), and the whole sum.
    ///
    /// # Errors
    /// The first fault of the step.
    pub fn finish(&self, ballot: Ballot) -> Result<Finished<'_>, StreamError> {
        let voted = self.vote(ballot)?;
        let complete = self.settle()?;
        Ok(Finished { sum: self.sum(), voted, complete })
    }

    fn sum(&self) -> Sum<'_> {
        let lies = match &self.engine {
            Some(engine) => Lies::Exchange(engine.exchange()),
            None => Lies::Buckets(self.lock()),
        };
        Sum { plan: &self.plan, lies }
    }

    /// The second half of [`vote`](Self::vote), without waiting: `None` while a vote is missing.
    #[cfg(test)]
    pub(crate) fn try_voted(&self) -> Option<Result<Voted, StreamError>> {
        let voted = self.engine()?.try_voted()?;
        Some(voted.map(|voted| self.voted(voted, Instant::now())).map_err(StreamError::from))
    }

    /// As [`with_sum`](Self::with_sum), without waiting: `None` while it is missing.
    #[cfg(test)]
    pub(crate) fn try_with_sum(&self, index: usize, with: impl FnOnce(&[f32])) -> Option<Result<(), StreamError>> {
        let engine = self.engine()?;
        let all = 0..self.plan.parts()[index].region.len();
        Some(engine.try_sum(index)?.map(|()| self.decoded(engine, index, all, with)).map_err(StreamError::from))
    }

    /// As [`settle`](Self::settle), without waiting: `None` while something is missing.
    #[cfg(test)]
    pub(crate) fn try_settle(&self) -> Option<Result<Complete, StreamError>> {
        Some(self.engine()?.try_settled()?.map(Complete::from).map_err(StreamError::from))
    }

    /// The first half of [`vote`](Self::vote): nothing more comes in this step.
    pub(crate) fn close(&self, ballot: Ballot) -> Result<(), StreamError> {
        let mut state = self.lock();
        if let Some(fault) = state.fault.take() {
            return Err(fault);
        }
        if let Some(engine) = &self.engine {
            for bucket in 0..self.plan.buckets().len() {
                if state.late || !state.complete.contains(&bucket) {
                    engine.give(bucket, state.take(&self.plan, bucket));
                }
            }
            engine.vote(ballot);
        } else {
            (0..self.plan.buckets().len()).for_each(|bucket| state.fill(&self.plan, bucket));
            let State { own, buffers, .. } = &mut *state;
            if let Some(own) = own {
                own.clone_from(buffers);
            }
            self.owed().add_to(&self.plan, buffers);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held ends the step; `begin` makes the state whole again.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
