//! Stages of a pipeline as processes: the losses and parameters of one rank, checkpoints onto other meshes and from them, the
//! same export, and a rank that dies at any place of its schedule.

use std::path::Path;

use crate::processes::nobody_is_left;
use crate::ranks::same;
use crate::support::{Place, Ran};
use crate::tensor::{RECIPE, apart, copy, distance};

/// Ranks, and how stages work.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mesh {
    data: usize,
    stages: usize,
    tensor: usize,
    schedule: &'static str,
    virtual_stages: usize,
}

const fn plain(data: usize, stages: usize, tensor: usize) -> Mesh {
    Mesh { data, stages, tensor, schedule: "1f1b", virtual_stages: 1 }
}

const INTERLEAVED: Mesh = Mesh { schedule: "interleaved", virtual_stages: 2, ..plain(1, 2, 1) };

/// What makes a run one on this mesh: four sequences a step, each a micro-batch of its own.
fn on(mesh: Mesh) -> Vec<String> {
    let Mesh { data, stages, tensor, schedule, virtual_stages } = mesh;
    let sets = [
        format!("parallel.data={data}"),
        format!("parallel.pipeline={stages}"),
        format!("parallel.tensor={tensor}"),
        format!("parallel.schedule={schedule}"),
        format!("parallel.virtual_stages={virtual_stages}"),
        "model.num_hidden_layers=4".into(),
        "train.micro_batch_size=1".into(),
        format!("train.micro_batches={}", 4 / data),
    ];
    sets.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

fn start(place: &Place, faults: &str, name: &str, mesh: Mesh, more: &[&str]) -> Ran {
    let sets = on(mesh);
    let args: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
    place.train_with(faults, name, &args)
}

fn train(place: &Place, name: &str, mesh: Mesh, more: &[&str]) -> String {
    start(place, "", name, mesh, more).ok().stderr
}

const ONE: Mesh = plain(1, 1, 1);
/// The table and the feed-forward layers are large enough to travel compressed; in a tied model both ends have the table.
const WIDE: [&str; 6] =
    ["--set", "model.hidden_size=256", "--set", "model.intermediate_size=264", "--set", "train.seq_len=16"];
const INT8: [&str; 2] = ["--set", "compression.codec=int8"];

#[test]
fn stages_have_one_ranks_losses_and_parameters() {
    for tied in ["true", "false"] {
        let place = Place::with(RECIPE);
        let tied = ["--set", &format!("model.tie_word_embeddings={tied}")];
        train(&place, "one", ONE, &tied);
        let gpipe = Mesh { schedule: "gpipe", ..plain(1, 4, 1) };
        for (number, mesh) in
            [plain(1, 2, 1), INTERLEAVED, gpipe, plain(2, 2, 1), plain(1, 2, 2)].into_iter().enumerate()
        {
            let name = format!("mesh-{number}");
            let said = train(&place, &name, mesh, &tied);
            let (loss, weights) = (distance(&place, &name, "one"), apart(&place, &name, "one"));
            assert!(loss <= 1e-6 && weights <= 1e-5, "{mesh:?}: {loss:e} {weights:e}");
            let axes = format!("data {} x pipeline {} x tensor {}", mesh.data, mesh.stages, mesh.tensor);
            assert!(said.contains(&axes), "{said}");
            let axes = format!("{} x {} x {}", mesh.data, mesh.stages, mesh.tensor);
            assert_eq!(place.summary(&name)["mesh"], axes);
            assert_eq!(place.summary(&name)["tokens"], place.summary("one")["tokens"]);
        }
        // The control: another order of the text is another run.
        train(&place, "other", plain(1, 2, 1), &[&tied[..], &["--set", "train.seed=2"]].concat());
        assert!(distance(&place, "other", "one") > 1e-3 && apart(&place, "other", "one") > 1e-2);
    }
}

#[test]
fn a_split_may_be_given_and_activations_may_travel_in_fewer_bits() {
    let place = Place::with(RECIPE);
    train(&place, "one", ONE, &[]);
    train(&place, "given", plain(1, 2, 1), &["--set", "parallel.layers=[1, 3]"]);
    assert!(distance(&place, "given", "one") <= 1e-6);
    for (codec, most) in [("bf16", 1e-2), ("int8", 3e-2)] {
        train(&place, codec, plain(1, 2, 1), &["--set", &format!("parallel.activation_codec={codec}")]);
        let loss = distance(&place, codec, "one");
        assert!(loss > 1e-6 && loss < most, "{codec}: {loss:e}");
    }
}

#[test]
fn with_sharded_moments_and_compressed_gradients_stages_stay_one_replica() {
    let place = Place::with(RECIPE);
    let mesh = plain(2, 2, 1);
    train(&place, "plain", mesh, &[]);
    train(&place, "sharded", mesh, &["--set", "optimizer.sharded=true"]);
    same(&place, ["plain", "sharded"]);
    // What both ends left out of the table's gradient is the same: they compare it after every step.
    let verified = [&WIDE[..], &["--set", "parallel.verify_every=1"]].concat();
    train(&place, "wide", mesh, &verified);
    train(&place, "int8", mesh, &[&verified[..], &INT8].concat());
    let loss = distance(&place, "int8", "wide");
    assert!(loss > 1e-6 && loss < 3e-2, "{loss:e}");
}

#[test]
fn replicas_may_have_unequal_shares_and_be_of_one_machine_and_auto_chooses_for_stages() {
    let place = Place::with(RECIPE);
    train(&place, "one", ONE, &[]);
    let mesh = plain(2, 2, 1);
    train(&place, "unequal", mesh, &["--set", "parallel.micro_batches=[3, 1]"]);
    train(&place, "machine", mesh, &["--set", "parallel.group=2", "--set", "compression.codec=int8"]);
    for run in ["unequal", "machine"] {
        let loss = distance(&place, run, "one");
        assert!(loss <= 1e-6, "{run}: {loss:e}");
    }
    assert_eq!(place.summary("machine")["codec"], "fp32", "inside one machine nothing is compressed");
    train(&place, "auto", mesh, &["--set", "compression.codec=auto"]);
    assert!(place.events("auto").iter().any(|event| event["event"] == "codec"), "it was chosen");
}

#[test]
fn stages_that_make_a_sample_together_say_what_one_rank_does() {
    let place = Place::with(RECIPE);
    let prompt = ["--set", "export.prompt=the ", "--set", "export.temperature=0", "--set", "export.sample_tokens=24"];
    let sample = |mesh: Mesh, more: &[&str]| {
        let said = start(&place, "", "a", mesh, &[&prompt[..], more].concat()).ok().stdout;
        said.split("\n---\n").nth(1).expect("a sample").to_owned()
    };
    let one = sample(ONE, &[]);
    assert!(one.len() > "the ".len(), "{one}");
    for mesh in [plain(1, 2, 1), INTERLEAVED, plain(1, 2, 2), plain(2, 2, 1)] {
        assert_eq!(sample(mesh, &["--resume"]), one, "{mesh:?}");
    }
}

#[test]
fn a_checkpoint_goes_from_any_mesh_to_any_other_with_the_losses_of_one_rank() {
    let place = Place::with(RECIPE);
    train(&place, "one", ONE, &[]);
    let meshes = [ONE, plain(1, 2, 1), INTERLEAVED, plain(2, 2, 1), plain(1, 1, 2)];
    for (number, from) in meshes.into_iter().enumerate() {
        let first = format!("from-{number}");
        train(&place, &first, from, &["--set", "train.stop_at_step=9"]);
        for (number, to) in meshes.into_iter().enumerate().filter(|&(_, to)| from.stages > 1 || to.stages > 1) {
            let second = format!("{first}-to-{number}");
            copy(&place.path(&format!("runs/{first}")), &place.path(&format!("runs/{second}")));
            train(&place, &second, to, &["--resume", "--set", "train.stop_at_step=20"]);
            let loss = distance(&place, &second, "one");
            assert!(loss <= 1e-6, "{from:?} to {to:?}: {loss:e}");
        }
    }
}

#[test]
fn on_the_same_mesh_a_resume_is_the_run_that_nobody_stopped_and_the_export_is_any_meshs() {
    let place = Place::with(RECIPE);
    let int8 = [&WIDE[..], &INT8].concat();
    let (mesh, stop) = (plain(2, 2, 1), [&int8[..], &["--set", "train.stop_at_step=9"]].concat());
    train(&place, "whole", mesh, &int8);
    train(&place, "a", mesh, &stop);
    train(&place, "a", mesh, &[&int8[..], &["--resume", "--set", "train.stop_at_step=20"]].concat());
    same(&place, ["whole", "a"]);
    // The control: forgotten, what ends left out of the table makes it another run.
    train(&place, "b", mesh, &stop);
    start(&place, "forget-owner", "b", mesh, &[&int8[..], &["--resume", "--set", "train.stop_at_step=20"]].concat())
        .ok();
    assert_ne!(place.summary("a")["parameter_hash"], place.summary("b")["parameter_hash"]);
    let export = |folder: &str| -> Vec<(String, Vec<u8>)> {
        let read = |name: String| {
            let bytes = std::fs::read(place.path(&format!("{folder}/{name}"))).expect("readable");
            (name, bytes)
        };
        place.names(folder).into_iter().map(read).collect()
    };
    let expected = export("runs/a/export");
    place.run(&["export", "a", "--out", "alone"]).ok();
    assert_eq!(export("alone"), expected, "one process, from the checkpoint");
    for other in [ONE, INTERLEAVED, plain(1, 1, 2)] {
        // Everything was trained: what is left is to put the pieces together.
        train(&place, "a", other, &[&int8[..], &["--resume"]].concat());
        assert_eq!(export("runs/a/export"), expected, "{other:?}");
    }
}

#[test]
fn a_rank_that_dies_anywhere_in_its_schedule_ends_the_run_with_its_name() {
    let place = Place::with(RECIPE);
    let few = ["--set", "train.steps=5", "--set", "export.at_end=false", "--set", "parallel.peer_timeout_s=20"];
    // Eight passes of each rank; of interleaved ones sixteen, of which the first, those of the steady state and the last.
    let every = |rank: usize, passes: &[usize]| passes.iter().map(|&pass| (rank, pass)).collect::<Vec<_>>();
    let all: Vec<usize> = (0..8).collect();
    let cases = [
        (plain(1, 2, 1), [every(0, &all), every(1, &all)].concat()),
        (INTERLEAVED, [every(0, &[0, 5, 9, 15]), every(1, &[0, 6, 15])].concat()),
        (plain(2, 2, 1), every(2, &[1, 3])),
    ];
    for (mesh, places) in cases {
        for (rank, pass) in places {
            let name = format!("{}-{}-{rank}-{pass}", mesh.schedule, mesh.data);
            let ran = start(&place, &format!("die-at:{rank}:3:{pass}"), &name, mesh, &few);
            let ran = ran.failed(75, &[&format!("rank {rank} (host ")]);
            assert!(ran.stderr.contains("was killed") || ran.stderr.contains("SIG"), "{}", ran.stderr);
            nobody_is_left(&place.path(""));
        }
    }
    // The control: a pass that there is not kills nobody.
    start(&place, "die-at:0:3:8", "alive", plain(1, 2, 1), &few).ok();
}

#[test]
fn a_loss_that_is_not_finite_makes_all_stages_skip_the_step() {
    let place = Place::with(RECIPE);
    for (name, mesh, faults) in [("one", ONE, "nan:0:7"), ("two", plain(1, 2, 1), "nan:1:7")] {
        start(&place, faults, name, mesh, &[]).ok();
    }
    let int8 = ["--set", "parallel.activation_codec=int8"];
    start(&place, "nan:1:7", "int8", plain(1, 2, 1), &int8).ok();
    for run in ["one", "two", "int8"] {
        assert_eq!(place.curve(run)[6][3], "null", "{run}");
        assert_eq!(place.events(run).iter().filter(|event| event["event"] == "skip").count(), 1, "{run}");
    }
    let losses = |run: &str| place.curve(run).into_iter().map(|line| line[1].clone()).collect::<Vec<_>>();
    for (step, (one, two)) in losses("one").iter().zip(&losses("two")).enumerate().filter(|(step, _)| *step != 6) {
        let [one, two] = [one, two].map(|loss| loss.parse::<f64>().expect("finite"));
        assert!((one - two).abs() <= 1e-6 * one, "step {}: {one} {two}", step + 1);
    }
}

#[test]
fn a_pipeline_that_cannot_be_is_refused_with_all_that_is_wrong_and_no_folder_is_made() {
    let place = Place::with(RECIPE);
    let refused = |sets: &[&str], said: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        place.train("a", &sets).failed(2, said);
    };
    refused(
        &["parallel.pipeline=3"],
        &["expected at least a layer for each of 3 stages x 1 virtual stages, found 2 layers"],
    );
    refused(
        &["parallel.pipeline=2", "parallel.schedule=interleaved"],
        &["expected at least 2 stages and 2 virtual stages, found 2 and 1"],
    );
    refused(
        &[
            "model.num_hidden_layers=4",
            "parallel.pipeline=2",
            "parallel.schedule=interleaved",
            "parallel.virtual_stages=2",
            "train.micro_batches=3",
        ],
        &["expected a multiple of the 2 stages as number of micro-batches, found 3; 4 would do, or 1F1B"],
    );
    refused(
        &["parallel.pipeline=2", "parallel.layers=[2, 1]"],
        &["expected 2 pieces of at least a layer, 2 together, found"],
    );
    refused(&["parallel.activation_codec=int8"], &["nothing travels between stages"]);
    let large = ["parallel.pipeline=2", "train.micro_batch_size=1048576"];
    refused(&large, &["messages of 6442450944 bytes may wait from one rank", "make micro-batches smaller"]);
    assert!(!place.path("runs/a").exists());
}

#[test]
fn what_stages_wait_for_each_other_is_measured_and_what_leaves_is_planned() {
    let place = Place::with(RECIPE);
    train(&place, "two", plain(1, 2, 1), &[]);
    train(&place, "one", ONE, &[]);
    let waits = |run: &str| -> Vec<Option<f64>> {
        let text = std::fs::read_to_string(place.path(&format!("runs/{run}/metrics.jsonl"))).expect("metrics");
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["stage_wait_s"].as_f64();
        text.lines().map(line).collect()
    };
    assert!(waits("two").iter().all(|wait| wait.is_some_and(|wait| wait > 0.0)));
    assert!(waits("one").iter().all(Option::is_none));
    assert!(Path::new(&place.path("runs/two/export/model.safetensors")).exists());
}
