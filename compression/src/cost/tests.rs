//! The choice over forged facts.

use proptest::prelude::*;

use super::*;

/// About what one core of the reference machine takes for each candidate.
fn speeds(slower: f64) -> Vec<Speed> {
    let speed = |(codec, encode_ns, decode_ns): (Codec, f64, f64)| Speed {
        codec,
        encode_s: slower * encode_ns * 1e-9,
        decode_add_s: slower * decode_ns * 1e-9,
    };
    [(Codec::Fp32, 0.5, 0.5), (Codec::Bf16, 0.6, 0.5), (Codec::Int8, 0.7, 0.4), (Codec::Int4, 0.7, 0.4)]
        .map(speed)
        .to_vec()
}

/// 27 M parameters on two hosts, as the project measures them.
fn facts(link_bytes_per_s: f64) -> Facts {
    Facts {
        ranks: 2,
        link_bytes_per_s,
        elements: Elements { any: 24_000_000, int8_at_least: 3_000_000, fp32: 20_000 },
        last_bucket: Elements { any: 0, int8_at_least: 1_000_000, fp32: 512 },
        step_s: 1.0,
        window_s: 0.3,
        members: 1,
        parameters: None,
        speeds: speeds(1.0),
    }
}

fn place(codec: Codec) -> usize {
    CANDIDATES.iter().position(|&candidate| candidate == codec).expect("a candidate")
}

#[track_caller]
fn chosen(facts: &Facts, codecs: &[Codec], said: &[&str]) {
    let choice = choose(facts);
    assert!(codecs.contains(&choice.codec), "{choice:?}");
    assert_eq!(choice.predictions.len(), CANDIDATES.len());
    said.iter().for_each(|said| assert!(choice.reason.contains(said), "{:?} in {}", said, choice.reason));
}

const MEGABIT: f64 = 1e6 / 8.0;

#[test]
fn ranks_of_a_machine_share_what_leaves_it_and_decode_all_of_it() {
    let slow = facts(1e6);
    let step = |facts: &Facts| {
        let choice = choose(facts);
        choice.predictions.iter().find(|one| one.codec == Codec::Int8).expect("a candidate").step_s
    };
    // On a slow link two machines of four ranks take a quarter of the time of two ranks, and the decoding of all sums.
    let two = step(&slow);
    let machines = step(&Facts { ranks: 8, members: 4, ..slow.clone() });
    assert!(machines < 0.27 * two && machines > 0.25 * two, "{machines} {two}");
    // With one machine nothing leaves.
    assert_eq!(choose(&Facts { ranks: 8, members: 8, ..slow }).codec, Codec::Fp32);
}

#[test]
fn a_slow_link_gets_few_bits_and_a_fast_one_none() {
    chosen(&facts(200.0 * MEGABIT), &[Codec::Int4], &["25.0 MB/s", "int8, which is more precise"]);
    chosen(&facts(100_000.0 * MEGABIT), &[Codec::Fp32], &["compression is off"]);
    chosen(&facts(f64::INFINITY), &[Codec::Fp32], &["compression is off"]);
    // In between it is somewhere in between.
    chosen(&facts(2_000.0 * MEGABIT), &[Codec::Bf16, Codec::Int8], &["250 MB/s"]);
}

#[test]
fn what_hides_behind_the_backward_pass_needs_no_compression() {
    let hidden = Facts { window_s: 60.0, last_bucket: Elements::default(), ..facts(200.0 * MEGABIT) };
    chosen(&hidden, &[Codec::Fp32], &["compression is off"]);
    // The control: a last bucket that cannot hide.
    let open = Facts { window_s: 60.0, last_bucket: facts(0.0).elements, ..facts(200.0 * MEGABIT) };
    chosen(&open, &[Codec::Int4], &[]);
}

