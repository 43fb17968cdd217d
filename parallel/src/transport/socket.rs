//! Sockets that count, and a port that strangers cannot fill.
//!
//! [`Accepted`] is the stream of connections that a tonic server is given (`serve_with_incoming`). It bounds how many
//! there are at once, and how long one may stay that no service has let in: a scanner, a client of another protocol or
//! an idle connection goes away by itself, and its place is free again.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use tracing::warn;

use super::Counted;
use super::congestion::Congestion;
use super::tls::{self, Connection, Mismatch, Security};

/// What may wait unsent in the system's buffers: enough for 25 Gb/s while a thread wakes up, and 10 ms of 200 Mb/s for what
/// comes after it.
#[cfg(any(target_os = "android", target_os = "linux"))]
const UNSENT_BYTES_MAX: u32 = 256 << 10;
/// After an accept that failed (no file descriptors left, say), and between two warnings of the same kind.
const PAUSE: Duration = Duration::from_millis(200);

/// Bytes at all sockets that were given a clone of it.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Sums>);

#[derive(Debug, Default)]
struct Sums {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// So far.
    #[must_use]
    pub fn counted(&self) -> Counted {
        Counted { sent: self.0.sent.load(Relaxed), received: self.0.received.load(Relaxed) }
    }
}

/// What is known of one connection, for as long as anyone asks.
#[derive(Debug, Default)]
pub struct Line {
    admitted: AtomicBool,
    ended: OnceLock<String>,
    mismatch: OnceLock<Mismatch>,
}

impl Line {
    /// Lets the connection stay: a service has seen a call on it that it trusts.
    pub fn admit(&self) {
        self.admitted.store(true, Relaxed);
    }

    /// How the connection ended, in plain words, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }

    /// What is wrong with the other side, if that is why the connection ended.
    #[must_use]
    pub fn mismatch(&self) -> Option<Mismatch> {
        self.mismatch.get().copied()
    }

    /// Ends the connection, because the other side does not fit.
    pub(super) fn mismatched(&self, mismatch: Mismatch) -> io::Error {
        let _ = self.mismatch.set(mismatch);
        self.end(mismatch.to_string());
        io::Error::other(mismatch)
    }

    fn end(&self, why: impl Into<String>) {
        // The first thing that was seen is the cause.
        let _ = self.ended.set(why.into());
    }
}

/// Who is at the other end: a service finds it in the extensions of its requests.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its address.
    pub address: SocketAddr,
    /// The connection.
    pub line: Arc<Line>,
}

/// Lets the connection of a request stay; to be called by a service once it trusts its caller. Without it the
/// connection ends after [`Limits::admitted_within`].
pub fn admit<T>(request: &tonic::Request<T>) {
    if let Some(caller) = request.extensions().get::<Caller>() {
        caller.line.admit();
    }
}

/// The error's kind in plain words, without numbers of the system.
#[must_use]
pub fn words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::Other => error.to_string(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => "connection closed".into(),
        kind => kind.to_string(),
    }
}

/// What a connection may do before a service has let it in.
#[derive(Debug)]
struct Probation {
    over: Pin<Box<Sleep>>,
    bytes_left: u64,
    warnings: Arc<Seldom>,
}

/// At most one warning in each [`PAUSE`], so that nobody fills the log from outside.
#[derive(Debug, Default)]
pub(super) struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    pub(super) fn warn(&self, text: &str) {
        let now = Instant::now();
        let mut warned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|before| now - before >= PAUSE) {
            *warned = Some(now);
            warn!("{text}");
        }
    }
}

