//! Reads a file once, on all cores: every byte is hashed where it lands, and a part of a file without the rest.
//!
//! A wanted byte is read straight to where it is wanted, and hashed there while the core's cache holds it; what is short is
//! copied there from where it was hashed. What was hashed is therefore what the caller has: a file that changes meanwhile is
//! noticed, or its change is not in the caller's memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use blake3::hazmat::HasherExt as _;
use blake3::{Hash, Hasher};
use rayon::prelude::*;

use crate::tree::{BLOCK, Tree};

/// Bytes of one read; few enough that they are in the core's cache still when they are hashed.
const STEP: usize = 1 << 18;

/// Bytes from which on a place is read to directly; shorter ones are copied, so that reads and hashes stay long.
const DIRECT: usize = 1 << 16;

/// What the blocks of a file must hash to.
#[derive(Clone, Debug)]
pub enum Proof {
    /// The file is one block.
    Whole(Hash),
    /// It has several.
    Blocks(Tree),
}

/// Why something was not read.
#[derive(Debug)]
pub enum Fault {
    /// What the file system says.
    Io(io::Error),
    /// These bytes are not what was proved.
    Damaged(Range<u64>),
}

/// Bytes that are wanted from an offset on, and where.
pub type Place<'a> = (u64, &'a mut [u8]);

/// A part of the file that has a hash of its own.
#[derive(Debug)]
struct Block<'a> {
    range: Range<u64>,
    /// Ascending.
    places: Vec<Place<'a>>,
    wanted: bool,
}

impl Proof {
    fn block_bytes(&self) -> u64 {
        match self {
            Self::Whole(_) => u64::MAX,
            Self::Blocks(tree) => tree.block,
        }
    }
}

/// Hashes the first `bytes` bytes of `file`, and returns with the hash what proves each block of them.
///
/// # Errors
/// What the file system says; `UnexpectedEof` when the file is shorter.
pub fn hash(file: &File, bytes: u64) -> io::Result<(Hash, Proof)> {
    let blocks = cut(bytes, BLOCK, Vec::new());
    if let [_] = &blocks[..] {
        let mut hasher = Hasher::new();
        blocks.into_iter().try_for_each(|block| block.read(file, &mut hasher, &mut Vec::new()))?;
        let hash = hasher.finalize();
        return Ok((hash, Proof::Whole(hash)));
    }
    let values = blocks.into_par_iter().map_init(Vec::new, |scratch, block| block.value(file, scratch));
    let tree = Tree { block: BLOCK, values: values.collect::<io::Result<_>>()? };
    Ok((tree.root(), Proof::Blocks(tree)))
}

