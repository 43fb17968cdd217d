//! A worker's side of the control plane: it joins, sends heartbeats from a thread of its own, and is told when the run
//! ends.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

use crate::coordinator::MESSAGE_BYTES_MAX;
use crate::coordinator::state::{Ending, TRY_AGAIN, interval, silence};
use crate::progress::Progress;
use crate::transport::socket::words;
use crate::wire::control::coordinator_client::CoordinatorClient;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{FromWorker, Hello, Leaving, Mark, ToWorker, Welcome};

/// How a worker joins.
pub struct Join {
    /// The coordinator, `HOST:PORT`.
    pub address: String,
    /// It must answer after so long.
    pub within: Duration,
    /// Who the worker is.
    pub hello: Hello,
    /// Read by the heartbeat.
    pub progress: Arc<Progress>,
    /// Called once, from the control thread, when the run ends for everybody. The process should be gone soon after.
    pub on_end: Box<dyn Fn(&Ending) + Send>,
    /// Called, from the control thread, when the coordinator asks for a stop in good order.
    pub on_stop: Box<dyn Fn() + Send>,
}

/// Why a worker is not part of a run, or is no more.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum ControlError {
    /// Nobody answers as a coordinator.
    #[error(
        "no coordinator answered at {address} within {within_s} s ({why}): start it first, or check the address and the \
         port"
    )]
    NotThere {
        /// Where it was looked for.
        address: String,
        /// Seconds.
        within_s: f64,
        /// What was seen last.
        why: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator at {address} refuses this worker: {why}")]
    Refused {
        /// Where it is.
        address: String,
        /// What it said.
        why: String,
    },
    /// The run has ended.
    #[error("{}", .0.verdict)]
    Ended(Ending),
    /// The coordinator said something else than was to come.
    #[error("the coordinator at {address} said what was not to come next: {what}; run the same build on every machine")]
    OutOfTurn {
        /// Where it is.
        address: String,
        /// What it said.
        what: String,
    },
}

