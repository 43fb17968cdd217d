//! Which codec runs, and why: the warm-up, the choice of `auto`, and codecs that change at a resume.

use checkpoint::manifest::Manifest;
use checkpoint::reader::Checkpoint;
use serde_json::Value;

use crate::ranks::{WIDE, hashes, same, tensors};
use crate::support::Place;

/// Facts from which the fewest bits follow whatever else is measured, and facts from which it follows that nothing is
/// compressed: a step of a hundred seconds, for which no codec's work counts.
const SLOW: &str = "link:20000";
const FAST: &str = "link:1e15,step:100";

/// Of every event about codecs: step, codec, reason.
fn codecs(place: &Place, run: &str) -> Vec<(u64, String, String)> {
    let events = place.events(run).into_iter().filter(|event| event["event"] == "codec");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    events.map(|e| (e["step"].as_u64().expect("a step"), text(&e["codec"]), text(&e["reason"]))).collect()
}

/// The steps at which another codec begins, or a process does.
fn changes(place: &Place, run: &str) -> Vec<(u64, String)> {
    codecs(place, run).into_iter().map(|(step, codec, _)| (step, codec)).collect()
}

#[track_caller]
fn assert_changes(place: &Place, run: &str, expected: &[(u64, &str)]) {
    let expected: Vec<_> = expected.iter().map(|&(step, codec)| (step, codec.to_owned())).collect();
    assert_eq!(changes(place, run), expected);
}

/// What each line of metrics says that its step travelled in.
fn lines(place: &Place, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path(&format!("runs/{run}/metrics.jsonl"))).expect("metrics");
    text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["codec"].clone()).collect()
}

fn checkpoint(place: &Place, run: &str, step: u64) -> Checkpoint {
    Checkpoint::open(&place.path(&format!("runs/{run}/checkpoints/step-{step:08}"))).expect("a checkpoint")
}

/// How many residuals of a checkpoint are not zero, and how many there are.
fn residuals(checkpoint: &Checkpoint) -> (usize, usize) {
    let all = tensors(checkpoint).into_iter().filter(|(name, _)| name.contains(".sender.") || name.ends_with(".owner"));
    let values: Vec<u32> = all.flat_map(|(_, values)| values).collect();
    (values.iter().filter(|&&bits| f32::from_bits(bits) != 0.0).count(), values.len())
}

fn with(compression: &str) -> Place {
    Place::with(&format!("{WIDE}\n[compression]\n{compression}\n"))
}

#[test]
fn the_warm_up_ends_at_its_step_in_events_and_metrics_and_a_resume_in_the_middle_of_it_changes_no_bit() {
    let place = with("codec = \"int4\"\nwarmup_steps = 6");
    let (ran, whole) = hashes(&place, 2, "whole", "", &[]);
    let said = ran.ok().stderr;
    assert_eq!(whole[0], whole[1]);
    assert!(said.contains("gradients travel as int8 from step 1 on: the recipe says so; int8 until step 6"), "{said}");
    assert!(said.contains("gradients travel as int4 from step 7 on"), "{said}");
    assert_changes(&place, "whole", &[(1, "int8"), (7, "int4")]);
    let expected: Vec<Value> = (1..=20).map(|step| Value::from(if step <= 6 { "int8" } else { "int4" })).collect();
    assert_eq!(lines(&place, "whole"), expected);
    assert_eq!(place.summary("whole")["codec"], "int4");

    place.train("cut", &["--set", "train.stop_at_step=4"]).ok();
    assert_eq!(place.summary("cut")["codec"], "int8");
    place.train("cut", &["--resume"]).ok();
    same(&place, ["whole", "cut"]);
    assert_changes(&place, "cut", &[(1, "int8"), (5, "int8"), (7, "int4")]);
    // The control: without the warm-up it is another run.
    place.train("cold", &["--set", "compression.warmup_steps=0"]).ok();
    assert_changes(&place, "cold", &[(1, "int4")]);
    assert_ne!(place.summary("cold")["parameter_hash"], place.summary("whole")["parameter_hash"]);
}

