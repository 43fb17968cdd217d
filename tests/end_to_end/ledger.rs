//! Nothing is lost: over a whole run, what was applied and what is still remembered are together the sum of all
//! gradients, exactly, tensor by tensor (DESIGN.md section 3, invariant 2).
//!
//! - `chain`: over a run whose number of ranks changes.

mod chain;

use std::path::Path;

use checkpoint::reader::Checkpoint;
use compression::ledger::{Exact, lost, lost_in_encoding};
use compression::{Codec, Payload};
use parallel::data::Parameter;
use parallel::data::rules::codec_of;
use parallel::data::shard::shard;
use trainer::model::Config;

use crate::ranks::WIDE;
use crate::support::Place;

const RANKS: usize = 2;
const STEPS: u64 = 20;
const SKIPPED: u64 = 6;

/// The steps that a sparse codec leaves to `int8`: the warm-up of the schedule, for the recipe does not say.
const WARMUP: u64 = 5;

/// A run with one skipped step and one resume, in which every rank writes down its gradients and the sums.
fn train(place: &Place, faults: &str, codec: Codec) -> Checkpoint {
    std::fs::create_dir(place.path("record")).expect("writable");
    let faults = format!("nan:1:{SKIPPED},record:{},{faults}", place.path("record").display());
    let codec = format!("compression.codec={codec}");
    place.train_with(&faults, "a", &["--set", &codec, "--set", "train.stop_at_step=11"]).ok();
    place.train_with(&faults, "a", &["--set", &codec, "--resume"]).ok();
    Checkpoint::open(&place.path("runs/a/checkpoints/step-00000020")).expect("the last checkpoint")
}

/// One tensor's way through the run, taken once more: the codec's work on the gradients that were recorded.
struct Tensor {
    /// While the run warms up, and after it.
    codecs: [Codec; 2],
    feedback: bool,
    /// What each rank left out as a sender, over the whole tensor; and as an owner, shard after shard.
    senders: Vec<Vec<f32>>,
    owners: Vec<f32>,
    /// Everything applied and remembered, less all gradients and what additions rounded.
    balance: Exact,
}

impl Tensor {
    fn new(parameter: &Parameter, codec: Codec, feedback: bool, ranks: usize) -> Self {
        let zeros = vec![0.0; parameter.shape.iter().product()];
        let codecs = [Codec::Int8, codec].map(|codec| codec_of(parameter, codec));
        Self { codecs, feedback, senders: vec![zeros.clone(); ranks], owners: zeros, balance: Exact::default() }
    }

    /// Enters one step and returns the sum that all ranks must have.
    fn step(&mut self, step: u64, gradients: &[Vec<f32>]) -> Vec<f32> {
        let codec = self.codecs[usize::from(step > WARMUP)];
        let mut applied = vec![0.0; self.owners.len()];
        let ranks = gradients.len();
        assert_eq!(ranks, self.senders.len());
        for owner in 0..ranks {
            let owned = shard(self.owners.len(), owner, ranks);
            let mut sum = vec![0.0f32; owned.len()];
            for (rank, gradient) in gradients.iter().enumerate() {
                let gradient = &gradient[owned.clone()];
                gradient.iter().for_each(|g| enter(&mut self.balance, -g));
                // An owner takes its own part as it is.
                let part = match rank == owner {
                    true => gradient.to_vec(),
                    false => through(
                        codec,
                        self.feedback,
                        gradient,
                        &mut self.senders[rank][owned.clone()],
                        &mut self.balance,
                    ),
                };
                for (sum, part) in sum.iter_mut().zip(&part) {
                    enter(&mut self.balance, lost(*sum, *part));
                    *sum += part;
                }
            }
            // One rank alone has nobody to send a sum to, and applies what it owes as it is.
            let second = if ranks > 1 { codec.second_stage() } else { Codec::Fp32 };
            let left = &mut self.owners[owned.clone()];
            applied[owned].copy_from_slice(&through(second, self.feedback, &sum, left, &mut self.balance));
        }
        applied.iter().for_each(|x| enter(&mut self.balance, *x));
        applied
    }

    /// Looks that the checkpoint remembers the same, and enters it.
    fn end(&mut self, parameter: &Parameter, checkpoint: &Checkpoint) {
        if self.codecs[1].is_lossy() {
            let mut stored = vec![0.0; self.owners.len()];
            let names = ["sender.0000", "sender.0001", "owner"].map(|kind| format!("{}.{kind}", parameter.name));
            for (name, ours) in names.iter().zip(self.senders.iter().chain([&self.owners])) {
                checkpoint.tensor(name, &parameter.shape, &mut stored).expect("whole");
                assert!(bits(&stored) == bits(ours), "{name}");
                assert_eq!(ours.iter().any(|x| *x != 0.0), self.feedback, "{name}");
            }
        }
        self.enter_what_is_left();
    }

