//! What a step did.

use compression::Codec;
use parallel::data::Voted;
use parallel::data::engine::Packed;
use parallel::transport::Counted;

use super::update::{Ended, Spent};
use crate::optimizer;
use crate::recipe::Recipe;
use crate::state::State;

/// What a step did. Everything but seconds and bytes is the same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The step.
    pub step: u64,
    /// The mean cross entropy of the tokens of all ranks in nats, before the update.
    pub loss: f64,
    /// The global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Whether the update was left out because something was not finite.
    pub skipped: bool,
    /// Tokens that all ranks predicted.
    pub tokens: u64,
    /// Whether any rank was asked to stop.
    pub stop: bool,
    /// Whether any rank cannot take a snapshot.
    pub busy: bool,
    /// Seconds of the forward passes.
    pub forward_s: f64,
    /// Seconds of the backward passes.
    pub backward_s: f64,
    /// The rank whose forward and backward passes took longest, and their seconds.
    pub slowest_rank: usize,
    /// See `slowest_rank`.
    pub slowest_compute_s: f64,
    /// Seconds of encoding, on another thread, of the gradients whose way ended in this step.
    pub encode_s: f64,
    /// Seconds that this rank did nothing but wait: after its last backward pass for the votes, and for sums that it
    /// needed, of this step or of the one before.
    pub wait_s: f64,
    /// Seconds that this rank waited for activations and gradients of other stages; `None` where there are none.
    pub stage_wait_s: Option<f64>,
    /// The part of the way of the gradients in which the model computed, of those whose way ended in this step; `None` where
    /// none did.
    pub overlap: Option<f64>,
    /// Bytes at the sockets so far. Some of a step's bytes leave after it, and some of the next one's come before it.
    pub wire: Counted,
    /// Seconds in which the gradients whose way ended in this step could travel while the model computed: of their backward
    /// pass, and of the forward pass after it; `None` where none ended.
    pub window_s: Option<f64>,
    /// What zstd served them, on this rank; `None` where none ended.
    pub packed: Option<Packed>,
    /// What rank 0 said that all ranks are to use from the next step on.
    pub codec_chosen: Option<Codec>,
    /// Seconds of the whole step.
    pub step_s: f64,
}

impl Report {
    /// What the votes say of a step that `state` counts.
    pub(super) fn of(voted: &Voted, state: &State, recipe: &Recipe) -> Self {
        let ballots = &voted.ballots;
        let slowest =
            (0..ballots.len()).max_by(|&a, &b| ballots[a].compute_s.total_cmp(&ballots[b].compute_s)).unwrap_or(0);
        let skipped = state.good_step != state.step;
        Self {
            step: state.step,
            loss: loss(voted),
            grad_norm: if skipped { f64::NAN } else { voted.norm },
            learning_rate: optimizer::learning_rate(&recipe.schedule, state.step, recipe.train.steps),
            skipped,
            tokens: 0,
            stop: ballots.iter().any(|ballot| ballot.stop),
            busy: ballots.iter().any(|ballot| ballot.busy),
            forward_s: 0.0,
            backward_s: 0.0,
            slowest_rank: slowest,
            slowest_compute_s: ballots[slowest].compute_s,
            encode_s: 0.0,
            wait_s: voted.wait_s,
            stage_wait_s: None,
            overlap: None,
            wire: Counted::default(),
            window_s: None,
            packed: None,
            codec_chosen: ballots[0].codec,
            step_s: 0.0,
        }
    }

    /// The way of some gradients has ended in this step, after `forward_s` seconds of a forward pass in which they could
    /// travel.
    pub(super) fn note(&mut self, ended: Ended, forward_s: f64) {
        let Ended { complete, spent: Spent { wait_s, .. }, due } = ended;
        self.encode_s += complete.timing.encode_s;
        self.wait_s += wait_s;
        if let Some((first, last)) = complete.timing.span {
            let way_s = last.saturating_duration_since(first).as_secs_f64();
            self.overlap = overlap(due.vote_wait_s + wait_s, way_s);
            self.window_s = Some(due.backward_end.saturating_duration_since(first).as_secs_f64() + forward_s);
        }
        // Of a step that ended before this one did, in this one too.
        let mut changes = self.packed.take().unwrap_or_default().changes;
        changes.extend(complete.packed.changes);
        self.packed = Some(Packed { buckets: complete.packed.buckets, changes });
    }
}

/// The mean cross entropy of all ranks.
pub(super) fn loss(voted: &Voted) -> f64 {
    voted.ballots.iter().fold(0.0, |sum, ballot| sum + ballot.loss)
}

/// The part of `way_s` in which nobody waited; `None` when that took no time.
pub(super) fn overlap(wait_s: f64, way_s: f64) -> Option<f64> {
    (way_s > 0.0).then(|| (1.0 - wait_s / way_s).max(0.0))
}
