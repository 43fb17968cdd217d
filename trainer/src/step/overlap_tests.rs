//! The first bucket leaves before `backward()` returns: an order of events, not a measurement of time.

use std::sync::Mutex;
use std::time::Duration;

use compression::Codec;
use parallel::data::engine::Inbox;
use parallel::data::exchange::{Exchange, Group};
use parallel::transport::channel::{ChannelTransport, network};

use super::tests::{batch, recipe};
use super::*;

/// Its gradient is complete when the backward pass comes to the activation that the first layer consumes; only the
/// embedding's comes later.
const MARKER: &str = "model.layers.0.input_layernorm.weight";

/// Long enough for any machine: it ends a test that would hang.
const GUARD: Duration = Duration::from_secs(60);

/// What was so when the backward pass came to the marker: the buckets that were complete, and the frames that the engine
/// had handed to the transport.
type Seen = Vec<(Vec<usize>, u64)>;

/// A rank's stepper that looks around at the marker, inside the backward pass. With anchors it first waits until a frame
/// has left; without them it would wait for ever.
fn stepper(rank: usize, end: ChannelTransport, anchors: bool) -> (Stepper, State, Arc<Mutex<Seen>>) {
    let config = Config::from_keys(&recipe().model, 31, 8, None).expect("complete");
    let plan = Arc::new(Plan::new(config.parameters(), 1 << 10).expect("small"));
    let inbox = Inbox::default();
    end.open(inbox.sink());
    let group = Group { rank, ranks: 2, members: 1, window: usize::MAX, epoch: 1, chunk_blocks: 64 };
    let exchange = Exchange::new(plan, group, Codec::Fp32);
    let engine = Engine::start(exchange, Arc::new(end), inbox, Arc::default()).expect("a thread");
    let mut stepper = Stepper::across(&config, &Device::flex(), engine);
    let seen = Arc::<Mutex<Seen>>::default();
    for (index, parameter) in stepper.plan.parameters().iter().enumerate() {
        let stream = stepper.stream.clone();
        if parameter.name == MARKER {
            let seen = seen.clone();
            stepper.hooks[index] = Hook::new(Emit::new::<1>(move |gradient| {
                let handed = || stream.engine().expect("two ranks").handed();
                let start = Instant::now();
                while anchors && handed() == 0 && start.elapsed() < GUARD {
                    std::thread::yield_now();
                }
                seen.lock().expect("one thread").push((stream.complete(), handed()));
                take(&stream, index, gradient)
            }));
        } else if !anchors {
            let emit = match parameter.shape.len() {
                1 => Emit::new::<1>(move |gradient| take(&stream, index, gradient)),
                _ => Emit::new::<2>(move |gradient| take(&stream, index, gradient)),
            };
            stepper.hooks[index] = Hook::without_anchor(emit);
        }
    }
    (stepper, State::initial(&config, 5), seen)
}

/// One step of two ranks in threads: what each saw at its marker, and its parameters after it.
fn step(anchors: bool) -> Vec<(Seen, Vec<Vec<f32>>)> {
    let ends = network(2);
    let ranks: Vec<_> = ends.into_iter().enumerate().map(|(rank, end)| stepper(rank, end, anchors)).collect();
    std::thread::scope(|scope| {
        let run = |(rank, (stepper, mut state, seen)): (usize, (Stepper, State, Arc<Mutex<Seen>>))| {
            let batches = [batch(2, rank)];
            let report =
                stepper.step(&mut state, &recipe(), &batches, Word::default(), untouched).expect("both are there");
            assert!(!report.skipped);
            let seen = seen.lock().expect("one thread").clone();
            (seen, state.weights)
        };
        let threads: Vec<_> = ranks.into_iter().enumerate().map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

#[test]
fn the_first_bucket_leaves_while_the_backward_pass_is_at_the_first_layer_and_without_anchors_none_is_complete() {
    let ranks = step(true);
    for (seen, _) in &ranks {
        let [(complete, handed)] = &seen[..] else { panic!("the backward pass comes by once: {seen:?}") };
        assert!(complete.first() == Some(&0) && *handed > 0, "{complete:?}, {handed} frames");
    }
    assert_eq!(ranks[0].1, ranks[1].1);

    let control = step(false);
    for (seen, _) in &control {
        assert_eq!(*seen, [(Vec::new(), 0)], "no gradient but the marker's is there yet");
    }
    assert_eq!(control[0].1, ranks[0].1, "anchors change when gradients leave, and no bit of them");
}
