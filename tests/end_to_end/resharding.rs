//! A run that goes on with other ranks than it had. `ledger/chain.rs` shows that nothing is lost on the way.

use checkpoint::reader::Checkpoint;
use parallel::data::Parameter;
use parallel::data::rules::may_be_lossy;
use parallel::data::shard::shard;
use serde_json::Value;
use trainer::model::Config;

use crate::ranks::{WIDE, checkpoint, same};
use crate::support::Place;

/// Ranks, and what makes four micro-batches a step of them.
pub const FOUR_PASSES: [(usize, &str); 4] = [
    (1, "train.micro_batches=4"),
    (2, "train.micro_batches=2"),
    (3, "parallel.micro_batches=[2,1,1]"),
    (4, "train.micro_batches=1"),
];

/// The arguments for so many ranks, until a step.
pub fn until(ranks: usize, stop: u64) -> Vec<String> {
    let (_, passes) = FOUR_PASSES.into_iter().find(|(of, _)| *of == ranks).expect("one of them");
    let sets = [format!("parallel.data={ranks}"), passes.into(), format!("train.stop_at_step={stop}")];
    sets.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

fn train(place: &Place, name: &str, faults: &str, ranks: usize, stop: u64, more: &[&str]) -> String {
    let until = until(ranks, stop);
    let args: Vec<&str> = until.iter().map(String::as_str).chain(more.iter().copied()).collect();
    place.train_with(faults, name, &args).ok().stderr
}

fn recut(place: &Place, run: &str) -> Vec<Value> {
    place.events(run).into_iter().filter(|event| event["event"] == "recut").collect()
}

#[test]
fn with_fp32_and_sums_in_the_same_order_a_run_on_one_four_three_and_one_rank_is_bitwise_one_ranks() {
    let place = Place::new();
    let fp32 = ["--set", "compression.codec=fp32"];
    let resume = [&fp32[..], &["--resume"]].concat();
    train(&place, "whole", "", 1, 60, &fp32);
    train(&place, "a", "", 1, 9, &fp32);
    for (ranks, stop) in [(4, 22), (3, 41), (1, 60)] {
        let said = train(&place, "a", "", ranks, stop, &resume);
        assert!(said.contains("nothing was left out of its gradients"), "{said}");
    }
    same(&place, ["whole", "a"]);
    assert!(recut(&place, "a").iter().all(|event| event["residuals"] == "none"));
    // The control: two ranks add (a + b) + (c + d), which is another sum.
    train(&place, "b", "", 1, 9, &fp32);
    train(&place, "b", "", 2, 60, &resume);
    assert_ne!(place.curve("b"), place.curve("whole"));
    assert_ne!(place.summary("b")["parameter_hash"], place.summary("whole")["parameter_hash"]);
}

#[test]
fn another_number_of_sequences_a_step_is_refused_with_values_that_keep_it_and_nothing_changes() {
    let place = Place::new();
    place.train("a", &["--set", "train.stop_at_step=9"]).ok();
    let before = std::fs::read(place.path("runs/a/recipe.toml")).expect("readable");
    // One rank with two micro-batches of two.
    let four = "a step of the run has 4 sequences (2 micro-batches of 2 over 1 ranks)";
    for (sets, said) in [
        (&["parallel.data=2"][..], "train.micro_batches = 1 keeps them"),
        (&["parallel.data=3"], "3 ranks can share them with train.micro_batch_size = 1 or another divisor below"),
        (&["parallel.data=2", "parallel.micro_batches=[2,1]"], "train.micro_batches = 1 keeps them"),
        (&["train.micro_batches=4"], "train.micro_batches = 2 keeps them"),
    ] {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).chain(["--resume"]).collect();
        place.train("a", &sets).failed(2, &[four, said]);
        assert_eq!(std::fs::read(place.path("runs/a/recipe.toml")).expect("readable"), before);
    }
    // The control: other keys of the same kind, and as many sequences.
    let other = ["--set", "train.micro_batch_size=4", "--set", "train.micro_batches=1", "--resume"];
    let said = place.train("a", &other).ok().stderr;
    assert!(said.contains("train.micro_batch_size: the run has 2, the recipe says 4"), "{said}");
}

/// Every element of a tensor of a checkpoint.
fn read(checkpoint: &Checkpoint, name: &str, parameter: &Parameter) -> Vec<f32> {
    let mut values = vec![0.0; parameter.shape.iter().product()];
    checkpoint.tensor(name, &parameter.shape, &mut values).unwrap_or_else(|error| panic!("{error}"));
    values
}

