//! The way to the other ranks.
//!
//! - [`channel`]: ranks in one process, for tests; [`simulated`]: the same on a network with delays and faults.
//! - [`grpc`]: ranks in other processes, over gRPC streams.
//! - [`raw`]: gRPC messages that are plain bytes; [`socket`]: sockets that count; [`tls`]: who may connect; [`congestion`]: what
//!   paces what is sent.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

pub mod channel;
pub mod congestion;
pub mod grpc;
#[cfg(test)]
pub(crate) mod http2;
pub mod raw;
pub mod simulated;
pub mod socket;
pub mod tls;

/// What comes in from another rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A message, as it was sent. Messages of one rank come in the order in which it sent them.
    Message {
        /// Who sent it.
        from: usize,
        /// All of it.
        bytes: Bytes,
    },
    /// A frame of gradients to this rank has left the queue of [`Transport::send`]. Other messages are not told.
    Left {
        /// Where it goes.
        to: usize,
    },
    /// What came from this rank cannot be used, as whoever read it says.
    Unreadable {
        /// Who sent it.
        from: usize,
        /// What is wrong with it.
        what: String,
    },
    /// Nothing more will come from this rank, or nothing more can be sent to it. Told once a rank.
    Lost {
        /// Which rank.
        rank: usize,
        /// What was seen of it.
        why: String,
    },
}

/// A rank is gone, as a rank tells it that needed it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("step {step}: rank {rank} is lost: {why}{}", .waited.as_ref().map_or_else(String::new, |what| format!("; this rank waited for {what}")))]
pub struct Loss {
    /// Which rank.
    pub rank: usize,
    /// The step that was running here; 0 before the first.
    pub step: u64,
    /// What was seen.
    pub why: String,
    /// What this rank waited for, if it did.
    pub waited: Option<String>,
}

/// Where incoming messages go. It must not block.
pub type Sink = Arc<dyn Fn(Incoming) + Send + Sync>;

/// Bytes at the sockets since the transport began, everything that the network's protocols add included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Written.
    pub sent: u64,
    /// Read.
    pub received: u64,
}

/// The way to the other ranks.
pub trait Transport: Send + Sync + Debug {
    /// Queues a message for rank `to` and returns at once. What waits is bounded by whoever sends: when a frame of gradients
    /// leaves, [`Incoming::Left`] says so.
    /// A message to a rank that is lost is dropped: its loss was told.
    fn send(&self, to: usize, message: Bytes);

    /// Bytes so far.
    fn counted(&self) -> Counted;

    /// Waits until everything queued has left, at most so long, and ends all connections in good order: the peers see
    /// an end, not a loss, if they have closed too.
    fn close(&self, within: Duration);
}
