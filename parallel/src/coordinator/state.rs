//! Every decision of the coordinator, as a pure function of time and input: no sockets, no clock, no threads.
//!
//! - this file: what workers say, and how the run ends.
//! - `join`: who may join, and as which rank.
//! - `start`: from the first greeting to the first step.
//! - `watch`: who is lost, and whose fault it is.
//! - `worker`: what is known of one worker; `numbers`: what ranks last said of themselves.

mod join;
mod numbers;
mod start;
mod watch;
mod worker;

use std::collections::BTreeMap;
use std::time::Duration;

use super::codec::Calibration;
use super::saves::Saves;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{Abort, Hello, Stop};
pub use numbers::RankNumbers;
use worker::{Left, Worker};

/// What the coordinator is to coordinate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ranks of the mesh.
    pub ranks: usize,
    /// The host that the coordinator runs on, and its process id.
    pub host: String,
    /// See `host`.
    pub pid: u32,
    /// The version that every worker must have.
    pub version: String,
    /// The recipe that workers get.
    pub recipe: String,
    /// The run's name.
    pub name: String,
    /// Whether to go on from a checkpoint.
    pub resume: bool,
    /// Whether an earlier one will do, where the newest is damaged.
    pub resume_from_earlier: bool,
    /// Whether to go on without what ranks had left out of gradients, where nobody has that any more.
    pub resume_without_residuals: bool,
    /// How often the run was started again after it had lost a peer.
    pub restart: u32,
    /// Whether a codec that the run chose before is to be chosen anew.
    pub choose_codec_anew: bool,
    /// Where this process serves metrics for Prometheus, if it does.
    pub metrics_address: Option<String>,
    /// After so long everybody has ended when somebody is lost.
    pub peer_timeout: Duration,
    /// All ranks must have joined and prepared after so long.
    pub join_within: Duration,
    /// Changes with every start of the group.
    pub epoch: u32,
    /// Shown by every data connection of this group, and part of the ids of its checkpoints.
    pub token: String,
}

/// What happens to the coordinator.
#[derive(Clone, Debug)]
pub enum Input {
    /// Somebody wants to join; `differences` are the keys in which its own recipe differs.
    Hello {
        /// Its connection.
        connection: u64,
        /// What it said.
        hello: Hello,
        /// Keys that differ.
        differences: Vec<String>,
    },
    /// A worker says something.
    Message {
        /// Its connection.
        connection: u64,
        /// What.
        what: From,
    },
    /// A connection ended.
    Closed {
        /// Which.
        connection: u64,
        /// How.
        how: String,
    },
    /// A local process of this rank, or of a process id, ended.
    Exited {
        /// Its process id.
        pid: u32,
        /// How, as in "was killed by SIGKILL".
        how: String,
        /// Its exit code, if it had one.
        code: Option<i32>,
    },
    /// Somebody asks for a stop in good order.
    Stop,
    /// Time passes.
    Tick,
}

/// What the coordinator does.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Sends a message.
    Send {
        /// To which connection.
        connection: u64,
        /// What.
        what: To,
    },
    /// Ends a connection once everything sent has left.
    Close {
        /// Which.
        connection: u64,
    },
    /// The run is over.
    End(Ending),
}

/// How a run ended, for everybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// For people; empty when all went well.
    pub verdict: String,
    /// The exit code.
    pub code: u8,
}

/// Exit code of a run that may be tried again.
pub const TRY_AGAIN: u8 = 75;
const USAGE: u8 = 2;
const FAILED: u8 = 1;

/// The coordinator's mind.
#[derive(Debug)]
pub struct State {
    options: Options,
    workers: BTreeMap<usize, Worker>,
    phase: Phase,
    lead_of: Vec<usize>,
    saves: Saves,
    calibration: Calibration,
    /// Ranks that others could not reach: who said so, about whom, when, why.
    losses: BTreeMap<(usize, usize), (Duration, String)>,
    last_tick: Duration,
    /// When the wait for the ranks began; later if this process slept.
    began: Duration,
    refusal_logged: Option<Duration>,
    stop: bool,
    ended: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Joining,
    Looking,
    Holding,
    Running,
}

