//! What is known of a step, and when.

use std::borrow::Cow;
use std::sync::MutexGuard;
use std::time::Instant;

use super::State;
use crate::data::engine::{self, Packed};
use crate::data::exchange::{Exchange, Verdict};
use crate::data::plan::Plan;
use crate::note::Ballot;

/// The summed gradient of one step, by parameter. It is to be dropped before the next step begins.
#[derive(Debug)]
pub struct Sum<'a> {
    pub(super) plan: &'a Plan,
    pub(super) lies: Lies<'a>,
}

/// Where a sum lies.
#[derive(Debug)]
pub(super) enum Lies<'a> {
    Buckets(MutexGuard<'a, State>),
    Exchange(MutexGuard<'a, Exchange>),
}

/// What all ranks say of a step. Everything but the seconds is the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Voted {
    /// What every rank does.
    pub verdict: Verdict,
    /// Of every rank, in rank order.
    pub ballots: Vec<Ballot>,
    /// The sum's norm; NaN if something in it was not finite. It means nothing when the verdict is to skip.
    pub norm: f64,
    /// Seconds that this rank waited for the votes.
    pub wait_s: f64,
}

/// What is known of a step when the whole sum is here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Complete {
    /// When what happened.
    pub timing: Timing,
    /// What zstd served, on this rank.
    pub packed: Packed,
}

/// A step's votes and its whole sum.
#[derive(Debug)]
pub struct Finished<'a> {
    /// The sum, the same bits on every rank. It means nothing when the verdict is to skip.
    pub sum: Sum<'a>,
    /// What all ranks said.
    pub voted: Voted,
    /// What the sum took.
    pub complete: Complete,
}

/// What the way of a step's gradients took. With one rank there is no way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Seconds of encoding.
    pub encode_s: f64,
    /// When the first encoding began, and when the whole sum was here.
    pub span: Option<(Instant, Instant)>,
}

impl From<engine::Settled> for Complete {
    fn from(settled: engine::Settled) -> Self {
        let engine::Settled { encode_s, first_encode, last_sum, packed } = settled;
        Self { timing: Timing { encode_s, span: first_encode.map(|first| (first, last_sum)) }, packed }
    }
}

impl Sum<'_> {
    /// The summed gradient of parameter `index`, row-major.
    #[must_use]
    pub fn parameter(&self, index: usize) -> Cow<'_, [f32]> {
        match &self.lies {
            Lies::Buckets(state) => {
                let slot = self.plan.slot(index);
                Cow::Borrowed(&state.buffers[slot.bucket][slot.range.clone()])
            }
            Lies::Exchange(exchange) => Cow::Owned(exchange.sum(index)),
        }
    }

    /// All parameters in logical order.
    pub fn parameters(&self) -> impl Iterator<Item = Cow<'_, [f32]>> {
        (0..self.plan.parameters().len()).map(|index| self.parameter(index))
    }
}
