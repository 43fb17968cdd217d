//! From the first greeting to the first step.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::wire::control::{Peer, Start};

/// Walks all workers through the start; `pick` says whose next message comes next. Returns the rank of each worker.
fn walk(ranks: usize, wishes: &[Option<u32>], mut pick: impl FnMut(usize) -> usize) -> (Scene, Vec<usize>) {
    let mut scene = Scene::new(options(ranks));
    let mut stages = vec![0; ranks];
    loop {
        // A worker goes on when it has the answer to what it said last.
        let ready: Vec<usize> =
            (0..ranks).filter(|&worker| stages[worker] < 4 && scene.heard(worker).len() == stages[worker]).collect();
        let Some(&worker) = ready.get(pick(ready.len().max(1))) else { break };
        match stages[worker] {
            0 => scene.join(worker, wishes[worker]),
            1 => scene.says(worker, prepared(scene.rank(worker), &[("backend", "flex")])),
            2 => scene.says(worker, From::Seen(Seen { nonces: (0..ranks).map(nonce).collect() })),
            _ => {
                let checkpoints = if scene.rank(worker) == 0 { vec![held(4, "a"), held(8, "b")] } else { Vec::new() };
                scene.says(worker, From::Holds(Holds { checkpoints }));
            }
        }
        stages[worker] += 1;
        scene.now += ms(7);
        scene.give(Input::Tick);
    }
    let ranks = (0..ranks).map(|worker| scene.rank(worker)).collect();
    (scene, ranks)
}

/// Every worker heard the same, in the same order, and the peers stand at their ranks.
fn check_start(scene: &Scene, rank_of: &[usize]) {
    let ranks = rank_of.len();
    assert_eq!(rank_of.iter().copied().collect::<BTreeSet<_>>(), (0..ranks).collect());
    scene.goes_on();
    for worker in 0..ranks {
        let [To::Welcome(welcome), To::Look(look), To::Places(places), To::Start(start)] = &scene.heard(worker)[..]
        else {
            panic!("worker {worker} heard {:?}", scene.heard(worker));
        };
        assert_eq!((welcome.ranks as usize, &*welcome.recipe, &*welcome.name), (ranks, "steps = 3", "run"));
        assert_eq!((welcome.resume, welcome.peer_timeout_s), (true, 2.0));
        assert_eq!(look.nonces, (0..ranks).map(nonce).collect::<Vec<_>>());
        assert_eq!(places.lead_of, vec![0; ranks]);
        let Start { epoch, token, peers, from } = start;
        assert_eq!((*epoch, &**token, from), (7, "token", &Some(held(8, "b"))));
        for (worker, &rank) in rank_of.iter().enumerate() {
            let data_address = format!("127.0.0.1:{}", 1000 + rank);
            assert_eq!(peers[rank], Peer { data_address, host: "box".into(), pid: 100 + worker as u32 });
        }
    }
}

proptest! {
    #[test]
    fn any_order_of_messages_starts_the_same_run(
        ranks in prop::sample::select(vec![1usize, 2, 4]),
        wishing in any::<bool>(),
        order in Just((0u32..4).collect::<Vec<_>>()).prop_shuffle(),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 32),
    ) {
        let wishes = order.into_iter().filter(|&rank| rank < ranks as u32).map(|rank| wishing.then_some(rank));
        let wishes: Vec<_> = wishes.collect();
        let mut picks = picks.into_iter();
        let (scene, rank_of) = walk(ranks, &wishes, |n| picks.next().map_or(0, |pick| pick.index(n)));
        check_start(&scene, &rank_of);
        if wishing {
            prop_assert_eq!(rank_of, wishes.into_iter().flatten().map(|rank| rank as usize).collect::<Vec<_>>());
        }
    }
}

