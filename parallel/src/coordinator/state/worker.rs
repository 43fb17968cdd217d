//! What is known of one worker.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{MARK_CHARS_MAX, line};
use crate::wire::control::{Held, Mark, Prepared};

/// Steps whose median says how long a step takes.
const STEPS_KEPT: usize = 32;

/// A worker that joined.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub(super) connection: u64,
    pub(super) host: String,
    pub(super) pid: u32,
    /// When something of it last came.
    pub(super) heard: Duration,
    pub(super) mark: Mark,
    /// When its progress last changed, and when its step began.
    pub(super) advanced: Duration,
    step_began: Duration,
    /// The first step of this start of the run.
    pub(super) first_step: u64,
    /// How long its last steps took.
    steps: Vec<Duration>,
    pub(super) prepared: Option<Prepared>,
    pub(super) seen: Option<BTreeSet<String>>,
    pub(super) holds: Option<Vec<Held>>,
    pub(super) left: Option<Left>,
    /// When its connection or its process ended, and how.
    pub(super) closed: Option<(Duration, String)>,
    /// The code with which its process has ended, where that is known.
    pub(super) exit: Option<i32>,
}

/// How a worker ended on its own.
#[derive(Clone, Debug)]
pub(super) struct Left {
    /// Of its parameters.
    pub(super) hash: String,
    /// Of its process.
    pub(super) code: u8,
}

impl Worker {
    pub(super) fn new(now: Duration, connection: u64, host: String, pid: u32) -> Self {
        Self {
            connection,
            host,
            pid,
            heard: now,
            mark: Mark::default(),
            advanced: now,
            step_began: now,
            first_step: 1,
            steps: Vec::new(),
            prepared: None,
            seen: None,
            holds: None,
            left: None,
            closed: None,
            exit: None,
        }
    }

    pub(super) fn beat(&mut self, now: Duration, mut mark: Mark) {
        mark.text = line(&mark.text, MARK_CHARS_MAX);
        if mark.progress != self.mark.progress {
            self.advanced = now;
        }
        if mark.step == 0 {
            self.step_began = now;
        } else if mark.step != self.mark.step {
            // Several steps may have been completed since the last heartbeat, the first ones among them.
            let steps = mark.step.saturating_sub(self.mark.step.max(self.first_step));
            if steps > 0 {
                let each = now.saturating_sub(self.step_began) / u32::try_from(steps).unwrap_or(u32::MAX);
                self.steps.push(each);
                let extra = self.steps.len().saturating_sub(STEPS_KEPT);
                self.steps.drain(..extra);
            }
            self.step_began = now;
        }
        self.mark = mark;
    }

    /// How long a step of it takes; `None` before the first is complete.
    pub(super) fn median_step(&self) -> Option<Duration> {
        let mut steps = self.steps.clone();
        steps.sort_unstable();
        steps.get(steps.len() / 2).copied()
    }

    /// Where it is, for people.
    pub(super) fn place(&self) -> String {
        match self {
            Self { left: Some(_), .. } => "has left".into(),
            Self { closed: Some((_, how)), .. } => how.clone(),
            Self { mark, .. } if mark.text.is_empty() => "joining".into(),
            Self { mark, .. } => mark.text.clone(),
        }
    }
}
