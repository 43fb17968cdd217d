//! Ranks that are started one by one, as on several machines, and whoever should not join. Linux.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use parallel::control::{Control, ControlError, Join};
use parallel::wire::control::Hello;
use rustix::process::Signal;

use crate::dying::{RANKS, hostname, outcome, undisturbed};
use crate::processes::{HANG, Job, Listening, nobody_is_left, ports, processes, send};
use crate::support::{Place, Ran};

/// Starts a coordinator on a port that the system chooses, and returns its address.
#[track_caller]
fn coordinator(place: &Place, more: &[&str]) -> (Job, String) {
    let args = ["coordinator", "small.toml", "--name", "a", "--listen", "127.0.0.1:0"];
    let mut job = Job::start(place, &[&args, more].concat());
    let mut address = None;
    job.wait("an address", |job| {
        let (stderr, before) = (job.stderr(), "coordinating 2 ranks at ");
        let said = stderr.split_once(before).and_then(|(_, rest)| rest.split_once(": "));
        address = said.map(|(address, _)| address.to_owned());
        address.is_some()
    });
    let address = address.unwrap_or_else(|| panic!("no address in:\n{}", job.stderr()));
    (job, address)
}

fn worker(place: &Place, address: &str, more: &[&str]) -> Job {
    Job::start(place, &[&["worker", "--join", address], more].concat())
}

/// A coordinator and a worker for each rank, to their ends.
#[track_caller]
fn gathered(place: &Place, more: &[&str], workers: [&[&str]; 2]) -> [Ran; 3] {
    let (job, address) = coordinator(place, more);
    let workers = workers.map(|more| worker(place, &address, more));
    let [one, two] = workers.map(Job::end);
    let all = [job.end(), one, two];
    nobody_is_left(&place.path(""));
    all
}

#[test]
fn workers_that_join_come_to_the_launchers_parameters() {
    let place = Place::with(RANKS);
    gathered(&place, &[], [&[], &[]]).into_iter().for_each(|ran| _ = ran.ok());
    assert_eq!(outcome(&place, "a"), undisturbed(2));
}

const APART: [&[&str]; 2] =
    [&["--rank", "0", "--set", "metrics.runs_dir=runs/one"], &["--rank", "1", "--set", "metrics.runs_dir=runs/two"]];

#[test]
fn machines_with_folders_of_their_own_resume_from_the_newest_checkpoint_that_both_have() {
    let place = Place::with(RANKS);
    gathered(&place, &["--set", "train.stop_at_step=30"], APART).into_iter().for_each(|ran| _ = ran.ok());
    let kept = ["step-00000024", "step-00000030"];
    for step in kept {
        let manifest = |machine| {
            let manifest = place.path(&format!("runs/{machine}/a/checkpoints/{step}/manifest.json"));
            let manifest = std::fs::read(manifest).expect("readable");
            serde_json::from_slice::<serde_json::Value>(&manifest).expect("JSON")
        };
        let (one, two) = (manifest("one"), manifest("two"));
        assert!(one["body"]["id"].is_string() && one["body"]["id"] == two["body"]["id"], "{one}\n{two}");
    }
    let remove = |name: &str| std::fs::remove_dir_all(place.path(name)).expect("ours");
    let checkpoints = |machine| place.names(&format!("runs/{machine}/a/checkpoints"));
    assert_eq!(checkpoints("one"), kept);
    assert_eq!(checkpoints("two"), kept);

    // One machine has lost its newest.
    remove("runs/two/a/checkpoints/step-00000030");
    let [_, one, _] = gathered(&place, &["--resume"], APART).map(Ran::ok);
    assert!(one.stderr.contains("going on after step 24"), "{}", one.stderr);
    assert_eq!(outcome(&place, "one/a"), undisturbed(2));
    assert_eq!(checkpoints("one").last(), checkpoints("two").last());

    // It has lost all, and then its folder too.
    for lost in ["runs/two/a/checkpoints", "runs/two/a"] {
        remove(lost);
        let said = ["the machines have no checkpoint of this run in common", "\n  rank 1 (host ", "): none\n"];
        gathered(&place, &["--resume"], APART).into_iter().for_each(|ran| _ = ran.failed(2, &said));
        assert_eq!(place.path("runs/two/a/logs").is_dir(), lost != "runs/two/a", "what was there stays");
    }
    assert!(!place.path("runs/two/a").exists(), "a run that did not begin leaves no folder");
    assert_eq!(outcome(&place, "one/a"), undisturbed(2));
}

