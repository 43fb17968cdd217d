//! What must hold whatever the bytes are: a function a fuzz target. Each panics where something does not hold.
//!
//! libFuzzer calls them in the crate around this file, and `tests/end_to_end/fuzzing.rs` as ordinary tests, which also
//! calls the `_with` functions with something wrong, and sees that it is noticed.
//!
//! What is written has margins that must stay as they are, and what is read is exactly as long as it says: libFuzzer's
//! address sanitizer sees a byte read behind it. Memory is bounded: checking and decoding a payload take none, reading
//! a frame at most [`PAYLOAD_BYTES_MAX`], which `-malloc_limit_mb` watches over.

use compression::codec::{TOO_LARGE, reduce};
use compression::{BLOCK, Codec, Found, Level, Part, Payload, Stores};

use super::frame::{FrameError, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};
use super::message::{self, Body, Message, MessageError, REFUSAL_BYTES_MAX, SITE_BYTES_MAX};
use super::note::{self, FILLER_BYTES, Note, NoteError, VALUES_MAX};

/// The longest slice that is tried: longer ones only repeat whole blocks.
pub const ELEMENTS_MAX: usize = 1024;

/// What became of the bytes, so that a test can see that it tried both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// They are refused.
    Refused,
    /// They mean something.
    Taken,
}

/// The bit of the first byte that has the payload cut or filled up to the length that it should have.
pub const FIT: u8 = 0x80;

/// Any bytes as a payload. Byte 0 is the codec and [`FIT`], bytes 1 and 2 the number of elements, the rest the payload.
///
/// It is refused, or decodes to the same finite values with all instructions, which added to a sum give the same sum,
/// and which can be encoded again. Nothing is written for a payload that is refused: there is nowhere to write yet.
pub fn payload(data: &[u8]) -> Seen {
    payload_with(data, |payload, level, stores, out| payload.decode_with(level, stores, out))
}

/// As [`payload`], with this decoder.
pub fn payload_with(data: &[u8], decode: impl Fn(&Payload<&[u8]>, Level, Stores, &mut [f32])) -> Seen {
    let [first, low, high, rest @ ..] = data else { return Seen::Refused };
    let codec = codec_of(first & !FIT);
    let elements = usize::from(u16::from_le_bytes([*low, *high])) % (ELEMENTS_MAX + 1);
    let mut bytes = rest.to_vec();
    if first & FIT != 0 {
        bytes.resize(codec.payload_bytes(elements), 0);
    }
    let bytes = bytes.into_boxed_slice();
    let payload = match Payload::new(codec, elements, &bytes[..]) {
        Ok(payload) => payload,
        Err(error) => {
            assert!(error.to_string().contains(codec.name()), "{error}");
            return Seen::Refused;
        }
    };
    assert_eq!(bytes.len(), codec.payload_bytes(elements), "another length is refused");

    let decoded = same_with_all(elements, f32::NAN, |level, stores, out| decode(&payload, level, stores, out));
    assert!(decoded.iter().all(|value| value.is_finite()), "{codec}: a value that is not finite");

    let before: Vec<f32> = (0..elements).map(|at| (at % 23) as f32 * 0.37 - 4.0).collect();
    let sums = same_with_all(elements, 0.0, |level, _, sum| {
        sum.copy_from_slice(&before);
        payload.decode_add_with(level, sum);
    });
    let expected: Vec<f32> = before.iter().zip(&decoded).map(|(sum, value)| sum + value).collect();
    assert_eq!(bits(&sums), bits(&expected), "{codec}: the sum is that of the decoded values");

    let mut reduced = vec![f32::NAN; elements];
    reduce(&[Part::Encoded(&payload), Part::Values(&before), Part::Encoded(&payload)], &mut reduced);
    let expected: Vec<f32> = before.iter().zip(&decoded).map(|(own, value)| ((0.0 + value) + own) + value).collect();
    assert_eq!(bits(&reduced), bits(&expected), "{codec}: the owner's sum is that of the decoded values");

    check_encode(codec, &decoded, &before, Codec::encode_with);
    Seen::Taken
}

