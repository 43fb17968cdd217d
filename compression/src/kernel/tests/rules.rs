//! The reference is the model of the format; with any one rule changed it is not.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::inputs::{Chance, gradient_and_residual};
use super::model::{self, RULES, Rules};
use super::*;

proptest! {
    #[test]
    fn the_reference_encodes_a_hard_input_as_the_model_does((gradient, residual) in gradient_and_residual()) {
        for codec in Codec::ALL {
            let encoded = reference(codec, &gradient, &residual);
            prop_assert_eq!(&encoded, &model::encode(codec, &gradient, &residual, &RULES), "{}", codec);
            if encoded.found == Found::Finite {
                let mut out = vec![f32::NAN; gradient.len()];
                let payload = Payload::new(codec, out.len(), &encoded.payload).expect("our own");
                payload.decode_with(Level::PORTABLE, Stores::Cached, &mut out);
                let expected = model::decode(codec, &encoded.payload, out.len());
                // By value: a product of a negative scale and nothing is no encoder's.
                prop_assert_eq!(bits(&out), bits(&expected), "{}", codec);
            }
        }
    }
}

#[test]
fn the_reference_encodes_as_the_model_does_at_every_length() {
    let (gradient, residual) = (Chance::new(21).normals(400), Chance::new(22).normals(400));
    for codec in Codec::ALL {
        for n in 0..=gradient.len() {
            let expected = model::encode(codec, &gradient[..n], &residual[..n], &RULES);
            assert!(reference(codec, &gradient[..n], &residual[..n]) == expected, "{codec} of {n}");
        }
    }
}

/// Inputs as of the property above, always the same.
fn some_inputs() -> Vec<(Vec<f32>, Vec<f32>)> {
    let mut runner = TestRunner::deterministic();
    let strategy = gradient_and_residual();
    let mut inputs: Vec<_> = (0..300).map(|_| strategy.new_tree(&mut runner).expect("an input").current()).collect();
    // Enough quotients that a rounding of 1 / scale shows.
    inputs.extend((0..200).map(|seed| (Chance::new(seed).normals(4096), vec![0.0; 4096])));
    inputs
}

/// The controls: the inputs show each rule.
#[test]
fn with_any_rule_changed_the_model_is_another_encoder() {
    let inputs = some_inputs();
    let dense = [Codec::Int8, Codec::Int4];
    let sparse = [Codec::Sparse24Int8, Codec::Sparse24Int4];
    let changed: [(&str, Rules, &[Codec]); 11] = [
        ("halves away from zero", Rules { round: f32::round, ..RULES }, &dense),
        ("halves toward zero", Rules { round: |x| (x.abs() - 0.5).ceil().copysign(x), ..RULES }, &dense),
        ("the nearest scale", Rules { round_scale: f64::round_ties_even, ..RULES }, &dense),
        ("a scale rounded down", Rules { round_scale: f64::floor, ..RULES }, &dense),
        ("the later of two equal ones", Rules { later_wins: true, ..RULES }, &sparse),
        ("smaller scales are sent", Rules { scale_min: RULES.scale_min * 0.99, ..RULES }, &dense),
        ("a scale of 2^-100 is not sent", Rules { scale_min: RULES.scale_min * 1.001, ..RULES }, &dense),
        ("negative zeros stay", Rules { keeps_negative_zero: true, ..RULES }, &dense),
        ("all of a residual is sent", Rules { held: 0.0, ..RULES }, &sparse),
        ("a sixteenth of a residual is sent", Rules { held: 30.0, ..RULES }, &sparse),
        ("a residual may become too large", Rules { sees_y_alone: true, ..RULES }, &sparse),
    ];
    for (what, rules, codecs) in changed {
        for &codec in codecs {
            let noticed = inputs.iter().any(|(gradient, residual)| {
                model::encode(codec, gradient, residual, &RULES) != model::encode(codec, gradient, residual, &rules)
            });
            assert!(noticed, "{codec}: no input shows {what}");
        }
    }
    // Few quotients lie so near a half that dividing rounds them to another side: it shows with 8 bits at least.
    let divides = Rules { divides: true, ..RULES };
    let noticed = inputs.iter().any(|(gradient, residual)| {
        model::encode(Codec::Int8, gradient, residual, &RULES)
            != model::encode(Codec::Int8, gradient, residual, &divides)
    });
    assert!(noticed, "no input shows that y / s is not y * (1 / s)");
}
