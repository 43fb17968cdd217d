//! Strangers of all kinds at every port of a run at once: it goes on as if nobody were there, and keeps nothing of them.
//! And ranks that send what no rank sends. Linux.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use parallel::control::{Control, ControlError, Join};
use parallel::transport::congestion::Congestion;
use parallel::transport::grpc::{Group, Listener, TransportError};
use parallel::transport::tls::{Keys, Security};
use parallel::wire::control::Hello;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::dying::{RANKS, outcome, undisturbed};
use crate::joining::{coordinator, worker};
use crate::processes::{HANG, Job, listening, nobody_is_left, ports, processes, send};
use crate::support::{Place, Ran};

/// At each port, all open at the same time.
const IDLE: usize = 1000;

/// A port has at least so many places for strangers (docs/parallel.md, Limits).
const PLACES_MIN: usize = 16;

const SECRET: &str = "a secret that no stranger knows";

/// So many steps that the run outlives every siege; nothing but steps opens files meanwhile.
const ENDLESS: [&str; 6] =
    ["--set", "train.steps=1000000", "--set", "checkpoint.every=1000000", "--set", "eval.every=1000000"];

/// Makes room for all connections in this process.
fn room_for_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("up to the maximum everybody may");
    let wanted = 6 * IDLE as u64 + 1000;
    assert!(maximum.is_none_or(|maximum| maximum > wanted), "this test needs {wanted} descriptors: ulimit -Hn");
}

