//! Small messages that every rank sends to all others, beside the frames of gradients.
//!
//! ```text
//!  0  magic    4 bytes  "TRIN"
//!  4  version  u16      3
//!  6  kind     u8       0 ballot, 1 values, 2 filler
//!  7  flags    u8       of a ballot: bit 0 finite, bit 1 stop, bit 2 busy, bit 3 the hash counts, bit 4 the codec counts
//!  8  epoch    u32
//! 12  length   u32      bytes of the payload
//! 16  step     u64      of values: which round; of filler: which note of the burst
//! 24  crc32c   u32      of bytes 0..24 and of the payload
//! 28  payload  a ballot: the loss (f64), seconds of computing (f64), a BLAKE3 hash (32 bytes) and the number of a codec
//!              (u8), zeros where they do not count, and what the sender's own sums add to the squared norm (20 digits of
//!              u32, see `data::norm`; zeros where that is not finite); values: f64 each; filler: 256 KiB, with which the rate of a link is measured
//! ```
//!
//! All little-endian.

use bytes::Bytes;
use compression::Codec;
use thiserror::Error;

use crate::data::norm::{DIGITS, SquaredNorm};
use crate::frame::{codec_number, codec_of_number};

const MAGIC: [u8; 4] = *b"TRIN";
const VERSION: u16 = 3;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 28;
const BALLOT_BYTES: usize = 49 + 4 * DIGITS;
/// The most values that one message carries.
pub const VALUES_MAX: usize = 1 << 18;
/// The payload of a filler.
pub const FILLER_BYTES: usize = 256 << 10;

/// What a rank says at the end of a step; all of them together decide what every rank does with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ballot {
    /// Whether everything was finite: the loss, gradients, sums and encodes.
    pub finite: bool,
    /// Whether somebody asked this rank to stop.
    pub stop: bool,
    /// Whether this rank cannot take a snapshot now.
    pub busy: bool,
    /// This rank's part of the loss.
    pub loss: f64,
    /// Seconds that its forward and backward passes took.
    pub compute_s: f64,
    /// BLAKE3 of the parameters before this step, where they are compared.
    pub parameters: Option<[u8; 32]>,
    /// What tensors are to travel in from the next step on. Only what rank 0 says counts, and it says it once.
    pub codec: Option<Codec>,
}

/// A message.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// The end of a step, and what the sums that the rank owns add to the gradient's squared norm.
    Ballot(Ballot, SquaredNorm),
    /// Numbers that all ranks gather.
    Values(Vec<f64>),
    /// Bytes without a meaning, with which the rate of a link is measured.
    Filler,
}

/// Why bytes are not a message. Nothing is taken from such bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a message between ranks is damaged or of another build: {what}; run the same build on every rank")]
pub struct NoteError {
    what: String,
}

