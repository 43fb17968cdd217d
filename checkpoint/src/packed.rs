//! Packed files: a safetensors file as zstd frames of shuffled bytes, with a seek table at their end.
//!
//! A frame holds at most [`PIECE`] bytes of the safetensors file: first the header as it is, then the values, of which a
//! frame has all lowest bytes first, then all second ones, and so on. The exponents of weights and moments lie close to
//! each other, and so they compress beside each other; mantissas are noise and stay as they are.
//!
//! The table is that of zstd's [seekable format](https://github.com/facebook/zstd/blob/dev/contrib/seekable_format), a frame
//! that zstd's own tools skip. `docs/checkpoint-format.md` draws all of it; `reader/packed.rs` reads it.
//!
//! Beyond the caller's values the writer holds three pieces and what zstd needs at its lowest level, about a megabyte.

use std::path::Path;

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, compress_bound};

use crate::disk::Disk;
use crate::error::CheckpointError;
use crate::safetensors_file::{Entry, HashedFile, Written, sorted};

/// Bytes of the safetensors file in a frame, at the most.
pub(crate) const PIECE: usize = 1 << 20;

/// Bytes of a value, and so planes of a piece.
pub(crate) const PLANES: usize = size_of::<f32>();

/// zstd's quickest positive level: higher ones find hardly more in noise, and the thread stands beside training.
const LEVEL: i32 = 1;

/// Which frame zstd skips; the seekable format has it for its table.
pub(crate) const TABLE_MAGIC: u32 = 0x184D_2A5E;

/// The last bytes of a table.
pub(crate) const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;

/// Bytes of a table before its entries: the magic and the size of what follows.
pub(crate) const TABLE_HEAD: usize = 8;
/// Bytes of one of its entries: the frame's size, and that of what it holds.
pub(crate) const TABLE_ENTRY: usize = 8;
/// Bytes after them: how many they are, a descriptor, the other magic.
pub(crate) const TABLE_FOOT: usize = 9;

/// Writes and syncs a packed file of these tensors, in name order. Returns with it the size of the safetensors file that it
/// stands for.
///
/// # Errors
/// A name that cannot be used, values that do not fit their shape, no memory, or what the disk says.
pub(crate) fn write(disk: &dyn Disk, path: &Path, entries: &[Entry<'_>]) -> Result<(Written, u64), CheckpointError> {
    const ELEMENTS: usize = PIECE / PLANES;
    let (sorted, header) = sorted(path, entries)?;
    let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    let mut frames = Frames::create(disk, path)?;
    head.chunks(PIECE).try_for_each(|piece| frames.push(piece))?;
    let (mut piece, mut planes) = (Vec::new(), Vec::new());
    let mut push = |values: &mut Vec<f32>| {
        shuffle(values, &mut planes);
        values.clear();
        frames.push(&planes)
    };
    for entry in sorted {
        let mut rest = entry.values;
        while !rest.is_empty() {
            let (first, more) = rest.split_at(rest.len().min(ELEMENTS - piece.len()));
            piece.extend_from_slice(first);
            rest = more;
            if piece.len() == ELEMENTS {
                push(&mut piece)?;
            }
        }
    }
    if !piece.is_empty() {
        push(&mut piece)?;
    }
    frames.finish()
}

/// The bytes of `values`, plane by plane.
fn shuffle(values: &[f32], planes: &mut Vec<u8>) {
    planes.clear();
    for plane in 0..PLANES {
        planes.extend(values.iter().map(|value| value.to_le_bytes()[plane]));
    }
}

/// The bytes of the values from number `first` on that `planes` holds, as many as `out` has places for.
///
/// # Panics
/// Planes of different lengths, or values that they do not hold.
pub(crate) fn unshuffle(planes: &[u8], first: usize, out: &mut [u8]) {
    assert!(planes.len().is_multiple_of(PLANES) && out.len().is_multiple_of(PLANES), "whole values");
    let (length, count) = (planes.len() / PLANES, out.len() / PLANES);
    let plane = |index: usize| &planes[index * length..(index + 1) * length][first..first + count];
    let (a, b, c, d) = (plane(0), plane(1), plane(2), plane(3));
    for (index, value) in out.chunks_exact_mut(PLANES).enumerate() {
        value.copy_from_slice(&[a[index], b[index], c[index], d[index]]);
    }
}

/// A file of frames while it is written.
struct Frames<'a> {
    path: &'a Path,
    file: HashedFile<'a>,
    packer: Compressor<'static>,
    packed: Vec<u8>,
    /// The entries of the table.
    table: Vec<[u32; 2]>,
}

impl<'a> Frames<'a> {
    fn create(disk: &dyn Disk, path: &'a Path) -> Result<Self, CheckpointError> {
        let packer = || {
            let mut packer = Compressor::new(LEVEL)?;
            // Of what a frame holds, so that a reader notices bytes that changed after it had hashed the file.
            packer.set_parameter(CParameter::ChecksumFlag(true))?;
            Ok(packer)
        };
        let packer = packer().map_err(CheckpointError::io("take memory for zstd to write", path))?;
        Ok(Self { path, file: HashedFile::create(disk, path)?, packer, packed: Vec::new(), table: Vec::new() })
    }

    fn push(&mut self, piece: &[u8]) -> Result<(), CheckpointError> {
        assert!(piece.len() <= PIECE, "readers have no more room");
        self.packed.resize(compress_bound(piece.len()), 0);
        let bytes = self.packer.compress_to_buffer(piece, &mut self.packed[..]);
        let bytes = bytes.map_err(CheckpointError::io("pack a piece of", self.path))?;
        self.table.push([bytes as u32, piece.len() as u32]);
        self.file.write(&self.packed[..bytes])
    }

    fn finish(mut self) -> Result<(Written, u64), CheckpointError> {
        self.file.write(&table(&self.table))?;
        let unpacked_bytes = self.table.iter().map(|&[_, bytes]| u64::from(bytes)).sum();
        Ok((self.file.finish()?, unpacked_bytes))
    }
}

/// The bytes of the table.
pub(crate) fn table(entries: &[[u32; 2]]) -> Vec<u8> {
    let after_head = entries.len() * TABLE_ENTRY + TABLE_FOOT;
    let mut table = Vec::with_capacity(TABLE_HEAD + after_head);
    table.extend(TABLE_MAGIC.to_le_bytes());
    // A host buffer of 2^27 pieces, 128 TiB, is beyond any machine.
    table.extend((after_head as u32).to_le_bytes());
    for number in entries.iter().flatten() {
        table.extend(number.to_le_bytes());
    }
    table.extend((entries.len() as u32).to_le_bytes());
    table.push(0);
    table.extend(SEEKABLE_MAGIC.to_le_bytes());
    table
}
