//! One rank: what its training thread does, and its line to the coordinator.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use compression::Codec;

use crate::control::beat;
use crate::control::silence::Silence;
use crate::coordinator::FromCoordinator as To;
use crate::data::engine::turns::Turns;
use crate::data::engine::{Aborter, Engine, EngineError, Inbox};
use crate::data::exchange::{Exchange, Group, Verdict};
use crate::data::shard::shard;
use crate::data::{Gradient, GradientStream, Parameter, StreamError};
use crate::note::Ballot;
use crate::progress::{Progress, Stage};
use crate::transport::simulated::Network;
use crate::transport::{Loss, Transport};
use crate::wire::control::from_worker::What as From;
use crate::wire::control::{Hello, Holds, Leaving, Lost, Prepared, Seen};

use super::fault::FAILURE;
use super::setting::Setting;
use super::world::{JOIN_WITHIN, PEER_TIMEOUT};

/// What a rank is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// It joins.
    Starting,
    /// Its training thread computes.
    Computing,
    /// Its training thread waits for the votes, and then for the sums as the forward pass needs them.
    Waiting,
    /// Its training thread waits for the coordinator's verdict.
    Explaining(String),
    /// It has done all steps.
    Done,
    /// It has ended with this error.
    Ended(String),
    /// It was killed or stopped.
    Gone,
}

pub(super) struct Rank {
    pub(super) rank: usize,
    pub(super) doing: Doing,
    pub(super) turns: Turns,
    /// Of the parameters after each step.
    pub(super) hashes: Vec<blake3::Hash>,
    pub(super) stuck: bool,
    pub(super) fails: bool,
    transport: Arc<dyn Transport>,
    welcome: bool,
    stream: GradientStream,
    aborter: Aborter,
    /// What the engine finds fault with, as soon as it does.
    faults: Receiver<EngineError>,
    progress: Arc<Progress>,
    silence: Silence,
    setting: Setting,
    parameters: Vec<Vec<f32>>,
    /// What this rank owns of them, as it is.
    masters: Vec<Vec<f32>>,
    step: u64,
    micro_batch: usize,
    /// Parameters of the micro-batch that have no gradient yet.
    left: usize,
    /// Once all have voted: whether the step counts, and how many parameters have their sum.
    voted: Option<(Verdict, usize)>,
}

impl Rank {
    pub(super) fn new(rank: usize, setting: &Setting, network: &Network) -> Self {
        let transport: Arc<dyn Transport> = Arc::new(network.end(rank));
        let (tell, faults) = channel();
        // Whoever has ended hears nothing.
        let inbox = Inbox::default().telling(move |fault: &EngineError| _ = tell.send(fault.clone()));
        network.open(rank, inbox.sink());
        let (aborter, progress) = (inbox.aborter(), Arc::<Progress>::default());
        let Setting { ranks, members, window, chunk_blocks, .. } = *setting;
        let group = Group { rank, ranks, members, window, epoch: 1, chunk_blocks };
        let mut exchange = Exchange::new(setting.plan(rank), group, setting.codec);
        if setting.by_arrival {
            exchange = exchange.in_order_of_arrival();
        }
        if let Some(codec) = setting.parameters {
            exchange = exchange.sending_parameters(codec);
        }
        let (engine, turns) = Engine::in_turns(exchange, transport.clone(), inbox, progress.clone());
        let stream = GradientStream::across(engine);
        let zeros = |elements| vec![0.0; elements];
        let elements = || stream.plan().parameters().iter().map(Parameter::elements);
        let (parameters, masters) =
            (elements().map(zeros).collect(), elements().map(|all| zeros(shard(all, rank, ranks).len())).collect());
        Self {
            rank,
            doing: Doing::Starting,
            turns,
            hashes: Vec::new(),
            stuck: false,
            fails: false,
            transport,
            welcome: false,
            stream,
            aborter,
            faults,
            progress,
            silence: Silence::new(PEER_TIMEOUT),
            setting: setting.clone(),
            parameters,
            masters,
            step: 0,
            micro_batch: 0,
            left: 0,
            voted: None,
        }
    }

