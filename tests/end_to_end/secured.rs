//! Runs with a join secret, and whoever does not know it. Linux.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use crate::dying::{RANKS, outcome, undisturbed};
use crate::processes::{HANG, Job, Listening, nobody_is_left, ports, processes};
use crate::support::{Place, Ran};

const SECRET: &str = "a secret that only this test knows";
const VARIABLE: &str = "TRIBUTARY_JOIN_SECRET";
const FILE: &str = "TRIBUTARY_JOIN_SECRET_FILE";

/// A command with this variable.
fn with(place: &Place, args: &[&str], variable: &str, value: &str) -> Command {
    let mut command = place.command(args);
    command.env(variable, value);
    command
}

/// What a coordinator that was just started says where it is.
#[track_caller]
fn address(job: &mut Job) -> String {
    let mut address = None;
    job.wait("an address", |job| {
        let stderr = job.stderr();
        let said = stderr.split_once("coordinating 2 ranks at ").and_then(|(_, rest)| rest.split_once(": "));
        address = said.map(|(address, _)| address.to_owned());
        address.is_some()
    });
    address.unwrap_or_else(|| panic!("no address in:\n{}", job.stderr()))
}

/// Files of a folder and below it that have the secret in them.
fn told(folder: &std::path::Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            told(&path, found);
        } else {
            let bytes = std::fs::read(&path).unwrap_or_default();
            if bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()) {
                found.push(path.display().to_string());
            }
        }
    }
}

/// What every port of the run answers first to the beginning of HTTP/2.
fn answers(place: &Place) -> Vec<u8> {
    let open: BTreeSet<Listening> = processes(&place.path("")).iter().flat_map(|process| ports(process.pid)).collect();
    let answer = |port: Listening| {
        let mut stream = TcpStream::connect(("127.0.0.1", port.port)).expect("somebody listens");
        stream.set_read_timeout(Some(HANG)).expect("a socket");
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").expect("room for a few bytes");
        let mut first = [0xff];
        stream.read_exact(&mut first).expect("an answer");
        first[0]
    };
    open.into_iter().map(answer).collect()
}

#[test]
fn a_launchers_run_with_a_secret_is_encrypted_and_bitwise_the_one_without_and_tells_nobody() {
    const STEPS: usize = 300;
    /// The first byte of an alert of TLS, and of the settings of HTTP/2.
    const SECURED: u8 = 21;
    const PLAIN: u8 = 0;
    let place = Place::with(RANKS);
    let run = |name: &str, secret: Option<&str>| {
        let mut command =
            place.command(&["train", "small.toml", "--name", name, "--set", &format!("train.steps={STEPS}")]);
        command.env("TRIBUTARY_LOG", "debug");
        secret.iter().for_each(|secret| _ = command.env(VARIABLE, secret));
        let mut job = Job::spawn(&place, command);
        job.wait("a step", |_| place.lines(name) >= 1);
        let answers = answers(&place);
        for process in processes(&place.path("")) {
            let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            assert!(!line.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()), "{process:?}");
        }
        assert!(place.lines(name) < STEPS, "the run ended too soon to prove anything");
        job.end().ok();
        nobody_is_left(&place.path(""));
        (answers, outcome(&place, name))
    };
    // The coordinator's port, and both workers' for data.
    let (answers, secured) = run("a", Some(SECRET));
    assert_eq!(answers, [SECURED; 3]);
    let (answers, plain) = run("b", None);
    assert_eq!(answers, [PLAIN; 3]);
    assert_eq!(secured, plain);
    // Also what the processes said lies in this folder.
    let mut found = Vec::new();
    told(&place.path(""), &mut found);
    assert_eq!(found, [] as [&str; 0]);
    // The control: it would be found.
    let path = place.path("runs/a/control");
    std::fs::write(&path, format!("is {SECRET} here?")).expect("writable");
    told(&place.path(""), &mut found);
    assert_eq!(found, [path.display().to_string()]);
}

