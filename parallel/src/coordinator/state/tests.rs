//! The state machine under a forged clock: every scene says what comes when, and what has to follow.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::control::{
    CodecChoice, CodecElements, CodecFacts, CodecSpeed, Committed, Held, Holds, Leaving, Lost, Mark, Part, Peer,
    Prepared, Property, Seen, Settled, Start,
};

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

// ---- the start

/// Walks all workers through the start; `pick` says whose next message comes next. Returns the rank of each worker.
fn walk(ranks: usize, wishes: &[Option<u32>], mut pick: impl FnMut(usize) -> usize) -> (Scene, Vec<usize>) {
    let mut scene = Scene::new(options(ranks));
    let mut stages = vec![0; ranks];
    loop {
        // A worker goes on when it has the answer to what it said last.
        let ready: Vec<usize> =
            (0..ranks).filter(|&worker| stages[worker] < 4 && scene.heard(worker).len() == stages[worker]).collect();
        let Some(&worker) = ready.get(pick(ready.len().max(1))) else { break };
        match stages[worker] {
            0 => scene.join(worker, wishes[worker]),
            1 => scene.says(worker, prepared(scene.rank(worker), &[("backend", "flex")])),
            2 => scene.says(worker, From::Seen(Seen { nonces: (0..ranks).map(nonce).collect() })),
            _ => {
                let checkpoints = if scene.rank(worker) == 0 { vec![held(4, "a"), held(8, "b")] } else { Vec::new() };
                scene.says(worker, From::Holds(Holds { checkpoints }));
            }
        }
        stages[worker] += 1;
        scene.now += ms(7);
        scene.give(Input::Tick);
    }
    let ranks = (0..ranks).map(|worker| scene.rank(worker)).collect();
    (scene, ranks)
}

/// Every worker heard the same, in the same order, and the peers stand at their ranks.
fn check_start(scene: &Scene, rank_of: &[usize]) {
    let ranks = rank_of.len();
    assert_eq!(rank_of.iter().copied().collect::<BTreeSet<_>>(), (0..ranks).collect());
    scene.goes_on();
    for worker in 0..ranks {
        let [To::Welcome(welcome), To::Look(look), To::Places(places), To::Start(start)] = &scene.heard(worker)[..]
        else {
            panic!("worker {worker} heard {:?}", scene.heard(worker));
        };
        assert_eq!((welcome.ranks as usize, &*welcome.recipe, &*welcome.name), (ranks, "steps = 3", "run"));
        assert_eq!((welcome.resume, welcome.peer_timeout_s), (true, 2.0));
        assert_eq!(look.nonces, (0..ranks).map(nonce).collect::<Vec<_>>());
        assert_eq!(places.lead_of, vec![0; ranks]);
        let Start { epoch, token, peers, from } = start;
        assert_eq!((*epoch, &**token, from), (7, "token", &Some(held(8, "b"))));
        for (worker, &rank) in rank_of.iter().enumerate() {
            let data_address = format!("127.0.0.1:{}", 1000 + rank);
            assert_eq!(peers[rank], Peer { data_address, host: "box".into(), pid: 100 + worker as u32 });
        }
    }
}

proptest! {
    #[test]
    fn any_order_of_messages_starts_the_same_run(
        ranks in prop::sample::select(vec![1usize, 2, 4]),
        wishing in any::<bool>(),
        order in Just((0u32..4).collect::<Vec<_>>()).prop_shuffle(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 32),
    ) {
        let wishes = order.into_iter().filter(|&rank| rank < ranks as u32).map(|rank| wishing.then_some(rank));
        let wishes: Vec<_> = wishes.collect();
        let mut picks = picks.into_iter();
        let (scene, rank_of) = walk(ranks, &wishes, |n| picks.next().map_or(0, |pick| pick.index(n)));
        check_start(&scene, &rank_of);
        if wishing {
            prop_assert_eq!(rank_of, wishes.into_iter().flatten().map(|rank| rank as usize).collect::<Vec<_>>());
        }
    }
}

#[test]
fn ranks_go_by_wish_and_else_by_order() {
    let check = |wishes: &[Option<u32>], expected: &[usize]| {
        let mut scene = Scene::new(options(3));
        wishes.iter().enumerate().for_each(|(worker, &wish)| scene.join(worker, wish));
        let ranks: Vec<usize> = (0..wishes.len()).map(|worker| scene.rank(worker)).collect();
        assert_eq!(ranks, expected, "{wishes:?}");
    };
    check(&[None, None, None], &[0, 1, 2]);
    check(&[Some(1), None, None], &[1, 0, 2]);
    check(&[Some(2), Some(1), Some(0)], &[2, 1, 0]);
    check(&[None, Some(2), None], &[0, 2, 1]);
}

#[test]
fn a_worker_that_does_not_fit_is_refused_and_told_why() {
    // Rank 0 is taken.
    let refusal = |hello: Hello, differences: &[&str]| {
        let mut scene = Scene::new(options(2));
        scene.join(0, Some(0));
        let differences = differences.iter().map(|&key| key.to_owned()).collect();
        scene.give(Input::Hello { connection: 1, hello, differences });
        let refused = scene.refusal(1).clone();
        scene.goes_on();
        // The one that is in, and a good second one, are not disturbed.
        assert_eq!((scene.rank(0), scene.closed.clone()), (0, vec![1]));
        scene.join(2, None);
        assert_eq!(scene.rank(2), 1);
        (refused.why, refused.again)
    };
    let check = |hello: Hello, differences: &[&str], why: &str| {
        assert_eq!(refusal(hello, differences), (why.to_owned(), false));
    };
    let version = |version: &str| Hello { version: version.into(), ..hello(1, None) };
    check(version("0.9"), &[], "it is version 0.9, the coordinator is 1.0: run the same build on every machine");
    check(
        hello(1, None),
        &["optimizer.lr: 0.1, here 0.2", "train.steps: 5, here 3"],
        "its recipe differs from the coordinator's:\n  optimizer.lr: 0.1, here 0.2\n  train.steps: 5, here 3",
    );
    check(
        hello(1, Some(0)),
        &[],
        "rank 0 (host box, process 100) has joined already: give each worker a rank of its own",
    );
    check(hello(1, Some(2)), &[], "it asks for rank 2, the recipe's mesh has ranks 0 to 1");
    check(hello(1, Some(u32::MAX)), &[], "it asks for rank 4294967295, the recipe's mesh has ranks 0 to 1");
    // What a stranger writes does not fill a log or a terminal.
    let (why, _) = refusal(version(&format!("\x1b[2J\n{}", "x".repeat(1 << 20))), &[]);
    assert!(why.len() < 200 && !why.contains(['\x1b', '\n']), "{why}");
}

