//! A resumed run is bitwise the uninterrupted one: the same losses to the last digit, the same parameters.

use std::path::Path;
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;

use crate::dying::RANKS;
use crate::support::{Place, RECIPE, end, text, wait_until};

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

/// The steps that a TensorBoard event file has scalars of, and the step of its session log, if it has one. The records are
/// those of TFRecord files; of the messages only the fields that matter here are looked at.
fn events(path: &Path) -> (Vec<u64>, Option<u64>) {
    let bytes = std::fs::read(path).expect("readable");
    let (mut rest, mut steps, mut session) = (&bytes[..], Vec::new(), None);
    while let Some((length, after)) = rest.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).expect("small");
        let record = &after[4..4 + length];
        rest = &after[4 + length + 4..];
        // Field 1, a double; then field 2, a varint, which is left out for 0.
        let (mut step, mut at) = (0u64, 9);
        if record.get(at) == Some(&0x10) {
            let varint = record[at + 1..].iter().take_while(|&&byte| byte >= 0x80).count() + 1;
            step = (0..varint).fold(0, |step, i| step | u64::from(record[at + 1 + i] & 0x7f) << (7 * i));
            at += 1 + varint;
        }
        match record.get(at) {
            Some(0x2a) => steps.push(step),
            Some(0x3a) => session = Some(step),
            _ => {}
        }
    }
    (steps, session)
}

#[test]
fn tensorboard_shows_every_step_of_a_run_that_was_killed_and_resumed_once() {
    let place = Place::new();
    // Steps 17 to 21 are taken twice.
    let every = ["--set", "checkpoint.every=8"];
    let ran = place.train_with("die:0:22", "a", &every);
    assert_ne!(ran.code, Some(0), "{}", ran.stderr);
    place.train("a", &[&every[..], &["--resume"]].concat()).ok();
    let mut files: Vec<_> = std::fs::read_dir(place.path("runs/a"))
        .expect("a folder")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("events.out.tfevents.")))
        .collect();
    files.sort();
    // What TensorBoard shows: from a session's start on, what earlier files have of its step and later ones is dropped.
    let (mut shown, mut all): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    for file in &files {
        let (mut steps, session) = events(file);
        steps.dedup();
        shown.retain(|&step| session.is_none_or(|session| step < session));
        shown.extend(&steps);
        all.extend(&steps);
    }
    let last = place.lines("a") as u64;
    assert_eq!((files.len(), shown), (2, (1..=last).collect()));
    // The control: without the session log steps would be shown twice.
    assert!(all.len() > last as usize, "{all:?}");
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
fn a_damaged_newest_checkpoint_stops_the_resume_and_an_earlier_one_serves_when_that_is_said() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=24"]).ok();
    let newest = place.path("runs/a/checkpoints/step-00000024");
    let bytes = spoil(&newest.join("rank-0000.safetensors"));
    let said = ["newest checkpoint is damaged", "rank-0000.safetensors", "--resume-from-earlier goes on from step"];
    place.train("a", &["--resume"]).failed(2, &said);
    assert!(newest.is_dir(), "nothing is taken away");
    // The run comes to step 24 again, and retention to what is left.
    let stop = ["--set", "train.stop_at_step=24"];
    let ran = place.train("a", &[&["--resume-from-earlier"], &stop[..]].concat()).ok();
    assert!(!ran.stderr.contains("going on after step 24") && ran.stderr.contains("kept as"), "{}", ran.stderr);
    let kept = place.path("runs/a/checkpoints/step-00000024.damaged");
    let as_it_was = || std::fs::read(kept.join("rank-0000.safetensors")).expect("it is kept") == bytes;
    assert!(as_it_was());
    let events = place.events("a");
    let damaged = events.iter().find(|event| event["event"] == "checkpoint_damaged").expect("an event");
    assert_eq!(damaged["step"], 24);
    assert!(damaged["error"].to_string().contains("rank-0000.safetensors"), "{damaged}");
    assert!(damaged["kept_as"].as_str().is_some_and(|path| path.ends_with("step-00000024.damaged")), "{damaged}");
    // The new one of that step is whole, and a plain resume takes it.
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
    assert!(as_it_was());
    let names = place.names("runs/a/checkpoints");
    assert_eq!((names.len(), &*names[0], &*names[2]), (3, "step-00000024.damaged", "step-00000060"), "{names:?}");
}

