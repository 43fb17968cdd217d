//! Whether ranks that are to hold the same parameters do.

use std::ops::Range;

use crate::error::{Error, Result};

/// Compares the ranks' [fingerprints](crate::state::State::fingerprint) after step `step`, where they were sent. So many ranks, which follow each
/// other, hold one `replica`.
///
/// # Errors
/// They differ.
pub fn same_parameters(hashes: &[Option<[u8; 32]>], replica: usize, step: u64) -> Result<()> {
    let text = |hash: [u8; 32]| blake3::Hash::from_bytes(hash).to_hex().to_string();
    let differs = |rank: usize, from: usize, bytes: Range<usize>| {
        hashes[rank].map(|hash| hash[bytes.clone()].to_vec()) != hashes[from].map(|hash| hash[bytes].to_vec())
    };
    // Each rank with the one that holds the same part; and all of them in what all hold.
    let other = |rank: usize| match replica {
        1 => Some(0).filter(|_| hashes[rank] != hashes[0]),
        _ => Some(rank % replica)
            .filter(|&from| differs(rank, from, 0..16))
            .or_else(|| Some(0).filter(|_| differs(rank, 0, 16..32))),
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

    /// A fingerprint of a part and of what all hold.
    fn of(part: u8, all: u8) -> Option<[u8; 32]> {
        let mut hash = [part; 32];
        hash[16..].fill(all);
        Some(hash)
    }

    #[track_caller]
    fn check(hashes: &[Option<[u8; 32]>], replica: usize, differ: Option<(usize, usize)>) {
        let found = match same_parameters(hashes, replica, 7) {
            Ok(()) => None,
            Err(Error::Replicas { step: 7, rank, other, .. }) => Some((rank, other)),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(found, differ);
    }

    #[test]
    fn the_first_rank_that_differs_is_named_with_the_one_that_it_should_equal() {
        check(&[of(1, 1), of(1, 1), of(1, 1)], 1, None);
        check(&[of(1, 1), of(1, 1), of(2, 1)], 1, Some((2, 0)));
        check(&[of(1, 1), None], 1, Some((1, 0)));
        check(&[None, None], 1, None);
        // Two replicas of two ranks, whose parts are not the same.
        check(&[of(1, 9), of(2, 9), of(1, 9), of(2, 9)], 2, None);
        check(&[of(1, 9), of(2, 9), of(1, 9), of(1, 9)], 2, Some((3, 1)));
        check(&[of(1, 9), of(2, 9), of(2, 9), of(2, 9)], 2, Some((2, 0)));
        check(&[of(1, 9), of(2, 8), of(1, 9), of(2, 8)], 2, Some((1, 0)));
    }
}