#[test]
fn a_full_mesh_refuses_for_good_and_an_ending_run_only_for_now() {
    let mut scene = Scene::running(2);
    scene.join(2, None);
    let full = "the recipe's mesh has 2 ranks and all of them have joined";
    assert_eq!(*scene.refusal(2), Refused { why: full.into(), again: false });
    // A worker that was started again before the coordinator has given up its predecessor.
    scene.closes(1);
    scene.join(3, None);
    assert_eq!(*scene.refusal(3), Refused { why: full.into(), again: true });
    scene.join(4, Some(1));
    assert!(scene.refusal(4).again);
    scene.goes_on();
    scene.pass(ms(300), busy);
    assert_eq!(scene.endings.len(), 1);
    scene.join(5, None);
    assert_eq!(*scene.refusal(5), Refused { why: "the run is ending".into(), again: true });
}

/// What a connection without a rank says is no input at all.
#[test]
fn nobody_speaks_before_a_greeting_was_accepted() {
    let mut scene = Scene::new(options(1));
    scene.says(5, failing("I was never here", 1));
    scene.says(5, prepared(0, &[]));
    scene.closes(5);
    scene.give(Input::Hello { connection: 6, hello: hello(6, Some(9)), differences: Vec::new() });
    scene.says(6, failing("nor was I", 1));
    scene.goes_on();
    scene.join(0, None);
    assert_eq!(scene.rank(0), 0);
}

#[test]
fn ranks_that_differ_are_named_with_both_values_and_hosts() {
    let check = |first: &[(&str, &str)], second: &[(&str, &str)], faults: &[&str]| {
        let mut scene = Scene::new(options(2));
        scene.join(0, None);
        scene.join(1, None);
        scene.says(0, prepared(0, first));
        scene.says(1, prepared(1, second));
        if faults.is_empty() {
            scene.goes_on();
            assert!(matches!(scene.heard(1).last(), Some(To::Look(_))));
        } else {
            let faults: Vec<String> = faults.iter().map(|fault| format!("\n  {fault}")).collect();
            scene.ended(&format!("the ranks differ where they must be the same:{}", faults.concat()), 2);
            assert_eq!(scene.aborted(), [0, 1]);
        }
    };
    let (zero, one) = ("rank 0 (host box, process 100)", "rank 1 (host box, process 101)");
    check(&[("backend", "flex"), ("text", "abc")], &[("backend", "flex"), ("text", "abc")], &[]);
    check(&[("backend", "flex"), ("text", "abc")], &[("text", "abc"), ("backend", "flex")], &[]);
    check(
        &[("backend", "flex"), ("text", "abc"), ("kind", "cpu")],
        &[("backend", "libtorch"), ("text", "abd"), ("kind", "cpu")],
        &[&format!("backend: {zero} has flex, {one} has libtorch"), &format!("text: {zero} has abc, {one} has abd")],
    );
    check(&[("text", "abc")], &[], &[&format!("text: {zero} has abc, {one} has nothing")]);
    check(&[], &[("text", "abc")], &[&format!("text: {zero} has nothing, {one} has abc")]);
}

#[test]
fn the_lowest_rank_of_a_folder_leads_it() {
    // For each rank, whose nonces it sees.
    let check = |sees: &[&[usize]], expected: &[u32]| {
        let mut scene = Scene::new(options(sees.len()));
        (0..sees.len()).for_each(|worker| scene.join(worker, None));
        (0..sees.len()).for_each(|worker| scene.says(worker, prepared(worker, &[])));
        for (worker, seen) in sees.iter().enumerate() {
            scene.says(worker, From::Seen(Seen { nonces: seen.iter().copied().map(nonce).collect() }));
        }
        for worker in 0..sees.len() {
            match scene.heard(worker).last() {
                Some(To::Places(places)) => assert_eq!(places.lead_of, expected, "{sees:?}"),
                other => panic!("{other:?}"),
            }
        }
    };
    check(&[&[0]], &[0]);
    check(&[&[0, 1], &[0, 1]], &[0, 0]);
    check(&[&[0], &[1]], &[0, 1]);
    check(&[&[0, 1], &[0, 1], &[2, 3], &[2, 3]], &[0, 0, 2, 2]);
    check(&[&[0, 2], &[1, 3], &[0, 2], &[1, 3]], &[0, 1, 0, 1]);
    // To see is not to share: only one side sees the other, or nobody sees even itself.
    check(&[&[0, 1], &[1]], &[0, 1]);
    check(&[&[0], &[0, 1]], &[0, 1]);
    check(&[&[], &[]], &[0, 1]);
    // To share is transitive, whatever rank is in the middle: nobody follows a rank that follows another.
    check(&[&[0, 1], &[0, 1, 2], &[1, 2]], &[0, 0, 0]);
    check(&[&[0, 2], &[1, 2], &[0, 1, 2]], &[0, 0, 0]);
}

