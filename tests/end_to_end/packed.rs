//! Runs whose checkpoints are packed with zstd: the same runs, bitwise, and every command reads them.

use serde_json::Value;

use crate::ranks::{checkpoint, same};
use crate::support::Place;

const ON: [&str; 2] = ["--set", "checkpoint.zstd=on"];
const TWO: [&str; 4] = ["--set", "parallel.data=2", "--set", "compression.codec=int8"];

fn train(place: &Place, name: &str, more: &[&[&str]]) {
    place.train(name, &[&[&TWO[..]], more].concat().concat()).ok();
}

fn committed(place: &Place, name: &str, step: u64) -> Value {
    let event = |event: &Value| event["event"] == "checkpoint" && event["step"] == step;
    place.events(name).into_iter().find(event).expect("it is committed")
}

#[test]
fn a_run_of_two_ranks_goes_on_from_packed_checkpoints_bitwise_and_every_command_reads_them() {
    let place = Place::new();
    let until = |step: &'static str| ["--set", step];
    train(&place, "plain", &[]);
    train(&place, "a", &[&ON, &until("train.stop_at_step=21")]);
    let (packed, event) = (checkpoint(&place, "a", 21), committed(&place, "a", 21));
    let (bytes, unpacked) = (event["bytes"].as_u64(), event["unpacked_bytes"].as_u64());
    assert!(bytes.is_some() && bytes < unpacked, "{event}");
    assert_eq!(packed.manifest().version, 2);
    assert!(packed.manifest().files.contains_key("rank-0001.safetensors.zst"));
    place.run(&["verify", "a"]).ok();
    assert!(place.run(&["inspect", "a"]).ok().stdout.contains("with zstd"));
    // What was learnt on the way is the same, packed or not.
    train(&place, "b", &[&until("train.stop_at_step=21")]);
    let plain = checkpoint(&place, "b", 21);
    assert_eq!(plain.manifest().version, 1);
    assert!(committed(&place, "b", 21)["unpacked_bytes"].is_null());
    let compared = checkpoint::compare::compare(&packed, &plain).expect("both are whole");
    assert!(compared.tensors.is_empty(), "{:?}", compared.tensors);

    train(&place, "a", &[&ON, &["--resume"]]);
    same(&place, ["plain", "a"]);
    // From one kind to the other.
    train(&place, "b", &[&ON, &["--resume"]]);
    same(&place, ["plain", "b"]);
    // The control: a run that is not the same.
    train(&place, "c", &[&ON, &["--set", "train.seed=2"]]);
    assert_ne!(place.summary("plain")["parameter_hash"], place.summary("c")["parameter_hash"]);
}

#[test]
fn a_packed_checkpoint_goes_on_with_other_ranks_and_a_damaged_one_stops_a_resume() {
    let place = Place::new();
    train(&place, "a", &[&ON, &["--set", "train.stop_at_step=21"]]);
    let file = place.path("runs/a/checkpoints/step-00000021/rank-0001.safetensors.zst");
    let good = std::fs::read(&file).expect("readable");
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::write(&file, bad).expect("writable");
    let one = ["--set", "parallel.data=1", "--set", "train.micro_batches=4", "--resume"];
    let said = ["damaged", "rank-0001.safetensors.zst"];
    place.train("a", &[&TWO[2..], &ON, &one].concat()).failed(2, &said);
    std::fs::write(&file, good).expect("writable");
    place.train("a", &[&TWO[2..], &ON, &one].concat()).ok();
    assert_eq!(place.summary("a")["status"], "done");
}
