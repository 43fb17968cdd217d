//! The control plane: who is part of a run, whether everybody is alive, and what all of them agree on.
//!
//! A worker says hello, gets its rank and the recipe, prepares alone what can be prepared alone, and says so. When all
//! ranks have, the coordinator compares what must be the same everywhere, finds out who shares a run folder, picks the
//! newest checkpoint that every folder has, and starts the run. From then on it collects heartbeats, commits
//! checkpoints, and ends the run for everybody when somebody is lost, with a verdict that names the culprit.
//!
//! - [`state`]: every decision, as a pure function of time and input; `saves`: checkpoints on their way; `codec`: which
//!   codec all ranks are to use.
//! - `front`: the gRPC service, which only carries messages.
//! - this file: the thread in which both meet.

mod codec;
mod front;
mod saves;
pub mod state;

use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender as StdSender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::transport::socket::{Accepted, Counters, Limits};
use crate::transport::tls::Security;
use crate::wire::control::coordinator_server::CoordinatorServer;
use crate::wire::control::to_worker::What as To;
use front::{Front, Lines, carry};
use state::{Ending, Input, Options, Output, RankNumbers, State, interval};

/// The largest message of the control plane: the parts of a large model's checkpoint.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// A connection whose greeting has not come and been accepted after so long is closed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// What a connection may send before its greeting was accepted: a recipe, and what HTTP/2 and TLS say beside it.
const HELLO_BYTES_MAX: u64 = 2 << 20;
/// Connections beside those of the ranks: whoever is refused, or is no worker at all.
const STRANGERS_MAX: usize = 64;
/// Messages of all workers that wait for the coordinator; beyond that the workers wait.
const INPUTS_MAX: usize = 1024;
/// What was sent last, such as a verdict, has so long to leave when the coordinator ends.
const CLOSE_WITHIN: Duration = Duration::from_millis(500);

/// Which keys of a worker's recipe differ from the coordinator's.
pub type Compare = Arc<dyn Fn(&str) -> Vec<String> + Send + Sync>;

type Numbers = Arc<Mutex<Vec<RankNumbers>>>;

/// A coordinator at work in a thread of its own.
#[derive(Debug)]
pub struct Coordinator {
    address: SocketAddr,
    /// Unbounded: only the process that started the coordinator sends here, once for each of its children and signals.
    inputs: mpsc::UnboundedSender<Input>,
    ended: Receiver<Ending>,
    numbers: Numbers,
    quit: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Coordinator {
    /// Starts to listen for workers.
    ///
    /// # Errors
    /// The system refuses the listener or a thread.
    pub fn start(
        listener: TcpListener,
        options: Options,
        compare: Compare,
        security: Security,
    ) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (inputs, told) = mpsc::unbounded_channel();
        let (quit, quits) = oneshot::channel();
        let (tell, ended) = channel();
        let numbers = Numbers::default();
        let shown = numbers.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = move || {
            let channels = Channels { told, quits, tell, numbers: shown };
            runtime.block_on(serve((listener, security), options, compare, channels));
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        let thread = std::thread::Builder::new().name("coordinator".into()).spawn(work)?;
        Ok(Self { address, inputs, ended, numbers, quit: Some(quit), thread: Some(thread) })
    }

    /// What every rank last said of itself.
    #[must_use]
    pub fn numbers(&self) -> Vec<RankNumbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What every rank last said of itself, whenever it is called.
    pub fn shown(&self) -> impl Fn() -> Vec<RankNumbers> + Send + Sync + 'static {
        let numbers = self.numbers.clone();
        move || numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tells it what it cannot see: that a process ended, or that somebody asks for a stop. Cheap to call.
    pub fn tell(&self, input: Input) {
        self.teller()(input);
    }

    /// What [tells](Self::tell) it from another thread, also when it is gone: then nobody listens.
    pub fn teller(&self) -> impl Fn(Input) + Send + Sync + 'static {
        let inputs = self.inputs.clone();
        move |input| _ = inputs.send(input)
    }

    /// How the run ended, waiting at most so long; `None` while it goes on.
    #[must_use]
    pub fn ending(&self, within: Duration) -> Option<Ending> {
        match self.ended.recv_timeout(within) {
            Ok(ending) => Some(ending),
            Err(RecvTimeoutError::Timeout) => None,
            // Not `None`: whoever asks in a loop would ask for ever.
            Err(RecvTimeoutError::Disconnected) => {
                Some(Ending { verdict: "the coordinator's thread died; its log says why".into(), code: 1 })
            }
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        if let Some(quit) = self.quit.take() {
            // It may have died; then there is nobody to tell.
            let _ = quit.send(());
        }
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
        {
            tracing::error!("the coordinator's thread had died");
            std::mem::forget(panic);
        }
    }
}

struct Channels {
    told: mpsc::UnboundedReceiver<Input>,
    quits: oneshot::Receiver<()>,
    tell: StdSender<Ending>,
    numbers: Numbers,
}

async fn serve((listener, security): (TcpListener, Security), options: Options, compare: Compare, channels: Channels) {
    let Channels { mut told, mut quits, tell, numbers } = channels;
    let (inputs, mut incoming) = mpsc::channel(INPUTS_MAX);
    let lines = Lines::default();
    let connections_max = options.ranks + STRANGERS_MAX;
    let limits = Limits { connections_max, admitted_within: HELLO_WITHIN, unadmitted_bytes_max: HELLO_BYTES_MAX };
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            let verdict = format!("the coordinator cannot listen: {error}");
            // Whoever started the coordinator may have gone.
            let _ = tell.send(Ending { verdict, code: 1 });
            return;
        }
    };
    let service = CoordinatorServer::new(Front::new(lines.clone(), inputs, compare))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let accepted = Accepted::new(listener, limits, Counters::default(), security);
    let (close, closing) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        // A worker makes one call on a connection of its own.
        .max_concurrent_streams(1)
        .add_service(service)
        .serve_with_incoming_shutdown(accepted, async {
            _ = closing.await;
        });
    let mut server = tokio::spawn(server);
    let start = Instant::now();
    let mut ticks = tokio::time::interval(interval(options.peer_timeout));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut state = State::new(options);
    loop {
        let input = tokio::select! {
            _ = &mut quits => break,
            _ = ticks.tick() => Input::Tick,
            Some(input) = told.recv() => input,
            Some(input) = incoming.recv() => input,
        };
        let looks = matches!(input, Input::Tick);
        let outputs = state.handle(start.elapsed(), input);
        // All ranks' numbers of all their peers: not with each heartbeat of each. The last time before anybody hears of the end.
        if looks || outputs.iter().any(|output| matches!(output, Output::End(_))) {
            *numbers.lock().unwrap_or_else(PoisonError::into_inner) = state.numbers();
        }
        for output in outputs {
            carry(&lines, &tell, output);
        }
    }
    drop(incoming);
    lines.close();
    let _ = close.send(());
    if tokio::time::timeout(CLOSE_WITHIN, &mut server).await.is_err() {
        server.abort();
    }
}

/// What the coordinator says.
pub type FromCoordinator = To;

#[cfg(test)]
mod tests;
