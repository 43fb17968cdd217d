//! The frame around every payload on the data plane.
//!
//! ```text
//!  0  magic        4 bytes  "TRIB"
//!  4  version      u16      1
//!  6  phase        u8       0 scatter, 1 gather
//!  7  codec        u8       0 fp32, 1 bf16, 2 int8
//!  8  flags        u8       bit 0: the payload is a zstd frame (refused by this version)
//!  9  reserved     3 bytes  0
//! 12  epoch        u32      changes whenever the group of ranks does
//! 16  step         u64
//! 24  bucket       u32
//! 28  tensor       u32      index of the parameter in the plan
//! 32  start        u64      first element, counted in the tensor; on a block border
//! 40  elements     u32
//! 44  length       u32      bytes of the payload
//! 48  crc32c       u32      of bytes 0..48 and of the payload
//! 52  payload
//! ```
//!
//! All little-endian. `docs/payload-format.md` draws the payload.

use compression::{BLOCK, Codec};
use thiserror::Error;

const MAGIC: [u8; 4] = *b"TRIB";
/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 52;
/// The largest payload that is sent or accepted: a chunk of 1 Mi elements in the widest codec.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// Which way a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// From a rank to the owner of the shard.
    Scatter,
    /// From the owner to a rank.
    Gather,
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
    #[error("a frame of {codec} with {elements} elements has a payload of {expected} bytes, {found} came")]
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
    /// Writes header and payload to `out`, which is replaced.
    ///
    /// # Panics
    /// When the payload has not the length of its elements, or is larger than [`PAYLOAD_BYTES_MAX`].
    pub fn write(&self, payload: &[u8], out: &mut Vec<u8>) {
        assert_eq!(payload.len(), self.codec.payload_bytes(self.elements as usize), "checked before it is sent");
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "chunks are cut smaller");
        out.clear();
        out.reserve(HEADER_BYTES + payload.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([phase_number(self.phase), codec_number(self.codec), 0, 0, 0, 0]);
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.step.to_le_bytes());
        out.extend(self.bucket.to_le_bytes());
        out.extend(self.tensor.to_le_bytes());
        out.extend(self.start.to_le_bytes());
        out.extend(self.elements.to_le_bytes());
        out.extend((payload.len() as u32).to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(out), payload);
        out.extend(checksum.to_le_bytes());
        out.extend(payload);
    }

    /// Reads a frame that is all of `bytes`, and returns its payload.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn read(bytes: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        if bytes.len() < HEADER_BYTES {
            return Err(FrameError::Short { found: bytes.len() });
        }
        let (header, payload) = bytes.split_at(HEADER_BYTES);
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
            other => return Err(unknown("phase", other)),
        };
        let codec = Codec::ALL.into_iter().find(|&codec| codec_number(codec) == header[7]);
        let codec = codec.ok_or_else(|| unknown("codec", header[7]))?;
        if let Some(&set) = header[8..12].iter().find(|&&byte| byte != 0) {
            return Err(unknown("flags", set));
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (elements, length) = (word(40), word(44) as usize);
        if length > PAYLOAD_BYTES_MAX {
            return Err(FrameError::Large { found: length });
        }
        let expected = codec.payload_bytes(elements as usize);
        if length != expected || payload.len() != expected {
            let found = if length == expected { payload.len() } else { length };
            return Err(FrameError::Length { codec, elements, expected, found });
        }
        let (step, start) = (long(16), long(32));
        if crc32c::crc32c_append(crc32c::crc32c(&header[..48]), payload) != word(48) {
            return Err(FrameError::Checksum { step });
        }
        if !start.is_multiple_of(BLOCK as u64) {
            return Err(FrameError::Border { start });
        }
        let header = Self { phase, codec, epoch: word(12), step, bucket: word(24), tensor: word(28), start, elements };
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

const fn phase_number(phase: Phase) -> u8 {
    match phase {
        Phase::Scatter => 0,
        Phase::Gather => 1,
    }
}

const fn codec_number(codec: Codec) -> u8 {
    match codec {
        Codec::Fp32 => 0,
        Codec::Bf16 => 1,
        Codec::Int8 => 2,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        let (phase, codec) = (Phase::Gather, Codec::Int8);
        Header { phase, codec, epoch: 3, step: 1 << 40, bucket: 5, tensor: 7, start: 256, elements: 200 }
    }

    fn frame() -> Vec<u8> {
        let mut out = Vec::new();
        header().write(&[9; 204], &mut out);
        out
    }

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let out = frame();
        assert_eq!(out.len(), HEADER_BYTES + 204);
        assert_eq!(Header::read(&out), Ok((header(), &[9u8; 204][..])));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let out = frame();
        for at in 0..8 * out.len() {
            let mut bytes = out.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            assert!(Header::read(&bytes).is_err(), "bit {at}");
        }
    }

    #[test]
    fn cut_trailing_foreign_newer_and_stale_frames_have_a_name() {
        let out = frame();
        assert_eq!(Header::read(&out[..51]), Err(FrameError::Short { found: 51 }));
        assert!(matches!(
            Header::read(&out[..out.len() - 1]),
            Err(FrameError::Length { expected: 204, found: 203, .. })
        ));
        assert!(matches!(Header::read(&[&out[..], &[0]].concat()), Err(FrameError::Length { found: 205, .. })));
        assert!(matches!(Header::read(&[b'G'; 60]), Err(FrameError::Magic { .. })));
        let with = |at: usize, value: u8| {
            let mut bytes = out.clone();
            bytes[at] = value;
            Header::read(&bytes).map(|_| ())
        };
        assert_eq!(with(4, 2), Err(FrameError::Version { found: 2 }));
        assert_eq!(with(6, 2), Err(FrameError::Unknown { field: "phase", found: 2 }));
        assert_eq!(with(7, 200), Err(FrameError::Unknown { field: "codec", found: 200 }));
        assert_eq!(with(8, 1), Err(FrameError::Unknown { field: "flags", found: 1 }));
        assert!(matches!(with(47, 0xff), Err(FrameError::Large { .. })));
        let (header, _) = Header::read(&out).expect("ours");
        assert_eq!(header.check_now(3, 1 << 40), Ok(()));
        assert!(matches!(header.check_now(3, 1), Err(FrameError::Stale { found_step, .. }) if found_step == 1 << 40));
        assert!(header.check_now(4, 1 << 40).is_err());
    }

    proptest! {
        #[test]
        fn bytes_from_anywhere_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), ours in any::<bool>()) {
            if ours && bytes.len() >= 12 {
                bytes[..12].copy_from_slice(&frame()[..12]);
            }
            prop_assert!(Header::read(&bytes).is_err());
        }
    }
}
