//! Coordinator and workers over sockets of the loopback, with strangers at the door.

use std::sync::mpsc::RecvTimeoutError;

use super::state::TRY_AGAIN;
use super::*;
use crate::control::{Control, ControlError, Join};
use crate::progress::Progress;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::{Hello, Holds, Leaving, Prepared, Seen, Start};

mod gone;
mod secured;
mod strangers;

/// Only so that a fault does not hang the suite: nothing here should take this long.
const GUARD: Duration = Duration::from_secs(60);

fn coordinator(ranks: usize) -> Coordinator {
    coordinator_with(ranks, Security::Loopback)
}

fn coordinator_with(ranks: usize, security: Security) -> Coordinator {
    let options = Options {
        ranks,
        version: "1.0".into(),
        recipe: "steps = 3".into(),
        name: "run".into(),
        resume: false,
        resume_from_earlier: false,
        resume_without_residuals: false,
        restart: 0,
        choose_codec_anew: false,
        metrics_address: None,
        peer_timeout: Duration::from_secs(2),
        join_within: GUARD,
        epoch: 7,
        token: "token".into(),
        host: "here".into(),
        pid: 1,
    };
    let compare = |theirs: &str| {
        if theirs == "steps = 3" { Vec::new() } else { vec![format!("train.steps: {theirs}, here steps = 3")] }
    };
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    Coordinator::start(listener, options, Arc::new(compare), security).expect("starts")
}

fn hello(rank: Option<u32>) -> Hello {
    let pid = 100 + rank.unwrap_or(50);
    Hello { version: "1.0".into(), rank, host: "here".into(), pid, recipe: None }
}

/// Runs it in a thread of its own and waits for its result.
#[track_caller]
fn guarded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = channel();
    std::thread::spawn(move || tell.send(work()));
    told.recv_timeout(GUARD).expect("neither a panic nor a hang")
}

/// A worker without a model.
struct Worker {
    control: Control,
    /// What `on_end` was called with; disconnected once the control thread is gone.
    ended: Receiver<Ending>,
    stopped: Receiver<()>,
}

fn try_join(address: String, within: Duration, hello: Hello) -> Result<Worker, ControlError> {
    try_join_with(address, within, hello, Security::Loopback)
}

fn try_join_with(address: String, within: Duration, hello: Hello, security: Security) -> Result<Worker, ControlError> {
    let ((end, ended), (stop, stopped)) = (channel(), channel());
    let join = Join {
        address,
        within,
        security,
        hello,
        progress: Arc::new(Progress::default()),
        on_end: Box::new(move |ending, _| end.send(ending.clone()).expect("the test listens")),
        on_stop: Box::new(move || stop.send(()).expect("the test listens")),
    };
    let control = guarded(|| Control::join(join))?;
    Ok(Worker { control, ended, stopped })
}

fn join(coordinator: &Coordinator, rank: u32) -> Worker {
    try_join(coordinator.address().to_string(), GUARD, hello(Some(rank))).expect("welcome")
}

impl Worker {
    #[track_caller]
    fn next(&self) -> To {
        self.control.poll(GUARD).expect("the run goes on").expect("a message")
    }

    /// From the welcome to the start.
    #[track_caller]
    fn prepare(&self) {
        let rank = self.control.welcome().rank;
        let data_address = format!("127.0.0.1:{}", 1000 + rank);
        let nonce = format!("nonce-{rank}");
        self.control.say(From::Prepared(Prepared { data_address, properties: Vec::new(), nonce }));
    }

