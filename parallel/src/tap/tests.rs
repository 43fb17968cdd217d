//! What a tap promises, each with the control that breaks it. The network is a chain of linears, so that the order of
//! the backward pass is known.

use std::sync::Mutex;

use burn::tensor::{Device, Distribution, TensorData};

use super::*;

const WIDTH: usize = 8;
const LAYERS: usize = 5;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    /// The gradient of this layer's weight came out of its tap.
    Emitted(usize),
    /// The backward pass went through the input of this layer: everything above it is done, nothing below it.
    Passed(usize),
    /// `backward()` returned.
    Returned,
}

/// The backend under test: LibTorch where it is built in, else flex.
fn device() -> Device {
    #[cfg(feature = "libtorch")]
    return Device::libtorch();
    #[cfg(not(feature = "libtorch"))]
    Device::flex()
}

type Log = Arc<Mutex<Vec<Event>>>;

fn note(log: &Log, event: Event) {
    log.lock().expect("no test panics while it holds the log").push(event);
}

fn random<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn weights(device: &Device) -> Vec<Tensor<2>> {
    (0..LAYERS).map(|i| random([WIDTH, WIDTH], i as u64 + 1, device).require_grad()).collect()
}

fn input(seed: u64, device: &Device) -> Tensor<2> {
    random([3, WIDTH], seed, device)
}

fn bits(data: &TensorData) -> Vec<u32> {
    data.as_slice::<f32>().expect("f32").iter().map(|x| x.to_bits()).collect()
}

/// A chain of linears with a marker between the layers; with or without an anchor for the taps.
fn chain(weights: &[Tensor<2>], x: Tensor<2>, anchored: bool, log: &Log) -> Tensor<1> {
    let mut x = x;
    for (layer, weight) in weights.iter().enumerate() {
        let passed = log.clone();
        x = through(
            x,
            |x| x,
            move |gradient| {
                note(&passed, Event::Passed(layer));
                gradient
            },
        );
        let emitted = log.clone();
        let emit = Emit::new::<2>(move |gradient| {
            note(&emitted, Event::Emitted(layer));
            Some(gradient)
        });
        let weight = tap(weight.clone(), anchored.then_some(&x), emit);
        x = x.matmul(weight).tanh();
    }
    x.sum()
}

fn run(anchored: bool) -> Vec<Event> {
    let device = device().autodiff();
    let log = Log::default();
    // The input is tracked, as an activation inside a model is.
    let x = input(9, &device).require_grad();
    chain(&weights(&device), x, anchored, &log).backward();
    note(&log, Event::Returned);
    let events = log.lock().expect("no other thread");
    events.clone()
}

#[test]
fn gradients_through_taps_equal_plain_autodiff_bitwise() {
    let device = device().autodiff();
    let plain = weights(&device);
    let mut x = input(9, &device);
    for weight in &plain {
        x = x.matmul(weight.clone()).tanh();
    }
    let expected = x.sum().backward();

    let tapped = weights(&device);
    let log = Log::default();
    let found = chain(&tapped, input(9, &device), true, &log).backward();
    for (plain, tapped) in plain.iter().zip(&tapped) {
        let expected = plain.grad(&expected).expect("a leaf").into_data();
        let found = tapped.grad(&found).expect("the tap passes the gradient on").into_data();
        assert_eq!(bits(&expected), bits(&found));
    }
}

#[test]
fn each_gradient_leaves_while_earlier_layers_still_compute() {
    let events = run(true);
    // Within one layer either order is fine: the weight's gradient and the input's are complete at the same time.
    let in_order = |events: &[Event], layer: usize| {
        let at = |event: &Event| events.iter().position(|e| e == event).expect("every event happens");
        layer == 0 || at(&Event::Emitted(layer)) < at(&Event::Passed(layer - 1))
    };
    assert!((0..LAYERS).all(|layer| in_order(&events, layer)), "{events:?}");
    assert_eq!(events.last(), Some(&Event::Returned));
    assert_eq!(events.len(), 2 * LAYERS + 1);
}

#[test]
fn without_an_anchor_every_gradient_waits_for_the_end() {
    let events = run(false);
    let last_layer = events.iter().position(|e| *e == Event::Emitted(LAYERS - 1)).expect("it fires");
    let second_layer_done = events.iter().position(|e| *e == Event::Passed(1)).expect("it fires");
    assert!(last_layer > second_layer_done, "the control must lose the property: {events:?}");
}

#[test]
fn a_tied_weight_that_is_tapped_once_fires_once_with_the_sum() {
    let device = device().autodiff();
    let use_twice = |weight: Tensor<2>, x: Tensor<2>| x.matmul(weight.clone()).tanh().matmul(weight.transpose()).sum();
    let plain = weights(&device).remove(0);
    let expected = plain.grad(&use_twice(plain.clone(), input(9, &device)).backward()).expect("a leaf").into_data();

    let seen: Arc<Mutex<Vec<TensorData>>> = Arc::default();
    let emit = |seen: &Arc<Mutex<Vec<TensorData>>>| {
        let seen = seen.clone();
        Emit::new::<2>(move |gradient| {
            seen.lock().expect("one thread").push(gradient.into_data());
            None
        })
    };
    let x = input(9, &device).require_grad();
    let weight = tap(weights(&device).remove(0), None::<&Tensor<2>>, emit(&seen));
    use_twice(weight, x.clone()).backward();
    let once = std::mem::take(&mut *seen.lock().expect("one thread"));
    assert_eq!(once.len(), 1);
    assert_eq!(bits(&once[0]), bits(&expected));

    // The control: two taps on the one weight fire twice, each with a part.
    let weight = weights(&device).remove(0);
    let (first, second) = (tap(weight.clone(), Some(&x), emit(&seen)), tap(weight, Some(&x), emit(&seen)));
    x.matmul(first).tanh().matmul(second.transpose()).sum().backward();
    assert_eq!(seen.lock().expect("one thread").len(), 2);
}

