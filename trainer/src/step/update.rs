//! What a step does to the parameters once all ranks have voted for it: at the end of the step, or in the next one's
//! forward pass, each parameter just before the model uses it. Meanwhile the sums of other owners are still on their way,
//! first layers first, and travel while the model computes. The numbers are the same either way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use parallel::data::{Complete, GradientStream, StreamError};
use parallel::progress::{Progress, Stage};
use parallel::trace::{Label, Trace, Track};

use super::{State, owned};
use crate::optimizer::{self, AdamW};

/// A wait that is shorter is none, for the trace.
pub(super) const WAIT_S_MIN: f64 = 1e-4;
/// Elements that a thread updates at a time: their sum is decoded into a cache first.
const PIECE: usize = 1 << 14;

/// A step that all have voted about, and whose parameters are not brought up to it yet.
#[derive(Clone, Debug)]
pub(super) struct Due {
    /// For each parameter what happens to it, in the order of the plan; nothing when the step was skipped.
    pub(super) rules: Option<Arc<[AdamW]>>,
    pub(super) step: u64,
    /// When its last backward pass returned.
    pub(super) backward_end: Instant,
    /// Seconds that it waited for votes after that.
    pub(super) vote_wait_s: f64,
}

/// What waits for the sums.
#[derive(Clone, Debug)]
pub(super) struct Updater {
    pub(super) stream: Arc<GradientStream>,
    pub(super) progress: Arc<Progress>,
    /// What the rank does but for waiting.
    pub(super) stage: Stage,
    pub(super) trace: Option<Arc<Trace>>,
}

/// What bringing parameters up to their step took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spent {
    /// Seconds that it waited for sums.
    pub(super) wait_s: f64,
    /// Seconds of the optimiser.
    pub(super) update_s: f64,
}

/// How the way of a step's gradients ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) complete: Complete,
    pub(super) spent: Spent,
    pub(super) due: Due,
}

impl Ended {
    /// Seconds of waiting for sums and of the optimiser.
    pub(super) fn spent_s(&self) -> f64 {
        self.spent.wait_s + self.spent.update_s
    }
}

/// One parameter and its moments.
#[derive(Debug, Default)]
struct Part {
    weights: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    done: bool,
}

/// A state whose parameters are brought up to their step one by one, whoever asks for them.
#[derive(Debug)]
pub(super) struct Behind {
    due: Due,
    updater: Updater,
    parts: Vec<Mutex<Part>>,
    spent: Mutex<Spent>,
    /// What went wrong: inside a forward pass nothing can be returned.
    fault: Mutex<Option<StreamError>>,
}

impl Behind {
    /// Takes parameters and moments out of `state`, until [`give_back`](Self::give_back).
    pub(super) fn take(state: &mut State, due: Due, updater: Updater) -> Self {
        let State { weights, m, v, .. } = state;
        let parts = weights.iter_mut().zip(m).zip(v).map(|((weights, m), v)| {
            let [weights, m, v] = [weights, m, v].map(std::mem::take);
            Mutex::new(Part { weights, m, v, done: false })
        });
        let parts = parts.collect();
        Self { due, updater, parts, spent: Mutex::default(), fault: Mutex::default() }
    }

    /// A copy of parameter `index` as it is after the step. It waits for the sum, if that is not here yet. After a fault
    /// it is as it was before; [`give_back`](Self::give_back) says so.
    pub(super) fn values(&self, index: usize) -> Vec<f32> {
        let mut part = lock(&self.parts[index]);
        self.bring_up(index, &mut part);
        part.weights.clone()
    }

    /// Brings up what nobody has asked for, and gives everything back.
    ///
    /// # Errors
    /// A rank is lost, or the run was aborted; the state has all of its tensors, and some of them are of the step before.
    pub(super) fn give_back(&self, state: &mut State) -> Result<Spent, StreamError> {
        for (index, part) in self.parts.iter().enumerate() {
            let mut part = lock(part);
            self.bring_up(index, &mut part);
            let Part { weights, m, v, .. } = std::mem::take(&mut *part);
            (state.weights[index], state.m[index], state.v[index]) = (weights, m, v);
        }
        match lock(&self.fault).take() {
            Some(fault) => Err(fault),
            None => Ok(*lock(&self.spent)),
        }
    }

    fn bring_up(&self, index: usize, part: &mut Part) {
        let Some(rules) = self.due.rules.as_ref().filter(|_| !part.done && lock(&self.fault).is_none()) else { return };
        match self.wait(index).and_then(|()| self.update(index, &rules[index], part)) {
            Ok(()) => part.done = true,
            Err(fault) => *lock(&self.fault) = Some(fault),
        }
    }

    /// Waits for the sum; with one rank there is nothing to wait for.
    fn wait(&self, index: usize) -> Result<(), StreamError> {
        let Updater { stream, progress, stage, trace } = &self.updater;
        let Some(engine) = stream.engine() else { return Ok(()) };
        let start = Instant::now();
        progress.enter(Stage::Waiting);
        let found = engine.wait_for(index);
        progress.enter(*stage);
        let wait_s = start.elapsed().as_secs_f64();
        lock(&self.spent).wait_s += wait_s;
        if let Some(trace) = trace.as_ref().filter(|_| wait_s > WAIT_S_MIN) {
            trace.span(Track::Compute, start, Label::new("wait", self.due.step));
        }
        Ok(found?)
    }

    /// Piece by piece, so that what is decoded of a sum is still in a cache when it is read.
    fn update(&self, index: usize, rule: &AdamW, part: &mut Part) -> Result<(), StreamError> {
        let start = Instant::now();
        let Part { weights, m, v, .. } = part;
        if let Some(codec) = self.updater.stream.parameter_codec(index) {
            // Its owner has updated it.
            owned::adopt(&self.updater.stream, index, codec, weights)?;
            lock(&self.spent).update_s += start.elapsed().as_secs_f64();
            return Ok(());
        }
        let elements = piece_elements();
        let pieces = weights.chunks_mut(elements).zip(m.chunks_mut(elements)).zip(v.chunks_mut(elements)).enumerate();
        for (piece, ((weights, m), v)) in pieces {
            let from = piece * elements;
            self.updater.stream.with_sum(index, from..from + weights.len(), |gradients| {
                rule.update(&mut optimizer::Range { weights, gradients, m, v });
            })?;
        }
        lock(&self.spent).update_s += start.elapsed().as_secs_f64();
        Ok(())
    }
}

/// Elements that are updated at once, by all threads that compute.
pub(crate) fn piece_elements() -> usize {
    PIECE * rayon::current_num_threads().max(8)
}

/// Nothing is left half done by a panic elsewhere: it ends the step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
