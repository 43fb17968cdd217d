//! How a run ends, once at most.

use proptest::prelude::*;

use super::*;
use crate::wire::control::{Committed, Lost};

#[test]
fn a_run_ends_when_all_have_left_and_their_parameters_are_equal() {
    let check = |words: &[(&str, u32)], stop: bool, verdict: &str, code: u8| {
        let mut scene = Scene::running(words.len());
        if stop {
            scene.give(Input::Stop);
            assert!((0..words.len()).all(|rank| scene.heard(rank) == [To::Stop(Stop {})]));
        }
        for (rank, &(hash, code)) in words.iter().enumerate().rev() {
            scene.goes_on();
            scene.says(rank, leaving(hash, code));
            scene.closes(rank);
            // Who has left may be silent for as long as the others need.
            if rank > 0 {
                scene.pass(
                    Duration::from_secs(10),
                    move |worker, now| if worker < rank { busy(worker, now) } else { None },
                );
            }
        }
        scene.ended(verdict, code);
        assert!(scene.aborted().is_empty());
    };
    check(&[("abc", 0)], false, "", 0);
    check(&[("abc", 0), ("abc", 0), ("abc", 0)], false, "", 0);
    // Stopped: by the coordinator's word, and by a signal to the workers alone.
    check(&[("abc", 75), ("abc", 75)], true, "", 75);
    check(&[("abc", 75), ("abc", 75)], false, "", 75);
    // The word came after the last step: the run is done.
    check(&[("abc", 0), ("abc", 0)], true, "", 0);
    let differ = "the replicas differ at the end: the parameters of rank 0 (host box, process 100) have BLAKE3 abc, those \
                  of rank 2 (host box, process 102) have BLAKE3 abd";
    let differ = differ.replace("have BLAKE3 abd", "have abd");
    check(&[("abc", 0), ("abc", 0), ("abd", 0)], false, &differ, 1);
}

#[test]
fn a_stop_before_the_first_step_ends_the_run() {
    for joined in 0..=2 {
        let mut scene = Scene::new(options(2));
        (0..joined).for_each(|worker| scene.join(worker, None));
        scene.give(Input::Stop);
        scene.ended("stopped before the first step: go on with --resume", 75);
        assert_eq!(scene.aborted(), (0..joined).collect::<Vec<_>>());
    }
}

#[test]
fn a_second_stop_says_nothing_new() {
    let mut scene = Scene::running(1);
    scene.give(Input::Stop);
    scene.give(Input::Stop);
    assert_eq!(scene.heard(0), [To::Stop(Stop {})]);
}

/// One input of each kind, from a rank that is known, from another, and from nobody.
fn anything() -> Vec<Input> {
    let mut all = vec![Input::Stop, Input::Tick];
    for connection in [0, 1, 99] {
        let whats = [
            From::Beat(mark(9, 9, "late")),
            prepared(0, &[("late", "yes")]),
            From::Seen(Seen::default()),
            From::Holds(Holds::default()),
            From::Lost(Lost { rank: 0, why: "late".into() }),
            part(9, "late"),
            From::Committed(Committed { step: 9, error: None }),
            leaving("late", 0),
            failing("late", 1),
            From::Hello(hello(0, None)),
        ];
        all.extend(whats.map(|what| Input::Message { connection, what }));
        all.push(Input::Closed { connection, how: "late".into() });
        all.push(Input::Exited { pid: 100 + connection as u32, how: "late".into(), code: None });
        all.push(Input::Exited { pid: 100 + connection as u32, how: "late".into(), code: Some(1) });
    }
    all
}

#[test]
fn nothing_after_the_end_changes_it() {
    let killed = |scene: &mut Scene| {
        scene.exits(1, "was killed by SIGKILL", None);
        scene.pass(ms(300), busy_but(1));
    };
    let left = |scene: &mut Scene| (0..2).for_each(|rank| scene.says(rank, leaving("abc", 0)));
    for end in [&killed as &dyn Fn(&mut Scene), &left] {
        for first in 0..anything().len() {
            let mut scene = Scene::running(2);
            end(&mut scene);
            let (endings, sent) = (scene.endings.clone(), (scene.heard(0), scene.heard(1)));
            assert_eq!(endings.len(), 1);
            let mut inputs = anything();
            inputs.rotate_left(first);
            for input in inputs {
                scene.give(input);
                scene.now += ms(10);
            }
            scene.pass(Duration::from_secs(5), |_, _| None);
            assert_eq!((scene.endings.clone(), (scene.heard(0), scene.heard(1))), (endings, sent));
        }
    }
}

proptest! {
    /// Whatever comes, in whatever order: no panic, one end at most, and a rank for nobody who is not welcome.
    #[test]
    fn any_inputs_end_a_run_once_at_most(
        phase in 0usize..3,
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0u64..400), 1..60),
    ) {
        let mut scene = if phase == 0 { Scene::new(options(2)) } else { Scene::running(2) };
        let mut inputs = anything();
        for worker in [0, 1, 2] {
            inputs.push(Input::Hello { connection: worker as u64, hello: hello(worker, None), differences: Vec::new() });
        }
        for (pick, wait) in picks {
            scene.now += ms(wait);
            scene.give(inputs[pick.index(inputs.len())].clone());
        }
        prop_assert!(scene.endings.len() <= 1);
        prop_assert!(scene.state.workers.len() <= 2);
    }
}
