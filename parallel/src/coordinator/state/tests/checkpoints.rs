//! Parts, commits, and what all hear of them.

use super::*;
use crate::wire::control::{Committed, Settled};

fn settled(scene: &Scene, worker: usize) -> Vec<Settled> {
    let of = |what| if let To::Settled(settled) = what { Some(settled) } else { None };
    scene.heard(worker).into_iter().filter_map(of).collect()
}

fn commits(scene: &Scene, worker: usize) -> Vec<(u64, String, Vec<String>)> {
    let of = |what| if let To::Commit(commit) = what { Some((commit.step, commit.id, commit.parts)) } else { None };
    scene.heard(worker).into_iter().filter_map(of).collect()
}

fn commit(scene: &mut Scene, worker: usize, step: u64, error: Option<&str>) {
    scene.says(worker, From::Committed(Committed { step, error: error.map(str::to_owned) }));
}

#[test]
fn a_checkpoint_is_committed_in_each_folder_after_all_parts_and_settled_after_all_commits() {
    let mut scene = Scene::placed(&[0, 1, 0, 1]);
    for rank in [2, 0, 3] {
        scene.says(rank, part(5, &format!("part {rank}")));
    }
    assert!((0..4).all(|rank| scene.heard(rank).is_empty()), "a part is missing");
    scene.says(1, part(5, "part 1"));
    let [(step, id, parts)] = &commits(&scene, 0)[..] else { panic!("{:?}", scene.sent) };
    assert_eq!((*step, &parts[..]), (5, &["part 0".to_owned(), "part 2".into()][..]));
    let of_one = vec![(5, id.clone(), vec!["part 1".to_owned(), "part 3".into()])];
    assert_eq!((commits(&scene, 1), commits(&scene, 2), commits(&scene, 3)), (of_one, vec![], vec![]));
    // A part that comes twice, and answers of ranks that were not asked, change nothing.
    scene.says(1, part(5, "part 1"));
    commit(&mut scene, 3, 5, Some("nobody asked me"));
    commit(&mut scene, 0, 6, None);
    assert_eq!(commits(&scene, 0).len(), 1);
    commit(&mut scene, 1, 5, None);
    assert!((0..4).all(|rank| settled(&scene, rank).is_empty()), "a commit is missing");
    commit(&mut scene, 0, 5, None);
    let all = vec![Settled { step: 5, id: id.clone(), error: None }];
    assert!((0..4).all(|rank| settled(&scene, rank) == all));
    // Another step has another id, and so has another start of the group.
    (0..4).for_each(|rank| scene.says(rank, part(6, "part")));
    assert_ne!(commits(&scene, 0)[1].1, *id);
    scene.goes_on();
}

#[test]
fn a_checkpoint_fails_for_all_when_a_part_or_a_commit_fails() {
    let mut scene = Scene::placed(&[0, 1]);
    let failed = From::Part(Part { step: 5, json: String::new(), error: Some("disk full: /b".into()) });
    scene.says(1, failed);
    scene.goes_on();
    assert!(settled(&scene, 0).is_empty(), "rank 0 may still be writing");
    scene.says(0, part(5, "part 0"));
    let errors = |scene: &Scene, rank| settled(scene, rank).into_iter().map(|s| (s.step, s.error)).collect::<Vec<_>>();
    let first = (5, Some("rank 1: disk full: /b".to_owned()));
    assert!(commits(&scene, 0).is_empty() && commits(&scene, 1).is_empty());
    assert!((0..2).all(|rank| errors(&scene, rank) == [first.clone()]));
    // The next one: all parts are there, one lead cannot rename.
    (0..2).for_each(|rank| scene.says(rank, part(6, "part")));
    commit(&mut scene, 0, 6, Some("read-only: /a"));
    commit(&mut scene, 1, 6, None);
    let second = (6, Some("rank 0: read-only: /a".to_owned()));
    assert!((0..2).all(|rank| errors(&scene, rank) == [first.clone(), second.clone()]));
    // And one that is well.
    (0..2).for_each(|rank| scene.says(rank, part(7, "part")));
    (0..2).for_each(|rank| commit(&mut scene, rank, 7, None));
    assert_eq!(errors(&scene, 1)[2], (7, None));
    scene.goes_on();
}

#[test]
fn checkpoints_that_somebody_never_writes_do_not_pile_up() {
    let mut scene = Scene::running(2);
    for step in 1..=8 {
        scene.says(0, part(step, "part"));
    }
    assert!(settled(&scene, 0).is_empty());
    for step in 9..=1000 {
        scene.says(0, part(step, "part"));
    }
    let given_up = settled(&scene, 1);
    assert_eq!(given_up.iter().map(|settled| settled.step).collect::<Vec<_>>(), (1..=992).collect::<Vec<_>>());
    let why = "rank 1 has not answered, and 8 checkpoints are under way";
    assert!(given_up.iter().all(|settled| settled.error.as_deref() == Some(why)));
    // The newest still come through.
    scene.says(1, part(1000, "part"));
    commit(&mut scene, 0, 1000, None);
    assert_eq!(settled(&scene, 1).last().map(|settled| settled.error.clone()), Some(None));
}

#[test]
fn a_commit_that_is_too_large_for_a_message_fails_by_name() {
    let mut scene = Scene::running(2);
    let large = "x".repeat(crate::coordinator::MESSAGE_BYTES_MAX / 2);
    (0..2).for_each(|rank| scene.says(rank, part(5, &large)));
    assert!(commits(&scene, 0).is_empty());
    let error = settled(&scene, 1)[0].error.clone().expect("too large");
    assert!(error.starts_with("the list of its parts has 67109920 bytes"), "{error}");
    assert!(error.ends_with("bytes, a message at most 67108864"), "{error}");
    scene.goes_on();
}

#[test]
fn a_checkpoint_before_the_start_is_no_checkpoint() {
    let mut scene = Scene::new(options(1));
    scene.join(0, None);
    scene.says(0, part(5, "part"));
    commit(&mut scene, 0, 5, None);
    assert_eq!(scene.heard(0).len(), 1);
    scene.goes_on();
}