#[test]
fn auto_measures_decides_for_all_ranks_at_one_step_and_says_why() {
    let place = with("codec = \"auto\"");
    for (run, link, codec) in [("slow", SLOW, "int4"), ("fast", FAST, "fp32")] {
        let (ran, hashes) = hashes(&place, 2, run, link, &[]);
        let said = ran.ok().stderr;
        assert_eq!((hashes[0].len(), &hashes[0]), (20, &hashes[1]), "{run}: the ranks agree after every step");
        // Five steps are measured, the sixth one's ballots carry the choice.
        assert_changes(&place, run, &[(1, "int8"), (7, codec)]);
        let expected: Vec<Value> = (1..=20).map(|step| Value::from(if step <= 6 { "int8" } else { codec })).collect();
        assert_eq!(lines(&place, run), expected);
        assert_eq!(place.summary(run)["codec"], codec);
        let reason = &codecs(&place, run)[1].2;
        assert!(reason.contains(&format!("{codec} is predicted to take")), "{reason}");
        assert!(said.contains(&format!("gradients travel as {codec} from step 7 on: {reason}")), "{said}");
        let events = place.events(run);
        let [measuring, chosen] = [1, 7].map(|step| {
            events.iter().find(|event| event["event"] == "codec" && event["step"] == step).expect("an event")
        });
        assert!(measuring["predictions"].is_null());
        for candidate in ["fp32", "bf16", "int8", "int4"] {
            assert!(chosen["predictions"][candidate].as_f64() > Some(0.0), "{chosen}");
        }
        let kept = checkpoint(&place, run, 20).state()["compression"].clone();
        assert_eq!(
            (&kept["codec"], &kept["chosen"]["codec"], &kept["chosen"]["step"]),
            (&codec.into(), &codec.into(), &6.into())
        );
    }
    // A link over loopback that nobody forges: some candidate, and all agree.
    let (ran, hashes) = hashes(&place, 2, "loopback", "", &[]);
    ran.ok();
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(changes(&place, "loopback")[1].0, 7);
    let log = std::fs::read_to_string(place.path("runs/loopback/logs/rank-1.log")).expect("a log");
    assert!(log.contains("measured for the choice of a codec"), "{log}");
}

#[test]
fn a_resume_keeps_what_auto_chose_bit_for_bit_and_decides_anew_when_it_is_told_to() {
    let place = with("codec = \"auto\"");
    place.train_with(SLOW, "whole", &[]).ok();
    for run in ["kept", "anew"] {
        place.train_with(SLOW, run, &["--set", "train.stop_at_step=9"]).ok();
    }
    // The link has become fast, and nobody asks.
    let said = place.train_with(FAST, "kept", &["--resume"]).ok().stderr;
    same(&place, ["whole", "kept"]);
    assert_changes(&place, "kept", &[(1, "int8"), (7, "int4"), (10, "int4")]);
    assert!(said.contains("int4 from step 10 on: it was chosen at step 6, as the checkpoint says"), "{said}");
    // The control: somebody asks.
    place.train_with(FAST, "anew", &["--resume", "--set", "compression.codec=auto"]).ok();
    assert_changes(&place, "anew", &[(1, "int8"), (7, "int4"), (10, "int8"), (16, "fp32")]);
    assert_ne!(place.summary("anew")["parameter_hash"], place.summary("whole")["parameter_hash"]);
    // A run that is stopped while it measures has no choice to keep.
    place.train_with(FAST, "early", &["--set", "train.stop_at_step=3"]).ok();
    assert!(checkpoint(&place, "early", 3).state()["compression"]["chosen"].is_null());
    place.train_with(SLOW, "early", &["--resume"]).ok();
    assert_changes(&place, "early", &[(1, "int8"), (4, "int8"), (10, "int4")]);
}