/// Two neighbouring ports that nobody has, below those that the system gives away by itself.
fn two_ports() -> (TcpListener, TcpListener) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + (std::process::id() % 500) as u16 * 20;
    loop {
        let port = first + NEXT.fetch_add(2, Ordering::Relaxed);
        if let (Ok(one), Ok(two)) = (TcpListener::bind(("127.0.0.1", port)), TcpListener::bind(("127.0.0.1", port + 1)))
        {
            return (one, two);
        }
    }
}

fn port(listener: &TcpListener) -> String {
    listener.local_addr().expect("it listens").port().to_string()
}

/// A rank as torchrun starts it.
fn rank_command(place: &Place, rank: usize, master_port: &str, more: &[&str]) -> Command {
    let mut command = place.command(&[&["train", "small.toml"], more].concat());
    let variables = [("RANK", &*rank.to_string()), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")];
    command.envs(variables).env("MASTER_PORT", master_port);
    command
}

#[test]
fn ranks_from_the_environment_meet_at_the_master_port() {
    let place = Place::with(RANKS);
    let (master, _) = two_ports();
    let at = port(&master);
    drop(master);
    let jobs = [1, 0].map(|rank| Job::spawn(&place, rank_command(&place, rank, &at, &["--name", "a"])));
    jobs.into_iter().for_each(|job| _ = job.end().ok());
    nobody_is_left(&place.path(""));
    assert_eq!(outcome(&place, "a"), undisturbed(2));
}

#[test]
fn a_master_port_that_somebody_else_has_is_left_alone() {
    // torchrun keeps it, and never answers a stranger.
    let (master, next) = two_ports();
    let (other, _) = two_ports();
    let (at, tributary) = (port(&master), port(&other));
    drop((next, other));
    for elsewhere in [None, Some(tributary)] {
        let place = Place::with(RANKS);
        let start = |rank| {
            let mut command = rank_command(&place, rank, &at, &["--name", "a"]);
            elsewhere.iter().for_each(|port| _ = command.env("TRIBUTARY_PORT", port));
            Job::spawn(&place, command)
        };
        [0, 1].map(start).into_iter().for_each(|job| _ = job.end().ok());
        nobody_is_left(&place.path(""));
        assert_eq!(outcome(&place, "a"), undisturbed(2));
    }
}

#[test]
fn with_ranks_from_the_environment_a_kill_ends_all_too() {
    // Whom to kill: the launcher or the worker of a rank.
    for (rank, launcher) in [(1, true), (1, false), (0, true), (0, false)] {
        let met = (0..10).any(|_| {
            let place = Place::with(RANKS);
            let (master, _) = two_ports();
            let at = port(&master);
            drop(master);
            let more = ["--name", "a", "--set", "parallel.peer_timeout_s=4"];
            let mut jobs = [0, 1].map(|rank| Job::spawn(&place, rank_command(&place, rank, &at, &more)));
            jobs[0].wait("thirty steps", |_| place.lines("a") >= 30);
            let Some(worker) = jobs[rank].worker(rank) else { return false };
            send(if launcher { jobs[rank].pid() } else { worker }, Signal::KILL);
            nobody_is_left(&place.path(""));
            let mut rans = jobs.map(Job::end);
            if rans[1 - rank].code == Some(0) {
                return false;
            }
            let (other, struck) = if rank == 1 {
                let [a, b] = &mut rans;
                (a, b)
            } else {
                let [a, b] = &mut rans;
                (b, a)
            };
            assert_eq!(other.code, Some(75), "{}", other.stderr);
            // Rank 0's launcher is the coordinator; without it, nobody can say more than where it was.
            let culprit = match launcher && rank == 0 {
                true => "error: the coordinator at 127.0.0.1:".to_owned(),
                false => format!("error: rank {rank} (host {}, process ", hostname()),
            };
            assert!(other.stderr.contains(&culprit), "expected {culprit:?} in:\n{}", other.stderr);
            assert!(launcher || other.stderr.contains(&format!("process {worker})")), "{}", other.stderr);
            match launcher {
                true => assert_eq!(struck.code, None),
                false => {
                    assert_eq!(struck.code, Some(75), "{}", struck.stderr);
                    assert!(struck.stderr.contains("was killed by SIGKILL"), "{}", struck.stderr);
                }
            }
            let left = [place.names("runs/a/checkpoints"), place.names("runs")].concat();
            assert!(!left.iter().any(|name| name.ends_with(".partial") || name.starts_with(".nonce-")), "{left:?}");
            place.train("a", &["--resume"]).ok();
            assert_eq!(outcome(&place, "a"), undisturbed(2));
            true
        });
        assert!(met, "ten runs ended before the moment came");
    }
}

#[test]
fn an_environment_that_makes_no_sense_is_named() {
    let place = Place::with(RANKS);
    let full = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
    let cases: [(&str, Option<&str>, &str); 10] = [
        ("WORLD_SIZE", Some("3"), "WORLD_SIZE is 3, the recipe's parallel.data is 2: make them equal"),
        ("RANK", Some("2"), "RANK: expected less than WORLD_SIZE = 2, found 2"),
        ("RANK", Some("one"), "RANK: expected a number up to 65535, found \"one\""),
        ("RANK", None, "RANK: expected it beside WORLD_SIZE, it is not set"),
        ("WORLD_SIZE", None, "WORLD_SIZE: expected it beside RANK, it is not set"),
        ("MASTER_ADDR", None, "MASTER_ADDR: expected it beside RANK and WORLD_SIZE, it is not set"),
        ("MASTER_PORT", None, "MASTER_PORT: expected it beside RANK and WORLD_SIZE, it is not set"),
        ("MASTER_PORT", Some("99999"), "MASTER_PORT: expected a number up to 65535"),
        ("MASTER_ADDR", Some("10.255.255.1"), "10.255.255.1 is beyond loopback"),
        ("MASTER_ADDR", Some("no such host"), "MASTER_ADDR: expected a host, found \"no such host\""),
    ];
    for (name, value, said) in cases {
        let mut command = place.command(&["train", "small.toml", "--name", "a"]);
        command.envs(full);
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
        Job::spawn(&place, command).end().failed(2, &[said]);
        assert!(!place.path("runs/a").exists());
    }
    nobody_is_left(&place.path(""));
}

#[test]
fn a_command_line_that_cannot_work_is_named() {
    let place = Place::with(RANKS);
    let (taken, free) = two_ports();
    let (taken_at, free_at) = (format!("127.0.0.1:{}", port(&taken)), format!("127.0.0.1:{}", port(&free)));
    drop(free);
    let join = |address| ["worker", "--join-timeout-s", "1", "--join", address];
    let listen = |address| ["coordinator", "small.toml", "--name", "a", "--listen", address];
    let run = |args: &[&str]| Job::start(&place, args).end();
    run(&join(&free_at)).failed(75, &["no coordinator answered at 127.0.0.1:", "within 1 s", "start it first"]);
    // There is somebody, who never says a word.
    run(&join(&taken_at)).failed(75, &["no coordinator answered at 127.0.0.1:", "within 1 s"]);
    run(&join("127.0.0.1")).failed(2, &["--join 127.0.0.1: expected HOST:PORT of a coordinator"]);
    run(&join("127.0.0.1:http")).failed(2, &["--join 127.0.0.1:http: expected HOST:PORT of a coordinator"]);
    run(&["worker"]).failed(2, &["--join: expected HOST:PORT of a coordinator"]);
    run(&listen(&taken_at)).failed(2, &["the coordinator cannot listen at 127.0.0.1:", "the port is in use"]);
    run(&listen("0.0.0.0:0")).failed(2, &["0.0.0.0 is beyond loopback", "--trusted-network"]);
    for (host, said) in [("10.1.2.3", "10.1.2.3 is beyond loopback"), ("here", "HOST_ADDR: expected an IP address")] {
        let mut command = place.command(&join(&free_at));
        command.env("HOST_ADDR", host);
        Job::spawn(&place, command).end().failed(2, &[said]);
    }
    let set = [&join(&free_at)[..], &["--set", "train.steps=5"]].concat();
    run(&set).failed(2, &["--set train.steps: a worker takes the coordinator's recipe", "tagged local"]);
    run(&[&join(&free_at)[..], &["--set", "train.step=5"]].concat()).failed(2, &["train.step"]);
    nobody_is_left(&place.path(""));
    assert!(!place.path("runs/a").exists());
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let place = Place::with(RANKS);
    let (job, address) = coordinator(&place, &["--set", "parallel.join_timeout_s=1"]);
    let one = worker(&place, &address, &["--rank", "0"]).end();
    let said = ["the run has not started within 1 s (parallel.join_timeout_s):\n  rank 1 has not joined"];
    one.failed(75, &said);
    job.end().failed(75, &said);
    nobody_is_left(&place.path(""));
    assert_eq!(place.names("runs/a"), [] as [&str; 0]);
}

/// Strangers on a port: none of them gets an answer that goes on, and the last one stays on the line.
fn strange(port: Listening) -> TcpStream {
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", port.port)).expect("somebody listens");
        stream.set_read_timeout(Some(HANG)).expect("a socket");
        stream
    };
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let http = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";
    // The preface of HTTP/2, a frame of settings, and a call of a service that is not there.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\xff\xff\xff\x01\x05\0\0\0\x01";
    for words in [&http[..], &noise, &preface[..]] {
        let mut stream = connect();
        // It may close before it has read everything.
        let _ = stream.write_all(words);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        let hangs = end
            .is_err_and(|error| matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut));
        assert!(!hangs, "a stranger is still on the line after {HANG:?}");
        assert!(answer.len() < 1000, "{answer:?}");
    }
    connect()
}

