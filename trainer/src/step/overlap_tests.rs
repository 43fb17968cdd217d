//! The first bucket leaves before `backward()` returns: an order of events, not a measurement of time. And what
//! `overlap` says of that order on a simulated clock.

use std::sync::Mutex;
use std::time::Duration;

use compression::Codec;
use parallel::data::engine::Inbox;
use parallel::data::exchange::{Exchange, Group};
use parallel::tap::Emit;
use parallel::transport::channel::{ChannelTransport, network};

use super::taps::take;
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
    let mut stepper = Stepper::across(&config, &Device::flex(), engine, None);
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

/// Layers of the model whose backward pass the simulated clock counts.
const LAYERS: usize = 8;

/// Seconds that the backward pass of a layer takes on the simulated clock.
const LAYER_S: f64 = 1.0;

/// What a simulated clock saw of a backward pass.
struct Passed {
    /// When each bucket was complete, in the order in which they were.
    complete_s: Vec<f64>,
    /// When the backward pass was over.
    over_s: f64,
}

/// A real backward pass of one rank. The clock goes on by a layer's time when the pass has come through that layer, which
/// an anchored gradient of the layer tells, with `anchors` or without those of the others.
fn passed(anchors: bool) -> Passed {
    let mut keys = recipe().model;
    keys.num_hidden_layers = Some(LAYERS);
    let config = Config::from_keys(&keys, 31, 8, None).expect("complete");
    // So small that a layer has two or three, so large that what tells of a layer is in none alone.
    let mut stepper = Stepper::new(&config, &Device::flex(), 1 << 12).expect("small");
    let clock = Arc::<Mutex<Passed>>::new(Mutex::new(Passed { complete_s: Vec::new(), over_s: 0.0 }));
    for (index, parameter) in stepper.plan.parameters().iter().enumerate() {
        let ticks = parameter.name.ends_with(".input_layernorm.weight");
        let (stream, clock) = (stepper.stream.clone(), clock.clone());
        let emitted = move |take: &dyn Fn(&GradientStream)| {
            let mut clock = clock.lock().expect("one thread");
            clock.over_s += if ticks { LAYER_S } else { 0.0 };
            take(&stream);
            let (complete, now_s) = (stream.complete().len(), clock.over_s);
            clock.complete_s.resize(complete, now_s);
        };
        let emit = match parameter.shape.len() {
            1 => Emit::new::<1>(move |gradient| {
                emitted(&|stream| _ = take(stream, index, gradient.clone()));
                None
            }),
            _ => Emit::new::<2>(move |gradient| {
                emitted(&|stream| _ = take(stream, index, gradient.clone()));
                None
            }),
        };
        stepper.hooks[index] = if anchors || ticks { Hook::new(emit) } else { Hook::without_anchor(emit) };
    }
    let mut state = State::initial(&config, 5);
    stepper.step(&mut state, &recipe(), &[batch(2, 0)], Word::default(), untouched).expect("a good step");
    drop(stepper);
    let Ok(clock) = Arc::try_unwrap(clock) else { panic!("nobody else has it any more") };
    clock.into_inner().expect("one thread")
}

/// `overlap` and `exposed_s` of such a pass, when a link carries one bucket after the other and each takes so long.
fn overlap(Passed { complete_s, over_s }: &Passed, bucket_s: f64) -> (f64, f64) {
    let last_s = complete_s.iter().fold(0.0f64, |free, complete| free.max(*complete) + bucket_s);
    let exposed_s = (last_s - over_s).max(0.0);
    (report::overlap(exposed_s, last_s - complete_s[0]).expect("several ranks"), exposed_s)
}

#[test]
fn on_a_simulated_clock_overlap_is_high_and_without_anchors_it_is_nothing() {
    let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
    let (with, without) = (passed(true), passed(false));
    let buckets = with.complete_s.len();
    assert!(buckets > 2 * LAYERS && without.complete_s.len() == buckets, "{:?}", with.complete_s);
    assert_eq!([with.over_s, without.over_s], [LAYERS as f64 * LAYER_S; 2], "every layer ticks once");

    // A link that has sent a layer's buckets before the next layer's are there: only the end is not hidden.
    let bucket_s = LAYER_S / buckets as f64;
    let (high, exposed_s) = overlap(&with, bucket_s);
    assert!(high > 0.85, "{high}: {:?}", with.complete_s);
    let last = with.complete_s.iter().filter(|complete| **complete == with.over_s).count();
    assert!(near(exposed_s, last as f64 * bucket_s), "{exposed_s}: {:?}", with.complete_s);

    // The control.
    let (low, exposed_s) = overlap(&without, bucket_s);
    assert!(low < 1e-6, "{low}: {:?}", without.complete_s);
    assert!(near(exposed_s, buckets as f64 * bucket_s), "{exposed_s}: everything is sent after the backward pass");

    // A slow link hides less of the same backward pass, and never all of it.
    let slow = [0.1, 1.0, 10.0].map(|bucket_s| overlap(&with, bucket_s).0);
    assert!(high > slow[0] && slow[0] > slow[1] && slow[1] > slow[2] && slow[2] > 0.0, "{slow:?}");
}
