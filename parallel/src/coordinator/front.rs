//! The gRPC service of the coordinator: one task a connection, which turns messages into inputs, and lines on which
//! outputs go back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender as StdSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::state::{Ending, Input, Output};
use super::{Compare, HELLO_WITHIN};
use crate::transport::socket::Caller;
use crate::wire::control::coordinator_server::Coordinator as Service;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{FromWorker, Hello, ToWorker};

/// The largest recipe of a worker that is compared.
const RECIPE_BYTES_MAX: usize = 1 << 20;

/// Messages that wait for one worker. Most are heartbeats: they last until it is found silent.
const LINE_MAX: usize = 256;

/// The connections that have greeted, by their numbers.
#[derive(Clone, Default)]
pub(super) struct Lines(Arc<Mutex<HashMap<u64, Line>>>);

type Outgoing = mpsc::Sender<Result<ToWorker, Status>>;

struct Line {
    out: Outgoing,
    caller: Option<Caller>,
    /// Its end tells the connection's task that the coordinator has closed the line.
    _open: oneshot::Sender<()>,
}

impl Lines {
    /// Ends all connections once everything sent has left.
    pub(super) fn close(&self) {
        self.lock().clear();
    }

    fn send(&self, connection: u64, what: To) {
        let mut lines = self.lock();
        // A worker that is gone hears nothing; its end is an input of its own.
        let Some(line) = lines.get(&connection) else { return };
        if let (To::Welcome(_), Some(caller)) = (&what, &line.caller) {
            caller.line.admit();
        }
        let heartbeat = matches!(what, To::Beat(_));
        if let Err(TrySendError::Full(_)) = line.out.try_send(Ok(ToWorker { what: Some(what) }))
            && !heartbeat
        {
            // It cannot do without this one.
            lines.remove(&connection);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what the state decided.
pub(super) fn carry(lines: &Lines, tell: &StdSender<Ending>, output: Output) {
    match output {
        Output::Send { connection, what } => lines.send(connection, what),
        Output::Close { connection } => _ = lines.lock().remove(&connection),
        Output::End(ending) => {
            // Whoever started the coordinator may have gone.
            let _ = tell.send(ending);
        }
    }
}

/// The gRPC service.
pub(super) struct Front {
    desk: Desk,
    next: AtomicU64,
}

/// What the task of a connection works with.
#[derive(Clone)]
struct Desk {
    lines: Lines,
    inputs: mpsc::Sender<Input>,
    compare: Compare,
}

impl Front {
    pub(super) fn new(lines: Lines, inputs: mpsc::Sender<Input>, compare: Compare) -> Self {
        Self { desk: Desk { lines, inputs, compare }, next: AtomicU64::new(1) }
    }
}

#[tonic::async_trait]
impl Service for Front {
    type JoinStream = ReceiverStream<Result<ToWorker, Status>>;

    async fn join(&self, request: Request<Streaming<FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let messages = request.into_inner();
        let connection = self.next.fetch_add(1, Ordering::Relaxed);
        let (out, outgoing) = mpsc::channel(LINE_MAX);
        let desk = self.desk.clone();
        tokio::spawn(async move { desk.attend(connection, messages, out, caller).await });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

impl Desk {
    /// Carries what one connection says, from its greeting to its end.
    async fn attend(self, connection: u64, mut messages: Streaming<FromWorker>, out: Outgoing, caller: Option<Caller>) {
        let hello = match greeting(&mut messages).await {
            Ok(hello) => hello,
            Err(status) => {
                // Whoever it was may have gone.
                let _ = out.try_send(Err(status));
                return;
            }
        };
        // Beside the coordinator's thread, whose clock must go on.
        let (compare, recipe) = (self.compare.clone(), hello.recipe.clone().unwrap_or_default());
        let differences = match recipe.len() {
            0 => Vec::new(),
            1..=RECIPE_BYTES_MAX => tokio::task::spawn_blocking(move || compare(&recipe)).await.unwrap_or_else(|_| {
                vec!["it cannot be compared: that is a fault of the coordinator; please report this".to_owned()]
            }),
            large => vec![format!("it has {large} bytes, at most {RECIPE_BYTES_MAX} are read")],
        };
        let (open, mut closed) = oneshot::channel();
        self.lines.lock().insert(connection, Line { out, caller: caller.clone(), _open: open });
        let mut input = Input::Hello { connection, hello, differences };
        let how = loop {
            if self.inputs.send(input).await.is_err() {
                break "the coordinator has ended".to_owned();
            }
            let message = tokio::select! {
                message = messages.next() => message,
                _ = &mut closed => break "it did not take what it was sent".into(),
            };
            input = match message {
                Some(Ok(FromWorker { what: Some(what) })) => Input::Message { connection, what },
                Some(Ok(FromWorker { what: None })) => {
                    break "it sent a message that this version does not know".into();
                }
                Some(Err(status)) => break broken(&status, caller.as_ref()),
                None => break "it closed its connection without a word".into(),
            };
        };
        self.lines.lock().remove(&connection);
        // After the end nobody listens.
        let _ = self.inputs.send(Input::Closed { connection, how }).await;
    }
}

async fn greeting(messages: &mut Streaming<FromWorker>) -> Result<Hello, Status> {
    let first = tokio::time::timeout(HELLO_WITHIN, messages.next());
    match first.await {
        Ok(Some(Ok(FromWorker { what: Some(From::Hello(hello)) }))) => Ok(hello),
        Ok(_) => {
            Err(Status::failed_precondition("expected a worker's greeting first: run the same build on every machine"))
        }
        Err(_) => {
            let seconds = HELLO_WITHIN.as_secs();
            Err(Status::deadline_exceeded(format!("expected a worker's greeting within {seconds} s, none came")))
        }
    }
}

/// How a connection broke, as the socket saw it.
fn broken(status: &Status, caller: Option<&Caller>) -> String {
    let how = caller.and_then(|caller| caller.line.ended()).unwrap_or_else(|| status.message());
    format!("its connection broke ({how})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{Beat, Stop};

    #[test]
    fn a_worker_that_takes_nothing_fills_nothing() {
        let lines = Lines::default();
        let (out, mut outgoing) = mpsc::channel(LINE_MAX);
        let (open, mut closed) = oneshot::channel();
        lines.lock().insert(1, Line { out, caller: None, _open: open });
        for _ in 0..10 * LINE_MAX {
            lines.send(1, To::Beat(Beat {}));
        }
        assert_eq!((outgoing.len(), closed.try_recv()), (LINE_MAX, Err(oneshot::error::TryRecvError::Empty)));
        // There is room again: heartbeats that were left out are no loss.
        outgoing.try_recv().expect("full").expect("no status");
        lines.send(1, To::Stop(Stop {}));
        assert_eq!(closed.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        // It may not miss this one: its connection ends.
        lines.send(1, To::Stop(Stop {}));
        assert_eq!(closed.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        lines.send(1, To::Beat(Beat {}));
    }
}