/// A TCP connection whose bytes are counted where they enter and leave the process.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    address: SocketAddr,
    counters: Counters,
    line: Arc<Line>,
    probation: Option<Probation>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Socket {
    /// Connects, without delay for small packets. `line` is told how the connection ended.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub async fn connect(
        address: impl ToSocketAddrs,
        counters: Counters,
        line: Arc<Line>,
        congestion: &Congestion,
    ) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        congestion.set(&stream)?;
        // Elsewhere the system's buffers are as long as it likes: a message that should go first goes later.
        #[cfg(any(target_os = "android", target_os = "linux"))]
        socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
        // There is none any more where the other side was quicker.
        let address = stream.peer_addr().map_err(|_| io::ErrorKind::ConnectionReset)?;
        Ok(Self { stream, address, counters, line, probation: None, _place: None })
    }

    /// What is known of it.
    pub(super) const fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// Fails once the time is over in which a service had to let the connection in, or all is read that it may send before.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(probation) = &mut self.probation else { return Ok(()) };
        if self.line.admitted.load(Relaxed) {
            self.probation = None;
            return Ok(());
        }
        let (why, kind) = if probation.over.as_mut().poll(context).is_ready() {
            ("no service let it in", io::ErrorKind::TimedOut)
        } else if probation.bytes_left == 0 {
            ("it sent too much before a service let it in", io::ErrorKind::ConnectionAborted)
        } else {
            return Ok(());
        };
        probation.warnings.warn(&format!("closed the connection from {}: {why}", self.address));
        self.line.end(why);
        Err(kind.into())
    }

    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| self.line.end(words(error)))
    }

    fn wrote(&self, result: io::Result<usize>) -> io::Result<usize> {
        let count = self.noted(result)?;
        self.counters.0.sent.fetch_add(count as u64, Relaxed);
        Ok(count)
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        let before = into.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, into));
        self.noted(result)?;
        let count = into.filled().len() - before;
        if count == 0 && into.remaining() > 0 {
            self.line.end("connection closed");
        }
        self.counters.0.received.fetch_add(count as u64, Relaxed);
        if let Some(probation) = &mut self.probation {
            probation.bytes_left = probation.bytes_left.saturating_sub(count as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(context)?;
        let result = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        Poll::Ready(self.wrote(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        let result = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices));
        Poll::Ready(self.wrote(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for Socket {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller { address: self.address, line: self.line.clone() }
    }
}

/// What a port grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; any further one is closed as soon as it comes.
    pub connections_max: usize,
    /// How long a connection may stay before a service has let it in ([`admit`]).
    pub admitted_within: Duration,
    /// Bytes that it may send before that.
    pub unadmitted_bytes_max: u64,
}

/// The connections that come in at a port, for `serve_with_incoming`. Handshakes run beside each other; each has a place
/// and the time of a connection that no service has let in, so their number and their length are bounded.
#[derive(Debug)]
pub struct Accepted {
    listener: TcpListener,
    counters: Counters,
    limits: Limits,
    security: Security,
    places: Arc<Semaphore>,
    handshakes: JoinSet<(SocketAddr, io::Result<Connection>)>,
    pause: Option<Pin<Box<Sleep>>>,
    warnings: Arc<Seldom>,
}

impl Accepted {
    /// Takes connections from the listener, within these limits.
    #[must_use]
    pub fn new(listener: TcpListener, limits: Limits, counters: Counters, security: Security) -> Self {
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let handshakes = JoinSet::new();
        Self { listener, counters, limits, security, places, handshakes, pause: None, warnings: Arc::default() }
    }

    /// A connection whose handshake is over, if there is one.
    fn shaken(&mut self, context: &mut Context<'_>) -> Option<Connection> {
        loop {
            match self.handshakes.poll_join_next(context) {
                Poll::Ready(Some(Ok((_, Ok(connection))))) => return Some(connection),
                Poll::Ready(Some(Ok((address, Err(error))))) => {
                    if let Some(why) = tls::telling(&error) {
                        self.warnings.warn(&format!("closed the connection from {address}: {why}"));
                    }
                }
                Poll::Ready(Some(Err(error))) => self.warnings.warn(&format!("a handshake broke off: {error}")),
                Poll::Ready(None) | Poll::Pending => return None,
            }
        }
    }

    fn enter(&mut self, stream: TcpStream, address: SocketAddr) -> Option<Socket> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            self.warnings
                .warn(&format!("closed the connection from {address}: {} are open", self.limits.connections_max));
            return None;
        };
        stream.set_nodelay(true).ok()?;
        Some(Socket {
            stream,
            address,
            counters: self.counters.clone(),
            line: Arc::default(),
            probation: Some(Probation {
                over: Box::pin(sleep(self.limits.admitted_within)),
                bytes_left: self.limits.unadmitted_bytes_max,
                warnings: self.warnings.clone(),
            }),
            _place: Some(place),
        })
    }
}

impl Stream for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(connection) = self.shaken(context) {
                return Poll::Ready(Some(Ok(connection)));
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(context)) {
                Ok((stream, address)) => {
                    let Some(socket) = self.enter(stream, address) else { continue };
                    let Security::Tls(keys) = &self.security else {
                        return Poll::Ready(Some(Ok(Connection::plain(socket))));
                    };
                    let keys = keys.clone();
                    self.handshakes.spawn(async move { (address, tls::accept(keys, socket).await) });
                }
                Err(error) => {
                    self.warnings.warn(&format!("could not accept a connection: {error}"));
                    self.pause = Some(Box::pin(sleep(PAUSE)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
