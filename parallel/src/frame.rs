//! The frame around every payload on the data plane.
//!
//! ```text
//!  0  magic        4 bytes  "TRIB"
//!  4  version      u16      1
//!  6  phase        u8       0 scatter, 1 gather, 2 inner
//!  7  codec        u8       0 fp32, 1 bf16, 2 int8, 3 int4, 4 sparse24-int8, 5 sparse24-int4
//!  8  flags        u8       bit 0: the payload stands in a zstd frame (RFC 8878)
//!  9  reserved     3 bytes  0
//! 12  epoch        u32      changes whenever the group of ranks does
//! 16  step         u64
//! 24  bucket       u32
//! 28  tensor       u32      index of the parameter in the plan
//! 32  start        u64      first element, counted in the tensor; on a block border
//! 40  elements     u32
//! 44  length       u32      bytes that follow the header
//! 48  crc32c       u32      of bytes 0..48 and of what follows the header
//! 52  payload, or the zstd frame that holds it
//! ```
//!
//! All little-endian. `docs/payload-format.md` draws the payload. Whether a payload stands in a zstd frame is its
//! sender's business alone: whoever reads it has the same payload.

use bytes::Bytes;
use compression::{BLOCK, Codec};
use thiserror::Error;

const MAGIC: [u8; 4] = *b"TRIB";
/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 52;
/// The largest payload that is sent or accepted: a chunk of 1 Mi elements in the widest codec.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// The flag of a payload that stands in a zstd frame.
const ZSTD: u8 = 1;

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
    /// Header and payload.
    ///
    /// # Panics
    /// When the payload has not the length of its elements, or is larger than [`PAYLOAD_BYTES_MAX`].
    #[must_use]
    pub fn frame(&self, payload: &[u8]) -> Bytes {
        assert_eq!(payload.len(), self.codec.payload_bytes(self.elements as usize), "checked before it is sent");
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "chunks are cut smaller");
        self.write(0, payload)
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
        if header[8] & !ZSTD != 0 || header[9..12] != [0; 3] {
            let found = header[8..12].iter().copied().find(|&byte| byte > ZSTD);
            return Err(unknown("flags", found.unwrap_or(header[8] | header[9] | header[10] | header[11])));
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (elements, length, is_zstd) = (word(40), word(44) as usize, header[8] == ZSTD);
        let expected = codec.payload_bytes(elements as usize);
        if let Some(&found) = [length, expected].iter().find(|&&bytes| bytes > PAYLOAD_BYTES_MAX) {
            return Err(FrameError::Large { found });
        }
        let wanted = if is_zstd { length } else { expected };
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
        let payload = if is_zstd { unpack(codec, body, expected)? } else { bytes.slice(HEADER_BYTES..) };
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

/// Puts the payload of a frame that [`Header::frame`] made into a zstd frame; `None` when that saves nothing.
///
/// # Panics
/// When it is not such a frame.
#[must_use]
pub fn pack(frame: &Bytes, packer: &mut Packer) -> Option<Bytes> {
    let (header, payload) = frame.split_at(HEADER_BYTES);
    assert!(header[..4] == MAGIC && header[8] == 0, "our own frame, not packed yet");
    let packed = packer.compress(payload)?;
    let mut out = Vec::with_capacity(HEADER_BYTES + packed.len());
    out.extend(&header[..8]);
    out.push(ZSTD);
    out.extend(&header[9..44]);
    out.extend((packed.len() as u32).to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&out), packed);
    out.extend(checksum.to_le_bytes());
    out.extend(packed);
    Some(out.into())
}

/// A zstd compressor and its memory, kept from frame to frame.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

/// The fastest level: gradients are noise, and what little can be saved is in the distribution of their values.
const ZSTD_LEVEL: i32 = 1;

