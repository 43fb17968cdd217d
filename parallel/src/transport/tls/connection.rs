//! A connection, plain or encrypted.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;

use super::Mismatch;
use crate::transport::socket::{Caller, Socket};

/// How a record of TLS begins that tells of an error or begins a handshake. HTTP/2 begins with `P` or a zero.
const TLS_BEGINS: [u8; 2] = [21, 22];

/// A connection, plain or encrypted. Its bytes are counted at the socket in both cases.
#[derive(Debug)]
pub enum Connection {
    /// Plain.
    Plain {
        /// The socket.
        socket: Socket,
        /// Whether the first bytes have come.
        begun: bool,
    },
    /// Encrypted.
    Tls(Box<TlsStream<Socket>>),
}

impl Connection {
    pub(in crate::transport) const fn plain(socket: Socket) -> Self {
        Self::Plain { socket, begun: false }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain { socket, begun: true } => Pin::new(socket).poll_read(context, into),
            Self::Plain { socket, begun } => {
                let before = into.filled().len();
                ready!(Pin::new(&mut *socket).poll_read(context, into))?;
                if let Some(first) = into.filled().get(before) {
                    if TLS_BEGINS.contains(first) {
                        return Poll::Ready(Err(socket.line().mismatched(Mismatch::Tls)));
                    }
                    *begun = true;
                }
                Poll::Ready(Ok(()))
            }
            Self::Tls(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain { socket, .. } => Pin::new(socket).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain { socket, .. } => Pin::new(socket).poll_write_vectored(context, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain { socket, .. } => socket.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain { socket, .. } => Pin::new(socket).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain { socket, .. } => Pin::new(socket).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        match self {
            Self::Plain { socket, .. } => socket.connect_info(),
            Self::Tls(stream) => stream.get_ref().0.connect_info(),
        }
    }
}
