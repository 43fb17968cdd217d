//! Every operation against what a single program would compute.

use super::*;

/// What a member has after every operation, by operation.
type Results = Vec<(String, Vec<u64>)>;

/// Runs every operation.
fn run<T: Sample>(group: &SubGroup, rank: usize, seed: u64, elements: usize) -> Results {
    let members = group.members().len();
    let own = |elements: usize| samples::<T>(seed, rank, elements);
    let zero = own(1)[0];
    let mut results = Vec::new();
    let mut done = |name: String, values: &[T]| results.push((name, bits(values)));
    for reduction in REDUCTIONS {
        let mut values = own(elements);
        group.all_reduce("reduce", reduction, &mut values).expect("all agree");
        done(format!("all_reduce {reduction:?}"), &values);
        let mut block = vec![zero; elements];
        group.reduce_scatter("scatter", reduction, &own(elements * members), &mut block).expect("all agree");
        done(format!("reduce_scatter {reduction:?}"), &block);
    }
    for &root in group.members() {
        let mut values = own(elements);
        group.broadcast("give", root, &mut values).expect("all agree");
        done(format!("broadcast of {root}"), &values);
    }
    let mut all = vec![zero; elements * members];
    group.all_gather("gather", &own(elements), &mut all).expect("all agree");
    done("all_gather".into(), &all);
    group.barrier("meet").expect("all agree");
    group.all_to_all("exchange", &own(elements * members), &mut all).expect("all agree");
    done("all_to_all".into(), &all);
    let others = || group.members().iter().filter(|&&other| other != rank);
    for &to in others() {
        group.send("pass", to, &own(elements + to)).expect("a member");
    }
    for &from in others() {
        let mut values = vec![zero; elements + rank];
        group.receive("pass", from, &mut values).expect("all agree");
        done(format!("receive from {from}"), &values);
    }
    results
}

/// The same from the inputs of all members alone.
fn plain<T: Sample>(members: &[usize], rank: usize, seed: u64, elements: usize) -> Results {
    let count = members.len();
    let index = members.iter().position(|&member| member == rank).expect("a member");
    let of = |member: usize, elements: usize| samples::<T>(seed, member, elements);
    let reduced = |reduction, elements: usize| -> Vec<T> {
        let inputs: Vec<Vec<T>> = members.iter().map(|&member| of(member, elements)).collect();
        let parts = |at: usize| inputs.iter().map(|input| input[at]).collect::<Vec<T>>();
        let one = |at: usize| if count == 1 { inputs[0][at] } else { T::plain(reduction, &parts(at)) };
        (0..elements).map(one).collect()
    };
    let mut results = Vec::new();
    for reduction in REDUCTIONS {
        results.push((format!("all_reduce {reduction:?}"), bits(&reduced(reduction, elements))));
        let whole = reduced(reduction, elements * count);
        results.push((format!("reduce_scatter {reduction:?}"), bits(&whole[block(index, elements)])));
    }
    for &root in members {
        results.push((format!("broadcast of {root}"), bits(&of(root, elements))));
    }
    let gathered: Vec<T> = members.iter().flat_map(|&member| of(member, elements)).collect();
    results.push(("all_gather".into(), bits(&gathered)));
    let exchanged = members.iter().flat_map(|&member| of(member, elements * count)[block(index, elements)].to_vec());
    results.push(("all_to_all".into(), bits(&exchanged.collect::<Vec<T>>())));
    for &from in members.iter().filter(|&&from| from != rank) {
        results.push((format!("receive from {from}"), bits(&of(from, elements + rank))));
    }
    results
}

