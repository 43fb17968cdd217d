//! What a machine may find on its disk after a loss of power.

use std::collections::BTreeMap;

use super::{Change, Node, SimulatedDisk, lock};

/// What a disk writes at once or not at all, or, where the power goes in the middle, in part.
const SECTOR: usize = 512;

impl SimulatedDisk {
    /// The disk that a machine finds after a loss of power: what was durable and nothing else, and no fault planned.
    #[must_use]
    pub fn after_crash(&self) -> Self {
        let durable = |node: &Node| match node {
            Node::File { synced, .. } => found(synced.clone()),
            Node::Folder { synced, .. } => folder(synced.clone()),
        };
        Self::of(lock(&self.state).nodes.iter().map(durable).collect())
    }

    /// The same, but that some of what was not synced has reached the disk, in no order: of every file any sectors, some of
    /// them torn; any length between the old and the new; of every folder any changes of names. A seed repeats its choice.
    #[must_use]
    pub fn after_crash_in_disorder(&self, seed: u64) -> Self {
        let mut dice = Dice(seed);
        let nodes = lock(&self.state).nodes.clone();
        let left = nodes.into_iter().map(|node| match node {
            Node::File { written, synced, .. } if written == synced => found(synced),
            Node::File { written, synced, .. } => found(sectors(&written, &synced, &mut dice)),
            Node::Folder { synced, changes, .. } => folder(names(synced, changes, &mut dice)),
        });
        Self::of(left.collect())
    }
}

fn found(bytes: Vec<u8>) -> Node {
    Node::File { written: bytes.clone(), synced: bytes, forgotten: false }
}

fn folder(entries: BTreeMap<String, usize>) -> Node {
    Node::Folder { synced: entries.clone(), entries, changes: Vec::new() }
}

/// A file of which each sector is as it was, as it should be, or new up to somewhere in it; files are only appended to.
fn sectors(written: &[u8], synced: &[u8], dice: &mut Dice) -> Vec<u8> {
    // The length is a matter of its own: it may be durable before the bytes are, which then are zeros.
    let len = synced.len() + dice.below(written.len() - synced.len() + 1);
    let mut left = synced.to_vec();
    left.resize(len, 0);
    for (index, sector) in left.chunks_mut(SECTOR).enumerate() {
        let new = &written[index * SECTOR..][..sector.len()];
        let landed = [0, sector.len(), dice.below(sector.len() + 1)][dice.below(3)];
        sector[..landed].copy_from_slice(&new[..landed]);
    }
    left
}

/// The names of a folder after any of these changes. That a later one is there and an earlier one is not is all that
/// another order could bring: of one file or folder they follow each other, since it has one name at a time.
fn names(mut entries: BTreeMap<String, usize>, changes: Vec<Change>, dice: &mut Dice) -> BTreeMap<String, usize> {
    for change in changes.into_iter().filter(|_| dice.below(2) == 1) {
        match change {
            Change::Add { name, node } => _ = entries.insert(name, node),
            Change::Remove { name } => _ = entries.remove(&name),
            Change::Rename { from, to, node } => {
                // The old name goes with the change that brings the new one, unless it is another file's by now.
                if entries.get(&from) == Some(&node) {
                    entries.remove(&from);
                }
                entries.insert(to, node);
            }
        }
    }
    entries
}

/// Numbers from a seed ([SplitMix64](https://prng.di.unimi.it/splitmix64.c)).
struct Dice(u64);

impl Dice {
    const fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}
