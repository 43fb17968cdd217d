//! Ranks that are started one by one, as on several machines. Linux.
//!
//! - `apart`: machines with folders of their own, where ranks change or a checkpoint is damaged.
//! - `meshes`: the same machines, on another mesh.
//! - `strangers`: whoever should not join.

mod apart;
mod meshes;
mod strangers;

use std::net::TcpListener;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::process::Signal;

use crate::dying::{RANKS, hostname, outcome, undisturbed};
use crate::processes::{Job, nobody_is_left, send};
use crate::support::{Place, Ran};

/// Starts a coordinator on a port that the system chooses, and returns its address.
#[track_caller]
pub fn coordinator(place: &Place, more: &[&str]) -> (Job, String) {
    let args = ["coordinator", "small.toml", "--name", "a", "--listen", "127.0.0.1:0"];
    let mut job = Job::start(place, &[&args, more].concat());
    let mut address = None;
    job.wait("an address", |job| {
        let (stderr, before) = (job.stderr(), " ranks at ");
        let said = stderr.split_once(before).and_then(|(_, rest)| rest.split_once(": "));
        address = said.map(|(address, _)| address.to_owned());
        address.is_some()
    });
    let address = address.unwrap_or_else(|| panic!("no address in:\n{}", job.stderr()));
    (job, address)
}

pub fn worker(place: &Place, address: &str, more: &[&str]) -> Job {
    Job::start(place, &[&["worker", "--join", address], more].concat())
}

/// A coordinator and a worker for each rank, to their ends.
#[track_caller]
pub fn gathered(place: &Place, more: &[&str], workers: [&[&str]; 2]) -> [Ran; 3] {
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
    // What paces a connection changes nothing that is computed.
    let reno = ["--set", "parallel.congestion_control=reno"];
    gathered(&place, &[], [&[], &reno]).into_iter().for_each(|ran| _ = ran.ok());
    assert_eq!(outcome(&place, "a"), undisturbed(2));
}

pub const APART: [&[&str]; 2] =
    [&["--rank", "0", "--set", "metrics.runs_dir=runs/one"], &["--rank", "1", "--set", "metrics.runs_dir=runs/two"]];

#[test]
fn machines_with_folders_of_their_own_resume_from_the_newest_checkpoint_that_both_have() {
    let place = Place::with(RANKS);
    // A disk that is busy must not leave one out.
    gathered(&place, &["--set", "train.stop_at_step=30", "--set", "checkpoint.when_busy=wait"], APART)
        .into_iter()
        .for_each(|ran| _ = ran.ok());
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

/// A port that nobody has, with its neighbour.
pub fn free_port() -> String {
    let (one, _) = two_ports();
    port(&one)
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
