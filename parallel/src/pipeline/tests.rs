use proptest::prelude::*;

use super::timeline::{Costs, Timeline, TimelineError, timeline};
use super::*;

/// Pipelines of every kind.
fn pipelines() -> impl Strategy<Value = Pipeline> {
    let plain = (prop_oneof![Just(Kind::GPipe), Just(Kind::OneForwardOneBackward)], 1usize..9, 1usize..25)
        .prop_map(|(kind, stages, micro_batches)| Pipeline::new(kind, stages, 1, micro_batches));
    let interleaved = (2usize..7, 2usize..5, 1usize..5).prop_map(|(stages, virtual_stages, groups)| {
        Pipeline::new(Kind::Interleaved, stages, virtual_stages, stages * groups)
    });
    prop_oneof![plain, interleaved].prop_map(|pipeline| pipeline.expect("a pipeline that can be"))
}

fn schedules(pipeline: Pipeline) -> Vec<Vec<Action>> {
    (0..pipeline.stages()).map(|rank| pipeline.schedule(rank)).collect()
}

/// All pieces cost the same, backward `ratio` times forward; messages take no time.
fn even(pipeline: Pipeline, schedules: &[Vec<Action>], ratio: f64) -> Result<Timeline, TimelineError> {
    let compute = |_, action: Action| match action.pass {
        Pass::Forward => 1.0,
        Pass::Backward => ratio,
    };
    timeline(pipeline, schedules, Costs { compute, travel: |_, _| 0.0 })
}

/// Numbers below 1 that look drawn, from a seed.
fn drawn(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    }
}

proptest! {
    #[test]
    fn every_pass_is_there_once_and_nobody_gets_stuck_under_any_delays(pipeline in pipelines(), seed in any::<u64>()) {
        // Superfluous, missing and too early actions are errors of the timeline.
        let mut draw = drawn(seed);
        let mut delay = drawn(seed ^ 0xabcd);
        let costs = Costs { compute: |_, _| 0.1 + draw(), travel: |_, _| 10.0 * delay() * delay() };
        let found = timeline(pipeline, &schedules(pipeline), costs);
        prop_assert!(found.is_ok(), "{found:?}");
        let found = found.expect("it is");
        // What waits unused is bounded by what both have in flight, however slow a rank is.
        for (to, unused) in found.unused_max.iter().enumerate() {
            for (from, &unused) in unused.iter().enumerate() {
                let bound = pipeline.in_flight_max(from) + pipeline.in_flight_max(to);
                prop_assert!(unused <= bound, "{from} to {to}: {unused} of {bound}");
            }
        }
    }

    #[test]
    fn the_bubble_is_the_papers(pipeline in pipelines(), ratio in 1u32..4) {
        let found = even(pipeline, &schedules(pipeline), f64::from(ratio)).expect("a step").bubble();
        prop_assert!((found - pipeline.bubble()).abs() < 1e-9, "{pipeline:?}: {found}, expected {}", pipeline.bubble());
    }

    #[test]
    fn activations_in_flight_are_those_of_the_papers(pipeline in pipelines()) {
        let Pipeline { kind, stages, virtual_stages, micro_batches } = pipeline;
        for rank in 0..stages {
            let found = in_flight(&pipeline.schedule(rank));
            prop_assert_eq!(found, pipeline.in_flight_max(rank));
            match kind {
                Kind::GPipe => prop_assert_eq!(found, micro_batches),
                Kind::OneForwardOneBackward => prop_assert_eq!(found, micro_batches.min(stages - rank)),
                // Of P V pieces of a micro-batch each, as without interleaving, and P - 1 more: Korthikanti et al. 2022
                // (<https://arxiv.org/abs/2205.05198>), section 4.2.3, a factor of 1 + (P - 1) / (P V).
                Kind::Interleaved => prop_assert!(found < stages * virtual_stages + stages),
            }
        }
    }

    #[test]
    fn what_an_action_takes_is_what_another_gives(pipeline in pipelines()) {
        for rank in 0..pipeline.stages() {
            for action in pipeline.schedule(rank) {
                if let Some((other, input)) = pipeline.before(rank, action) {
                    prop_assert_eq!(pipeline.after(other, input), Some((rank, action)));
                    prop_assert!(other != rank);
                }
            }
        }
    }

    #[test]
    fn what_a_rank_sends_to_another_is_used_in_the_order_in_which_it_was_sent(pipeline in pipelines()) {
        let ranks = || 0..pipeline.stages();
        for (from, to) in ranks().flat_map(|from| ranks().map(move |to| (from, to))) {
            let sends = pipeline.schedule(from).into_iter().filter_map(|action| pipeline.after(from, action));
            let sent: Vec<Action> = sends.filter(|(rank, _)| *rank == to).map(|(_, action)| action).collect();
            let uses = |action: &Action| pipeline.before(to, *action).is_some_and(|(rank, _)| rank == from);
            let used: Vec<Action> = pipeline.schedule(to).into_iter().filter(uses).collect();
            prop_assert_eq!(sent, used);
        }
    }

    #[test]
    fn a_swap_of_two_actions_is_noticed(stages in 2usize..7, more in 1usize..8) {
        let pipeline = Pipeline::new(Kind::OneForwardOneBackward, stages, 1, stages + more).expect("a pipeline");
        let good = schedules(pipeline);
        prop_assert!(even(pipeline, &good, 2.0).is_ok());

        // The last rank wants its last micro-batch first, which the others give when they have had gradients.
        let mut stuck = good.clone();
        let last = stuck[stages - 1].len() - 2;
        stuck[stages - 1][..=last].rotate_right(1);
        let is_stuck = matches!(even(pipeline, &stuck, 2.0), Err(TimelineError::Stuck { .. }));
        prop_assert!(is_stuck);

        // A backward pass before its forward pass reads what is not there.
        let mut early = good.clone();
        early[stages - 1].swap(0, 1);
        let is_early = matches!(even(pipeline, &early, 2.0), Err(TimelineError::NotThere { .. }));
        prop_assert!(is_early);

        // One that is there twice, and one that is not there.
        let mut twice = good.clone();
        let first = twice[0][0];
        twice[0].insert(1, first);
        let is_twice = matches!(even(pipeline, &twice, 2.0), Err(TimelineError::Superfluous { .. }));
        prop_assert!(is_twice);
        let mut missing = good;
        missing[0].pop();
        let is_missing = matches!(even(pipeline, &missing, 2.0), Err(TimelineError::Missing { .. }));
        prop_assert!(is_missing);
    }
}