/// A worker's line to the coordinator. One that is dropped without [`leave`](Self::leave) ends at once, and the coordinator
/// takes its rank for lost; `on_end` is not called any more.
#[derive(Debug)]
pub struct Control {
    address: String,
    welcome: Welcome,
    /// The only one that keeps the stream of messages to the coordinator open. Unbounded: a run says little, and a
    /// coordinator that takes nothing is given up after the peer timeout.
    out: Option<UnboundedSender<FromWorker>>,
    incoming: Receiver<To>,
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// How the run ended, once it has, and whether this worker has let go of it before.
#[derive(Debug, Default)]
struct End {
    ending: Mutex<Option<Ending>>,
    changed: Condvar,
    left: AtomicBool,
}

impl Control {
    /// Joins, and waits for the welcome.
    ///
    /// # Errors
    /// Nobody is there, or the coordinator refuses.
    pub fn join(join: Join) -> Result<Self, ControlError> {
        let address = join.address.clone();
        let end = Arc::<End>::default();
        let (to_main, incoming) = channel();
        let (tell, told) = channel();
        let theirs = end.clone();
        let thread = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let why = format!("this process has no room for another thread: {error}");
                    let _ = tell.send(Err(not_there(&join, why)));
                    return;
                }
            };
            runtime.block_on(run(&join, &tell, &to_main, &theirs));
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        let spawned = std::thread::Builder::new().name("control".into()).spawn(thread);
        let gone = |why: String| ControlError::NotThere { address: address.clone(), within_s: 0.0, why };
        let thread = spawned.map_err(|error| gone(error.to_string()))?;
        let (welcome, out) = told.recv().map_err(|_| gone("the control thread died".into()))??;
        Ok(Self { address, welcome, out: Some(out), incoming, end, thread: Some(thread) })
    }

    /// What the coordinator said first.
    #[must_use]
    pub const fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Where the coordinator is.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Says something. After the end of the run nobody hears it.
    pub fn say(&self, what: From) {
        if let Some(out) = &self.out {
            let _ = out.send(FromWorker { what: Some(what) });
        }
    }

    /// The next message that is neither a heartbeat nor an end, waiting for it as long as the coordinator lives.
    ///
    /// # Errors
    /// The run has ended.
    pub fn next(&self) -> Result<To, ControlError> {
        self.incoming.recv().map_err(|_| ControlError::Ended(self.ending(Duration::from_secs(1))))
    }

    /// The next message, waiting at most so long.
    ///
    /// # Errors
    /// The run has ended.
    pub fn poll(&self, within: Duration) -> Result<Option<To>, ControlError> {
        match self.incoming.recv_timeout(within) {
            Ok(what) => Ok(Some(what)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(ControlError::Ended(self.ending(Duration::from_secs(1)))),
        }
    }

    /// A message that should not have come now.
    #[must_use]
    pub fn out_of_turn(&self, what: &To) -> ControlError {
        ControlError::OutOfTurn { address: self.address.clone(), what: format!("{what:?}").chars().take(80).collect() }
    }

    /// How the run ended, waiting at most so long for the coordinator's word; without it, a verdict of our own.
    #[must_use]
    pub fn ending(&self, within: Duration) -> Ending {
        let ending = self.end.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.end.changed.wait_timeout_while(ending, within, |ending| ending.is_none());
        let (ending, _) = waited.unwrap_or_else(PoisonError::into_inner);
        ending.clone().unwrap_or_else(|| Ending {
            verdict: format!("the coordinator at {} has not said why the run ended", self.address),
            code: TRY_AGAIN,
        })
    }

    /// Says the last word and ends the line in good order, waiting at most two seconds for the coordinator to hear it.
    pub fn leave(mut self, leaving: Leaving) {
        self.end.left.store(true, Ordering::SeqCst);
        self.say(From::Leaving(leaving));
        // The stream ends behind the last word; the coordinator then ends its own, and with that the thread.
        self.out = None;
        if let Some(thread) = self.thread.take() {
            let until = Instant::now() + LEAVE_WITHIN;
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end.left.store(true, Ordering::SeqCst);
        // With its only sender the stream to the coordinator ends, and then the thread, at the latest by itself after
        // `LEAVE_WITHIN`: nobody waits for it here.
        self.out = None;
    }
}

const LEAVE_WITHIN: Duration = Duration::from_secs(2);
/// Between two tries to reach a coordinator.
const RETRY: Duration = Duration::from_millis(100);
/// One try to reach it.
const TRY_WITHIN: Duration = Duration::from_secs(5);

type Told = Result<(Welcome, UnboundedSender<FromWorker>), ControlError>;

async fn run(join: &Join, tell: &Sender<Told>, to_main: &Sender<To>, end: &End) {
    let until = Instant::now() + join.within;
    let Greeted { welcome, out, mut messages } = loop {
        let why = match greet(join, until.max(Instant::now() + RETRY)).await {
            Ok(greeted) => break greeted,
            Err(Unwelcome::Never(why)) => {
                let address = join.address.clone();
                let _ = tell.send(Err(ControlError::Refused { address, why }));
                return;
            }
            Err(Unwelcome::Later(why)) => why,
        };
        if Instant::now() + RETRY > until {
            let _ = tell.send(Err(not_there(join, why)));
            return;
        }
        tokio::time::sleep(RETRY).await;
    };
    let peer_timeout = Duration::try_from_secs_f64(welcome.peer_timeout_s).unwrap_or(Duration::from_secs(30));
    let theirs = out.downgrade();
    if tell.send(Ok((welcome, out))).is_err() {
        return;
    }
    let ending = follow(join, peer_timeout, &theirs, &mut messages, to_main).await;
    if let Some(ending) = ending
        && !end.left.load(Ordering::SeqCst)
    {
        *end.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(ending.clone());
        end.changed.notify_all();
        (join.on_end)(&ending);
    }
}

/// Carries messages and heartbeats until the line ends. `None` when this worker has let go of it.
async fn follow(
    join: &Join,
    peer_timeout: Duration,
    out: &WeakUnboundedSender<FromWorker>,
    messages: &mut tonic::Streaming<ToWorker>,
    to_main: &Sender<To>,
) -> Option<Ending> {
    let beat = interval(peer_timeout);
    let mut ticks = tokio::time::interval(beat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut heard, mut ticked) = (Instant::now(), Instant::now());
    let mut let_go = None;
    let gone = |how: String| {
        let mark = join.progress.mark().text;
        let verdict = format!("the coordinator at {} {how}; this worker was at {mark}", join.address);
        Some(Ending { verdict, code: TRY_AGAIN })
    };
    loop {
        let message = tokio::select! {
            biased;
            message = messages.message() => message,
            _ = ticks.tick() => {
                let now = Instant::now();
                if now.duration_since(ticked) > beat * 5 {
                    // It was this process that slept: the coordinator's heartbeats wait in the socket.
                    heard = now;
                }
                ticked = now;
                let quiet = now.duration_since(heard);
                if quiet > silence(peer_timeout) {
                    return gone(format!("has been silent for {:.1} s", quiet.as_secs_f64()));
                }
                let mark = join.progress.mark();
                let mark = Mark { step: mark.step, progress: mark.count, text: mark.text, waits: mark.waits };
                match out.upgrade() {
                    Some(out) => _ = out.send(FromWorker { what: Some(From::Beat(mark)) }),
                    None if now.duration_since(*let_go.get_or_insert(now)) > LEAVE_WITHIN => return None,
                    None => {}
                }
                continue;
            }
        };
        heard = Instant::now();
        match message {
            Ok(Some(ToWorker { what: Some(To::Beat(_)) })) => {}
            Ok(Some(ToWorker { what: Some(To::Abort(abort)) })) => {
                let code = u8::try_from(abort.code).unwrap_or(TRY_AGAIN);
                return Some(Ending { verdict: abort.verdict, code });
            }
            Ok(Some(ToWorker { what: Some(To::Stop(_)) })) => (join.on_stop)(),
            // The training thread takes it; when it has ended, nobody needs it.
            Ok(Some(ToWorker { what: Some(what) })) => _ = to_main.send(what),
            Ok(Some(ToWorker { what: None })) => {
                return gone("sent a message that this version does not know: run the same build everywhere".into());
            }
            Ok(None) => return gone("closed the connection".into()),
            Err(status) => return gone(format!("is gone ({})", cause(&status))),
        }
    }
}

/// A worker that the coordinator has given a rank.
struct Greeted {
    welcome: Welcome,
    out: UnboundedSender<FromWorker>,
    messages: tonic::Streaming<ToWorker>,
}

/// Why one try was in vain.
enum Unwelcome {
    /// Another try may do better.
    Later(String),
    /// The coordinator does not want this worker.
    Never(String),
}

/// One try: connects, says hello, and waits for the answer, all of it until then. A connection has [`TRY_WITHIN`]; a
/// coordinator that has been reached is not called a second time while it thinks, for it would see two workers.
async fn greet(join: &Join, until: Instant) -> Result<Greeted, Unwelcome> {
    let until = tokio::time::Instant::from_std(until);
    let later = Unwelcome::Later;
    if join.address.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
        return Err(later("that is not HOST:PORT".into()));
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", join.address)).map_err(|error| later(cause(&error)))?;
    let endpoint = endpoint.tcp_nodelay(true).connect_timeout(TRY_WITHIN);
    let connected = tokio::time::timeout_at(until, endpoint.connect()).await;
    let connected = connected.map_err(|_| later("it could not be reached in time".into()))?;
    let channel = connected.map_err(|error| later(cause(&error)))?;
    let mut client = CoordinatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (out, outgoing) = unbounded_channel();
    let _ = out.send(FromWorker { what: Some(From::Hello(join.hello.clone())) });
    let answer = async {
        let answer = client.join(UnboundedReceiverStream::new(outgoing)).await.map_err(|status| cause(&status))?;
        let mut messages = answer.into_inner();
        let first = messages.message().await.map_err(|status| cause(&status))?;
        Ok((first.ok_or("it closed the connection")?.what, messages))
    };
    let answer = tokio::time::timeout_at(until, answer).await.map_err(|_| later("it did not answer".into()))?;
    let (what, messages) = answer.map_err(later)?;
    match what {
        Some(To::Welcome(welcome)) => Ok(Greeted { welcome, out, messages }),
        Some(To::Refused(refused)) if refused.again => Err(later(format!("it says: {}", refused.why))),
        Some(To::Refused(refused)) => Err(Unwelcome::Never(refused.why)),
        _ => Err(later(
            "it greeted in a way that this version does not know: run the same build on every machine".into(),
        )),
    }
}

fn not_there(join: &Join, why: String) -> ControlError {
    ControlError::NotThere { address: join.address.clone(), within_s: join.within.as_secs_f64(), why }
}

/// The innermost cause, which is what the system said, or the other side.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if let Some(error) = innermost.downcast_ref::<std::io::Error>() {
        return words(error);
    }
    match innermost.downcast_ref::<tonic::Status>() {
        Some(status) if status.message().is_empty() => status.code().description().to_owned(),
        Some(status) => status.message().to_owned(),
        None => innermost.to_string(),
    }
}

/// The address of this machine on the way to `towards`; nothing is sent.
///
/// # Errors
/// A name that cannot be resolved, or no way there.
pub fn local_address(towards: &str) -> std::io::Result<IpAddr> {
    let address: SocketAddr = towards.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
    let any: IpAddr = if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip())
}
