//! One run on one rank, then two, four, three, and one again: its ledger stays exact over every change, with the
//! roundings of the folds entered, and its losses stay near those of the run that nobody interrupts.

use checkpoint::reader::Checkpoint;
use compression::Codec;
use compression::ledger::lost;
use parallel::data::Parameter;
use trainer::model::Config;

use super::{Tensor, bits, enter, recorded};
use crate::ranks::WIDE;
use crate::support::Place;

/// A part of the run between two stops: its ranks, their micro-batches, and its last step. The micro-batches of all
/// ranks are four in every step.
struct Leg {
    ranks: usize,
    micro_batches: &'static str,
    stop: u64,
}

const fn leg(ranks: usize, micro_batches: &'static str, stop: u64) -> Leg {
    Leg { ranks, micro_batches, stop }
}

const CHAIN: [Leg; 6] = [
    leg(1, "train.micro_batches=4", 3),
    leg(2, "train.micro_batches=2", 7),
    leg(4, "train.micro_batches=1", 11),
    leg(3, "parallel.micro_batches=[2,1,1]", 15),
    leg(1, "train.micro_batches=4", 16),
    leg(1, "train.micro_batches=4", 20),
];

/// Steps that are skipped: the first one on four ranks, and the one that ends the leg on one rank. What was left out
/// before has to wait for the next.
const SKIPPED: [u64; 2] = [8, 16];

fn train(place: &Place, legs: &[Leg], faults: &str) {
    std::fs::create_dir(place.path("record")).expect("writable");
    let skips: Vec<String> = SKIPPED.iter().map(|step| format!("nan:0:{step}")).collect();
    let faults = format!("{},record:{},{faults}", skips.join(","), place.path("record").display());
    for (index, Leg { ranks, micro_batches, stop }) in legs.iter().enumerate() {
        let (data, stop) = (format!("parallel.data={ranks}"), format!("train.stop_at_step={stop}"));
        let set = ["--set", &data, "--set", micro_batches, "--set", &stop, "--set", "eval.every=0"];
        let resume = (index > 0).then_some("--resume");
        place.train_with(&faults, "a", &[&set[..], resume.as_slice()].concat()).ok();
    }
}

impl Tensor {
    /// Other ranks go on: what was left out is added up, and owners have it.
    fn fold(&mut self, ranks: usize) {
        let senders = std::mem::replace(&mut self.senders, vec![vec![0.0; self.owners.len()]; ranks]);
        for sender in senders {
            for (owner, left) in self.owners.iter_mut().zip(sender) {
                enter(&mut self.balance, lost(*owner, left));
                *owner += left;
            }
        }
    }

    /// Whether a checkpoint remembers the same.
    fn is_in(&self, parameter: &Parameter, checkpoint: &Checkpoint) -> bool {
        let senders = if self.senders.len() > 1 { &self.senders[..] } else { &[] };
        let sender = |(rank, values)| (format!("{}.sender.{rank:04}", parameter.name), values);
        let owner = (format!("{}.owner", parameter.name), &self.owners);
        senders.iter().enumerate().map(sender).chain([owner]).all(|(name, ours)| {
            let mut stored = vec![0.0; ours.len()];
            match checkpoint.has(&name) {
                true => checkpoint.tensor(&name, &parameter.shape, &mut stored).expect("whole"),
                // A rank alone that never owed anything has no place for it.
                false => assert!(senders.is_empty() && ours.iter().all(|x| *x == 0.0), "{name}"),
            }
            bits(&stored) == bits(ours)
        })
    }
}

