//! The state machine under a forged clock: every scene says what comes when, and what has to follow.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::wire::control::{Held, Holds, Leaving, Mark, Part, Prepared, Property, Refused, Seen};

mod checkpoints;
mod codec;
mod end;
mod gone;
mod reports;
mod silent;
mod start;
mod stuck;

const PEER_TIMEOUT: Duration = Duration::from_secs(2);
/// Of the peer timeout above: see `interval`.
const BEAT: Duration = Duration::from_millis(100);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn options(ranks: usize) -> Options {
    Options {
        ranks,
        version: "1.0".into(),
        recipe: "steps = 3".into(),
        name: "run".into(),
        resume: true,
        resume_from_earlier: false,
        resume_without_residuals: false,
        restart: 0,
        choose_codec_anew: false,
        metrics_address: None,
        peer_timeout: PEER_TIMEOUT,
        join_within: Duration::from_secs(60),
        epoch: 7,
        token: "token".into(),
        host: "box".into(),
        pid: 1,
    }
}

fn hello(worker: usize, rank: Option<u32>) -> Hello {
    Hello { version: "1.0".into(), rank, host: "box".into(), pid: 100 + worker as u32, recipe: None }
}

fn nonce(rank: usize) -> String {
    format!("nonce-{rank}")
}

fn prepared(rank: usize, properties: &[(&str, &str)]) -> From {
    let property = |&(name, value): &(&str, &str)| Property { name: name.into(), value: value.into() };
    From::Prepared(Prepared {
        data_address: format!("127.0.0.1:{}", 1000 + rank),
        properties: properties.iter().map(property).collect(),
        nonce: nonce(rank),
    })
}

fn held(step: u64, id: &str) -> Held {
    Held { step, id: id.into() }
}

fn mark(step: u64, progress: u64, text: &str) -> Mark {
    Mark {
        step,
        progress,
        text: text.into(),
        waits: text.contains("waiting"),
        slow: text.contains("export"),
        numbers: None,
    }
}

fn part(step: u64, json: &str) -> From {
    From::Part(Part { step, json: json.into(), error: None })
}

fn leaving(hash: &str, code: u32) -> From {
    From::Leaving(Leaving { step: 3, parameter_hash: hash.into(), code, ..Leaving::default() })
}

fn failing(error: &str, code: u32) -> From {
    From::Leaving(Leaving { step: 3, error: Some(error.into()), code, ..Leaving::default() })
}

/// A coordinator, its clock, and all that it did. Worker `n` has connection `n`.
struct Scene {
    state: State,
    now: Duration,
    sent: BTreeMap<usize, Vec<To>>,
    closed: Vec<usize>,
    endings: Vec<Ending>,
}

impl Scene {
    fn new(options: Options) -> Self {
        let state = State::new(options);
        Self { state, now: Duration::ZERO, sent: BTreeMap::new(), closed: Vec::new(), endings: Vec::new() }
    }

    /// A run whose ranks all share a folder and have started.
    fn running(ranks: usize) -> Self {
        let together: Vec<usize> = vec![0; ranks];
        Self::placed(&together)
    }

    /// A run that has started; ranks with the same number share a folder.
    fn placed(folders: &[usize]) -> Self {
        let ranks = folders.len();
        let mut scene = Self::new(options(ranks));
        (0..ranks).for_each(|worker| scene.join(worker, None));
        (0..ranks).for_each(|worker| scene.says(worker, prepared(worker, &[])));
        for worker in 0..ranks {
            let nonces = (0..ranks).filter(|&other| folders[other] == folders[worker]).map(nonce).collect();
            scene.says(worker, From::Seen(Seen { nonces }));
        }
        (0..ranks).for_each(|worker| scene.says(worker, From::Holds(Holds::default())));
        assert!((0..ranks).all(|worker| matches!(scene.heard(worker).last(), Some(To::Start(_)))));
        scene.sent.clear();
        scene
    }

    fn give(&mut self, input: Input) {
        for output in self.state.handle(self.now, input) {
            match output {
                Output::Send { connection, what } => self.sent.entry(connection as usize).or_default().push(what),
                Output::Close { connection } => self.closed.push(connection as usize),
                Output::End(ending) => self.endings.push(ending),
            }
        }
    }

    fn join(&mut self, worker: usize, rank: Option<u32>) {
        self.give(Input::Hello { connection: worker as u64, hello: hello(worker, rank), differences: Vec::new() });
    }

    fn says(&mut self, worker: usize, what: From) {
        self.give(Input::Message { connection: worker as u64, what });
    }

    fn closes(&mut self, worker: usize) {
        self.give(Input::Closed { connection: worker as u64, how: "it closed its connection without a word".into() });
    }

    fn exits(&mut self, worker: usize, how: &str, code: Option<i32>) {
        self.give(Input::Exited { pid: 100 + worker as u32, how: how.into(), code });
    }

    /// Time passes in ticks; before each one, workers send the heartbeats that `beat` has for them.
    fn pass(&mut self, span: Duration, mut beat: impl FnMut(usize, Duration) -> Option<Mark>) {
        let until = self.now + span;
        while self.now < until {
            self.now += BEAT;
            for worker in 0..self.state.options.ranks {
                if let Some(mark) = beat(worker, self.now) {
                    self.says(worker, From::Beat(mark));
                }
            }
            self.give(Input::Tick);
        }
    }

    /// Everything but heartbeats that a worker was sent.
    fn heard(&self, worker: usize) -> Vec<To> {
        let all = self.sent.get(&worker).into_iter().flatten();
        all.filter(|what| !matches!(what, To::Beat(_))).cloned().collect()
    }

    fn rank(&self, worker: usize) -> usize {
        match &self.heard(worker)[0] {
            To::Welcome(welcome) => welcome.rank as usize,
            other => panic!("not a welcome: {other:?}"),
        }
    }

    fn refusal(&self, worker: usize) -> &Refused {
        assert!(self.closed.contains(&worker), "the connection of a refused worker is closed");
        match &self.sent[&worker][..] {
            [To::Refused(refused)] => refused,
            other => panic!("not a refusal: {other:?}"),
        }
    }

    #[track_caller]
    fn ended(&self, verdict: &str, code: u8) {
        assert_eq!(self.endings, [Ending { verdict: verdict.into(), code }]);
        assert_eq!(self.state.ended(), self.endings.first());
    }

    #[track_caller]
    fn goes_on(&self) {
        assert_eq!(self.endings, []);
    }

    /// Which ranks were told to end, all with the verdict.
    fn aborted(&self) -> Vec<usize> {
        let told = |worker: &usize| match self.heard(*worker).last() {
            Some(To::Abort(abort)) => {
                assert_eq!((&abort.verdict, abort.code), (&self.endings[0].verdict, self.endings[0].code.into()));
                true
            }
            _ => false,
        };
        (0..self.state.options.ranks).filter(told).collect()
    }
}

/// A worker that computes: its progress grows with time.
fn busy(_: usize, now: Duration) -> Option<Mark> {
    Some(mark(1 + now.as_secs(), now.as_millis() as u64, "in the forward pass"))
}

/// Everybody is busy but for one, who says nothing.
fn busy_but(silent: usize) -> impl FnMut(usize, Duration) -> Option<Mark> {
    move |worker, now| if worker == silent { None } else { busy(worker, now) }
}
