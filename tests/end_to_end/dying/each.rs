//! Every rank of three, killed and stopped, each at a step from a seed: whoever is left says who it was.

use rustix::process::Signal;

use super::rounds::Random;
use super::{RANKS, STEPS, Worker, hostname, strike, train};
use crate::processes::Job;
use crate::support::Place;

const RANKS_MAX: usize = 3;

/// Strikes a rank once a line of that step is there, and looks at what each of the others wrote down.
#[track_caller]
fn struck_and_named_by_all(rank: usize, signal: Signal, step: usize) {
    for _ in 0..10 {
        let place = Place::with(RANKS);
        let moment = |job: &Job, place: &Place| {
            place.lines("a") >= step && (0..RANKS_MAX).all(|rank| job.worker(rank).is_some())
        };
        let Some(_) = strike(train(&place, RANKS_MAX, &[]), &place, Worker(rank), signal, moment) else { continue };
        let culprit = format!("the run ended: rank {rank} (host {}, process ", hostname());
        for other in (0..RANKS_MAX).filter(|&other| other != rank) {
            let log = std::fs::read_to_string(place.path(&format!("runs/a/logs/rank-{other}.log"))).expect("a log");
            assert!(log.contains(&culprit), "expected {culprit:?} in the log of rank {other}:\n{log}");
        }
        return;
    }
    panic!("ten runs ended before step {step}");
}

#[test]
fn whichever_rank_is_killed_or_stopped_all_others_name_it() {
    let mut random = Random(7);
    for rank in 0..RANKS_MAX {
        for signal in [Signal::KILL, Signal::STOP] {
            struck_and_named_by_all(rank, signal, 1 + random.below(STEPS - 20));
        }
    }
}