/// Leads of these folders hold these checkpoints; `Err` has the lines of the refusal.
fn check_common(folders: &[usize], holds: &[&[(u64, &str)]], expected: Result<Option<(u64, &str)>, &[&str]>) {
    let ranks = folders.len();
    let mut scene = Scene::new(options(ranks));
    (0..ranks).for_each(|worker| scene.join(worker, None));
    (0..ranks).for_each(|worker| scene.says(worker, prepared(worker, &[])));
    for worker in 0..ranks {
        let nonces = (0..ranks).filter(|&other| folders[other] == folders[worker]).map(nonce).collect();
        scene.says(worker, From::Seen(Seen { nonces }));
    }
    for (worker, holds) in holds.iter().enumerate() {
        let checkpoints = holds.iter().map(|&(step, id)| held(step, id)).collect();
        scene.says(worker, From::Holds(Holds { checkpoints }));
    }
    match expected {
        Ok(expected) => {
            scene.goes_on();
            match scene.heard(ranks - 1).last() {
                Some(To::Start(start)) => assert_eq!(start.from, expected.map(|(step, id)| held(step, id))),
                other => panic!("{other:?}"),
            }
        }
        Err(lines) => {
            let text = "--resume: the machines have no checkpoint of this run in common:";
            let way_out = "copy the run's folder from the machine that has the newest one; where they come from a store, \
                           remove the copies there that are damaged";
            scene.ended(&format!("{text}\n  {}\n{way_out}", lines.join("\n  ")), 2);
            assert_eq!(scene.aborted(), (0..ranks).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_run_goes_on_from_the_newest_checkpoint_that_every_folder_has() {
    check_common(&[0], &[&[]], Ok(None));
    check_common(&[0, 0], &[&[], &[]], Ok(None));
    check_common(&[0, 1], &[&[], &[]], Ok(None));
    check_common(&[0, 0], &[&[(2, "a"), (4, "b")], &[]], Ok(Some((4, "b"))));
    check_common(&[0, 1], &[&[(2, "a"), (4, "b")], &[(4, "b"), (2, "a")]], Ok(Some((4, "b"))));
    // One machine's newest commit is missing on the other: the one before it is what both have.
    check_common(&[0, 1], &[&[(2, "a"), (4, "b")], &[(2, "a")]], Ok(Some((2, "a"))));
    check_common(&[0, 1, 0], &[&[(2, "a")], &[(2, "a"), (6, "c")], &[]], Ok(Some((2, "a"))));
    // Two runs of one name, each of which wrote its own step 4.
    let (zero, one) = ("rank 0 (host box, process 100)", "rank 1 (host box, process 101)");
    check_common(
        &[0, 1],
        &[&[(2, "a"), (4, "b")], &[(4, "x")]],
        Err(&[&format!("{zero}: step 2 (a), step 4 (b)"), &format!("{one}: step 4 (x)")]),
    );
    check_common(&[0, 1], &[&[(2, "a")], &[]], Err(&[&format!("{zero}: step 2 (a)"), &format!("{one}: none")]));
}

#[test]
fn a_start_that_takes_too_long_names_whom_it_waits_for() {
    let check = |reach: usize, lines: &[&str]| {
        let mut scene = Scene::new(options(3));
        scene.join(0, None);
        scene.says(0, prepared(0, &[]));
        if reach > 0 {
            scene.join(1, None);
            scene.join(2, None);
        }
        if reach > 1 {
            scene.says(1, prepared(1, &[]));
            scene.says(2, prepared(2, &[]));
            scene.says(0, From::Seen(Seen { nonces: Vec::new() }));
        }
        let starting = |_: usize, _: Duration| Some(mark(0, 0, "starting"));
        scene.pass(Duration::from_secs(60), starting);
        scene.goes_on();
        scene.pass(BEAT, starting);
        let lines: Vec<String> = lines.iter().map(|line| format!("\n  {line}")).collect();
        let before = "the run has not started within 60 s (parallel.join_timeout_s):";
        scene.ended(&format!("{before}{}\nstart what is missing sooner, or allow more time", lines.concat()), 75);
    };
    let one = "rank 1 (host box, process 101)";
    let two = "rank 2 (host box, process 102)";
    check(0, &["rank 1 has not joined", "rank 2 has not joined"]);
    let unready = "has joined but is not ready: starting";
    check(1, &[&format!("{one} {unready}"), &format!("{two} {unready}")]);
    let unseen = "has not said which run folders it sees: starting";
    check(2, &[&format!("{one} {unseen}"), &format!("{two} {unseen}")]);
}

// ---- who is lost

#[test]
fn the_silent_rank_is_named_after_three_quarters_of_the_timeout() {
    let run = |silent: Option<usize>| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), |_, _| Some(mark(7, 70, "step 7, waiting for the other ranks")));
        scene.says(1, From::Beat(mark(7, 71, "step 7, in the backward pass, 3 buckets full")));
        let beat =
            move |worker, _| (Some(worker) != silent).then(|| mark(7, 70, "step 7, waiting for the other ranks"));
        scene.pass(ms(1500), beat);
        scene.goes_on();
        scene.pass(BEAT, beat);
        scene
    };
    let scene = run(Some(1));
    scene.ended(
        "rank 1 (host box, process 101) has been silent for 1.6 s; it was last seen at step 7, in the backward pass, \
         3 buckets full\n  rank 0 (host box, process 100): step 7, waiting for the other ranks\n  rank 2 (host box, \
         process 102): step 7, waiting for the other ranks",
        75,
    );
    assert_eq!(scene.aborted(), [0, 1, 2]);
    // The same inputs with its heartbeats.
    run(None).goes_on();
}

#[test]
fn of_several_silent_ranks_the_one_silent_for_longest_is_named_and_the_others_shown() {
    let mut scene = Scene::running(3);
    scene.pass(ms(1600), |worker, now| (worker == 0 || (worker == 1 && now < ms(300))).then(|| mark(0, 0, "busy")));
    scene.ended(
        "rank 2 (host box, process 102) has been silent for 1.6 s\n  rank 0 (host box, process 100): busy\n  rank 1 \
         (host box, process 101): busy, silent for 1.4 s",
        75,
    );
}

#[test]
fn silence_also_ends_a_start() {
    let mut scene = Scene::new(options(2));
    scene.join(0, None);
    scene.pass(ms(1600), |_, _| None);
    scene.ended("rank 0 (host box, process 100) has been silent for 1.6 s", 75);
}

#[test]
fn a_coordinator_that_slept_blames_nobody() {
    let check = |before: &dyn Fn(&mut Scene), slept: Duration, blames: bool| {
        let mut scene = Scene::running(2);
        scene.pass(ms(500), busy);
        before(&mut scene);
        scene.now += slept;
        scene.give(Input::Tick);
        assert_eq!(!scene.endings.is_empty(), blames, "{:?}", scene.endings);
        scene
    };
    let nothing = |_: &mut Scene| {};
    let mut scene = check(&nothing, Duration::from_secs(3600), false);
    // From there on everything counts again.
    scene.pass(ms(1500), |worker, now| if worker == 0 { busy(worker, now) } else { None });
    scene.goes_on();
    scene.pass(BEAT, busy);
    scene.goes_on();
    scene.pass(ms(1600), |worker, now| if worker == 0 { busy(worker, now) } else { None });
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent"));
    // What was seen shortly before has its time to be cleared up.
    let closed = |scene: &mut Scene| scene.closes(1);
    let mut scene = check(&closed, Duration::from_secs(3600), false);
    scene.says(1, failing("disk full", 1));
    scene.ended("rank 1 (host box, process 101) failed: disk full", 1);
    let lost = |scene: &mut Scene| scene.says(0, From::Lost(Lost { rank: 1, why: "connection closed".into() }));
    let mut scene = check(&lost, Duration::from_secs(3600), false);
    scene.exits(1, "was killed by SIGKILL", None);
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) was killed by SIGKILL"));
    // The control: a gap that is not yet sleep.
    check(&closed, ms(500), true);
}

