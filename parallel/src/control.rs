//! A worker's side of the control plane: it joins, sends heartbeats from a thread of its own, and is told when the run
//! ends.
//!
//! - this file: what the training thread sees of it.
//! - `thread`: the control thread, from the first try to reach the coordinator to the end of the line; `silence`: when it
//!   gives the coordinator up.

pub(crate) mod silence;
mod thread;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc::{UnboundedSender, WeakUnboundedSender};

use crate::coordinator::state::{Ending, TRY_AGAIN};
use crate::progress::Progress;
use crate::transport::tls::{Mismatch, Security};
use crate::wire::control::from_worker::What as From;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{FromWorker, Hello, Leaving, Lost, Mark, Welcome};
use thread::{not_there, run};

/// How a worker joins.
pub struct Join {
    /// The coordinator, `HOST:PORT`.
    pub address: String,
    /// It must answer after so long.
    pub within: Duration,
    /// What keeps strangers out.
    pub security: Security,
    /// Who the worker is.
    pub hello: Hello,
    /// Read by the heartbeat.
    pub progress: Arc<Progress>,
    /// Called once, from the control thread, when the run ends for everybody. The process should be gone soon after.
    pub on_end: OnEnd,
    /// Called, from the control thread, when the coordinator asks for a stop in good order.
    pub on_stop: Box<dyn Fn() + Send>,
}

/// Hears how the run ended, and from whom.
pub type OnEnd = Box<dyn Fn(&Ending, By) + Send>;

/// Who says how the run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The coordinator.
    Coordinator,
    /// This worker, which has lost the coordinator.
    Worker,
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
    /// The coordinator, or who is in its place, and this worker are not secured alike.
    #[error("no connection to the coordinator at {address}: {why}")]
    Mismatch {
        /// Where it is.
        address: String,
        /// What is wrong with it.
        why: Mismatch,
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

/// Reports lost ranks, and failures, to the coordinator. See [`Control::reporter`].
#[derive(Clone, Debug)]
pub struct Reporter(Option<WeakUnboundedSender<FromWorker>>);

impl Reporter {
    /// A rank is lost.
    pub fn lost(&self, rank: usize, why: &str) {
        self.say(From::Lost(Lost { rank: rank as u32, why: why.to_owned() }));
    }

    /// This worker cannot go on, which its training thread may find out much later.
    pub fn failed(&self, leaving: Leaving) {
        self.say(From::Leaving(leaving));
    }

    fn say(&self, what: From) {
        if let Some(out) = self.0.as_ref().and_then(WeakUnboundedSender::upgrade) {
            // When the line has ended, so has the run.
            let _ = out.send(FromWorker { what: Some(what) });
        }
    }
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

    /// A way to report a lost rank or a failure from another thread. It does not keep the line open.
    #[must_use]
    pub fn reporter(&self) -> Reporter {
        Reporter(self.out.as_ref().map(UnboundedSender::downgrade))
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
/// The heartbeat of a worker that is so far.
#[must_use]
pub fn beat(progress: &Progress) -> From {
    let (mark, numbers) = (progress.mark(), progress.numbers());
    let (waits, slow) = (mark.waits, mark.slow);
    From::Beat(Mark { step: mark.step, progress: mark.count, text: mark.text, waits, slow, numbers })
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
