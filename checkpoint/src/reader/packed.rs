//! Reads packed files. What is looked at was hashed before, block by block; nothing else is read.
//!
//! A right hash says that the bytes are those that somebody meant, not that they make sense: every size is checked against
//! the file and the manifest before memory is taken for it. Beside the header, which has the bound of every header, and the
//! table, of 32 bytes a frame and never more of them than pieces that the manifest's size makes, a thread has room for one
//! frame and for what it may hold, 2 MiB together, and zstd's own state.
//!
//! A frame is read after its blocks were hashed, a second time. What changes in between is noticed by a frame's own
//! checksum, 32 bits of XXH64.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use rayon::prelude::*;
use zstd::bulk::Decompressor;
use zstd::zstd_safe::{compress_bound, find_frame_compressed_size};

use super::once::Place;
use super::stored::{HEADER_BYTES_MAX, Header, Reading};
use crate::error::CheckpointError;
use crate::packed::{PIECE, PLANES, SEEKABLE_MAGIC, TABLE_ENTRY, TABLE_FOOT, TABLE_HEAD, TABLE_MAGIC, unshuffle};

/// A packed file, with its table read.
#[derive(Debug)]
pub struct Packed {
    path: PathBuf,
    frames: Vec<Frame>,
    /// Frames that hold the header; those of the values follow.
    header_frames: usize,
    /// Bytes of the header, its length included.
    header_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    offset: u64,
    /// Its size in the file.
    bytes: usize,
    /// What it holds.
    unpacked: usize,
}

/// What a thread needs to read frames.
#[derive(Default)]
struct Room {
    unpacker: Option<Decompressor<'static>>,
    frame: Vec<u8>,
    piece: Vec<u8>,
}

impl Packed {
    /// Reads the table and the header of a file that stands for a safetensors file of `unpacked` bytes.
    ///
    /// # Errors
    /// What the file system says, a damaged block, or the first thing that does not fit.
    pub fn open(reading: &Reading<'_>, unpacked: u64) -> Result<(Self, Header), CheckpointError> {
        let (path, file) = (reading.path(), &reading.file);
        let mut packed = Self { path: path.into(), frames: Vec::new(), header_frames: 1, header_bytes: 0 };
        packed.frames = packed.table(reading, unpacked)?;
        let mut room = Room::default();
        reading.read(Vec::new(), &[packed.bytes_of(0)])?;
        let mut header = packed.unpack(file, 0, &mut room)?.to_vec();
        let length =
            header.first_chunk().ok_or_else(|| packed.fault("its first frame is shorter than a header".into()))?;
        packed.header_bytes = u64::from_le_bytes(*length).saturating_add(size_of::<u64>() as u64);
        if packed.header_bytes > unpacked.min(HEADER_BYTES_MAX) {
            let why = format!("its header wants {} bytes, of {unpacked} in all", packed.header_bytes);
            return Err(packed.fault(why));
        }
        packed.header_frames = packed.check_frames(unpacked)?;
        let rest: Vec<Range<u64>> = (1..packed.header_frames).map(|index| packed.bytes_of(index)).collect();
        reading.read(Vec::new(), &rest)?;
        for index in 1..packed.header_frames {
            header.extend_from_slice(packed.unpack(file, index, &mut room)?);
        }
        let header = Header::parse(header, path, unpacked)?;
        Ok((packed, header))
    }

    /// Where in the file a frame lies.
    fn bytes_of(&self, index: usize) -> Range<u64> {
        let Frame { offset, bytes, .. } = self.frames[index];
        offset..offset + bytes as u64
    }

    /// Reads the table of a file, and checks that its frames fill the file.
    fn table(&self, reading: &Reading<'_>, unpacked: u64) -> Result<Vec<Frame>, CheckpointError> {
        let bytes = reading.entry().bytes;
        let fault = |why: &str| self.fault(why.into());
        let read = |to: &mut [u8], at| reading.read(vec![(at, to)], &[]);
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let mut foot = [0; TABLE_FOOT];
        let Some(foot_at) = bytes.checked_sub((TABLE_HEAD + TABLE_FOOT) as u64) else {
            reading.read(Vec::new(), std::slice::from_ref(&(0..bytes)))?;
            return Err(fault("it is too short"));
        };
        read(&mut foot, foot_at + TABLE_HEAD as u64)?;
        if number(&foot[5..]) != SEEKABLE_MAGIC || foot[4] != 0 {
            return Err(fault("it does not end with a seek table without checksums"));
        }
        let count = number(&foot[..4]);
        // The header may leave one frame short, and so may the values.
        let most = (unpacked / PIECE as u64).saturating_add(2);
        let entries = u64::from(count) * TABLE_ENTRY as u64;
        if u64::from(count) > most || entries > foot_at {
            return Err(self.fault(format!("{unpacked} bytes are not {count} frames in a file of {bytes} bytes")));
        }
        let table_at = foot_at - entries;
        let mut table = vec![0; TABLE_HEAD + entries as usize];
        read(&mut table, table_at)?;
        let size = entries + TABLE_FOOT as u64;
        if number(&table[..4]) != TABLE_MAGIC || u64::from(number(&table[4..8])) != size {
            return Err(fault("its seek table does not begin where its end says"));
        }
        let (mut frames, mut offset) = (Vec::with_capacity(count as usize), 0);
        for (index, entry) in table[TABLE_HEAD..].chunks_exact(TABLE_ENTRY).enumerate() {
            let (bytes, unpacked) = (number(&entry[..4]) as usize, number(&entry[4..]) as usize);
            if bytes > compress_bound(PIECE) || unpacked > PIECE {
                let why = format!("frame {index}: {bytes} bytes for {unpacked}; a frame holds {PIECE} at the most");
                return Err(self.fault(why));
            }
            frames.push(Frame { offset, bytes, unpacked });
            offset += bytes as u64;
        }
        if offset != table_at || frames.is_empty() {
            return Err(self.fault(format!("its {count} frames have {offset} bytes, before its table are {table_at}")));
        }
        Ok(frames)
    }

