//! A run's tie to the other ranks: who they are, the line to the coordinator, and checkpoints that all write together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::writer::{Outcome, Part};
use parallel::collective::{CollectiveError, SubGroup};
use parallel::control::{Control, ControlError};
use parallel::coordinator::FromCoordinator as To;
use parallel::data::StreamError;
use parallel::data::engine::EngineError;
use parallel::progress::Stage;
use parallel::transport::grpc::GrpcTransport;
use parallel::transport::{Counted, Transport};
use parallel::wire::control::from_worker::What as From;
use parallel::wire::control::{Committed, Leaving, Lost, Part as PartMessage, PeerBytes, Settled};
use serde_json::json;

use super::ender::Ender;
use super::{Run, codec};
use crate::error::{Error, Result};
use crate::state::Share;
use crate::step::same_parameters;

/// One rank's tie to the others.
#[derive(Debug)]
pub struct Group {
    /// Who this rank is, and what it writes.
    pub share: Share,
    /// The line to the coordinator.
    pub control: Control,
    /// The connections to the other ranks.
    pub transport: Arc<GrpcTransport>,
    /// The ranks whose gradients are summed, for what they do together between two steps.
    pub sums: SubGroup,
    /// What happens when the run ends for everybody.
    pub ender: Ender,
    /// Bytes that this rank would send a step if everything travelled as f32; `None` with one rank.
    pub f32_bytes: Option<u64>,
    /// Steps whose checkpoint all ranks write, and those among them that this rank commits.
    pub saving: BTreeSet<u64>,
    /// Those of them that this rank, as the lead of its folder, is giving their name.
    pub committing: BTreeSet<u64>,
    /// Those of them for which this rank's own writer has something to do.
    pub writing: BTreeSet<u64>,
    /// Of those that this rank has given their name: bytes of all files in its folder, and those if none were packed.
    pub bytes: BTreeMap<u64, [u64; 2]>,
}

/// How long a rank waits for the others' goodbye at the end. They have all voted on the last step by then.
const GOODBYE_WITHIN: Duration = Duration::from_secs(5);

impl Group {
    /// What an error means for this rank's run: when another rank is behind it, the coordinator's verdict.
    #[must_use]
    pub fn explain(&self, error: Error, peer_timeout_s: f64) -> Error {
        let within = Duration::from_secs_f64(peer_timeout_s);
        match error {
            Error::Stream(StreamError::Engine(engine)) => match engine {
                EngineError::Lost(ref loss) => {
                    let lost = Lost { rank: loss.rank as u32, why: loss.to_string() };
                    self.control.say(From::Lost(lost));
                    let ending = self.control.ending(within);
                    Error::Verdict(format!("{}\nhere: {engine}", ending.verdict), ending.code)
                }
                EngineError::Aborted(_) => {
                    let ending = self.control.ending(within);
                    Error::Verdict(ending.verdict, ending.code)
                }
                other => StreamError::Engine(other).into(),
            },
            Error::Collective(CollectiveError::Lost(ref loss)) => {
                self.control.say(From::Lost(Lost { rank: loss.rank as u32, why: loss.to_string() }));
                let ending = self.control.ending(within);
                Error::Verdict(format!("{}\nhere: {error}", ending.verdict), ending.code)
            }
            Error::Collective(CollectiveError::Aborted(_)) => {
                let ending = self.control.ending(within);
                Error::Verdict(ending.verdict, ending.code)
            }
            Error::Control(ControlError::Ended(ending)) => Error::Verdict(ending.verdict, ending.code),
            other => other,
        }
    }

    /// Ends the connections to the other ranks in good order. Nothing is to be exchanged after it.
    pub fn say_goodbye(&self) {
        self.transport.close(GOODBYE_WITHIN);
        let Counted { sent, received } = self.transport.counted();
        tracing::info!(sent, received, "bytes at the sockets in all");
    }

    /// Bytes of messages between this rank and each other, so far.
    pub(super) fn bytes_by_rank(&self) -> Vec<PeerBytes> {
        let counted = self.transport.counted_by_rank().into_iter().enumerate();
        let others = counted.filter(|(rank, _)| *rank != self.share.rank);
        others.map(|(rank, Counted { sent, received })| PeerBytes { rank: rank as u32, sent, received }).collect()
    }

    /// Says how this rank ended.
    pub fn leave(self, leaving: Leaving) {
        self.control.leave(leaving);
    }
}

impl Run {
    /// Takes what the coordinator says between two steps, waiting for it at most so long.
    ///
    /// # Errors
    /// The run has ended for everybody.
    pub(super) fn listen(&mut self, within: Duration) -> Result<()> {
        let mut within = within;
        loop {
            let Some(group) = &mut self.group else { return Ok(()) };
            let Some(message) = group.control.poll(within)? else { return Ok(()) };
            within = Duration::ZERO;
            match message {
                To::Commit(commit) => {
                    let parse = |text: &String| serde_json::from_str::<Part>(text);
                    let parts: std::result::Result<Vec<Part>, _> = commit.parts.iter().map(parse).collect();
                    match parts {
                        Ok(parts) => {
                            group.committing.insert(commit.step);
                            group.writing.insert(commit.step);
                            self.writer.commit(commit.step, commit.id, parts);
                        }
                        Err(error) => {
                            let error = Some(format!("a part of the checkpoint makes no sense: {error}"));
                            group.control.say(From::Committed(Committed { step: commit.step, error }));
                        }
                    }
                }
                To::Settled(settled) => self.settled(settled),
                To::CodecChoice(choice) if codec::may_be(&choice) => self.hear_codec(choice),
                other => return Err(group.control.out_of_turn(&other).into()),
            }
        }
    }