    /// Closes the ledger.
    fn enter_what_is_left(&mut self) {
        let left = self.senders.iter().chain([&self.owners]).flatten();
        left.for_each(|x| enter(&mut self.balance, *x));
    }
}

/// What a decoder makes of `values` and what was left out before; `left` becomes what is left out now.
fn through(codec: Codec, feedback: bool, values: &[f32], left: &mut [f32], balance: &mut Exact) -> Vec<f32> {
    let (mut payload, mut next) = (vec![0; codec.payload_bytes(left.len())], values.to_vec());
    let _ = codec.encode(&mut next, left, &mut payload);
    let mut decoded = vec![0.0; left.len()];
    Payload::new(codec, left.len(), payload).expect("our own").decode(&mut decoded);
    for ((value, left), sent) in values.iter().zip(&*left).zip(&decoded) {
        lost_in_encoding(codec, *value, *left, *sent).into_iter().for_each(|lost| enter(balance, lost));
    }
    if feedback {
        left.copy_from_slice(&next);
    }
    decoded
}

fn enter(balance: &mut Exact, x: f32) {
    if x != 0.0 {
        balance.add(x);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The gradients and the sums of one rank in one step, by parameter; `None` where the step was skipped.
fn recorded(folder: &Path, rank: usize, step: u64, parameters: &[Parameter]) -> Option<Vec<[Vec<f32>; 2]>> {
    let skipped = folder.join(format!("rank-{rank}-step-{step}-skipped.bin")).exists();
    if skipped {
        return None;
    }
    let bytes = std::fs::read(folder.join(format!("rank-{rank}-step-{step}.bin"))).expect("a record");
    let (words, rest) = bytes.as_chunks();
    let mut values = words.iter().map(|word| f32::from_le_bytes(*word));
    let mut take = |n: usize| values.by_ref().take(n).collect::<Vec<f32>>();
    let read = |parameter: &Parameter| [(); 2].map(|()| take(parameter.shape.iter().product()));
    let tensors = parameters.iter().map(read).collect();
    assert!(values.next().is_none() && rest.is_empty());
    Some(tensors)
}

/// For every tensor its name, whether it travels in a lossy codec, and whether its ledger balances.
fn ledger(faults: &str, codec: Codec, feedback: bool) -> Vec<(String, bool, bool)> {
    let place = Place::with(WIDE);
    let checkpoint = train(&place, faults, codec);
    let model: Config = serde_json::from_value(checkpoint.state()["model"].clone()).expect("a model's shape");
    let parameters = model.parameters();
    let new = |parameter: &Parameter| Tensor::new(parameter, codec, feedback, RANKS);
    let mut tensors: Vec<Tensor> = parameters.iter().map(new).collect();
    for step in 1..=STEPS {
        let ranks = [0, 1].map(|rank| recorded(&place.path("record"), rank, step, &parameters));
        assert!(ranks.iter().all(|rank| rank.is_none() == (step == SKIPPED)), "step {step}");
        let [Some(zero), Some(one)] = ranks else { continue };
        for (((tensor, parameter), [a, sum_a]), [b, sum_b]) in tensors.iter_mut().zip(&parameters).zip(zero).zip(one) {
            assert!(bits(&a) != bits(&b), "{}: ranks have other batches", parameter.name);
            let sum = tensor.step(step, &[a, b]);
            assert!(bits(&sum) == bits(&sum_a) && bits(&sum) == bits(&sum_b), "step {step}, {}", parameter.name);
        }
    }
    let end = |(tensor, parameter): (&mut Tensor, &Parameter)| {
        tensor.end(parameter, &checkpoint);
        (parameter.name.clone(), tensor.codecs[1].is_lossy(), tensor.balance.is_zero())
    };
    tensors.iter_mut().zip(&parameters).map(end).collect()
}

#[test]
fn all_gradients_of_a_run_with_a_skip_and_a_resume_are_applied_or_remembered() {
    for codec in [Codec::Int8, Codec::Sparse24Int8] {
        let found = ledger("", codec, true);
        assert!(found.iter().all(|(_, _, balances)| *balances), "{codec}: {found:?}");
        let lossy = found.iter().filter(|(_, lossy, _)| *lossy).count();
        assert_eq!((found.len(), lossy), (11, 6), "both kinds: {found:?}");
    }
}

#[test]
fn without_feedback_the_ledger_of_every_lossy_tensor_does_not_balance() {
    let found = ledger("no-feedback", Codec::Int8, false);
    assert!(found.iter().all(|(_, lossy, balances)| lossy != balances), "{found:?}");
}
