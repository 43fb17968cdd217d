//! Ranks that hold one model together, as processes: the losses and parameters of one rank, checkpoints from one mesh onto
//! another, the same export from all, and what becomes of faults.
//!
//! - `meshes`: from one mesh onto another.

mod meshes;

pub use meshes::copy;

use std::collections::BTreeMap;

use checkpoint::export::Folder;
use rustix::process::Signal;

use crate::processes::nobody_is_left;
use crate::support::{Place, end, wait_until};

/// Ranks on the axes data and tensor, and whether sequences are cut.
pub type Mesh = (usize, usize, bool);

/// Every run reads two micro-batches of two sequences a step.
pub const RECIPE: &str = r#"
[model]
hidden_size = 32
intermediate_size = 65
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2

[tokenizer]
vocab_size = 299

[data]
source = "text"
train = ["TEXT/train.txt"]
cache_dir = "TEXT/cache"

[train]
steps = 20
seq_len = 48
micro_batch_size = 2

[eval]
files = ["TEXT/held_out.txt"]
every = 10
windows = 4

[optimizer]
eps = 1e-6

[schedule]
learning_rate = 3e-3
warmup_steps = 5

[compression]
codec = "fp32"

[checkpoint]
every = 0
"#;

/// What makes a run one on this mesh.
pub fn on((data, tensor, sequence): Mesh) -> Vec<String> {
    let micro_batches = 2 / data;
    let sets = [
        format!("parallel.data={data}"),
        format!("parallel.tensor={tensor}"),
        format!("parallel.sequence={sequence}"),
        format!("train.micro_batches={micro_batches}"),
    ];
    sets.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

pub fn train(place: &Place, name: &str, mesh: Mesh, more: &[&str]) -> String {
    train_with(place, "", name, mesh, more)
}

pub fn train_with(place: &Place, faults: &str, name: &str, mesh: Mesh, more: &[&str]) -> String {
    let sets = on(mesh);
    let args: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
    place.train_with(faults, name, &args).ok().stderr
}

/// The largest relative difference of two runs' losses, of steps and of evaluations, which are of the same steps.
#[track_caller]
pub fn distance(place: &Place, a: &str, b: &str) -> f64 {
    let (a, b) = (place.curve(a), place.curve(b));
    assert_eq!(a.len(), b.len());
    let mut largest = 0.0f64;
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a[0], b[0]);
        for (a, b) in a[1..3].iter().zip(&b[1..3]) {
            match (a.parse::<f64>(), b.parse::<f64>()) {
                (Ok(a), Ok(b)) => largest = largest.max((a - b).abs() / b.abs()),
                _ => assert_eq!(a, b),
            }
        }
    }
    largest
}

/// The tensors of a run's export.
fn exported(place: &Place, run: &str) -> BTreeMap<String, Vec<f32>> {
    let folder = Folder::open(&place.path(&format!("runs/{run}/export"))).expect("an export");
    folder.names().into_iter().map(|(name, _)| (name.clone(), folder.tensor(&name).expect("whole").1)).collect()
}

/// The largest difference of two exports' numbers, beside the largest number of each tensor.
#[track_caller]
pub fn apart(place: &Place, a: &str, b: &str) -> f32 {
    let (a, b) = (exported(place, a), exported(place, b));
    assert!(a.keys().eq(b.keys()));
    let of = |(name, a): (&String, &Vec<f32>)| {
        let largest = b[name].iter().fold(0.0f32, |max, x| max.max(x.abs()));
        a.iter().zip(&b[name]).fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / largest
    };
    a.iter().map(of).fold(0.0, f32::max)
}

#[test]
fn processes_that_hold_a_model_together_have_one_ranks_losses_and_parameters() {
    for tied in ["true", "false"] {
        let place = Place::with(RECIPE);
        let tied = ["--set", &format!("model.tie_word_embeddings={tied}")];
        train(&place, "one", (1, 1, false), &tied);
        // Four tensor ranks are more than there are key and value heads.
        for (number, mesh) in [(1, 2, false), (1, 4, true), (2, 2, true)].into_iter().enumerate() {
            let name = format!("mesh-{number}");
            let said = train(&place, &name, mesh, &tied);
            let (loss, weights) = (distance(&place, &name, "one"), apart(&place, &name, "one"));
            assert!(loss <= 1e-6 && weights <= 1e-5, "{mesh:?}: {loss:e} {weights:e}");
            assert!(said.contains(&format!("data {} x pipeline 1 x tensor {}", mesh.0, mesh.1)), "{said}");
            assert_eq!(place.summary(&name)["mesh"], format!("{} x 1 x {}", mesh.0, mesh.1));
            assert_eq!(place.summary(&name)["tokens"], place.summary("one")["tokens"]);
        }
        // The control: another order of the text is another run.
        train(&place, "other", (1, 2, false), &[&tied[..], &["--set", "train.seed=2"]].concat());
        assert!(distance(&place, "other", "one") > 1e-3 && apart(&place, "other", "one") > 1e-2);
    }
}