pub fn lossy(checkpoint: &Checkpoint) -> Vec<Parameter> {
    let model: Config = serde_json::from_value(checkpoint.state()["model"].clone()).expect("a model's shape");
    model.parameters().into_iter().filter(may_be_lossy).collect()
}

/// What a checkpoint of so many ranks left out of a tensor, folded: owner and senders, in rank order.
fn folded(checkpoint: &Checkpoint, parameter: &Parameter, senders: impl Iterator<Item = usize>) -> Vec<f32> {
    let mut sum = read(checkpoint, &format!("{}.owner", parameter.name), parameter);
    for rank in senders {
        let sender = read(checkpoint, &format!("{}.sender.{rank:04}", parameter.name), parameter);
        sum.iter_mut().zip(sender).for_each(|(sum, left)| *sum += left);
    }
    sum
}

/// Goes on with other ranks and skips their first step, after which the checkpoint shows what they began with.
fn folds(place: &Place, run: &str, (before, group_before): (usize, usize), (after, group_after): (usize, usize)) {
    let groups = [group_before, group_after].map(|group| format!("parallel.group={group}"));
    train(place, run, "", before, 3, &["--set", &groups[0]]);
    let said = train(place, run, "nan:0:4", after, 4, &["--set", &groups[1], "--resume"]);
    assert!(said.contains("what had been left out of gradients"), "{said}");
    let [old, new] = [3, 4].map(|step| checkpoint(place, run, step));
    assert_eq!(old.state()["mesh"]["data"], before);
    assert_eq!((&new.state()["mesh"]["data"], &new.state()["mesh"]["group"]), (&after.into(), &group_after.into()));
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for parameter in lossy(&old) {
        let name = &parameter.name;
        let begun = read(&new, &format!("{name}.owner"), &parameter);
        assert!(begun.iter().any(|x| *x != 0.0), "{name}");
        assert!(bits(&begun) == bits(&folded(&old, &parameter, 0..before)), "{name}");
        // The controls: a sender forgotten, and one counted twice.
        for senders in [vec![0], (0..before).chain([1]).collect()] {
            assert!(bits(&begun) != bits(&folded(&old, &parameter, senders.into_iter())) || before == 1, "{name}");
        }
        for rank in 0..after {
            let sender = format!("{name}.sender.{rank:04}");
            assert_eq!(new.has(&sender), after > 1, "{sender}");
            assert!(after == 1 || read(&new, &sender, &parameter).iter().all(|x| *x == 0.0), "{sender}");
        }
    }
    // It goes on from there.
    train(place, run, "", after, 6, &["--set", &groups[1], "--resume"]);
}

#[test]
fn what_was_left_out_is_folded_exactly_onto_any_other_ranks_and_machines() {
    let place = Place::with(WIDE);
    for (before, after) in [((2, 1), (4, 1)), ((4, 1), (3, 1)), ((3, 1), (1, 1)), ((4, 2), (4, 1)), ((4, 1), (4, 2))] {
        let run = format!("{}-{}-{}-{}", before.0, before.1, after.0, after.1);
        folds(&place, &run, before, after);
    }
    // A machine's members each hold the part that they added: nothing of an element is with two of them.
    let old = checkpoint(&place, "4-2-4-1", 3);
    for parameter in lossy(&old) {
        let left = |rank: usize| read(&old, &format!("{}.sender.{rank:04}", parameter.name), &parameter);
        for machine in [[0, 1], [2, 3]] {
            let [a, b] = machine.map(left);
            assert!(a.iter().zip(&b).all(|(a, b)| *a == 0.0 || *b == 0.0), "{}", parameter.name);
        }
        let own = shard(parameter.elements(), 0, 4);
        assert!(left(0)[own].iter().all(|x| *x == 0.0), "an owner sends itself nothing");
    }
}

#[test]
fn one_rank_alone_and_one_under_a_launcher_add_the_same_to_the_same_gradient() {
    let place = Place::with(WIDE);
    for run in ["alone", "launched"] {
        train(&place, run, "", 2, 3, &[]);
        let launcher: &[&str] = if run == "launched" { &["--restarts", "1"] } else { &[] };
        // The first step is skipped and does not count; each goes on where the other would.
        train(&place, run, "nan:0:4", 1, 4, &[&["--resume"], launcher].concat());
        train(&place, run, "", 1, 7, &[&["--resume"], launcher].concat());
        train(&place, run, "", 1, 9, &["--resume"]);
    }
    same(&place, ["alone", "launched"]);
    let of = |step| checkpoint(&place, "alone", step).state()["compression"].clone();
    assert_eq!((of(4)["residuals"].clone(), of(7)["residuals"].clone()), (true.into(), true.into()));
    assert!(of(9).is_null(), "everything was sent by then");
    // The control: without what was left out it is another run.
    train(&place, "forgetful", "", 2, 3, &[]);
    train(&place, "forgetful", "nan:0:4,forget-owner", 1, 4, &["--resume"]);
    train(&place, "forgetful", "", 1, 9, &["--resume"]);
    assert_ne!(place.summary("forgetful")["parameter_hash"], place.summary("alone")["parameter_hash"]);
}

