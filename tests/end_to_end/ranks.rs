//! Ranks compute what one rank would: bitwise with `fp32`, and with every codec the same bits on every rank.

use std::path::PathBuf;
use std::sync::LazyLock;

use checkpoint::reader::Checkpoint;
use compression::Codec;
use parallel::data::rules::codec_of;
use parallel::data::shard::payload_bytes_sent;
use serde_json::Value;
use trainer::model::Config;

use crate::balance::at_the_sockets;
use crate::support::{Place, Ran};

/// A model with tensors that are large enough (64 Ki elements) to be compressed, and some that are not.
pub const WIDE: &str = r#"
[model]
hidden_size = 256
intermediate_size = 256
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 1

[tokenizer]
vocab_size = 300

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 20
seq_len = 16
micro_batch_size = 2

[parallel]
data = 2
verify_every = 1

[eval]
files = ["TEXT/held_out.txt"]
every = 8
windows = 4

[schedule]
learning_rate = 1e-2
warmup_steps = 5

[checkpoint]
every = 100
keep_last = 10

[export]
at_end = false
"#;

/// Trains, and returns for every rank the hashes of its parameters after every step, each with the step's number.
pub fn hashes(place: &Place, ranks: usize, name: &str, faults: &str, more: &[&str]) -> (Ran, Vec<Vec<String>>) {
    let folder = place.path(&format!("hashes-{name}"));
    std::fs::create_dir_all(&folder).expect("writable");
    let ran = place.train_with(&format!("{faults},hashes:{}", folder.display()), name, more);
    let lines = |rank| std::fs::read_to_string(folder.join(format!("rank-{rank}"))).unwrap_or_default();
    (ran, (0..ranks).map(|rank| lines(rank).lines().map(str::to_owned).collect()).collect())
}

/// The undisturbed run of every codec, in one place; named after the codec.
static UNDISTURBED: LazyLock<(Place, Vec<Vec<String>>)> = LazyLock::new(|| {
    let place = Place::with(WIDE);
    let train = |codec: Codec| {
        let set = format!("compression.codec={codec}");
        let (ran, hashes) = hashes(&place, 2, codec.name(), "", &["--set", &set]);
        ran.ok();
        assert_eq!(hashes[0].len(), 20);
        assert_eq!(hashes[0], hashes[1], "{codec}: rank 1 has the parameters of rank 0 after every step");
        hashes.into_iter().next().expect("two ranks")
    };
    let hashes = Codec::ALL.map(train).to_vec();
    (place, hashes)
});

/// The same losses, evaluations and norms to the last digit, and the same end.
#[track_caller]
pub fn same(place: &Place, [a, b]: [&str; 2]) {
    assert_eq!(place.curve(a), place.curve(b));
    for key in ["status", "step", "loss", "parameter_hash", "held_out_bits_per_byte", "tokens"] {
        assert_eq!(place.summary(a)[key], place.summary(b)[key], "{key}");
    }
}

pub fn checkpoint(place: &Place, run: &str, step: u64) -> Checkpoint {
    let path: PathBuf = place.path(&format!("runs/{run}/checkpoints/step-{step:08}"));
    Checkpoint::open(&path).expect("a checkpoint")
}

/// Every tensor of a checkpoint by name: parameters, moments, residuals.
pub fn tensors(checkpoint: &Checkpoint) -> Vec<(String, Vec<u32>)> {
    let read = |(name, entry): (&String, &checkpoint::manifest::TensorEntry)| {
        let mut values = vec![0.0f32; entry.shape.iter().product()];
        checkpoint.tensor(name, &entry.shape, &mut values).expect("whole");
        (name.clone(), values.into_iter().map(f32::to_bits).collect())
    };
    checkpoint.manifest().tensors.iter().map(read).collect()
}

#[test]
fn ranks_with_one_micro_batch_are_one_rank_with_as_many_micro_batches_bitwise() {
    for ranks in [2, 4] {
        let place = Place::new();
        let (data, micro) = (format!("parallel.data={ranks}"), format!("train.micro_batches={ranks}"));
        place.train("one", &["--set", &micro]).ok();
        let set = ["--set", &data, "--set", "train.micro_batches=1", "--set", "compression.codec=fp32"];
        place.train("ranks", &set).ok();
        same(&place, ["one", "ranks"]);
        let evaluated: Vec<String> =
            place.curve("ranks").into_iter().filter(|line| line[2] != "null").map(|[step, ..]| step).collect();
        assert_eq!(evaluated, ["20", "40", "60"], "in the middle and at the end");
        assert!(place.summary("ranks")["held_out_bits_per_byte"].is_f64());
        // The control: another order of the data is another run.
        if ranks == 2 {
            place.train("other", &[&set[..], &["--set", "train.seed=2"]].concat()).ok();
            assert_ne!(place.curve("other"), place.curve("ranks"));
        }
    }
}

