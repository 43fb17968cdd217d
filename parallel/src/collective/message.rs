//! What members of a sub-group send each other in a collective operation.
//!
//! ```text
//!  0  magic      4 bytes  "TRIC"
//!  4  version    u16      1
//!  6  kind       u8       0 piece, 1 refusal
//!  7  operation  u8       0 broadcast, 1 all_reduce, 2 all_gather, 3 reduce_scatter, 4 all_to_all, 5 send, 6 barrier
//!  8  dtype      u8       0 f32, 1 bf16, 2 i32, 3 i64, 4 u8
//!  9  reduction  u8       0 none, 1 sum, 2 max, 3 min; one of 1 to 3 where the operation reduces, 0 elsewhere
//! 10  leg        u8       0 on the way in, 1 on the way out
//! 11  site_bytes u8       length of the site
//! 12  epoch      u32      changes whenever the group of ranks does
//! 16  group      u64      which sub-group: the first eight bytes of BLAKE3 of its ranks, u32 each
//! 24  sequence   u64      the sub-group's first operation is 0; of a send, the first one this way
//! 32  elements   u64      of the call, as the operation counts them
//! 40  offset     u64      the first element, counted in what the sender has for the receiver on this leg
//! 48  root       u32      of a broadcast: the rank that gives; 0 elsewhere
//! 52  length     u32      bytes after the site
//! 56  crc32c     u32      of bytes 0..56 and of what follows the header
//! 60  site       UTF-8, then the elements; of a refusal: UTF-8 that says why
//! ```
//!
//! All little-endian.

use bytes::Bytes;
use thiserror::Error;

use super::call::{Call, Dtype, Operation, Reduction};
use crate::frame::PAYLOAD_BYTES_MAX;

const MAGIC: [u8; 4] = *b"TRIC";
/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
/// Bytes before the site.
pub const HEADER_BYTES: usize = 60;
/// Where the checksum stands.
const CHECKSUM_AT: usize = HEADER_BYTES - 4;
/// Bytes of a site at most.
pub const SITE_BYTES_MAX: usize = 255;
/// Bytes of a refusal's text at most.
pub const REFUSAL_BYTES_MAX: usize = 4096;

/// On which way an element is where an operation has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// To whoever reduces it, or to the root.
    In,
    /// From there to the others. What is not reduced has this way alone.
    Out,
}

/// What a message brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Elements.
    Piece {
        /// On which way they are.
        leg: Leg,
        /// The first of them, counted in what the sender has for the receiver on this leg.
        offset: u64,
        /// The elements, little-endian.
        bytes: Bytes,
    },
    /// The sender gives up, for this reason.
    Refusal(String),
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is part of.
    pub call: Call,
    /// What it brings.
    pub body: Body,
}

/// Why bytes are not a message. Nothing is taken from such bytes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// Fewer bytes than a header has.
    #[error("a collective message has at least {HEADER_BYTES} bytes, {found} came: it was cut")]
    Short {
        /// Bytes that came.
        found: usize,
    },
    /// Another protocol.
    #[error("a collective message starts with \"TRIC\", {found:02x?} came")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Another version of ours.
    #[error(
        "collective messages of version {VERSION} are read here, version {found} came: run the same build on every rank"
    )]
    Version {
        /// The version that came.
        found: u16,
    },
    /// A field has a value that this version does not know, or that does not belong to the operation.
    #[error("the {field} of a collective message is {found}, which this version does not know there")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// Header and what follows it do not agree.
    #[error("a collective message with this header has {expected} bytes after it, {found} came")]
    Length {
        /// Bytes that the header names.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// More than is ever sent.
    #[error("a collective message brings at most {max} bytes, the header names {found}")]
    Large {
        /// The bound.
        max: usize,
        /// Bytes that the header names.
        found: usize,
    },
    /// The elements are not whole, or not those of the call.
    #[error("{bytes} bytes from element {offset} on are no piece of {elements} elements of {width} bytes")]
    Elements {
        /// Bytes that came.
        bytes: usize,
        /// First element.
        offset: u64,
        /// Elements of the call.
        elements: u64,
        /// Bytes of an element.
        width: usize,
    },
    /// The checksum does not fit.
    #[error("the checksum of a collective message does not fit: it was damaged on its way")]
    Checksum,
    /// A text is none.
    #[error("the {field} of a collective message is no UTF-8")]
    Text {
        /// Which text.
        field: &'static str,
    },
}

