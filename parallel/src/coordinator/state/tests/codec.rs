//! One codec for all ranks, of what each has measured.

use super::*;
use crate::wire::control::{CodecChoice, CodecElements, CodecFacts, CodecSpeed};

/// What a rank of the 27 M parameters at that link says: every codec takes a nanosecond an element each way.
fn codec_facts(link_bytes_per_s: f64) -> CodecFacts {
    let speed = |codec: &str| CodecSpeed { codec: codec.into(), encode_s: 1e-9, decode_add_s: 1e-9 };
    CodecFacts {
        link_bytes_per_s,
        step_s: 1.0,
        window_s: 0.3,
        speeds: ["fp32", "bf16", "int8", "int4"].map(speed).to_vec(),
        elements: Some(CodecElements { any: 27_000_000, int8_at_least: 0, fp32: 1000 }),
        last_bucket: Some(CodecElements { any: 1_000_000, int8_at_least: 0, fp32: 0 }),
        members: 1,
        parameters: String::new(),
        ranks: 0,
    }
}

/// The choice that every rank heard once and last.
#[track_caller]
fn chosen(scene: &Scene) -> CodecChoice {
    let choices: Vec<CodecChoice> = (0..scene.state.options.ranks)
        .map(|rank| match &scene.heard(rank)[..] {
            [To::CodecChoice(choice)] => choice.clone(),
            other => panic!("rank {rank} heard {other:?}"),
        })
        .collect();
    choices.iter().for_each(|choice| assert_eq!(*choice, choices[0]));
    choices[0].clone()
}

#[test]
fn a_codec_is_chosen_for_all_when_the_last_rank_has_measured() {
    let mut scene = Scene::running(3);
    for rank in [2, 0] {
        scene.says(rank, From::CodecFacts(codec_facts(1e10)));
        scene.pass(ms(300), |_, _| None);
        assert!((0..3).all(|rank| scene.heard(rank).is_empty()), "not before all have measured");
    }
    scene.says(1, From::CodecFacts(codec_facts(1e10)));
    let choice = chosen(&scene);
    assert_eq!((&*choice.codec, choice.predictions.len()), ("fp32", 4));
    assert!(choice.reason.contains("compression is off"), "{}", choice.reason);
    // Once is enough.
    scene.says(1, From::CodecFacts(codec_facts(1.0)));
    assert_eq!(chosen(&scene), choice);
    scene.goes_on();
}

#[test]
fn the_slowest_link_and_the_slowest_rank_count() {
    let choice = |change: fn(&mut CodecFacts)| {
        let mut scene = Scene::running(2);
        let mut odd = codec_facts(1e10);
        change(&mut odd);
        scene.says(0, From::CodecFacts(codec_facts(1e10)));
        scene.says(1, From::CodecFacts(odd));
        chosen(&scene)
    };
    assert_eq!(choice(|_| {}).codec, "fp32", "the control");
    assert_eq!(choice(|facts| facts.link_bytes_per_s = 1e6).codec, "int4");
    assert_eq!(choice(|facts| facts.link_bytes_per_s = f64::NAN).codec, "int4");
    // Of ranks that hold one model together each sums with as many as there are models.
    let predictions = |count: usize, sums: u32| {
        let mut scene = Scene::running(count);
        (0..count).for_each(|rank| scene.says(rank, From::CodecFacts(CodecFacts { ranks: sums, ..codec_facts(1e7) })));
        chosen(&scene).predictions
    };
    assert_eq!(predictions(4, 2), predictions(2, 0));
    assert_ne!(predictions(4, 2), predictions(4, 0));
    let slow = choice(|facts| facts.step_s = 50.0);
    assert!(slow.predictions.iter().all(|prediction| prediction.step_s > 50.0), "{slow:?}");
    let costly = choice(|facts| facts.speeds.iter_mut().for_each(|speed| speed.encode_s = f64::INFINITY));
    assert!(costly.predictions.iter().all(|prediction| prediction.step_s.is_finite()), "{costly:?}");
    // What one rank has not measured is no candidate, and what nobody knows is none either.
    let choice = choice(|facts| {
        facts.link_bytes_per_s = 1e6;
        facts.speeds[3].codec = "int3".into();
    });
    assert_eq!((&*choice.codec, choice.predictions.len()), ("int8", 3));
}
