//! Loads many parts of tensors at once: any box from any boxes, reading no more of each file than they take.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;

use compression::Region;
use rayon::prelude::*;

use super::Checkpoint;
use super::once::Place;
use super::stored::{Content, Header, Held, Reading};
use crate::error::CheckpointError;
use crate::manifest::{Piece, TensorEntry};

/// Elements of a want that are looked at together. Where each of them lies apart, as in a column of one element, each takes
/// about a hundred bytes of memory meanwhile.
const SLICE: usize = 1 << 20;

/// Runs after which what was found so far is read, before more is looked for.
const RUNS_MAX: usize = 1 << 16;

/// A part of a tensor, and where it is wanted.
#[derive(Debug)]
pub struct Want<'a> {
    /// The tensor's name.
    pub tensor: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Which of its elements: any box, or an interval of one, however the checkpoint is cut.
    pub region: Region,
    /// As many places, for the elements in the order of the region.
    pub out: &'a mut [f32],
}

impl<'a> Want<'a> {
    /// All of a tensor.
    #[must_use]
    pub fn all(tensor: &'a str, shape: &'a [usize], out: &'a mut [f32]) -> Self {
        Self::interval(tensor, shape, 0..out.len(), out)
    }

    /// The elements `range` of a tensor, counted row-major in the whole.
    #[must_use]
    pub fn interval(tensor: &'a str, shape: &'a [usize], range: Range<usize>, out: &'a mut [f32]) -> Self {
        Self { tensor, shape, region: Region::interval(shape, range), out }
    }
}

/// A run of wanted elements that lie one after the other in a file.
struct Part<'a> {
    tensor: &'a str,
    piece: &'a Piece,
    /// The first of them, counted in the piece.
    from: usize,
    out: &'a mut [f32],
}

/// The parts by file.
type Parts<'a> = BTreeMap<&'a str, Vec<Part<'a>>>;

/// How much of the files is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Wanted,
    /// All of them, and it is looked that every piece is where the manifest says.
    All,
}

