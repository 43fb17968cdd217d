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
    /// part, and its side as the owner of its shard of that. Ranks hold other tensors, and load all of theirs at once, side by side: so
    /// all load equally often. Memory: what all sides left out of this rank's shards.
    ///
    /// # Errors
    /// Some of it is in no folder, or damaged; a rank is lost.
    pub fn restore(&self, plan: &Plan, mut take: impl FnMut(usize, Vec<f32>, Vec<f32>)) -> Result<()> {
        let same = self.before.cuts_like(self.after) && !self.folded;
        let lossy: Vec<(usize, &Part)> =
            plan.parts().iter().enumerate().filter(|(_, part)| may_be_lossy(&part.whole)).collect();
        let shard = |part: &Part| part.region.part(shard(part.region.len(), self.data, self.after.data));
        let owners = match same {
            true => self.read(&lossy, owner_name, shard)?,
            false => self.fold(&lossy, shard)?,
        };
        let mut senders: Vec<Vec<f32>> = lossy.iter().map(|(_, part)| vec![0.0; part.region.len()]).collect();
        if same && self.after.data > 1 {
            senders = self.read(&lossy, |name| sender_name(name, self.data), |part| part.region.clone())?;
        }
        for (((index, _), sender), owner) in lossy.into_iter().zip(senders).zip(owners) {
            take(index, sender, owner);
        }
        Ok(())
    }

    /// What all sides left out of this rank's shard of each part: the owners, and the senders in the order of their ranks.
    fn fold(&self, lossy: &[(usize, &Part)], shard: impl Fn(&Part) -> Region) -> Result<Vec<Vec<f32>>> {
        let senders = (0..self.before.data).flat_map(|rank| sides(rank, self.before.data));
        let senders: Vec<Side> = senders.filter(|side| matches!(side, Side::Sender { .. }) && !self.folded).collect();
        let mut kept: Vec<Vec<compression::Residual>> = vec![Vec::new(); lossy.len()];
        for side in [Side::Owner].into_iter().chain(senders) {
            let tensor = |name: &str| match side {
                Side::Owner if self.folded => folded_name(name),
                Side::Owner => owner_name(name),
                Side::Sender { rank } => sender_name(name, rank),
            };
            for (values, kept) in self.read(lossy, tensor, &shard)?.into_iter().zip(&mut kept) {
                let all = 0..values.len();
                kept.push(inside(&all, side, &all, values));
            }
        }
        let first = |kept: &Vec<compression::Residual>| {
            kept.iter().find(|kept| self.twice && kept.side == Side::Sender { rank: 0 }).cloned()
        };
        Ok(kept
            .into_iter()
            .zip(lossy)
            .map(|(mut kept, (_, part))| {
                let again = first(&kept);
                kept.extend(
                    again.map(|first| compression::Residual { side: Side::Sender { rank: usize::MAX }, ..first }),
                );
                added_up(shard(part).len(), &kept)
            })
            .collect())
    }

    /// Of each part the elements of `region`, in the tensor that is named after it.
    fn read(
        &self,
        lossy: &[(usize, &Part)],
        tensor: impl Fn(&str) -> String,
        region: impl Fn(&Part) -> Region,
    ) -> Result<Vec<Vec<f32>>> {
        let names: Vec<String> = lossy.iter().map(|(_, part)| tensor(&part.whole.name)).collect();
        let regions: Vec<Region> = lossy.iter().map(|(_, part)| region(part)).collect();
        let mut values: Vec<Vec<f32>> = regions.iter().map(|region| vec![0.0; region.len()]).collect();
        let wants = lossy.iter().zip(&names).zip(regions).zip(&mut values);
        let wants =
            wants.map(|((((_, part), tensor), region), out)| Want { tensor, shape: &part.whole.shape, region, out });
        self.folders.load(&mut wants.collect::<Vec<_>>())?;
        Ok(values)
    }
}
