//! Our calls to the other ranks.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::Stream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

use super::Group;
use super::connection::Connection;
use super::watch::Event;
use crate::frame::is_frame;
use crate::trace::{Label, Trace, Track};
use crate::transport::congestion::Congestion;
use crate::transport::socket::{Counters, Line, words};
use crate::transport::tls::{Mismatch, Security};
use crate::transport::{Incoming, Sink};

/// Who calls: the rank, in decimal.
pub(super) const RANK: &str = "tributary-rank";
/// The epoch of its group, in decimal.
pub(super) const EPOCH: &str = "tributary-epoch";
/// The BLAKE3 hash of the run's token.
pub(super) const TOKEN: &str = "tributary-token-bin";
/// The version of this crate.
pub(super) const VERSION: &str = "tributary-version";

/// The first message of every stream: the call of the rank at its other end has been let in. Whoever has called does not know of
/// it otherwise, for its call is answered at the end.
pub(super) const LET_IN: &[u8] = b"TRIA";

/// Between two tries to reach a rank.
const PAUSE: Duration = Duration::from_millis(50);

/// The side that calls.
#[derive(Clone)]
pub(super) struct Caller {
    rank: usize,
    epoch: u32,
    token: blake3::Hash,
    counters: Counters,
    security: Security,
    congestion: Congestion,
    events: UnboundedSender<Event>,
    sink: Sink,
    trace: Option<Arc<Trace>>,
}

impl Caller {
    pub(super) fn new(
        group: &Group,
        counters: Counters,
        events: UnboundedSender<Event>,
        sink: Sink,
        trace: Option<Arc<Trace>>,
    ) -> Self {
        let token = blake3::hash(group.token.as_bytes());
        let Group { rank, epoch, security, congestion, .. } = group.clone();
        Self { rank, epoch, token, counters, security, congestion, events, sink, trace }
    }

    /// Reaches rank `to`, trying until `deadline`, and then pushes what is put in the queue that it reports until the
    /// goodbye. Reports how it went; `_alive` is held until all is over.
    pub(super) async fn call(self, to: usize, address: SocketAddr, deadline: Instant, _alive: mpsc::Sender<()>) {
        let Some((connection, line)) = self.reach(to, address, deadline).await else { return };
        let (queue, outbox) = outbox(to, self.sink, self.trace);
        let _ = self.events.send(Event::Reached { rank: to, queue });
        // Without messages of its own: the connection has them.
        let mut request = Request::new(tokio_stream::empty());
        let metadata = request.metadata_mut();
        metadata.insert(RANK, self.rank.into());
        metadata.insert(EPOCH, self.epoch.into());
        metadata.insert(VERSION, MetadataValue::from_static(env!("CARGO_PKG_VERSION")));
        metadata.insert_bin(TOKEN, MetadataValue::from_bytes(self.token.as_bytes()));
        if let Err(status) = connection.client(outbox).stream(request).await {
            // The codes with which `inbound` refuses, and with which another service does.
            use Code::{AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated, Unimplemented};
            let refusals = [AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated, Unimplemented];
            let refused = refusals.contains(&status.code()) || line.mismatch().is_some_and(Mismatch::is_final);
            let why = explain(&status, &line);
            let _ = self.events.send(Event::CallFailed { rank: to, why, refused });
        }
    }

    /// A connection and what is known of it.
    async fn reach(&self, to: usize, address: SocketAddr, deadline: Instant) -> Option<(Connection, Arc<Line>)> {
        loop {
            let line = Arc::<Line>::default();
            let connect = async {
                let io = self.security.connect(address, self.counters.clone(), line.clone(), &self.congestion).await?;
                Connection::over(io).await
            };
            match timeout_at(deadline, connect).await {
                Err(_) => return None,
                Ok(Ok(connection)) => return Some((connection, line)),
                Ok(Err(error)) => {
                    let (why, refused) = (root(&*error), line.mismatch().is_some_and(Mismatch::is_final));
                    if refused {
                        let _ = self.events.send(Event::CallFailed { rank: to, why, refused });
                        return None;
                    }
                    let _ = self.events.send(Event::Trouble { rank: to, why });
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

/// A message in a queue, with when it was put there, where that is recorded.
pub(super) struct Queued {
    pub(super) message: Bytes,
    pub(super) since: Option<Instant>,
}

/// A queue for one rank, and what empties it. `sink` is told when a frame of gradients leaves; `trace` is where that is
/// recorded.
pub(super) fn outbox(to: usize, sink: Sink, trace: Option<Arc<Trace>>) -> (UnboundedSender<Queued>, Outbox) {
    let (queue, waiting) = mpsc::unbounded_channel();
    (queue, Outbox { to, waiting, ended: false, sink, trace })
}

/// What waits for one rank, as the body of the call to it. It ends behind the goodbye.
pub(super) struct Outbox {
    to: usize,
    waiting: UnboundedReceiver<Queued>,
    ended: bool,
    sink: Sink,
    trace: Option<Arc<Trace>>,
}

impl Stream for Outbox {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let queued = ready!(self.waiting.poll_recv(context));
        if let (Some(trace), Some(Queued { message, since: Some(since) })) = (&self.trace, &queued) {
            trace.queued(Track::Send(self.to), (*since).into(), Label::of("send", message));
        }
        let message = queued.map(|queued| queued.message);
        if message.as_deref().is_some_and(is_frame) {
            (self.sink)(Incoming::Left { to: self.to });
        }
        self.ended = message.as_ref().is_none_or(Bytes::is_empty);
        if self.ended {
            // What is sent after the goodbye fails at once and does not pile up.
            self.waiting.close();
        }
        Poll::Ready(message)
    }
}

/// What ended a call, in plain words: what the peer said, or else what the socket saw.
pub(super) fn explain(status: &Status, line: &Line) -> String {
    match status.code() {
        // Here tonic puts into words what HTTP/2 says of a connection that broke; the socket knows better.
        Code::Unknown | Code::Internal | Code::Unavailable | Code::Cancelled => match (line.ended(), status.source()) {
            (Some(why), _) => why.to_owned(),
            (None, Some(source)) => root(source),
            (None, None) => status.message().to_owned(),
        },
        _ => status.message().to_owned(),
    }
}

/// The innermost cause.
fn root(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.downcast_ref::<io::Error>().map_or_else(|| error.to_string(), words)
}