/// Any bytes as gradient and residual. Byte 0 is the codec; then come a gradient and its residual, an f32 each, for
/// each element.
///
/// The input cannot be sent, or has the same payload and the same new residual with all instructions: a payload that is not
/// refused and that, with what is left, is the gradient and what is released of the residual, bit for bit.
pub fn encode(data: &[u8]) -> Seen {
    encode_with(data, Codec::encode_with)
}

/// As [`encode`], with this encoder.
pub fn encode_with(data: &[u8], encode: impl Encode) -> Seen {
    let [first, rest @ ..] = data else { return Seen::Refused };
    let float = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let pairs = rest.chunks_exact(8).take(ELEMENTS_MAX);
    let (gradient, residual): (Vec<f32>, Vec<f32>) = pairs.map(|pair| (float(pair), float(&pair[4..]))).unzip();
    // Without spare capacity, in which a byte too many could be read unseen.
    check_encode(codec_of(*first), &gradient, &residual.into_boxed_slice(), encode)
}

/// [`Codec::encode_with`], or something else in its place.
pub trait Encode: Fn(Codec, Level, Stores, &mut [f32], &[f32], &mut [u8]) -> Found {}
impl<F: Fn(Codec, Level, Stores, &mut [f32], &[f32], &mut [u8]) -> Found> Encode for F {}

fn check_encode(codec: Codec, gradient: &[f32], residual: &[f32], encode: impl Encode) -> Seen {
    let elements = gradient.len();
    let held: Vec<f32> = residual.iter().map(|r| r * codec.hold()).collect();
    let released = residual.iter().zip(&held).map(|(r, held)| r - held);
    let y: Vec<f32> = gradient.iter().zip(released).map(|(value, released)| (value + released) + 0.0).collect();
    // Without a past nothing is held, so that what is left is seen.
    let (mut left, mut alone) = (y.clone(), vec![0; codec.payload_bytes(elements)]);
    let _ = codec.encode(&mut left, &vec![0.0; elements], &mut alone);
    let next: Vec<f32> = left.iter().zip(&held).map(|(left, held)| (left + held) + 0.0).collect();
    // False for NaN too.
    let can_be_sent = |values: &[f32]| values.iter().all(|x| x.abs() < TOO_LARGE);
    // Where `y` is smaller there is no new residual that is too large, if the old one was not.
    let looks = |y: &[f32]| y.iter().any(|y| y.abs() >= TOO_LARGE / 32.0);
    let is_seen = |(y, next): (&[f32], &[f32])| looks(y) && !can_be_sent(next);
    let is_good = can_be_sent(&y) && !y.chunks(BLOCK).zip(next.chunks(BLOCK)).any(is_seen);
    assert!(!is_good || !can_be_sent(residual) || can_be_sent(&next), "{codec}: what is not seen is not there");
    let expected = if is_good { Found::Finite } else { Found::NonFinite };
    for (level, stores) in ways() {
        let mut found_next = Margins::new(elements, 0.0f32, stores);
        let mut bytes = Margins::new(codec.payload_bytes(elements), 0xa5u8, stores);
        found_next.inside().copy_from_slice(gradient);
        let found = encode(codec, level, stores, found_next.inside(), residual, bytes.inside());
        assert_eq!(found, expected, "{codec}, {}", level.name());
        let (found_next, bytes) = (found_next.taken(), bytes.taken());
        if found == Found::Finite {
            assert_eq!(bytes, alone, "{codec}, {}: the payload", level.name());
            assert_eq!(bits(&found_next), bits(&next), "{codec}, {}: the new residual", level.name());
        }
    }
    if expected == Found::NonFinite {
        return Seen::Refused;
    }
    let payload = Payload::new(codec, elements, &alone).expect("what an encoder writes is not refused");
    let mut sums = vec![f32::NAN; elements];
    payload.decode(&mut sums);
    sums.iter_mut().zip(&left).for_each(|(sum, left)| *sum += left);
    assert_eq!(bits(&sums), bits(&y), "{codec}: the payload and what is left are the input");
    assert!(left.iter().all(|left| left.to_bits() != (-0.0f32).to_bits()), "{codec}: -0.0 is left");
    Seen::Taken
}

