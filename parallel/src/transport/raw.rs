//! gRPC messages that are plain bytes: a frame of ours carries its own header and checksum, so nothing is around it but
//! gRPC's five bytes, a flag of compression and the length.
//!
//! [`RawCodec`] is tonic's way, and sends. Of what comes in, tonic's decoder copies every message twice (into its
//! buffer, and again when it makes room for a length that is there already); so [`Uncopied`] takes the body before tonic
//! reads it, and [`Messages`] cuts the messages out of HTTP/2's own buffers.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Body as _, Service, http};
use tonic::server::NamedService;
use tonic::{Request, Status};

/// The client and the server that `build.rs` makes of the service `tributary.data.v1.Data`.
pub(crate) mod service {
    #![allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
    include!(concat!(env!("OUT_DIR"), "/tributary.data.v1.Data.rs"));
}

/// Initial room for what is encoded, and for what comes in.
const BUFFER_BYTES: usize = 64 << 10;

/// Messages below this leave together; a longer one leaves alone, so that its buffer is never grown by copying.
const TOGETHER_BYTES: usize = 32 << 10;

/// Bytes in, bytes out.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawCodec;

/// Puts bytes behind gRPC's header. Costs one copy, into the buffer that HTTP/2 sends.
#[derive(Clone, Copy, Debug)]
pub struct RawEncoder;

/// Takes a whole message. The bytes are a part of tonic's buffer, not a copy of it.
#[derive(Clone, Copy, Debug)]
pub struct RawDecoder;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = RawEncoder;
    type Decoder = RawDecoder;

    fn encoder(&mut self) -> RawEncoder {
        RawEncoder
    }

    fn decoder(&mut self) -> RawDecoder {
        RawDecoder
    }
}

impl Encoder for RawEncoder {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.reserve(item.len());
        dst.put(item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
    }
}

impl Decoder for RawDecoder {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(src.copy_to_bytes(src.remaining())))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, TOGETHER_BYTES)
    }
}

/// A service whose requests carry their bodies unread; a method takes one with [`messages`].
#[derive(Clone, Debug)]
pub struct Uncopied<S>(pub S);

/// In the extensions of a request, which want to be cloned; only one clone gets the body.
#[derive(Clone)]
struct Unread(Arc<Mutex<Option<Body>>>);

impl<S: Service<http::Request<Body>, Error = Infallible>> Service<http::Request<Body>> for Uncopied<S> {
    type Response = S::Response;
    type Error = Infallible;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(Unread(Arc::new(Mutex::new(Some(body)))));
        self.0.call(http::Request::from_parts(parts, Body::empty()))
    }
}

impl<S: NamedService> NamedService for Uncopied<S> {
    const NAME: &'static str = S::NAME;
}

/// The messages of a request to an [`Uncopied`] service, of at most so many bytes each. None if the service is not
/// one, or they were taken before.
pub fn messages<T>(request: &Request<T>, bytes_max: usize) -> Option<Messages> {
    let unread = request.extensions().get::<Unread>()?;
    let body = unread.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    Some(Messages { body, cutter: Cutter::new(bytes_max) })
}

/// The messages of a stream, in order.
#[derive(Debug)]
pub struct Messages {
    body: Body,
    cutter: Cutter,
}

impl Messages {
    /// The next message, or none at the end.
    ///
    /// # Errors
    ///
    /// When the connection breaks, the stream ends within a message, or what comes is no message.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(message) = self.cutter.cut()? {
                return Ok(Some(message));
            }
            match poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await {
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.cutter.push(data);
                    }
                }
                None if self.cutter.is_empty() => return Ok(None),
                None => return Err(Status::data_loss("the stream ended within a message")),
            }
        }
    }
}

/// gRPC's header of a message.
const HEADER_BYTES: usize = 5;

/// Cuts messages out of pieces. One that lies within a piece is a part of it; any other is put together.
#[derive(Debug)]
struct Cutter {
    bytes_max: usize,
    /// What came last and is not cut yet.
    piece: Bytes,
    /// The beginning of a message that no piece held whole, from its header on.
    begun: BytesMut,
}

impl Cutter {
    fn new(bytes_max: usize) -> Self {
        Self { bytes_max, piece: Bytes::new(), begun: BytesMut::new() }
    }

    fn is_empty(&self) -> bool {
        self.piece.is_empty() && self.begun.is_empty()
    }

