//! Coordinator and workers over sockets of the loopback, with strangers at the door.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::mpsc::RecvTimeoutError;

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::state::TRY_AGAIN;
use super::*;
use crate::control::{Control, ControlError, Join};
use crate::progress::Progress;
use crate::wire::control::coordinator_client::CoordinatorClient;
use crate::wire::control::coordinator_server::Coordinator as Service;
use crate::wire::control::from_worker::What as From;
use crate::wire::control::{FromWorker, Hello, Holds, Leaving, Prepared, Seen, Start, ToWorker, Welcome};

mod secured;

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
    let same_rank = "rank 0 (host here, process 100) has joined already: give each worker a rank of its own";
    refused(hello(Some(0)), same_rank);
    let same_recipe = Hello { recipe: Some("steps = 3".into()), ..hello(None) };
    let second = try_join(address.clone(), GUARD, same_recipe).expect("welcome");
    let workers = [first, second];
    start(&workers.each_ref());
    refused(hello(None), "the recipe's mesh has 2 ranks and all of them have joined");
    finish(&coordinator, workers);
}

/// Sends bytes and reads until the coordinator closes the connection.
fn knock(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(GUARD)).expect("a socket");
    // It may be closed before all was written.
    let _ = stream.write_all(bytes);
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the connection stays open"),
            // Reset: it did not even read all.
            Err(_) => return,
        }
    }
}

#[test]
fn strangers_do_not_disturb_a_run() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let idle = TcpStream::connect(address).expect("it listens");
    let first = join(&coordinator, 0);
    knock(address, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n");
    let second = join(&coordinator, 1);
    start(&[&first, &second]);
    let mut x = 1u64;
    let mut random = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 56) as u8
    };
    for length in [24, 1000, 100_000] {
        let noise: Vec<u8> = (0..length).map(|_| random()).collect();
        knock(address, &noise);
    }
    // HTTP/2 without gRPC: its preface, and then noise.
    knock(address, &[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), vec![0xff; 100]].concat());
    drop(TcpStream::connect(address).expect("it listens"));
    finish(&coordinator, [first, second]);
    drop(idle);
}

/// Calls the coordinator and says this first; then waits for the end of what it answers while the call stays open.
fn call(address: SocketAddr, first: Option<From>, then: Option<FromWorker>) -> (Vec<To>, Result<(), String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let talk = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let mut client = CoordinatorClient::new(endpoint.connect().await.expect("it listens"));
        let (out, outgoing) = mpsc::unbounded_channel();
        out.send(FromWorker { what: first }).expect("open");
        let mut messages = client.join(UnboundedReceiverStream::new(outgoing)).await.expect("answers").into_inner();
        let mut heard = Vec::new();
        let mut then = then.into_iter();
        loop {
            match messages.message().await {
                Ok(Some(ToWorker { what: Some(To::Beat(_)) })) => {}
                Ok(Some(message)) => {
                    heard.extend(message.what);
                    then.next().into_iter().for_each(|then| out.send(then).expect("open"));
                }
                Ok(None) => return (heard, Ok(())),
                Err(status) => return (heard, Err(status.message().to_owned())),
            }
        }
    };
    runtime.block_on(async { tokio::time::timeout(GUARD, talk).await.expect("no hang") })
}

#[test]
fn calls_that_are_no_worker_are_ended_by_the_coordinator() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let first = join(&coordinator, 0);
    let no_greeting = Err("expected a worker's greeting first: run the same build on every machine".to_owned());
    assert_eq!(call(address, Some(From::Holds(Holds::default())), None), (vec![], no_greeting.clone()));
    assert_eq!(call(address, None, None), (vec![], no_greeting));
    // One that is refused does not keep its place by keeping its call open.
    let (heard, end) = call(address, Some(From::Hello(hello(Some(9)))), None);
    assert!(matches!(&heard[..], [To::Refused(refused)] if refused.why.contains("rank 9")), "{heard:?}");
    assert_eq!(end, Ok(()));
    let second = join(&coordinator, 1);
    start(&[&first, &second]);
    finish(&coordinator, [first, second]);
}

#[test]
fn a_worker_that_speaks_another_language_is_named() {
    let coordinator = coordinator(2);
    let first = join(&coordinator, 0);
    let address = coordinator.address();
    let (heard, _) = guarded(move || call(address, Some(From::Hello(hello(Some(1)))), Some(FromWorker { what: None })));
    assert!(matches!(&heard[..], [To::Welcome(_), ..]), "{heard:?}");
    let ending = coordinator.ending(GUARD).expect("the run ends");
    let verdict = "rank 1 (host here, process 101) is gone: it sent a message that this version does not know";
    assert!(ending.verdict.starts_with(verdict), "{}", ending.verdict);
    assert_eq!(verdicts(&first.ended), [ending]);
}

