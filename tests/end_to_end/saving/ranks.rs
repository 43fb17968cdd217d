//! Two ranks that write checkpoints into one folder: killed in the middle of it, with disks that are full, with a checkpoint
//! that is damaged.

use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use super::killed::{Load, as_many_as_are_wanted, half_written};
use super::steps_of;
use crate::dying::rounds::Random;
use crate::dying::{RANKS, outcome, undisturbed};
use crate::processes::{Job, nobody_is_left, processes, send};
use crate::resume::spoil;
use crate::support::Place;

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victims {
    /// The machine: everybody at once.
    All,
    Launcher,
    Worker(usize),
}

impl Victims {
    fn kill(self, job: &Job, place: &Place) {
        let pids = match self {
            Self::All => processes(&place.path("")).iter().map(|process| process.pid).collect(),
            Self::Launcher => vec![job.pid()],
            Self::Worker(rank) => job.worker(rank).into_iter().collect(),
        };
        // Stopped first, so that none of them ends because another has.
        for signal in [Signal::STOP, Signal::KILL] {
            pids.iter().for_each(|&pid| send(pid, signal));
        }
    }
}

/// Kills one run of two ranks up to so often, in the middle of saves of random steps, and resumes it after each.
fn run(seed: u64, kills: usize) -> (usize, usize) {
    let mut random = Random(seed);
    let (limit, micros_max) = [("0", 5_000), ("0", 20_000), ("40000000", 60_000)][random.below(3)];
    let limit = format!("checkpoint.write_bytes_per_s_max={limit}");
    let mut after: Vec<usize> = (0..kills).map(|_| random.below(50)).collect();
    after.sort_unstable();
    let place = Place::with(RANKS);
    let load = Load::begin(&place);
    let (mut killed, mut hit) = (0, 0);
    for &lines in &after {
        let args = ["train", "small.toml", "--name", "a", "--set", "checkpoint.every=2", "--set", &limit];
        let more = ["--set", "parallel.peer_timeout_s=4", "--resume"];
        let mut job = Job::start(&place, &[&args[..], &more[..if killed == 0 { 2 } else { 3 }]].concat());
        // What the kill before has left goes when the run begins.
        job.wait("the first step", |_| place.lines("a") > 0 && !half_written(&place));
        let began = job.wait("a save", |_| place.lines("a") >= lines && half_written(&place));
        std::thread::sleep(Duration::from_micros(random.below(micros_max) as u64));
        let victims =
            [Victims::All, Victims::All, Victims::Launcher, Victims::Worker(0), Victims::Worker(1)][random.below(5)];
        victims.kill(&job, &place);
        let found = half_written(&place);
        let ran = job.end();
        nobody_is_left(&place.path(""));
        if ran.code == Some(0) || !began {
            break;
        }
        killed += 1;
        hit += usize::from(found);
    }
    println!("seed {seed}: {killed} kills after lines {after:?}, {limit}: {hit} left a checkpoint half-written");
    drop(load);
    place.train("a", &["--resume"]).ok();
    assert_eq!(outcome(&place, "a"), undisturbed(2), "seed {seed}");
    assert!(!half_written(&place));
    (killed, hit)
}

/// `TRIBUTARY_KILLS=200 cargo test --workspace --test end_to_end saving::ranks::kills -- --nocapture`
#[test]
fn kills_in_saves_of_two_ranks_eight_or_as_many_as_are_wanted_end_at_the_same_parameters() {
    as_many_as_are_wanted(8, run);
}

/// Runs two ranks, fills the disks of some of them for a while, and returns whether that came to an end before the run did.
fn full_for_a_while(full: &[usize], expected: &crate::dying::Outcome) -> bool {
    // No file may grow beyond 64 KiB: metrics fit for a while, checkpoints do not.
    let few = Rlimit { current: Some(1 << 16), maximum: None };
    let place = Place::with(RANKS);
    let args = ["train", "small.toml", "--name", "a", "--set", "checkpoint.every=2", "--set", "train.steps=200"];
    let mut job = Job::start(&place, &args);
    job.wait("a checkpoint", |_| !steps_of(&place.events("a"), "checkpoint").is_empty());
    let limit = |job: &Job, limit: Rlimit| {
        for pid in full.iter().filter_map(|&rank| job.worker(rank)) {
            // The process may be over already; its exit code tells.
            let _ = prlimit(Pid::from_raw(pid as i32), Resource::Fsize, limit);
        }
    };
    limit(&job, few);
    let failed = || steps_of(&place.events("a"), "checkpoint_failed");
    job.wait("a checkpoint that fails", |_| !failed().is_empty());
    let kept = place.names("runs/a/checkpoints").iter().any(|name| name.len() == "step-00000002".len());
    limit(&job, Rlimit { current: None, maximum: None });
    let ran = job.end();
    if ran.code != Some(0) || failed().is_empty() {
        return false;
    }
    assert!(kept, "the last good one stayed");
    assert!(ran.stderr.contains("training goes on"), "{}", ran.stderr);
    let (failed, written) = (failed(), steps_of(&place.events("a"), "checkpoint"));
    assert!(
        written.iter().any(|step| step > failed.last().expect("one failed")),
        "{failed:?} failed, {written:?} came"
    );
    assert!(!half_written(&place));
    assert_eq!(&outcome(&place, "a"), expected);
    true
}

#[test]
fn two_ranks_whose_disks_are_full_for_a_while_go_on_alike_and_write_again() {
    let whole = Place::with(RANKS);
    whole.train("a", &["--set", "train.steps=200"]).ok();
    let expected = outcome(&whole, "a");
    for full in [&[0, 1][..], &[1]] {
        // On a busy machine the run may be over before there is room again; then it is tried again.
        assert!((0..10).any(|_| full_for_a_while(full, &expected)), "ten runs ended before there was room again");
    }
}

#[test]
fn a_damaged_checkpoint_in_a_folder_that_two_ranks_share_is_passed_over_when_that_is_said() {
    let place = Place::with(RANKS);
    place.train("a", &["--set", "train.stop_at_step=30"]).ok();
    let had = place.names("runs/a/checkpoints");
    let newest = &had[had.len() - 1];
    // The part of the rank that does not lead the folder.
    let file = format!("runs/a/checkpoints/{newest}/rank-0001.safetensors");
    let bytes = spoil(&place.path(&file));
    let said = ["newest checkpoint is damaged", "rank-0001.safetensors", "--resume-from-earlier goes on from step"];
    let recipe = || std::fs::read(place.path("runs/a/recipe.toml")).expect("readable");
    let (before, other) = (recipe(), ["--set", "train.skip_max=7"]);
    place.train("a", &[&["--resume"], &other[..]].concat()).failed(2, &said);
    assert_eq!(place.names("runs/a/checkpoints"), had, "nothing is taken away");
    assert!(recipe() == before, "what is refused changes nothing");
    let ran = place.train("a", &[&["--resume-from-earlier"], &other[..]].concat()).ok();
    assert!(ran.stderr.contains("kept as"), "{}", ran.stderr);
    let resumed = place.events("a").into_iter().rfind(|event| event["event"] == "resumed").expect("an event");
    assert!(resumed["changed"].to_string().contains("train.skip_max"), "{resumed}");
    assert_eq!(outcome(&place, "a"), undisturbed(2));
    let kept = place.path(&format!("runs/a/checkpoints/{newest}.damaged/rank-0001.safetensors"));
    assert!(std::fs::read(kept).expect("it is kept") == bytes);
}