#[test]
fn unequal_shares_are_one_rank_with_all_micro_batches() {
    let place = Place::new();
    let set = ["--set", "train.steps=12", "--set", "eval.every=6", "--set", "compression.codec=fp32"];
    let run = |name: &str, more: &[&str]| place.train(name, &[&set[..], more].concat()).ok();
    run("one", &["--set", "train.micro_batches=4"]);
    let shares = |shares| ["--set", "parallel.data=2", "--set", shares];
    run("unequal", &shares("parallel.micro_batches=[3,1]"));
    same(&place, ["one", "unequal"]);
    assert_eq!(place.summary("one")["tokens"], place.summary("unequal")["tokens"]);
    // Rank 0 has the first micro-batch: (a) + ((b + c) + d) is another order.
    run("other", &shares("parallel.micro_batches=[1,3]"));
    let (one, other) = (place.curve("one"), place.curve("other"));
    assert_ne!(one, other, "the control");
    for (a, b) in one.iter().zip(&other) {
        let [a, b] = [a, b].map(|line| line[1].parse::<f64>().expect("a loss"));
        assert!((a / b - 1.0).abs() < 1e-5, "{a} and {b}");
    }
    // A resume goes on with the same samples.
    run("again", &[&shares("parallel.micro_batches=[3,1]")[..], &["--set", "train.stop_at_step=5"]].concat());
    run("again", &[&shares("parallel.micro_batches=[3,1]")[..], &["--resume"]].concat());
    same(&place, ["one", "again"]);
    let said = "expected one number for each of the parallel.data = 2 ranks, found 3";
    place.train("wrong", &shares("parallel.micro_batches=[3,1,1]")).failed(2, &[said]);
}

#[test]
fn the_rank_that_computes_longest_is_named() {
    let place = Place::new();
    for (shares, slow) in [("[9,1]", 0), ("[1,9]", 1)] {
        let shares = format!("parallel.micro_batches={shares}");
        place.train("a", &["--set", "parallel.data=2", "--set", &shares, "--set", "train.seq_len=64"]).ok();
        let lines = place.metrics("a");
        // In a single step it may be the other: that is the scheduler's business.
        let named = lines.iter().filter(|line| line["slowest_rank"].as_u64() == Some(slow)).count();
        assert!(2 * named > lines.len(), "rank {slow} is named in {named} of {} steps", lines.len());
        assert!(lines.iter().all(|line| line["slowest_compute_s"].as_f64() > Some(0.0)), "{lines:?}");
        std::fs::remove_dir_all(place.path("runs/a")).expect("it ended");
    }
}

#[test]
fn with_every_codec_all_ranks_have_the_same_parameters_after_every_step_and_only_fp32_has_those_of_one_rank() {
    let (place, hashes) = &*UNDISTURBED;
    place.train("one", &["--set", "parallel.data=1", "--set", "train.micro_batches=2"]).ok();
    same(place, ["one", "fp32"]);
    for other in ["bf16", "int8"] {
        assert_ne!(place.curve("one"), place.curve(other), "the control: {other} rounds");
    }
    assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2] && hashes[0] != hashes[2]);
}

#[test]
fn a_rank_whose_parameters_drift_is_named_with_the_step() {
    let place = Place::with(WIDE);
    let ran = place.train_with("drift:1:5", "seen", &[]);
    ran.failed(1, &["after step 5 the parameters of rank 1 are not those of rank 0"]);
    // The line of step 6, in whose votes the hashes travel, is not written any more.
    assert_eq!((place.lines("seen"), &place.summary("seen")["status"]), (5, &Value::from("failed")));
    // The control: it is the comparison that notices. Without it only the end does, before anything is made of it.
    let ran = place.train_with("drift:1:5", "unseen", &["--set", "parallel.verify_every=0"]);
    ran.failed(1, &["after step 20 the parameters of rank 1 are not those of rank 0"]);
    assert_eq!((place.lines("unseen"), &place.summary("unseen")["status"]), (20, &Value::from("failed")));
    assert!(place.names("runs/unseen/checkpoints").is_empty());
}

#[test]
fn a_pulse_on_one_rank_changes_the_parameters_of_all_in_the_same_step() {
    let (_, undisturbed) = &*UNDISTURBED;
    for (codec, quiet) in Codec::ALL.into_iter().zip(undisturbed) {
        let place = Place::with(WIDE);
        let set = format!("compression.codec={codec}");
        let (ran, loud) = hashes(&place, 2, "loud", "pulse:1:7", &["--set", &set, "--set", "train.stop_at_step=9"]);
        ran.ok();
        for (rank, loud) in loud.iter().enumerate() {
            assert_eq!(loud.len(), 9);
            for (index, (loud, quiet)) in loud.iter().zip(quiet).enumerate() {
                assert_eq!(loud == quiet, index + 1 < 7, "{codec}, rank {rank}, step {}", index + 1);
            }
        }
        assert_eq!(loud[0], loud[1], "{codec}");
    }
}