/// How often the coordinator looks, and workers send heartbeats.
#[must_use]
pub fn interval(peer_timeout: Duration) -> Duration {
    (peer_timeout / 20).clamp(Duration::from_millis(1), Duration::from_millis(500))
}

/// A gap of so many intervals between two looks means that it was this process that slept.
pub(crate) const SLEPT: u32 = 5;

/// Silence that counts as death: what is left of the timeout is for everybody to end.
#[must_use]
pub fn silence(peer_timeout: Duration) -> Duration {
    peer_timeout / 4 * 3
}

/// The longest text of others that is kept and shown: a host, a version, where a rank is, and an error.
const NAME_CHARS_MAX: usize = 64;
const MARK_CHARS_MAX: usize = 300;
const ERROR_CHARS_MAX: usize = 8000;

impl State {
    /// Nobody has joined yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        assert!(options.ranks > 0, "a mesh has at least one rank");
        Self {
            saves: Saves::new(options.ranks, &options.token),
            calibration: Calibration::new(options.ranks),
            options,
            workers: BTreeMap::new(),
            phase: Phase::Joining,
            lead_of: Vec::new(),
            losses: BTreeMap::new(),
            last_tick: Duration::ZERO,
            began: Duration::ZERO,
            refusal_logged: None,
            stop: false,
            ended: None,
        }
    }

    /// How the run ended, once it has.
    #[must_use]
    pub const fn ended(&self) -> Option<&Ending> {
        self.ended.as_ref()
    }

    /// Takes an input at a time that is counted from the coordinator's start.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Hello { connection, hello, differences } => {
                self.hello(now, connection, &hello, &differences, &mut out);
            }
            Input::Message { connection, what } => {
                if let Some(rank) = self.rank_of(connection) {
                    self.message(now, rank, what, &mut out);
                }
            }
            Input::Closed { connection, how } => {
                if let Some(worker) = self.rank_of(connection).and_then(|rank| self.workers.get_mut(&rank)) {
                    worker.closed.get_or_insert((now, format!("is gone: {how}")));
                }
                self.finish_if_all_left(&mut out);
            }
            Input::Exited { pid, how, code } => self.exited(now, pid, &how, code, &mut out),
            Input::Stop => self.ask_to_stop(&mut out),
            Input::Tick => self.tick(now, &mut out),
        }
        out
    }

    fn rank_of(&self, connection: u64) -> Option<usize> {
        self.workers.iter().find(|(_, worker)| worker.connection == connection).map(|(&rank, _)| rank)
    }

    fn message(&mut self, now: Duration, rank: usize, what: From, out: &mut Vec<Output>) {
        let Some(worker) = self.workers.get_mut(&rank) else { return };
        worker.heard = now;
        if self.ended.is_some() {
            return;
        }
        match what {
            From::Beat(mark) => worker.beat(now, mark),
            From::Prepared(prepared) => {
                worker.prepared = Some(prepared);
                self.advance(out);
            }
            From::Seen(seen) => {
                worker.seen = Some(seen.nonces.into_iter().collect());
                self.advance(out);
            }
            From::Holds(holds) => {
                worker.holds = Some(holds.checkpoints);
                self.advance(out);
            }
            From::Lost(lost) => self.note_loss(now, rank, &lost),
            From::Part(part) if self.phase == Phase::Running => {
                let sends = self.saves.part(rank, part, &self.lead_of);
                self.send_all(sends, out);
            }
            From::Committed(committed) if self.phase == Phase::Running => {
                let sends = self.saves.committed(rank, committed);
                self.send_all(sends, out);
            }
            From::CodecFacts(facts) => {
                if let Some(choice) = self.calibration.take(rank, facts) {
                    tracing::info!(codec = choice.codec, reason = choice.reason, "chose a codec for all ranks");
                    self.to_all(&To::CodecChoice(choice), out);
                }
            }
            From::Part(_) | From::Committed(_) => tracing::warn!(rank, "a checkpoint before the start is ignored"),
            From::Leaving(leaving) => {
                let code = u8::try_from(leaving.code).unwrap_or(FAILED);
                match leaving.error {
                    Some(error) => {
                        // A failure never ends a run with the code of success.
                        let code = if code == 0 { FAILED } else { code };
                        let error = text(&error, ERROR_CHARS_MAX);
                        let marks = if leaving.between_ranks { self.marks(now, None) } else { String::new() };
                        self.end(format!("{} failed: {error}{marks}", self.name(rank)), code, out);
                    }
                    None => {
                        worker.left = Some(Left { hash: line(&leaving.parameter_hash, NAME_CHARS_MAX), code });
                        self.finish_if_all_left(out);
                    }
                }
            }
            From::Hello(_) => tracing::warn!(rank, "a second greeting is ignored"),
        }
    }

    fn send_all(&self, sends: Vec<(usize, To)>, out: &mut Vec<Output>) {
        for (rank, what) in sends {
            if let Some(worker) = self.workers.get(&rank) {
                out.push(Output::Send { connection: worker.connection, what });
            }
        }
    }

    fn to_all(&self, what: &To, out: &mut Vec<Output>) {
        for worker in self.workers.values().filter(|worker| worker.closed.is_none()) {
            out.push(Output::Send { connection: worker.connection, what: what.clone() });
        }
    }

    fn ask_to_stop(&mut self, out: &mut Vec<Output>) {
        if self.ended.is_some() || std::mem::replace(&mut self.stop, true) {
            return;
        }
        if self.phase == Phase::Running {
            self.to_all(&To::Stop(Stop {}), out);
        } else {
            self.end("stopped before the first step: go on with --resume".into(), TRY_AGAIN, out);
        }
    }

    fn end(&mut self, verdict: String, code: u8, out: &mut Vec<Output>) {
        if self.ended.is_some() {
            return;
        }
        self.to_all(&To::Abort(Abort { verdict: verdict.clone(), code: code.into() }), out);
        let ending = Ending { verdict, code };
        self.ended = Some(ending.clone());
        out.push(Output::End(ending));
    }

    /// All ranks have left on their own: the run is over, and the replicas must be equal.
    fn finish_if_all_left(&mut self, out: &mut Vec<Output>) {
        let left: Vec<&Left> = self.workers.values().filter_map(|worker| worker.left.as_ref()).collect();
        if self.ended.is_some() || left.len() < self.options.ranks {
            return;
        }
        let ending = match left.iter().position(|other| other.hash != left[0].hash) {
            Some(rank) => {
                let verdict = format!(
                    "the replicas differ at the end: the parameters of {} have BLAKE3 {}, those of {} have {}",
                    self.name(0),
                    left[0].hash,
                    self.name(rank),
                    left[rank].hash
                );
                Ending { verdict, code: FAILED }
            }
            // A run that was asked to stop after its last step is done: what counts is how its ranks ended.
            None => Ending { verdict: String::new(), code: left.iter().map(|left| left.code).max().unwrap_or(0) },
        };
        self.ended = Some(ending.clone());
        out.push(Output::End(ending));
    }

    /// "rank 1 (host box, process 42)".
    fn name(&self, rank: usize) -> String {
        match self.workers.get(&rank) {
            Some(worker) => format!("rank {rank} (host {}, process {})", worker.host, worker.pid),
            None => format!("rank {rank}"),
        }
    }
}

/// Text of somebody else on one line, bounded, without control characters.
fn line(theirs: &str, chars_max: usize) -> String {
    theirs.chars().take(chars_max).map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// Text of somebody else, bounded, without control characters but for the ends of lines.
fn text(theirs: &str, chars_max: usize) -> String {
    theirs.chars().take(chars_max).map(|char| if char.is_control() && char != '\n' { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests;