#[test]
fn a_loss_that_one_of_them_finds_broken_makes_all_skip_the_step() {
    let place = Place::with(RECIPE);
    train_with(&place, "nan:0:7", "one", (1, 1, false), &[]);
    train_with(&place, "nan:3:7", "four", (2, 2, false), &[]);
    assert!(place.curve("four")[6][3] == "null" && place.events("four").iter().any(|event| event["event"] == "skip"));
    let losses = |run: &str| place.curve(run).into_iter().map(|line| line[1].clone()).collect::<Vec<_>>();
    let (one, four) = (losses("one"), losses("four"));
    for (step, (one, four)) in one.iter().zip(&four).enumerate().filter(|(step, _)| *step != 6) {
        let [one, four] = [one, four].map(|loss| loss.parse::<f64>().expect("finite"));
        assert!((one - four).abs() <= 1e-6 * one, "step {}: {one} {four}", step + 1);
    }
}

#[test]
fn a_part_that_differs_from_its_replica_is_noticed_and_both_ranks_are_named() {
    let place = Place::with(RECIPE);
    let sets = on((2, 2, false));
    let args: Vec<&str> = sets
        .iter()
        .map(String::as_str)
        .chain(["--set", "parallel.verify_every=2", "--set", "train.steps=12"])
        .collect();
    let said = "after step 6 the parameters of rank 3 are not those of rank 1";
    place.train_with("drift:3:5", "seen", &args).failed(1, &[said]);
    nobody_is_left(&place.path(""));
}

#[test]
fn one_that_dies_in_a_step_ends_the_run_with_its_name_and_a_resume_goes_on() {
    let place = Place::with(RECIPE);
    let sets = on((2, 2, true));
    // Room for the checkpoint of step 12 means that the one of step 4 is there.
    let keep = ["--set", "checkpoint.when_busy=wait", "--set", "checkpoint.keep_last=0"];
    let more = ["--set", "checkpoint.every=4", "--set", "parallel.peer_timeout_s=20"];
    let args: Vec<&str> = sets.iter().map(String::as_str).chain(more).chain(keep).collect();
    let ran = place.train_with("die:3:13", "a", &args).failed(75, &["rank 3 (host "]);
    assert!(ran.stderr.contains("SIGKILL") || ran.stderr.contains("was killed"), "{}", ran.stderr);
    nobody_is_left(&place.path(""));
    // Whatever was being written when it died: what is there is whole.
    let names = place.names("runs/a/checkpoints");
    assert!(
        names.contains(&"step-00000004".to_owned()) && names.iter().all(|name| !name.ends_with(".partial")),
        "{names:?}"
    );
    train(&place, "a", (2, 2, true), &["--set", "checkpoint.every=4", "--resume"]);
    train(&place, "one", (1, 1, false), &[]);
    assert!(distance(&place, "a", "one") <= 1e-6);
}

#[test]
fn one_that_is_at_another_call_ends_the_run_and_it_is_said_who_is_where() {
    let place = Place::with(RECIPE);
    let sets = on((2, 2, false));
    let args: Vec<&str> = sets.iter().map(String::as_str).chain(["--set", "parallel.peer_timeout_s=20"]).collect();
    let ran = place.train_with("stray:3:11", "a", &args).failed(1, &[]);
    let host = format!("(host {}, process ", crate::dying::hostname());
    // Whichever of the two notices first says both places, and then everybody's follows.
    // The one that strays has not begun the step yet.
    let said = |text: &str| ran.stderr.contains(text);
    assert!(said("at all_reduce ") && said("of nowhere else"), "{}", ran.stderr);
    assert!(said("step 11: rank ") || said("step 10: rank "), "{}", ran.stderr);
    for rank in 0..4 {
        assert!(ran.stderr.contains(&format!("\n  rank {rank} {host}")), "{}", ran.stderr);
    }
    nobody_is_left(&place.path(""));
}

#[test]
fn a_signal_stops_all_of_them_after_the_same_step_with_a_checkpoint() {
    let place = Place::with(RECIPE);
    let sets = on((1, 2, true));
    let args: Vec<&str> = sets.iter().map(String::as_str).chain(["--set", "train.steps=2000"]).collect();
    let mut child = place.start("a", &args);
    assert!(wait_until(&mut child, || place.lines("a") >= 5), "it had no time to end");
    end(child, Signal::TERM).failed(75, &[]);
    nobody_is_left(&place.path(""));
    let last = place.lines("a");
    assert_eq!(place.names("runs/a/checkpoints"), [format!("step-{last:08}")]);
    let more = ["--resume", "--set", "train.steps=2000", "--set", &format!("train.stop_at_step={}", last + 5)];
    train(&place, "a", (1, 2, true), &more);
    assert_eq!(place.lines("a"), last + 5);
}

#[test]
fn a_model_that_cannot_be_cut_is_refused_with_all_that_is_wrong_and_no_folder_is_made() {
    let place = Place::with(RECIPE);
    let args = ["--set", "parallel.tensor=5", "--set", "parallel.sequence=true"];
    place.train("a", &args).failed(
        2,
        &[
            "expected the tensor ranks to divide the 4 query heads, found 5; 1, 2, 4 would",
            "expected the 5 tensor ranks to divide the 2 key-value heads, or to be a multiple of them",
            "expected the 5 tensor ranks to divide a sequence of 48 tokens",
        ],
    );
    place
        .train("a", &["--set", "parallel.tensor=1024", "--set", "parallel.data=2"])
        .failed(2, &["expected at most 1024 ranks"]);
    assert!(!place.path("runs/a").exists());
}