#[test]
fn ranks_go_by_wish_and_else_by_order() {
    let check = |wishes: &[Option<u32>], expected: &[usize]| {
        let mut scene = Scene::new(options(3));
        wishes.iter().enumerate().for_each(|(worker, &wish)| scene.join(worker, wish));
        let ranks: Vec<usize> = (0..wishes.len()).map(|worker| scene.rank(worker)).collect();
        assert_eq!(ranks, expected, "{wishes:?}");
    };
    check(&[None, None, None], &[0, 1, 2]);
    check(&[Some(1), None, None], &[1, 0, 2]);
    check(&[Some(2), Some(1), Some(0)], &[2, 1, 0]);
    check(&[None, Some(2), None], &[0, 2, 1]);
}

#[test]
fn a_worker_that_does_not_fit_is_refused_and_told_why() {
    // Rank 0 is taken.
    let refusal = |hello: Hello, differences: &[&str]| {
        let mut scene = Scene::new(options(2));
        scene.join(0, Some(0));
        let differences = differences.iter().map(|&key| key.to_owned()).collect();
        scene.give(Input::Hello { connection: 1, hello, differences });
        let refused = scene.refusal(1).clone();
        scene.goes_on();
        // The one that is in, and a good second one, are not disturbed.
        assert_eq!((scene.rank(0), scene.closed.clone()), (0, vec![1]));
        scene.join(2, None);
        assert_eq!(scene.rank(2), 1);
        (refused.why, refused.again)
    };
    let check = |hello: Hello, differences: &[&str], why: &str| {
        assert_eq!(refusal(hello, differences), (why.to_owned(), false));
    };
    let version = |version: &str| Hello { version: version.into(), ..hello(1, None) };
    check(version("0.9"), &[], "it is version 0.9, the coordinator is 1.0: run the same build on every machine");
    check(
        hello(1, None),
        &["optimizer.lr: 0.1, here 0.2", "train.steps: 5, here 3"],
        "its recipe differs from the coordinator's:\n  optimizer.lr: 0.1, here 0.2\n  train.steps: 5, here 3",
    );
    check(
        hello(1, Some(0)),
        &[],
        "rank 0 (host box, process 100) has joined already: give each worker a rank of its own",
    );
    check(hello(1, Some(2)), &[], "it asks for rank 2, the recipe's mesh has ranks 0 to 1");
    check(hello(1, Some(u32::MAX)), &[], "it asks for rank 4294967295, the recipe's mesh has ranks 0 to 1");
    // What a stranger writes does not fill a log or a terminal.
    let (why, _) = refusal(version(&format!("\x1b[2J\n{}", "x".repeat(1 << 20))), &[]);
    assert!(why.len() < 200 && !why.contains(['\x1b', '\n']), "{why}");
}

#[test]
fn a_full_mesh_refuses_for_good_and_an_ending_run_only_for_now() {
    let mut scene = Scene::running(2);
    scene.join(2, None);
    let full = "the recipe's mesh has 2 ranks and all of them have joined";
    assert_eq!(*scene.refusal(2), Refused { why: full.into(), again: false });
    // A worker that was started again before the coordinator has given up its predecessor.
    scene.closes(1);
    scene.join(3, None);
    assert_eq!(*scene.refusal(3), Refused { why: full.into(), again: true });
    scene.join(4, Some(1));
    assert!(scene.refusal(4).again);
    scene.goes_on();
    scene.pass(ms(300), busy);
    assert_eq!(scene.endings.len(), 1);
    scene.join(5, None);
    assert_eq!(*scene.refusal(5), Refused { why: "the run is ending".into(), again: true });
}

/// What a connection without a rank says is no input at all.
#[test]
fn nobody_speaks_before_a_greeting_was_accepted() {
    let mut scene = Scene::new(options(1));
    scene.says(5, failing("I was never here", 1));
    scene.says(5, prepared(0, &[]));
    scene.closes(5);
    scene.give(Input::Hello { connection: 6, hello: hello(6, Some(9)), differences: Vec::new() });
    scene.says(6, failing("nor was I", 1));
    scene.goes_on();
    scene.join(0, None);
    assert_eq!(scene.rank(0), 0);
}

