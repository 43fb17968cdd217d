//! Reads a file once, on all cores: every byte is hashed where it lands.
//!
//! BLAKE3 is a tree, so that blocks of a power of two bytes are hashed apart and their values merged to the hash of the
//! file (<https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf>, section 2.1). A block's wanted bytes are
//! read straight to where they are wanted, and hashed there while the core's cache holds them. What was hashed is
//! therefore what the caller has: a file that changes meanwhile is noticed, or its change is not in the caller's memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{Hash, Hasher};
use rayon::prelude::*;

/// Bytes that one thread reads and hashes at a time: a subtree of the hash, so a power of two.
const BLOCK: u64 = 1 << 20;

/// Bytes of one read; few enough that they are in the core's cache still when they are hashed.
const STEP: usize = 1 << 18;

/// What becomes of some bytes of a file; all others are hashed and forgotten.
#[derive(Debug)]
pub enum Place<'a> {
    /// They are read to here.
    Wanted(&'a mut [u8]),
    /// They were read before and lie here: these are hashed, whatever the file says by now.
    Read(&'a [u8]),
}

/// The part of a file that makes one subtree.
#[derive(Debug)]
struct Block<'a> {
    range: Range<u64>,
    /// With the offset of each in the file, ascending.
    places: Vec<(u64, Place<'a>)>,
}

/// Reads the first `bytes` bytes of `file`, those of `places` to where they belong, and returns the hash of all of them.
/// `places` have their offsets in the file, in any order. Until the hash is found right, nobody may use what is there.
///
/// # Errors
/// What the file system says; `UnexpectedEof` when the file is shorter.
///
/// # Panics
/// Places that overlap, or that leave the file.
pub fn read(file: &File, bytes: u64, places: Vec<(u64, Place<'_>)>) -> io::Result<Hash> {
    let blocks = cut(bytes, places);
    if let [_] = &blocks[..] {
        let mut hasher = Hasher::new();
        blocks.into_iter().try_for_each(|block| block.read(file, &mut hasher, &mut Vec::new()))?;
        return Ok(hasher.finalize());
    }
    let values = blocks.into_par_iter().map_init(Vec::new, |scratch, block| {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(block.range.start);
        block.read(file, &mut hasher, scratch)?;
        Ok(hasher.finalize_non_root())
    });
    let values = values.collect::<io::Result<Vec<ChainingValue>>>()?;
    let (left, right) = halves(&values);
    Ok(merge_subtrees_root(&merge(left), &merge(right), Mode::Hash))
}

fn merge(values: &[ChainingValue]) -> ChainingValue {
    if let [only] = values {
        return *only;
    }
    let (left, right) = halves(values);
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

/// The left subtree is the largest that is complete and leaves something to the right.
fn halves(values: &[ChainingValue]) -> (&[ChainingValue], &[ChainingValue]) {
    values.split_at(values.len().next_power_of_two() / 2)
}

impl Place<'_> {
    const fn len(&self) -> usize {
        match self {
            Self::Wanted(to) => to.len(),
            Self::Read(bytes) => bytes.len(),
        }
    }
}

/// Cuts a file into blocks, and every place on their borders.
fn cut(bytes: u64, mut places: Vec<(u64, Place<'_>)>) -> Vec<Block<'_>> {
    places.sort_unstable_by_key(|(offset, place)| (*offset, place.len()));
    let count = bytes.div_ceil(BLOCK).max(1);
    let block = |index| Block { range: index * BLOCK..bytes.min((index + 1) * BLOCK), places: Vec::new() };
    let mut blocks: Vec<Block<'_>> = (0..count).map(block).collect();
    let mut end = 0;
    for (mut offset, mut place) in places {
        assert!(end <= offset, "two places want byte {offset}");
        end = offset + place.len() as u64;
        assert!(end <= bytes, "a place ends at {end}, the file at {bytes}");
        while place.len() > 0 {
            let block = &mut blocks[(offset / BLOCK) as usize];
            let here = (block.range.end - offset).min(place.len() as u64) as usize;
            let (first, rest) = match place {
                Place::Wanted(to) => {
                    let (first, rest) = to.split_at_mut(here);
                    (Place::Wanted(first), Place::Wanted(rest))
                }
                Place::Read(bytes) => {
                    let (first, rest) = bytes.split_at(here);
                    (Place::Read(first), Place::Read(rest))
                }
            };
            block.places.push((offset, first));
            (offset, place) = (offset + here as u64, rest);
        }
    }
    blocks
}

impl Block<'_> {
    /// Reads the block, and hashes it in order. `scratch` is for what nobody wants.
    fn read(self, file: &File, hasher: &mut Hasher, scratch: &mut Vec<u8>) -> io::Result<()> {
        let mut forget = |gap: Range<u64>, hasher: &mut Hasher| {
            scratch.resize(STEP, 0);
            for at in gap.clone().step_by(STEP) {
                let step = &mut scratch[..(gap.end - at).min(STEP as u64) as usize];
                file.read_exact_at(step, at)?;
                hasher.update(step);
            }
            Ok::<_, io::Error>(())
        };
        let mut next = self.range.start;
        for (offset, place) in self.places {
            forget(next..offset, hasher)?;
            next = offset + place.len() as u64;
            match place {
                Place::Read(bytes) => {
                    hasher.update(bytes);
                }
                Place::Wanted(to) => {
                    for (index, step) in to.chunks_mut(STEP).enumerate() {
                        file.read_exact_at(step, offset + (index * STEP) as u64)?;
                        hasher.update(step);
                    }
                }
            }
        }
        forget(next..self.range.end, hasher)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|index| (index.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
    }

    #[test]
    fn the_hash_is_that_of_the_whole_at_every_border() {
        let block = BLOCK as usize;
        let near = |size: usize| [size - 1, size, size + 1];
        let sizes = [0, 1, 1023, 1024, 1025].into_iter().chain([1, 2, 3, 4, 5, 7, 8].map(|n| near(n * block)).concat());
        let longest = content(8 * block + 1);
        for size in sizes {
            let bytes = &longest[..size];
            let found = read(&file(bytes), size as u64, Vec::new()).unwrap();
            assert_eq!(found, blake3::hash(bytes), "{size} bytes");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Cuts a file at random, wants every other part, and knows one part before.
        #[test]
        fn every_wanted_byte_comes_where_it_belongs(
            size in 1usize..(3 << 20),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..9),
            first in any::<bool>(),
        ) {
            let bytes = content(size);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(size + 1)).chain([0, size]).collect();
            cuts.sort_unstable();
            let ranges: Vec<_> = cuts.windows(2).map(|pair| pair[0]..pair[1]).skip(first.into()).step_by(2).collect();
            let mut found: Vec<Vec<u8>> = ranges.iter().map(|range| vec![0xAA; range.len()]).collect();
            let mut places: Vec<(u64, Place<'_>)> = (ranges.iter().zip(&mut found))
                .map(|(range, to)| (range.start as u64, Place::Wanted(to)))
                .rev()
                .collect();
            let before = bytes.clone();
            if let Some((offset, place)) = places.pop() {
                let known = &before[offset as usize..][..place.len()];
                places.push((offset, Place::Read(known)));
            }
            prop_assert_eq!(read(&file(&bytes), size as u64, places).unwrap(), blake3::hash(&bytes));
            for (range, found) in ranges.into_iter().zip(found).skip(1) {
                prop_assert!(found == bytes[range]);
            }
        }
    }

    #[test]
    fn what_was_read_before_is_what_is_hashed() {
        let bytes = content(3 << 20);
        let mut other = bytes.clone();
        other[5] ^= 1;
        let known =
            |known: &[u8]| read(&file(&bytes), bytes.len() as u64, vec![(0, Place::Read(&known[..64]))]).unwrap();
        assert_eq!(known(&bytes), blake3::hash(&bytes));
        assert_eq!(known(&other), blake3::hash(&other), "not the file's byte, the caller's");
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let fault = read(&file(&content(1000)), 1001, Vec::new()).unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::UnexpectedEof);
    }
}
