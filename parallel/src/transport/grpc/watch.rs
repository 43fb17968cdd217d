//! What became of the other ranks: first until all are connected, then for as long as the transport lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, sleep, timeout_at};

use super::outbound::{Caller, LET_IN, Queued};
use super::{Group, TransportError};
use crate::transport::{Incoming, Sink};

/// Before a rank whose call broke is called again.
const PAUSE: Duration = Duration::from_millis(50);

/// What happened to a stream. The queue of events needs no bound: a rank has one stream each way, and what else there
/// is comes from tries with a pause between them.
pub(super) enum Event {
    /// A try to reach the rank failed; there will be another one.
    Trouble { rank: usize, why: String },
    /// Our call to the rank has begun, and this is what it sends.
    Reached { rank: usize, queue: UnboundedSender<Queued> },
    /// The rank's call was let in.
    Arrived { rank: usize },
    /// The rank says that it has let our call in.
    LetIn { rank: usize },
    /// The rank said goodbye.
    Goodbye { rank: usize },
    /// The rank's call to us is over.
    StreamEnded { rank: usize, why: String },
    /// Our call to the rank ended other than by our goodbye.
    CallFailed { rank: usize, why: String, refused: bool },
}

/// How each rank stands.
pub(super) struct Standing(Vec<Stand>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stand {
    Here,
    /// It said goodbye, or its loss was told: what still happens to its streams is no news.
    Gone,
}

impl Standing {
    fn new(ranks: usize) -> Self {
        Self(vec![Stand::Here; ranks])
    }

    /// The rank that an event means the loss of, and why. Once a rank.
    fn lost(&mut self, event: Event) -> Option<(usize, String)> {
        let (rank, why) = match event {
            Event::Trouble { .. } | Event::Reached { .. } | Event::Arrived { .. } | Event::LetIn { .. } => return None,
            Event::Goodbye { rank } => {
                self.0[rank] = Stand::Gone;
                return None;
            }
            Event::StreamEnded { rank, why } => (rank, format!("its stream to us ended: {why}")),
            Event::CallFailed { rank, why, refused: true } => (rank, format!("it refused our stream: {why}")),
            Event::CallFailed { rank, why, refused: false } => (rank, format!("our stream to it broke: {why}")),
        };
        let before = std::mem::replace(&mut self.0[rank], Stand::Gone);
        (before == Stand::Here).then_some((rank, why))
    }
}

/// Until all ranks are connected.
pub(super) struct Connecting<'a> {
    pub(super) group: &'a Group,
    pub(super) deadline: Instant,
}

/// All ranks are connected.
pub(super) struct Connected {
    pub(super) standing: Standing,
    pub(super) happened: UnboundedReceiver<Event>,
    /// To each rank, but for this one.
    pub(super) queues: Vec<Option<UnboundedSender<Queued>>>,
    /// Ends when all calls have.
    pub(super) calls_ended: mpsc::Receiver<()>,
}

impl Connecting<'_> {
    /// Calls all other ranks and waits for their calls.
    pub(super) async fn run(
        &self,
        caller: Caller,
        mut happened: UnboundedReceiver<Event>,
    ) -> Result<Connected, TransportError> {
        let Group { rank: here, ref addresses, connect_within: within, .. } = *self.group;
        let others = || (0..addresses.len()).filter(|rank| *rank != here);
        let (alive, calls_ended) = mpsc::channel(1);
        let call = |to: usize, after: Duration| {
            let call = caller.clone().call(to, addresses[to], self.deadline, alive.clone());
            tokio::spawn(async move {
                sleep(after).await;
                call.await;
            });
        };
        others().for_each(|to| call(to, Duration::ZERO));
        let mut standing = Standing::new(addresses.len());
        let mut queues: Vec<_> = addresses.iter().map(|_| None).collect();
        let (mut arrived, mut let_in) = (vec![false; addresses.len()], vec![false; addresses.len()]);
        let mut trouble = vec![String::from("no answer"); addresses.len()];
        loop {
            // What was written to a connection proves nothing: the other side may have no place for it yet.
            let unreached = others().find(|rank| queues[*rank].is_none() || arrived[*rank] && !let_in[*rank]);
            let absent = others().find(|rank| !arrived[*rank]);
            if unreached.or(absent).is_none() {
                return Ok(Connected { standing, happened, queues, calls_ended });
            }
            let Ok(Some(event)) = timeout_at(self.deadline, happened.recv()).await else {
                return Err(match unreached {
                    Some(rank) => {
                        let why = std::mem::take(&mut trouble[rank]);
                        TransportError::Unreachable { rank, address: addresses[rank], within, why }
                    }
                    None => {
                        let rank = absent.expect("a rank is missing one way or the other");
                        TransportError::Absent { rank, address: addresses[rank], here, within }
                    }
                });
            };
            match event {
                Event::Trouble { rank, why } => trouble[rank] = why,
                Event::Reached { rank, queue } => {
                    if arrived[rank] {
                        say_let_in(&queue);
                    }
                    queues[rank] = Some(queue);
                }
                Event::Arrived { rank } => {
                    arrived[rank] = true;
                    queues[rank].iter().for_each(say_let_in);
                }
                Event::LetIn { rank } => let_in[rank] = true,
                Event::CallFailed { rank, why, refused: true } => {
                    return Err(TransportError::Refused { rank, address: addresses[rank], here, why });
                }
                // Nothing was sent yet, so it may be tried anew, unless the rank has come and gone.
                Event::CallFailed { rank, why, refused: false } if standing.0[rank] == Stand::Here => {
                    (queues[rank], trouble[rank]) = (None, why);
                    call(rank, PAUSE);
                }
                event => {
                    if let Some((rank, why)) = standing.lost(event) {
                        return Err(TransportError::Lost { rank, address: addresses[rank], why });
                    }
                }
            }
        }
    }
}

/// Tells a rank that its call was let in, before anything else.
fn say_let_in(queue: &UnboundedSender<Queued>) {
    // If the call to it has ended, there will be another one.
    let _ = queue.send(Queued { message: Bytes::from_static(LET_IN), since: None });
}

/// Tells losses, each rank's once, for as long as the runtime lives.
pub(super) async fn watch(
    mut standing: Standing,
    mut happened: UnboundedReceiver<Event>,
    lost: Arc<[AtomicBool]>,
    sink: Sink,
) {
    while let Some(event) = happened.recv().await {
        if let Some((rank, why)) = standing.lost(event) {
            lost[rank].store(true, Ordering::Relaxed);
            sink(Incoming::Lost { rank, why });
        }
    }
}
