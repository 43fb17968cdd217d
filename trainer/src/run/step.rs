//! One step of a run: its text, what this rank tells the others, and its line of metrics.

use parallel::mesh::Axis;
use parallel::wire::control::Numbers;
use serde_json::json;

use super::group::Group;
use super::metrics::{self, Line};
use super::{Run, due, evaluate};
use crate::data::order;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::step::{Report, Word};

impl Run {
    /// One step and its line of metrics.
    pub(super) fn step(&mut self) -> Result<Line> {
        let (rank, _) = self.place();
        let (train, shares) = (&self.recipe.train, &self.recipe.parallel.micro_batches);
        // Ranks that hold one model together take the same text.
        let data = self.recipe.parallel.mesh().coordinates(rank).on(Axis::Data);
        let windows = self.data.train.windows(train.seq_len);
        let (rows, own) = (train.micro_batch_size as u64, shares[data] as u64);
        // The order of the data is that of one rank with all micro-batches.
        let [before, all] = [&shares[..data], &shares[..]].map(|shares| shares.iter().sum::<usize>() as u64);
        let first = rows * (self.state.step * all + before);
        let batches: Vec<_> = (0..own)
            .map(|micro_batch| {
                let samples = first + micro_batch * rows..first + (micro_batch + 1) * rows;
                let starts: Vec<usize> =
                    samples.map(|sample| order::window(sample, windows, train.seed) as usize * train.seq_len).collect();
                evaluate::batch(&self.data.train, &starts, train.seq_len)
            })
            .collect();
        let step = self.state.step + 1;
        self.put_codec_in_force(step);
        let word = self.word();
        let tamper = &self.tamper;
        tamper.before(rank, step)?;
        tamper.stray(rank, step, self.stepper.replica())?;
        if let Some(group) = &self.group {
            tamper.disturb(rank, step, group.share.ranks, &*group.transport);
        }
        let spoil = |_: usize, loss| tamper.loss(rank, step, loss);
        let (stepper, state, recipe) = (&self.stepper, &mut self.state, &self.recipe);
        let report = match self.group.is_some() && !stops_after(recipe, step) && !tamper.needs_whole_steps() {
            // Its sums travel while the next forward pass computes.
            true => stepper.step_ahead(state, recipe, &batches, word, spoil)?,
            false => stepper.step(state, recipe, &batches, word, spoil)?,
        };
        self.tamper.record(&self.stepper, rank, step, report.skipped)?;
        self.tamper.after(rank, step, &mut self.state, self.stepper.plan().parts())?;
        self.tokens += report.tokens;
        (self.stopping, self.busy) = (report.stop, report.busy);
        self.learn_codec(&report);
        self.note_zstd(report.packed.as_ref());
        let finite = |x: f64| x.is_finite().then_some(x);
        self.last_loss = finite(report.loss).or(self.last_loss);
        if report.skipped {
            let fields = json!({ "skips_in_a_row": self.state.skips, "why": "the loss or the gradient is not finite" });
            self.event("skip", self.state.step, fields);
        }
        Ok(self.line(&report))
    }

    /// What this rank tells the others in the next step.
    fn word(&mut self) -> Word {
        if self.group.is_none() {
            return Word::default();
        }
        let (before, next) = (self.state.step, self.state.step + 1);
        let (rank, _) = self.place();
        let compare = std::mem::take(&mut self.first) || due(before, self.recipe.parallel.verify_every);
        Word {
            stop: self.stop.asked(),
            busy: !self.writer.ready(next),
            parameters: compare.then(|| self.state.fingerprint(&self.config, self.stepper.plan().parts())),
            codec: self.codecs.as_mut().and_then(|codecs| codecs.take_word(rank)),
        }
    }

    fn line(&mut self, report: &Report) -> Line {
        let before = std::mem::replace(&mut self.counted, report.wire);
        let memory_bytes = metrics::memory_bytes();
        let finite = |x: f64| x.is_finite().then_some(x);
        let line = Line {
            step: self.state.step,
            skipped_steps: self.state.step - self.state.updates,
            loss: finite(report.loss),
            eval_loss: None,
            learning_rate: report.learning_rate,
            grad_norm: finite(report.grad_norm),
            tokens: self.tokens,
            tokens_per_s: report.tokens as f64 / report.step_s,
            step_s: report.step_s,
            forward_s: report.forward_s,
            backward_s: report.backward_s,
            slowest_rank: report.slowest_rank,
            slowest_compute_s: report.slowest_compute_s,
            encode_s: report.encode_s,
            wait_s: report.wait_s,
            exposed_s: report.wait_s,
            stage_wait_s: report.stage_wait_s,
            overlap: report.overlap,
            wire_bytes_sent: report.wire.sent - before.sent,
            wire_bytes_received: report.wire.received - before.received,
            codec: self.codecs.as_ref().map(|codecs| codecs.codec(self.state.step)),
            zstd_buckets: self.zstd_buckets,
            checkpoint_stall_s: 0.0,
            memory_bytes,
        };
        // The coordinator collects them from all ranks.
        self.stepper.progress().report(Numbers {
            step: line.step,
            step_s: line.step_s,
            encode_s: line.encode_s,
            wait_s: line.wait_s,
            wire_bytes_sent: report.wire.sent,
            wire_bytes_received: report.wire.received,
            memory_bytes: memory_bytes.unwrap_or(0),
            loss: line.loss,
            grad_norm: line.grad_norm,
            learning_rate: line.learning_rate,
            tokens: line.tokens,
            tokens_per_s: line.tokens_per_s,
            forward_s: line.forward_s,
            backward_s: line.backward_s,
            exposed_s: line.exposed_s,
            overlap: line.overlap,
            peers: self.group.as_ref().map_or_else(Vec::new, Group::bytes_by_rank),
            skipped_steps: line.skipped_steps,
            last_collective: self.stepper.progress().last_collective(),
        });
        line
    }
}

/// Whether something looks at parameters or moments after `step`: the last step's end, an evaluation, a checkpoint, or a
/// comparison of all ranks' parameters.
fn stops_after(recipe: &Recipe, step: u64) -> bool {
    let last = recipe.train.stop_at_step.unwrap_or(u64::MAX).min(recipe.train.steps);
    let every = [recipe.eval.every, recipe.checkpoint.every, recipe.parallel.verify_every];
    step >= last || every.into_iter().any(|every| due(step, every))
}