#[test]
fn the_sleep_of_the_coordinator_does_not_count_against_the_start() {
    let mut scene = Scene::new(options(2));
    scene.join(0, None);
    scene.give(Input::Tick);
    scene.now += Duration::from_secs(3600);
    scene.give(Input::Tick);
    scene.pass(Duration::from_secs(59), |_, _| Some(mark(0, 0, "starting")));
    scene.goes_on();
    scene.pass(Duration::from_secs(2), |_, _| Some(mark(0, 0, "starting")));
    assert!(scene.endings[0].verdict.contains("\n  rank 1 has not joined\n"));
}

#[test]
fn a_closed_connection_without_a_word_is_blamed_after_a_moment() {
    let run = |word: Option<From>| {
        let mut scene = Scene::running(2);
        scene.pass(ms(500), busy);
        scene.closes(1);
        scene.pass(ms(200), busy_but(1));
        scene.goes_on();
        if let Some(word) = word {
            scene.says(1, word);
        }
        scene.pass(BEAT, busy_but(1));
        scene
    };
    let scene = run(None);
    scene.ended(
        "rank 1 (host box, process 101) is gone: it closed its connection without a word; it was last seen at in the \
         forward pass\n  rank 0 (host box, process 100): in the forward pass",
        75,
    );
    // Nothing is sent to a connection that is gone.
    assert_eq!(scene.aborted(), [0]);
    run(Some(leaving("abc", 0))).goes_on();
}

/// Everybody is busy but for one, who says nothing.
fn busy_but(silent: usize) -> impl FnMut(usize, Duration) -> Option<Mark> {
    move |worker, now| if worker == silent { None } else { busy(worker, now) }
}

#[test]
fn a_process_that_a_signal_ended_is_blamed_at_once() {
    let mut scene = Scene::running(2);
    scene.exits(1, "was killed by SIGKILL", None);
    scene.ended("rank 1 (host box, process 101) was killed by SIGKILL\n  rank 0 (host box, process 100): joining", 75);
}

#[test]
fn a_process_of_the_same_number_on_another_host_is_not_blamed() {
    let mut scene = Scene::running(2);
    scene.state.options.host = "another box".into();
    scene.exits(1, "was killed by SIGKILL", None);
    scene.ended("process 101 was killed by SIGKILL before it had joined", 75);
}

#[test]
fn the_signal_is_named_also_when_the_connection_was_seen_first() {
    let mut scene = Scene::running(2);
    scene.closes(1);
    scene.now += ms(50);
    scene.exits(1, "was killed by SIGSEGV", None);
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) was killed by SIGSEGV"));
}

#[test]
fn last_words_win_over_an_exit_code_and_without_them_the_code_is_named() {
    let run = |word: Option<From>, closed_first: bool| {
        let mut scene = Scene::running(2);
        if closed_first {
            scene.closes(1);
            scene.now += ms(100);
        }
        scene.exits(1, "exited with code 1", Some(1));
        scene.pass(ms(100), busy_but(1));
        scene.goes_on();
        if let Some(word) = word {
            scene.says(1, word);
        }
        scene.pass(ms(200), busy_but(1));
        scene
    };
    for closed_first in [false, true] {
        run(Some(failing("disk full: /data", 1)), closed_first)
            .ended("rank 1 (host box, process 101) failed: disk full: /data", 1);
        let verdict = "rank 1 (host box, process 101) exited with code 1\n  rank 0 (host box, process 100): in the \
                       forward pass";
        run(None, closed_first).ended(verdict, 75);
        // It left in good order: how its process ends does not matter any more.
        run(Some(leaving("abc", 0)), closed_first).goes_on();
    }
}

#[test]
fn a_failure_is_never_a_success() {
    let check = |code: u32, expected: u8| {
        let mut scene = Scene::running(2);
        scene.says(0, failing("disk full", code));
        scene.ended("rank 0 (host box, process 100) failed: disk full", expected);
        assert_eq!(scene.aborted(), [0, 1]);
    };
    check(1, 1);
    check(2, 2);
    check(75, 75);
    check(0, 1);
    check(256, 1);
    check(u32::MAX, 1);
}

#[test]
fn a_local_process_that_ends_before_it_has_joined_ends_the_start() {
    let check = |code: Option<i32>, expected: u8| {
        let mut scene = Scene::new(options(2));
        scene.join(0, None);
        scene.exits(5, "has ended", code);
        scene.ended("process 105 has ended before it had joined", expected);
        assert_eq!(scene.aborted(), [0]);
    };
    check(Some(2), 2);
    check(Some(0), 75);
    check(Some(-1), 75);
    check(Some(256), 75);
    check(None, 75);
}

/// Two ranks take a step every `step`, for some steps, and then rank 1 stops in one while rank 0 waits.
fn stalls(step: Duration, steps: u32, for_: Duration, text: &str) -> Scene {
    let mut scene = Scene::running(2);
    let turning = step * steps;
    let step_of = move |now: Duration| 1 + (now.min(turning).as_millis() / step.as_millis()) as u64;
    scene.pass(turning, |_, now| Some(mark(step_of(now), now.as_millis() as u64, "in the forward pass")));
    scene.goes_on();
    scene.pass(for_, |worker, now| {
        let text = if worker == 1 { text } else { "waiting for the other ranks" };
        Some(mark(step_of(now), turning.as_millis() as u64, text))
    });
    scene
}

