//! What the ranks of a checkpoint had left out, onto the ranks that go on from it.

use checkpoint::reader::Checkpoint;
use parallel::collective::SubGroup;
use parallel::data::Plan;
use parallel::data::exchange::Exchange;
use parallel::data::owed::Owed;
use parallel::wire::control::Start;

use super::Books;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::recipe::resolved::Parallel;
use crate::run::Request;
use crate::state::mesh::{Mesh, Recut};
use crate::state::residuals::Way;
use crate::state::slices::Slices;
use crate::state::{self, Held};

/// Who goes on.
pub struct Restart<'a> {
    /// What was asked for.
    pub request: &'a Request,
    /// All ranks.
    pub mesh: &'a Mesh,
    /// This one.
    pub rank: usize,
    /// The way to the others, where they do not all see one run folder.
    pub others: Option<&'a SubGroup>,
}

impl Restart<'_> {
    /// What one rank alone owes, and whether the checkpoint is of several.
    ///
    /// # Errors
    /// Something of it is not there, or damaged.
    pub fn owed(&self, newest: Option<&Checkpoint>, plan: &Plan) -> Result<(Owed, Option<Recut>)> {
        let Some(newest) = newest else { return Ok((Owed::default(), None)) };
        let held = state::held(newest)?;
        let has_unsent = held.has_unsent();
        let mut owed = if has_unsent { Owed::new(plan.parameters().len()) } else { Owed::default() };
        let recut =
            self.restore(newest, (has_unsent, held.folded), plan, |index, _, owner| owed.enter(index, owner))?;
        if self.request.tamper.forget_owner {
            owed.settle();
        }
        Ok((owed, recut))
    }

    /// Gives one rank of several its part, and says whether the checkpoint is of others.
    ///
    /// # Errors
    /// As [`owed`](Self::owed); a rank is lost.
    pub fn give(&self, newest: &Checkpoint, held: Held, exchange: &mut Exchange) -> Result<Option<Recut>> {
        let plan = exchange.plan().clone();
        // On other ranks zeros need not be added up; on the same ones they are a checkpoint's like any others.
        let has_some = held.has_unsent() || (held.residuals && !held.folded && !is_of_others(newest, self.mesh)?);
        let recut = self.restore(newest, (has_some, held.folded), &plan, |index, sender, owner| {
            exchange.restore(index, &sender, owner).expect("the shapes are the plan's");
        })?;
        if self.request.tamper.forget_owner {
            exchange.forget_owner();
        }
        Ok(recut)
    }

    fn restore(
        &self,
        newest: &Checkpoint,
        (has_some, folded): (bool, bool),
        plan: &Plan,
        take: impl FnMut(usize, Vec<f32>, Vec<f32>),
    ) -> Result<Option<Recut>> {
        let before = Mesh::of(newest, &state::meta(newest)?)?;
        if has_some && self.mesh.tensor > 1 {
            let (checkpoint, after, twice) = (newest, self.mesh, self.request.tamper.fold_twice);
            Slices { checkpoint, before: &before, folded, after, data: self.rank / after.tensor, twice }
                .restore(plan, take)?;
        } else if has_some {
            let way = Way {
                run: &self.request.name,
                checkpoint: newest,
                before: &before,
                folded,
                after: self.mesh,
                rank: self.rank,
                others: self.others,
                twice: self.request.tamper.fold_twice,
            };
            way.restore(plan, take)?;
        }
        let same = before.cuts_like(self.mesh);
        Ok((!same).then(|| Recut { before, after: self.mesh.clone(), folded: has_some }))
    }
}

impl Books {
    /// Says that the ranks are not those of the checkpoint, where that is so.
    pub(super) fn recut(&mut self, recut: Option<&Recut>, step: u64) {
        if let Some(recut) = recut {
            self.metrics.event("recut", step, recut.fields());
            self.progress.say(&recut.to_string());
        }
    }
}

/// All ranks, as checkpoints name them.
pub fn mesh(recipe: &Recipe, start: &Start) -> Mesh {
    let hosts = start.peers.iter().map(|peer| peer.host.clone()).collect();
    let Parallel { data, tensor, group, .. } = recipe.parallel;
    Mesh { data, tensor, group, hosts }
}

/// Whether a checkpoint is of other ranks than these.
///
/// # Errors
/// It was not written by this trainer.
pub fn is_of_others(checkpoint: &Checkpoint, mesh: &Mesh) -> Result<bool> {
    Ok(!Mesh::of(checkpoint, &state::meta(checkpoint)?)?.cuts_like(mesh))
}