fn open_now(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// What a process holds open: the least of many looks, because it opens a file now and then and closes it again.
fn descriptors(pid: u32) -> usize {
    let look = |_| {
        std::thread::sleep(Duration::from_millis(1));
        open_now(pid)
    };
    (0..100).map(look).min().expect("some looks")
}

/// A run of two ranks that takes steps until it is asked to stop.
struct Besieged {
    place: Place,
    job: Job,
    secured: bool,
}

impl Besieged {
    fn start(secured: bool) -> Self {
        let place = Place::with(RANKS);
        let mut command = place.command(&[&["train", "small.toml", "--name", "a"][..], &ENDLESS].concat());
        if secured {
            command.env("TRIBUTARY_JOIN_SECRET", SECRET);
        }
        let job = Job::spawn(&place, command);
        let mut run = Self { place, job, secured };
        run.takes(5);
        run
    }

    /// Waits until it has taken so many steps more.
    #[track_caller]
    fn takes(&mut self, steps: usize) {
        let until = self.place.lines("a") + steps;
        assert!(self.job.wait("steps", |_| self.place.lines("a") >= until), "{}", self.job.stderr());
    }

    /// The launcher and the worker of each rank.
    fn pids(&self) -> [u32; 3] {
        let worker = |rank| self.job.worker(rank).expect("it is there");
        [self.job.pid(), worker(0), worker(1)]
    }

    /// The one port of a process.
    fn address(pid: u32) -> SocketAddr {
        let open = ports(pid);
        assert_eq!(open.len(), 1, "{open:?}");
        (Ipv4Addr::LOCALHOST, open.first().expect("one").port).into()
    }

    fn stop(self) -> (Place, Ran) {
        send(self.job.pid(), Signal::TERM);
        let ran = self.job.end();
        nobody_is_left(&self.place.path(""));
        (self.place, ran)
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("somebody listens");
    stream.set_read_timeout(Some(HANG)).expect("a socket");
    stream
}

/// Reads until the other side closes.
#[track_caller]
fn is_sent_away(mut stream: TcpStream, what: &str) {
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    let hangs = end.is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
    assert!(!hangs, "{what}: still on the line after {HANG:?}");
    assert!(answer.len() < 1000, "{what}: {answer:?}");
}

/// The beginning of HTTP/2: preface and settings.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Strangers who say something, or begin to, and who are to be sent away.
fn talkers(address: SocketAddr) -> Vec<(&'static str, TcpStream)> {
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let half_a_call = [HTTP2, b"\0\0\x64\x01\x04\0\0\0\x01half of its head"].concat();
    let half_a_handshake = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03";
    let says = |what, words: &[u8]| {
        let mut stream = connect(address);
        // It may close before it has read everything.
        let _ = stream.write_all(words);
        (what, stream)
    };
    let half_closed = |what, words: &[u8]| {
        let (what, stream) = says(what, words);
        // Where it has closed already, both directions are.
        let _ = stream.shutdown(Shutdown::Write);
        (what, stream)
    };
    // Whoever leaves with an answer unread resets the connection.
    let (_, leaves) = says("leaves", HTTP2);
    let _ = leaves.peek(&mut [0]);
    drop(leaves);
    vec![
        says("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"),
        says("noise", &noise),
        says("half a call", &half_a_call),
        says("half a handshake", half_a_handshake),
        half_closed("half open, silent", b""),
        half_closed("half open, HTTP/1.1", b"GET / HTTP/1.1\r\n"),
        half_closed("half open, HTTP/2", HTTP2),
    ]
}

/// What a rank of another run hears from a port.
fn of_another_run(address: SocketAddr, secured: bool) -> TransportError {
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listener = Listener::bind(here, 0).expect("a port of loopback");
    let security = match secured {
        true => Security::Tls(Arc::new(Keys::of(b"the secret of another run").expect("long enough"))),
        false => Security::Loopback,
    };
    let group = Group {
        rank: 1,
        addresses: vec![address, listener.local_address()],
        epoch: 1,
        token: "of another run".into(),
        connect_within: Duration::from_secs(10),
        security,
        congestion: Congestion::default(),
    };
    listener.connect(&group, Arc::new(|_| ())).map(drop).expect_err("another run's")
}

/// What a worker of an older version hears from the coordinator.
fn of_an_older_version(address: SocketAddr, secured: bool) -> ControlError {
    let security = match secured {
        true => Security::Tls(Arc::new(Keys::of(SECRET.as_bytes()).expect("long enough"))),
        false => Security::Loopback,
    };
    let joined = Control::join(Join {
        address: address.to_string(),
        within: Duration::from_secs(10),
        security,
        hello: Hello { version: "0.0.7".into(), rank: Some(1), host: "far".into(), pid: 7, recipe: None },
        progress: Default::default(),
        on_end: Box::new(|_, _| ()),
        on_stop: Box::new(|| ()),
    });
    joined.expect_err("an older version")
}

/// Everything at once, at every port of these runs; returns when all of it was sent away.
#[track_caller]
fn lay_siege(runs: &[Besieged; 2]) {
    for run in runs {
        let [launcher, workers @ ..] = run.pids();
        let error = of_an_older_version(Besieged::address(launcher), run.secured).to_string();
        assert!(error.contains("it is version 0.0.7, the coordinator is "), "{error}");
        for worker in workers {
            let error = of_another_run(Besieged::address(worker), run.secured).to_string();
            let said = if run.secured { "it has another secret" } else { "the token is not this run's" };
            assert!(error.contains(said), "expected {said:?} in {error}");
        }
    }
    let pids: Vec<u32> = runs.iter().flat_map(Besieged::pids).collect();
    let addresses: Vec<SocketAddr> = pids.iter().map(|&pid| Besieged::address(pid)).collect();
    let before: Vec<usize> = pids.iter().map(|&pid| descriptors(pid)).collect();
    let over = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = before.clone();
            while !over.load(Ordering::Relaxed) {
                most.iter_mut().zip(&pids).for_each(|(most, &pid)| *most = open_now(pid).max(*most));
                std::thread::sleep(Duration::from_millis(10));
            }
            most
        });
        let attack = |&address: &SocketAddr| scope.spawn(move || attack(address));
        let attacks: Vec<_> = addresses.iter().map(attack).collect();
        let ended: Vec<_> = attacks.into_iter().map(ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "an attack failed");
        watch.join().expect("no panic")
    });
    // The control: what strangers cost while they are there is seen.
    assert!(most.iter().zip(&before).all(|(most, before)| *most >= before + PLACES_MIN), "{before:?}, then {most:?}");
}

/// All kinds of strangers at one port, until the last one was sent away.
#[track_caller]
fn attack(address: SocketAddr) {
    let talkers = talkers(address);
    let idle: Vec<_> = (0..IDLE).map(|_| ("idle", connect(address))).collect();
    talkers.into_iter().chain(idle).for_each(|(what, stream)| is_sent_away(stream, what));
}

