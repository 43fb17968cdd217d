//! What a rank found in a step, and what all make of it.

use super::{Exchange, Flush};
use crate::data::norm::SquaredNorm;

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

impl Exchange {
    /// Whether every sum that this rank owns is reduced, and everything that it sends is encoded, so that it can vote.
    #[must_use]
    pub const fn is_reduced(&self) -> bool {
        self.own_missing == 0 && self.unsent == 0
    }

    /// What the sums that this rank owns add to the squared norm; of all ranks together it is the gradient's. A part that
    /// others hold too is counted by one of them. It is whole once the sums are [reduced](Self::is_reduced).
    #[must_use]
    pub const fn norm(&self) -> SquaredNorm {
        self.norm
    }

    /// What this rank found. To be sent once its last owned chunk is reduced.
    #[must_use]
    pub const fn vote(&self) -> Vote {
        Vote { step: self.step, finite: self.finite && !self.broken }
    }

    /// Decides the step as the votes of all ranks of the run say, which may be more than those of the group, and gives back buffers for the next gradients, one a bucket. They may be
    /// empty, and hold whatever they hold. Every rank has reduced what it owns by then, so that nobody needs a gradient any
    /// more; sums may still be on their way, in either direction.
    ///
    /// # Panics
    /// When something of this rank is not reduced or encoded, or the votes are not one of each rank for this step.
    pub fn close(&mut self, votes: &[Vote]) -> (Verdict, Vec<Vec<f32>>) {
        assert!(self.is_reduced(), "{} chunks are not reduced, {} not encoded", self.own_missing, self.unsent);
        assert!(votes.len() >= self.group.ranks && votes.iter().all(|vote| vote.step == self.step), "{votes:?}");
        self.decided = true;
        let verdict = if votes.iter().all(|vote| vote.finite) { Verdict::Commit } else { Verdict::Skip };
        if verdict == Verdict::Commit {
            if self.flush == Flush::Now {
                self.flush = Flush::No;
            }
            self.commit();
        } else if self.parameters.is_some() {
            self.expect_nothing();
        }
        let buffers = self.buckets.iter_mut().map(|bucket| bucket.given.take().unwrap_or_default());
        (verdict, buffers.collect())
    }
}