/// Whether these bytes claim to be a message of this kind.
#[must_use]
pub fn is_note(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// The step that a message claims to be of; whoever takes it checks the rest.
pub(crate) fn peek(bytes: &[u8]) -> Option<u64> {
    let field = bytes.get(16..24).filter(|_| is_note(bytes) && bytes.len() >= HEADER_BYTES)?;
    field.try_into().ok().map(u64::from_le_bytes)
}

impl Note {
    /// The bytes.
    ///
    /// # Panics
    /// More than [`VALUES_MAX`] values.
    #[must_use]
    pub fn write(&self, epoch: u32, step: u64) -> Bytes {
        let (kind, flags, payload) = match self {
            Self::Ballot(ballot, norm) => {
                let flags = u8::from(ballot.finite)
                    | u8::from(ballot.stop) << 1
                    | u8::from(ballot.busy) << 2
                    | u8::from(ballot.parameters.is_some()) << 3
                    | u8::from(ballot.codec.is_some()) << 4;
                let (hash, codec) = (ballot.parameters.unwrap_or_default(), ballot.codec.map_or(0, codec_number));
                let mut payload =
                    [&ballot.loss.to_le_bytes()[..], &ballot.compute_s.to_le_bytes(), &hash, &[codec]].concat();
                payload.extend(norm.digits().unwrap_or_default().iter().flat_map(|digit| digit.to_le_bytes()));
                (0, flags, payload)
            }
            Self::Values(values) => {
                assert!(values.len() <= VALUES_MAX, "{} values in one message", values.len());
                (1, 0, values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            Self::Filler => (2, 0, vec![0; FILLER_BYTES]),
        };
        let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([kind, flags]);
        out.extend(epoch.to_le_bytes());
        out.extend((payload.len() as u32).to_le_bytes());
        out.extend(step.to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&out), &payload);
        out.extend(checksum.to_le_bytes());
        out.extend(payload);
        out.into()
    }

    /// Reads a message that is all of `bytes`, with its epoch and step.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn read(bytes: &[u8]) -> Result<(Self, u32, u64), NoteError> {
        let fault = |what: String| Err(NoteError { what });
        if bytes.len() < HEADER_BYTES || !is_note(bytes) {
            return fault(format!("expected at least {HEADER_BYTES} bytes and \"TRIN\", {} bytes came", bytes.len()));
        }
        let (header, payload) = bytes.split_at(HEADER_BYTES);
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return fault(format!("expected version {VERSION}, version {version} came"));
        }
        if word(12) as usize != payload.len() {
            return fault(format!("expected a payload of {} bytes, {} came", word(12), payload.len()));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&header[..24]), payload) != word(24) {
            return fault("the checksum does not fit".into());
        }
        let step = u64::from(word(16)) | u64::from(word(20)) << 32;
        let double = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let note = match (header[6], payload.len()) {
            (0, BALLOT_BYTES) if header[7] < 32 => {
                let flag = |bit: u8| header[7] >> bit & 1 == 1;
                let hash = payload[16..48].try_into().expect("32 bytes");
                let Some(codec) = codec_of_number(payload[48]) else {
                    return fault(format!("no codec has the number {}", payload[48]));
                };
                let ballot = Ballot {
                    finite: flag(0),
                    stop: flag(1),
                    busy: flag(2),
                    loss: double(&payload[..8]),
                    compute_s: double(&payload[8..16]),
                    parameters: flag(3).then_some(hash),
                    codec: flag(4).then_some(codec),
                };
                let (digits, _) = payload[49..].as_chunks::<4>();
                let norm = SquaredNorm::of_digits(std::array::from_fn(|at| u32::from_le_bytes(digits[at])));
                Self::Ballot(ballot, norm)
            }
            (1, length) if length % 8 == 0 && length / 8 <= VALUES_MAX && header[7] == 0 => {
                Self::Values(payload.chunks_exact(8).map(double).collect())
            }
            (2, FILLER_BYTES) if header[7] == 0 => Self::Filler,
            (kind, length) => return fault(format!("kind {kind} with flags {} and {length} bytes", header[7])),
        };
        Ok((note, word(8), step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes() -> [Note; 4] {
        let ballot = Ballot {
            finite: true,
            stop: false,
            busy: true,
            loss: 0.1,
            compute_s: 0.5,
            parameters: Some([7; 32]),
            codec: None,
        };
        let chosen = Ballot { parameters: None, codec: Some(Codec::Int4), ..ballot };
        let mut norm = SquaredNorm::default();
        norm.add(&[1.5, -2e9, 1e-20]);
        [
            Note::Ballot(ballot, norm),
            Note::Ballot(chosen, SquaredNorm::default()),
            Note::Values(vec![1.5, -0.0, f64::INFINITY]),
            Note::Values(Vec::new()),
        ]
    }

    #[test]
    fn messages_come_back_as_they_were_and_every_flipped_bit_is_noticed() {
        for note in notes() {
            let bytes = note.write(3, 1 << 40);
            assert_eq!(Note::read(&bytes), Ok((note, 3, 1 << 40)));
            for at in 0..8 * bytes.len() {
                let mut bytes = bytes.to_vec();
                bytes[at / 8] ^= 1 << (at % 8);
                assert!(Note::read(&bytes).is_err(), "bit {at}");
            }
            assert!(Note::read(&bytes[..bytes.len() - 1]).is_err());
            assert!(Note::read(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn a_filler_has_its_size_and_no_other() {
        let bytes = Note::Filler.write(3, 7);
        assert_eq!(bytes.len(), HEADER_BYTES + FILLER_BYTES);
        assert_eq!(Note::read(&bytes), Ok((Note::Filler, 3, 7)));
        let mut short = bytes[..HEADER_BYTES + 8].to_vec();
        short[12..16].copy_from_slice(&8u32.to_le_bytes());
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&short[..24]), &short[28..]);
        short[24..28].copy_from_slice(&checksum.to_le_bytes());
        let error = Note::read(&short).expect_err("8 bytes").to_string();
        assert!(error.contains("kind 2 with flags 0 and 8 bytes"), "{error}");
    }

    #[test]
    fn a_codec_that_nobody_knows_is_refused() {
        let ballot =
            Ballot { finite: true, stop: false, busy: false, loss: 0.0, compute_s: 0.0, parameters: None, codec: None };
        let mut bytes = Note::Ballot(ballot, SquaredNorm::default()).write(1, 1).to_vec();
        bytes[HEADER_BYTES + 48] = 200;
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..24]), &bytes[28..]);
        bytes[24..28].copy_from_slice(&checksum.to_le_bytes());
        let error = Note::read(&bytes).expect_err("no codec").to_string();
        assert!(error.contains("no codec has the number 200"), "{error}");
    }
}
