//! Ranks that are alive and get nowhere, or only wait.

use super::*;

/// Two ranks take a step every `step`, for some steps, and then rank 1 stops in one while rank 0 waits.
fn stalls(step: Duration, steps: u32, for_: Duration, text: &str) -> Scene {
    let mut scene = Scene::running(2);
    let turning = step * steps;
    let step_of = move |now: Duration| 1 + (now.min(turning).as_millis() / step.as_millis()) as u64;
    scene.pass(turning, |_, now| Some(mark(step_of(now), now.as_millis() as u64, "in the forward pass")));
    scene.goes_on();
    scene.pass(for_, |worker, now| {
        let text = if worker == 1 { text } else { "waiting for the other ranks" };
        Some(mark(step_of(now), turning.as_millis() as u64, text))
    });
    scene
}

#[test]
fn a_living_rank_without_progress_is_blamed_only_after_ten_of_its_steps() {
    // Steps of 1 s: ten of them are more than the timeout.
    let text = "in the forward pass";
    stalls(ms(1000), 3, ms(10_000), text).goes_on();
    stalls(ms(1000), 3, ms(10_100), text).ended(
        "rank 1 (host box, process 101) is alive but has made no progress for 10.1 s; it was last seen at in the \
         forward pass\n  rank 0 (host box, process 100): waiting for the other ranks",
        75,
    );
    // Steps of 100 ms: the timeout is more.
    stalls(ms(100), 30, ms(2000), text).goes_on();
    let scene = stalls(ms(100), 30, ms(2100), text);
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but"));
    // Before the first step is complete nobody knows how long one takes.
    stalls(ms(1000), 0, Duration::from_secs(3600), text).goes_on();
    // One long first step, in which everything was compiled, does not count for all.
    let mut scene = Scene::running(2);
    let text = |worker: usize| if worker == 1 { "in the backward pass" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(100), |_, now| Some(mark(1, now.as_millis() as u64, "in the forward pass")));
    scene.pass(ms(3000), |_, now| Some(mark(now.as_millis() as u64 / 100, now.as_millis() as u64, "")));
    scene.pass(ms(2100), |worker, _| Some(mark(1030, 1, text(worker))));
    scene.pass(ms(2100), |worker, _| Some(mark(1030, 1, text(worker))));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but"));
}

#[test]
fn a_slow_step_with_progress_is_never_blamed() {
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    // Nothing is as long as this step, but every now and then something gets done.
    scene.pass(Duration::from_secs(3600), |worker, now| {
        let text = if worker == 1 { "in the forward pass" } else { "waiting for the other ranks" };
        Some(mark(3, if worker == 1 { now.as_secs() } else { 0 }, text))
    });
    scene.goes_on();
}

#[test]
fn who_only_waits_is_no_culprit_unless_all_do() {
    // Rank 0 waits for longer than its limit, while rank 1 still works.
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    scene.pass(Duration::from_secs(60), |worker, now| {
        let text = if worker == 1 { "in the forward pass" } else { "waiting for the other ranks" };
        Some(mark(4, if worker == 1 { now.as_millis() as u64 } else { 0 }, text))
    });
    scene.goes_on();
    scene.pass(Duration::from_secs(11), |_, _| Some(mark(4, 1, "waiting for the other ranks")));
    scene.ended(
        "no rank makes progress and all wait for each other\n  rank 0 (host box, process 100): waiting for the other \
         ranks\n  rank 1 (host box, process 101): waiting for the other ranks",
        75,
    );
}

#[test]
fn ranks_that_all_wait_in_their_first_step_do_not_wait_for_ever() {
    let mut scene = Scene::running(2);
    scene.pass(ms(1900), |_, _| Some(mark(1, 1, "waiting for the other ranks")));
    scene.goes_on();
    scene.pass(ms(400), |_, _| Some(mark(1, 1, "waiting for the other ranks")));
    assert!(scene.endings[0].verdict.starts_with("no rank makes progress and all wait for each other"));
    // The control: one of them computes its first step.
    let mut scene = Scene::running(2);
    let text = |worker| if worker == 0 { "in the forward pass" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(3600), |worker, _| Some(mark(1, 1, text(worker))));
    scene.goes_on();
}

#[test]
fn what_no_step_measures_has_twenty_times_as_long() {
    let mut scene = Scene::running(2);
    let text = |worker| if worker == 1 { "export" } else { "waiting for the other ranks" };
    scene.pass(Duration::from_secs(39), |worker, _| Some(mark(1, 1, text(worker))));
    scene.goes_on();
    scene.pass(Duration::from_secs(2), |worker, _| Some(mark(1, 1, text(worker))));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) is alive but has made no progress"));
}

#[test]
fn who_waits_for_a_rank_that_has_left_does_not_wait_for_ever() {
    let mut scene = Scene::running(2);
    scene.pass(ms(3000), busy);
    scene.says(1, leaving("abc", 0));
    scene.closes(1);
    let waiting = |worker, _| (worker == 0).then(|| mark(4, 1, "waiting for the other ranks"));
    scene.pass(Duration::from_secs(10), waiting);
    scene.goes_on();
    scene.pass(Duration::from_secs(2), waiting);
    scene.ended(
        "no rank makes progress and all wait for each other\n  rank 0 (host box, process 100): waiting for the other \
         ranks\n  rank 1 (host box, process 101): has left",
        75,
    );
}

#[test]
fn a_rank_that_sticks_before_a_heartbeat_has_shown_a_whole_step_is_blamed_all_the_same() {
    let run = |resumed: u64, first_seen: u64| {
        let mut scene = Scene::new(options(2));
        (0..2).for_each(|worker| scene.join(worker, None));
        (0..2).for_each(|worker| scene.says(worker, prepared(worker, &[])));
        (0..2).for_each(|worker| scene.says(worker, From::Seen(Seen { nonces: vec![nonce(0), nonce(1)] })));
        let checkpoints = if resumed > 0 { vec![held(resumed, "id")] } else { Vec::new() };
        (0..2).for_each(|worker| scene.says(worker, From::Holds(Holds { checkpoints: checkpoints.clone() })));
        // Steps shorter than the time between two heartbeats: the first mark with a step may be of a later one.
        scene.pass(ms(500), |_, _| Some(mark(0, 1, "starting")));
        let sticks = |worker: usize, now: Duration| match worker {
            0 => Some(mark(first_seen, 2, "in the backward pass")),
            _ => Some(mark(first_seen, now.as_millis() as u64, "waiting for the other ranks")),
        };
        scene.pass(ms(4000), sticks);
        scene
    };
    for resumed in [0, 7] {
        run(resumed, resumed + 3).ended(
            "rank 0 (host box, process 100) is alive but has made no progress for 2.1 s; it was last seen at in the backward \
             pass\n  rank 1 (host box, process 101): waiting for the other ranks",
            75,
        );
        // The control: in the first step of this start nobody knows how long one may take.
        run(resumed, resumed + 1).goes_on();
    }
}