    #[track_caller]
    fn look(&self) {
        match self.next() {
            To::Look(look) => self.control.say(From::Seen(Seen { nonces: look.nonces })),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn hold(&self) {
        match self.next() {
            To::Places(places) => assert!(places.lead_of.iter().all(|&lead| lead == 0)),
            other => panic!("{other:?}"),
        }
        self.control.say(From::Holds(Holds::default()));
    }

    #[track_caller]
    fn started(&self) -> Start {
        match self.next() {
            To::Start(start) => start,
            other => panic!("{other:?}"),
        }
    }

    fn leave(self, code: u32) -> Receiver<Ending> {
        let leaving = Leaving { step: 3, parameter_hash: "abc".into(), code, ..Leaving::default() };
        self.control.leave(leaving);
        self.ended
    }
}

/// Walks workers through the start.
#[track_caller]
fn start(workers: &[&Worker]) {
    workers.iter().for_each(|worker| worker.prepare());
    workers.iter().for_each(|worker| worker.look());
    workers.iter().for_each(|worker| worker.hold());
    for worker in workers {
        let start = worker.started();
        assert_eq!((start.epoch, &*start.token, start.from), (7, "token", None));
        let addresses: Vec<String> = start.peers.into_iter().map(|peer| peer.data_address).collect();
        let expected: Vec<String> = (0..workers.len()).map(|rank| format!("127.0.0.1:{}", 1000 + rank)).collect();
        assert_eq!(addresses, expected);
    }
}

/// Two workers that have started.
fn running(coordinator: &Coordinator) -> [Worker; 2] {
    let workers = [join(coordinator, 0), join(coordinator, 1)];
    start(&workers.each_ref());
    workers
}

/// `on_end` was called as often as there are verdicts here, and then the control thread was gone.
#[track_caller]
fn verdicts(ended: &Receiver<Ending>) -> Vec<Ending> {
    let mut all = Vec::new();
    loop {
        match ended.recv_timeout(GUARD) {
            Ok(ending) => all.push(ending),
            Err(RecvTimeoutError::Disconnected) => return all,
            Err(RecvTimeoutError::Timeout) => panic!("the control thread goes on after {all:?}"),
        }
    }
}

/// The run goes on: both workers leave in good order, and nobody was told anything else.
#[track_caller]
fn finish(coordinator: &Coordinator, workers: [Worker; 2]) {
    assert_eq!(coordinator.ending(Duration::ZERO), None);
    let ended = workers.map(|worker| worker.leave(0));
    assert_eq!(coordinator.ending(GUARD), Some(Ending { verdict: String::new(), code: 0 }));
    ended.iter().for_each(|ended| assert_eq!(verdicts(ended), []));
}

#[test]
fn two_workers_start_and_leave() {
    let coordinator = coordinator(2);
    let workers = running(&coordinator);
    let welcome = workers[1].control.welcome();
    assert_eq!((welcome.rank, welcome.ranks, &*welcome.recipe, welcome.peer_timeout_s), (1, 2, "steps = 3", 2.0));
    finish(&coordinator, workers);
}

#[test]
fn workers_that_do_not_fit_are_refused_by_name_while_the_others_go_on() {
    let coordinator = coordinator(2);
    let first = join(&coordinator, 0);
    let address = coordinator.address().to_string();
    let refused = |hello: Hello, why: &str| {
        let error = try_join(address.clone(), GUARD, hello).map(|_| ()).expect_err("refused");
        assert_eq!(error, ControlError::Refused { address: address.clone(), why: why.into() });
    };
    let other_version = Hello { version: "0.9".into(), ..hello(Some(1)) };
    refused(other_version, "it is version 0.9, the coordinator is 1.0: run the same build on every machine");
    let other_recipe = Hello { recipe: Some("steps = 4".into()), ..hello(Some(1)) };
    refused(other_recipe, "its recipe differs from the coordinator's:\n  train.steps: steps = 4, here steps = 3");
    // One byte more than is read, none of which is compared; and as many as are.
    let large = |bytes: usize| Hello { recipe: Some("x".repeat(bytes)), ..hello(Some(1)) };
    let much = "its recipe differs from the coordinator's:\n  it has 1048577 bytes, at most 1048576 are read";
    refused(large((1 << 20) + 1), much);
    let error = try_join(address.clone(), GUARD, large(1 << 20)).map(|_| ()).expect_err("refused").to_string();
    assert!(error.contains("train.steps: xxxx"), "it was compared: {}", &error[..200]);
    let same_rank = "rank 0 (host here, process 100) has joined already: give each worker a rank of its own";
    refused(hello(Some(0)), same_rank);
    let same_recipe = Hello { recipe: Some("steps = 3".into()), ..hello(None) };
    let second = try_join(address.clone(), GUARD, same_recipe).expect("welcome");
    let workers = [first, second];
    start(&workers.each_ref());
    refused(hello(None), "the recipe's mesh has 2 ranks and all of them have joined");
    finish(&coordinator, workers);
}

#[test]
fn a_worker_that_is_dropped_without_a_word_is_named_to_the_others() {
    let coordinator = coordinator(2);
    let [first, second] = running(&coordinator);
    drop(second.control);
    // Who lets go is not told how the rest ends.
    assert_eq!(verdicts(&second.ended), []);
    let ending = coordinator.ending(GUARD).expect("the run ends");
    let verdict = "rank 1 (host here, process 101) is gone: it closed its connection without a word";
    assert!(ending.verdict.starts_with(verdict), "{}", ending.verdict);
    assert_eq!(ending.code, TRY_AGAIN);
    assert_eq!(first.control.ending(GUARD), ending);
    assert_eq!(verdicts(&first.ended), [ending]);
}

#[test]
fn last_words_reach_everybody() {
    let coordinator = coordinator(2);
    let [first, second] = running(&coordinator);
    let leaving = Leaving { step: 3, error: Some("disk full".into()), code: 1, ..Leaving::default() };
    second.control.leave(leaving);
    let ending = Ending { verdict: "rank 1 (host here, process 101) failed: disk full".into(), code: 1 };
    assert_eq!(coordinator.ending(GUARD), Some(ending.clone()));
    assert_eq!((verdicts(&first.ended), verdicts(&second.ended)), (vec![ending], vec![]));
}

#[test]
fn what_the_coordinator_is_told_reaches_the_workers() {
    let coordinator = coordinator(2);
    let workers = running(&coordinator);
    coordinator.tell(Input::Stop);
    workers.iter().for_each(|worker| worker.stopped.recv_timeout(GUARD).expect("asked to stop"));
    let ended = workers.map(|worker| worker.leave(u32::from(TRY_AGAIN)));
    assert_eq!(coordinator.ending(GUARD), Some(Ending { verdict: String::new(), code: TRY_AGAIN }));
    ended.iter().for_each(|ended| assert_eq!(verdicts(ended), []));
}

#[test]
fn a_killed_process_is_named_to_the_others() {
    let coordinator = coordinator(2);
    let workers = running(&coordinator);
    coordinator.tell(Input::Exited { pid: 101, how: "was killed by SIGKILL".into(), code: None });
    let ending = coordinator.ending(GUARD).expect("the run ends");
    let verdict = "rank 1 (host here, process 101) was killed by SIGKILL";
    assert!(ending.verdict.starts_with(verdict), "{}", ending.verdict);
    // A verdict leaves before the connections do.
    drop(coordinator);
    // The killed one is not waited for.
    assert_eq!(verdicts(&workers[0].ended), [ending]);
}

#[test]
fn a_coordinator_whose_thread_died_does_not_let_anybody_wait() {
    let coordinator = coordinator(0);
    assert_eq!(coordinator.ending(GUARD).map(|ending| ending.code), Some(1));
}