#[test]
fn a_step_that_is_skipped_is_not_measured_and_the_choice_comes_all_the_same() {
    let place = with("codec = \"auto\"");
    let (ran, hashes) = hashes(&place, 2, "a", &format!("nan:1:3,nan:0:7,{SLOW}"), &[]);
    ran.ok();
    assert_eq!(hashes[0], hashes[1]);
    // One of the first five does not count; the one whose ballots carry the choice is skipped.
    assert_changes(&place, "a", &[(1, "int8"), (8, "int4")]);
}

#[test]
fn from_int8_to_fp32_what_was_left_out_is_sent_with_the_first_step_that_counts() {
    let place = Place::with(WIDE);
    place.train("a", &["--set", "train.stop_at_step=9"]).ok();
    let (some, all) = residuals(&checkpoint(&place, "a", 9));
    assert!(some > all / 4, "{some} of {all}");
    let fp32 = ["--resume", "--set", "compression.codec=fp32"];
    // Step 10 is skipped: nothing was sent, and the checkpoint has all of it still.
    let said =
        place.train_with("nan:1:10", "a", &[&fp32[..], &["--set", "train.stop_at_step=10"]].concat()).ok().stderr;
    assert!(said.contains("compression.codec: the run has \"int8\", the recipe says \"fp32\""), "{said}");
    let (before, after) = (tensors(&checkpoint(&place, "a", 9)), tensors(&checkpoint(&place, "a", 10)));
    assert!(before == after, "a skipped step changes nothing, and residuals are kept until they are sent");
    place.train("a", &[&fp32[..], &["--set", "train.stop_at_step=11"]].concat()).ok();
    assert_eq!(residuals(&checkpoint(&place, "a", 11)), (0, all));
    // Once they are sent there is nothing to keep.
    place.train("a", &[&fp32[..], &["--set", "train.stop_at_step=12"]].concat()).ok();
    assert_eq!(residuals(&checkpoint(&place, "a", 12)), (0, 0));
    // And back: they start from zero.
    place.train("a", &["--resume", "--set", "train.stop_at_step=13"]).ok();
    let (some, again) = residuals(&checkpoint(&place, "a", 13));
    assert!(some > 0 && again == all, "{some} of {again}");
    assert_changes(&place, "a", &[(1, "int8"), (10, "fp32"), (11, "fp32"), (12, "fp32"), (13, "int8")]);
    // The control: with int8 they are not zero after that step.
    place.train("b", &["--set", "train.stop_at_step=11"]).ok();
    assert!(residuals(&checkpoint(&place, "b", 11)).0 > 0);
}

#[test]
fn a_run_that_goes_over_to_fp32_and_stays_there_is_the_same_however_often_it_is_resumed() {
    let place = Place::with(WIDE);
    for run in ["once", "often"] {
        place.train(run, &["--set", "train.stop_at_step=9"]).ok();
    }
    let fp32 = ["--resume", "--set", "compression.codec=fp32"];
    place.train("once", &fp32).ok();
    for stop in ["10", "11", "15"] {
        let stop = format!("train.stop_at_step={stop}");
        place.train("often", &[&fp32[..], &["--set", &stop]].concat()).ok();
    }
    place.train("often", &fp32).ok();
    same(&place, ["once", "often"]);
}

/// Changes what a checkpoint says of how gradients travelled.
fn rewrite(place: &Place, run: &str, step: u64, change: impl FnOnce(&mut Value)) {
    let path = place.path(&format!("runs/{run}/checkpoints/step-{step:08}/manifest.json"));
    let mut manifest = Manifest::parse(&std::fs::read(&path).expect("readable"), &path).expect("a manifest");
    change(&mut manifest.state);
    std::fs::write(&path, manifest.render(&path).expect("a manifest")).expect("writable");
}

