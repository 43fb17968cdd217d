//! Ranks that say of another that they lost it.

use super::*;
use crate::wire::control::Lost;

#[test]
fn a_rank_that_lost_one_that_has_left_ends_the_run_by_both_names() {
    let mut scene = Scene::running(2);
    scene.pass(ms(500), busy);
    scene.says(1, leaving("hash", 0));
    scene.says(0, From::Lost(Lost { rank: 1, why: "connection reset".into() }));
    let waiting = |worker, _| (worker == 0).then(|| mark(3, 1, "waiting for the other ranks"));
    scene.pass(PEER_TIMEOUT / 4, waiting);
    scene.goes_on();
    scene.pass(BEAT, waiting);
    scene.ended(
        "rank 0 (host box, process 100) lost rank 1 (host box, process 101), which has left after its last step: \
         connection reset\n  rank 0 (host box, process 100): waiting for the other ranks\n  rank 1 (host box, process 101): \
         has left",
        75,
    );
}

#[test]
fn two_living_ranks_that_lost_each_other_are_both_named() {
    let run = |beats: &dyn Fn(usize) -> bool, then: Option<(usize, From)>, for_: Duration| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), busy);
        scene.says(2, From::Lost(Lost { rank: 1, why: "connection reset".into() }));
        scene.says(1, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        if let Some((worker, word)) = then {
            scene.says(worker, word);
        }
        scene.pass(ms(500), |worker, now| if beats(worker) { busy(worker, now) } else { None });
        scene.goes_on();
        scene.pass(for_, |worker, now| if beats(worker) { busy(worker, now) } else { None });
        scene
    };
    let text = "in the forward pass";
    run(&|_| true, None, BEAT).ended(
        &format!(
            "rank 1 (host box, process 101) lost rank 2 (host box, process 102), though both are alive: connection \
             closed\n  rank 0 (host box, process 100): {text}\n  rank 1 (host box, process 101): {text}\n  rank 2 \
             (host box, process 102): {text}"
        ),
        75,
    );
    // One of the two is dead, whether it has reported a loss itself or not: nobody says that it lives.
    let scene = run(&|worker| worker != 1, None, ms(1500));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent for 1.6 s"));
    // It has left: whoever still needs it would be found waiting.
    run(&|_| true, Some((1, leaving("abc", 0))), Duration::from_secs(60)).goes_on();
}

#[test]
fn a_report_about_a_rank_that_turns_out_dead_blames_the_dead_one() {
    let check = |found: &dyn Fn(&mut Scene), then: Duration, how: &str| {
        let mut scene = Scene::running(3);
        scene.pass(ms(500), busy);
        scene.says(0, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        scene.says(1, From::Lost(Lost { rank: 2, why: "connection closed".into() }));
        scene.goes_on();
        found(&mut scene);
        scene.pass(then, busy_but(2));
        let verdict = &scene.endings[0].verdict;
        assert!(verdict.starts_with(&format!("rank 2 (host box, process 102) {how}")), "{verdict}");
    };
    check(&|scene| scene.exits(2, "was killed by SIGKILL", None), ms(300), "was killed by SIGKILL");
    check(&|scene| scene.closes(2), ms(300), "is gone: it closed its connection without a word");
    check(&|scene| scene.says(2, failing("disk full", 1)), Duration::ZERO, "failed: disk full");
    check(&|_| {}, ms(1600), "has been silent for 1.6 s");
}

/// A dead network card: the connections notice at once, silence takes longer. Nobody is called alive meanwhile.
#[test]
fn a_report_never_ends_the_run_before_silence_has_had_its_time() {
    let mut scene = Scene::running(2);
    scene.pass(ms(300), busy);
    scene.pass(ms(600), busy_but(1));
    scene.says(0, From::Lost(Lost { rank: 1, why: "timed out".into() }));
    scene.pass(ms(900), busy_but(1));
    scene.goes_on();
    scene.pass(BEAT, busy_but(1));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) has been silent for 1.6 s"));
}

#[test]
fn reports_about_nobody_are_ignored() {
    let mut scene = Scene::running(2);
    for rank in [0, 2, u32::MAX] {
        scene.says(0, From::Lost(Lost { rank, why: "nonsense".into() }));
    }
    scene.pass(Duration::from_secs(10), busy);
    scene.goes_on();
}
