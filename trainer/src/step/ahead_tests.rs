//! Steps whose sums travel during the next forward pass are the steps that wait for them.

use compression::Codec;
use parallel::data::engine::{Aborter, Inbox};
use parallel::data::exchange::{Exchange, Group};
use parallel::transport::channel::{ChannelTransport, network};

use super::tests::{batch, recipe};
use super::*;

const STEPS: usize = 5;

/// Whether a rank waits for the sums of each step before the next one.
#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Always,
    Never,
    /// After every third step, as a run does that saves checkpoints.
    Sometimes,
}

fn stepper(rank: usize, end: ChannelTransport, codec: Codec) -> (Stepper, State, Aborter) {
    let config = Config::from_keys(&recipe().model, 31, 8, None).expect("complete");
    let plan = Arc::new(Plan::new(config.parameters(), 1 << 10).expect("small"));
    let inbox = Inbox::default();
    end.open(inbox.sink());
    let aborter = inbox.aborter();
    let group = Group { rank, ranks: 2, members: 1, window: 3, epoch: 1, chunk_blocks: 1 };
    let engine = Engine::start(Exchange::new(plan, group, codec), Arc::new(end), inbox, Arc::default());
    let stepper = Stepper::across(&config, &Device::flex(), engine.expect("a thread"), None);
    (stepper, State::initial(&config, 5), aborter)
}

/// The losses and the last state of each rank, of steps with two micro-batches, of which `poisoned` is not finite.
fn run(waits: [Wait; 2], codec: Codec, poisoned: Option<usize>) -> Vec<(Vec<f64>, State)> {
    // All of them exist before the first sends something.
    let ends = network(2).into_iter().enumerate();
    let ranks: Vec<_> = ends.map(|(rank, end)| (rank, stepper(rank, end, codec))).zip(waits).collect();
    std::thread::scope(|scope| {
        let rank = |((rank, (stepper, mut state, _)), wait): ((usize, (Stepper, State, Aborter)), Wait)| {
            let mut losses = Vec::new();
            for step in 0..STEPS {
                let batches = [2 * rank, 2 * rank + 1].map(|seed| batch(2, 4 * step + seed));
                let spoil = |_, loss: Tensor<1>| if poisoned == Some(step) { loss.mul_scalar(f32::NAN) } else { loss };
                let waits = wait == Wait::Always || wait == Wait::Sometimes && step % 3 == 2;
                let report = match waits {
                    true => stepper.step(&mut state, &recipe(), &batches, Word::default(), spoil),
                    false => stepper.step_ahead(&mut state, &recipe(), &batches, Word::default(), spoil),
                };
                losses.push(report.expect("both are there").loss);
                assert_eq!(stepper.is_settled(), waits);
            }
            let behind = state.clone();
            stepper.settle(&mut state).expect("both are there");
            assert!(stepper.is_settled());
            // The control: without having waited, the parameters are of the step before.
            assert_eq!(behind == state, wait == Wait::Always || poisoned == Some(STEPS - 1));
            (losses, state)
        };
        let threads: Vec<_> = ranks.into_iter().map(|each| scope.spawn(move || rank(each))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

#[test]
fn whoever_waits_for_the_sums_or_goes_on_without_them_comes_to_the_same_state() {
    use Wait::{Always, Never, Sometimes};
    let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
    for codec in [Codec::Fp32, Codec::Int8, Codec::Sparse24Int4] {
        for poisoned in [None, Some(1), Some(STEPS - 1)] {
            let expected = run([Always, Always], codec, poisoned);
            assert_eq!(expected[0].1, expected[1].1, "replicas");
            for waits in [[Never, Never], [Always, Never], [Sometimes, Never]] {
                for (found, expected) in run(waits, codec, poisoned).iter().zip(&expected) {
                    assert_eq!(bits(&found.0), bits(&expected.0), "{codec}");
                    assert_eq!(found.1, expected.1, "{codec}");
                }
            }
        }
    }
}

#[test]
fn a_rank_that_is_lost_while_its_sums_are_due_ends_the_next_step_and_leaves_a_whole_state() {
    let mut ends = network(2).into_iter();
    let (first, second) = (ends.next().expect("two"), ends.next().expect("two"));
    let (stepper_0, mut state, aborter) = stepper(0, first, Codec::Int8);
    let (stepper_1, mut other_state, _) = stepper(1, second, Codec::Int8);
    let shapes: Vec<usize> = state.weights.iter().map(Vec::len).collect();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            stepper_1
                .step_ahead(&mut other_state, &recipe(), &[batch(2, 1)], Word::default(), untouched)
                .expect("both are there");
            // It goes, and sends no more.
            drop(stepper_1);
        });
        stepper_0
            .step_ahead(&mut state, &recipe(), &[batch(2, 0)], Word::default(), untouched)
            .expect("both are there");
        other.join().expect("no panic");
        aborter.abort("rank 1 is gone");
        let error = stepper_0
            .step_ahead(&mut state, &recipe(), &[batch(2, 2)], Word::default(), untouched)
            .expect_err("nobody is there");
        assert!(error.to_string().contains("rank 1 is gone"), "{error}");
    });
    assert_eq!(state.weights.iter().map(Vec::len).collect::<Vec<_>>(), shapes, "no tensor is missing");
}