#[test]
fn auto_chooses_anew_for_other_ranks() {
    let place = Place::with(&format!("{WIDE}\n[compression]\ncodec = \"auto\"\n"));
    train(&place, "a", "link:20000", 2, 9, &[]);
    assert_eq!(checkpoint(&place, "a", 9).state()["compression"]["chosen"]["codec"], "int4");
    train(&place, "a", "link:1e15,step:100", 4, 18, &["--resume"]);
    assert_eq!(checkpoint(&place, "a", 18).state()["compression"]["chosen"]["codec"], "fp32");
}

#[test]
fn folded_residuals_are_stored_once_as_the_fold_of_the_exact_ones_and_a_resume_goes_on_from_them() {
    let place = Place::with(WIDE);
    let keep = ["--set", "checkpoint.residuals=folded"];
    for (run, more) in [("exact", &[][..]), ("folded", &keep)] {
        train(&place, run, "", 3, 3, more);
        // A second one, on the way.
        train(&place, run, "", 3, 5, &[&["--resume"], more].concat());
    }
    train(&place, "whole", "", 3, 5, &keep);
    same(&place, ["exact", "whole"]);
    let [exact, kept] = ["exact", "whole"].map(|run| checkpoint(&place, run, 5));
    let bits = |values: Vec<f32>| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut elements = 0;
    for parameter in lossy(&exact) {
        let name = &parameter.name;
        let sum = bits(read(&kept, &format!("{name}.folded"), &parameter));
        assert!(sum.iter().any(|bits| *bits != 0), "{name}");
        assert!(sum == bits(folded(&exact, &parameter, 0..3)), "{name}");
        assert!(sum != bits(folded(&exact, &parameter, 0..2)), "the control: {name} without one rank");
        assert!(["sender.0000", "owner"].iter().all(|side| !kept.has(&format!("{name}.{side}"))), "{name}");
        elements += parameter.elements() as u64;
    }
    let bytes = |checkpoint: &Checkpoint| checkpoint.manifest().files.values().map(|file| file.bytes).sum::<u64>();
    // One sum in place of three senders and the owners; headers have fewer names too.
    let saved = bytes(&exact) - bytes(&kept);
    assert!((12 * elements..12 * elements + (16 << 10)).contains(&saved), "{saved} of 12 x {elements}");

    // The same ranks begin with the sum, and say so; a step that is skipped shows it.
    let said = train(&place, "whole", "nan:0:6", 3, 6, &["--resume"]);
    assert!(said.contains("from here on the bits are other ones"), "{said}");
    let begun = checkpoint(&place, "whole", 6);
    for parameter in lossy(&begun) {
        let name = &parameter.name;
        let sum = bits(read(&kept, &format!("{name}.folded"), &parameter));
        assert!(bits(read(&begun, &format!("{name}.owner"), &parameter)) == sum, "{name}");
        assert!(read(&begun, &format!("{name}.sender.0001"), &parameter).iter().all(|x| *x == 0.0), "{name}");
    }
    // So do others.
    train(&place, "folded", "nan:0:6", 1, 6, &["--resume"]);
    let begun = checkpoint(&place, "folded", 6);
    let before = checkpoint(&place, "folded", 5);
    for parameter in lossy(&begun) {
        let [owed, sum] = [(&begun, "owner"), (&before, "folded")]
            .map(|(checkpoint, kind)| bits(read(checkpoint, &format!("{}.{kind}", parameter.name), &parameter)));
        assert!(owed == sum, "{}", parameter.name);
    }
    // A resume is bitwise from the exact ones and not from the sum.
    let [whole, exact, folded] = ["whole", "exact", "folded"].map(|run| place.curve(run)[4][1].clone());
    assert_eq!(exact, whole);
    assert_ne!(folded, whole);
    // They go on.
    train(&place, "folded", "", 3, 9, &[&["--resume"], &keep[..]].concat());
}