#[test]
fn ranks_that_differ_are_named_with_both_values_and_hosts() {
    let check = |first: &[(&str, &str)], second: &[(&str, &str)], faults: &[&str]| {
        let mut scene = Scene::new(options(2));
        scene.join(0, None);
        scene.join(1, None);
        scene.says(0, prepared(0, first));
        scene.says(1, prepared(1, second));
        if faults.is_empty() {
            scene.goes_on();
            assert!(matches!(scene.heard(1).last(), Some(To::Look(_))));
        } else {
            let faults: Vec<String> = faults.iter().map(|fault| format!("\n  {fault}")).collect();
            scene.ended(&format!("the ranks differ where they must be the same:{}", faults.concat()), 2);
            assert_eq!(scene.aborted(), [0, 1]);
        }
    };
    let (zero, one) = ("rank 0 (host box, process 100)", "rank 1 (host box, process 101)");
    check(&[("backend", "flex"), ("text", "abc")], &[("backend", "flex"), ("text", "abc")], &[]);
    check(&[("backend", "flex"), ("text", "abc")], &[("text", "abc"), ("backend", "flex")], &[]);
    check(
        &[("backend", "flex"), ("text", "abc"), ("kind", "cpu")],
        &[("backend", "libtorch"), ("text", "abd"), ("kind", "cpu")],
        &[&format!("backend: {zero} has flex, {one} has libtorch"), &format!("text: {zero} has abc, {one} has abd")],
    );
    check(&[("text", "abc")], &[], &[&format!("text: {zero} has abc, {one} has nothing")]);
    check(&[], &[("text", "abc")], &[&format!("text: {zero} has nothing, {one} has abc")]);
}

#[test]
fn the_lowest_rank_of_a_folder_leads_it() {
    // For each rank, whose nonces it sees.
    let check = |sees: &[&[usize]], expected: &[u32]| {
        let mut scene = Scene::new(options(sees.len()));
        (0..sees.len()).for_each(|worker| scene.join(worker, None));
        (0..sees.len()).for_each(|worker| scene.says(worker, prepared(worker, &[])));
        for (worker, seen) in sees.iter().enumerate() {
            scene.says(worker, From::Seen(Seen { nonces: seen.iter().copied().map(nonce).collect() }));
        }
        for worker in 0..sees.len() {
            match scene.heard(worker).last() {
                Some(To::Places(places)) => assert_eq!(places.lead_of, expected, "{sees:?}"),
                other => panic!("{other:?}"),
            }
        }
    };
    check(&[&[0]], &[0]);
    check(&[&[0, 1], &[0, 1]], &[0, 0]);
    check(&[&[0], &[1]], &[0, 1]);
    check(&[&[0, 1], &[0, 1], &[2, 3], &[2, 3]], &[0, 0, 2, 2]);
    check(&[&[0, 2], &[1, 3], &[0, 2], &[1, 3]], &[0, 1, 0, 1]);
    // To see is not to share: only one side sees the other, or nobody sees even itself.
    check(&[&[0, 1], &[1]], &[0, 1]);
    check(&[&[0], &[0, 1]], &[0, 1]);
    check(&[&[], &[]], &[0, 1]);
    // To share is transitive, whatever rank is in the middle: nobody follows a rank that follows another.
    check(&[&[0, 1], &[0, 1, 2], &[1, 2]], &[0, 0, 0]);
    check(&[&[0, 2], &[1, 2], &[0, 1, 2]], &[0, 0, 0]);
}