fn not_there(address: &str) -> String {
    let within = Duration::from_millis(300);
    match try_join(address.to_owned(), within, hello(None)).map(|_| ()) {
        Err(ControlError::NotThere { address: at, within_s, why }) => {
            assert_eq!((&*at, within_s), (address, 0.3));
            why
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_finds_no_coordinator_is_told_what_was_there() {
    let bind = || TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
    let free = address(&bind());
    assert_eq!(not_there(&free), "connection refused");
    // The system accepts, but nobody answers.
    let silent = bind();
    assert_eq!(not_there(&address(&silent)), "it did not answer");
    // A server of another protocol.
    let other = bind();
    let at = address(&other);
    std::thread::spawn(move || {
        let mut open = Vec::new();
        for stream in other.incoming() {
            let mut stream = stream.expect("accepts");
            // The caller may have gone.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            open.push(stream);
        }
    });
    let why = not_there(&at);
    assert!(!why.is_empty() && !why.contains('\n'), "{why}");
    assert_eq!(not_there("127.0.0.1"), "that is not HOST:PORT");
    assert_eq!(not_there("127.0.0.1:notaport"), "that is not HOST:PORT");
}

#[test]
fn who_comes_when_a_run_ends_is_not_refused_for_good() {
    let coordinator = coordinator(1);
    let worker = join(&coordinator, 0);
    start(&[&worker]);
    let _ = worker.leave(0);
    assert_eq!(coordinator.ending(GUARD).map(|ending| ending.code), Some(0));
    assert_eq!(not_there(&coordinator.address().to_string()), "it says: the run is ending");
}

#[test]
fn a_coordinator_that_ends_is_named_once_to_each_worker() {
    let coordinator = coordinator(2);
    let address = coordinator.address();
    let workers = running(&coordinator);
    drop(coordinator);
    let verdict = format!(
        "the coordinator at {address} (host here, process 1) closed the connection; this worker was at starting"
    );
    for worker in &workers {
        assert_eq!(verdicts(&worker.ended), [Ending { verdict: verdict.clone(), code: TRY_AGAIN }]);
        assert_eq!(worker.control.ending(Duration::ZERO).verdict, verdict);
        assert_eq!(worker.control.poll(GUARD).map(|_| ()).expect_err("ended").to_string(), verdict);
    }
}

/// A coordinator that welcomes everybody and then says nothing, or says it in vain.
struct Mute {
    lines: Mutex<Vec<mpsc::UnboundedSender<Result<ToWorker, Status>>>>,
}

#[tonic::async_trait]
impl Service for Mute {
    type JoinStream = UnboundedReceiverStream<Result<ToWorker, Status>>;

    async fn join(&self, _: Request<Streaming<FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
        let (line, outgoing) = mpsc::unbounded_channel();
        let welcome = Welcome { ranks: 1, peer_timeout_s: 0.5, ..Welcome::default() };
        line.send(Ok(ToWorker { what: Some(To::Welcome(welcome)) })).expect("open");
        self.lines.lock().expect("no panic").push(line);
        Ok(Response::new(UnboundedReceiverStream::new(outgoing)))
    }
}

fn mute() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            listener.set_nonblocking(true).expect("a socket");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let mute = Mute { lines: Mutex::default() };
            Server::builder().add_service(CoordinatorServer::new(mute)).serve_with_incoming(incoming).await
        })
    });
    address
}

#[test]
fn a_silent_coordinator_is_named() {
    let address = mute();
    let worker = try_join(address.to_string(), GUARD, hello(None)).expect("welcome");
    let all = verdicts(&worker.ended);
    let [Ending { verdict, code: TRY_AGAIN }] = &all[..] else { panic!("{all:?}") };
    assert!(
        verdict.starts_with(&format!("the coordinator at {address} (host , process 0) has been silent for ")),
        "{verdict}"
    );
}

#[test]
fn a_dropped_worker_lets_go_even_of_a_coordinator_that_takes_no_notice() {
    let worker = try_join(mute().to_string(), GUARD, hello(None)).expect("welcome");
    drop(worker.control);
    assert_eq!(verdicts(&worker.ended), []);
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
    workers.iter().for_each(|worker| assert_eq!(verdicts(&worker.ended), std::slice::from_ref(&ending)));
}

#[test]
fn a_coordinator_whose_thread_died_does_not_let_anybody_wait() {
    let coordinator = coordinator(0);
    assert_eq!(coordinator.ending(GUARD).map(|ending| ending.code), Some(1));
}