#[test]
fn a_living_rank_without_progress_is_blamed_only_after_ten_of_its_steps() {
    // Steps of 1 s: ten of them are more than the timeout.
    let text = "in the forward pass";
    stalls(ms(1000), 3, ms(10_000), text).goes_on();
    stalls(ms(1000), 3, ms(10_100), text).ended(
        "rank 1 (host box, process 101) is alive but has made no progress for 10.1 s; it was last seen at in the \
         forward pass\n  rank 0 (host box, process 100): waiting for the other ranks",
        75,
    );
    // Steps of 100 ms: the timeout is more.
    stalls(ms(100), 30, ms(2000), text).goes_on();
    let scene = stalls(ms(100), 30, ms(2100), text);
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but"));
    // Before the first step is complete nobody knows how long one takes.
    stalls(ms(1000), 0, Duration::from_secs(3600), text).goes_on();
    // One long first step, in which everything was compiled, does not count for all.
    let mut scene = Scene::running(2);
    let text = |worker: usize| if worker == 1 { "in the backward pass" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(100), |_, now| Some(mark(1, now.as_millis() as u64, "in the forward pass")));
    scene.pass(ms(3000), |_, now| Some(mark(now.as_millis() as u64 / 100, now.as_millis() as u64, "")));
    scene.pass(ms(2100), |worker, _| Some(mark(1030, 1, text(worker))));
    scene.pass(ms(2100), |worker, _| Some(mark(1030, 1, text(worker))));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but"));
}

#[test]
fn a_slow_step_with_progress_is_never_blamed() {
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    // Nothing is as long as this step, but every now and then something gets done.
    scene.pass(Duration::from_secs(3600), |worker, now| {
        let text = if worker == 1 { "in the forward pass" } else { "waiting for the other ranks" };
        Some(mark(3, if worker == 1 { now.as_secs() } else { 0 }, text))
    });
    scene.goes_on();
}

#[test]
fn who_only_waits_is_no_culprit_unless_all_do() {
    // Rank 0 waits for longer than its limit, while rank 1 still works.
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    scene.pass(Duration::from_secs(60), |worker, now| {
        let text = if worker == 1 { "in the forward pass" } else { "waiting for the other ranks" };
        Some(mark(4, if worker == 1 { now.as_millis() as u64 } else { 0 }, text))
    });
    scene.goes_on();
    scene.pass(Duration::from_secs(11), |_, _| Some(mark(4, 1, "waiting for the other ranks")));
    scene.ended(
        "no rank makes progress and all wait for each other\n  rank 0 (host box, process 100): waiting for the other \
         ranks\n  rank 1 (host box, process 101): waiting for the other ranks",
        75,
    );
}

#[test]
fn ranks_that_all_wait_in_their_first_step_do_not_wait_for_ever() {
    let mut scene = Scene::running(2);
    scene.pass(ms(1900), |_, _| Some(mark(1, 1, "waiting for the other ranks")));
    scene.goes_on();
    scene.pass(ms(400), |_, _| Some(mark(1, 1, "waiting for the other ranks")));
    assert!(scene.endings[0].verdict.starts_with("no rank makes progress and all wait for each other"));
    // The control: one of them computes its first step.
    let mut scene = Scene::running(2);
    let text = |worker| if worker == 0 { "in the forward pass" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(3600), |worker, _| Some(mark(1, 1, text(worker))));
    scene.goes_on();
}

#[test]
fn what_no_step_measures_has_twenty_times_as_long() {
    let mut scene = Scene::running(2);
    let text = |worker| if worker == 1 { "export" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(39), |worker, _| Some(mark(1, 1, text(worker))));
    scene.goes_on();
    scene.pass(Duration::from_secs(2), |worker, _| Some(mark(1, 1, text(worker))));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but has made no progress"));
}

#[test]
fn who_waits_for_a_rank_that_has_left_does_not_wait_for_ever() {
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    scene.says(1, leaving("abc", 0));
    scene.closes(1);
    let waiting = |worker, _| (worker == 0).then(|| mark(4, 1, "waiting for the other ranks"));
    scene.pass(Duration::from_secs(10), waiting);
    scene.goes_on();
    scene.pass(Duration::from_secs(2), waiting);
    scene.ended(
        "no rank makes progress and all wait for each other\n  rank 0 (host box, process 100): waiting for the other \
         ranks\n  rank 1 (host box, process 101): has left",
        75,
    );
}

#[test]
fn a_rank_that_sticks_before_a_heartbeat_has_shown_a_whole_step_is_blamed_all_the_same() {
    let run = |resumed: u64, first_seen: u64| {
        let mut scene = Scene::new(options(2));
        (0..2).for_each(|worker| scene.join(worker, None));
        (0..2).for_each(|worker| scene.says(worker, prepared(worker, &[])));
        (0..2).for_each(|worker| scene.says(worker, From::Seen(Seen { nonces: vec![nonce(0), nonce(1)] })));
        let checkpoints = if resumed > 0 { vec![held(resumed, "id")] } else { Vec::new() };
        (0..2).for_each(|worker| scene.says(worker, From::Holds(Holds { checkpoints: checkpoints.clone() })));
        // Steps shorter than the time between two heartbeats: the first mark with a step may be of a later one.
        scene.pass(ms(500), |_, _| Some(mark(0, 1, "starting")));
        let sticks = |worker: usize, now: Duration| match worker {
            0 => Some(mark(first_seen, 2, "in the backward pass")),
            _ => Some(mark(first_seen, now.as_millis() as u64, "waiting for the other ranks")),
        };
        scene.pass(ms(4000), sticks);
        scene
    };
    for resumed in [0, 7] {
        run(resumed, resumed + 3).ended(
            "rank 0 (host box, process 100) is alive but has made no progress for 2.1 s; it was last seen at in the backward \
             pass\n  rank 1 (host box, process 101): waiting for the other ranks",
            75,
        );
        // The control: in the first step of this start nobody knows how long one may take.
        run(resumed, resumed + 1).goes_on();
    }
}

#[test]
fn a_rank_that_lost_one_that_has_left_ends_the_run_by_both_names() {
    let mut scene = Scene::running(2);
    scene.pass(ms(500), busy);
    scene.says(1, leaving("hash", 0));
    scene.says(0, From::Lost(Lost { rank: 1, why: "connection reset".into() }));
    let waiting = |worker, _| (worker == 0).then(|| mark(3, 1, "waiting for the other ranks"));
    scene.pass(PEER_TIMEOUT / 4, waiting);
    scene.goes_on();
    scene.pass(BEAT, waiting);
    scene.ended(
        "rank 0 (host box, process 100) lost rank 1 (host box, process 101), which has left after its last step: \
         connection reset\n  rank 0 (host box, process 100): waiting for the other ranks\n  rank 1 (host box, process 101): \
         has left",
        75,
    );
}