#[test]
fn a_worker_that_does_not_know_the_secret_is_told_why_and_the_run_goes_on() {
    let place = Place::with(RANKS);
    let listen = ["coordinator", "small.toml", "--name", "a", "--listen", "127.0.0.1:0"];
    let mut coordinator = Job::spawn(&place, with(&place, &listen, VARIABLE, SECRET));
    let address = address(&mut coordinator);
    let worker = ["worker", "--join", &address, "--join-timeout-s", "30"];
    // The same secret, from a file.
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("secret");
    writeln!(File::create(&file).expect("writable"), "{SECRET}").expect("writable");
    let file = file.display().to_string();
    let first = Job::spawn(&place, with(&place, &worker, FILE, &file));

    let named = format!("no connection to the coordinator at {address}: ");
    let wrong = with(&place, &worker, VARIABLE, "another secret than that of the run");
    let wrong = Job::spawn(&place, wrong).end();
    wrong.failed(2, &[&named, "it has another secret", "TRIBUTARY_JOIN_SECRET must be the same"]);
    let without = Job::start(&place, &worker).end();
    without.failed(2, &[&named, "it speaks TLS", "this process needs its TRIBUTARY_JOIN_SECRET"]);
    let trusting = with(&place, &[&worker[..], &["--trusted-network"]].concat(), VARIABLE, SECRET);
    let trusting = Job::spawn(&place, trusting).end();
    trusting.failed(2, &[&named, "it speaks TLS", "no --trusted-network", "is not used"]);

    let second = Job::spawn(&place, with(&place, &worker, VARIABLE, SECRET));
    for job in [first, second, coordinator] {
        let Ran { stderr, .. } = job.end().ok();
        assert!(!stderr.contains(SECRET) && !stderr.contains("WARNING"), "{stderr}");
    }
    nobody_is_left(&place.path(""));
    assert_eq!(outcome(&place, "a"), undisturbed(2));
}

#[test]
fn a_secret_that_is_none_is_refused_before_anything_begins() {
    let place = Place::with(RANKS);
    let train = ["train", "small.toml", "--name", "a"];
    let short = "fifteen bytes..";
    let refused = |command| Job::spawn(&place, command).end();
    let said = ["TRIBUTARY_JOIN_SECRET: expected a secret of 16 to 4096 bytes, found 15", "openssl rand -hex 32"];
    let ran = refused(with(&place, &train, VARIABLE, short)).failed(2, &said);
    assert!(!ran.stderr.contains(short), "{}", ran.stderr);
    let mut both = with(&place, &train, VARIABLE, SECRET);
    both.env(FILE, "secret");
    refused(both).failed(2, &["TRIBUTARY_JOIN_SECRET and TRIBUTARY_JOIN_SECRET_FILE: expected one of them"]);
    refused(with(&place, &train, FILE, "missing")).failed(2, &[FILE, "missing", "expected a file with the secret"]);
    assert!(!place.path("runs/a").exists());
    nobody_is_left(&place.path(""));
}

#[test]
fn a_trusted_network_turns_tls_off_aloud() {
    let place = Place::with(RANKS);
    let args = ["train", "small.toml", "--name", "a", "--trusted-network", "--set", "train.stop_at_step=2"];
    let ran = Job::spawn(&place, with(&place, &args, VARIABLE, SECRET)).end().ok();
    let said = "WARNING: --trusted-network: connections are neither encrypted nor authenticated";
    assert_eq!(ran.stderr.matches(said).count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("TRIBUTARY_JOIN_SECRET is not used"), "{}", ran.stderr);
    // The control: without the flag nothing is said.
    let args = ["train", "small.toml", "--name", "b", "--set", "train.stop_at_step=2"];
    let ran = Job::start(&place, &args).end().ok();
    assert!(!ran.stderr.contains("WARNING"), "{}", ran.stderr);
}
