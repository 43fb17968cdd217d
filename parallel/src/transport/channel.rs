//! Ranks in one process: the transport of tests. What is sent arrives at once, in the thread that sends it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::{Counted, Incoming, Sink, Transport};
use crate::frame::is_frame;

/// One rank's end of a [`network`].
pub struct ChannelTransport {
    rank: usize,
    sinks: Arc<Vec<Mutex<Option<Sink>>>>,
    sent: AtomicU64,
    received: Arc<Vec<AtomicU64>>,
}

impl fmt::Debug for ChannelTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelTransport").field("rank", &self.rank).finish_non_exhaustive()
    }
}

/// A network of so many ranks; each is [opened](ChannelTransport::open) before the first message goes to it.
#[must_use]
pub fn network(ranks: usize) -> Vec<ChannelTransport> {
    let sinks = Arc::new((0..ranks).map(|_| Mutex::new(None)).collect::<Vec<_>>());
    let received = Arc::new((0..ranks).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    let end =
        |rank| ChannelTransport { rank, sinks: sinks.clone(), sent: AtomicU64::new(0), received: received.clone() };
    (0..ranks).map(end).collect()
}

impl ChannelTransport {
    /// Says where this rank's messages go.
    pub fn open(&self, sink: Sink) {
        *lock(&self.sinks[self.rank]) = Some(sink);
    }
}

impl Transport for ChannelTransport {
    fn send(&self, to: usize, bytes: Bytes) {
        let count = bytes.len() as u64;
        let sink = lock(&self.sinks[to]).clone();
        if let Some(sink) = sink {
            self.sent.fetch_add(count, Ordering::Relaxed);
            self.received[to].fetch_add(count, Ordering::Relaxed);
            let is_frame = is_frame(&bytes);
            sink(Incoming::Message { from: self.rank, bytes });
            let own = lock(&self.sinks[self.rank]).clone().filter(|_| is_frame);
            if let Some(own) = own {
                own(Incoming::Left { to });
            }
        }
    }

    fn counted(&self) -> Counted {
        let received = self.received[self.rank].load(Ordering::Relaxed);
        Counted { sent: self.sent.load(Ordering::Relaxed), received }
    }

    fn close(&self, _within: Duration) {
        *lock(&self.sinks[self.rank]) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