#[test]
fn gpipe_keeps_more_than_one_forward_one_backward() {
    let of = |kind| Pipeline::new(kind, 4, 1, 8).expect("a pipeline");
    let bound = of(Kind::OneForwardOneBackward).in_flight_max(0);
    assert_eq!(bound, 4);
    assert_eq!(in_flight(&of(Kind::OneForwardOneBackward).schedule(0)), bound);
    // The control: the other schedule breaks the bound.
    assert_eq!(in_flight(&of(Kind::GPipe).schedule(0)), 8);
}

#[test]
fn a_warm_up_that_is_too_short_makes_the_bubble_longer_and_uneven_pieces_do() {
    let pipeline = Pipeline::new(Kind::OneForwardOneBackward, 4, 1, 8).expect("a pipeline");
    let mut lazy = schedules(pipeline);
    // The first rank as if it were the second: it waits for a gradient that is one rank further away.
    lazy[0] = pipeline.schedule(1);
    let found = even(pipeline, &lazy, 2.0).expect("a step").bubble();
    assert!(found > pipeline.bubble() + 0.1, "{found}");
    // As if it were the third, it has no micro-batch left to give while the others wait for one.
    lazy[0] = pipeline.schedule(2);
    assert!(matches!(even(pipeline, &lazy, 2.0), Err(TimelineError::Stuck { .. })));
    let uneven = Costs { compute: |rank, _| if rank == 1 { 2.0 } else { 1.0 }, travel: |_, _| 0.0 };
    let found = timeline(pipeline, &schedules(pipeline), uneven).expect("a step");
    // The slow rank is never idle; before it one forward pass of the rank before it, behind it that one's backward pass.
    assert_eq!((found.busy[1], found.end), (32.0, 34.0));
}

#[test]
fn interleaved_as_in_figure_4_of_narayanan_et_al() {
    let pipeline = Pipeline::new(Kind::Interleaved, 4, 2, 8).expect("a pipeline");
    let text: Vec<String> = pipeline
        .schedule(3)
        .iter()
        .take(12)
        .map(|action| {
            let pass = if action.pass == Pass::Forward { "F" } else { "B" };
            format!("{pass}{}{}", action.micro_batch + 1, ["", "'"][action.piece])
        })
        .collect();
    assert_eq!(text.join(" "), "F1 F2 F3 F4 F1' B1' F2' B2' F3' B3' F4' B4'");
}

#[test]
fn pipelines_that_cannot_be_are_refused_by_name() {
    let check = |kind, stages, virtual_stages, micro_batches, expected: &str| {
        let error = Pipeline::new(kind, stages, virtual_stages, micro_batches).expect_err("no such pipeline");
        assert_eq!(error.to_string(), expected);
    };
    check(Kind::GPipe, 0, 1, 1, "expected at least 1 stage, 1 virtual stage and 1 micro-batch, found 0, 1 and 1");
    check(
        Kind::OneForwardOneBackward,
        2,
        2,
        4,
        "OneForwardOneBackward: expected 1 virtual stage, found 2; several are for the interleaved schedule",
    );
    check(
        Kind::Interleaved,
        4,
        1,
        4,
        "interleaved: expected at least 2 stages and 2 virtual stages, found 4 and 1; 1F1B serves there",
    );
    check(
        Kind::Interleaved,
        4,
        2,
        6,
        "interleaved: expected a multiple of the 4 stages as number of micro-batches, found 6; 8 would do, or 1F1B",
    );
}