    /// All folders have the checkpoint, or it is given up.
    fn settled(&mut self, settled: Settled) {
        let Settled { step, id, error } = settled;
        self.writer.settle(step, error.is_none());
        let mut bytes = None;
        if let Some(group) = &mut self.group {
            group.saving.remove(&step);
            group.committing.remove(&step);
            bytes = group.bytes.remove(&step);
        }
        match error {
            None => {
                self.committed = Some(step);
                let mut fields = json!({ "id": id });
                if let Some([bytes, unpacked_bytes]) = bytes {
                    fields["bytes"] = bytes.into();
                    if self.recipe.checkpoint.zstd {
                        fields["unpacked_bytes"] = unpacked_bytes.into();
                    }
                }
                self.event("checkpoint", step, fields);
                self.upload(step);
            }
            Some(error) => {
                self.not_written(step, &error, ", training goes on");
                self.failure = Some(Error::Checkpoint(checkpoint::CheckpointError::Peer { step, why: error }));
            }
        }
    }

    /// Tells the coordinator what this rank's writer has done.
    pub(super) fn tell(&mut self, outcome: Outcome) {
        let Some(group) = &mut self.group else { return };
        if let Outcome::Written { step, .. } | Outcome::Committed { step, .. } | Outcome::Failed { step, .. } = &outcome
        {
            group.writing.remove(step);
        }
        match outcome {
            Outcome::Written { step, part, .. } => {
                let (json, error) = match serde_json::to_string(&part) {
                    Ok(json) => (json, None),
                    Err(error) => (String::new(), Some(error.to_string())),
                };
                group.control.say(From::Part(PartMessage { step, json, error }));
            }
            Outcome::Committed { step, bytes, unpacked_bytes, seconds, path, .. } => {
                group.bytes.insert(step, [bytes, unpacked_bytes]);
                tracing::info!(step, bytes, seconds, path = %path.display(), "a checkpoint has its name");
                group.control.say(From::Committed(Committed { step, error: None }));
            }
            Outcome::Failed { step, error } => {
                let error = Some(error.to_string());
                if group.committing.contains(&step) {
                    group.control.say(From::Committed(Committed { step, error }));
                } else {
                    group.control.say(From::Part(PartMessage { step, json: String::new(), error }));
                }
            }
            Outcome::Retained { step, removed } => {
                self.event("checkpoints_removed", step, json!({ "removed": removed }));
            }
        }
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// A rank is lost.
    pub(super) fn wait_for_all(&self) -> Result<()> {
        let Some(engine) = self.stepper.engine() else { return Ok(()) };
        self.stepper.progress().enter(Stage::Waiting);
        engine.gather(Vec::new()).map_err(StreamError::from)?;
        self.stepper.progress().enter(Stage::Ending);
        Ok(())
    }

    /// Ends the connections to the other ranks, if there are any.
    pub(super) fn say_goodbye(&self) {
        if let Some(group) = &self.group {
            group.say_goodbye();
        }
    }

    /// Compares all ranks' parameters before anything is made of them that stays.
    ///
    /// # Errors
    /// They differ, or a rank is lost.
    pub(super) fn compare(&self) -> Result<()> {
        let Some(engine) = self.stepper.engine() else { return Ok(()) };
        self.stepper.progress().enter(Stage::Waiting);
        let start = Instant::now();
        assert!(self.stepper.is_settled(), "the parameters are of the step before");
        let own = self.state.fingerprint(&self.config, self.stepper.plan().parts()).map(f64::from);
        let all = engine.gather(own.to_vec()).map_err(StreamError::from)?;
        self.span("compare", start);
        let hash = |values: &Vec<f64>| -> Option<[u8; 32]> {
            let bytes: Vec<u8> = values.iter().map(|value| *value as u8).collect();
            bytes.try_into().ok()
        };
        let hashes: Vec<_> = all.iter().map(hash).collect();
        same_parameters(&hashes, self.stepper.places(), self.state.step)
    }

    /// Waits until no checkpoint is under way. Everybody's heartbeat bounds it.
    ///
    /// # Errors
    /// The run has ended for everybody.
    pub(super) fn settle_all(&mut self) -> Result<()> {
        let mut stage = None;
        while let Some(group) = self.group.as_ref().filter(|group| !group.saving.is_empty()) {
            // Whoever waits for another rank's disk is not the one to blame.
            let now = if group.writing.is_empty() { Stage::Waiting } else { Stage::Checkpointing };
            if stage.replace(now) != Some(now) {
                self.stepper.progress().enter(now);
            }
            let outcomes = self.writer.outcomes();
            self.note(outcomes, "");
            self.listen(Duration::from_millis(20))?;
        }
        Ok(())
    }
}
