//! What one rank's side of the sum remembers of what it left out.

use std::ops::Range;

use compression::{Region, Residual, ResidualError, Side};

use super::Exchange;
use crate::data::shard::shard;

impl Exchange {
    /// Goes on with what a checkpoint kept of one tensor: what this rank left out as a sender, and as an owner.
    ///
    /// # Errors
    /// They are not of the tensor, or of this rank's shard; nothing is changed.
    ///
    /// # Panics
    /// When the sender's part is not zero where this rank sends nothing to an owner, in its own shard above all:
    /// [`recut`](compression::residual::recut) gives what another mesh left there to its owner.
    pub fn restore(&mut self, index: usize, sender: &[f32], owner: Vec<f32>) -> Result<(), ResidualError> {
        let (elements, owned) = (self.tensors[index].sum.len(), self.owned(index).len());
        let rank = Side::Sender { rank: self.group.rank };
        for (side, expected, found) in [(rank, elements, sender.len()), (Side::Owner, owned, owner.len())] {
            if expected != found {
                return Err(ResidualError::Length { side, expected, found });
            }
        }
        let mut silent = self.silent(index);
        assert!(silent.all(|range| sender[range].iter().all(|&x| x == 0.0)), "nothing is sent from there");
        let slot = self.plan.slot(index).clone();
        let bucket = &mut self.buckets[slot.bucket].sender;
        bucket.resize(self.plan.buckets()[slot.bucket].elements, 0.0);
        bucket[slot.range].copy_from_slice(sender);
        self.tensors[index].owner = owner;
        Ok(())
    }

    /// Writes to `out` what this rank's committed steps left out of one tensor, as a sender over the whole tensor or as the owner of
    /// its shard, from the side's element `start` on; zeros where that is nothing.
    ///
    /// # Panics
    /// When the side has not so many elements.
    pub fn copy_residual(&self, index: usize, side: Side, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        let (values, elements) = match side {
            Side::Sender { .. } => (&self.buckets[self.plan.slot(index).bucket].sender, self.tensors[index].sum.len()),
            Side::Owner => (&self.tensors[index].owner, self.owned(index).len()),
        };
        assert!(range.end <= elements, "elements {range:?} of {elements}");
        match side {
            _ if values.is_empty() => out.fill(0.0),
            Side::Owner => out.copy_from_slice(&values[range]),
            Side::Sender { .. } => {
                for (shard, is_silent) in self.shards(index) {
                    let here = shard.start.max(range.start)..shard.end.min(range.end);
                    if here.is_empty() {
                        continue;
                    }
                    let out = &mut out[here.start - start..here.end - start];
                    match is_silent {
                        // What lies in the buffer there was not left out: it was added, or sent to a mate, as it was.
                        true => out.fill(0.0),
                        false => out.copy_from_slice(&values[self.lies(index, &here)]),
                    }
                }
            }
        }
    }

    /// Whether this rank's committed steps may have left out something of one tensor, as a sender or as an owner.
    #[must_use]
    pub fn may_owe(&self, index: usize, side: Side) -> bool {
        match side {
            Side::Sender { .. } => !self.buckets[self.plan.slot(index).bucket].sender.is_empty(),
            Side::Owner => !self.tensors[index].owner.is_empty(),
        }
    }

    /// Everything that this rank left out of one tensor, by regions: what another mesh starts from
    /// ([`recut`](compression::residual::recut)).
    #[must_use]
    pub fn residuals(&self, index: usize) -> Vec<Residual> {
        let whole = Region::whole(&self.plan.parameters()[index].shape).expect("the plan has checked the shape");
        let owned = self.owned(index);
        let owned = Region { flat_start: owned.start, flat_end: owned.end, ..whole.clone() };
        let sides = [(Side::Sender { rank: self.group.rank }, whole), (Side::Owner, owned)];
        let residual = |(side, region): (Side, Region)| {
            let mut values = vec![0.0; region.len()];
            self.copy_residual(index, side, 0, &mut values);
            Residual { side, region, values }
        };
        sides.into_iter().filter(|(side, _)| self.may_owe(index, *side)).map(residual).collect()
    }

    /// The shards of a tensor, and whether this rank encodes nothing for their owners: its own, and what other members of its
    /// node add.
    fn shards(&self, index: usize) -> impl Iterator<Item = (Range<usize>, bool)> + use<> {
        let (nodes, elements) = (self.group.nodes(), self.tensors[index].sum.len());
        let is_silent = move |owner| owner == nodes.rank || nodes.adds(owner) != nodes.rank;
        (0..nodes.ranks).map(move |owner| (shard(elements, owner, nodes.ranks), is_silent(owner)))
    }

    /// The parts of a tensor of which this rank encodes nothing for their owners.
    fn silent(&self, index: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        self.shards(index).filter_map(|(shard, is_silent)| is_silent.then_some(shard))
    }

    /// What this step left out is remembered.
    pub(super) fn commit(&mut self) {
        let plan = self.plan.clone();
        for (number, places) in plan.buckets().iter().enumerate() {
            let is_lossy = places.parameters.iter().any(|&index| self.tensors[index].codec.is_lossy());
            if !is_lossy || !self.feedback {
                // Everything was sent, or is forgotten.
                self.buckets[number].sender = Vec::new();
                continue;
            }
            // Where nothing is encoded for an owner it holds whatever it holds, and whoever asks is told zeros.
            #[cfg_attr(not(test), expect(unused_mut, reason = "tests fill it"))]
            let mut left = self.buckets[number].given.take().expect("a sum is complete once every bucket was given");
            // Whoever reads it by mistake is noticed by every test.
            #[cfg(test)]
            for &index in &places.parameters {
                let start = self.plan.slot(index).range.start;
                let silent = self.silent(index);
                silent.for_each(|range| left[start + range.start..start + range.end].fill(f32::NAN));
            }
            self.buckets[number].given = Some(std::mem::replace(&mut self.buckets[number].sender, left));
        }
        for tensor in &mut self.tensors {
            if tensor.codec.second_stage().is_lossy() && self.feedback && self.parameters.is_none() {
                std::mem::swap(&mut tensor.owner, &mut tensor.reduced);
            } else {
                tensor.owner = Vec::new();
            }
        }
    }
}
