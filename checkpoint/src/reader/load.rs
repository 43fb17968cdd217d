//! Loads many ranges of tensors at once, reading each file that holds some of them once.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;

use super::Checkpoint;
use super::once::Place;
use super::stored::{Header, Stored};
use crate::error::CheckpointError;
use crate::manifest::{Piece, TensorEntry};

/// A range of a tensor's elements, and where they are wanted.
#[derive(Debug)]
pub struct Want<'a> {
    /// The tensor's name.
    pub tensor: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Which of its elements, counted row-major.
    pub range: Range<usize>,
    /// As many places.
    pub out: &'a mut [f32],
}

impl<'a> Want<'a> {
    /// All of a tensor.
    #[must_use]
    pub fn all(tensor: &'a str, shape: &'a [usize], out: &'a mut [f32]) -> Self {
        Self { tensor, shape, range: 0..out.len(), out }
    }
}

/// What one file has of a [`Want`].
struct Part<'a> {
    tensor: &'a str,
    entry: &'a TensorEntry,
    piece: &'a Piece,
    /// The first wanted element, counted in the piece.
    from: usize,
    out: &'a mut [f32],
}

impl Checkpoint {
    /// Reads these ranges to where they are wanted, on all cores. Each file that holds some of them is read once, whole,
    /// and hashed where its bytes land; files that hold none are not touched. So what is handed over is what was hashed,
    /// whatever happens to the files meanwhile. A packed file is hashed, and then the frames that hold wanted elements are read
    /// again: what changes in between is noticed by their own checksums. [`region`](Checkpoint::region) hashes these files no more.
    ///
    /// # Errors
    /// Those of [`region`](Checkpoint::region). All that is wanted is NaN then.
    pub fn load(&self, wants: &mut [Want<'_>]) -> Result<(), CheckpointError> {
        let loaded = self.load_files(wants);
        if loaded.is_err() {
            wants.iter_mut().for_each(|want| want.out.fill(f32::NAN));
        }
        loaded
    }

    fn load_files(&self, wants: &mut [Want<'_>]) -> Result<(), CheckpointError> {
        let mut files: BTreeMap<&str, Vec<Part<'_>>> = BTreeMap::new();
        for Want { tensor, shape, range, out } in wants {
            let entry = self.wanted(tensor, shape, range, out.len())?;
            let (mut out, mut next) = (&mut **out, range.start);
            // No element is absent, so that one piece begins where the last one ended.
            for piece in entry.pieces_of(range) {
                let held = piece.range();
                let end = held.end.min(range.end);
                let (first, rest) = mem::take(&mut out).split_at_mut(end - next);
                let part = Part { tensor, entry, piece, from: next - held.start, out: first };
                files.entry(&piece.file).or_default().push(part);
                (out, next) = (rest, end);
            }
        }
        for (name, mut parts) in files {
            let stored = Stored::open(self.path(), name, self.entry(name)?)?;
            // Once, unless several want the same bytes.
            while !parts.is_empty() {
                let mut rest = Vec::new();
                let checked = stored.check_tensors(|header| place(header, parts, &mut rest))?;
                self.keep(name, checked);
                parts = rest;
            }
        }
        Ok(())
    }
}

/// Where in the file the parts are. Of those that want the same bytes the first is placed; the others are left in `rest`.
fn place<'a>(
    header: &Header,
    parts: Vec<Part<'a>>,
    rest: &mut Vec<Part<'a>>,
) -> Result<Vec<(u64, Place<'a>)>, CheckpointError> {
    let mut offsets = Vec::new();
    for part in parts {
        let start = header.piece(part.tensor, part.entry, part.piece)?;
        offsets.push((start + (part.from * size_of::<f32>()) as u64, part));
    }
    offsets.sort_by_key(|(offset, _)| *offset);
    let (mut places, mut end) = (Vec::new(), 0);
    for (offset, part) in offsets {
        if offset < end {
            rest.push(part);
            continue;
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(part.out);
        end = offset + bytes.len() as u64;
        places.push((offset, Place::Wanted(bytes)));
    }
    Ok(places)
}