/// Reads what `places` want of a `file` of `bytes` bytes to where it is wanted. `places` may be in any order. Blocks that hold
/// none of it are not read, unless they hold some of the bytes `also`; all that are read are hashed. Returns the bytes read.
///
/// # Errors
/// What the file system says, or the first block that is not what `proof` says: nobody may use what is in `places` then.
///
/// # Panics
/// Places that overlap, or that leave the file.
pub fn read(file: &File, bytes: u64, proof: &Proof, places: Vec<Place<'_>>, also: &[Range<u64>]) -> Result<u64, Fault> {
    let size = proof.block_bytes();
    let mut blocks = cut(bytes, size, places);
    for range in also.iter().filter(|range| !range.is_empty()) {
        let (first, last) = ((range.start / size) as usize, ((range.end - 1) / size) as usize);
        blocks[first..=last].iter_mut().for_each(|block| block.wanted = true);
    }
    let blocks: Vec<(usize, Block<'_>)> = blocks.into_iter().enumerate().filter(|(_, block)| block.wanted).collect();
    let read = blocks.iter().map(|(_, block)| block.range.end - block.range.start).sum();
    let check = |scratch: &mut Vec<u8>, (index, block): (usize, Block<'_>)| {
        let range = block.range.clone();
        let right = match proof {
            Proof::Whole(hash) => {
                let mut hasher = Hasher::new();
                block.read(file, &mut hasher, scratch).map_err(Fault::Io)?;
                hasher.finalize() == *hash
            }
            Proof::Blocks(tree) => block.value(file, scratch).map_err(Fault::Io)? == tree.values[index],
        };
        if right { Ok(()) } else { Err(Fault::Damaged(range)) }
    };
    let checked: Vec<Result<(), Fault>> = blocks.into_par_iter().map_init(Vec::new, check).collect();
    checked.into_iter().collect::<Result<(), Fault>>().map(|()| read)
}

/// Cuts a file into blocks, and every place on their borders.
fn cut(bytes: u64, size: u64, mut places: Vec<Place<'_>>) -> Vec<Block<'_>> {
    places.sort_unstable_by_key(|(offset, to)| (*offset, to.len()));
    let count = bytes.div_ceil(size).max(1);
    let block = |index: u64| {
        let end = if index + 1 == count { bytes } else { (index + 1) * size };
        Block { range: index * size..end, places: Vec::new(), wanted: false }
    };
    let mut blocks: Vec<Block<'_>> = (0..count).map(block).collect();
    let mut end = 0;
    for (mut offset, mut to) in places {
        assert!(end <= offset, "two places want byte {offset}");
        end = offset + to.len() as u64;
        assert!(end <= bytes, "a place ends at {end}, the file at {bytes}");
        while !to.is_empty() {
            let block = &mut blocks[(offset / size) as usize];
            let here = (block.range.end - offset).min(to.len() as u64) as usize;
            let (first, rest) = to.split_at_mut(here);
            block.places.push((offset, first));
            block.wanted = true;
            (offset, to) = (offset + here as u64, rest);
        }
    }
    blocks
}

impl Block<'_> {
    /// Reads the block, one of several, and returns its value.
    fn value(self, file: &File, scratch: &mut Vec<u8>) -> io::Result<blake3::hazmat::ChainingValue> {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(self.range.start);
        self.read(file, &mut hasher, scratch)?;
        Ok(hasher.finalize_non_root())
    }

    /// Reads the block, and hashes it in order. `scratch` is for what nobody wants, and for what is short.
    fn read(self, file: &File, hasher: &mut Hasher, scratch: &mut Vec<u8>) -> io::Result<()> {
        let mut at = self.range.start;
        let mut places = self.places.into_iter().peekable();
        while at < self.range.end {
            if let Some((_, to)) = places.next_if(|(offset, to)| *offset == at && to.len() >= DIRECT) {
                for step in to.chunks_mut(STEP) {
                    file.read_exact_at(step, at)?;
                    hasher.update(step);
                    at += step.len() as u64;
                }
                continue;
            }
            // As far as a step, or to the next long place; a short one is not cut.
            let mut until = self.range.end.min(at + STEP as u64);
            let mut here: Vec<Place<'_>> = Vec::new();
            while let Some((offset, to)) = places.next_if(|(offset, to)| *offset < until && to.len() < DIRECT) {
                until = until.max(offset + to.len() as u64);
                here.push((offset, to));
            }
            until = places.peek().map_or(until, |(offset, _)| until.min(*offset));
            scratch.resize(STEP + DIRECT, 0);
            let step = &mut scratch[..(until - at) as usize];
            file.read_exact_at(step, at)?;
            hasher.update(step);
            for (offset, to) in here {
                let start = (offset - at) as usize;
                to.copy_from_slice(&step[start..start + to.len()]);
            }
            at = until;
        }
        Ok(())
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
            let (found, proof) = hash(&file(bytes), size as u64).unwrap();
            assert_eq!(found, blake3::hash(bytes), "{size} bytes");
            let all = 0..size as u64;
            let read = read(&file(bytes), size as u64, &proof, Vec::new(), std::slice::from_ref(&all)).unwrap();
            assert_eq!(read, size as u64);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// Cuts a file at random, in long parts and short ones, and wants every other part.
        #[test]
        fn every_wanted_byte_comes_where_it_belongs(
            size in 1usize..(4 << 20),
            cuts in prop::collection::vec((any::<prop::sample::Index>(), 0usize..100_000), 0..20),
            first in any::<bool>(),
        ) {
            let bytes = content(size);
            let cuts = cuts.iter().flat_map(|(cut, after)| [cut.index(size + 1), (cut.index(size + 1) + after).min(size)]);
            let mut cuts: Vec<usize> = cuts.chain([0, size]).collect();
            cuts.sort_unstable();
            let ranges: Vec<_> = cuts.windows(2).map(|pair| pair[0]..pair[1]).skip(first.into()).step_by(2).collect();
            let mut found: Vec<Vec<u8>> = ranges.iter().map(|range| vec![0xAA; range.len()]).collect();
            let places: Vec<Place<'_>> =
                (ranges.iter().zip(&mut found)).map(|(range, to)| (range.start as u64, &mut to[..])).rev().collect();
            let file = file(&bytes);
            let (_, proof) = hash(&file, size as u64).unwrap();
            read(&file, size as u64, &proof, places, &[]).unwrap();
            for (range, found) in ranges.into_iter().zip(found) {
                prop_assert!(found == bytes[range]);
            }
        }
    }

    #[test]
    fn only_the_blocks_that_are_wanted_are_read_and_a_damaged_one_is_named() {
        let (block, size) = (BLOCK, 4 * BLOCK + 5);
        let mut bytes = content(size as usize);
        let (_, proof) = hash(&file(&bytes), size).unwrap();
        bytes[(2 * block + 7) as usize] ^= 1;
        let file = file(&bytes);
        let mut out = vec![0; 100];
        let read_at =
            |offset: u64, out: &mut [u8], also: &[Range<u64>]| read(&file, size, &proof, vec![(offset, out)], also);
        assert_eq!(read_at(0, &mut out, &[]).unwrap(), block);
        assert_eq!(read_at(2 * block - 100, &mut out, &[]).unwrap(), block, "up to the damage");
        assert_eq!(read_at(4 * block - 50, &mut out[..55], &[]).unwrap(), block + 5);
        assert_eq!(read_at(5, &mut out, &[3 * block..3 * block + 1, 9..9]).unwrap(), 2 * block);
        for (offset, also) in
            [(2 * block - 99, vec![]), (3 * block - 1, vec![]), (0, Vec::from([2 * block..3 * block, 0..1]))]
        {
            let fault = read_at(offset, &mut out, &also).unwrap_err();
            assert!(matches!(&fault, Fault::Damaged(range) if *range == (2 * block..3 * block)), "{fault:?}");
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let fault = hash(&file(&content(1000)), 1001).unwrap_err();
        assert_eq!(fault.kind(), io::ErrorKind::UnexpectedEof);
    }
}