/// What the coordinator says to a worker of another version.
fn of_another_version(address: &str) -> ControlError {
    let hello = Hello { version: "0.0.7".into(), rank: Some(1), host: "far".into(), pid: 7, recipe: None };
    let joined = Control::join(Join {
        address: address.into(),
        within: Duration::from_secs(10),
        hello,
        progress: Default::default(),
        on_end: Box::new(|_, _| ()),
        on_stop: Box::new(|| ()),
    });
    joined.expect_err("another version")
}

#[test]
fn whoever_should_not_join_is_told_why_and_disturbs_nobody() {
    // Long enough that the run outlives all of them.
    let more = ["--set", "train.steps=600", "--set", "checkpoint.every=100"];
    let control = Place::with(RANKS);
    control.train("whole", &more).ok();

    let place = Place::with(RANKS);
    let (mut job, address) = coordinator(&place, &more);
    let (_, port) = address.split_once(':').expect("HOST:PORT");
    let workers = [0, 1].map(|rank: usize| worker(&place, &address, &["--rank", &rank.to_string()]));
    assert!(job.wait("five steps", |_| place.lines("a") >= 5), "{}", job.stderr());

    let run = |args: &[&str]| worker(&place, &address, args);
    let rank = |sets: &[&str]| {
        Job::spawn(&place, rank_command(&place, 1, port, &[&["--name", "b"], &more[..], sets].concat()))
    };
    let name = format!("rank 1 (host {}, process ", hostname());
    let strangers: [(Job, Vec<&str>); 5] = [
        (run(&[]), vec!["refuses this worker", "the recipe's mesh has 2 ranks and all of them have joined"]),
        (
            run(&["--rank", "1"]),
            vec!["refuses this worker", &name, "has joined already: give each worker a rank of its own"],
        ),
        (run(&["--rank", "7"]), vec!["refuses this worker", "it asks for rank 7, the recipe's mesh has ranks 0 to 1"]),
        (rank(&[]), vec!["refuses this worker", "has joined already"]),
        (
            rank(&["--set", "optimizer.weight_decay=0.5", "--set", "train.seed=9"]),
            vec![
                "refuses this worker",
                "its recipe differs from the coordinator's",
                "optimizer.weight_decay: the coordinator has ",
                "the worker 0.5",
                "train.seed: the coordinator has ",
            ],
        ),
    ];
    for (job, said) in strangers {
        job.end().failed(2, &said);
    }
    let said = of_another_version(&address).to_string();
    assert!(said.contains("it is version 0.0.7, the coordinator is ") && said.contains("run the same build"), "{said}");
    // The coordinator's port, and both workers' for data.
    let all = processes(&place.path(""));
    let open: BTreeSet<Listening> = all.iter().flat_map(|process| ports(process.pid)).collect();
    assert_eq!(open.len(), 3, "{open:?} of {all:?}");
    let held: Vec<TcpStream> = open.into_iter().map(strange).collect();
    assert!(place.lines("a") < 600, "the run ended too soon to prove anything");

    workers.into_iter().for_each(|job| _ = job.end().ok());
    job.end().ok();
    drop(held);
    assert_eq!(outcome(&place, "a"), outcome(&control, "whole"));
    nobody_is_left(&place.path(""));
}
