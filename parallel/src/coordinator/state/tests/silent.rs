//! Ranks that say nothing any more, and a coordinator that slept.

use super::*;
use crate::wire::control::Lost;

#[test]
fn the_silent_rank_is_named_after_three_quarters_of_the_timeout() {
    let run = |silent: Option<usize>| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), |_, _| Some(mark(7, 70, "step 7, waiting for the other ranks")));
        scene.says(1, From::Beat(mark(7, 71, "step 7, in the backward pass, 3 buckets full")));
        let beat =
            move |worker, _| (Some(worker) != silent).then(|| mark(7, 70, "step 7, waiting for the other ranks"));
        scene.pass(ms(1500), beat);
        scene.goes_on();
        scene.pass(BEAT, beat);
        scene
    };
    let scene = run(Some(1));
    scene.ended(
        "rank 1 (host box, process 101) has been silent for 1.6 s; it was last seen at step 7, in the backward pass, \
         3 buckets full\n  rank 0 (host box, process 100): step 7, waiting for the other ranks\n  rank 2 (host box, \
         process 102): step 7, waiting for the other ranks",
        75,
    );
    assert_eq!(scene.aborted(), [0, 1, 2]);
    // The same inputs with its heartbeats.
    run(None).goes_on();
}

#[test]
fn of_several_silent_ranks_the_one_silent_for_longest_is_named_and_the_others_shown() {
    let mut scene = Scene::running(3);
    scene.pass(ms(1600), |worker, now| (worker == 0 || (worker == 1 && now < ms(300))).then(|| mark(0, 0, "busy")));
    scene.ended(
        "rank 2 (host box, process 102) has been silent for 1.6 s\n  rank 0 (host box, process 100): busy\n  rank 1 \
         (host box, process 101): busy, silent for 1.4 s",
        75,
    );
}

#[test]
fn silence_also_ends_a_start() {
    let mut scene = Scene::new(options(2));
    scene.join(0, None);
    scene.pass(ms(1600), |_, _| None);
    scene.ended("rank 0 (host box, process 100) has been silent for 1.6 s", 75);
}

#[test]
fn a_coordinator_that_slept_blames_nobody() {
    let check = |before: &dyn Fn(&mut Scene), slept: Duration, blames: bool| {
        let mut scene = Scene::running(2);
        scene.pass(ms(500), busy);
        before(&mut scene);
        scene.now += slept;
        scene.give(Input::Tick);
        assert_eq!(!scene.endings.is_empty(), blames, "{:?}", scene.endings);
        scene
    };
    let nothing = |_: &mut Scene| {};
    let mut scene = check(&nothing, Duration::from_secs(3600), false);
    // From there on everything counts again.
    scene.pass(ms(1500), |worker, now| if worker == 0 { busy(worker, now) } else { None });
    scene.goes_on();
    scene.pass(BEAT, busy);
    scene.goes_on();
    scene.pass(ms(1600), |worker, now| if worker == 0 { busy(worker, now) } else { None });
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent"));
    // What was seen shortly before has its time to be cleared up.
    let closed = |scene: &mut Scene| scene.closes(1);
    let mut scene = check(&closed, Duration::from_secs(3600), false);
    scene.says(1, failing("disk full", 1));
    scene.ended("rank 1 (host box, process 101) failed: disk full", 1);
    let lost = |scene: &mut Scene| scene.says(0, From::Lost(Lost { rank: 1, why: "connection closed".into() }));
    let mut scene = check(&lost, Duration::from_secs(3600), false);
    scene.exits(1, "was killed by SIGKILL", None);
    scene.pass(ms(300), busy_but(1));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) was killed by SIGKILL"));
    // The control: a gap that is not yet sleep.
    check(&closed, ms(500), true);
}

#[test]
fn the_sleep_of_the_coordinator_does_not_count_against_the_start() {
    let mut scene = Scene::new(options(2));
    scene.join(0, None);
    scene.give(Input::Tick);
    scene.now += Duration::from_secs(3600);
    scene.give(Input::Tick);
    scene.pass(Duration::from_secs(59), |_, _| Some(mark(0, 0, "starting")));
    scene.goes_on();
    scene.pass(Duration::from_secs(2), |_, _| Some(mark(0, 0, "starting")));
    assert!(scene.endings[0].verdict.contains("\n  rank 1 has not joined\n"));
}

#[test]
fn the_intervals_are_sound_for_any_timeout() {
    for timeout in [Duration::ZERO, ms(1), PEER_TIMEOUT, Duration::from_secs(30), Duration::MAX] {
        assert!(interval(timeout) >= ms(1) && interval(timeout) <= ms(500));
        assert!(silence(timeout) <= timeout);
    }
    assert_eq!((interval(PEER_TIMEOUT), silence(PEER_TIMEOUT)), (BEAT, ms(1500)));
}
