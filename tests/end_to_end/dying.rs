//! Whoever dies, and however: everybody else ends, says who it was, leaves nothing behind, and a resume is bitwise the
//! run that nobody disturbed. Linux, whose `/proc` tells the processes.
//!
//! - `asked`: signals that ask for an end, and restarts.
//! - `each`: every rank, killed and stopped.
//! - `memory`: what the others hold for a rank that stands still.
//! - `rounds`: random victims, random moments.

mod asked;
mod each;
mod memory;
pub mod rounds;

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::processes::{Job, listening, nobody_is_left, ports, processes, send};
use crate::support::{Place, Ran};

/// Two ranks, and tensors of 64 Ki elements, so that they travel as `int8` and leave residuals. Runs whose end is not
/// awaited keep the default peer timeout, half a minute: a busy machine does not trip it.
pub const RANKS: &str = r#"
[model]
hidden_size = 256
intermediate_size = 256
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 4

[tokenizer]
vocab_size = 300

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 60
seq_len = 32
micro_batch_size = 1
micro_batches = 1

[eval]
files = ["TEXT/held_out.txt"]
every = 20
windows = 2

[schedule]
learning_rate = 1e-3
warmup_steps = 5

[parallel]
data = 2

[checkpoint]
every = 8
"#;
const STEPS: usize = 60;
/// For runs in which somebody dies. Three seconds of silence are death then, which a busy machine may not reach.
const PEER_TIMEOUT_S: u32 = 4;

/// What a run comes to: its curve, and its summary without what only clocks decide.
pub type Outcome = (Vec<[String; 4]>, Vec<Value>);

pub fn outcome(place: &Place, run: &str) -> Outcome {
    let keys = ["status", "step", "loss", "parameter_hash", "held_out_bits_per_byte", "tokens", "mesh", "codec"];
    let summary = place.summary(run);
    (place.curve(run), keys.map(|key| summary[key].clone()).to_vec())
}

/// The run of so many ranks that nobody disturbs.
pub fn undisturbed(ranks: usize) -> Outcome {
    static RUNS: OnceLock<Mutex<BTreeMap<usize, Outcome>>> = OnceLock::new();
    let mut runs = RUNS.get_or_init(Mutex::default).lock().expect("a test that failed here says so itself");
    let run = || {
        let place = Place::with(RANKS);
        place.train("whole", &["--set", &format!("parallel.data={ranks}")]).ok();
        outcome(&place, "whole")
    };
    runs.entry(ranks).or_insert_with(run).clone()
}

/// Who is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Worker(usize),
    Launcher,
}
use Victim::{Launcher, Worker};

/// When somebody is struck.
type Moment = fn(&Job, &Place) -> bool;

const THIRTY_STEPS: Moment = |_, place| place.lines("a") >= 30;
const A_CHECKPOINT_IS_BEING_WRITTEN: Moment = |_, place| place.lines("a") >= 12 && partial(place);

fn partial(place: &Place) -> bool {
    place.names("runs/a/checkpoints").iter().any(|name| name.ends_with(".partial"))
}

fn train(place: &Place, ranks: usize, more: &[&str]) -> Job {
    let (data, timeout) = (format!("parallel.data={ranks}"), format!("parallel.peer_timeout_s={PEER_TIMEOUT_S}"));
    let args = ["train", "small.toml", "--name", "a", "--set", &data, "--set", &timeout];
    Job::start(place, &[&args, more].concat())
}

