//! The service that the other ranks call, and whom it lets in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::outbound::{EPOCH, LET_IN, RANK, TOKEN, VERSION, explain};
use super::watch::Event;
use super::{Group, MESSAGE_BYTES_MAX};
use crate::transport::raw::messages;
use crate::transport::raw::service::data_server::Data;
use crate::transport::socket::{Caller, Line, Seldom, admit};
use crate::transport::{Incoming, Sink};

/// The side that is called.
pub(super) struct Inbound {
    rank: usize,
    epoch: u32,
    token: blake3::Hash,
    /// Whether a rank has called. It may do so once.
    called: Vec<AtomicBool>,
    sink: Sink,
    events: UnboundedSender<Event>,
    warnings: Seldom,
}

impl Inbound {
    pub(super) fn new(group: &Group, sink: Sink, events: UnboundedSender<Event>) -> Self {
        Self {
            rank: group.rank,
            epoch: group.epoch,
            token: blake3::hash(group.token.as_bytes()),
            called: group.addresses.iter().map(|_| AtomicBool::new(false)).collect(),
            sink,
            events,
            warnings: Seldom::default(),
        }
    }

    /// The rank that a call comes from, if it may come in.
    fn admitted(&self, metadata: &MetadataMap) -> Result<usize, Status> {
        let text = |key| metadata.get(key).and_then(|value| value.to_str().ok());
        // The token goes first: who does not know it learns nothing else. Hashes compare in constant time.
        let token = metadata.get_bin(TOKEN).and_then(|value| value.to_bytes().ok());
        let token = token.and_then(|bytes| blake3::Hash::from_slice(&bytes).ok());
        if token != Some(self.token) {
            return Err(Status::unauthenticated("the token is not this run's"));
        }
        let version = text(VERSION).unwrap_or("none");
        if version != env!("CARGO_PKG_VERSION") {
            let here = env!("CARGO_PKG_VERSION");
            return Err(Status::failed_precondition(format!("version {version} calls, version {here} is here")));
        }
        let epoch = text(EPOCH).unwrap_or("none");
        if epoch.parse() != Ok(self.epoch) {
            let here = self.epoch;
            return Err(Status::failed_precondition(format!("epoch {epoch} calls, epoch {here} is here")));
        }
        let rank = text(RANK).unwrap_or("none");
        let ranks = self.called.len();
        let Some(rank) = rank.parse::<usize>().ok().filter(|rank| *rank < ranks && *rank != self.rank) else {
            let here = self.rank;
            return Err(Status::invalid_argument(format!(
                "rank {rank} calls rank {here}: expected another one below {ranks}"
            )));
        };
        if self.called[rank].swap(true, Ordering::Relaxed) {
            return Err(Status::already_exists(format!("rank {rank} has a stream to rank {} already", self.rank)));
        }
        Ok(rank)
    }
}

#[tonic::async_trait]
impl Data for Inbound {
    async fn stream(&self, request: Request<Streaming<Bytes>>) -> Result<Response<Bytes>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let from = match self.admitted(request.metadata()) {
            Ok(from) => from,
            Err(status) => {
                let address = caller.map_or_else(|| "nowhere".into(), |caller| caller.address.to_string());
                let (rank, why) = (self.rank, status.message());
                self.warnings.warn(&format!("rank {rank}: refused a stream from {address}: {why}"));
                return Err(status);
            }
        };
        admit(&request);
        let _ = self.events.send(Event::Arrived { rank: from });
        let line = caller.map(|caller| caller.line).unwrap_or_default();
        let mut end = End { from, why: None, line, events: self.events.clone() };
        let mut stream = messages(&request, MESSAGE_BYTES_MAX).expect("`connect` wraps the service in `Uncopied`");
        let mut is_first = true;
        loop {
            let message = stream.next().await;
            if std::mem::take(&mut is_first) && matches!(&message, Ok(Some(bytes)) if bytes == LET_IN) {
                let _ = self.events.send(Event::LetIn { rank: from });
                continue;
            }
            match message {
                Ok(Some(bytes)) if bytes.is_empty() => break,
                Ok(Some(bytes)) => (self.sink)(Incoming::Message { from, bytes }),
                Ok(None) => {
                    end.why = end.line.ended().is_none().then(|| "without a goodbye".into());
                    return Err(Status::aborted("the stream ended without a goodbye"));
                }
                Err(status) => {
                    end.why = Some(explain(&status, &end.line));
                    return Err(status);
                }
            }
        }
        // Before the answer: once the caller has it, it may go.
        let _ = self.events.send(Event::Goodbye { rank: from });
        match stream.next().await {
            Ok(Some(_)) => Err(Status::invalid_argument("a message after the goodbye")),
            Ok(None) | Err(_) => Ok(Response::new(Bytes::new())),
        }
    }
}

/// Tells the end of a stream when it is dropped: a call whose connection breaks is dropped, not answered.
struct End {
    from: usize,
    why: Option<String>,
    line: Arc<Line>,
    events: UnboundedSender<Event>,
}

impl Drop for End {
    fn drop(&mut self) {
        let why = self.why.take().or_else(|| self.line.ended().map(str::to_owned));
        let why = why.unwrap_or_else(|| "cancelled".into());
        let _ = self.events.send(Event::StreamEnded { rank: self.from, why });
    }
}
