//! What the ranks of a checkpoint had left out, onto the ranks that go on from it.

use checkpoint::reader::Checkpoint;
use parallel::collective::SubGroup;
use parallel::data::Plan;
use parallel::data::exchange::Exchange;
use parallel::data::owed::Owed;
use parallel::wire::control::Start;
use serde_json::json;

use super::Books;
use crate::error::Result;
use crate::recipe::Recipe;
use crate::recipe::resolved::Parallel;
use crate::run::Request;
use crate::state::folders::Folders;
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
    /// What one rank alone owes, and what became of it.
    ///
    /// # Errors
    /// Something of it is not there, or damaged.
    pub fn owed(&self, folders: Option<&Folders<'_>>, plan: &Plan) -> Result<(Owed, Regained)> {
        let Some(folders) = folders else { return Ok((Owed::default(), Regained::default())) };
        let held = state::held(folders.here())?;
        let has_unsent = held.has_unsent();
        let mut owed = if has_unsent { Owed::new(plan.parameters().len()) } else { Owed::default() };
        let regained =
            self.restore(folders, (has_unsent, held.folded), plan, |index, _, owner| owed.enter(index, owner))?;
        if self.request.tamper.forget_owner {
            owed.settle();
        }
        Ok((owed, regained))
    }

    /// Gives one rank of several its part, and says what became of all of it.
    ///
    /// # Errors
    /// As [`owed`](Self::owed); a rank is lost.
    pub fn give(&self, folders: &Folders<'_>, held: Held, exchange: &mut Exchange) -> Result<Regained> {
        let newest = folders.here();
        let plan = exchange.plan().clone();
        // On other ranks zeros need not be added up; on the same ones they are a checkpoint's like any others.
        let has_some = held.has_unsent() || (held.residuals && !held.folded && !is_of_others(newest, self.mesh)?);
        let regained = self.restore(folders, (has_some, held.folded), &plan, |index, sender, owner| {
            exchange.restore(index, &sender, owner).expect("the shapes are the plan's");
        })?;
        if self.request.tamper.forget_owner {
            exchange.forget_owner();
        }
        Ok(regained)
    }

    fn restore(
        &self,
        folders: &Folders<'_>,
        (has_some, folded): (bool, bool),
        plan: &Plan,
        take: impl FnMut(usize, Vec<f32>, Vec<f32>),
    ) -> Result<Regained> {
        let newest = folders.here();
        let before = Mesh::of(newest, &state::meta(newest)?)?;
        let mut lost = Vec::new();
        let slices = self.mesh.replica() > 1 || (before.replica() > 1 && !self.request.resume_without_residuals);
        if has_some && slices {
            let (after, twice) = (self.mesh, self.request.tamper.fold_twice);
            Slices { folders, before: &before, folded, after, data: self.rank / after.replica(), twice }
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
                without_lost: self.request.resume_without_residuals,
                twice: self.request.tamper.fold_twice,
            };
            lost = way.restore(plan, take)?;
        }
        let lost = lost.into_iter().map(|rank| (rank, before.host_of(rank).to_owned())).collect();
        let same = before.cuts_like(self.mesh);
        Ok(Regained { recut: (!same).then(|| Recut { before, after: self.mesh.clone(), folded: has_some }), lost })
    }
}

/// What became of what the ranks of a checkpoint had left out.
#[derive(Debug, Default)]
pub struct Regained {
    /// The change of ranks, if they are others.
    recut: Option<Recut>,
    /// The ranks of the checkpoint, each with its host, whose part nobody has any more.
    lost: Vec<(usize, String)>,
}

impl Regained {
    /// What a rank without books says.
    pub fn log(&self) {
        if let Some(recut) = &self.recut {
            tracing::info!("{recut}");
        }
    }
}

impl Books {
    /// Says that the ranks are not those of the checkpoint, and that something is lost, where that is so.
    pub(super) fn regained(&mut self, Regained { recut, lost }: &Regained, step: u64) {
        if let Some(recut) = recut {
            self.metrics.event("recut", step, recut.fields());
            self.progress.say(&recut.to_string());
        }
        if !lost.is_empty() {
            let (ranks, hosts): (Vec<_>, Vec<_>) = lost.iter().map(|(rank, host)| (*rank, host)).unzip();
            self.metrics.event("residuals_lost", step, json!({ "ranks": ranks, "hosts": hosts }));
            let each: Vec<String> = lost.iter().map(|(rank, host)| format!("rank {rank} on host {host}")).collect();
            self.progress.say(&format!(
                "LOST: what {} had left out of gradients up to step {step} is in no run folder, and is never added",
                each.join(", ")
            ));
        }
    }
}

/// All ranks, as checkpoints name them.
pub fn mesh(recipe: &Recipe, start: &Start) -> Mesh {
    let hosts = start.peers.iter().map(|peer| peer.host.clone()).collect();
    let Parallel { data, pipeline, tensor, group, .. } = recipe.parallel;
    Mesh { data, pipeline, tensor, group, hosts }
}

/// Whether a checkpoint is of other ranks than these.
///
/// # Errors
/// It was not written by this trainer.
pub fn is_of_others(checkpoint: &Checkpoint, mesh: &Mesh) -> Result<bool> {
    Ok(!Mesh::of(checkpoint, &state::meta(checkpoint)?)?.cuts_like(mesh))
}