/// Whether these bytes claim to be a message of this kind.
#[must_use]
pub fn is_collective(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

impl Message {
    /// The bytes.
    ///
    /// # Panics
    /// A site, a piece or a text is longer than it may be.
    #[must_use]
    pub fn write(&self) -> Bytes {
        match &self.body {
            Body::Piece { leg, offset, bytes } => {
                write_piece(&self.call, *leg, *offset, bytes.len(), |out| out.copy_from_slice(bytes))
            }
            Body::Refusal(text) => {
                assert!(text.len() <= REFUSAL_BYTES_MAX, "a refusal of {} bytes: cut it before", text.len());
                write(&self.call, [1, 0], 0, text.len(), |out| out.copy_from_slice(text.as_bytes()))
            }
        }
    }

    /// Reads a message that is all of `bytes`.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn read(bytes: &Bytes) -> Result<Self, MessageError> {
        if bytes.len() < HEADER_BYTES {
            return Err(MessageError::Short { found: bytes.len() });
        }
        let (header, rest) = bytes.split_at(HEADER_BYTES);
        if !is_collective(header) {
            return Err(MessageError::Magic { found: [header[0], header[1], header[2], header[3]] });
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(MessageError::Version { found: version });
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (site_bytes, length) = (usize::from(header[11]), word(52) as usize);
        let max = if header[6] == 0 { PAYLOAD_BYTES_MAX } else { REFUSAL_BYTES_MAX };
        if length > max {
            return Err(MessageError::Large { max, found: length });
        }
        if rest.len() != site_bytes + length {
            return Err(MessageError::Length { expected: site_bytes + length, found: rest.len() });
        }
        if checksum(bytes) != word(CHECKSUM_AT) {
            return Err(MessageError::Checksum);
        }
        let unknown = |field, found| MessageError::Unknown { field, found };
        let byte = |field, at: usize| unknown(field, u64::from(header[at]));
        let number = |at: usize| usize::from(header[at]);
        let operation = *Operation::ALL.get(number(7)).ok_or_else(|| byte("operation", 7))?;
        let dtype = *Dtype::ALL.get(number(8)).ok_or_else(|| byte("dtype", 8))?;
        let reduction = number(9).checked_sub(1).and_then(|index| Reduction::ALL.get(index)).copied();
        if operation.reduces() != reduction.is_some() || reduction.is_none() && header[9] != 0 {
            return Err(byte("reduction", 9));
        }
        let root = word(48);
        if operation != Operation::Broadcast && root != 0 {
            return Err(unknown("root", u64::from(root)));
        }
        let (site, payload) = rest.split_at(site_bytes);
        let text =
            |field, bytes: &[u8]| str::from_utf8(bytes).map(str::to_owned).map_err(|_| MessageError::Text { field });
        let (sequence, elements, offset) = (long(24), long(32), long(40));
        let site = text("site", site)?;
        let call =
            Call { operation, dtype, reduction, epoch: word(12), group: long(16), sequence, elements, root, site };
        let body = match header[6] {
            0 => {
                let leg = [Leg::In, Leg::Out].get(number(10)).copied().ok_or_else(|| byte("leg", 10))?;
                let width = dtype.bytes();
                let end = offset.checked_add((length / width) as u64);
                if !length.is_multiple_of(width) || end.is_none_or(|end| end > elements) {
                    return Err(MessageError::Elements { bytes: length, offset, elements, width });
                }
                Body::Piece { leg, offset, bytes: bytes.slice(HEADER_BYTES + site_bytes..) }
            }
            1 if header[10] != 0 => return Err(byte("leg", 10)),
            1 if offset != 0 => return Err(unknown("offset", offset)),
            1 => Body::Refusal(text("refusal", payload)?),
            _ => return Err(byte("kind", 6)),
        };
        Ok(Self { call, body })
    }
}

/// A piece of so many bytes, which `fill` writes.
///
/// # Panics
/// The site or the piece is longer than it may be.
pub(crate) fn write_piece(call: &Call, leg: Leg, offset: u64, length: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
    assert!(length <= PAYLOAD_BYTES_MAX, "a piece of {length} bytes: cut it smaller");
    write(call, [0, leg as u8], offset, length, fill)
}

fn write(call: &Call, [kind, leg]: [u8; 2], offset: u64, length: usize, fill: impl FnOnce(&mut [u8])) -> Bytes {
    let Call { operation, dtype, reduction, epoch, group, sequence, elements, root, ref site } = *call;
    assert!(site.len() <= SITE_BYTES_MAX, "a site of {} bytes: checked where the call begins", site.len());
    let mut out = Vec::with_capacity(HEADER_BYTES + site.len() + length);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend([kind, operation as u8, dtype as u8, reduction.map_or(0, |reduction| reduction as u8 + 1), leg]);
    out.push(site.len() as u8);
    out.extend(epoch.to_le_bytes());
    for long in [group, sequence, elements, offset] {
        out.extend(long.to_le_bytes());
    }
    out.extend(root.to_le_bytes());
    out.extend((length as u32).to_le_bytes());
    out.extend([0; 4]);
    out.extend(site.as_bytes());
    out.resize(out.len() + length, 0);
    fill(&mut out[HEADER_BYTES + site.len()..]);
    let checksum = checksum(&out);
    out[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    out.into()
}

/// Of everything but itself.
fn checksum(message: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&message[..CHECKSUM_AT]), &message[HEADER_BYTES..])
}
