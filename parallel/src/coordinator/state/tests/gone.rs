//! Connections and processes that end, with last words and without.

use super::*;

#[test]
fn a_closed_connection_without_a_word_is_blamed_after_a_moment() {
    let run = |word: Option<From>| {
        let mut scene = Scene::running(2);
        scene.pass(ms(500), busy);
        scene.closes(1);
        scene.pass(ms(200), busy_but(1));
        scene.goes_on();
        if let Some(word) = word {
            scene.says(1, word);
        }
        scene.pass(BEAT, busy_but(1));
        scene
    };
    let scene = run(None);
    scene.ended(
        "rank 1 (host box, process 101) is gone: it closed its connection without a word; it was last seen at in the \
         forward pass\n  rank 0 (host box, process 100): in the forward pass",
        75,
    );
    // Nothing is sent to a connection that is gone.
    assert_eq!(scene.aborted(), [0]);
    run(Some(leaving("abc", 0))).goes_on();
}

#[test]
fn a_process_that_a_signal_ended_is_blamed_after_a_moment_with_what_the_others_lack() {
    let mut scene = Scene::running(2);
    scene.exits(1, "was killed by SIGKILL", None);
    scene.goes_on();
    let lost = |why: &str| From::Lost(crate::wire::control::Lost { rank: 1, why: why.into() });
    scene.says(0, lost("its stream to us ended"));
    scene.says(0, lost("step 3: rank 1 is lost; this rank waited for rank 1's part of bucket 2, parameter norm"));
    scene.pass(ms(250), busy_but(1));
    scene.ended(
        "rank 1 (host box, process 101) was killed by SIGKILL\n  rank 0 (host box, process 100): in the forward pass; it \
         says: step 3: rank 1 is lost; this rank waited for rank 1's part of bucket 2, parameter norm",
        75,
    );
}

#[test]
fn a_process_of_the_same_number_on_another_host_is_not_blamed() {
    let mut scene = Scene::running(2);
    scene.state.options.host = "another box".into();
    scene.exits(1, "was killed by SIGKILL", None);
    scene.ended("process 101 was killed by SIGKILL before it had joined", 75);
}

#[test]
fn the_signal_is_named_also_when_the_connection_was_seen_first() {
    let mut scene = Scene::running(2);
    scene.closes(1);
    scene.now += ms(50);
    scene.exits(1, "was killed by SIGSEGV", None);
    scene.pass(ms(250), busy_but(1));
    assert!(scene.endings[0].verdict.starts_with("rank 1 (host box, process 101) was killed by SIGSEGV"));
}

#[test]
fn last_words_win_over_an_exit_code_and_without_them_the_code_is_the_runs() {
    let run = |(code, word): (i32, Option<From>), closed_first: bool| {
        let mut scene = Scene::running(2);
        if closed_first {
            scene.closes(1);
            scene.now += ms(100);
        }
        scene.exits(1, &format!("exited with code {code}"), Some(code));
        scene.pass(ms(100), busy_but(1));
        scene.goes_on();
        if let Some(word) = word {
            scene.says(1, word);
        }
        scene.pass(ms(200), busy_but(1));
        scene
    };
    for closed_first in [false, true] {
        run((1, Some(failing("disk full: /data", 1))), closed_first)
            .ended("rank 1 (host box, process 101) failed: disk full: /data", 1);
        // 101 is a panic, which comes again.
        for (exit, code) in [(1, 1), (2, 2), (101, 1), (75, 75), (7, 75)] {
            let verdict = format!(
                "rank 1 (host box, process 101) exited with code {exit}\n  rank 0 (host box, process 100): in the forward pass"
            );
            run((exit, None), closed_first).ended(&verdict, code);
        }
        // It left in good order: how its process ends does not matter any more.
        run((1, Some(leaving("abc", 0))), closed_first).goes_on();
    }
}

#[test]
fn a_failure_is_never_a_success() {
    let check = |code: u32, expected: u8| {
        let mut scene = Scene::running(2);
        scene.says(0, failing("disk full", code));
        scene.ended("rank 0 (host box, process 100) failed: disk full", expected);
        assert_eq!(scene.aborted(), [0, 1]);
    };
    check(1, 1);
    check(2, 2);
    check(75, 75);
    check(0, 1);
    check(256, 1);
    check(u32::MAX, 1);
}

#[test]
fn a_local_process_that_ends_before_it_has_joined_ends_the_start() {
    let check = |code: Option<i32>, expected: u8| {
        let mut scene = Scene::new(options(2));
        scene.join(0, None);
        scene.exits(5, "has ended", code);
        scene.ended("process 105 has ended before it had joined", expected);
        assert_eq!(scene.aborted(), [0]);
    };
    check(Some(2), 2);
    check(Some(0), 75);
    check(Some(-1), 75);
    check(Some(256), 75);
    check(None, 75);
}

#[test]
fn what_lies_between_ranks_ends_a_run_with_where_all_are_and_other_failures_do_not() {
    let run = |between_ranks| {
        let mut scene = Scene::running(2);
        scene.pass(ms(100), busy);
        let error = Some("rank 1 is at a, rank 0 at b".to_owned());
        scene.says(1, From::Leaving(Leaving { error, code: 1, between_ranks, ..Leaving::default() }));
        scene
    };
    let failed = "rank 1 (host box, process 101) failed: rank 1 is at a, rank 0 at b";
    let all = "\n  rank 0 (host box, process 100): in the forward pass\n  rank 1 (host box, process 101): in the forward pass";
    run(true).ended(&format!("{failed}{all}"), 1);
    run(false).ended(failed, 1);
}