    /// Whether its process lives.
    pub(super) const fn is_alive(&self) -> bool {
        !matches!(self.doing, Doing::Done | Doing::Ended(_) | Doing::Gone)
    }

    pub(super) fn hello(&self) -> From {
        let (rank, pid) = (Some(self.rank as u32), 100 + self.rank as u32);
        From::Hello(Hello { version: "1".into(), rank, host: "box".into(), pid, recipe: None })
    }

    /// What it answers to the coordinator.
    pub(super) fn hear(&mut self, now: Duration, what: To, say: &mut dyn FnMut(From)) {
        self.silence.heard(now);
        match what {
            To::Welcome(_) => {
                self.welcome = true;
                let (data_address, nonce) = (format!("10.0.0.{}:1", self.rank), format!("nonce-{}", self.rank));
                say(From::Prepared(Prepared { data_address, properties: Vec::new(), nonce }));
            }
            To::Look(look) => say(From::Seen(Seen { nonces: look.nonces })),
            To::Places(_) => say(From::Holds(Holds { checkpoints: Vec::new() })),
            To::Start(_) => self.begin(),
            To::Abort(abort) => self.end(abort.verdict),
            To::Beat(_) => {}
            other => panic!("nobody asked for {other:?}"),
        }
    }

    /// The heartbeat, unless the coordinator has been silent for too long.
    pub(super) fn beat(&mut self, now: Duration, say: &mut dyn FnMut(From)) {
        self.turns.look();
        if !self.welcome {
            if now > JOIN_WITHIN {
                self.end("no coordinator answered".into());
            }
            return;
        }
        match self.silence.tick(now) {
            Some(how) => self.end(format!("the coordinator {how}")),
            None => say(beat(&self.progress)),
        }
    }

    /// The run has ended for everybody.
    pub(super) fn end(&mut self, verdict: String) {
        self.aborter.abort(&verdict);
        self.doing = Doing::Ended(verdict);
    }

    fn begin(&mut self) {
        self.doing = Doing::Computing;
        self.step += 1;
        self.progress.begin(self.step);
        self.stream.begin(self.step, self.setting.micro_batches);
        (self.micro_batch, self.left) = (0, self.parameters.len());
        self.stream.begin_micro_batch(0);
    }

    /// One gradient more, or the end of the backward pass.
    pub(super) fn compute(&mut self, say: &mut dyn FnMut(From)) {
        if self.doing != Doing::Computing || self.stuck {
            return;
        }
        if self.fails {
            let error = Some(FAILURE.to_owned());
            say(From::Leaving(Leaving { step: self.step, error, code: 1, ..Leaving::default() }));
            self.doing = Doing::Explaining(FAILURE.into());
            return;
        }
        if self.left == 0 && self.micro_batch + 1 < self.setting.micro_batches {
            self.micro_batch += 1;
            self.left = self.parameters.len();
            self.stream.begin_micro_batch(self.micro_batch);
        }
        if self.left > 0 {
            self.left -= 1;
            let gradient = self.setting.gradient(self.rank, self.step, self.micro_batch, self.left);
            self.stream.add(self.left, Gradient::Host(&gradient));
            return;
        }
        let (loss, parameters) = (self.rank as f64, None);
        let ballot = Ballot { finite: true, stop: false, busy: false, loss, compute_s: 0.0, parameters, codec: None };
        self.progress.enter(Stage::Waiting);
        self.stream.close(ballot).expect("every gradient has its parameter's shape");
        self.doing = Doing::Waiting;
    }