/// Any bytes as a frame, and the same bytes with the checksum that they should have: else it would hide the rest.
///
/// It is refused, or has a payload of the length that it says, at most [`PAYLOAD_BYTES_MAX`], and is what its header
/// and its payload are written as; packed by zstd, or with zeros or without them, it is only read as the same again.
pub fn frame(data: &[u8]) -> Seen {
    frame_with(data, read)
}

/// [`Header::read`], with the payload as a slice.
pub fn read(data: &[u8]) -> Result<(Header, Vec<u8>), FrameError> {
    Header::read(&data.to_vec().into()).map(|(header, payload)| (header, payload.to_vec()))
}

/// As [`frame`], with this reader.
pub fn frame_with(data: &[u8], read: impl Fn(&[u8]) -> Result<(Header, Vec<u8>), FrameError>) -> Seen {
    let mut mended = data.to_vec();
    if let Some((header, body)) = mended.split_at_mut_checked(HEADER_BYTES) {
        let (covered, checksum) = header.split_at_mut(HEADER_BYTES - 4);
        checksum.copy_from_slice(&crc32c([covered, body]).to_le_bytes());
    }
    let is_mended = mended != data;
    if is_mended && data.len() >= HEADER_BYTES {
        assert!(read(data).is_err(), "a checksum that does not fit");
    }
    let (header, payload) = match read(&mended) {
        Ok(read) => read,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Seen::Refused;
        }
    };
    assert_eq!(payload.len(), header.codec.payload_bytes(header.elements as usize), "the payload has its length");
    assert!(payload.len() <= PAYLOAD_BYTES_MAX && header.start.is_multiple_of(BLOCK as u64), "{header:?}");
    let written = header.frame(&payload);
    let is_plain = mended[8] == 0 && written[8] == 0;
    assert!(!is_plain || written[..] == mended[..], "a plain frame has one way to be written");
    // A payload may still be refused, but not wildly.
    let _ = Payload::new(header.codec, header.elements as usize, &payload);
    assert_eq!(read(&written), Ok((header, payload)), "what is written is read");
    Seen::Taken
}

/// Any bytes as a message of a collective operation, and the same bytes with the checksum that they should have.
///
/// It is refused, or is written as the same bytes, with pieces and texts within their bounds.
pub fn collective(data: &[u8]) -> Seen {
    collective_with(data, read_message)
}

/// [`Message::read`] of a slice.
pub fn read_message(data: &[u8]) -> Result<Message, MessageError> {
    Message::read(&data.to_vec().into())
}

/// As [`collective`], with this reader.
pub fn collective_with(data: &[u8], read: impl Fn(&[u8]) -> Result<Message, MessageError>) -> Seen {
    let mut mended = data.to_vec();
    if let Some((header, rest)) = mended.split_at_mut_checked(message::HEADER_BYTES) {
        let (covered, checksum) = header.split_at_mut(message::HEADER_BYTES - 4);
        checksum.copy_from_slice(&crc32c([covered, rest]).to_le_bytes());
    }
    if mended != data {
        assert!(read(data).is_err(), "a checksum that does not fit");
    }
    let message = match read(&mended) {
        Ok(message) => message,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Seen::Refused;
        }
    };
    let (bytes, max) = match &message.body {
        Body::Piece { bytes, .. } => (bytes.len(), PAYLOAD_BYTES_MAX),
        Body::Refusal(text) => (text.len(), REFUSAL_BYTES_MAX),
    };
    assert!(bytes <= max && message.call.site.len() <= SITE_BYTES_MAX, "{message:?}");
    if let Body::Piece { offset, .. } = message.body {
        let piece = (bytes / message.call.dtype.bytes()) as u64;
        assert!(offset.checked_add(piece).is_some_and(|end| end <= message.call.elements), "{message:?}");
    }
    assert_eq!(message.write()[..], mended[..], "a message has one way to be written");
    Seen::Taken
}

/// Any bytes as a note, its checksum mended.
///
/// It is refused, or is what its bytes say: written again it is these bytes, but for those that do not count, which are zeros
/// then.
pub fn note(data: &[u8]) -> Seen {
    note_with(data, Note::read)
}

