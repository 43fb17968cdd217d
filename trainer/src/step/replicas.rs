//! Whether ranks that are to hold the same parameters do.

use std::ops::Range;

use crate::error::{Error, Result};

/// How the ranks that hold one replica of the model share it. They follow each other, and those of a stage too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Stages of a pipeline.
    pub stages: usize,
    /// Ranks of a stage, each with a part of its layers.
    pub tensor: usize,
    /// Whether the first and the last stage hold the same table.
    pub tied: bool,
}

impl Places {
    /// One rank holds all of it.
    pub const ONE: Self = Self { stages: 1, tensor: 1, tied: false };

    /// Ranks of a replica.
    #[must_use]
    pub const fn ranks(self) -> usize {
        self.stages * self.tensor
    }

    /// The ranks of the first replica with which a rank is compared, and in which bytes of a
    /// [fingerprint](crate::state::State::fingerprint): in its own part; in what all ranks of its stage hold; in the table.
    fn compared(self, rank: usize) -> Vec<(usize, Range<usize>)> {
        if self.ranks() == 1 {
            return vec![(0, 0..32)];
        }
        let place = rank % self.ranks();
        let (stage, part) = (place / self.tensor, place % self.tensor);
        let mut all = vec![(place, 0..16), (stage * self.tensor, 16..24)];
        if self.tied && stage + 1 == self.stages {
            all.push((part, 24..32));
        }
        all
    }
}

/// Compares the ranks' [fingerprints](crate::state::State::fingerprint) after step `step`, where they were sent.
///
/// # Errors
/// They differ.
pub fn same_parameters(hashes: &[Option<[u8; 32]>], places: Places, step: u64) -> Result<()> {
    let text = |hash: [u8; 32]| blake3::Hash::from_bytes(hash).to_hex().to_string();
    let bytes_of = |rank: usize, bytes: &Range<usize>| hashes[rank].map(|hash| hash[bytes.clone()].to_vec());
    let other = |rank: usize| {
        let differs = |(from, bytes): &(usize, Range<usize>)| bytes_of(rank, bytes) != bytes_of(*from, bytes);
        places.compared(rank).into_iter().find(differs).map(|(from, _)| from)
    };
    match (0..hashes.len()).find_map(|rank| Some((rank, other(rank)?))) {
        Some((rank, other)) => {
            let hashes = [other, rank].map(|rank| hashes[rank].map_or_else(|| "none".into(), text));
            Err(Error::Replicas { step, rank, other, hashes })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENSOR: Places = Places { stages: 1, tensor: 2, tied: false };

    /// A fingerprint of a part and of what all of a stage hold.
    fn of(part: u8, all: u8) -> Option<[u8; 32]> {
        tied(part, all, 0)
    }

    /// The same, with a table.
    fn tied(part: u8, all: u8, table: u8) -> Option<[u8; 32]> {
        let mut hash = [part; 32];
        hash[16..24].fill(all);
        hash[24..].fill(table);
        Some(hash)
    }

    #[track_caller]
    fn check(hashes: &[Option<[u8; 32]>], places: Places, differ: Option<(usize, usize)>) {
        let found = match same_parameters(hashes, places, 7) {
            Ok(()) => None,
            Err(Error::Replicas { step: 7, rank, other, .. }) => Some((rank, other)),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(found, differ);
    }

    #[test]
    fn the_first_rank_that_differs_is_named_with_the_one_that_it_should_equal() {
        check(&[of(1, 1), of(1, 1), of(1, 1)], Places::ONE, None);
        check(&[of(1, 1), of(1, 1), of(2, 1)], Places::ONE, Some((2, 0)));
        check(&[of(1, 1), None], Places::ONE, Some((1, 0)));
        check(&[None, None], Places::ONE, None);
        // Two replicas of two ranks, whose parts are not the same.
        check(&[of(1, 9), of(2, 9), of(1, 9), of(2, 9)], TENSOR, None);
        check(&[of(1, 9), of(2, 9), of(1, 9), of(1, 9)], TENSOR, Some((3, 1)));
        check(&[of(1, 9), of(2, 9), of(2, 9), of(2, 9)], TENSOR, Some((2, 0)));
        check(&[of(1, 9), of(2, 8), of(1, 9), of(2, 8)], TENSOR, Some((1, 0)));
    }

    #[test]
    fn stages_hold_other_parameters_but_for_a_tied_table() {
        let places = Places { stages: 2, tensor: 2, tied: true };
        // Ranks of a stage hold the same norms, and of the table rank 2 what rank 0 does.
        let sound = [tied(1, 5, 7), tied(2, 5, 8), tied(3, 6, 7), tied(4, 6, 8)];
        check(&sound, places, None);
        let mut other_norm = sound;
        other_norm[3] = tied(4, 5, 8);
        check(&other_norm, places, Some((3, 2)));
        let mut other_table = sound;
        other_table[2] = tied(3, 6, 9);
        check(&other_table, places, Some((2, 0)));
        // The control: without a tied table nobody looks there.
        check(&other_table, Places { tied: false, ..places }, None);
    }
}