    /// To be called when there is nothing more to cut.
    fn push(&mut self, piece: Bytes) {
        assert!(self.piece.is_empty(), "a piece comes when the one before is used up");
        self.piece = piece;
    }

    fn cut(&mut self) -> Result<Option<Bytes>, Status> {
        if self.begun.is_empty() && self.piece.len() >= HEADER_BYTES {
            let whole_bytes = HEADER_BYTES + self.length(&self.piece)?;
            if self.piece.len() >= whole_bytes {
                let mut whole = self.piece.split_to(whole_bytes);
                whole.advance(HEADER_BYTES);
                return Ok(Some(whole));
            }
        }
        self.fill(HEADER_BYTES);
        if self.begun.len() < HEADER_BYTES {
            return Ok(None);
        }
        let whole_bytes = HEADER_BYTES + self.length(&self.begun)?;
        self.fill(whole_bytes);
        if self.begun.len() < whole_bytes {
            return Ok(None);
        }
        let mut whole = self.begun.split().freeze();
        whole.advance(HEADER_BYTES);
        Ok(Some(whole))
    }

    /// Moves bytes from the piece until so many are begun, or none are left.
    fn fill(&mut self, bytes: usize) {
        let missing = bytes.saturating_sub(self.begun.len());
        self.begun.reserve(missing);
        self.begun.put(self.piece.split_to(missing.min(self.piece.len())));
    }

    /// The length that a header gives.
    fn length(&self, mut header: &[u8]) -> Result<usize, Status> {
        let flag = header.get_u8();
        if flag != 0 {
            return Err(Status::unimplemented(format!("a message has flag {flag}: expected 0, uncompressed")));
        }
        let length = header.get_u32() as usize;
        if length > self.bytes_max {
            let limit = self.bytes_max;
            return Err(Status::out_of_range(format!("a message of {length} bytes: at most {limit} are taken")));
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of these lengths, sent in pieces of so many bytes, come out as they were.
    fn check(lengths: &[usize], piece_bytes: usize) {
        let messages = lengths.iter().map(|length| (0..*length).map(|i| (i % 251) as u8).collect::<Vec<_>>());
        let messages = messages.collect::<Vec<_>>();
        let sent = messages.iter().flat_map(|message| {
            let header = [&[0][..], &(message.len() as u32).to_be_bytes()].concat();
            header.into_iter().chain(message.iter().copied())
        });
        let sent = Bytes::from(sent.collect::<Vec<_>>());
        let mut cutter = Cutter::new(1000);
        let mut came = Vec::new();
        for piece in sent.chunks(piece_bytes) {
            cutter.push(sent.slice_ref(piece));
            while let Some(message) = cutter.cut().expect("a good message") {
                came.push(message.to_vec());
            }
        }
        assert_eq!(came, messages, "pieces of {piece_bytes}");
        assert!(cutter.is_empty());
    }

    #[test]
    fn messages_come_out_whole_whatever_the_pieces() {
        for piece_bytes in 1..40 {
            check(&[0, 1, 2, 3, 5, 8, 0, 0, 30, 100, 7], piece_bytes);
        }
        check(&[1000, 999, 1000], 1005);
        check(&[1000, 0, 1000], 1 << 20);
    }

    #[test]
    fn a_message_within_a_piece_is_not_copied() {
        let sent = Bytes::from_static(b"\0\0\0\0\x03abc\0\0\0\0\x02de");
        let mut cutter = Cutter::new(3);
        cutter.push(sent.clone());
        for from in [5, 13] {
            let message = cutter.cut().expect("a good message").expect("a whole one");
            assert_eq!(message.as_ptr(), sent[from..].as_ptr());
        }
    }

    #[test]
    fn a_message_too_long_or_compressed_is_refused_at_its_header() {
        for (sent, named) in [(b"\0\0\0\0\x04", "4 bytes: at most 3"), (b"\x01\0\0\0\x01", "flag 1")] {
            for piece_bytes in [1, 5] {
                let mut cutter = Cutter::new(3);
                let mut pieces = sent.chunks(piece_bytes);
                let error = pieces.find_map(|piece| {
                    cutter.push(Bytes::copy_from_slice(piece));
                    cutter.cut().err()
                });
                let error = error.expect("not a message");
                assert!(error.message().contains(named), "{error}");
            }
        }
    }
}
