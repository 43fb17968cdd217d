//! The control thread of a worker: it greets the coordinator, carries messages and heartbeats, and notices its silence.

use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

use super::silence::Silence;
use super::{By, ControlError, End, Join, LEAVE_WITHIN};
use crate::coordinator::MESSAGE_BYTES_MAX;
use crate::coordinator::state::{Ending, TRY_AGAIN, interval};
use crate::transport::congestion::Congestion;
use crate::transport::socket::{Counters, Line, words};
use crate::transport::tls::Mismatch;
use crate::wire::control::coordinator_client::CoordinatorClient;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{FromWorker, ToWorker, Welcome};

/// Between two tries to reach a coordinator.
const RETRY: Duration = Duration::from_millis(100);
/// One try to reach it.
const TRY_WITHIN: Duration = Duration::from_secs(5);

pub(super) type Told = Result<(Welcome, UnboundedSender<FromWorker>), ControlError>;

/// The whole life of the line. Without a welcome there is no line: `tell` says why.
pub(super) async fn run(join: &Join, tell: &Sender<Told>, to_main: &Sender<To>, end: &End) {
    let until = Instant::now() + join.within;
    let Greeted { welcome, out, mut messages } = loop {
        let why = match greet(join, until.max(Instant::now() + RETRY)).await {
            Ok(greeted) => break greeted,
            Err(Unwelcome::Never(why)) => {
                let address = join.address.clone();
                let _ = tell.send(Err(ControlError::Refused { address, why }));
                return;
            }
            Err(Unwelcome::Mismatch(why)) => {
                let address = join.address.clone();
                let _ = tell.send(Err(ControlError::Mismatch { address, why }));
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
    let name = format!("host {}, process {}", welcome.host, welcome.pid);
    if tell.send(Ok((welcome, out))).is_err() {
        return;
    }
    let ending = follow(join, &name, peer_timeout, &theirs, &mut messages, to_main).await;
    if let Some((ending, by)) = ending
        && !end.left.load(Ordering::SeqCst)
    {
        // Before the training thread hears of it, so that whatever it says is said in this light.
        (join.on_end)(&ending, by);
        *end.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(ending);
        end.changed.notify_all();
    }
}

/// Carries messages and heartbeats until the line ends; `name` is who the coordinator is. `None` when this worker has let go of it.
async fn follow(
    join: &Join,
    name: &str,
    peer_timeout: Duration,
    out: &WeakUnboundedSender<FromWorker>,
    messages: &mut tonic::Streaming<ToWorker>,
    to_main: &Sender<To>,
) -> Option<(Ending, By)> {
    let beat = interval(peer_timeout);
    let mut ticks = tokio::time::interval(beat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let began = Instant::now();
    let mut silence = Silence::new(peer_timeout);
    let mut let_go = None;
    let gone = |how: String| {
        let mark = join.progress.mark().text;
        let verdict = format!("the coordinator at {} ({name}) {how}; this worker was at {mark}", join.address);
        Some((Ending { verdict, code: TRY_AGAIN }, By::Worker))
    };
    loop {
        let message = tokio::select! {
            biased;
            message = messages.message() => message,
            _ = ticks.tick() => {
                let now = Instant::now();
                if let Some(how) = silence.tick(now - began) {
                    return gone(how);
                }
                match out.upgrade() {
                    Some(out) => _ = out.send(FromWorker { what: Some(super::beat(&join.progress)) }),
                    None if now.duration_since(*let_go.get_or_insert(now)) > LEAVE_WITHIN => return None,
                    None => {}
                }
                continue;
            }
        };
        silence.heard(began.elapsed());
        match message {
            Ok(Some(ToWorker { what: Some(To::Beat(_)) })) => {}
            Ok(Some(ToWorker { what: Some(To::Abort(abort)) })) => {
                let code = u8::try_from(abort.code).unwrap_or(TRY_AGAIN);
                return Some((Ending { verdict: abort.verdict, code }, By::Coordinator));
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
    /// The two are not secured alike.
    Mismatch(Mismatch),
}

/// One try: connects, says hello, and waits for the answer, all of it until then. A connection has [`TRY_WITHIN`]; a
/// coordinator that has been reached is not called a second time while it thinks, for it would see two workers.
async fn greet(join: &Join, until: Instant) -> Result<Greeted, Unwelcome> {
    let line = Arc::<Line>::default();
    greet_on(join, &line, until).await.map_err(|why| match line.mismatch() {
        Some(mismatch) if mismatch.is_final() => Unwelcome::Mismatch(mismatch),
        Some(mismatch) => Unwelcome::Later(mismatch.to_string()),
        None => why,
    })
}

async fn greet_on(join: &Join, line: &Arc<Line>, until: Instant) -> Result<Greeted, Unwelcome> {
    let until = tokio::time::Instant::from_std(until);
    let later = Unwelcome::Later;
    if join.address.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
        return Err(later("that is not HOST:PORT".into()));
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", join.address)).map_err(|error| later(cause(&error)))?;
    let endpoint = endpoint.connect_timeout(TRY_WITHIN);
    let (security, address, line) = (join.security.clone(), join.address.clone(), line.clone());
    let connector = tower::service_fn(move |_| {
        let (security, address, line) = (security.clone(), address.clone(), line.clone());
        async move { security.connect(address, Counters::default(), line, &Congestion::default()).await.map(TokioIo::new) }
    });
    let connected = tokio::time::timeout_at(until, endpoint.connect_with_connector(connector)).await;
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

pub(super) fn not_there(join: &Join, why: String) -> ControlError {
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
