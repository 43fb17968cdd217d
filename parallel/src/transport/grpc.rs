//! Ranks in other processes: one gRPC stream a peer and direction.
//!
//! A rank listens on one port and calls every other rank once. It pushes its messages on its own calls and takes the
//! others' messages from their calls. An empty message is the goodbye: the end of the stream after it is no loss.
//!
//! - `inbound`: the service that the others call, and whom it lets in.
//! - `outbound`: our calls to the others; `connection`: what they go over.
//! - `error`: why there is no transport.
//! - `watch`: what all that means: connected, lost, or gone in good order.
//!
//! Measured on loopback, HTTP/2's frame size matters far more than its windows, and then copies and the allocator do;
//! `examples/transport_bandwidth.rs` measures.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::time::{Instant, timeout};
use tonic::transport::Server;

pub use self::error::TransportError;
use self::outbound::Queued;
use self::watch::{Connecting, watch};
use super::congestion::Congestion;
use super::raw::Uncopied;
use super::raw::service::data_server::DataServer;
use super::socket::{Accepted, Counters, Limits};
use super::tls::Security;
use super::{Counted, Incoming, Sink, Transport};
use crate::trace::Trace;

mod connection;
mod error;
mod inbound;
mod outbound;
mod watch;

/// A message may have so many bytes, and not none.
pub const MESSAGE_BYTES_MAX: usize = (4 << 20) + (64 << 10);

/// The largest HTTP/2 frame that a rank takes: a message is one, and comes out of the socket's buffer uncut.
const FRAME_BYTES_MAX: u32 = 8 << 20;
/// What may be under way to a rank on one stream before it says that it has taken it.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// The same for a connection, which has one stream; the double, so that it is never the one that waits.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Calls at once on one connection. A peer makes one.
const CALLS_MAX: u32 = 4;
/// Connections at once beyond one a rank: room for strangers until they are sent away.
const STRANGERS_MAX: usize = 16;
/// What a connection may send before it is let in: a call without messages, and what HTTP/2 and TLS say beside it.
const UNADMITTED_BYTES_MAX: u64 = 64 << 10;
/// A connection has to show a call that is let in within so long.
const ADMITTED_WITHIN: Duration = Duration::from_secs(10);
/// How long the end of the runtime may take, whose tasks never block.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(1);

/// The ranks that talk to each other.
#[derive(Clone)]
pub struct Group {
    /// This rank.
    pub rank: usize,
    /// Where each rank listens, this one included.
    pub addresses: Vec<SocketAddr>,
    /// Changes whenever the group does; a call of another epoch is refused.
    pub epoch: u32,
    /// Known to the ranks of this run only. Its hash is sent.
    pub token: String,
    /// How long all ranks together may take to be connected.
    pub connect_within: Duration,
    /// What keeps strangers out.
    pub security: Security,
    /// What paces what this rank sends.
    pub congestion: Congestion,
}

/// Without the token.
impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("rank", &self.rank)
            .field("addresses", &self.addresses)
            .field("epoch", &self.epoch)
            .field("security", &self.security)
            .field("congestion", &self.congestion)
            .finish_non_exhaustive()
    }
}

/// A port that is ours, before anyone knows the other ranks. Who calls already waits in the system's queue.
#[derive(Debug)]
pub struct Listener {
    listener: std::net::TcpListener,
    address: SocketAddr,
    /// [`ADMITTED_WITHIN`], but in the tests, which do not want to wait for it.
    admitted_within: Duration,
    trace: Option<Arc<Trace>>,
}

impl Listener {
    /// Listens; port 0 lets the system choose one. Whether an address beyond loopback is acceptable is the caller's
    /// business.
    ///
    /// # Errors
    ///
    /// When the port is taken, or the address is not of this host.
    pub fn bind(address: IpAddr, port: u16) -> Result<Self, TransportError> {
        let address = SocketAddr::new(address, port);
        let bind = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok(Self { listener, address, admitted_within: ADMITTED_WITHIN, trace: None })
        };
        bind().map_err(|source| TransportError::Bind { address, source })
    }

    /// Records what is sent, if that is wanted.
    #[must_use]
    pub fn traced(self, trace: Option<Arc<Trace>>) -> Self {
        Self { trace, ..self }
    }

    /// The address with the port that the system chose.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Calls every other rank and waits until every other rank has called. The sink may get messages before this
    /// returns: a faster rank may be at its first step already. Blocks; not for asynchronous threads.
    ///
    /// # Errors
    ///
    /// Names the rank that could not be reached, did not call, refused us or was lost. The sink is not told of that.
    pub fn connect(self, group: &Group, sink: Sink) -> Result<GrpcTransport, TransportError> {
        let (rank, ranks) = (group.rank, group.addresses.len());
        if rank >= ranks {
            return Err(TransportError::Rank { rank, ranks });
        }
        let deadline = Instant::now() + group.connect_within;
        let threads = std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 4);
        let runtime =
            Builder::new_multi_thread().worker_threads(threads).thread_name("transport").enable_all().build()?;
        let counters = Counters::default();
        let peers: Arc<[Peer]> = (0..ranks).map(|_| Peer::default()).collect();
        let sink = counting(sink, peers.clone());
        let (events, happened) = mpsc::unbounded_channel();
        let entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        drop(entered);
        let limits = Limits {
            connections_max: ranks + STRANGERS_MAX,
            admitted_within: self.admitted_within,
            unadmitted_bytes_max: UNADMITTED_BYTES_MAX,
        };
        let accepted = Accepted::new(listener, limits, counters.clone(), group.security.clone());
        let service = Uncopied(DataServer::new(inbound::Inbound::new(group, sink.clone(), events.clone())));
        let server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_concurrent_streams(CALLS_MAX)
            .add_service(service);
        runtime.spawn(async move {
            if let Err(error) = server.serve_with_incoming(accepted).await {
                tracing::error!("the server of the data plane stopped: {error}");
            }
        });
        let caller = outbound::Caller::new(group, counters.clone(), events, sink.clone(), self.trace.clone());
        let connecting = Connecting { group, deadline };
        match runtime.block_on(connecting.run(caller, happened)) {
            Ok(connected) => {
                let lost: Arc<[AtomicBool]> = (0..ranks).map(|_| AtomicBool::new(false)).collect();
                runtime.spawn(watch(connected.standing, connected.happened, lost.clone(), sink));
                let running = Mutex::new(Some(Running { runtime, calls_ended: connected.calls_ended }));
                let traces = self.trace.is_some();
                Ok(GrpcTransport { rank, queues: connected.queues, lost, counters, running, traces, peers })
            }
            Err(error) => {
                stop(runtime, SHUTDOWN_WITHIN);
                Err(error)
            }
        }
    }
}

