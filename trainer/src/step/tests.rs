//! What a step promises: accumulation, skipping, and that it learns at all.

use super::*;
use crate::model::init;
use crate::recipe;

const TEXT: &str = "
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[tokenizer]
vocab_size = 257
[data]
source = 'text'
train = ['x']
[train]
steps = 50
seq_len = 8
micro_batch_size = 2
skip_max = 3
[schedule]
learning_rate = 1e-2
";

pub(super) fn recipe() -> Recipe {
    recipe::read("test", TEXT, &[]).expect("a good recipe").1
}

fn setup(tied: bool) -> (Stepper, State) {
    let mut keys = recipe().model;
    keys.tie_word_embeddings = Some(tied);
    let config = Config::from_keys(&keys, 31, 8, None).expect("complete");
    let stepper = Stepper::new(&config, &Device::flex(), 1 << 12).expect("small");
    let state = State::initial(&config, 5);
    (stepper, state)
}

pub(super) fn batch(rows: usize, seed: usize) -> Batch {
    let ids = |shift: usize| (0..rows * 8).map(|i| ((i + shift) * (7 + seed) % 31) as i32).collect();
    Batch { inputs: ids(0), targets: ids(1), rows }
}

fn parts(batch: &Batch, rows: usize) -> Vec<Batch> {
    let cut = |ids: &[i32]| ids.chunks(rows * 8).map(<[i32]>::to_vec).collect::<Vec<_>>();
    let pairs = cut(&batch.inputs).into_iter().zip(cut(&batch.targets));
    pairs.map(|(inputs, targets)| Batch { inputs, targets, rows }).collect()
}

fn difference(a: &State, b: &State) -> f32 {
    let pairs = a.m.iter().flatten().zip(b.m.iter().flatten());
    let largest = a.m.iter().flatten().fold(0.0f32, |max, x| max.max(x.abs()));
    pairs.fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

#[test]
fn k_micro_batches_equal_one_batch_of_k() {
    for tied in [true, false] {
        let (stepper, start) = setup(tied);
        let whole = batch(8, 0);
        let run = |batches: &[Batch]| {
            let mut state = start.clone();
            let report = stepper.step(&mut state, &recipe(), batches, Word::default(), untouched).expect("finite");
            (report.loss, state)
        };
        let (loss, state) = run(std::slice::from_ref(&whole));
        for rows in [1, 2, 4] {
            let (other_loss, other) = run(&parts(&whole, rows));
            assert!((loss - other_loss).abs() < 1e-6 * loss.abs(), "{loss} {other_loss}");
            assert!(difference(&state, &other) < 1e-6, "{rows} rows: {}", difference(&state, &other));
        }
        // Unequal parts too; and the control: a mean of their means is not the mean over all.
        let join = |parts: &[Batch]| Batch {
            inputs: parts.iter().flat_map(|part| part.inputs.clone()).collect(),
            targets: parts.iter().flat_map(|part| part.targets.clone()).collect(),
            rows: 2 * parts.len(),
        };
        let pairs = parts(&whole, 2);
        let uneven = [join(&pairs[..1]), join(&pairs[1..])];
        assert!(difference(&state, &run(&uneven).1) < 1e-6);
        let mut wrong = start.clone();
        let mean_of_means = |index: usize, loss: Tensor<1>| loss.mul_scalar(if index == 0 { 2.0 } else { 2.0 / 3.0 });
        stepper.step(&mut wrong, &recipe(), &uneven, Word::default(), mean_of_means).expect("finite");
        assert!(difference(&state, &wrong) > 1e-3);
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_but_the_step_number() {
    let (stepper, start) = setup(true);
    let mut state = start.clone();
    let poison = |index: usize, loss: Tensor<1>| if index == 1 { loss.mul_scalar(f32::NAN) } else { loss };
    let batches = parts(&batch(4, 0), 2);
    let report = stepper.step(&mut state, &recipe(), &batches, Word::default(), poison).expect("one skip is no error");
    assert!(report.skipped);
    assert_eq!(state, State { step: 1, skips: 1, ..start.clone() });

    // The step after it equals the same step of a run that never saw the batch.
    stepper.step(&mut state, &recipe(), &batches, Word::default(), untouched).expect("finite");
    let mut other = State { step: 1, ..start.clone() };
    stepper.step(&mut other, &recipe(), &batches, Word::default(), untouched).expect("finite");
    assert_eq!(state, other);
    assert_ne!(state.weights, start.weights, "a step without the fault does change them");
}

#[test]
fn skips_in_a_row_are_counted_until_a_step_is_good_again() {
    let (stepper, mut state) = setup(true);
    let batches = [batch(2, 0)];
    let poison = |_: usize, loss: Tensor<1>| loss.mul_scalar(f32::INFINITY);
    stepper.step(&mut state, &recipe(), &batches, Word::default(), untouched).expect("finite");
    for skips in 1..4 {
        stepper.step(&mut state, &recipe(), &batches, Word::default(), poison).expect("a skip is no error");
        assert_eq!((state.skips, state.good_step, state.updates), (skips, 1, 1));
    }
    stepper.step(&mut state, &recipe(), &batches, Word::default(), untouched).expect("finite");
    assert_eq!((state.skips, state.good_step, state.updates), (0, 5, 2));
}

#[test]
fn clipping_bounds_the_norm_that_the_optimiser_sees() {
    assert_eq!(clip_factor(4.0, Some(1.0)), 0.25);
    assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
    assert_eq!(clip_factor(4.0, None), 1.0);
}

#[test]
fn the_loss_falls() {
    let (stepper, mut state) = setup(true);
    let mut losses = Vec::new();
    for _ in 0..50 {
        losses.push(
            stepper.step(&mut state, &recipe(), &[batch(4, 0)], Word::default(), untouched).expect("finite").loss,
        );
    }
    assert!(losses[49] < 0.3 * losses[0], "{losses:?}");
}

#[test]
fn the_initial_state_follows_seed_and_name() {
    let (_, state) = setup(true);
    assert_eq!(state.weights[1], vec![1.0; 16], "norms start at one");
    let mut expected = vec![0.0; 31 * 16];
    init::normal(5, "model.embed_tokens.weight", 0.02, &mut expected);
    assert_eq!(state.weights[0], expected);
}