/// Leads of these folders hold these checkpoints; `Err` has the lines of the refusal.
fn check_common(folders: &[usize], holds: &[&[(u64, &str)]], expected: Result<Option<(u64, &str)>, &[&str]>) {
    let ranks = folders.len();
    let mut scene = Scene::new(options(ranks));
    (0..ranks).for_each(|worker| scene.join(worker, None));
    (0..ranks).for_each(|worker| scene.says(worker, prepared(worker, &[])));
    for worker in 0..ranks {
        let nonces = (0..ranks).filter(|&other| folders[other] == folders[worker]).map(nonce).collect();
        scene.says(worker, From::Seen(Seen { nonces }));
    }
    for (worker, holds) in holds.iter().enumerate() {
        let checkpoints = holds.iter().map(|&(step, id)| held(step, id)).collect();
        scene.says(worker, From::Holds(Holds { checkpoints }));
    }
    match expected {
        Ok(expected) => {
            scene.goes_on();
            match scene.heard(ranks - 1).last() {
                Some(To::Start(start)) => assert_eq!(start.from, expected.map(|(step, id)| held(step, id))),
                other => panic!("{other:?}"),
            }
        }
        Err(lines) => {
            let text = "--resume: the machines have no checkpoint of this run in common:";
            let way_out = "copy the run's folder from the machine that has the newest one; where they come from a store, \
                           remove the copies there that are damaged";
            scene.ended(&format!("{text}\n  {}\n{way_out}", lines.join("\n  ")), 2);
            assert_eq!(scene.aborted(), (0..ranks).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_run_goes_on_from_the_newest_checkpoint_that_every_folder_has() {
    check_common(&[0], &[&[]], Ok(None));
    check_common(&[0, 0], &[&[], &[]], Ok(None));
    check_common(&[0, 1], &[&[], &[]], Ok(None));
    check_common(&[0, 0], &[&[(2, "a"), (4, "b")], &[]], Ok(Some((4, "b"))));
    check_common(&[0, 1], &[&[(2, "a"), (4, "b")], &[(4, "b"), (2, "a")]], Ok(Some((4, "b"))));
    // One machine's newest commit is missing on the other: the one before it is what both have.
    check_common(&[0, 1], &[&[(2, "a"), (4, "b")], &[(2, "a")]], Ok(Some((2, "a"))));
    check_common(&[0, 1, 0], &[&[(2, "a")], &[(2, "a"), (6, "c")], &[]], Ok(Some((2, "a"))));
    // Two runs of one name, each of which wrote its own step 4.
    let (zero, one) = ("rank 0 (host box, process 100)", "rank 1 (host box, process 101)");
    check_common(
        &[0, 1],
        &[&[(2, "a"), (4, "b")], &[(4, "x")]],
        Err(&[&format!("{zero}: step 2 (a), step 4 (b)"), &format!("{one}: step 4 (x)")]),
    );
    check_common(&[0, 1], &[&[(2, "a")], &[]], Err(&[&format!("{zero}: step 2 (a)"), &format!("{one}: none")]));
}

#[test]
fn a_start_that_takes_too_long_names_whom_it_waits_for() {
    let check = |reach: usize, lines: &[&str]| {
        let mut scene = Scene::new(options(3));
        scene.join(0, None);
        scene.says(0, prepared(0, &[]));
        if reach > 0 {
            scene.join(1, None);
            scene.join(2, None);
        }
        if reach > 1 {
            scene.says(1, prepared(1, &[]));
            scene.says(2, prepared(2, &[]));
            scene.says(0, From::Seen(Seen { nonces: Vec::new() }));
        }
        let starting = |_: usize, _: Duration| Some(mark(0, 0, "starting"));
        scene.pass(Duration::from_secs(60), starting);
        scene.goes_on();
        scene.pass(BEAT, starting);
        let lines: Vec<String> = lines.iter().map(|line| format!("\n  {line}")).collect();
        let before = "the run has not started within 60 s (parallel.join_timeout_s):";
        scene.ended(&format!("{before}{}\nstart what is missing sooner, or allow more time", lines.concat()), 75);
    };
    let one = "rank 1 (host box, process 101)";
    let two = "rank 2 (host box, process 102)";
    check(0, &["rank 1 has not joined", "rank 2 has not joined"]);
    let unready = "has joined but is not ready: starting";
    check(1, &[&format!("{one} {unready}"), &format!("{two} {unready}")]);
    let unseen = "has not said which run folders it sees: starting";
    check(2, &[&format!("{one} {unseen}"), &format!("{two} {unseen}")]);
}
