//! A sharded optimiser computes what every rank with all of it would, from a part of its memory.

use compression::Codec;
use parallel::data::engine::Inbox;
use parallel::data::exchange::{Exchange, Group};
use parallel::transport::channel::network;

use super::tests::{batch, recipe};
use super::*;
use crate::state::sharding::Sharding;

const STEPS: usize = 5;

/// What several ranks do.
#[derive(Clone, Copy)]
struct Setting {
    ranks: usize,
    members: usize,
    /// What gradients travel in, and with a sharded optimiser parameters.
    codecs: (Codec, Option<Codec>),
    /// Whether each step is settled before the next.
    settles: bool,
    /// The step that is not finite.
    poisoned: Option<usize>,
    /// What the last rank's loss is multiplied with, as by a backend that rounds differently.
    scale: f64,
}

const PLAIN: Setting =
    Setting { ranks: 2, members: 1, codecs: (Codec::Fp32, None), settles: true, poisoned: None, scale: 1.0 };

/// A model with a tensor that is large enough to be compressed, and others that are not.
fn config() -> Config {
    let mut keys = recipe().model;
    (keys.hidden_size, keys.num_hidden_layers) = (Some(256), Some(1));
    Config::from_keys(&keys, 300, 8, None).expect("complete")
}

/// The losses and the last state of each rank.
fn run(setting: Setting) -> Vec<(Vec<f64>, State)> {
    let Setting { ranks, members, codecs: (codec, parameters), settles, poisoned, scale } = setting;
    let config = config();
    // All of them exist before the first sends something.
    let steppers = network(ranks).into_iter().enumerate().map(|(rank, end)| {
        let plan = Arc::new(Plan::new(config.parameters(), 1 << 16).expect("small"));
        let inbox = Inbox::default();
        end.open(inbox.sink());
        let group = Group { rank, ranks, members, window: 3, epoch: 1, chunk_blocks: 64 };
        let mut exchange = Exchange::new(plan, group, codec);
        let mut sharding = Sharding::NONE;
        if let Some(codec) = parameters {
            exchange = exchange.sending_parameters(codec);
            sharding = Sharding::of(rank, ranks, codec);
        }
        let engine = Engine::start(exchange, Arc::new(end), inbox, Arc::default()).expect("a thread");
        let state = State::initial(&config, 5).sharded(&config.parameters(), sharding);
        (rank, Stepper::across(&config, &Device::flex(), engine, None), state)
    });
    let steppers: Vec<_> = steppers.collect();
    std::thread::scope(|scope| {
        let rank = |(rank, stepper, mut state): (usize, Stepper, State)| {
            let mut losses = Vec::new();
            for step in 0..STEPS {
                let batches = [batch(2, ranks * step + rank)];
                let spoil = |_, loss: Tensor<1>| match (poisoned == Some(step), rank + 1 == ranks) {
                    (true, _) => loss.mul_scalar(f32::NAN),
                    (false, true) => loss.mul_scalar(scale),
                    (false, false) => loss,
                };
                let report = match settles {
                    true => stepper.step(&mut state, &recipe(), &batches, Word::default(), spoil),
                    false => stepper.step_ahead(&mut state, &recipe(), &batches, Word::default(), spoil),
                };
                let report = report.expect("all are there");
                assert_eq!(report.skipped, poisoned == Some(step));
                losses.push(report.loss);
            }
            stepper.settle(&mut state).expect("all are there");
            (losses, state)
        };
        let threads: Vec<_> = steppers.into_iter().map(|each| scope.spawn(move || rank(each))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

#[test]
fn with_fp32_a_sharded_optimiser_is_the_whole_one_to_the_last_bit_and_each_rank_keeps_its_part() {
    for (ranks, members) in [(2, 1), (3, 1), (4, 2), (2, 2)] {
        for poisoned in [None, Some(1), Some(STEPS - 1)] {
            let plain = Setting { ranks, members, poisoned, ..PLAIN };
            let expected = &run(plain)[0];
            for settles in [true, false] {
                let sharded = Setting { codecs: (Codec::Fp32, Some(Codec::Fp32)), settles, ..plain };
                let mut owned = 0;
                for (losses, state) in run(sharded) {
                    assert_eq!(bits(&losses), bits(&expected.0));
                    assert_eq!(state.weights, expected.1.weights);
                    assert_eq!((state.step, state.updates), (expected.1.step, expected.1.updates));
                    let mut elements = 0;
                    for (index, weights) in state.weights.iter().enumerate() {
                        let own = state.sharding.owned(weights.len());
                        assert_eq!(state.m[index], expected.1.m[index][own.clone()]);
                        assert_eq!(state.v[index], expected.1.v[index][own.clone()]);
                        assert_eq!(state.master(index), &weights[own.clone()]);
                        elements += own.len();
                    }
                    // 8 bytes for what a rank owns, where it was 8 for everything.
                    assert_eq!(state.optimizer_bytes(), 8 * elements);
                    owned += elements;
                }
                let all: usize = expected.1.weights.iter().map(Vec::len).sum();
                assert_eq!((owned, expected.1.optimizer_bytes()), (all, 8 * all));
            }
        }
    }
}

/// The largest difference of two curves, as a part of the loss.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max)
}

#[test]
fn with_int8_parameters_all_have_the_same_replicas_and_owners_keep_what_was_left_out() {
    let plain = run(PLAIN);
    for codec in [Codec::Fp32, Codec::Int8] {
        for members in [1, 2] {
            let setting = Setting { ranks: 2 * members, members, codecs: (codec, Some(Codec::Int8)), ..PLAIN };
            let ranks = run(setting);
            let late = run(Setting { settles: false, ..setting });
            let mut differs = false;
            for ((losses, state), (late_losses, late)) in ranks.iter().zip(&late) {
                assert_eq!((bits(losses), state), (bits(late_losses), late), "when sums come changes nothing");
                assert_eq!(state.weights, ranks[0].1.weights, "replicas");
                let mut bytes = 0;
                for (index, parameter) in config().parameters().iter().enumerate() {
                    let own = state.sharding.owned(parameter.elements());
                    let replica = &state.weights[index][own.clone()];
                    bytes += own.len() * if state.sharding.has_master(parameter) { 12 } else { 8 };
                    // A step moves a weight by the learning rate or a little more, and int8 leaves out a 254th of that.
                    let left = state.master(index).iter().zip(replica).map(|(m, r)| (m - r).abs());
                    let left = left.fold(0.0, f32::max);
                    assert!(left <= 2e-2 / 254.0, "{}: {left}", parameter.name);
                    differs |= left > 0.0;
                }
                assert_eq!(state.optimizer_bytes(), bytes);
            }
            assert!(differs, "the control: something is left out");
            if members == 1 {
                // Measured: 0.0015 with both in int8.
                let apart = apart(&ranks[0].0, &plain[0].0);
                assert!(apart > 0.0 && apart < 3e-3, "{codec}: {apart}");
            }
        }
    }
}

#[test]
fn ranks_that_round_differently_have_the_same_replicas() {
    for parameters in [Codec::Fp32, Codec::Int8] {
        let setting = Setting { codecs: (Codec::Int8, Some(parameters)), ..PLAIN };
        let (same, other) = (run(setting), run(Setting { scale: 1.0 + 1e-6, ..setting }));
        assert!(other[0].1.weights == other[1].1.weights);
        assert!(same[0].1.weights != other[0].1.weights, "the control: it rounds differently");
    }
}