fn check<T: Sample>(ranks: &[Rank], members: &[usize], seed: u64, elements: usize) {
    let found = each(ranks, members, |group, rank| run::<T>(group, rank, seed, elements));
    for (&rank, found) in members.iter().zip(found) {
        assert_eq!(found, plain::<T>(members, rank, seed, elements), "rank {rank} of {members:?}, {:?}", T::DTYPE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_operation_on_every_type_gives_what_one_program_would_compute(
        seed: u64, count in 1usize..=5, elements in 0usize..150
    ) {
        let ranks = ranks(count);
        let members = subset(count, &mut Random::new(seed));
        check::<f32>(&ranks, &members, seed, elements);
        check::<bf16>(&ranks, &members, seed, elements);
        check::<i32>(&ranks, &members, seed, elements);
        check::<i64>(&ranks, &members, seed, elements);
        check::<u8>(&ranks, &members, seed, elements);
        prop_assert!(ranks.iter().all(|rank| rank.mailbox.check().is_ok()));
        prop_assert!(ranks.iter().all(|rank| rank.mailbox.is_empty()), "nothing is left");
    }

    #[test]
    fn sub_groups_that_share_ranks_or_do_not_work_at_the_same_time(seed: u64, count in 2usize..=5) {
        let ranks = ranks(count);
        let random = &mut Random::new(seed);
        let groups: Vec<Vec<usize>> = (0..4).map(|_| subset(count, random)).collect();
        // All ranks go through the same list, each through what it is part of: some are far ahead.
        let calls: Vec<(usize, usize)> = (0..30).map(|_| (random.below(4) as usize, random.below(90) as usize)).collect();
        let run = |rank: usize| {
            let mine = calls.iter().enumerate().filter(|(_, (group, _))| groups[*group].contains(&rank));
            for (number, &(group, elements)) in mine {
                let seed = seed.wrapping_add(number as u64);
                let members = &groups[group];
                let group = ranks[rank].collectives.sub_group(members).expect("one of them");
                assert_eq!(run::<i32>(&group, rank, seed, elements), plain::<i32>(members, rank, seed, elements));
            }
        };
        thread::scope(|scope| (0..count).for_each(|rank| _ = scope.spawn(move || run(rank))));
        prop_assert!(ranks.iter().all(|rank| rank.mailbox.is_empty()), "nothing is left");
    }
}

/// The control: the samples are such that a wrong rank, order of blocks or reduction is another result.
#[test]
fn another_member_block_or_reduction_is_another_result() {
    let members = [0, 2, 3];
    let results = |rank| plain::<bf16>(&members, rank, 5, 100);
    let (own, other) = (results(2), results(3));
    for ((name, own), (_, other)) in own.iter().zip(&other) {
        let is_of_all = ["all_reduce", "broadcast", "all_gather"].iter().any(|start| name.starts_with(start));
        assert_eq!(own == other, is_of_all, "{name}");
    }
    for pair in own[..6].windows(2).chain([&[own[0].clone(), own[2].clone()][..]]) {
        assert_ne!(pair[0].1, pair[1].1, "{} and {}", pair[0].0, pair[1].0);
    }
}

#[test]
fn a_call_that_makes_no_sense_sends_nothing_and_the_next_one_works() {
    let ranks = ranks(3);
    let check = |found: Result<(), CollectiveError>, words: &str| {
        let error = found.expect_err("no sense");
        assert!(matches!(&error, CollectiveError::Call { .. }) && error.to_string().contains(words), "{error}");
    };
    let none = |members: &[usize]| ranks[1].collectives.sub_group(members).map(drop);
    check(none(&[0, 2]), "a sub-group [0, 2]: expected different ranks below 3, rank 1 among them");
    check(none(&[1, 0, 1]), "a sub-group [0, 1, 1]");
    check(none(&[1, 3]), "a sub-group [1, 3]");
    let group = ranks[1].collectives.sub_group(&[1, 0]).expect("a sub-group");
    assert_eq!((group.members(), group.index()), (&[0, 1][..], 1));
    check(group.broadcast("here", 2, &mut [0u8]), "rank 2 is no member of the sub-group [0, 1]");
    check(group.send("here", 1, &[0u8]), "rank 1 sends nothing to itself");
    check(group.receive("here", 1, &mut [0u8]), "rank 1 sends nothing to itself");
    check(group.all_gather("here", &[0u8; 3], &mut [0; 7]), "an output of 7 elements, expected 3 of each of 2 members");
    check(group.reduce_scatter("here", Reduction::Sum, &[0u8; 3], &mut [0; 2]), "an input of 3 elements, expected 2");
    check(group.all_to_all("here", &[0u8; 3], &mut [0; 3]), "an input of 3 elements, expected 1 of each");
    check(group.barrier(&"x".repeat(256)), "256 of a site, expected at most");
    let small = ranks_keeping(4 << 10, 2, SMALL);
    let tight = small[0].collectives.sub_group(&[0, 1]).expect("a sub-group");
    check(tight.send("here", 1, &[0i64; 129]), "1032 bytes of a rank and 4 of a site, expected at most 1024 bytes");
    assert!(each(&ranks, &[0, 1], |group, _| group.barrier("here").is_ok()).iter().all(|&met| met));
}
