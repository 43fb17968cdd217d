//! Checkpoints while training goes on: what happens when the disk is slow, full, or the process is killed, and which ones
//! stay.
//!
//! - `killed`: SIGKILL in the middle of saves. `ranks`: the same of two ranks, whose disks are full, or whose newest checkpoint
//!   is damaged.

mod killed;
mod ranks;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::Value;

use crate::dying::RANKS;
use crate::support::{Place, Ran, end, wait_until};

fn steps_of(events: &[Value], kind: &str) -> Vec<u64> {
    let of_kind = events.iter().filter(|event| event["event"] == kind);
    of_kind.map(|event| event["step"].as_u64().expect("a step")).collect()
}

fn kept(place: &Place, run: &str) -> Vec<u64> {
    let names = place.names(&format!("runs/{run}/checkpoints"));
    names.iter().map(|name| name.strip_prefix("step-").and_then(|step| step.parse().ok()).expect("a step")).collect()
}

/// A checkpoint in every step, each of which takes a second or two to be written, so that the third finds two in flight.
fn too_often(place: &Place, run: &str, bytes_per_s_max: u64, when_busy: &str) -> Vec<Value> {
    let (limit, busy) =
        (format!("checkpoint.write_bytes_per_s_max={bytes_per_s_max}"), format!("checkpoint.when_busy={when_busy}"));
    let sets = ["--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=0", "--set", "train.steps=6"];
    place.train(run, &[&sets[..], &["--set", &limit, "--set", &busy]].concat()).ok();
    place.events(run)
}

fn check_when_busy(place: &Place, bytes_per_s_max: u64) {
    let waited = too_often(place, "waited", bytes_per_s_max, "wait");
    assert_eq!(steps_of(&waited, "checkpoint"), [1, 2, 3, 4, 5, 6], "every one was taken");
    assert_eq!(steps_of(&waited, "snapshot_skipped"), [] as [u64; 0]);
    let waits = steps_of(&waited, "snapshot_waited");
    assert!(waits.contains(&3), "two were in flight: {waits:?}");
    let stall = |step: u64| {
        let text = std::fs::read_to_string(place.path("runs/waited/metrics.jsonl")).expect("readable");
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.find(|line| line["step"] == step).expect("a line")["checkpoint_stall_s"].as_f64().expect("a number")
    };
    for event in waited.iter().filter(|event| event["event"] == "snapshot_waited") {
        let (step, seconds) = (event["step"].as_u64().expect("a step"), event["seconds"].as_f64().expect("a number"));
        assert!(seconds > 0.0 && stall(step + 1) >= seconds, "the next line tells the wait: {event}");
    }
    // The control: who does not wait leaves some out, and trains the same.
    let skipped = too_often(place, "skipped", bytes_per_s_max, "skip");
    let left_out: BTreeSet<u64> = steps_of(&skipped, "snapshot_skipped").into_iter().collect();
    assert!(!left_out.is_empty(), "two were in flight");
    let taken: BTreeSet<u64> = steps_of(&skipped, "checkpoint").into_iter().collect();
    assert!(left_out.is_disjoint(&taken) && left_out.len() + taken.len() == 6, "{left_out:?}, {taken:?}");
    assert_eq!(steps_of(&skipped, "snapshot_waited"), [] as [u64; 0]);
    assert_eq!(place.summary("waited")["parameter_hash"], place.summary("skipped")["parameter_hash"]);
}

#[test]
fn a_run_whose_disk_is_too_slow_waits_or_leaves_out() {
    check_when_busy(&Place::new(), 250_000);
}

/// A disk that is held back takes minutes for two checkpoints; a signalled run has no more than the grace for all of them.
#[test]
fn a_signal_while_there_is_no_room_lifts_the_limit() {
    let place = Place::new();
    let sets = ["--set", "checkpoint.every=1", "--set", "checkpoint.when_busy=wait", "--set", "checkpoint.grace_s=60"];
    let slow = ["--set", "checkpoint.write_bytes_per_s_max=2000"];
    let mut child = place.start("a", &[&sets[..], &slow].concat());
    // The third of them waits for room.
    assert!(wait_until(&mut child, || place.lines("a") >= 3), "it ended by itself");
    let ran = end(child, Signal::TERM);
    assert_eq!(ran.code, Some(75), "{}", ran.stderr);
    let last = place.lines("a") as u64;
    assert_eq!(steps_of(&place.events("a"), "checkpoint"), (1..=last).collect::<Vec<_>>());
}