#[test]
fn a_codec_that_costs_more_than_it_saves_is_not_taken() {
    let quick = facts(2_000.0 * MEGABIT);
    assert_ne!(choose(&quick).codec, Codec::Fp32);
    let mut slow = quick;
    slow.speeds = speeds(1.0);
    slow.speeds.iter_mut().skip(1).for_each(|speed| speed.encode_s *= 1000.0);
    chosen(&slow, &[Codec::Fp32], &["no codec is predicted to be faster", "compression is off"]);
}

#[test]
fn a_candidate_that_was_not_measured_is_left_out_and_sparse_codecs_are_never_taken() {
    let mut slow = facts(MEGABIT);
    slow.speeds.retain(|speed| speed.codec != Codec::Int4);
    slow.speeds.push(Speed { codec: Codec::Sparse24Int4, encode_s: 0.0, decode_add_s: 0.0 });
    let choice = choose(&slow);
    assert_eq!((choice.codec, choice.predictions.len()), (Codec::Int8, 3));
    slow.speeds.clear();
    assert_eq!((choose(&slow).codec, choose(&slow).predictions.len()), (Codec::Fp32, 0));
}

#[test]
fn bytes_are_the_formula_of_the_exchange() {
    let elements = Elements { any: 1 << 20, int8_at_least: 1 << 18, fp32: 1 << 10 };
    let payload = |codec: Codec, elements: u64| codec.payload_bytes(elements as usize);
    for codec in Codec::ALL {
        let sum = |codec: Codec, elements| payload(codec, elements) + payload(codec.second_stage(), elements);
        let expected = sum(codec, elements.any)
            + sum(int8_at_least(codec), elements.int8_at_least)
            + sum(Codec::Fp32, elements.fp32);
        assert_eq!(bytes(&elements, codec, None), expected as f64, "{codec}");
        // Parameters come back as they do, whatever the gradients travel in.
        for back in [Codec::Fp32, Codec::Int8] {
            let both = |codec: Codec, back: Codec, elements| payload(codec, elements) + payload(back, elements);
            let expected = both(codec, back, elements.any)
                + both(int8_at_least(codec), back, elements.int8_at_least)
                + both(Codec::Fp32, Codec::Fp32, elements.fp32);
            assert_eq!(bytes(&elements, codec, Some(back)), expected as f64, "{codec} {back}");
        }
    }
}

#[test]
fn gradients_of_fewer_bits_buy_less_where_parameters_come_back_as_they_are() {
    let step = |parameters, codec| {
        let choice = choose(&Facts { parameters, ..facts(100.0 * MEGABIT) });
        choice.predictions.iter().find(|one| one.codec == codec).expect("a candidate").step_s
    };
    for codec in [Codec::Bf16, Codec::Int8, Codec::Int4] {
        assert!(step(Some(Codec::Fp32), codec) > step(None, codec), "{codec}");
    }
    assert!(step(Some(Codec::Int8), Codec::Fp32) < step(None, Codec::Fp32));
}

#[test]
fn one_rank_compresses_nothing() {
    for ranks in [0, 1] {
        let choice = choose(&Facts { ranks, ..facts(1.0) });
        assert_eq!((choice.codec, choice.predictions.len()), (Codec::Fp32, 0));
    }
}

fn absurd() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
        Just(f64::MAX),
        Just(f64::MIN_POSITIVE),
        0.0f64..1e12
    ]
}

fn any_elements() -> impl Strategy<Value = Elements> {
    let count = || prop_oneof![Just(0), Just(u64::MAX), 0u64..1 << 40];
    (count(), count(), count()).prop_map(|(any, int8_at_least, fp32)| Elements { any, int8_at_least, fp32 })
}

prop_compose! {
    fn any_facts()(
        ranks in prop_oneof![0usize..5, Just(usize::MAX)],
        numbers in prop::collection::vec(absurd(), 13),
        elements in any_elements(),
        last_bucket in any_elements(),
    ) -> Facts {
        let speeds = CANDIDATES.into_iter().enumerate();
        let speeds = speeds.map(|(i, codec)| Speed { codec, encode_s: numbers[3 + 2 * i], decode_add_s: numbers[4 + 2 * i] });
        let (link_bytes_per_s, step_s, window_s) = (numbers[0], numbers[1], numbers[2]);
        Facts { ranks, members: 1, link_bytes_per_s, elements, last_bucket, step_s, window_s, parameters: None, speeds: speeds.collect() }
    }
}