#[test]
fn runs_under_siege_take_the_steps_of_one_that_is_left_alone_and_keep_no_descriptor() {
    room_for_descriptors();
    let mut alone = Besieged::start(false);
    let mut runs = [false, true].map(Besieged::start);
    let pids = runs.each_ref().map(Besieged::pids);
    let before = pids.map(|pids| pids.map(descriptors));
    let lines = runs.each_ref().map(|run| run.place.lines("a"));
    lay_siege(&runs);
    for (run, lines) in runs.iter_mut().zip(lines) {
        assert!(run.place.lines("a") > lines, "it took steps meanwhile");
        run.takes(5);
    }
    for ((mut run, pids), before) in runs.into_iter().zip(pids).zip(before) {
        let as_before = |_: &Job| pids.iter().zip(before).all(|(&pid, most)| descriptors(pid) <= most);
        assert!(run.job.wait("no descriptor more", as_before), "{}", run.job.stderr());
        assert_eq!(run.pids(), pids, "nobody was started anew");
        assert_eq!(processes(&run.place.path("")).len(), pids.len(), "and nobody else");

        let open: Vec<_> = pids.iter().flat_map(|&pid| ports(pid)).collect();
        let (place, ran) = run.stop();
        // The strangers are told of, too.
        let strangers = ["closed the connection from 127.0.0.1:", ": no service let it in", " are open"];
        let said = ["SIGTERM: stopping after this step", "with a checkpoint: go on with --resume"];
        ran.failed(75, &[&said[..], &strangers].concat());
        let still: Vec<_> = listening().into_iter().filter(|listening| open.contains(listening)).collect();
        assert!(still.is_empty(), "{still:?}");

        let curve = place.curve("a");
        assert!(alone.job.wait("as many steps", |_| alone.place.lines("a") >= curve.len()), "{}", alone.job.stderr());
        assert!(
            curve == alone.place.curve("a")[..curve.len()],
            "the same {} losses and norms, bit for bit",
            curve.len()
        );
    }
    alone.stop().1.failed(75, &[]);
}

#[test]
fn workers_join_although_a_thousand_idle_connections_came_first() {
    room_for_descriptors();
    let place = Place::with(RANKS);
    let (job, address) = coordinator(&place, &[]);
    let at: SocketAddr = address.parse().expect("an address");
    let idle: Vec<TcpStream> = (0..IDLE).map(|_| connect(at)).collect();
    let workers = [0, 1].map(|rank: usize| worker(&place, &address, &["--rank", &rank.to_string()]));
    workers.into_iter().chain([job]).for_each(|job| _ = job.end().ok());
    nobody_is_left(&place.path(""));
    assert_eq!(outcome(&place, "a"), undisturbed(2));
    idle.into_iter().for_each(|stream| is_sent_away(stream, "idle"));
}

#[test]
fn a_launcher_that_starts_its_ranks_again_keeps_no_descriptor_of_the_dead() {
    let place = Place::with(RANKS);
    let more = ["--restarts", "9", "--set", "train.steps=1000000", "--set", "checkpoint.every=5"];
    let mut job = Job::start(&place, &[&["train", "small.toml", "--name", "a"][..], &more].concat());
    let (mut before, mut lines) = (None, 0);
    for life in 1..=3 {
        // More than any life before: all ranks of this one have met.
        let takes_steps = |_: &Job| place.lines("a") >= lines + 10;
        assert!(job.wait("steps", takes_steps), "{}", job.stderr());
        let most = *before.get_or_insert_with(|| descriptors(job.pid()));
        assert!(job.wait("no descriptor more", |job| descriptors(job.pid()) <= most), "life {life}: {}", job.stderr());
        let [zero, one] = [0, 1].map(|rank| job.worker(rank).expect("it is there"));
        send(one, Signal::KILL);
        lines = place.lines("a");
        let restarted = |job: &Job| job.stderr().contains(&format!("restart {life} of 9"));
        assert!(job.wait("a restart", restarted), "{}", job.stderr());
        let gone = |_: &Job| processes(&place.path("")).iter().all(|process| ![zero, one].contains(&process.pid));
        assert!(job.wait("the end of the dead", gone), "{}", job.stderr());
    }
    send(job.pid(), Signal::TERM);
    job.end().failed(75, &["was killed by SIGKILL"]);
    nobody_is_left(&place.path(""));
}

#[test]
fn a_rank_that_sends_garbage_or_frames_of_another_version_is_named_and_all_end() {
    for (fault, said) in [
        ("garbage:1:20", "a frame starts with \"TRIB\""),
        ("old:1:20", "frames of version 1 are read here, version 0 came: run the same build on every rank"),
        // Nobody asks for a collective message in these steps.
        ("flip:1:20", "the checksum of a collective message does not fit: it was damaged on its way"),
    ] {
        let place = Place::with(RANKS);
        let args = ["train", "small.toml", "--name", "a", "--set", "parallel.data=3"];
        let mut command = place.command(&args);
        command.env("TRIBUTARY_FAULTS", fault);
        let ran = Job::spawn(&place, command).end();
        ran.failed(1, &["error: rank ", ") failed: ", "rank 1", said]);
        nobody_is_left(&place.path(""));
        assert!((18..=20).contains(&place.lines("a")), "{}", place.lines("a"));
        assert_eq!(place.summary("a")["status"], "failed");
    }
}
