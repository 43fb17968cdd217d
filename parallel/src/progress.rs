//! How far a rank is, for heartbeats and for the message that names a culprit. Writing it costs an atomic or two.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::wire::control::Numbers;

/// What a rank is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Before the first step.
    Starting,
    /// A forward pass.
    Forward,
    /// A backward pass.
    Backward,
    /// It waits for other ranks.
    Waiting,
    /// The optimiser.
    Updating,
    /// Held-out text.
    Evaluating,
    /// A checkpoint.
    Checkpointing,
    /// After the last step.
    Ending,
}

const STAGES: [(Stage, &str); 8] = [
    (Stage::Starting, "starting"),
    (Stage::Forward, "in the forward pass"),
    (Stage::Backward, "in the backward pass"),
    (Stage::Waiting, "waiting for the other ranks"),
    (Stage::Updating, "applying the gradient"),
    (Stage::Evaluating, "evaluating"),
    (Stage::Checkpointing, "writing a checkpoint"),
    (Stage::Ending, "ending"),
];

/// How far a rank is.
#[derive(Debug, Default)]
pub struct Progress {
    step: AtomicU64,
    count: AtomicU64,
    stage: AtomicU8,
    bucket: AtomicUsize,
    waits_for: Mutex<Option<String>>,
    last_collective: Mutex<String>,
    numbers: Mutex<Option<Numbers>>,
}

/// A [`Progress`] at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The step that is running; 0 before the first.
    pub step: u64,
    /// Grows with everything that gets done.
    pub count: u64,
    /// For people.
    pub text: String,
    /// Whether it waits for other ranks.
    pub waits: bool,
    /// Whether it does something whose length no step tells.
    pub slow: bool,
}

impl Progress {
    /// A step begins.
    pub fn begin(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.bucket.store(0, Ordering::Relaxed);
        self.enter(Stage::Forward);
    }

    /// The rank does something else now.
    pub fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
        self.waits_for(None);
        self.advance();
    }

    /// Something got done.
    pub fn advance(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// A bucket is full.
    pub fn bucket(&self) {
        self.bucket.fetch_add(1, Ordering::Relaxed);
        self.advance();
    }

    /// The step that is running; 0 before the first.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// Whether it does nothing but wait for other ranks.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.stage.load(Ordering::Relaxed) == Stage::Waiting as u8
    }

    /// What it waits for, as far as that is known. A rank that says so waits, whatever its stage.
    pub fn waits_for(&self, what: Option<String>) {
        *self.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// The same, unless it has gone on meanwhile: then nothing is written.
    pub fn waits_for_if_waiting(&self, what: Option<String>) {
        // `enter` says where the rank is before it takes the lock.
        let mut waits_for = self.waits_for.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_waiting() {
            *waits_for = what;
        }
    }

    /// A collective operation begins, or one that went on beside the computing is over.
    pub fn collective(&self, what: String) {
        *self.last_collective.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// The last collective operation; empty before the first.
    #[must_use]
    pub fn last_collective(&self) -> String {
        self.last_collective.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the last step took.
    pub fn report(&self, numbers: Numbers) {
        *self.numbers.lock().unwrap_or_else(PoisonError::into_inner) = Some(numbers);
    }

    /// What the last step took, if there was one.
    #[must_use]
    pub fn numbers(&self) -> Option<Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        let (step, count) = (self.step.load(Ordering::Relaxed), self.count.load(Ordering::Relaxed));
        let stage = STAGES.get(usize::from(self.stage.load(Ordering::Relaxed))).map_or(Stage::Starting, |&(s, _)| s);
        let mut text = STAGES[stage as usize].1.to_owned();
        if step > 0 {
            text = format!("step {step}, {text}");
        }
        let buckets = self.bucket.load(Ordering::Relaxed);
        if stage == Stage::Backward {
            text += &format!(", {buckets} buckets full");
        }
        let mut waits = stage == Stage::Waiting;
        if let Some(what) = &*self.waits_for.lock().unwrap_or_else(PoisonError::into_inner) {
            // In the midst of a forward or backward pass it is a collective operation that waits.
            text += &format!("{}: {what}", if waits { "" } else { ", waiting for the other ranks" });
            waits = true;
        }
        let slow = matches!(stage, Stage::Checkpointing | Stage::Ending);
        Mark { step, count, text, waits, slow }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_stages_is_in_their_order() {
        for (index, (stage, _)) in STAGES.iter().enumerate() {
            assert_eq!(*stage as usize, index);
        }
    }

    #[test]
    fn a_mark_says_where_a_rank_is() {
        let progress = Progress::default();
        let check = |step, text: &str, waits| {
            let mark = progress.mark();
            assert_eq!((mark.step, &*mark.text, mark.waits), (step, text, waits));
            mark.count
        };
        let before = check(0, "starting", false);
        progress.begin(3);
        check(3, "step 3, in the forward pass", false);
        progress.enter(Stage::Backward);
        progress.bucket();
        progress.bucket();
        check(3, "step 3, in the backward pass, 2 buckets full", false);
        progress.enter(Stage::Waiting);
        let entered = check(3, "step 3, waiting for the other ranks", true);
        // To know whom it waits for is no progress.
        progress.waits_for(Some("rank 1's bucket 4".into()));
        assert_eq!(check(3, "step 3, waiting for the other ranks: rank 1's bucket 4", true), entered);
        assert_eq!(entered, before + 5);
        progress.waits_for_if_waiting(Some("rank 1's bucket 5".into()));
        check(3, "step 3, waiting for the other ranks: rank 1's bucket 5", true);
        progress.begin(4);
        progress.waits_for_if_waiting(Some("rank 1's bucket 5".into()));
        check(4, "step 4, in the forward pass", false);
        progress.enter(Stage::Backward);
        check(4, "step 4, in the backward pass, 0 buckets full", false);
        progress.waits_for(Some("rank 2's all_reduce 7".into()));
        let text = "step 4, in the backward pass, 0 buckets full, waiting for the other ranks: rank 2's all_reduce 7";
        check(4, text, true);
        progress.waits_for(None);
        check(4, "step 4, in the backward pass, 0 buckets full", false);
    }
}
