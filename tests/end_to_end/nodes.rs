//! Several ranks a machine: they add in f32 before anything is compressed and leaves the machine.

use compression::Codec;
use parallel::data::nodes::Nodes;
use parallel::data::rules::codec_of;
use parallel::data::shard::payload_bytes;
use serde_json::Value;
use trainer::model::Config;

use crate::ranks::{WIDE, checkpoint, hashes};
use crate::support::Place;

const RANKS: usize = 4;
const STEPS: u64 = 12;
const FOUR: [&str; 8] = [
    "--set",
    "parallel.data=4",
    "--set",
    "train.steps=12",
    "--set",
    "eval.every=0",
    "--set",
    "parallel.chunk_elements=16384",
];

fn wide() -> Place {
    Place::with(WIDE)
}

/// Bytes of messages that each rank sent to ranks of other machines in the whole run.
fn across(place: &Place, run: &str, members: usize) -> Vec<u64> {
    let text = std::fs::read_to_string(place.path(&format!("runs/{run}/ranks.jsonl"))).expect("the launcher wrote it");
    let ranks = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let sent = |numbers: Value| {
        let of = |value: &Value| value.as_u64().expect("a number");
        let node = of(&numbers["rank"]) as usize / members;
        let peers = numbers["peers"].as_array().expect("a list").iter();
        peers.filter(|peer| of(&peer["rank"]) as usize / members != node).map(|peer| of(&peer["sent"])).sum()
    };
    ranks.map(sent).collect()
}

/// Payload bytes a step from a rank to other machines, by the shapes of the model alone.
fn formula(place: &Place, run: &str, codec: Codec, rank: usize, members: usize) -> u64 {
    let model = checkpoint(place, run, STEPS).state()["model"].clone();
    let model: Config = serde_json::from_value(model).expect("a model's shape");
    let tensors: Vec<_> = model.parameters().iter().map(|p| (p.shape.iter().product(), codec_of(p, codec))).collect();
    payload_bytes(&tensors, Nodes { rank, ranks: RANKS, members }).across as u64
}

#[test]
fn bytes_that_leave_a_machine_fall_with_its_ranks_and_all_replicas_stay_equal() {
    let place = wide();
    let mut left = Vec::new();
    for members in [1, 2] {
        let (name, group) = (format!("by-{members}"), format!("parallel.group={members}"));
        let more = [&FOUR[..], &["--set", &group, "--set", "parallel.window_chunks=2"]].concat();
        let (ran, hashes) = hashes(&place, RANKS, &name, "", &more);
        ran.ok();
        assert_eq!(hashes[0].len(), STEPS as usize);
        assert!(hashes.iter().all(|rank| *rank == hashes[0]), "every replica, after every step");
        let sent = across(&place, &name, members);
        for (rank, &sent) in sent.iter().enumerate() {
            let payload = STEPS * formula(&place, &name, Codec::Int8, rank, members);
            // Headers, votes, hashes, and the last steps' numbers, which a heartbeat may not have carried.
            let range = payload - payload / STEPS * 2..=payload + payload / 50 + STEPS * (16 << 10);
            assert!(range.contains(&sent), "{members} a machine, rank {rank}: {sent}, by the formula {payload}");
        }
        left.push(across(&place, &name, 2)[..2].iter().sum::<u64>());
    }
    // From ranks 0 and 1 to ranks 2 and 3: half of it, if two are one machine.
    let ratio = left[1] as f64 / left[0] as f64;
    assert!((ratio - 0.5).abs() < 0.01, "{left:?}");
}

#[test]
fn zstd_and_a_change_of_codec_leave_machines_with_equal_replicas() {
    let place = wide();
    let train = |name: &str, faults: &str, more: &[&str]| {
        let group =
            ["--set", "parallel.group=2", "--set", "compression.codec=int4", "--set", "compression.warmup_steps=4"];
        let (ran, hashes) = hashes(&place, RANKS, name, faults, &[&FOUR[..], &group, more].concat());
        ran.ok();
        assert!(hashes.iter().all(|rank| *rank == hashes[0]), "{name}");
        hashes[0].clone()
    };
    let plain = train("plain", "", &[]);
    // On a link of a byte a second whatever gets smaller is packed.
    let packed = train("packed", "link:1", &["--set", "compression.zstd=auto", "--set", "parallel.window_chunks=1"]);
    assert_eq!(plain, packed);
    let on = place.events("packed").into_iter().filter(|event| event["event"] == "zstd" && event["packs"] == true);
    assert!(on.count() > 0, "something is packed");
}

#[test]
fn ranks_of_one_machine_compress_nothing_and_say_so() {
    let place = wide();
    for codec in ["int8", "auto"] {
        let codec_set = format!("compression.codec={codec}");
        let more = [&FOUR[..], &["--set", "parallel.group=4", "--set", &codec_set]].concat();
        let (ran, hashes) = hashes(&place, RANKS, codec, "", &more);
        ran.ok();
        assert!(hashes.iter().all(|rank| *rank == hashes[0]));
        let events = place.events(codec);
        let said: Vec<&Value> = events.iter().filter(|event| event["event"] == "codec").collect();
        assert_eq!(said.len(), 1, "{events:?}");
        assert_eq!(said[0]["codec"], "fp32");
        assert_eq!(said[0]["reason"], "all ranks are one machine, and nothing leaves it");
        assert!(across(&place, codec, 4).iter().all(|&sent| sent == 0));
        let kept = checkpoint(&place, codec, STEPS);
        assert!(!kept.manifest().tensors.keys().any(|name| name.contains(".sender.")), "nothing is left out");
    }
}

#[test]
fn auto_chooses_for_machines() {
    let place = wide();
    let more = [&FOUR[..], &["--set", "parallel.group=2", "--set", "compression.codec=auto"]].concat();
    let (ran, hashes) = hashes(&place, RANKS, "auto", "link:1e3,step:0.001", &more);
    ran.ok();
    assert!(hashes.iter().all(|rank| *rank == hashes[0]));
    let events = place.events("auto");
    let last = events.iter().rfind(|event| event["event"] == "codec").expect("a choice");
    assert_eq!(last["codec"], "int4", "{last}");
}

#[test]
fn a_resume_with_machines_is_bitwise() {
    let place = wide();
    let group = ["--set", "parallel.group=2", "--set", "compression.codec=int4"];
    let train = |name: &str, more: &[&str]| place.train(name, &[&FOUR[..], &group, more].concat());
    train("whole", &[]).ok();
    train("cut", &["--set", "train.stop_at_step=5"]).ok();
    train("cut", &["--resume", "--set", "train.stop_at_step=12"]).ok();
    assert_eq!(place.curve("cut"), place.curve("whole"));
    assert_eq!(place.summary("cut")["parameter_hash"], place.summary("whole")["parameter_hash"]);
}

#[test]
fn a_member_that_dies_is_named_by_all() {
    let place = wide();
    let more = [&FOUR[..], &["--set", "parallel.group=2"]].concat();
    place.train_with("die:3:4", "dies", &more).failed(75, &["rank 3"]);
}
