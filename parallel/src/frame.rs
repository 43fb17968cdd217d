//! The frame around every payload on the data plane.
//!
//! ```text
//!  0  magic        4 bytes  "TRIB"
//!  4  version      u16      1
//!  6  phase        u8       0 scatter, 1 gather, 2 inner
//!  7  codec        u8       0 fp32, 1 bf16, 2 int8, 3 int4, 4 sparse24-int8, 5 sparse24-int4
//!  8  flags        u8       1: the payload stands in a zstd frame (RFC 8878); 2: its lines of zeros are left out; else 0
//!  9  reserved     3 bytes  0
//! 12  epoch        u32      changes whenever the group of ranks does
//! 16  step         u64
//! 24  bucket       u32
//! 28  tensor       u32      index of the parameter in the plan
//! 32  start        u64      first element, counted in the tensor; on a block border
//! 40  elements     u32
//! 44  length       u32      bytes that follow the header
//! 48  crc32c       u32      of bytes 0..48 and of what follows the header
//! 52  payload, or the zstd frame that holds it, or what is not zero of it
//! ```
//!
//! All little-endian. `docs/payload-format.md` draws the payload. How it stands in the frame is its sender's business
//! alone: whoever reads it has the same payload. `frame/zeros.rs` draws one without its lines of zeros.

// By their paths, for tests/fuzz takes this file alone into a crate of its own.
#[path = "frame/packed.rs"]
mod packed;
#[path = "frame/zeros.rs"]
mod zeros;

use bytes::Bytes;
use compression::{BLOCK, Codec};
use thiserror::Error;

pub use packed::{Packer, pack};

const MAGIC: [u8; 4] = *b"TRIB";
/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 52;
/// The largest payload that is sent or accepted: a chunk of 1 Mi elements in the widest codec.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// The flag of a payload that stands in a zstd frame.
const ZSTD: u8 = 1;
/// The flag of a payload without its lines of zeros.
const ZEROS: u8 = 2;

/// Which way a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// From a node to the owner of the shard.
    Scatter,
    /// The sum, or with a sharded optimiser the parameters, from their owner, or from whom the owner told.
    Gather,
    /// From a member of a node to the one that adds.
    Inner,
}

/// What a payload is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which way it goes.
    pub phase: Phase,
    /// How its elements are written.
    pub codec: Codec,
    /// Changes whenever the group of ranks does.
    pub epoch: u32,
    /// The training step.
    pub step: u64,
    /// The bucket of the plan.
    pub bucket: u32,
    /// Index of the parameter in the plan.
    pub tensor: u32,
    /// First element, counted in the tensor.
    pub start: u64,
    /// Elements that the payload holds.
    pub elements: u32,
}

/// Why bytes are not a frame. Nothing is taken from such bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Fewer bytes than a header has.
    #[error("a frame has at least {HEADER_BYTES} bytes, {found} came: it was cut, or the peer is no Tributary")]
    Short {
        /// Bytes that came.
        found: usize,
    },
    /// Another protocol.
    #[error("a frame starts with \"TRIB\", {found:02x?} came: the peer is no Tributary")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Another version of ours.
    #[error("frames of version {VERSION} are read here, version {found} came: run the same build on every rank")]
    Version {
        /// The version that came.
        found: u16,
    },
    /// A field has a value that this version does not know.
    #[error("the {field} of a frame is {found}, which this version does not know")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The header and the bytes that follow it do not agree.
    #[error("a frame of {codec} with {elements} elements and this header has {expected} bytes after it, {found} came")]
    Length {
        /// The codec.
        codec: Codec,
        /// Elements that the header names.
        elements: u32,
        /// Bytes that they take.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A payload that is larger than any that is sent.
    #[error("a payload has at most {PAYLOAD_BYTES_MAX} bytes, the header names {found}")]
    Large {
        /// Bytes that the header names.
        found: usize,
    },
    /// The slice does not start on a block border.
    #[error("a payload starts on a border of {BLOCK} elements, this one at element {start}")]
    Border {
        /// First element.
        start: u64,
    },
    /// What should be a zstd frame is none, or holds something else.
    #[error("a zstd frame that holds the {expected} bytes of a {codec} payload was expected: {what}")]
    Zstd {
        /// The codec.
        codec: Codec,
        /// Bytes of the payload.
        expected: usize,
        /// What came.
        what: String,
    },
    /// What should be a payload without its lines of zeros is none.
    #[error("the lines that are not zero of the {expected} bytes of a {codec} payload were expected: {what}")]
    Zeros {
        /// The codec.
        codec: Codec,
        /// Bytes of the payload.
        expected: usize,
        /// What came.
        what: String,
    },
    /// The checksum does not fit.
    #[error("the checksum of a frame of step {step} does not fit: it was damaged on its way")]
    Checksum {
        /// The step that the header names, which may be what is damaged.
        step: u64,
    },
    /// A frame of another step or of another group of ranks.
    #[error("expected epoch {epoch}, step {step}; a frame of epoch {found_epoch}, step {found_step} came")]
    Stale {
        /// The epoch that is running.
        epoch: u32,
        /// The step that is running.
        step: u64,
        /// Of the frame.
        found_epoch: u32,
        /// Of the frame.
        found_step: u64,
    },
}