#[test]
fn two_ranks_whose_disk_is_too_slow_wait_or_leave_out_alike() {
    check_when_busy(&Place::with(RANKS), 4_000_000);
}

#[test]
fn the_last_so_many_every_so_many_and_the_best_stay_over_a_resume() {
    let place = Place::new();
    let keep = |best: &str, more: &[&str]| {
        let best = format!("checkpoint.keep_best={best}");
        // None is left out for a disk that is busy.
        let sets = [
            "checkpoint.every=10",
            "checkpoint.keep_last=1",
            "checkpoint.keep_every=30",
            "checkpoint.when_busy=wait",
            &best,
        ];
        let run = if best.ends_with('0') { "plain" } else { "best" };
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        place.train(run, &[&sets[..], more].concat()).ok();
    };
    keep("2", &["--set", "train.stop_at_step=45"]);
    assert_eq!(kept(&place, "best"), [20, 30, 40, 45]);
    keep("2", &["--resume"]);
    // What was evaluated, as the metrics have it, is what the checkpoints were ranked by.
    let mut evaluated: Vec<(f64, u64)> = (place.curve("best").iter())
        .filter_map(|[step, _, loss, _]| Some((loss.parse().ok()?, step.parse().expect("a number"))))
        .collect();
    evaluated.sort_by(|a, b| a.0.total_cmp(&b.0));
    let expected: BTreeSet<u64> = evaluated[..2].iter().map(|&(_, step)| step).chain([30, 60]).collect();
    assert_eq!(kept(&place, "best"), expected.into_iter().collect::<Vec<_>>());
    let manifest = std::fs::read(place.path("runs/best/checkpoints/step-00000060/manifest.json")).expect("readable");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    assert_eq!(manifest["body"]["state"]["eval_loss"].to_string(), place.curve("best")[59][2]);
    // The control: nobody asks for the best.
    keep("0", &[]);
    assert_eq!(kept(&place, "plain"), [30, 60]);
    let none = ["--set", "checkpoint.keep_best=1", "--set", "eval.every=0"];
    place.train("none", &none).failed(2, &["checkpoint.keep_best", "expected 0 where nothing is evaluated, found 1"]);
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while() {
    let steps = ["--set", "train.steps=200"];
    let whole = Place::new();
    whole.train("a", &steps).ok();
    // On a busy machine the run may be over before there is room again; then it is tried again.
    for _ in 0..10 {
        let place = Place::new();
        place.train("a", &[&steps[..], &["--set", "train.stop_at_step=16"]].concat()).ok();
        // No file may grow beyond 64 KiB (in blocks of 512 bytes): metrics fit for a while, checkpoints do not.
        let script = format!(
            "ulimit -S -f 128; exec {} train small.toml --name a --resume {}",
            env!("CARGO_BIN_EXE_tributary-under-test"),
            steps.join(" ")
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(place.path("")).env_remove("TRIBUTARY_LOG");
        let mut child = shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a shell");
        let failed = || steps_of(&place.events("a"), "checkpoint_failed");
        wait_until(&mut child, || !failed().is_empty());
        let kept_meanwhile = place.names("runs/a/checkpoints").contains(&"step-00000016".to_owned());
        let unlimited = Rlimit { current: None, maximum: None };
        // The process may be over already; its exit code tells.
        let _ = prlimit(Some(Pid::from_child(&child)), Resource::Fsize, unlimited);
        let ran = Ran::from(child.wait_with_output().expect("our child"));
        if ran.code != Some(0) {
            ran.failed(1, &["step 16's is kept"]);
            continue;
        }
        assert!(kept_meanwhile, "the last good one stayed");
        assert!(ran.stderr.contains("was not written (step 16's is kept), training goes on"), "{}", ran.stderr);
        let (failed, written) = (failed(), steps_of(&place.events("a"), "checkpoint"));
        let after = written.iter().filter(|&step| step > failed.last().expect("one failed")).count();
        assert!(after > 0, "there was room again: {failed:?} failed, {written:?} were written");
        assert_eq!(place.lines("a"), 200, "every step was taken");
        assert_eq!(place.summary("a")["parameter_hash"], whole.summary("a")["parameter_hash"]);
        return;
    }
    panic!("ten runs ended before there was room again");
}