#[test]
fn two_living_ranks_that_lost_each_other_are_both_named() {
    let run = |beats: &dyn Fn(usize) -> bool, then: Option<(usize, From)>, for_: Duration| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), busy);
        scene.says(2, From::Lost(Lost { rank: 1, why: "connection reset".into() }));
        scene.says(1, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        if let Some((worker, word)) = then {
            scene.says(worker, word);
        }
        scene.pass(ms(500), |worker, now| if beats(worker) { busy(worker, now) } else { None });
        scene.goes_on();
        scene.pass(for_, |worker, now| if beats(worker) { busy(worker, now) } else { None });
        scene
    };
    let text = "in the forward pass";
    run(&|_| true, None, BEAT).ended(
        &format!(
            "rank 1 (host box, process 101) lost rank 2 (host box, process 102), though both are alive: connection \
             closed\n  rank 0 (host box, process 100): {text}\n  rank 1 (host box, process 101): {text}\n  rank 2 \
             (host box, process 102): {text}"
        ),
        75,
    );
    // One of the two is dead, whether it has reported a loss itself or not: nobody says that it lives.
    let scene = run(&|worker| worker != 1, None, ms(1500));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent for 1.6 s"));
    // It has left: whoever still needs it would be found waiting.
    run(&|_| true, Some((1, leaving("abc", 0))), Duration::from_secs(60)).goes_on();
}

#[test]
fn a_report_about_a_rank_that_turns_out_dead_blames_the_dead_one() {
    let check = |found: &dyn Fn(&mut Scene), then: Duration, how: &str| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), busy);
        scene.says(0, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        scene.says(1, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        scene.goes_on();
        found(&mut scene);
        scene.pass(then, busy_but(2));
        let verdict = &scene.endings[0].verdict;
        assert!(verdict.starts_with(&format!("rank 2 (host box, process 102) {how}")), "{verdict}");
    };
    check(&|scene| scene.exits(2, "was killed by SIGKILL", None), Duration::ZERO, "was killed by SIGKILL");
    check(&|scene| scene.closes(2), ms(300), "is gone: it closed its connection without a word");
    check(&|scene| scene.says(2, failing("disk full", 1)), Duration::ZERO, "failed: disk full");
    check(&|_| {}, ms(1600), "has been silent for 1.6 s");
}

/// A dead network card: the connections notice at once, silence takes longer. Nobody is called alive meanwhile.
#[test]
fn a_report_never_ends_the_run_before_silence_has_had_its_time() {
    let mut scene = Scene::running(2);
    scene.pass(ms(300), busy);
    scene.pass(ms(600), busy_but(1));
    scene.says(0, From::Lost(Lost { rank: 1, why: "timed out".into() }));
    scene.pass(ms(900), busy_but(1));
    scene.goes_on();
    scene.pass(BEAT, busy_but(1));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent for 1.6 s"));
}

#[test]
fn reports_about_nobody_are_ignored() {
    let mut scene = Scene::running(2);
    for rank in [0, 2, u32::MAX] {
        scene.says(0, From::Lost(Lost { rank, why: "nonsense".into() }));
    }
    scene.pass(Duration::from_secs(10), busy);
    scene.goes_on();
}

// ---- checkpoints

fn settled(scene: &Scene, worker: usize) -> Vec<Settled> {
    let of = |what| if let To::Settled(settled) = what { Some(settled) } else { None };
    scene.heard(worker).into_iter().filter_map(of).collect()
}

fn commits(scene: &Scene, worker: usize) -> Vec<(u64, String, Vec<String>)> {
    let of = |what| if let To::Commit(commit) = what { Some((commit.step, commit.id, commit.parts)) } else { None };
    scene.heard(worker).into_iter().filter_map(of).collect()
}

fn commit(scene: &mut Scene, worker: usize, step: u64, error: Option<&str>) {
    scene.says(worker, From::Committed(Committed { step, error: error.map(str::to_owned) }));
}

#[test]
fn a_checkpoint_is_committed_in_each_folder_after_all_parts_and_settled_after_all_commits() {
    let mut scene = Scene::placed(&[0, 1, 0, 1]);
    for rank in [2, 0, 3] {
        scene.says(rank, part(5, &format!("part {rank}")));
    }
    assert!((0..4).all(|rank| scene.heard(rank).is_empty()), "a part is missing");
    scene.says(1, part(5, "part 1"));
    let [(step, id, parts)] = &commits(&scene, 0)[..] else { panic!("{:?}", scene.sent) };
    assert_eq!((*step, &parts[..]), (5, &["part 0".to_owned(), "part 2".into()][..]));
    let of_one = vec![(5, id.clone(), vec!["part 1".to_owned(), "part 3".into()])];
    assert_eq!((commits(&scene, 1), commits(&scene, 2), commits(&scene, 3)), (of_one, vec![], vec![]));
    // A part that comes twice, and answers of ranks that were not asked, change nothing.
    scene.says(1, part(5, "part 1"));
    commit(&mut scene, 3, 5, Some("nobody asked me"));
    commit(&mut scene, 0, 6, None);
    assert_eq!(commits(&scene, 0).len(), 1);
    commit(&mut scene, 1, 5, None);
    assert!((0..4).all(|rank| settled(&scene, rank).is_empty()), "a commit is missing");
    commit(&mut scene, 0, 5, None);
    let all = vec![Settled { step: 5, id: id.clone(), error: None }];
    assert!((0..4).all(|rank| settled(&scene, rank) == all));
    // Another step has another id, and so has another start of the group.
    (0..4).for_each(|rank| scene.says(rank, part(6, "part")));
    assert_ne!(commits(&scene, 0)[1].1, *id);
    scene.goes_on();
}