#[test]
fn a_nan_on_one_rank_makes_all_skip_that_step_as_if_nobody_had_taken_it() {
    let place = Place::with(WIDE);
    let train = |name: &str, faults: &str, more: &[&str]| {
        let (ran, hashes) = hashes(&place, 2, name, faults, more);
        ran.ok();
        assert_eq!(hashes[0], hashes[1], "{name}");
        hashes.into_iter().next().expect("two ranks")
    };
    let hash = |line: &String| line.split_once(' ').expect("step and hash").1.to_owned();
    let both = train("both", "nan:0:7,nan:1:7", &[]);
    for (name, faults) in [("rank-0", "nan:0:7"), ("rank-1", "nan:1:7")] {
        let hashes = train(name, faults, &[]);
        assert_eq!(hashes, both, "{name}: as if that batch had been skipped by everybody");
        same(&place, [name, "both"]);
        assert_eq!(place.curve(name)[6], ["7", "null", "null", "null"]);
        let counted: Vec<u64> = place.metrics(name).iter().filter_map(|line| line["skipped_steps"].as_u64()).collect();
        let expected: Vec<u64> = (1..=place.lines(name)).map(|step| u64::from(step >= 7)).collect();
        assert_eq!(counted, expected, "{name}");
        let skips: Vec<Value> = place.events(name).into_iter().filter(|event| event["event"] == "skip").collect();
        assert_eq!(skips.len(), 1, "{skips:?}");
        assert_eq!((&skips[0]["step"], &skips[0]["skips_in_a_row"]), (&Value::from(7), &Value::from(1)));
    }
    assert_eq!(hash(&both[5]), hash(&both[6]));

    // Parameters, moments, residuals and AdamW's t are those of the step before.
    for (step, resume) in [(6, None), (7, Some("--resume")), (8, Some("--resume"))] {
        let stop = format!("train.stop_at_step={step}");
        let hashes = train("cut", "nan:1:7", &[&["--set", &stop], resume.as_slice()].concat());
        assert_eq!(hashes, both[..step]);
    }
    let [before, after, next] = [6, 7, 8].map(|step| checkpoint(&place, "cut", step));
    let names: Vec<&String> = before.manifest().tensors.keys().collect();
    for kind in ["weight", "weight.m", "weight.v", "weight.sender.0001", "weight.owner"] {
        assert!(names.contains(&&format!("model.layers.0.mlp.up_proj.{kind}")), "{names:?}");
    }
    assert!(tensors(&before) == tensors(&after));
    let count =
        |checkpoint: &Checkpoint| ["step", "updates", "skips", "good_step"].map(|key| checkpoint.state()[key].clone());
    assert_eq!(count(&before), [6, 6, 0, 6].map(Value::from));
    assert_eq!(count(&after), [7, 6, 1, 6].map(Value::from));
    assert_eq!(count(&next), [8, 7, 0, 8].map(Value::from));
    // The control: a step that is not skipped changes every tensor.
    let pairs = tensors(&after).into_iter().zip(tensors(&next));
    pairs.for_each(|(a, b)| assert!(a != b, "{}", a.0));
}

/// Payload bytes that a rank sends in a step, from the shapes of the model alone.
fn formula(place: &Place, run: &str, codec: Codec, rank: usize) -> u64 {
    let model = checkpoint(place, run, 20).state()["model"].clone();
    let model: Config = serde_json::from_value(model).expect("a model's shape");
    let tensors: Vec<_> = model.parameters().iter().map(|p| (p.shape.iter().product(), codec_of(p, codec))).collect();
    payload_bytes_sent(&tensors, rank, 2) as u64
}

