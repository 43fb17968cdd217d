//! The sum of a tensor as it came: a payload for each chunk, decoded only where and when somebody reads it.
//!
//! An optimiser reads every sum once. Decoded as it comes it would be written to memory and read again, four bytes an element each
//! way; as a payload of `int8` it is a quarter of that, and the piece that is decoded for the optimiser is still in a cache when
//! it reads it. Buffers are kept from step to step.

use std::ops::Range;

use compression::{Codec, Payload};
use rayon::prelude::*;

use super::chunks;
use crate::data::shard::shard;

/// Elements that a thread decodes at a time: whole blocks, and a number of them that a first or second cache holds.
const PIECE: usize = 1 << 14;

/// One tensor's sum.
#[derive(Debug)]
pub(super) struct Held {
    elements: usize,
    /// The chunks of all shards, which follow one another.
    chunks: Vec<(Range<usize>, Payload<Vec<u8>>)>,
    /// By owner, where its shard's chunks begin among them.
    firsts: Vec<usize>,
}

impl Held {
    /// Zeros.
    pub(super) fn new(elements: usize, ranks: usize, chunk_blocks: usize) -> Self {
        let (mut all, mut firsts) = (Vec::new(), Vec::with_capacity(ranks));
        for owner in 0..ranks {
            firsts.push(all.len());
            all.extend(chunks(shard(elements, owner, ranks), chunk_blocks).map(|range| (range, nothing())));
        }
        Self { elements, chunks: all, firsts }
    }

    /// How many elements there are.
    pub(super) const fn len(&self) -> usize {
        self.elements
    }

    /// The buffer of a chunk, for so many bytes that are to be written to it; until it is [put](Self::put) back the chunk is zeros.
    pub(super) fn buffer(&mut self, owner: usize, chunk: usize, bytes: usize) -> Vec<u8> {
        let mut buffer = std::mem::replace(&mut self.chunks[self.firsts[owner] + chunk].1, nothing()).into_bytes();
        // A step that sent everything uncompressed needed more.
        if buffer.capacity() >= 2 * bytes {
            buffer = Vec::new();
        }
        buffer.resize(bytes, 0);
        buffer
    }

    /// This is a chunk of an owner's shard.
    pub(super) fn put(&mut self, owner: usize, chunk: usize, payload: Payload<Vec<u8>>) {
        let (range, place) = &mut self.chunks[self.firsts[owner] + chunk];
        assert_eq!(range.len(), payload.elements(), "elements of a chunk");
        *place = payload;
    }

    /// As [`put`](Self::put), of a copy.
    pub(super) fn put_copy<B: AsRef<[u8]>>(&mut self, owner: usize, chunk: usize, payload: &Payload<B>) {
        let buffer = self.buffer(owner, chunk, payload.bytes().as_ref().len());
        self.put(owner, chunk, payload.copy_to(buffer));
    }

    /// Decodes elements from `start` on, which begins a block, to the end of a block or of the tensor; by all threads of the
    /// caller's pool.
    pub(super) fn read(&self, start: usize, out: &mut [f32]) {
        match out.len() > PIECE {
            true => {
                out.par_chunks_mut(PIECE).enumerate().for_each(|(at, out)| self.read_piece(start + at * PIECE, out));
            }
            false => self.read_piece(start, out),
        }
    }

    fn read_piece(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        assert!(end <= self.elements, "elements {start}..{end} of {}", self.elements);
        let first = self.chunks.partition_point(|(range, _)| range.end <= start);
        for (range, payload) in &self.chunks[first..] {
            let here = range.start.max(start)..range.end.min(end);
            if here.is_empty() {
                break;
            }
            let out = &mut out[here.start - start..here.end - start];
            match payload.elements() {
                0 => out.fill(0.0),
                _ => payload.decode_part(here.start - range.start, out),
            }
        }
    }
}

fn nothing() -> Payload<Vec<u8>> {
    Payload::new(Codec::Fp32, 0, Vec::new()).expect("nothing is a payload of nothing")
}

#[cfg(test)]
mod tests {
    use compression::{BLOCK, Found};

    use super::*;

    fn payload(codec: Codec, values: &[f32]) -> Payload<Vec<u8>> {
        let mut bytes = vec![0; codec.payload_bytes(values.len())];
        assert_eq!(codec.encode(&mut values.to_vec(), &vec![0.0; values.len()], &mut bytes), Found::Finite);
        Payload::new(codec, values.len(), bytes).expect("an encoder's payload")
    }

    #[test]
    fn whatever_part_is_read_it_is_that_of_the_decoded_chunks() {
        // More than a piece a read, an odd tail, and shards that are no multiple of a chunk.
        let (elements, ranks, chunk_blocks) = (50 * PIECE / 16 + 77, 3, 5);
        for codec in Codec::ALL {
            let mut held = Held::new(elements, ranks, chunk_blocks);
            let mut expected = vec![0.0; elements];
            for owner in 0..ranks {
                for (chunk, range) in chunks(shard(elements, owner, ranks), chunk_blocks).enumerate() {
                    // One that never came is zeros.
                    if (owner, chunk) == (1, 2) {
                        continue;
                    }
                    let values: Vec<f32> = range.clone().map(|at| (at as f32 * 0.37).sin()).collect();
                    let payload = payload(codec, &values);
                    payload.decode(&mut expected[range]);
                    // The second time into the first one's buffer.
                    held.put_copy(owner, chunk, &payload);
                    held.put_copy(owner, chunk, &payload);
                }
            }
            for (start, length) in [(0, elements), (BLOCK, 2 * BLOCK), (7 * BLOCK, PIECE + 3 * BLOCK)] {
                let mut out = vec![f32::NAN; length];
                held.read(start, &mut out);
                assert_eq!(out, expected[start..start + length], "{codec}: {length} from {start}");
            }
            let start = (elements - 1) / BLOCK * BLOCK;
            let mut tail = vec![f32::NAN; elements - start];
            held.read(start, &mut tail);
            assert_eq!(tail, expected[start..], "{codec}");
        }
    }

    #[test]
    #[should_panic(expected = "of a chunk")]
    fn a_chunk_of_another_length_is_not_put() {
        let mut held = Held::new(10 * BLOCK, 2, 5);
        held.put(1, 0, payload(Codec::Int8, &[1.0; 4 * BLOCK]));
    }
}