#[test]
fn a_checkpoint_fails_for_all_when_a_part_or_a_commit_fails() {
    let mut scene = Scene::placed(&[0, 1]);
    let failed = From::Part(Part { step: 5, json: String::new(), error: Some("disk full: /b".into()) });
    scene.says(1, failed);
    scene.goes_on();
    assert!(settled(&scene, 0).is_empty(), "rank 0 may still be writing");
    scene.says(0, part(5, "part 0"));
    let errors = |scene: &Scene, rank| settled(scene, rank).into_iter().map(|s| (s.step, s.error)).collect::<Vec<_>>();
    let first = (5, Some("rank 1: disk full: /b".to_owned()));
    assert!(commits(&scene, 0).is_empty() && commits(&scene, 1).is_empty());
    assert!((0..2).all(|rank| errors(&scene, rank) == [first.clone()]));
    // The next one: all parts are there, one lead cannot rename.
    (0..2).for_each(|rank| scene.says(rank, part(6, "part")));
    commit(&mut scene, 0, 6, Some("read-only: /a"));
    commit(&mut scene, 1, 6, None);
    let second = (6, Some("rank 0: read-only: /a".to_owned()));
    assert!((0..2).all(|rank| errors(&scene, rank) == [first.clone(), second.clone()]));
    // And one that is well.
    (0..2).for_each(|rank| scene.says(rank, part(7, "part")));
    (0..2).for_each(|rank| commit(&mut scene, rank, 7, None));
    assert_eq!(errors(&scene, 1)[2], (7, None));
    scene.goes_on();
}

#[test]
fn checkpoints_that_somebody_never_writes_do_not_pile_up() {
    let mut scene = Scene::running(2);
    for step in 1..=8 {
        scene.says(0, part(step, "part"));
    }
    assert!(settled(&scene, 0).is_empty());
    for step in 9..=1000 {
        scene.says(0, part(step, "part"));
    }
    let given_up = settled(&scene, 1);
    assert_eq!(given_up.iter().map(|settled| settled.step).collect::<Vec<_>>(), (1..=992).collect::<Vec<_>>());
    let why = "rank 1 has not answered, and 8 checkpoints are under way";
    assert!(given_up.iter().all(|settled| settled.error.as_deref() == Some(why)));
    // The newest still come through.
    scene.says(1, part(1000, "part"));
    commit(&mut scene, 0, 1000, None);
    assert_eq!(settled(&scene, 1).last().map(|settled| settled.error.clone()), Some(None));
}

#[test]
fn a_commit_that_is_too_large_for_a_message_fails_by_name() {
    let mut scene = Scene::running(2);
    let large = "x".repeat(crate::coordinator::MESSAGE_BYTES_MAX / 2);
    (0..2).for_each(|rank| scene.says(rank, part(5, &large)));
    assert!(commits(&scene, 0).is_empty());
    let error = settled(&scene, 1)[0].error.clone().expect("too large");
    assert!(error.starts_with("the list of its parts has 67109920 bytes"), "{error}");
    assert!(error.ends_with("bytes, a message at most 67108864"), "{error}");
    scene.goes_on();
}

#[test]
fn a_checkpoint_before_the_start_is_no_checkpoint() {
    let mut scene = Scene::new(options(1));
    scene.join(0, None);
    scene.says(0, part(5, "part"));
    commit(&mut scene, 0, 5, None);
    assert_eq!(scene.heard(0).len(), 1);
    scene.goes_on();
}

// ---- the end

#[test]
fn a_run_ends_when_all_have_left_and_their_parameters_are_equal() {
    let check = |words: &[(&str, u32)], stop: bool, verdict: &str, code: u8| {
        let mut scene = Scene::running(words.len());
        if stop {
            scene.give(Input::Stop);
            assert!((0..words.len()).all(|rank| scene.heard(rank) == [To::Stop(Stop {})]));
        }
        for (rank, &(hash, code)) in words.iter().enumerate().rev() {
            scene.goes_on();
            scene.says(rank, leaving(hash, code));
            scene.closes(rank);
            // Who has left may be silent for as long as the others need.
            if rank > 0 {
                scene.pass(
                    Duration::from_secs(10),
                    move |worker, now| if worker < rank { busy(worker, now) } else { None },
                );
            }
        }
        scene.ended(verdict, code);
        assert!(scene.aborted().is_empty());
    };
    check(&[("abc", 0)], false, "", 0);
    check(&[("abc", 0), ("abc", 0), ("abc", 0)], false, "", 0);
    // Stopped: by the coordinator's word, and by a signal to the workers alone.
    check(&[("abc", 75), ("abc", 75)], true, "", 75);
    check(&[("abc", 75), ("abc", 75)], false, "", 75);
    // The word came after the last step: the run is done.
    check(&[("abc", 0), ("abc", 0)], true, "", 0);
    let differ = "the replicas differ at the end: the parameters of rank 0 (host box, process 100) have BLAKE3 abc, those \
                  of rank 2 (host box, process 102) have BLAKE3 abd";
    let differ = differ.replace("have BLAKE3 abd", "have abd");
    check(&[("abc", 0), ("abc", 0), ("abd", 0)], false, &differ, 1);
}

#[test]
fn a_stop_before_the_first_step_ends_the_run() {
    for joined in 0..=2 {
        let mut scene = Scene::new(options(2));
        (0..joined).for_each(|worker| scene.join(worker, None));
        scene.give(Input::Stop);
        scene.ended("stopped before the first step: go on with --resume", 75);
        assert_eq!(scene.aborted(), (0..joined).collect::<Vec<_>>());
    }
}

#[test]
fn a_second_stop_says_nothing_new() {
    let mut scene = Scene::running(1);
    scene.give(Input::Stop);
    scene.give(Input::Stop);
    assert_eq!(scene.heard(0), [To::Stop(Stop {})]);
}

/// One input of each kind, from a rank that is known, from another, and from nobody.
fn anything() -> Vec<Input> {
    let mut all = vec![Input::Stop, Input::Tick];
    for connection in [0, 1, 99] {
        let whats = [
            From::Beat(mark(9, 9, "late")),
            prepared(0, &[("late", "yes")]),
            From::Seen(Seen::default()),
            From::Holds(Holds::default()),
            From::Lost(Lost { rank: 0, why: "late".into() }),
            part(9, "late"),
            From::Committed(Committed { step: 9, error: None }),
            leaving("late", 0),
            failing("late", 1),
            From::Hello(hello(0, None)),
        ];
        all.extend(whats.map(|what| Input::Message { connection, what }));
        all.push(Input::Closed { connection, how: "late".into() });
        all.push(Input::Exited { pid: 100 + connection as u32, how: "late".into(), code: None });
        all.push(Input::Exited { pid: 100 + connection as u32, how: "late".into(), code: Some(1) });
    }
    all
}

