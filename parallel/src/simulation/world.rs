//! Everything that happens in a simulated run, in order.

use std::collections::BTreeMap;
use std::time::Duration;

use super::fault::Fault;
use super::rank::{Doing, Rank};
use super::setting::{Setting, When};
use crate::coordinator::FromCoordinator as To;
use crate::coordinator::state::{Ending, Input, Options, Output, State, interval};
use crate::transport::simulated::{Network, Random};
use crate::wire::control::Beat;
use crate::wire::control::from_worker::What as From;

pub(super) const PEER_TIMEOUT: Duration = Duration::from_secs(2);
pub(super) const JOIN_WITHIN: Duration = Duration::from_secs(20);
/// No run may take longer; none comes near it.
const HANG: Duration = Duration::from_secs(120);

#[derive(Debug)]
enum Event {
    /// A rank's process starts.
    Joins(usize),
    /// A rank's training thread gets on.
    Computes(usize),
    /// A rank's heartbeat is due.
    Beats(usize),
    /// The coordinator looks.
    Ticks,
    ToCoordinator(usize, From),
    ToWorker(usize, To),
    /// A rank's connection to the coordinator ends.
    Closes(usize),
    Fault,
}

pub(super) struct World {
    setting: Setting,
    random: Random,
    now: Duration,
    network: Network,
    ranks: Vec<Rank>,
    coordinator: Option<State>,
    ending: Option<Ending>,
    /// What is to come, and what of the same time in random order.
    events: BTreeMap<(Duration, u64), Event>,
    /// When the last word to and from each rank arrives: none overtakes another.
    last_words: Vec<[Duration; 2]>,
    /// Steps of all ranks that are complete, and whether a fault that waits for some of them is on its way.
    completed: usize,
    announced: bool,
    /// When the fault happened, and whether every rank was at its steps then.
    struck: Option<(Duration, bool)>,
    story: Vec<String>,
}

impl World {
    pub(super) fn new(setting: Setting) -> Self {
        let network = Network::new(setting.ranks, setting.quality, setting.seed ^ 0xA5A5);
        let ranks = (0..setting.ranks).map(|rank| Rank::new(rank, &setting, &network)).collect();
        let options = Options {
            ranks: setting.ranks,
            host: "host".into(),
            pid: 1,
            version: "1".into(),
            recipe: String::new(),
            name: "run".into(),
            resume: false,
            resume_from_earlier: false,
            resume_without_residuals: false,
            restart: 0,
            choose_codec_anew: false,
            peer_timeout: PEER_TIMEOUT,
            join_within: JOIN_WITHIN,
            epoch: 1,
            token: "token".into(),
            metrics_address: None,
        };
        let mut world = Self {
            random: Random::new(setting.seed ^ 0x5A5A),
            now: Duration::ZERO,
            network,
            ranks,
            coordinator: Some(State::new(options)),
            ending: None,
            events: BTreeMap::new(),
            last_words: vec![[Duration::ZERO; 2]; setting.ranks],
            completed: 0,
            announced: false,
            struck: None,
            story: Vec::new(),
            setting,
        };
        for rank in 0..world.setting.ranks {
            let at = world.random.duration(Duration::from_millis(100));
            world.at(at, Event::Joins(rank));
        }
        world.at(Duration::ZERO, Event::Ticks);
        if world.is_faulty() {
            match (world.setting.fault, world.setting.fault_at) {
                (Fault::Differs(_), _) => world.at(Duration::ZERO, Event::Fault),
                (_, When::At(at)) => world.at(at, Event::Fault),
                (_, When::Steps(_)) => {}
            }
        }
        world
    }

    /// Whether something is to happen to it that no run survives, or may not.
    fn is_faulty(&self) -> bool {
        !matches!(self.setting.fault, Fault::None | Fault::Slow(_) | Fault::Nan(..))
    }

    /// Whether that has happened while somebody was there.
    pub(super) fn is_struck(&self) -> Option<bool> {
        (self.is_faulty() && !matches!(self.setting.fault, Fault::Differs(_))).then_some(self.struck.is_some())
    }

    /// Everything that happened, in words.
    pub(super) fn story(&self) -> Vec<String> {
        self.story.clone()
    }

    /// Runs to the end: the hashes of the parameters after each step that somebody completed.
    pub(super) fn run(&mut self) -> Result<Vec<blake3::Hash>, String> {
        while self.ranks.iter().any(Rank::is_alive) {
            self.happens()?;
        }
        self.check()
    }