/// The way to the other ranks over gRPC. See [`Listener::connect`].
///
/// Dropping it without [`close`](Transport::close) breaks the connections: the peers see a loss. Sockets and port are
/// free when the drop returns (in an asynchronous context, which may not wait, a little later).
pub struct GrpcTransport {
    rank: usize,
    queues: Vec<Option<UnboundedSender<Queued>>>,
    lost: Arc<[AtomicBool]>,
    counters: Counters,
    traces: bool,
    peers: Arc<[Peer]>,
    running: Mutex<Option<Running>>,
}

/// Bytes of messages to and from one rank.
#[derive(Debug, Default)]
struct Peer {
    sent: AtomicU64,
    received: AtomicU64,
}

struct Running {
    runtime: Runtime,
    /// Nothing is ever sent: it ends when the last call has.
    calls_ended: mpsc::Receiver<()>,
}

impl fmt::Debug for GrpcTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrpcTransport").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl GrpcTransport {
    /// Bytes of messages to and from each rank so far, without what the network's protocols add.
    #[must_use]
    pub fn counted_by_rank(&self) -> Vec<Counted> {
        let counted = |peer: &Peer| Counted {
            sent: peer.sent.load(Ordering::Relaxed),
            received: peer.received.load(Ordering::Relaxed),
        };
        self.peers.iter().map(counted).collect()
    }
}

/// The same sink, which counts what comes in from each rank.
fn counting(sink: Sink, peers: Arc<[Peer]>) -> Sink {
    Arc::new(move |incoming| {
        if let Incoming::Message { from, bytes } = &incoming {
            peers[*from].received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        sink(incoming);
    })
}

impl Transport for GrpcTransport {
    /// # Panics
    ///
    /// When the message is empty or longer than [`MESSAGE_BYTES_MAX`], or goes to this rank or to none.
    fn send(&self, to: usize, message: Bytes) {
        assert!(!message.is_empty(), "an empty message is the goodbye, which only `close` says");
        assert!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes: cut it before", message.len());
        let queue = self.queues[to].as_ref().expect("a rank sends nothing to itself");
        if !self.lost[to].load(Ordering::Relaxed) {
            self.peers[to].sent.fetch_add(message.len() as u64, Ordering::Relaxed);
            // It fails when the call has ended; the loss is told, or the peer has said goodbye.
            let _ = queue.send(Queued { message, since: self.traces.then(Instant::now) });
        }
    }

    /// A stranger's bytes are counted as well until it is sent away.
    fn counted(&self) -> Counted {
        self.counters.counted()
    }

    /// The peers' answers are awaited, so what was queued has been taken by them, not only by the system. Blocks; not
    /// for asynchronous threads. A message sent from now on is dropped.
    fn close(&self, within: Duration) {
        let deadline = std::time::Instant::now() + within;
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Running { runtime, mut calls_ended }) = running else { return };
        for queue in self.queues.iter().flatten() {
            let _ = queue.send(Queued { message: Bytes::new(), since: None });
        }
        if runtime.block_on(async { timeout(within, calls_ended.recv()).await }).is_err() {
            tracing::warn!("rank {}: not all ranks took its last messages within {within:?}", self.rank);
        }
        stop(runtime, deadline.saturating_duration_since(std::time::Instant::now()).max(SHUTDOWN_WITHIN));
    }
}

impl Drop for GrpcTransport {
    fn drop(&mut self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Running { runtime, .. }) = running {
            stop(runtime, SHUTDOWN_WITHIN);
        }
    }
}

/// Ends all tasks and with them the sockets. Waits for the threads, which are in the midst of one poll at most, unless
/// that is forbidden here.
fn stop(runtime: Runtime, within: Duration) {
    match Handle::try_current() {
        Ok(_) => runtime.shutdown_background(),
        Err(_) => runtime.shutdown_timeout(within),
    }
}

#[cfg(test)]
mod tests;