/// For every tensor whether it travels in a lossy codec, and whether its ledger balances and the run did what it says.
fn ledger(legs: &[Leg], faults: &str) -> (Place, Vec<(String, bool, bool)>) {
    let place = Place::with(WIDE);
    train(&place, legs, faults);
    let checkpoint = |stop: u64| {
        Checkpoint::open(&place.path(&format!("runs/a/checkpoints/step-{stop:08}"))).expect("a checkpoint of the leg")
    };
    let last = checkpoint(legs[legs.len() - 1].stop);
    let model: Config = serde_json::from_value(last.state()["model"].clone()).expect("a model's shape");
    let parameters = model.parameters();
    let mut tensors: Vec<Tensor> =
        parameters.iter().map(|p| Tensor::new(p, Codec::Int8, true, legs[0].ranks)).collect();
    let mut agrees = vec![true; tensors.len()];
    let mut step = 0;
    for &Leg { ranks, stop, .. } in legs {
        tensors.iter_mut().filter(|tensor| tensor.senders.len() != ranks).for_each(|tensor| tensor.fold(ranks));
        while step < stop {
            step += 1;
            let records: Vec<_> =
                (0..ranks).map(|rank| recorded(&place.path("record"), rank, step, &parameters)).collect();
            assert!(records.iter().all(|record| record.is_none() == SKIPPED.contains(&step)), "step {step}");
            let Some(records) = records.into_iter().collect::<Option<Vec<_>>>() else { continue };
            for (index, tensor) in tensors.iter_mut().enumerate() {
                let gradients: Vec<Vec<f32>> = records.iter().map(|record| record[index][0].clone()).collect();
                let sum = tensor.step(step, &gradients);
                agrees[index] &= records.iter().all(|record| bits(&record[index][1]) == bits(&sum));
            }
        }
        for ((tensor, parameter), agrees) in tensors.iter().zip(&parameters).zip(&mut agrees) {
            *agrees &= !tensor.codecs[1].is_lossy() || tensor.is_in(parameter, &checkpoint(stop));
        }
    }
    tensors.iter_mut().for_each(Tensor::enter_what_is_left);
    let line = |((tensor, parameter), agrees): ((&Tensor, &Parameter), &bool)| {
        (parameter.name.clone(), tensor.codecs[1].is_lossy(), *agrees && tensor.balance.is_zero())
    };
    let found = tensors.iter().zip(&parameters).zip(&agrees).map(line).collect();
    (place, found)
}

#[test]
fn on_one_two_four_three_and_one_rank_again_nothing_is_lost_and_the_losses_stay_near() {
    let (place, found) = ledger(&CHAIN, "");
    assert!(found.iter().all(|(_, _, balances)| *balances), "{found:?}");
    assert_eq!(found.iter().filter(|(_, lossy, _)| *lossy).count(), 6, "both kinds: {found:?}");
    let recuts: Vec<_> = place.events("a").into_iter().filter(|event| event["event"] == "recut").collect();
    let of = |key: &str| recuts.iter().map(|event| event[key]["data"].as_u64().expect("ranks")).collect::<Vec<_>>();
    assert_eq!((of("before"), of("after")), (vec![1, 2, 4, 3], vec![2, 4, 3, 1]));
    let residuals: Vec<_> = recuts.iter().map(|event| event["residuals"].as_str().expect("a word")).collect();
    assert_eq!(residuals, ["none", "folded", "folded", "folded"]);

    // The same data in the same order, on one rank, where nothing is compressed; with the same steps skipped.
    let faults = SKIPPED.map(|step| format!("nan:0:{step}")).join(",");
    let one = ["--set", "parallel.data=1", "--set", "train.micro_batches=4", "--set", "eval.every=0"];
    place.train_with(&faults, "whole", &one).ok();
    let (whole, chain) = (place.curve("whole"), place.curve("a"));
    assert_eq!((whole.len(), chain.len()), (20, 20));
    let mut furthest = 0.0f64;
    for ([step, a, ..], [same, b, ..]) in whole.iter().zip(&chain) {
        assert_eq!((step, a == "null"), (same, b == "null"));
        let [Ok(a), Ok(b)] = [a, b].map(|loss| loss.parse::<f64>()) else { continue };
        furthest = furthest.max((b / a - 1.0).abs());
    }
    println!("the losses are at most {furthest:.2e} apart");
    assert!(furthest > 0.0 && furthest < TOLERANCE, "{furthest}");
}

/// How far apart the losses of a step may be, relatively: int8 rounds, and training multiplies what it rounds.
const TOLERANCE: f64 = 5e-3;

#[test]
fn the_ledger_notices_what_a_resume_forgets_and_what_it_counts_twice() {
    for legs in [
        [leg(2, "train.micro_batches=2", 3), leg(3, "parallel.micro_batches=[2,1,1]", 5)],
        [leg(2, "train.micro_batches=2", 3), leg(1, "train.micro_batches=4", 5)],
    ] {
        for fault in ["forget-owner", "fold-twice"] {
            let (_, found) = ledger(&legs, fault);
            assert!(found.iter().all(|(_, lossy, balances)| lossy != balances), "{fault}: {found:?}");
        }
    }
}