prop_compose! {
    /// A model as models are: what must travel as `fp32` is a small part, embeddings are not most of it.
    fn model_facts()(
        ranks in 2usize..9,
        any in 1u64 << 20..1 << 34,
        embeddings in 0.0f64..1.0,
        fp32 in 0.0f64..0.1,
        last in 0.0f64..1.0,
        link in 1e5f64..1e11,
        step_s in 1e-3f64..10.0,
        window in 0.0f64..0.9,
        slower in 0.1f64..30.0,
        uneven in prop::collection::vec(0.5f64..2.0, 5),
    ) -> Facts {
        let of = |share: f64| (any as f64 * share) as u64;
        let elements = Elements { any, int8_at_least: of(embeddings), fp32: of(fp32) };
        let last_bucket = Elements { any: of(last), int8_at_least: of(embeddings * last), fp32: of(fp32 * last) };
        let mut speeds = speeds(slower);
        speeds.iter_mut().zip(uneven).for_each(|(speed, uneven)| speed.encode_s *= uneven);
        Facts { ranks, members: 1, link_bytes_per_s: link, elements, last_bucket, step_s, window_s: window * step_s, parameters: None, speeds }
    }
}

proptest! {
    #[test]
    fn no_fact_is_too_absurd_for_a_choice(facts in any_facts()) {
        let choice = choose(&facts);
        prop_assert!(choice.predictions.iter().all(|p| p.step_s.is_finite() && p.step_s >= 0.0), "{choice:?}");
        prop_assert!(!choice.reason.is_empty());
        prop_assert!(CANDIDATES.contains(&choice.codec));
    }

    #[test]
    fn a_faster_link_never_gets_fewer_bits(facts in model_facts(), faster in 1.0f64..1e4) {
        let slow = choose(&facts);
        let quick = choose(&Facts { link_bytes_per_s: facts.link_bytes_per_s * faster, ..facts });
        prop_assert!(place(quick.codec) <= place(slow.codec), "{slow:?}\n{quick:?}");
    }

    #[test]
    fn a_longer_window_never_gets_fewer_bits_than_it_needs(facts in model_facts(), longer in 0.0f64..100.0) {
        let long = choose(&Facts { window_s: facts.window_s + longer, ..facts.clone() });
        let short = choose(&facts);
        let step = |choice: &Choice, codec| choice.predictions.iter().find(|p| p.codec == codec).map(|p| p.step_s);
        for codec in CANDIDATES {
            prop_assert!(step(&long, codec) <= step(&short, codec));
        }
    }

    #[test]
    fn a_codec_that_gets_slower_is_not_chosen_for_that(facts in model_facts(), which in 0usize..CANDIDATES.len(), slower in 1.0f64..100.0) {
        let before = choose(&facts);
        let mut after = facts;
        after.speeds[which].encode_s *= slower;
        let after = choose(&after);
        // `int8` is the second stage of the codecs after it: they get slower with it.
        prop_assert!(after.codec != CANDIDATES[which] || before.codec == after.codec || CANDIDATES[which] == Codec::Int8);
    }

    #[test]
    fn the_choice_is_close_to_the_shortest_and_no_more_precise_one_is(facts in model_facts()) {
        let choice = choose(&facts);
        let shortest = choice.predictions.iter().map(|p| p.step_s).fold(f64::INFINITY, f64::min);
        for prediction in &choice.predictions {
            let close = prediction.step_s <= shortest * (1.0 + WORTH);
            match place(prediction.codec).cmp(&place(choice.codec)) {
                std::cmp::Ordering::Less => prop_assert!(!close),
                std::cmp::Ordering::Equal => prop_assert!(close),
                std::cmp::Ordering::Greater => {}
            }
        }
    }
}