/// Waits for the moment, sends the signal, waits for everybody's end, and checks all that must hold then. `None` when
/// the run was over first.
#[track_caller]
fn strike(
    mut job: Job,
    place: &Place,
    victim: Victim,
    signal: Signal,
    moment: impl Fn(&Job, &Place) -> bool,
) -> Option<Ran> {
    job.wait("the moment", |job| moment(job, place));
    let pid = match victim {
        Launcher => job.pid(),
        Worker(rank) => job.worker(rank)?,
    };
    // So that the moment lasts while we look around.
    send(pid, Signal::STOP);
    let open: Vec<_> = processes(&place.path("")).into_iter().flat_map(|process| ports(process.pid)).collect();
    let (lines, struck) = (place.lines("a"), Instant::now());
    let ended = !(1..STEPS).contains(&lines);
    assert!(ended || open.len() >= 3, "the launcher and two workers listen, found {open:?}");
    send(pid, signal);
    if victim == Launcher && signal == Signal::STOP {
        // It cannot end itself; who could end it is not its worker.
        job.wait("the workers' end", |job| processes(&place.path("")).iter().all(|process| process.pid == job.pid()));
        send(pid, Signal::KILL);
    }
    job.wait("the launcher's end", |_| false);
    nobody_is_left(&place.path(""));
    let took = struck.elapsed();
    let ran = job.end();
    if ran.code == Some(0) {
        return None;
    }
    println!("{victim:?} {signal:?} after line {lines}: all had ended after {:.2} s", took.as_secs_f64());
    // A hang guard where other tests use these cores, and the promise where the rounds alone were asked for.
    let most = if std::env::var_os("TRIBUTARY_ROUNDS").is_some() { PEER_TIMEOUT_S } else { 10 * PEER_TIMEOUT_S };
    assert!(took < Duration::from_secs(most.into()), "{took:?}");
    // A launcher that dies while it starts a worker leaves a process that is none of ours until it has become that worker, and
    // ends then; until it has, it holds what the launcher had open.
    let still = || listening().into_iter().filter(|listening| open.contains(listening)).collect::<Vec<_>>();
    while !still().is_empty() && struck.elapsed() < Duration::from_secs((20 * PEER_TIMEOUT_S).into()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(still().is_empty(), "ports that are still open: {:?}", still());
    nobody_is_left(&place.path(""));
    nothing_is_left(place);
    names_the_culprit(&ran, victim, signal, pid);
    Some(ran)
}

#[track_caller]
fn nothing_is_left(place: &Place) {
    let left = [place.names("runs/a/checkpoints"), place.names("runs")].concat();
    let left: Vec<_> = left.iter().filter(|name| name.ends_with(".partial") || name.starts_with(".nonce-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[track_caller]
fn names_the_culprit(ran: &Ran, victim: Victim, signal: Signal, pid: u32) {
    let said = |text: &str| assert!(ran.stderr.contains(text), "expected {text:?} in:\n{}", ran.stderr);
    let host = hostname();
    match victim {
        Worker(rank) => {
            assert_eq!(ran.code, Some(75), "{}", ran.stderr);
            let how = if signal == Signal::STOP { "has been silent for" } else { "was killed by SIGKILL" };
            // Before it has joined, its launcher knows its process and no more.
            if !ran.stderr.contains(&format!("process {pid} was killed by SIGKILL before it had joined")) {
                said(&format!("error: rank {rank} (host {host}, process {pid}) {how}"));
            }
        }
        Launcher => {
            assert_eq!(ran.code, None, "killed");
            let how = if signal == Signal::STOP { "has been silent for" } else { "is gone" };
            // Before they have joined, workers know the launcher only as such.
            if !ran.stderr.contains(&format!("the launcher (process {pid}) is gone")) {
                said(&format!("(host {host}, process {pid}) {how}"));
            }
        }
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").expect("Linux").trim().to_owned()
}

#[track_caller]
fn resumes_bitwise(place: &Place, ranks: usize) {
    place.train("a", &["--resume", "--set", &format!("parallel.data={ranks}")]).ok();
    assert_eq!(outcome(place, "a"), undisturbed(ranks));
    nothing_is_left(place);
    let left = place.names("runs/a");
    assert!(!left.iter().any(|name| name.starts_with("export.")), "{left:?}");
}

/// Runs that may end before the moment comes: an export is over within milliseconds.
const TRIES: usize = 30;

/// Strikes, on a busy machine again and again until the moment is met, and resumes.
#[track_caller]
fn struck_and_resumed(victim: Victim, signal: Signal, more: &[&str], moment: Moment) -> Ran {
    for _ in 0..TRIES {
        let place = Place::with(RANKS);
        if let Some(ran) = strike(train(&place, 2, more), &place, victim, signal, moment) {
            resumes_bitwise(&place, 2);
            return ran;
        }
    }
    panic!("{TRIES} runs ended before the moment came");
}

#[track_caller]
fn says(ran: &Ran, all: &[&str]) {
    for text in all {
        assert!(ran.stderr.contains(text), "expected {text:?} in:\n{}", ran.stderr);
    }
}

#[test]
fn a_killed_worker_is_named_with_its_step_and_with_where_the_others_are() {
    for (rank, other) in [(0, 1), (1, 0)] {
        let ran = struck_and_resumed(Worker(rank), Signal::KILL, &[], THIRTY_STEPS);
        says(&ran, &["it was last seen at step ", &format!("\n  rank {other} (host "), "): step "]);
    }
}

#[test]
fn a_killed_launcher_is_named_by_the_workers() {
    let ran = struck_and_resumed(Launcher, Signal::KILL, &[], THIRTY_STEPS);
    says(&ran, &["the coordinator at 127.0.0.1:", "this worker was at step "]);
}

#[test]
fn a_kill_during_a_checkpoint_leaves_none_half_made() {
    for victim in [Worker(0), Worker(1), Launcher] {
        struck_and_resumed(victim, Signal::KILL, &["--set", "checkpoint.every=1"], A_CHECKPOINT_IS_BEING_WRITTEN);
    }
}

#[test]
fn a_kill_before_the_first_step() {
    let worker_is_there: Moment = |job, _| job.worker(1).is_some();
    let nonce_is_there: Moment = |_, place| place.names("runs").iter().any(|name| name.starts_with(".nonce-"));
    let folder_is_there: Moment = |_, place| place.path("runs/a").is_dir();
    for moment in [worker_is_there, nonce_is_there, folder_is_there] {
        for victim in [Worker(1), Launcher] {
            struck_and_resumed(victim, Signal::KILL, &[], moment);
        }
    }
}

#[test]
fn a_kill_at_the_very_end() {
    let last_line: Moment = |_, place| place.lines("a") >= STEPS;
    let export: Moment = |_, place| place.names("runs/a").iter().any(|name| name.starts_with("export."));
    struck_and_resumed(Worker(0), Signal::KILL, &[], last_line);
    struck_and_resumed(Launcher, Signal::KILL, &[], last_line);
    struck_and_resumed(Worker(0), Signal::KILL, &[], export);
}

#[test]
fn a_stopped_worker_is_named_and_killed() {
    let ran = struck_and_resumed(Worker(1), Signal::STOP, &[], THIRTY_STEPS);
    says(&ran, &["it was last seen at step ", "\n  rank 0 (host ", "waiting for the other ranks: rank 1's "]);
}

#[test]
fn a_stopped_launcher_is_named_by_the_workers() {
    let ran = struck_and_resumed(Launcher, Signal::STOP, &[], THIRTY_STEPS);
    says(&ran, &["the coordinator at 127.0.0.1:", "this worker was at step "]);
}

/// A run with a fault in one rank's step.
fn faulty(fault: &str) -> (Place, Ran) {
    let place = Place::with(RANKS);
    let mut command = place.command(&["train", "small.toml", "--name", "a", "--restarts", "0"]);
    command.env("TRIBUTARY_FAULTS", fault);
    let ran = Job::spawn(&place, command).end();
    nobody_is_left(&place.path(""));
    nothing_is_left(&place);
    (place, ran)
}

#[test]
fn a_worker_that_fails_by_itself_ends_all_with_its_error() {
    let (place, ran) = faulty("fail:1:20");
    ran.failed(1, &["error: rank 1 (host ", ") failed: step 20: it was told to fail"]);
    assert_eq!(place.summary("a")["status"], "failed");
    resumes_bitwise(&place, 2);
}

#[test]
fn those_who_wait_for_a_stopped_worker_say_for_which_bucket_and_parameter() {
    let (place, ran) = faulty("halt:1:21");
    let host = hostname();
    says(&ran, &[&format!("error: rank 1 (host {host}, process "), ") has been silent for "]);
    says(
        &ran,
        &[
            &format!("\n  rank 0 (host {host}, process "),
            "): step 21, waiting for the other ranks: rank 1's part of bucket 0, parameter ",
        ],
    );
    assert_eq!(ran.code, Some(75));
    resumes_bitwise(&place, 2);
}

#[test]
fn a_worker_that_aborts_is_a_lost_peer() {
    let (place, ran) = faulty("die:1:20");
    ran.failed(75, &["error: rank 1 (host ", ") was killed by SIGABRT; it was last seen at "]);
    resumes_bitwise(&place, 2);
}