#[test]
fn a_checkpoint_that_lacks_what_it_says_it_has_is_refused() {
    let place = Place::with(WIDE);
    place.train("a", &["--set", "compression.codec=fp32", "--set", "train.stop_at_step=5"]).ok();
    assert_eq!(checkpoint(&place, "a", 5).state()["compression"]["residuals"], false);
    // The control: it has none, and says so.
    place.train("a", &["--resume", "--set", "train.stop_at_step=6"]).ok();
    let (none, all) = residuals(&checkpoint(&place, "a", 5));
    assert_eq!((none, all), (0, 0));
    place.train("b", &["--set", "compression.codec=fp32", "--set", "train.stop_at_step=5"]).ok();
    rewrite(&place, "b", 5, |state| state["compression"]["residuals"] = true.into());
    let ran = place.train("b", &["--resume"]);
    assert_ne!(ran.code, Some(0));
    assert!(ran.stderr.contains(".sender.000"), "{}", ran.stderr);
}

#[test]
fn a_checkpoint_of_an_older_version_goes_on_with_what_its_recipe_says_it_has() {
    let place = Place::with(WIDE);
    for (codec, some) in [("int8", true), ("fp32", false)] {
        let set = format!("compression.codec={codec}");
        place.train(&format!("{codec}-whole"), &["--set", &set]).ok();
        place.train(codec, &["--set", &set, "--set", "train.stop_at_step=9"]).ok();
        assert_eq!(residuals(&checkpoint(&place, codec, 9)).0 > 0, some);
        rewrite(&place, codec, 9, |state| _ = state.as_object_mut().expect("an object").remove("compression"));
        place.train(codec, &["--resume", "--set", &set]).ok();
        same(&place, [&format!("{codec}-whole"), codec]);
    }
}

#[test]
fn with_one_rank_nothing_travels_and_nothing_is_said() {
    let place = with("codec = \"auto\"");
    place.train("a", &["--set", "parallel.data=1"]).ok();
    assert!(codecs(&place, "a").is_empty());
    assert_eq!(lines(&place, "a"), vec![Value::Null; 20]);
    assert!(place.summary("a")["codec"].is_null());
}

#[test]
fn zstd_serves_where_it_pays_says_why_and_changes_no_bit() {
    let place = with("codec = \"int8\"");
    place.train("plain", &[]).ok();
    let sent = |run: &str| -> u64 {
        let text = std::fs::read_to_string(place.path(&format!("runs/{run}/metrics.jsonl"))).expect("metrics");
        let of = |line: &str| serde_json::from_str::<Value>(line).expect("JSON");
        text.lines().skip(1).map(|line| of(line)["wire_bytes_sent"].as_u64().expect("bytes")).sum()
    };
    let events =
        |run: &str| -> Vec<Value> { place.events(run).into_iter().filter(|event| event["event"] == "zstd").collect() };
    let auto = ["--set", "compression.zstd=auto"];
    // So slow a link that whatever gets smaller pays; and one so fast that nothing does.
    place.train_with("link:1", "slow", &auto).ok();
    place.train_with("link:1e15", "fast", &auto).ok();
    for run in ["slow", "fast"] {
        assert_eq!(place.summary(run)["parameter_hash"], place.summary("plain")["parameter_hash"], "{run}");
    }
    let on = events("slow");
    assert!(!on.is_empty() && on.iter().all(|event| event["packs"] == true), "{on:?}");
    let reason = on[0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("zstd makes") && reason.contains("at 0.0 MB/s"), "{reason}");
    let text = std::fs::read_to_string(place.path("runs/slow/metrics.jsonl")).expect("metrics");
    let last: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["zstd_buckets"].as_u64(), Some(on.len() as u64));
    assert!(sent("slow") < sent("plain"), "{} {}", sent("slow"), sent("plain"));
    // The control.
    assert!(events("fast").is_empty());
    assert!(sent("fast") > sent("slow"));
}
