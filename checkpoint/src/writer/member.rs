//! What only one rank of several asks of its writer: to commit all ranks' parts, to settle a step, to abandon it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::flight::Phase;
use super::save::Extras;
use super::thread::{Job, Role};
use super::{Member, Outcome, Part, PieceSpec, Retention, Writer, folder};
use crate::disk::Disk;
use crate::error::CheckpointError;

impl Writer {
    /// One rank's writer among several that share `folder`, of these pieces. The folder is made if it does not exist. The
    /// lead puts it in order as [`new`](Self::new) does, here and at no other time: the caller sees to it that this has
    /// returned on the lead before any other member is offered a snapshot. `retention` is the lead's matter; the others'
    /// is not looked at.
    ///
    /// # Errors
    /// Pieces that make no sense, or what the file system says.
    pub fn member(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        pieces: Vec<PieceSpec>,
        member: Member,
        retention: Retention,
    ) -> Result<Self, CheckpointError> {
        Self::start(disk, folder, pieces, Role::Member(member), retention)
    }

    /// On the lead, when `parts` are those of all ranks that share its folder, its own among them: makes a checkpoint of
    /// them under the name `id`, with the state and the attachments of its own offer. It does not wait: the outcome is
    /// [`Outcome::Committed`] or [`Outcome::Failed`], the latter also where this rank does not lead, where its own part is
    /// not [written](Outcome::Written), or where `parts` do not fit together.
    ///
    /// `id` is the same in every folder of one commit and differs from commit to commit, also of the same step.
    pub fn commit(&mut self, step: u64, id: String, parts: Vec<Part>) {
        self.collect();
        match self.begin_commit(step) {
            Ok((at, extras)) => self.send(at, Job::Commit { step, id, parts, extras }),
            Err(why) => {
                let (path, why) = (self.target.folder.clone(), why.to_owned());
                let error = CheckpointError::Commit { path, step, why };
                self.finished.push(Outcome::Failed { step, error });
            }
        }
    }

    fn begin_commit(&mut self, step: u64) -> Result<(usize, Extras), &'static str> {
        if !matches!(self.target.role, Role::Member(Member { lead: true, .. })) {
            return Err("this writer is not the lead of several ranks");
        }
        let at = self.unsettled(step).ok_or("it is not in flight here")?;
        Ok((at, self.flights[at].begin_commit()?))
    }

    /// On every member, when it is known what became of the step everywhere: `kept` if every folder has committed it. It
    /// does not wait. The step's place is free once the thread has done what follows:
    ///
    /// - kept: the lead removes what retention gives up, and reports it as [`Outcome::Retained`] if there was any. Only
    ///   checkpoints below `step` are given up.
    /// - not kept: `step-N.partial` is removed, unless other ranks have files in it and this one has none: they have begun
    ///   the step anew. A folder that has committed the step already keeps it. That does no harm: who resumes takes the
    ///   newest `id` that all folders hold.
    ///
    /// A step that is not in flight, or is settled, is left alone. If the lead is told of a step as kept that it has not
    /// committed, retention does not follow.
    pub fn settle(&mut self, step: u64, kept: bool) {
        self.collect();
        let Some(at) = self.unsettled(step) else { return };
        self.flights[at].settled = true;
        let (leads, committed) = (self.target.role.leads(), self.flights[at].phase == Phase::Committed);
        match (kept, leads) {
            (true, true) if committed => self.send(at, Job::Retain { step }),
            (true, false) => {}
            (true, true) | (false, _) => self.send(at, Job::GiveUp { step }),
        }
        self.flights.retain(|flight| !flight.over());
    }

    /// For a run that ends because another process has failed: what the thread has not begun it will not do, and when it
    /// is done with what it has begun, `step-N.partial` of every step in flight is removed. Every member may do so, also
    /// at once. What is committed stays. Nothing is in flight afterwards.
    ///
    /// It waits for what the thread is doing: as long as the disk takes for one part or one commit, and for removals.
    pub fn abandon(&mut self) -> Vec<Outcome> {
        self.target.abandoned.store(true, Ordering::SeqCst);
        // Whoever abandons waits.
        self.limit(0);
        let steps: Vec<u64> = self.flights.iter().map(|flight| flight.step).collect();
        let finished = self.flush();
        for step in steps {
            // A committed step has no such folder any more.
            folder::give_up(&self.target, step);
        }
        self.flights.clear();
        self.target.abandoned.store(false, Ordering::SeqCst);
        finished
    }

    fn unsettled(&self, step: u64) -> Option<usize> {
        self.flights.iter().position(|flight| flight.step == step && !flight.settled)
    }
}
