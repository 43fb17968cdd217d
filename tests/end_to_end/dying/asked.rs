//! Whoever is asked to stop writes a checkpoint first; whoever was struck starts again, if that is wanted.

use rustix::process::Signal;

use super::{
    A_CHECKPOINT_IS_BEING_WRITTEN, Launcher, RANKS, Victim, Worker, nothing_is_left, outcome, resumes_bitwise, train,
    undisturbed,
};
use crate::processes::{nobody_is_left, send};
use crate::support::Place;

/// A signal that asks: all ranks stop after the same step, with a checkpoint.
fn asked(victim: Victim, signal: Signal, said: &str) {
    for _ in 0..10 {
        let place = Place::with(RANKS);
        // A launcher that was asked to stop does not start again; one whose worker was asked would.
        let restarts = if victim == Launcher { "3" } else { "0" };
        let mut job = train(&place, 2, &["--restarts", restarts]);
        job.wait("ten steps", |_| place.lines("a") >= 10);
        let pid = if let Worker(rank) = victim { job.worker(rank) } else { Some(job.pid()) };
        let Some(pid) = pid else { continue };
        send(pid, signal);
        let ran = job.end();
        if ran.code == Some(0) {
            continue;
        }
        let ran = ran.failed(75, &[said, "with a checkpoint: go on with --resume"]);
        assert!(!ran.stderr.contains("error: "), "{}", ran.stderr);
        nobody_is_left(&place.path(""));
        nothing_is_left(&place);
        assert_eq!(place.summary("a")["status"], "interrupted");
        let stopped_at = place.lines("a");
        assert!(place.path(&format!("runs/a/checkpoints/step-{stopped_at:08}")).is_dir());
        return resumes_bitwise(&place, 2);
    }
    panic!("ten runs ended before the signal came");
}

#[test]
fn a_launcher_that_is_asked_to_stop_writes_a_checkpoint_first() {
    asked(Launcher, Signal::TERM, "SIGTERM: stopping after this step and writing a checkpoint");
    asked(Launcher, Signal::INT, "SIGINT: stopping after this step and writing a checkpoint");
}

#[test]
fn a_worker_that_is_asked_to_stop_takes_all_others_with_it_after_the_same_step() {
    asked(Worker(1), Signal::TERM, "SIGTERM: stopping after this step and writing a checkpoint");
}

#[test]
fn a_second_signal_ends_all_at_once_and_leaves_nothing_half_made() {
    let met = (0..10).any(|_| {
        let place = Place::with(RANKS);
        let mut job = train(&place, 2, &["--set", "checkpoint.every=1"]);
        if !job.wait("a checkpoint that is being written", |job| A_CHECKPOINT_IS_BEING_WRITTEN(job, &place)) {
            return false;
        }
        // A worker that stands still keeps the first signal from being the end.
        let Some(worker) = job.worker(1) else { return false };
        send(worker, Signal::STOP);
        send(job.pid(), Signal::TERM);
        job.wait("the first signal's answer", |job| job.stderr().contains("stopping after this step"));
        send(job.pid(), Signal::TERM);
        job.end().failed(75, &["a second signal: stopping at once, without a checkpoint"]);
        nobody_is_left(&place.path(""));
        nothing_is_left(&place);
        resumes_bitwise(&place, 2);
        true
    });
    assert!(met, "ten runs ended before the moment came");
}

fn restarted(place: &Place) -> usize {
    place.events("a").iter().filter(|event| event["event"] == "restart").count()
}

#[test]
fn a_restart_ends_bitwise_and_a_second_loss_uses_it_up() {
    for losses in [1, 2] {
        let place = Place::with(RANKS);
        let mut job = train(&place, 2, &["--restarts", "1"]);
        let mut last = None;
        for loss in 0..losses {
            let done = job.wait("steps of this life", |job| {
                restarted(&place) == loss && place.lines("a") >= 20 && job.worker(1).is_some() && job.worker(1) != last
            });
            assert!(done, "the run ended before loss {loss}: a machine so busy proves nothing");
            last = job.worker(1);
            send(last.expect("it is there"), Signal::KILL);
        }
        let ran = job.end();
        assert!(ran.stderr.contains("starting again from the newest checkpoint, restart 1 of 1"), "{}", ran.stderr);
        nobody_is_left(&place.path(""));
        assert_eq!(restarted(&place), 1);
        if losses == 1 {
            ran.ok();
            assert_eq!(outcome(&place, "a"), undisturbed(2));
        } else {
            ran.failed(75, &["was killed by SIGKILL"]);
            resumes_bitwise(&place, 2);
        }
    }
}