    /// Checks that every frame holds what it must, and returns how many hold the header.
    fn check_frames(&self, unpacked: u64) -> Result<usize, CheckpointError> {
        let values = unpacked - self.header_bytes;
        if !values.is_multiple_of(PLANES as u64) {
            return Err(self.fault(format!("{values} bytes are not whole values")));
        }
        let piece = PIECE as u64;
        let pieces = |bytes: u64| (0..bytes.div_ceil(piece)).map(move |index| piece.min(bytes - index * piece));
        let expected = self.header_bytes.div_ceil(piece) + values.div_ceil(piece);
        if self.frames.len() as u64 != expected {
            return Err(self.fault(format!("expected {expected} frames, found {}", self.frames.len())));
        }
        for (index, (frame, expected)) in
            self.frames.iter().zip(pieces(self.header_bytes).chain(pieces(values))).enumerate()
        {
            if frame.unpacked as u64 != expected {
                return Err(
                    self.fault(format!("frame {index}: expected {expected} bytes in it, found {}", frame.unpacked))
                );
            }
        }
        Ok(self.header_bytes.div_ceil(piece) as usize)
    }

    /// What a frame holds.
    fn unpack<'a>(&self, file: &File, index: usize, room: &'a mut Room) -> Result<&'a [u8], CheckpointError> {
        let Frame { offset, bytes, unpacked } = self.frames[index];
        let fault = |why: String| self.fault(format!("frame {index}: {why}"));
        room.frame.resize(bytes, 0);
        file.read_exact_at(&mut room.frame, offset).map_err(CheckpointError::io("read the file", &self.path))?;
        if find_frame_compressed_size(&room.frame) != Ok(bytes) {
            return Err(fault(format!("its {bytes} bytes are not one zstd frame")));
        }
        let unpacker = match &mut room.unpacker {
            Some(unpacker) => unpacker,
            none => none.insert(Decompressor::new().map_err(CheckpointError::io("take memory for", &self.path))?),
        };
        // zstd writes into this and nowhere else: a frame that holds more is an error, and takes no memory.
        room.piece.resize(unpacked, 0);
        match unpacker.decompress_to_buffer(&room.frame, &mut room.piece[..]) {
            Ok(found) if found == unpacked => Ok(&room.piece),
            Ok(found) => Err(fault(format!("expected {unpacked} bytes in it, found {found}"))),
            Err(source) => Err(fault(format!("expected {unpacked} bytes in it: {source}"))),
        }
    }

    /// Unpacks to every place what belongs there, on all cores; frames of which nobody wants anything are not read. The
    /// places have their offsets in the safetensors file.
    ///
    /// # Errors
    /// What the file system says, a damaged block, or a frame that does not hold what it must; some places are filled then.
    pub fn fill(
        &self,
        reading: &Reading<'_>,
        places: Vec<Place<'_>>,
        also: &[Range<u64>],
    ) -> Result<u64, CheckpointError> {
        let mut wanted: BTreeMap<usize, Vec<(usize, &mut [u8])>> = BTreeMap::new();
        for (offset, mut to) in places {
            let mut at = (offset - self.header_bytes) as usize;
            if !at.is_multiple_of(PLANES) {
                return Err(self.fault(format!("a tensor begins at byte {at} of the values, inside one of them")));
            }
            while !to.is_empty() {
                let (first, rest) = to.split_at_mut(to.len().min(PIECE - at % PIECE));
                let next = at + first.len();
                wanted.entry(self.header_frames + at / PIECE).or_default().push((at % PIECE / PLANES, first));
                (at, to) = (next, rest);
            }
        }
        let wanted: Vec<_> = wanted.into_iter().collect();
        let frames: Vec<Range<u64>> =
            wanted.iter().map(|(index, _)| self.bytes_of(*index)).chain(also.iter().cloned()).collect();
        let read = reading.read(Vec::new(), &frames)?;
        wanted.into_par_iter().try_for_each_init(Room::default, |room, (index, places)| {
            let planes = self.unpack(&reading.file, index, room)?;
            places.into_iter().for_each(|(first, to)| unshuffle(planes, first, to));
            Ok::<_, CheckpointError>(())
        })?;
        Ok(read)
    }

    /// Unpacks every frame of values and forgets it, on all cores.
    ///
    /// # Errors
    /// Those of [`fill`](Self::fill).
    pub fn check(&self, file: &File) -> Result<(), CheckpointError> {
        let frames = self.header_frames..self.frames.len();
        frames
            .into_par_iter()
            .try_for_each_init(Room::default, |room, index| self.unpack(file, index, room).map(|_| ()))
    }

    fn fault(&self, why: String) -> CheckpointError {
        CheckpointError::Packed { path: self.path.clone(), why }
    }
}
