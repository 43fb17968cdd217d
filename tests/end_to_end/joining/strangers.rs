//! Whoever should not join, and whoever is no rank at all: told why, kept out, and no disturbance to those who are.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use parallel::control::{Control, ControlError, Join};
use parallel::transport::tls::Security;
use parallel::wire::control::Hello;

use super::{coordinator, gathered, port, rank_command, two_ports, worker};
use crate::dying::{RANKS, hostname, outcome};
use crate::processes::{HANG, Job, Listening, nobody_is_left, ports, processes};
use crate::support::Place;

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
    run(&listen("0.0.0.0:0")).failed(2, &["0.0.0.0 is beyond loopback", "TRIBUTARY_JOIN_SECRET", "--trusted-network"]);
    for (name, value, code, said) in [
        // On one machine the world's address does not matter: it goes on to look for the coordinator.
        ("HOST_ADDR", "10.1.2.3", 75, "no coordinator answered at 127.0.0.1:"),
        ("HOST_ADDR", "here", 2, "HOST_ADDR: expected an IP address"),
        ("RANK", "first", 2, "RANK: expected a number up to 65535, found \"first\""),
    ] {
        let mut command = place.command(&join(&free_at));
        command.env(name, value);
        Job::spawn(&place, command).end().failed(code, &[said]);
    }
    let set = [&join(&free_at)[..], &["--set", "train.steps=5"]].concat();
    run(&set).failed(2, &["--set train.steps: a worker takes the coordinator's recipe", "tagged local"]);
    run(&[&join(&free_at)[..], &["--set", "train.step=5"]].concat()).failed(2, &["train.step"]);
    nobody_is_left(&place.path(""));
    assert!(!place.path("runs/a").exists());
}

#[test]
fn a_machine_that_lacks_what_its_own_keys_ask_for_ends_the_run_by_name() {
    let place = Place::with(RANKS);
    let (has, lacks) = (["--rank", "0"], ["--rank", "1", "--set", "parallel.congestion_control=tortoise"]);
    let [all, one, two] = gathered(&place, &[], [&has, &lacks]);
    let said = "--set: parallel.congestion_control: expected \"system\" or one of ";
    let found = "found \"tortoise\": there is none of this name";
    [all, one, two].into_iter().for_each(|ran| _ = ran.failed(2, &[said, found]));
    assert_eq!(place.names("runs/a"), [] as [&str; 0]);
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    // On a busy machine rank 0 may need more than a second to be ready.
    for within in [1, 5, 25] {
        let place = Place::with(RANKS);
        let (job, address) = coordinator(&place, &["--set", &format!("parallel.join_timeout_s={within}")]);
        let [one, all] = [worker(&place, &address, &["--rank", "0"]).end(), job.end()];
        nobody_is_left(&place.path(""));
        assert_eq!(place.names("runs/a"), [] as [&str; 0]);
        if within < 25 && all.stderr.contains("\n  rank 0 ") {
            continue;
        }
        let late =
            format!("the run has not started within {within} s (parallel.join_timeout_s):\n  rank 1 has not joined");
        one.failed(75, &[&late]);
        all.failed(75, &[&late]);
        return;
    }
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
        security: Security::Loopback,
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
    let more = ["--set", "train.steps=1500", "--set", "checkpoint.every=250"];
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
    let strangers: [(Job, Vec<&str>); 6] = [
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
        (
            rank(&["--set", "parallel.data=1", "--set", "parallel.tensor=2"]),
            vec![
                "its recipe differs from the coordinator's",
                "parallel.data: the coordinator has 2, the worker 1",
                "parallel.tensor: the coordinator has 1, the worker 2",
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
    assert!(place.lines("a") < 1500, "the run ended too soon to prove anything");

    workers.into_iter().for_each(|job| _ = job.end().ok());
    job.end().ok();
    drop(held);
    assert_eq!(outcome(&place, "a"), outcome(&control, "whole"));
    nobody_is_left(&place.path(""));
}