#[test]
fn without_a_whole_checkpoint_all_are_named_and_stay() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=20"]).ok();
    let names = place.names("runs/a/checkpoints");
    for name in &names {
        spoil(&place.path(&format!("runs/a/checkpoints/{name}/manifest.json")));
    }
    for how in ["--resume", "--resume-from-earlier"] {
        place.train("a", &[how]).failed(2, &["none of its checkpoints is whole", &names[0], &names[1]]);
    }
    assert_eq!(place.names("runs/a/checkpoints"), names);
}

/// Flips a bit in the middle of a file, and returns what it holds then.
pub fn spoil(file: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(file).expect("readable");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, &bytes).expect("writable");
    bytes
}

/// In the learning rate's warm-up and the codec's, right after a step that was skipped, and in the middle of a later epoch.
#[test]
fn in_the_middle_of_a_warm_up_and_of_an_epoch_and_after_a_skip() {
    let short = text().join("held_out.txt");
    let bytes = std::fs::metadata(&short).expect("a text").len();
    let data = format!("data.train=['{}']", short.display());
    let alone = ["--set", "train.seq_len=64"];
    let ranks = ["--set", "train.seq_len=64", "--set", "train.micro_batch_size=2", "--set", "compression.codec=int4"];
    for (recipe, more) in [(RECIPE, &alone[..]), (RANKS, &ranks)] {
        let place = Place::with(recipe);
        let sets = ["--set", &data, "--set", "eval.files=[]", "--set", "schedule.warmup_steps=20"];
        let sets = [&sets[..], &["--set", "compression.warmup_steps=20"], more].concat();
        let train = |run: &str, more: &[&str]| _ = place.train_with("nan:0:33", run, &[&sets[..], more].concat()).ok();
        train("whole", &[]);
        // A token is a byte at least.
        let tokens = place.summary("whole")["tokens"].as_u64().expect("a number");
        assert!(tokens > bytes, "more than an epoch: {tokens} tokens of at most {bytes}");
        for stop in ["7", "33", "51"] {
            let stop = format!("train.stop_at_step={stop}");
            let resume = (place.lines("a") > 0).then_some("--resume");
            train("a", &[&["--set", &stop], resume.as_slice()].concat());
        }
        train("a", &["--resume"]);
        assert_eq!(place.curve("a")[32][1], "null", "the step was skipped");
        assert_eq!(place.curve("a"), place.curve("whole"));
        assert_eq!(place.summary("a")["parameter_hash"], place.summary("whole")["parameter_hash"]);
        // The control: a warm-up that is not gone on with is another run.
        train("b", &["--set", "train.stop_at_step=7"]);
        train("b", &["--resume", "--set", "schedule.warmup_steps=7"]);
        assert_ne!(place.summary("b")["parameter_hash"], place.summary("whole")["parameter_hash"]);
    }
}

#[test]
fn bytes_that_are_no_text_in_metrics_and_events_cost_their_own_line_alone() {
    use std::io::Write as _;
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=20"]).ok();
    for name in ["metrics.jsonl", "events.jsonl"] {
        let file = std::fs::File::options().append(true).open(place.path(&format!("runs/a/{name}")));
        file.expect("writable").write_all(b"\xff\xfe{\"step\": 2").expect("writable");
    }
    place.train("a", &["--resume"]).ok();
    same_as_uninterrupted(&place, "a");
    assert!(place.events("a").iter().any(|event| event["event"] == "resumed"));
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
