//! What waits for a rank, and what goes first.
//!
//! Gradients go before sums: every rank's vote waits for gradients, and sums have the next forward pass to travel in.
//! Gradients leave in the order in which the backward pass gives them, last layer first; sums in the order in which the
//! forward pass needs them, first layer first. What was handed to the transport cannot be overtaken any more, so until the
//! step is decided no more than [`SUMS_UNDER_WAY_MAX`] sums are under way to a rank: gradients and votes come soon.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use bytes::Bytes;

use crate::frame::Phase;

/// Sums under way to a rank until the step is decided. The transport says that one has left while it still has the end of it
/// to send, so that the link is not idle meanwhile.
pub(super) const SUMS_UNDER_WAY_MAX: usize = 1;

/// What waits for a rank.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// This chunk of a tensor, to be encoded when it may leave.
    Encode(Phase, usize, Range<usize>),
    /// A frame of a tensor's sum, from this element on. Those of one sum share their bytes.
    Ready(usize, usize, Bytes),
}

/// What waits for one rank, and what is under way to it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    gradients: VecDeque<Job>,
    /// By tensor and first element.
    sums: BTreeMap<(usize, usize), Job>,
    /// Whether each frame under way is a sum, in the order in which they were handed over.
    under_way: VecDeque<bool>,
}

impl Queue {
    /// Forgets what waits, and not what is under way.
    pub(super) fn clear(&mut self) {
        self.gradients.clear();
        self.sums.clear();
    }

    pub(super) fn push(&mut self, job: Job) {
        match job {
            Job::Ready(index, start, _) => _ = self.sums.insert((index, start), job),
            Job::Encode(..) => self.gradients.push_back(job),
        }
    }

    /// What may leave now. No more than `window` frames are under way.
    pub(super) fn pop(&mut self, window: usize, is_decided: bool) -> Option<Job> {
        if self.under_way.len() >= window {
            return None;
        }
        if let Some(job) = self.gradients.pop_front() {
            self.under_way.push_back(false);
            return Some(job);
        }
        let sums = self.under_way.iter().filter(|&&is_sum| is_sum).count();
        // A window without an end bounds nothing.
        if !is_decided && window < usize::MAX && sums >= SUMS_UNDER_WAY_MAX {
            return None;
        }
        let (_, job) = self.sums.pop_first()?;
        self.under_way.push_back(true);
        Some(job)
    }

    /// Bytes of sums that wait.
    #[cfg(test)]
    pub(super) fn waiting_bytes(&self) -> usize {
        let bytes = |job: &Job| match job {
            Job::Encode(..) => 0,
            Job::Ready(.., frame) => frame.len(),
        };
        self.sums.values().map(bytes).sum()
    }

    /// The first frame under way has left.
    pub(super) fn left(&mut self) {
        // None is under way if somebody else sent a frame, as tests do that put faults into a run.
        self.under_way.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(index: usize, start: usize) -> Job {
        Job::Ready(index, start, Bytes::new())
    }

    fn names(queue: &mut Queue, window: usize, is_decided: bool) -> Vec<String> {
        let name = |job| match job {
            Job::Ready(index, start, _) => format!("sum {index} {start}"),
            Job::Encode(_, index, range) => format!("gradient {index} {}", range.start),
        };
        std::iter::from_fn(|| queue.pop(window, is_decided)).map(name).collect()
    }

    #[test]
    fn gradients_go_first_and_sums_as_the_forward_pass_needs_them() {
        let mut queue = Queue::default();
        [sum(7, 0), sum(2, 256), sum(2, 0)].into_iter().for_each(|job| queue.push(job));
        [9, 8].into_iter().for_each(|index| queue.push(Job::Encode(Phase::Scatter, index, 0..128)));
        assert_eq!(names(&mut queue, 9, true), ["gradient 9 0", "gradient 8 0", "sum 2 0", "sum 2 256", "sum 7 0"]);
    }

    #[test]
    fn until_the_step_is_decided_few_sums_are_in_the_way_of_gradients_and_votes() {
        let mut queue = Queue::default();
        (0..5).for_each(|index| queue.push(sum(index, 0)));
        assert_eq!(names(&mut queue, 16, false), ["sum 0 0"]);
        queue.push(Job::Encode(Phase::Scatter, 9, 0..128));
        assert_eq!(names(&mut queue, 16, false), ["gradient 9 0"]);
        queue.left();
        assert_eq!(names(&mut queue, 16, false), ["sum 1 0"], "in place of the one that has left");
        assert_eq!(names(&mut queue, 4, true), ["sum 2 0", "sum 3 0"], "the window holds for all");
        assert_eq!(names(&mut queue, usize::MAX, true), ["sum 4 0"]);
    }
}
