//! Checkpoints of a run, and the way back from them.

use std::time::Instant;

use checkpoint::reader::Checkpoint;
use checkpoint::writer::{Offer, Outcome, Snapshot};
use compression::Codec;
use parallel::progress::Stage;
use serde_json::json;

use super::folder::{Status, Summary};
use super::{Run, mesh};
use crate::data::Data;
use crate::error::{Error, Result};
use crate::state::residuals::Kept;
use crate::state::{self, Meta, Travelled, folding};

impl Run {
    /// Offers a snapshot; the writer does the rest while training goes on.
    ///
    /// # Errors
    /// A rank is lost while all of them add up what they left out.
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        assert!(self.stepper.is_settled(), "the state is behind its step");
        self.stepper.progress().enter(Stage::Checkpointing);
        let meta = Meta {
            step: self.state.step,
            updates: self.state.updates,
            skips: self.state.skips,
            good_step: self.state.good_step,
            samples: self.state.step
                * (self.recipe.train.micro_batch_size * self.recipe.parallel.micro_batches.iter().sum::<usize>())
                    as u64,
            tokens: self.tokens,
            loss: self.last_loss,
            eval_loss: self.evaluated.filter(|&(step, _)| step == self.state.step).map(|(_, loss)| loss),
            seed: self.recipe.train.seed,
            corpus_hash: self.data.corpus_hash.clone(),
            recipe_hash: self.recipe_hash.clone(),
            model: self.config.clone(),
            end_of_text: self.data.tokenizer.end_of_text_name().to_owned(),
            compression: self.travelled(),
            mesh: Some(self.mesh.clone()),
        };
        let attachments = state::attachments(self.data.tokenizer.json(), &self.recipe_toml);
        let start = Instant::now();
        let (state, step, stepper, config) = (&self.state, self.state.step, &self.stepper, &self.config);
        let alone = |snapshot: &mut Snapshot<'_>| state.snapshot(snapshot, config, &stepper.stream().owed());
        let offer = match &mut self.group {
            // Ranks decide alike: one that is busy keeps all from taking it.
            Some(_) if self.busy => Offer::Busy,
            Some(group) => {
                let folded = match (group.share.kept, stepper.engine()) {
                    (Kept::Folded, Some(engine)) => folding::fold(&group.sums, &engine.exchange())?,
                    _ => Vec::new(),
                };
                group.saving.insert(step);
                group.writing.insert(step);
                let share = &group.share;
                self.writer.offer(step, json!(meta), attachments, |snapshot| match stepper.engine() {
                    Some(engine) => state.snapshot_share(snapshot, share, &engine.exchange(), &folded),
                    None => alone(snapshot),
                })
            }
            None => self.writer.offer(step, json!(meta), attachments, alone),
        };
        self.span("snapshot", start);
        match offer {
            // With what ranks add up for it, where residuals are folded.
            Offer::Taken { .. } => self.stall_s += start.elapsed().as_secs_f64(),
            Offer::Busy => {
                let why = "two snapshots are being written";
                self.event("snapshot_skipped", step, json!({ "why": why }));
            }
        }
        Ok(())
    }

    /// What a checkpoint says of how gradients travelled.
    fn travelled(&self) -> Option<Travelled> {
        let exact = || if self.stepper.stream().owed().has_place() { Kept::Exact } else { Kept::Nothing };
        let kept = self.group.as_ref().map_or_else(exact, |group| group.share.kept);
        let (residuals, folded) = (kept != Kept::Nothing, kept == Kept::Folded);
        match &self.codecs {
            Some(codecs) => {
                Some(Travelled { codec: codecs.codec(self.state.step), residuals, folded, chosen: codecs.chosen() })
            }
            // With one rank nothing travels, and what several had left out is in the first step that counts.
            None => residuals.then_some(Travelled { codec: Codec::Fp32, residuals, folded, chosen: None }),
        }
    }

    /// The checkpoint that a run must not end without.
    pub(super) fn last_checkpoint(&mut self) -> Result<()> {
        // Nothing trains any more that it could disturb, and a signalled run has little time.
        self.writer.limit(0);
        self.finish_writing()?;
        if self.state.step > 0 && self.committed != Some(self.state.step) {
            // Everything is settled: nobody is busy.
            self.busy = false;
            self.checkpoint()?;
            self.finish_writing()?;
        }
        match self.failure.take() {
            Some(failure) if self.committed != Some(self.state.step) && self.state.step > 0 => Err(failure),
            _ => Ok(()),
        }
    }

    fn finish_writing(&mut self) -> Result<()> {
        self.settle_all()?;
        let outcomes = self.writer.flush();
        self.note(outcomes, "");
        Ok(())
    }

    /// Writes down what became of checkpoints; `then` says what follows from a failure.
    pub(super) fn note(&mut self, outcomes: Vec<Outcome>, then: &str) {
        for outcome in outcomes {
            match outcome {
                other if self.group.is_some() => self.tell(other),
                Outcome::Committed { step, path, bytes, unpacked_bytes, seconds, removed } => {
                    self.committed = Some(step);
                    let mut fields = json!({ "path": path, "bytes": bytes, "seconds": seconds, "removed": removed });
                    if self.recipe.checkpoint.zstd {
                        fields["unpacked_bytes"] = unpacked_bytes.into();
                    }
                    self.event("checkpoint", step, fields);
                    self.upload(step);
                }
                Outcome::Failed { step, error } => {
                    self.not_written(step, &error.to_string(), then);
                    self.failure = Some(error.into());
                }
                Outcome::Written { .. } | Outcome::Retained { .. } => {}
            }
        }
    }

    /// Says that a checkpoint was not written; `then` says what follows.
    pub(super) fn not_written(&mut self, step: u64, error: &str, then: &str) {
        let kept = self.committed.map_or("there is none before it".into(), |s| format!("step {s}'s is kept"));
        self.event("checkpoint_failed", step, json!({ "error": error }));
        self.say(&format!("the checkpoint of step {step} was not written ({kept}){then}: {error}"));
    }

    pub(super) fn summary(&self, status: Status) -> Summary {
        // A run that failed may have parameters of the step before.
        let known = status != Status::Running && self.stepper.is_settled();
        let hash = if known { self.parameter_hash() } else { None };
        Summary {
            status,
            step: self.state.step,
            loss: self.last_loss,
            held_out_bits_per_byte: None,
            parameter_hash: hash,
            tokens: self.tokens,
            wall_s: self.wall_before_s + self.started.elapsed().as_secs_f64(),
            mesh: mesh(&self.recipe),
            codec: self.codecs.as_ref().map(|codecs| codecs.codec(self.state.step + 1).to_string()),
            version: crate::VERSION.into(),
        }
    }
}

/// A resumed run must read what it read before: files that the recipe names may have changed under their names.
pub(super) fn same_text(name: &str, checkpoint: &Checkpoint, data: &Data) -> Result<()> {
    let meta = state::meta(checkpoint)?;
    let mut changed = Vec::new();
    if meta.corpus_hash != data.corpus_hash {
        let (was, is) = (&meta.corpus_hash, &data.corpus_hash);
        changed.push(format!("the text of [data] and [eval]: BLAKE3 was {was}, is {is}"));
    }
    if checkpoint.attachment("tokenizer.json")?.as_slice() != &*data.tokenizer.json() {
        changed.push("the tokenizer: it is not the one inside the checkpoint".into());
    }
    if changed.is_empty() {
        return Ok(());
    }
    let what = format!(
        "--resume cannot change what the run reads:\n  {}\nrestore it, or start another run with --name",
        changed.join("\n  ")
    );
    Err(Error::Run { name: name.into(), what })
}
