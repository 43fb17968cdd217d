//! A resumed run is bitwise the uninterrupted one: the same losses to the last digit, the same parameters.

use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Place, end, wait_until};

type Curve = Vec<[String; 4]>;

/// The run that nobody interrupts.
fn uninterrupted() -> &'static (Curve, Value) {
    static RUN: OnceLock<(Curve, Value)> = OnceLock::new();
    RUN.get_or_init(|| {
        let place = Place::new();
        place.train("whole", &[]).ok();
        (place.curve("whole"), place.summary("whole"))
    })
}

#[track_caller]
pub fn same_as_uninterrupted(place: &Place, run: &str) {
    let (curve, summary) = uninterrupted();
    assert_eq!(place.curve(run), *curve);
    for key in ["status", "step", "loss", "parameter_hash", "held_out_bits_per_byte", "tokens"] {
        assert_eq!(place.summary(run)[key], summary[key], "{key}");
    }
}

#[test]
fn two_uninterrupted_runs_are_the_same_and_another_seed_is_not() {
    let place = Place::new();
    place.train("again", &[]).ok();
    same_as_uninterrupted(&place, "again");
    place.train("other", &["--set", "train.seed=2"]).ok();
    assert_ne!(place.curve("other"), uninterrupted().0);
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let place = Place::new();
    place.train("one", &["--set", "device.threads=1"]).ok();
    same_as_uninterrupted(&place, "one");
    place.train("three", &["--set", "device.threads=3"]).ok();
    same_as_uninterrupted(&place, "three");
}

#[test]
fn after_a_clean_stop() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=21"]).ok();
    assert_eq!(place.summary("a")["status"], "interrupted");
    assert_eq!(place.names("runs/a/checkpoints").last().map(String::as_str), Some("step-00000021"));
    place.train("a", &["--resume", "--set", "train.stop_at_step=30"]).ok();
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
    // Once more: there is nothing left to train, and the end comes again.
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
}

fn after_signal(signal: Signal) {
    // On a busy machine the run may be over before the signal comes; then it is tried again.
    for _ in 0..10 {
        let place = Place::new();
        let mut child = place.start("a", &[]);
        wait_until(&mut child, || place.lines("a") >= 10);
        let ran = end(child, signal);
        if ran.code == Some(0) {
            continue;
        }
        ran.failed(75, &["writing a checkpoint", "go on with --resume"]);
        assert_eq!(place.summary("a")["status"], "interrupted");
        let stopped_at = place.lines("a");
        assert!(place.path(&format!("runs/a/checkpoints/step-{stopped_at:08}")).is_dir());
        place.train("a", &["--resume"]).ok();
        return same_as_uninterrupted(&place, "a");
    }
    panic!("ten runs ended before the signal came");
}

#[test]
fn after_sigint() {
    after_signal(Signal::INT);
}

#[test]
fn after_sigterm() {
    after_signal(Signal::TERM);
}

#[test]
fn after_a_kill_at_any_moment() {
    type Moment = fn(&Place) -> bool;
    let moments: [(&str, Moment); 8] = [
        ("the folder is there", |place| place.path("runs/a").is_dir()),
        ("the first step", |place| place.lines("a") >= 1),
        ("before the first checkpoint", |place| place.lines("a") >= 6),
        ("a checkpoint is being written", |place| {
            place.names("runs/a/checkpoints").iter().any(|name| name.ends_with(".partial"))
        }),
        ("the first checkpoint is there", |place| place.path("runs/a/checkpoints/step-00000008").is_dir()),
        ("in the middle", |place| place.lines("a") >= 35),
        ("the last step", |place| place.lines("a") >= 60),
        ("the export is being written", |place| place.names("runs/a").iter().any(|name| name.starts_with("export."))),
    ];
    let mut killed = 0;
    for (name, moment) in moments {
        // Some moments are short: a run that got past its moment is tried again.
        for _ in 0..10 {
            let place = Place::new();
            let mut child = place.start("a", &[]);
            let came = wait_until(&mut child, || moment(&place));
            let ran = end(child, Signal::KILL);
            place.train("a", &["--resume"]).ok();
            same_as_uninterrupted(&place, "a");
            let left = [place.names("runs/a/checkpoints"), place.names("runs/a")].concat();
            assert!(
                !left.iter().any(|file| file.ends_with(".partial") || file.starts_with("export.")),
                "{name}: {left:?}"
            );
            if came && ran.code.is_none() {
                killed += 1;
                break;
            }
        }
    }
    assert!(killed >= 6, "only {killed} of 8 moments were met");
}