impl Checkpoint {
    /// Reads these parts to where they are wanted, on all cores. Of each file those blocks are read that hold some of it, and
    /// each is hashed where its bytes land, so that what is handed over is what was hashed, whatever happens to the files
    /// meanwhile. A file of an earlier build, whose manifest has no values of blocks, is hashed whole before, once. Of a
    /// packed file the blocks are hashed, and then the frames that hold wanted elements are read again: what changes in
    /// between is noticed by their own checksums. Returns the bytes read, without those of headers.
    ///
    /// # Errors
    /// Those of [`region`](Checkpoint::region). All that is wanted is NaN then.
    pub fn load(&self, wants: &mut [Want<'_>]) -> Result<u64, CheckpointError> {
        self.load_extent(wants, Extent::Wanted)
    }

    /// [`load`](Self::load), and [`verify`](Self::verify) in the same pass: every file is read whole, once.
    ///
    /// # Errors
    /// Those of both. All that is wanted is NaN then.
    pub fn load_and_verify(&self, wants: &mut [Want<'_>]) -> Result<u64, CheckpointError> {
        self.load_extent(wants, Extent::All)
    }

    fn load_extent(&self, wants: &mut [Want<'_>], extent: Extent) -> Result<u64, CheckpointError> {
        let loaded = self.load_all(wants, extent);
        if loaded.is_err() {
            wants.iter_mut().for_each(|want| want.out.fill(f32::NAN));
        }
        loaded
    }

    fn load_all(&self, wants: &mut [Want<'_>], extent: Extent) -> Result<u64, CheckpointError> {
        let entries: Vec<&TensorEntry> = wants.iter().map(|want| self.wanted(want)).collect::<Result<_, _>>()?;
        let (mut parts, mut runs, mut bytes, mut extent) = (Parts::new(), 0, 0, extent);
        for (want, entry) in wants.iter_mut().zip(entries) {
            let (mut out, mut next) = (&mut *want.out, 0);
            while !out.is_empty() {
                let (slice, rest) = out.split_at_mut(out.len().min(SLICE));
                let region = want.region.part(next..next + slice.len());
                (next, out) = (next + slice.len(), rest);
                runs += find(want.tensor, entry, &region, slice, &mut parts);
                if runs >= RUNS_MAX {
                    bytes += self.load_files(mem::take(&mut parts), mem::replace(&mut extent, Extent::Wanted))?;
                    runs = 0;
                }
            }
        }
        Ok(bytes + self.load_files(parts, extent)?)
    }

    fn load_files<'a>(&'a self, mut parts: Parts<'a>, extent: Extent) -> Result<u64, CheckpointError> {
        if extent == Extent::All {
            for name in self.manifest().files.keys() {
                parts.entry(name).or_default();
            }
        }
        let load = |(name, parts): (&'a str, Vec<Part<'a>>)| {
            let stored = self.stored(name)?;
            let reading = stored.reading()?;
            match extent {
                Extent::Wanted => fill(&reading, parts, None),
                Extent::All => fill(&reading, parts, Some(&self.manifest().pieces_in(name))),
            }
        };
        // The first file, in name order, that is not as it should be is the one to name.
        let read: Vec<Result<u64, CheckpointError>> = parts.into_par_iter().map(load).collect();
        read.into_iter().sum()
    }
}

/// Finds where the elements of `region` lie, all of which some piece holds. Returns how many runs they make.
fn find<'a>(
    tensor: &'a str,
    entry: &'a TensorEntry,
    region: &Region,
    mut out: &'a mut [f32],
    parts: &mut Parts<'a>,
) -> usize {
    let mut runs: Vec<_> = entry
        .near(region)
        .flat_map(|piece| region.shared(&piece.region).into_iter().map(move |run| (run, piece)))
        .collect();
    runs.sort_unstable_by_key(|(run, _)| run.here);
    let (count, mut next) = (runs.len(), 0);
    for (run, piece) in runs {
        assert_eq!(run.here, next, "every element is in one piece");
        let (first, rest) = mem::take(&mut out).split_at_mut(run.len);
        parts.entry(&piece.file).or_default().push(Part { tensor, piece, from: run.there, out: first });
        (out, next) = (rest, next + run.len);
    }
    assert!(out.is_empty(), "every element is in some piece");
    count
}

/// Reads parts of one file, and with `all`, the pieces that it holds, all of it.
fn fill(reading: &Reading<'_>, mut parts: Vec<Part<'_>>, all: Option<&[Held<'_>]>) -> Result<u64, CheckpointError> {
    let also = Vec::from_iter(all.map(|_| 0..reading.entry().bytes));
    let mut read = 0;
    if parts.is_empty() {
        read += reading.read(Vec::new(), &also)?;
    } else {
        let content = reading.content()?;
        // Once, unless several want the same bytes.
        let mut also = &also[..];
        while !parts.is_empty() {
            let mut rest = Vec::new();
            read += match content {
                Content::Plain(header) => reading.read(place(header, parts, &mut rest)?, also)?,
                Content::Packed(packed, header) => packed.fill(reading, place(header, parts, &mut rest)?, also)?,
            };
            (parts, also) = (rest, &[]);
        }
    }
    all.map_or(Ok(()), |held| reading.check_pieces(held))?;
    Ok(read)
}

/// Where in the file the parts are. Of those that want the same bytes the first is placed; the others are left in `rest`.
fn place<'a>(
    header: &Header,
    parts: Vec<Part<'a>>,
    rest: &mut Vec<Part<'a>>,
) -> Result<Vec<Place<'a>>, CheckpointError> {
    let mut offsets = Vec::with_capacity(parts.len());
    let mut known: Option<(&str, &Piece, u64)> = None;
    for part in parts {
        // Those of a piece follow each other.
        let start = match known {
            Some((tensor, piece, start)) if std::ptr::eq(piece, part.piece) && tensor == part.tensor => start,
            _ => header.piece(part.tensor, part.piece)?,
        };
        known = Some((part.tensor, part.piece, start));
        offsets.push((start + (part.from * size_of::<f32>()) as u64, part));
    }
    offsets.sort_by_key(|(offset, _)| *offset);
    let (mut places, mut end) = (Vec::with_capacity(offsets.len()), 0);
    for (offset, part) in offsets {
        if offset < end {
            rest.push(part);
            continue;
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(part.out);
        end = offset + bytes.len() as u64;
        places.push((offset, bytes));
    }
    Ok(places)
}