impl Packer {
    /// A packer without a past.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, out: Vec::new() })
    }

    /// The payload in a zstd frame, if that is smaller.
    fn compress(&mut self, payload: &[u8]) -> Option<&[u8]> {
        // What does not fit in less than the payload is not worth having; zstd ends there.
        self.out.resize(payload.len().saturating_sub(1), 0);
        let bytes = self.zstd.compress_to_buffer(payload, &mut self.out[..]).ok()?;
        Some(&self.out[..bytes])
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

/// The payload in a zstd frame. No more memory is taken for it than the payload has bytes, whatever the frame claims.
fn unpack(codec: Codec, body: &[u8], expected: usize) -> Result<Bytes, FrameError> {
    let wrong = |what: String| FrameError::Zstd { codec, expected, what };
    let payload = zstd::bulk::decompress(body, expected).map_err(|error| wrong(error.to_string()))?;
    match payload.len() {
        found if found != expected => Err(wrong(format!("{found} bytes came out of it"))),
        _ => Ok(payload.into()),
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

    fn frame() -> Bytes {
        header().frame(&[9; 204])
    }

    fn read(bytes: &[u8]) -> Result<(Header, Bytes), FrameError> {
        Header::read(&Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn a_frame_comes_back_as_it_was() {
        let out = frame();
        assert_eq!(out.len(), HEADER_BYTES + 204);
        assert_eq!(Header::read(&out), Ok((header(), Bytes::from_static(&[9; 204]))));
    }

    #[test]
    fn every_codec_has_a_number_of_its_own() {
        for codec in Codec::ALL {
            assert_eq!(codec_of_number(codec_number(codec)), Some(codec));
        }
        assert_eq!(codec_of_number(6), None);
    }

    #[test]
    fn a_packed_frame_is_smaller_and_has_the_same_payload() {
        let mut packer = Packer::new().expect("memory");
        let packed = pack(&frame(), &mut packer).expect("204 equal bytes");
        assert!(packed.len() < frame().len() - 150, "{}", packed.len());
        assert_eq!(Header::read(&packed), Header::read(&frame()));
        // Noise does not get smaller, and stays as it is.
        let noise: Vec<u8> = (0..204u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        assert_eq!(pack(&header().frame(&noise), &mut packer), None);
    }

    #[test]
    fn a_zstd_frame_of_another_size_or_none_at_all_is_refused_without_taking_its_memory() {
        // A thousand million zeros in a few bytes: only the payload's 204 are taken.
        let bomb = zstd::bulk::compress(&vec![0; 1 << 27], 1).expect("compresses");
        for (body, why) in
            [(&bomb[..], ""), (&[0u8; 20][..], ""), (&zstd::bulk::compress(&[1; 100], 1).expect("ok"), "100 bytes")]
        {
            let error = Header::read(&header().write(ZSTD, body)).expect_err("not the payload").to_string();
            assert!(
                error.contains("a zstd frame that holds the 204 bytes of a int8 payload") && error.contains(why),
                "{error}"
            );
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let packed = pack(&frame(), &mut Packer::new().expect("memory")).expect("smaller");
        for out in [frame(), packed] {
            for at in 0..8 * out.len() {
                let mut bytes = out.to_vec();
                bytes[at / 8] ^= 1 << (at % 8);
                assert!(read(&bytes).is_err(), "bit {at}");
            }
        }
    }

    #[test]
    fn cut_trailing_foreign_newer_and_stale_frames_have_a_name() {
        let out = frame();
        assert_eq!(read(&out[..51]), Err(FrameError::Short { found: 51 }));
        assert!(matches!(read(&out[..out.len() - 1]), Err(FrameError::Length { expected: 204, found: 203, .. })));
        assert!(matches!(read(&[&out[..], &[0]].concat()), Err(FrameError::Length { found: 205, .. })));
        assert!(matches!(read(&[b'G'; 60]), Err(FrameError::Magic { .. })));
        let with = |at: usize, value: u8| {
            let mut bytes = out.to_vec();
            bytes[at] = value;
            read(&bytes).map(|_| ())
        };
        assert_eq!(with(4, 2), Err(FrameError::Version { found: 2 }));
        assert_eq!(with(6, 3), Err(FrameError::Unknown { field: "phase", found: 3 }));
        assert_eq!(with(7, 200), Err(FrameError::Unknown { field: "codec", found: 200 }));
        assert_eq!(with(8, 2), Err(FrameError::Unknown { field: "flags", found: 2 }));
        assert_eq!(with(9, 1), Err(FrameError::Unknown { field: "flags", found: 1 }));
        assert!(matches!(with(47, 0xff), Err(FrameError::Large { .. })));
        assert!(matches!(with(43, 0xff), Err(FrameError::Large { .. })));
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
            prop_assert!(read(&bytes).is_err());
        }
    }
}
