//! A caller for tests that speaks HTTP/2 by the byte, and so can do what a well-behaved client never does (RFC 9113).

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The error code of a stream that the server did not look at.
pub(crate) const REFUSED_STREAM: u32 = 7;
/// A server's setting: how many streams a client may have open.
pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// A connection.
pub(crate) struct Caller(TcpStream);

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Caller {
    /// With the preface sent. Whoever waits longer than the guard for an answer panics.
    pub(crate) fn new(address: SocketAddr, guard: Duration) -> Self {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(guard)).expect("a socket");
        let mut caller = Self(stream);
        caller.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("open");
        caller.send(SETTINGS, 0, 0, &[]);
        caller
    }

    /// Opens a stream with a gRPC call whose body does not begin. A client's streams have odd numbers.
    pub(crate) fn call(&mut self, stream: u32, path: &str) {
        // HPACK (RFC 7541): from its static table POST and http; path, authority and content type by their names from there.
        let mut block = vec![0x83, 0x86];
        let mut say = |name: &[u8], value: &str| {
            block.extend(name);
            block.push(u8::try_from(value.len()).expect("short"));
            block.extend(value.as_bytes());
        };
        say(&[0x04], path);
        say(&[0x01], "here");
        say(&[0x0f, 0x10], "application/grpc");
        say(b"\x00\x02te", "trailers");
        self.send(HEADERS, END_HEADERS, stream, &block);
    }

    /// What the server sets: the value of a setting of its first frame.
    pub(crate) fn setting(&mut self, wanted: u16) -> Option<u32> {
        let frame = self.frame();
        assert_eq!((frame.kind, frame.flags & ACK), (SETTINGS, 0), "a server's first frame is its settings");
        let mut settings = frame.payload.chunks_exact(6);
        let found = settings.find(|setting| setting[..2] == wanted.to_be_bytes());
        found.map(|setting| u32::from_be_bytes(setting[2..].try_into().expect("four bytes")))
    }

    /// Waits until the server resets a stream: which, and with what error code.
    pub(crate) fn reset(&mut self) -> (u32, u32) {
        loop {
            let frame = self.frame();
            if frame.kind == RST_STREAM {
                return (frame.stream, u32::from_be_bytes(frame.payload[..].try_into().expect("four bytes")));
            }
        }
    }

    fn frame(&mut self) -> Frame {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).expect("the server goes on");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).expect("a whole frame");
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Frame { kind: head[3], flags: head[4], stream, payload }
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        self.0.write_all(&[&head[..], payload].concat()).expect("open");
    }
}
