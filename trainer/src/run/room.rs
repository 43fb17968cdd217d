//! Whether a checkpoint that is due can be taken: two may be on their way at a time.

use std::time::{Duration, Instant};

use parallel::progress::Stage;
use serde_json::json;

use super::Run;
use crate::error::Result;
use crate::recipe::resolved::WhenBusy;

/// How long to wait before looking again: it decides nothing but how soon a wait ends.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Run {
    /// The checkpoint of a step in the middle of a run, held back as the recipe says.
    ///
    /// # Errors
    /// The run has ended for everybody.
    pub(super) fn checkpoint_in_passing(&mut self) -> Result<()> {
        self.writer.limit(self.recipe.checkpoint.write_bytes_per_s_max);
        if self.recipe.checkpoint.when_busy == WhenBusy::Wait {
            self.wait_for_room()?;
        }
        self.checkpoint()
    }

    /// Waits until this rank's writer can take a snapshot. All ranks do so at the same step, and one that can go on can still
    /// when the others can; so nobody has to ask them. Their heartbeats bound it.
    fn wait_for_room(&mut self) -> Result<()> {
        let (start, step) = (Instant::now(), self.state.step);
        let (mut stage, mut moved) = (None, self.writer.moved_bytes());
        while !self.writer.ready(step) {
            // A signalled run has little time, and what is under way is to be whole before the checkpoint at its end.
            if self.stop.asked() {
                self.writer.limit(0);
            }
            // Whoever waits for another rank's disk is not the one to blame.
            let waits = self.group.as_ref().is_some_and(|group| group.writing.is_empty());
            let now = if waits { Stage::Waiting } else { Stage::Checkpointing };
            if stage.replace(now) != Some(now) {
                self.stepper.progress().enter(now);
            }
            if self.group.is_some() {
                self.listen(LOOK_AGAIN)?;
            } else {
                self.writer.wait(LOOK_AGAIN);
            }
            // A disk that is slow, or held back, is no disk that hangs.
            let so_far = self.writer.moved_bytes();
            if std::mem::replace(&mut moved, so_far) != so_far {
                self.stepper.progress().advance();
            }
            let outcomes = self.writer.outcomes();
            self.note(outcomes, ", training goes on");
        }
        // A rank that was busy when it voted is not any more.
        self.busy = false;
        if stage.is_some() {
            let seconds = start.elapsed().as_secs_f64();
            self.stall_s += seconds;
            self.event(
                "snapshot_waited",
                step,
                json!({ "seconds": seconds, "why": "two snapshots were being written" }),
            );
        }
        Ok(())
    }
}