    /// The next thing: an engine's turn, or whatever comes first.
    fn happens(&mut self) -> Result<(), String> {
        if self.now > HANG {
            let doing: Vec<_> = self.ranks.iter().map(|rank| &rank.doing).collect();
            return Err(format!("hangs: {doing:?}"));
        }
        let mut due = Vec::new();
        for (number, rank) in self.ranks.iter_mut().enumerate() {
            if rank.is_alive() && rank.turns.is_due() {
                due.push(number);
            }
        }
        // Now and then an engine's thread is late.
        if !due.is_empty() && self.random.below(8) > 0 {
            let rank = due[self.random.below(due.len() as u64) as usize];
            self.ranks[rank].turns.turn();
            self.with(rank, Rank::go_on);
            return Ok(());
        }
        let (event, message) = (self.events.keys().next().map(|&(at, _)| at), self.network.next());
        if message.is_some_and(|message| event.is_none_or(|event| message < event)) {
            self.now = self.now.max(message.unwrap_or_default());
            self.network.advance(self.now);
        } else if let Some(((at, _), event)) = self.events.pop_first() {
            self.now = self.now.max(at);
            self.network.advance(self.now);
            self.event(event);
        }
        Ok(())
    }

    fn at(&mut self, at: Duration, event: Event) {
        let tie = self.random.next();
        self.events.insert((at, tie), event);
    }

    fn after(&mut self, longest: Duration, event: Event) {
        let at = self.now + self.random.duration(longest);
        self.at(at, event);
    }

    /// Lets a rank do something, and carries what it says to the coordinator.
    fn with(&mut self, rank: usize, act: impl FnOnce(&mut Rank, &mut dyn FnMut(From))) {
        if !self.ranks[rank].is_alive() {
            return;
        }
        let (before, step) = (self.ranks[rank].doing.clone(), self.ranks[rank].hashes.len());
        let mut said = Vec::new();
        act(&mut self.ranks[rank], &mut |what| said.push(what));
        for what in said {
            self.word(rank, 0, |rank| Event::ToCoordinator(rank, what));
        }
        let doing = self.ranks[rank].doing.clone();
        self.completed += self.ranks[rank].hashes.len() - step;
        if let When::Steps(steps) = self.setting.fault_at
            && (self.completed >= steps)
            && !self.announced
            && self.is_struck() == Some(false)
        {
            self.announced = true;
            self.after(self.setting.compute + self.setting.quality.delay_max, Event::Fault);
        }
        if doing != before || self.ranks[rank].hashes.len() > step {
            self.story.push(format!("{:?} rank {rank} {doing:?}", self.now));
        }
        if doing == Doing::Computing && (before != doing || self.ranks[rank].hashes.len() > step) {
            self.computes(rank);
        }
        if !self.ranks[rank].is_alive() {
            self.leaves(rank, "its process ended");
        }
    }

    fn computes(&mut self, rank: usize) {
        let slow = if self.setting.fault == Fault::Slow(rank) { 20 } else { 1 };
        self.after(self.setting.compute * slow, Event::Computes(rank));
    }

    /// A process is no more.
    fn leaves(&mut self, rank: usize, why: &str) {
        self.network.kill(rank, why);
        self.word(rank, 0, Event::Closes);
    }