#[test]
fn several_micro_batches_emit_one_gradient_each() {
    let device = device().autodiff();
    let weights = weights(&device);
    let log = Log::default();
    for micro_batch in 0..3 {
        chain(&weights, input(micro_batch, &device).require_grad(), true, &log).backward();
    }
    let events = log.lock().expect("no other thread");
    for layer in 0..LAYERS {
        assert_eq!(events.iter().filter(|e| **e == Event::Emitted(layer)).count(), 3);
    }
}

#[test]
fn a_closure_that_returns_nothing_leaves_the_weight_without_a_gradient() {
    let device = device().autodiff();
    let weight = weights(&device).remove(0);
    let check = |keep: bool| {
        let x = input(9, &device).require_grad();
        let emit = Emit::new::<2>(move |gradient| keep.then_some(gradient));
        let gradients = x.clone().matmul(tap(weight.clone(), Some(&x), emit)).sum().backward();
        (weight.grad(&gradients).is_some(), x.grad(&gradients).is_some())
    };
    assert_eq!(check(false), (false, true));
    assert_eq!(check(true), (true, true));
}

#[test]
fn nothing_fires_without_autodiff() {
    let device = device();
    let log = Log::default();
    let weights: Vec<_> = weights(&device.clone().autodiff()).into_iter().map(Tensor::inner).collect();
    let out = chain(&weights, input(9, &device), true, &log);
    assert_eq!(out.into_data().num_elements(), 1);
    assert!(log.lock().expect("no other thread").is_empty());
}

#[test]
fn through_runs_one_closure_each_way_and_may_change_the_shape() {
    let device = device().autodiff();
    let x: Tensor<2> = Tensor::random([2, 4], Distribution::Uniform(-1.0, 1.0), &device).require_grad();
    // All-gather of one rank's rows onto two ranks, and its transpose, the reduce-scatter.
    let gathered = through(
        x.clone(),
        |x| Tensor::cat(vec![x.clone(), x], 0),
        |gradient| gradient.clone().narrow(0, 0, 2) + gradient.narrow(0, 2, 2),
    );
    assert_eq!(gathered.dims(), [4, 4]);
    let gradients = gathered.mul_scalar(3.0).sum().backward();
    let gradient = x.grad(&gradients).expect("a leaf").into_data();
    assert_eq!(gradient.as_slice::<f32>().expect("f32"), [6.0; 8]);
}

#[test]
fn an_operation_of_two_inputs_gives_each_its_gradient_and_keeps_what_it_needs() {
    let device = device().autodiff();
    let x = input(4, &device).require_grad();
    let y = input(5, &device).require_grad();
    let product = |x: Tensor<2>, y: Tensor<2>| {
        fused_pair(x, y, |x, y| {
            let out = x.clone() * y.clone();
            (out, move |g: Tensor<2>| (g.clone() * y.clone(), g * x.clone()))
        })
    };
    let gradients = product(x.clone(), y.clone()).powi_scalar(2).sum().backward();
    let plain = (x.clone() * y.clone()).powi_scalar(2).sum().backward();
    for input in [&x, &y] {
        let found = input.grad(&gradients).expect("a leaf").into_data();
        assert_eq!(bits(&found), bits(&input.grad(&plain).expect("a leaf").into_data()));
    }
    // An input that is not tracked gets none, and the other still does.
    let fixed = input(5, &device);
    let gradients = product(x.clone(), fixed.clone()).sum().backward();
    assert!(x.grad(&gradients).is_some() && fixed.grad(&gradients).is_none());
}

#[test]
fn a_tapped_tensor_lives_for_one_backward() {
    let device = device().autodiff();
    let x = input(9, &device).require_grad();
    let emit = Emit::new::<2>(|_| None);
    let tapped = tap(weights(&device).remove(0), Some(&x), emit);
    x.clone().matmul(tapped.clone()).sum().backward();
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| x.matmul(tapped).sum().backward()));
    assert!(again.is_err(), "a second backward through it must not pass for a good one");
}

#[test]
fn a_backward_may_run_another_backward_over_detached_leaves() {
    let device = device().autodiff();
    let weight = weights(&device).remove(0);
    let plain = weight.grad(&input(9, &device).matmul(weight.clone()).tanh().sum().backward()).expect("a leaf");
    // Recomputation: the forward keeps the input alone, the backward computes the layer anew on leaves of its own.
    let layer = fused_pair(input(9, &device).require_grad(), weight.clone(), |x, w| {
        let out = x.clone().matmul(w.clone()).tanh();
        let backward = move |g: Tensor<2>| {
            let device = g.device().autodiff();
            let leaf = |t: &Tensor<2>| Tensor::from_data(t.clone().into_data(), &device).require_grad();
            let (x, w) = (leaf(&x), leaf(&w));
            let g = Tensor::from_data(g.into_data(), &device);
            let gradients = (x.clone().matmul(w.clone()).tanh() * g).sum().backward();
            (x.grad(&gradients).expect("a leaf"), w.grad(&gradients).expect("a leaf"))
        };
        (out, backward)
    });
    let found = weight.grad(&layer.sum().backward()).expect("a leaf");
    assert_eq!(bits(&found.into_data()), bits(&plain.into_data()));
}
