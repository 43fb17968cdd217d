//! What ranks left out of gradients, onto ranks that hold parts of a model. Each reads what lies in its part, whoever wrote it: on
//! the same mesh its own two sides, and on another one the sum of all sides of its shard.

use checkpoint::reader::Want;
use compression::{Region, Side};
use parallel::data::rules::may_be_lossy;
use parallel::data::shard::shard;
use parallel::data::{Part, Plan};

use super::folders::Folders;
use super::mesh::Mesh;
use super::residuals::{added_up, folded_name, inside, owner_name, sender_name, sides};
use crate::error::Result;

/// From a checkpoint onto one rank of a mesh.
pub struct Slices<'a> {
    /// Where it lies.
    pub folders: &'a Folders<'a>,
    /// The ranks that wrote it.
    pub before: &'a Mesh,
    /// Whether it keeps the sum alone.
    pub folded: bool,
    /// The ranks that go on.
    pub after: &'a Mesh,
    /// This one's place among those that sum gradients with it.
    pub data: usize,
    /// Counts twice what the first sender left out: the control of a test, and of no other use.
    pub twice: bool,
}

impl Slices<'_> {
    /// Hands to `take`, for every tensor that may travel in a lossy codec, its index, this rank's side as a sender over its
    /// part, and its side as the owner of its shard of that.
    ///
    /// # Errors
    /// Some of it is in no folder, or damaged; a rank is lost.
    pub fn restore(&self, plan: &Plan, mut take: impl FnMut(usize, Vec<f32>, Vec<f32>)) -> Result<()> {
        let same = self.before.cuts_like(self.after) && !self.folded;
        for (index, part) in plan.parts().iter().enumerate().filter(|(_, part)| may_be_lossy(&part.whole)) {
            let own = shard(part.region.len(), self.data, self.after.data);
            let shard = part.region.part(own.clone());
            let mut sender = vec![0.0; part.region.len()];
            let owner = match same {
                true => {
                    let name = &part.whole.name;
                    if self.after.data > 1 {
                        sender = self.read(part, &sender_name(name, self.data), part.region.clone())?;
                    }
                    self.read(part, &owner_name(name), shard)?
                }
                false => self.fold(part, &shard)?,
            };
            take(index, sender, owner);
        }
        Ok(())
    }

    /// What all sides left out of these elements: the owners, and the senders in the order of their ranks.
    fn fold(&self, part: &Part, shard: &Region) -> Result<Vec<f32>> {
        let (name, all) = (&part.whole.name, 0..shard.len());
        let senders = (0..self.before.data).flat_map(|rank| sides(rank, self.before.data));
        let senders: Vec<Side> = senders.filter(|side| matches!(side, Side::Sender { .. }) && !self.folded).collect();
        let mut kept = Vec::new();
        for side in [Side::Owner].into_iter().chain(senders) {
            let tensor = match side {
                Side::Owner if self.folded => folded_name(name),
                Side::Owner => owner_name(name),
                Side::Sender { rank } => sender_name(name, rank),
            };
            kept.push(inside(&all, side, &all, self.read(part, &tensor, shard.clone())?));
        }
        if let Some(first) = kept.iter().find(|kept| self.twice && kept.side == Side::Sender { rank: 0 }).cloned() {
            kept.push(compression::Residual { side: Side::Sender { rank: usize::MAX }, ..first });
        }
        Ok(added_up(shard.len(), &kept))
    }

    fn read(&self, part: &Part, tensor: &str, region: Region) -> Result<Vec<f32>> {
        let mut out = vec![0.0; region.len()];
        self.folders.load(&mut [Want { tensor, shape: &part.whole.shape, region, out: &mut out }])?;
        Ok(out)
    }
}