/// As [`note`], with this reader.
pub fn note_with(data: &[u8], read: impl Fn(&[u8]) -> Result<(Note, u32, u64), NoteError>) -> Seen {
    let mut mended = data.to_vec();
    mend(&mut mended);
    if mended != data {
        assert!(read(data).is_err(), "a checksum that does not fit");
    }
    let (note, epoch, step) = match read(&mended) {
        Ok(note) => note,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Seen::Refused;
        }
    };
    let payload = &mut mended[note::HEADER_BYTES..];
    match &note {
        Note::Ballot(ballot, _) => {
            if ballot.parameters.is_none() {
                payload[16..48].fill(0);
            }
            if ballot.codec.is_none() {
                payload[48] = 0;
            }
        }
        Note::Values(values) => assert!(values.len() <= VALUES_MAX, "{} values", values.len()),
        Note::Filler => {
            assert_eq!(payload.len(), FILLER_BYTES);
            payload.fill(0);
        }
    }
    mend(&mut mended);
    assert_eq!(note.write(epoch, step)[..], mended[..], "{note:?}");
    Seen::Taken
}

/// Puts the checksum of a note right.
fn mend(bytes: &mut [u8]) {
    if let Some((header, rest)) = bytes.split_at_mut_checked(note::HEADER_BYTES) {
        let (covered, checksum) = header.split_at_mut(note::HEADER_BYTES - 4);
        checksum.copy_from_slice(&crc32c([covered, rest]).to_le_bytes());
    }
}

/// CRC-32C, bit by bit, so that it is not the one that is tried.
fn crc32c(parts: [&[u8]; 2]) -> u32 {
    let bytes = parts.into_iter().flatten();
    !bytes.fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

fn codec_of(byte: u8) -> Codec {
    Codec::ALL[usize::from(byte) % Codec::ALL.len()]
}

/// All instructions that there are, with all stores.
fn ways() -> impl Iterator<Item = (Level, Stores)> {
    let levels = Level::available().into_iter();
    levels.flat_map(|level| [Stores::Cached, Stores::Stream].map(|stores| (level, stores)))
}

/// What `write` makes of `elements` f32 that are `fill` before: the same in all ways.
fn same_with_all(elements: usize, fill: f32, write: impl Fn(Level, Stores, &mut [f32])) -> Vec<f32> {
    let mut first: Option<Vec<f32>> = None;
    for (level, stores) in ways() {
        let mut out = Margins::new(elements, fill, stores);
        write(level, stores, out.inside());
        let out = out.taken();
        match &first {
            None => first = Some(out),
            Some(first) => assert_eq!(bits(&out), bits(first), "{}, {stores:?}", level.name()),
        }
    }
    first.expect("one way at least")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A slice with something before and behind it that must not change. It starts on a multiple of 64 bytes where stores
/// past the caches ask for that, else one item behind.
struct Margins<T> {
    all: Vec<T>,
    start: usize,
    length: usize,
    fill: T,
}

impl<T: Copy + PartialEq + Mark> Margins<T> {
    const WIDTH: usize = 64;

    fn new(length: usize, fill: T, stores: Stores) -> Self {
        let all = vec![T::MARK; length + 3 * Self::WIDTH];
        let aligned = (Self::WIDTH..2 * Self::WIDTH).find(|&at| all[at..].as_ptr().addr().is_multiple_of(64));
        let start = aligned.expect("64 bytes are at most 64 items") + usize::from(stores == Stores::Cached);
        Self { all, start, length, fill }.filled()
    }

    fn filled(mut self) -> Self {
        let fill = self.fill;
        self.inside().fill(fill);
        self
    }

    fn inside(&mut self) -> &mut [T] {
        &mut self.all[self.start..self.start + self.length]
    }

    fn taken(self) -> Vec<T> {
        let (before, rest) = self.all.split_at(self.start);
        let (inside, behind) = rest.split_at(self.length);
        assert!(before.iter().chain(behind).all(|&item| item == T::MARK), "written beside the slice");
        inside.to_vec()
    }
}

/// What stands in the margins.
trait Mark {
    const MARK: Self;
}

impl Mark for f32 {
    const MARK: Self = 12345.678;
}

impl Mark for u8 {
    const MARK: Self = 0x5a;
}