#[test]
fn kills_one_after_the_other_still_end_at_the_same_parameters() {
    let place = Place::new();
    let mut killed = 0;
    for round in 1..=4 {
        let resume: &[&str] = if round == 1 { &[] } else { &["--resume"] };
        // The first line that this process writes is the one after its checkpoint.
        let metrics = place.path("runs/a/metrics.jsonl");
        let before = std::fs::metadata(&metrics).and_then(|file| file.modified()).ok();
        let mut child = place.start("a", resume);
        // A few steps past the last checkpoint each time.
        wait_until(&mut child, || {
            let now = std::fs::metadata(&metrics).and_then(|file| file.modified()).ok();
            now != before && place.lines("a") >= round * 11
        });
        killed += usize::from(end(child, Signal::KILL).code.is_none());
    }
    assert!(killed >= 2, "{killed}");
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
}

#[test]
fn a_resume_of_a_finished_run_leaves_a_whole_export_at_every_moment() {
    let place = Place::new();
    place.train("a", &[]).ok();
    let export = place.path("runs/a/export");
    let whole = std::fs::read(export.join("model.safetensors")).expect("readable");
    place.train("a", &["--resume"]).ok();
    assert_eq!(std::fs::read(export.join("model.safetensors")).expect("readable"), whole);
    assert!(!place.names("runs/a").iter().any(|name| name.starts_with("export.")));
    // What a kill may leave between the two renames.
    std::fs::rename(&export, place.path("runs/a/export.old")).expect("one folder");
    place.train("a", &["--resume"]).ok();
    assert_eq!(std::fs::read(export.join("model.safetensors")).expect("readable"), whole);
}

#[test]
fn a_resume_before_there_is_anything_starts_from_the_beginning() {
    let place = Place::new();
    let ran = place.train("a", &["--resume"]).ok();
    assert!(ran.stderr.contains("there is nothing to resume, so it starts from the beginning"), "{}", ran.stderr);
    same_as_uninterrupted(&place, "a");
}

#[test]
fn a_damaged_newest_checkpoint_stops_the_resume_and_the_one_before_it_serves() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=20"]).ok();
    let newest = place.path("runs/a/checkpoints/step-00000020");
    let file = newest.join("rank-0000.safetensors");
    let mut bytes = std::fs::read(&file).expect("readable");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).expect("writable");
    place.train("a", &["--resume"]).failed(2, &["newest checkpoint is damaged", "rank-0000.safetensors", "remove"]);
    std::fs::remove_dir_all(newest).expect("ours");
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
}

#[test]
fn a_key_that_may_change_is_reported_and_takes_effect() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=20"]).ok();
    let ran = place.train("a", &["--resume", "--set", "optimizer.weight_decay=0.0"]).ok();
    assert!(ran.stderr.contains("optimizer.weight_decay: the run has 0.1, the recipe says 0.0"), "{}", ran.stderr);
    let events = place.events("a");
    let resumed = events.iter().find(|event| event["event"] == "resumed").expect("an event");
    assert!(resumed["changed"].to_string().contains("optimizer.weight_decay"));
    assert_ne!(place.summary("a")["parameter_hash"], uninterrupted().1["parameter_hash"]);
}