#[test]
fn nothing_after_the_end_changes_it() {
    let killed = |scene: &mut Scene| scene.exits(1, "was killed by SIGKILL", None);
    let left = |scene: &mut Scene| (0..2).for_each(|rank| scene.says(rank, leaving("abc", 0)));
    for end in [&killed as &dyn Fn(&mut Scene), &left] {
        for first in 0..anything().len() {
            let mut scene = Scene::running(2);
            end(&mut scene);
            let (endings, sent) = (scene.endings.clone(), (scene.heard(0), scene.heard(1)));
            assert_eq!(endings.len(), 1);
            let mut inputs = anything();
            inputs.rotate_left(first);
            for input in inputs {
                scene.give(input);
                scene.now += ms(10);
            }
            scene.pass(Duration::from_secs(5), |_, _| None);
            assert_eq!((scene.endings.clone(), (scene.heard(0), scene.heard(1))), (endings, sent));
        }
    }
}

proptest! {
    /// Whatever comes, in whatever order: no panic, one end at most, and a rank for nobody who is not welcome.
    #[test]
    fn any_inputs_end_a_run_once_at_most(
        phase in 0usize..3,
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0u64..400), 1..60),
    ) {
        let mut scene = if phase == 0 { Scene::new(options(2)) } else { Scene::running(2) };
        let mut inputs = anything();
        for worker in [0, 1, 2] {
            inputs.push(Input::Hello { connection: worker as u64, hello: hello(worker, None), differences: Vec::new() });
        }
        for (pick, wait) in picks {
            scene.now += ms(wait);
            scene.give(inputs[pick.index(inputs.len())].clone());
        }
        prop_assert!(scene.endings.len() <= 1);
        prop_assert!(scene.state.workers.len() <= 2);
    }
}

#[test]
fn the_intervals_are_sound_for_any_timeout() {
    for timeout in [Duration::ZERO, ms(1), PEER_TIMEOUT, Duration::from_secs(30), Duration::MAX] {
        assert!(interval(timeout) >= ms(1) && interval(timeout) <= ms(500));
        assert!(silence(timeout) <= timeout);
    }
    assert_eq!((interval(PEER_TIMEOUT), silence(PEER_TIMEOUT)), (BEAT, ms(1500)));
}

/// What a rank of the 27 M parameters at that link says: every codec takes a nanosecond an element each way.
fn codec_facts(link_bytes_per_s: f64) -> CodecFacts {
    let speed = |codec: &str| CodecSpeed { codec: codec.into(), encode_s: 1e-9, decode_add_s: 1e-9 };
    CodecFacts {
        link_bytes_per_s,
        step_s: 1.0,
        window_s: 0.3,
        speeds: ["fp32", "bf16", "int8", "int4"].map(speed).to_vec(),
        elements: Some(CodecElements { any: 27_000_000, int8_at_least: 0, fp32: 1000 }),
        last_bucket: Some(CodecElements { any: 1_000_000, int8_at_least: 0, fp32: 0 }),
        members: 1,
        parameters: String::new(),
        ranks: 0,
    }
}

/// The choice that every rank heard once and last.
#[track_caller]
fn chosen(scene: &Scene) -> CodecChoice {
    let choices: Vec<CodecChoice> = (0..scene.state.options.ranks)
        .map(|rank| match &scene.heard(rank)[..] {
            [To::CodecChoice(choice)] => choice.clone(),
            other => panic!("rank {rank} heard {other:?}"),
        })
        .collect();
    choices.iter().for_each(|choice| assert_eq!(*choice, choices[0]));
    choices[0].clone()
}

#[test]
fn a_codec_is_chosen_for_all_when_the_last_rank_has_measured() {
    let mut scene = Scene::running(3);
    for rank in [2, 0] {
        scene.says(rank, From::CodecFacts(codec_facts(1e10)));
        scene.pass(ms(300), |_, _| None);
        assert!((0..3).all(|rank| scene.heard(rank).is_empty()), "not before all have measured");
    }
    scene.says(1, From::CodecFacts(codec_facts(1e10)));
    let choice = chosen(&scene);
    assert_eq!((&*choice.codec, choice.predictions.len()), ("fp32", 4));
    assert!(choice.reason.contains("compression is off"), "{}", choice.reason);
    // Once is enough.
    scene.says(1, From::CodecFacts(codec_facts(1.0)));
    assert_eq!(chosen(&scene), choice);
    scene.goes_on();
}

#[test]
fn the_slowest_link_and_the_slowest_rank_count() {
    let choice = |change: fn(&mut CodecFacts)| {
        let mut scene = Scene::running(2);
        let mut odd = codec_facts(1e10);
        change(&mut odd);
        scene.says(0, From::CodecFacts(codec_facts(1e10)));
        scene.says(1, From::CodecFacts(odd));
        chosen(&scene)
    };
    assert_eq!(choice(|_| {}).codec, "fp32", "the control");
    assert_eq!(choice(|facts| facts.link_bytes_per_s = 1e6).codec, "int4");
    assert_eq!(choice(|facts| facts.link_bytes_per_s = f64::NAN).codec, "int4");
    // Of ranks that hold one model together each sums with as many as there are models.
    let predictions = |count: usize, sums: u32| {
        let mut scene = Scene::running(count);
        (0..count).for_each(|rank| scene.says(rank, From::CodecFacts(CodecFacts { ranks: sums, ..codec_facts(1e7) })));
        chosen(&scene).predictions
    };
    assert_eq!(predictions(4, 2), predictions(2, 0));
    assert_ne!(predictions(4, 2), predictions(4, 0));
    let slow = choice(|facts| facts.step_s = 50.0);
    assert!(slow.predictions.iter().all(|prediction| prediction.step_s > 50.0), "{slow:?}");
    let costly = choice(|facts| facts.speeds.iter_mut().for_each(|speed| speed.encode_s = f64::INFINITY));
    assert!(costly.predictions.iter().all(|prediction| prediction.step_s.is_finite()), "{costly:?}");
    // What one rank has not measured is no candidate, and what nobody knows is none either.
    let choice = choice(|facts| {
        facts.link_bytes_per_s = 1e6;
        facts.speeds[3].codec = "int3".into();
    });
    assert_eq!((&*choice.codec, choice.predictions.len()), ("int8", 3));
}