#[test]
fn bytes_at_the_socket_are_the_formula_and_little_more() {
    let (place, _) = &*UNDISTURBED;
    const STEPS: u64 = 20;
    let most = |bytes: u64| STEPS * (bytes + bytes / 100 + (64 << 10));
    for codec in Codec::ALL {
        let run = codec.name();
        let sent = [0, 1].map(|rank| formula(place, run, codec, rank));
        for rank in [0, 1] {
            for (key, bytes) in [("sent", sent[rank]), ("received", sent[1 - rank])] {
                let total = at_the_sockets(place, run, 2, key)[rank] as u64;
                assert!(
                    (STEPS * bytes..=most(bytes)).contains(&total),
                    "{codec}, rank {rank}, {key}: {total}, {bytes} a step"
                );
            }
        }
        let metrics = std::fs::read_to_string(place.path(&format!("runs/{run}/metrics.jsonl"))).expect("metrics");
        for (key, bytes) in [("wire_bytes_sent", sent[0]), ("wire_bytes_received", sent[1])] {
            let of = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")[key].as_u64().expect("bytes");
            let sum: u64 = metrics.lines().map(of).sum();
            // The last of the last step's bytes may leave after its line.
            assert!(((STEPS - 1) * bytes..=most(bytes)).contains(&sum), "{codec}, {key}: {sum}, {bytes} a step");
        }
    }
    // The control: the bounds tell codecs apart.
    let bytes = Codec::ALL.map(|codec| formula(place, codec.name(), codec, 0));
    let [fp32, bf16, int8, _, int4, _] = bytes;
    assert!(STEPS * fp32 > most(bf16) && STEPS * bf16 > most(int8) && STEPS * int8 > most(int4), "{bytes:?}");
}

#[test]
fn a_resume_with_int8_is_bitwise_the_uninterrupted_run_and_needs_what_owners_left_out() {
    let (whole, _) = &*UNDISTURBED;
    let place = Place::with(WIDE);
    for (name, faults) in [("a", ""), ("forgetful", "forget-owner")] {
        place.train(name, &["--set", "train.stop_at_step=9"]).ok();
        let names: Vec<String> = checkpoint(&place, name, 9).manifest().tensors.keys().cloned().collect();
        for kind in ["sender.0000", "sender.0001", "owner"] {
            assert!(names.contains(&format!("model.embed_tokens.weight.{kind}")), "{names:?}");
        }
        place.train_with(faults, name, &["--resume"]).ok();
    }
    assert_eq!(place.curve("a"), whole.curve("int8"));
    for key in ["status", "step", "parameter_hash", "held_out_bits_per_byte", "tokens"] {
        assert_eq!(place.summary("a")[key], whole.summary("int8")[key], "{key}");
    }
    assert!(tensors(&checkpoint(&place, "a", 20)) == tensors(&checkpoint(whole, "int8", 20)));
    // The control.
    assert_ne!(place.summary("forgetful")["parameter_hash"], place.summary("a")["parameter_hash"]);
}

#[test]
fn three_ranks_whose_shards_are_uneven_train_and_resume() {
    let place = Place::with(WIDE);
    let three = ["--set", "parallel.data=3", "--set", "train.steps=12"];
    let (ran, hashes) = hashes(&place, 3, "whole", "", &three);
    ran.ok();
    assert!(hashes[0].len() == 12 && hashes.iter().all(|other| *other == hashes[0]));
    place.train("cut", &[&three[..], &["--set", "train.stop_at_step=5"]].concat()).ok();
    place.train("cut", &[&three[..], &["--resume"]].concat()).ok();
    same(&place, ["whole", "cut"]);
    place.train("fp32", &[&three[..], &["--set", "compression.codec=fp32"]].concat()).ok();
    place.train("one", &["--set", "parallel.data=1", "--set", "train.micro_batches=3", "--set", "train.steps=12"]).ok();
    same(&place, ["one", "fp32"]);
}

#[test]
fn one_rank_under_a_launcher_is_a_process_alone_and_each_goes_on_where_the_other_stopped() {
    let place = Place::new();
    let stop: [&str; 2] = ["--set", "train.stop_at_step=20"];
    place.train("alone", &[]).ok();
    place.train("launched", &[&stop[..], &["--restarts", "1"]].concat()).ok();
    place.train("launched", &["--resume"]).ok();
    place.train("first", &stop).ok();
    place.train("first", &["--resume", "--restarts", "1"]).ok();
    for name in ["launched", "first"] {
        assert_eq!(place.curve(name), place.curve("alone"), "{name}");
        assert_eq!(place.summary(name)["parameter_hash"], place.summary("alone")["parameter_hash"], "{name}");
    }
}

#[test]
fn the_coordinator_collects_the_numbers_of_every_rank() {
    let place = Place::with(WIDE);
    place.train("a", &[]).ok();
    let text = std::fs::read_to_string(place.path("runs/a/ranks.jsonl")).expect("the launcher wrote it");
    let ranks: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(ranks.len(), 2, "{text}");
    for (rank, numbers) in ranks.iter().enumerate() {
        assert_eq!((&numbers["rank"], &numbers["step"]), (&rank.into(), &20.into()), "{text}");
        assert!(numbers["wire_bytes_sent"].as_u64() > Some(0) && numbers["step_s"].as_f64() > Some(0.0), "{text}");
    }
    assert_ne!(ranks[0]["pid"], ranks[1]["pid"]);
}