    /// What the engine has to say, in whatever the training thread is.
    fn tell(&mut self, say: &mut dyn FnMut(From)) {
        for fault in self.faults.try_iter() {
            say(match fault {
                EngineError::Lost(loss) => From::Lost(Lost { rank: loss.rank as u32, why: loss.to_string() }),
                fault => From::Leaving(Leaving {
                    step: self.step,
                    error: Some(fault.to_string()),
                    code: 1,
                    between_ranks: true,
                    ..Leaving::default()
                }),
            });
        }
    }

    /// Goes on when the sum has come.
    pub(super) fn go_on(&mut self, say: &mut dyn FnMut(From)) {
        self.tell(say);
        if self.doing != Doing::Waiting {
            return;
        }
        match self.apply() {
            None => return,
            Some(Ok(())) => {}
            Some(Err(StreamError::Engine(EngineError::Lost(Loss { rank, why, .. })))) => {
                say(From::Lost(Lost { rank: rank as u32, why: why.clone() }));
                self.doing = Doing::Explaining(why);
                return;
            }
            Some(Err(error)) => {
                let error = error.to_string();
                say(From::Leaving(Leaving {
                    step: self.step,
                    error: Some(error.clone()),
                    code: 1,
                    between_ranks: true,
                    ..Leaving::default()
                }));
                self.doing = Doing::Explaining(error);
                return;
            }
        }
        let mut hasher = blake3::Hasher::new();
        self.parameters.iter().flatten().for_each(|x| _ = hasher.update(&x.to_le_bytes()));
        self.hashes.push(hasher.finalize());
        if self.step < self.setting.steps {
            self.begin();
            return;
        }
        self.transport.close(Duration::ZERO);
        let parameter_hash = hasher.finalize().to_string();
        say(From::Leaving(Leaving { step: self.step, parameter_hash, ..Leaving::default() }));
        self.doing = Doing::Done;
    }

    /// Applies what is here of the sum, parameter by parameter as a forward pass needs them; `None` while something is
    /// missing.
    fn apply(&mut self) -> Option<Result<(), StreamError>> {
        if self.voted.is_none() {
            let verdict = match self.stream.try_voted()? {
                Ok(voted) => voted.verdict,
                Err(error) => return Some(Err(error)),
            };
            let skips = self.setting.skips() == Some(self.step);
            assert_eq!(verdict, if skips { Verdict::Skip } else { Verdict::Commit });
            self.voted = Some((verdict, 0));
            if self.setting.parameters.is_some() && verdict == Verdict::Commit {
                self.publish();
            }
        }
        while let Some((Verdict::Commit, next)) = self.voted
            && let Some(parameter) = self.parameters.get_mut(next)
        {
            let codec = self.stream.parameter_codec(next);
            let update = |came: &[f32]| {
                let pairs = parameter.iter_mut().zip(came);
                match codec {
                    None => pairs.for_each(|(parameter, sum)| *parameter -= 0.1 * sum),
                    Some(Codec::Fp32) => parameter.copy_from_slice(came),
                    Some(_) => pairs.for_each(|(parameter, more)| *parameter += more),
                }
            };
            if let Err(error) = self.stream.try_with_sum(next, update)? {
                return Some(Err(error));
            }
            self.voted = Some((Verdict::Commit, next + 1));
        }
        let settled = self.stream.try_settle()?;
        self.voted = None;
        Some(settled.map(drop))
    }

    /// Updates what this rank owns, and sends it.
    fn publish(&mut self) {
        for (index, (master, parameter)) in self.masters.iter_mut().zip(&self.parameters).enumerate() {
            let own = shard(parameter.len(), self.rank, self.setting.ranks);
            let codec = self.stream.parameter_codec(index);
            self.stream.with_own(index, |place| {
                for ((master, place), replica) in master.iter_mut().zip(place).zip(&parameter[own]) {
                    *master -= 0.1 * *place;
                    *place = if codec == Some(Codec::Fp32) { *master } else { *master - replica };
                }
            });
            self.stream.publish(index);
        }
    }
}