impl Header {
    /// Header and payload; without its lines of zeros where they are an eighth of it and more.
    ///
    /// # Panics
    /// When the payload has not the length of its elements, or is larger than [`PAYLOAD_BYTES_MAX`].
    #[must_use]
    pub fn frame(&self, payload: &[u8]) -> Bytes {
        assert_eq!(payload.len(), self.codec.payload_bytes(self.elements as usize), "checked before it is sent");
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "chunks are cut smaller");
        match zeros::left_out(payload) {
            Some(lines) => self.write(ZEROS, &lines),
            None => self.write(0, payload),
        }
    }

    pub(crate) fn write(&self, flags: u8, body: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([phase_number(self.phase), codec_number(self.codec), flags, 0, 0, 0]);
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.step.to_le_bytes());
        out.extend(self.bucket.to_le_bytes());
        out.extend(self.tensor.to_le_bytes());
        out.extend(self.start.to_le_bytes());
        out.extend(self.elements.to_le_bytes());
        out.extend((body.len() as u32).to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&out), body);
        out.extend(checksum.to_le_bytes());
        out.extend(body);
        out.into()
    }

    /// Reads a frame that is all of `bytes`, and returns its payload, which has the length of its elements.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn read(bytes: &Bytes) -> Result<(Self, Bytes), FrameError> {
        if bytes.len() < HEADER_BYTES {
            return Err(FrameError::Short { found: bytes.len() });
        }
        let (header, body) = bytes.split_at(HEADER_BYTES);
        let magic = [header[0], header[1], header[2], header[3]];
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(FrameError::Version { found: version });
        }
        let unknown = |field, found: u8| FrameError::Unknown { field, found: u64::from(found) };
        let phase = match header[6] {
            0 => Phase::Scatter,
            1 => Phase::Gather,
            2 => Phase::Inner,
            other => return Err(unknown("phase", other)),
        };
        let codec = codec_of_number(header[7]).ok_or_else(|| unknown("codec", header[7]))?;
        let flags = header[8];
        if let Some(found) =
            [flags & !(ZSTD | ZEROS), header[9], header[10], header[11]].into_iter().find(|&byte| byte != 0)
        {
            return Err(unknown("flags", found));
        }
        if flags == ZSTD | ZEROS {
            return Err(unknown("flags", flags));
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (elements, length) = (word(40), word(44) as usize);
        let expected = codec.payload_bytes(elements as usize);
        if let Some(&found) = [length, expected].iter().find(|&&bytes| bytes > PAYLOAD_BYTES_MAX) {
            return Err(FrameError::Large { found });
        }
        let wanted = if flags == 0 { expected } else { length };
        if length != wanted || body.len() != wanted {
            let found = if length == wanted { body.len() } else { length };
            return Err(FrameError::Length { codec, elements, expected: wanted, found });
        }
        let (step, start) = (long(16), long(32));
        if crc32c::crc32c_append(crc32c::crc32c(&header[..48]), body) != word(48) {
            return Err(FrameError::Checksum { step });
        }
        if !start.is_multiple_of(BLOCK as u64) {
            return Err(FrameError::Border { start });
        }
        let header = Self { phase, codec, epoch: word(12), step, bucket: word(24), tensor: word(28), start, elements };
        let payload = match flags {
            ZSTD => packed::unpack(codec, body, expected)?,
            ZEROS => {
                zeros::restored(body, expected).map_err(|what| FrameError::Zeros { codec, expected, what })?.into()
            }
            _ => bytes.slice(HEADER_BYTES..),
        };
        Ok((header, payload))
    }

    /// Whether the frame is of this epoch and step.
    ///
    /// # Errors
    /// It is of another.
    pub const fn check_now(&self, epoch: u32, step: u64) -> Result<(), FrameError> {
        if self.epoch == epoch && self.step == step {
            return Ok(());
        }
        Err(FrameError::Stale { epoch, step, found_epoch: self.epoch, found_step: self.step })
    }
}

/// The step, the bucket and the tensor that a frame claims to be of, without a look at the rest of it; `None` when the
/// bytes do not begin as a frame does.
pub(crate) fn peek(bytes: &[u8]) -> Option<(u64, usize, usize)> {
    let header = bytes.first_chunk::<HEADER_BYTES>().filter(|header| header.starts_with(&MAGIC))?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let step = u64::from(word(16)) | u64::from(word(20)) << 32;
    Some((step, word(24) as usize, word(28) as usize))
}

/// Whether these bytes begin as a frame does.
pub(crate) fn is_frame(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

const fn phase_number(phase: Phase) -> u8 {
    match phase {
        Phase::Scatter => 0,
        Phase::Gather => 1,
        Phase::Inner => 2,
    }
}

/// The number of a codec in frames and ballots.
pub(crate) const fn codec_number(codec: Codec) -> u8 {
    match codec {
        Codec::Fp32 => 0,
        Codec::Bf16 => 1,
        Codec::Int8 => 2,
        Codec::Int4 => 3,
        Codec::Sparse24Int8 => 4,
        Codec::Sparse24Int4 => 5,
    }
}

/// The codec of that number.
pub(crate) fn codec_of_number(number: u8) -> Option<Codec> {
    Codec::ALL.into_iter().find(|&codec| codec_number(codec) == number)
}

#[cfg(test)]
#[path = "frame/tests.rs"]
mod tests;
