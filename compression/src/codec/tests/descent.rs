//! What error feedback is for: without it descent freezes far from the optimum.

use super::*;

const N: usize = 64;

/// On f_i(x) = |x|²/2 + b_i x with b_1 + b_2 = 0, two ranks and both stages: the distance from the optimum, which is 0,
/// after 40 / `rate` steps.
fn distance_from_optimum(codec: Codec, amplitude: f32, rate: f32, feedback: bool) -> f64 {
    let bias: Vec<f32> = (0..N).map(|i| amplitude * ((i * 37 % 64) as f32 / 32.0 - 1.0)).collect();
    let mut x = vec![1.0f32; N];
    let mut senders = [vec![0.0f32; N], vec![0.0f32; N]];
    let mut owner = vec![0.0f32; N];
    for _ in 0..(40.0 / rate) as usize {
        let mut sum = vec![0.0f32; N];
        for (sign, residual) in [1.0, -1.0].into_iter().zip(&mut senders) {
            let gradient: Vec<f32> = x.iter().zip(&bias).map(|(x, b)| x + sign * b).collect();
            let (_, payload, left) = encode_with_residual(codec, &gradient, residual);
            Payload::new(codec, N, payload).expect("our own").decode_add(&mut sum);
            if feedback {
                *residual = left;
            }
        }
        let (_, payload, left) = encode_with_residual(codec.second_stage(), &sum, &owner);
        if feedback {
            owner = left;
        }
        for (x, g) in x.iter_mut().zip(decode(codec.second_stage(), &payload, N)) {
            *x -= rate * g / 2.0;
        }
    }
    norm(x.into_iter().map(f64::from))
}

fn check(codec: Codec, amplitude: f32) {
    let [coarse, fine] = [0.1, 0.01].map(|rate| distance_from_optimum(codec, amplitude, rate, true));
    assert!(fine * 5.0 <= coarse, "{codec}: a ball that shrinks with the rate: {coarse} {fine}");
    let [frozen, still_frozen] = [0.1, 0.01].map(|rate| distance_from_optimum(codec, amplitude, rate, false));
    assert!(frozen > 2.0 * coarse, "{codec} without feedback: {frozen} {coarse}");
    assert!(still_frozen > 20.0 * fine, "{codec} without feedback: {still_frozen} {fine}");
    assert!(still_frozen * 2.0 > frozen, "{codec} without feedback: a smaller rate is of no use");
}

#[test]
fn with_feedback_descent_by_bf16_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    check(Codec::Bf16, 10.0);
}

#[test]
fn with_feedback_descent_by_int8_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    check(Codec::Int8, 1000.0);
}

#[test]
fn with_feedback_descent_by_int4_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    check(Codec::Int4, 100.0);
}

#[test]
fn with_feedback_descent_by_sparse24_int8_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    check(Codec::Sparse24Int8, 10.0);
}

#[test]
fn with_feedback_descent_by_sparse24_int4_reaches_a_ball_that_shrinks_with_the_rate_and_without_it_freezes() {
    check(Codec::Sparse24Int4, 10.0);
}