    /// A word between a rank and the coordinator: to the coordinator (0) or from it (1).
    fn word(&mut self, rank: usize, way: usize, event: impl FnOnce(usize) -> Event) {
        let at = self.now + self.random.duration(self.setting.quality.delay_max);
        let at = at.max(self.last_words[rank][way] + Duration::from_nanos(1));
        self.last_words[rank][way] = at;
        self.at(at, event(rank));
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Joins(rank) => {
                self.with(rank, |rank, say| say(rank.hello()));
                self.at(self.now, Event::Beats(rank));
            }
            Event::Computes(rank) => {
                self.with(rank, Rank::compute);
                self.with(rank, Rank::go_on);
                if self.ranks[rank].doing == Doing::Computing && !self.ranks[rank].stuck {
                    self.computes(rank);
                }
            }
            Event::Beats(rank) => {
                let now = self.now;
                self.with(rank, |rank, say| rank.beat(now, say));
                if self.ranks[rank].is_alive() {
                    self.at(now + interval(PEER_TIMEOUT), Event::Beats(rank));
                }
            }
            Event::Ticks => {
                match self.setting.blind {
                    false => self.tell(Input::Tick),
                    true => (0..self.ranks.len()).for_each(|rank| {
                        self.word(rank, 1, |rank| Event::ToWorker(rank, To::Beat(Beat {})));
                    }),
                }
                if self.coordinator.is_some() {
                    self.at(self.now + interval(PEER_TIMEOUT), Event::Ticks);
                }
            }
            Event::ToCoordinator(rank, From::Hello(hello)) => {
                self.tell(Input::Hello { connection: rank as u64, hello, differences: Vec::new() });
            }
            Event::ToCoordinator(rank, what) => self.tell(Input::Message { connection: rank as u64, what }),
            Event::Closes(rank) => {
                self.tell(Input::Closed { connection: rank as u64, how: "the connection was closed".into() });
            }
            Event::ToWorker(rank, what) => {
                let now = self.now;
                self.with(rank, |rank, say| rank.hear(now, what, say));
            }
            Event::Fault => self.strike(),
        }
    }

    fn tell(&mut self, input: Input) {
        let Some(coordinator) = &mut self.coordinator else { return };
        for output in coordinator.handle(self.now, input) {
            match output {
                Output::Send { connection, what } => {
                    self.word(connection as usize, 1, |rank| Event::ToWorker(rank, what));
                }
                Output::Close { .. } => {}
                Output::End(ending) => {
                    self.story.push(format!("{:?} the end: {}", self.now, ending.verdict));
                    self.ending = Some(ending);
                }
            }
        }
    }

    fn strike(&mut self) {
        let early = |rank: usize, world: &Self| world.ranks[rank].hashes.len() < 2;
        let fault = self.setting.fault;
        let again = match fault {
            // Before a step is complete nobody knows how long one may take.
            Fault::Stuck(rank) => early(rank, self),
            Fault::Fail(rank) => self.ranks[rank].doing == Doing::Starting,
            Fault::Cut(a, b) | Fault::Silence(a, b) | Fault::Damage(a, b) => {
                [a, b].iter().any(|&rank| self.ranks[rank].doing == Doing::Starting)
            }
            Fault::Parted(_) => self.ranks.iter().any(|rank| rank.doing == Doing::Starting),
            _ => false,
        };
        if again && self.ending.is_none() {
            return self.after(Duration::from_millis(200), Event::Fault);
        }
        let all_run = self.ranks.iter().all(|rank| rank.doing != Doing::Starting);
        self.struck = Some((self.now, all_run));
        self.story.push(format!("{:?} {fault:?}", self.now));
        match fault {
            Fault::None | Fault::Slow(_) | Fault::Nan(..) | Fault::Differs(_) => {}
            Fault::Kill(rank) if self.ranks[rank].is_alive() => {
                self.ranks[rank].doing = Doing::Gone;
                self.leaves(rank, "the connection was closed");
            }
            Fault::Stop(rank) if self.ranks[rank].is_alive() => self.ranks[rank].doing = Doing::Gone,
            Fault::Kill(_) | Fault::Stop(_) => {}
            Fault::Stuck(rank) => self.ranks[rank].stuck = true,
            Fault::Fail(rank) => self.ranks[rank].fails = true,
            Fault::Cut(a, b) => self.network.cut(a, b, "connection reset"),
            Fault::Silence(a, b) => self.network.silence(a, b),
            Fault::Parted(first) => {
                let ranks = self.ranks.len();
                let pairs = (0..first).flat_map(|a| (first..ranks).map(move |b| (a, b)));
                pairs.for_each(|(a, b)| self.network.silence(a, b));
            }
            Fault::Damage(from, to) => self.network.damage(from, to),
            Fault::KillCoordinator => {
                self.coordinator = None;
                for rank in 0..self.ranks.len() {
                    self.with(rank, |rank, _| rank.end("the coordinator closed the connection".into()));
                }
            }
            Fault::StopCoordinator => self.coordinator = None,
        }
    }

    /// What must hold at the end, whatever happened.
    fn check(&self) -> Result<Vec<blake3::Hash>, String> {
        let longest = self.ranks.iter().map(|rank| &rank.hashes).max_by_key(|hashes| hashes.len());
        let longest = longest.cloned().unwrap_or_default();
        if let Some(rank) = self.ranks.iter().find(|rank| !longest.starts_with(&rank.hashes)) {
            return Err(format!("rank {} has other parameters", rank.rank));
        }
        if self.ranks.iter().all(|rank| rank.doing == Doing::Done) {
            return Ok(longest);
        }
        let fault = self.setting.expects;
        let Some((struck, all_run)) = self.struck.filter(|_| !fault.is_harmless()) else {
            return Err(format!("ends without a reason: {:?}", self.story));
        };
        let took = self.now - struck;
        if all_run && fault.is_told_at_once() && took > PEER_TIMEOUT + 4 * self.setting.quality.delay_max {
            return Err(format!("ends only after {took:?}: {:#?}", self.story));
        }
        for rank in self.ranks.iter().filter(|rank| !fault.silences(rank.rank)) {
            let is_named = match &rank.doing {
                Doing::Ended(verdict) => fault.is_named(verdict),
                // What comes after its last step is no business of its.
                doing => *doing == Doing::Done,
            };
            if !is_named {
                return Err(format!("rank {} does not name {fault:?}: {:?}\n{:#?}", rank.rank, rank.doing, self.story));
            }
        }
        Ok(longest)
    }
}
