//! gRPC messages that are plain bytes: a frame of ours carries its own header and checksum, so nothing is around it but
//! gRPC's five bytes, a flag of compression and the length.
//!
//! [`RawCodec`] is tonic's way. It copies what is sent once, into the buffer that HTTP/2 sends; so [`Outgoing`] is a body
//! that hands HTTP/2 each message as it is, behind its header. Of what comes in, tonic's decoder copies every message
//! twice (into its buffer, and again when it makes room for a length that is there already); so [`Uncopied`] takes the body
//! before tonic reads it, and [`Messages`] cuts the messages out of HTTP/2's own buffers.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::body::Frame;
use tokio_stream::Stream;
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

/// A stream of messages as the body of a call.
#[derive(Debug)]
pub struct Outgoing<S>(pub S);

impl<S: Stream<Item = Bytes> + Unpin> hyper::body::Body for Outgoing<S> {
    type Data = Headed;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Headed>, Infallible>>> {
        let message = Pin::new(&mut self.0).poll_next(context);
        message.map(|message| message.map(|message| Ok(Frame::data(Headed::new(message)))))
    }
}

/// A message behind gRPC's header, which lie apart in memory.
#[derive(Debug)]
pub struct Headed {
    header: [u8; HEADER_BYTES],
    /// Bytes of the header that are read.
    read: usize,
    message: Bytes,
}

impl Headed {
    fn new(message: Bytes) -> Self {
        let length = u32::try_from(message.len()).expect("whoever makes a message bounds it");
        let mut header = [0; HEADER_BYTES];
        // The flag before it says that nothing is compressed.
        header[1..].copy_from_slice(&length.to_be_bytes());
        Self { header, read: 0, message }
    }
}

impl Buf for Headed {
    fn remaining(&self) -> usize {
        HEADER_BYTES - self.read + self.message.len()
    }

    fn chunk(&self) -> &[u8] {
        match &self.header[self.read..] {
            [] => &self.message,
            rest => rest,
        }
    }

    fn advance(&mut self, count: usize) {
        let of_header = count.min(HEADER_BYTES - self.read);
        self.read += of_header;
        self.message.advance(count - of_header);
    }

    fn chunks_vectored<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let parts = [&self.header[self.read..], &self.message].into_iter().filter(|part| !part.is_empty());
        into.iter_mut().zip(parts).map(|(slot, part)| *slot = IoSlice::new(part)).count()
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

    #[test]
    fn a_message_is_read_behind_its_header_in_pieces_of_any_length() {
        for length in [0, 1, 300] {
            let message: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            let whole = [&[0][..], &(length as u32).to_be_bytes(), &message].concat();
            for step in 1..=whole.len() {
                let (mut headed, mut read) = (Headed::new(message.clone().into()), Vec::new());
                while headed.has_remaining() {
                    let mut slices = [IoSlice::new(&[]); 3];
                    let filled = headed.chunks_vectored(&mut slices);
                    let joined = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<_>>();
                    assert_eq!(joined, whole[read.len()..], "all that is left, at once");
                    assert_eq!(headed.remaining(), joined.len());
                    assert!(joined.starts_with(headed.chunk()));
                    let count = step.min(headed.remaining());
                    read.extend_from_slice(&joined[..count]);
                    headed.advance(count);
                }
                assert_eq!(read, whole);
            }
        }
    }

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
