//! Members at different calls: all of them end, and each says who is where.

use super::*;

type Called = fn(&SubGroup) -> Result<(), CollectiveError>;

/// Rank 1 makes another call than the others do. Whoever may leave its call meets the others in a barrier, and all end
/// with both places.
fn check(others: (Called, &str), one: (Called, &str)) {
    for members in [&[0, 1][..], &[0, 1, 2], &[0, 1, 2, 3]] {
        let ranks = ranks(4);
        let ends = each(&ranks, members, |group, rank| {
            let call = if rank == 1 { one.0 } else { others.0 };
            call(group).and_then(|()| group.barrier("after")).and_then(|()| group.barrier("at the end"))
        });
        for (rank, end) in members.iter().zip(ends) {
            let error = end.expect_err("they differ").to_string();
            let is_said = ["rank 1 is at", "rank 1 at"].iter().any(|at| error.contains(&format!("{at} {}", one.1)));
            // Who has had the root's elements has left the broadcast.
            let has_left = others.1.starts_with("broadcast") && error.contains("at barrier 1 of after");
            assert!(is_said && (has_left || error.contains(others.1)), "rank {rank} of {members:?}: {error}");
            assert!(error.contains("step 0: rank ") && error.contains("do all ranks run the same recipe"), "{error}");
        }
        // And it stays so, on every sub-group.
        let alone = ranks[1].collectives.sub_group(&[1]).expect("one");
        alone.barrier("later").expect_err("the run is over");
    }
}

fn sum(group: &SubGroup) -> Result<(), CollectiveError> {
    group.all_reduce("layer 3/forward", Reduction::Sum, &mut [0.5f32; 60])
}
const SUM: (Called, &str) = (sum, "all_reduce 0 (sum of 60 f32) of layer 3/forward");

#[test]
fn another_operation() {
    let gather = |group: &SubGroup| {
        group.all_gather("layer 3/forward", &[0.5f32; 60], &mut vec![0.0; 60 * group.members().len()])
    };
    check(SUM, (gather, "all_gather 0 (60 f32) of layer 3/forward"));
    check(SUM, (|group| group.barrier("the end"), "barrier 0 of the end"));
    check(SUM, (|group| group.broadcast("x", 0, &mut [1u8]), "broadcast 0 (1 u8 from rank 0) of x"));
    check(SUM, (|group| group.broadcast("x", 1, &mut [1u8]), "broadcast 0 (1 u8 from rank 1) of x"));
}

#[test]
fn another_dtype() {
    let bf16s: Called = |group| group.all_reduce("layer 3/forward", Reduction::Sum, &mut [bf16::ONE; 60]);
    check(SUM, (bf16s, "all_reduce 0 (sum of 60 bf16) of layer 3/forward"));
}

#[test]
fn another_size() {
    // One is reduced where the others exchange directly.
    let more: Called = |group| group.all_reduce("layer 3/forward", Reduction::Sum, &mut [0.5f32; 61]);
    check(SUM, (more, "all_reduce 0 (sum of 61 f32) of layer 3/forward"));
    let few: Called = |group| group.all_reduce("layer 3/forward", Reduction::Sum, &mut [0.5f32; 4]);
    check(SUM, (few, "all_reduce 0 (sum of 4 f32) of layer 3/forward"));
    let none: Called = |group| group.all_reduce("layer 3/forward", Reduction::Sum, &mut [0.5f32; 0]);
    check(SUM, (none, "all_reduce 0 (sum of 0 f32) of layer 3/forward"));
    let gather: Called = |group| group.all_gather("g", &[0u8], &mut vec![0; group.members().len()]);
    let more: Called = |group| group.all_gather("g", &[0u8; 2], &mut vec![0; 2 * group.members().len()]);
    check((gather, "all_gather 0 (1 u8) of g"), (more, "all_gather 0 (2 u8) of g"));
}

#[test]
fn another_site() {
    let later: Called = |group| group.all_reduce("layer 4/forward", Reduction::Sum, &mut [0.5f32; 60]);
    check(SUM, (later, "all_reduce 0 (sum of 60 f32) of layer 4/forward"));
    let nowhere: Called = |group| group.all_reduce("", Reduction::Sum, &mut [0.5f32; 60]);
    check(SUM, (nowhere, "all_reduce 0 (sum of 60 f32) of no site"));
}

#[test]
fn another_reduction() {
    let largest: Called = |group| group.all_reduce("layer 3/forward", Reduction::Max, &mut [0.5f32; 60]);
    check(SUM, (largest, "all_reduce 0 (max of 60 f32) of layer 3/forward"));
}

#[test]
fn another_root() {
    let of_0: Called = |group| group.broadcast("x", 0, &mut [1u8; 90]);
    let of_1: Called = |group| group.broadcast("x", 1, &mut [1u8; 90]);
    let called_0 = (of_0, "broadcast 0 (90 u8 from rank 0) of x");
    check(called_0, (of_1, "broadcast 0 (90 u8 from rank 1) of x"));
    let less: Called = |group| group.broadcast("x", 0, &mut [1u8; 80]);
    check(called_0, (less, "broadcast 0 (80 u8 from rank 0) of x"));
}

#[test]
fn one_call_more_or_less() {
    let twice: Called = |group| sum(group).and_then(|()| sum(group));
    // The others are at the barrier after it.
    check((sum, "barrier 1 of after"), (twice, "all_reduce 1 (sum of 60 f32) of layer 3/forward"));
}

#[test]
fn a_send_that_is_received_as_something_else_or_not_sent() {
    let sends: Called = |group| match group.index() {
        0 => group.send("stage 1/forward", 1, &[1.0f32; 50]),
        _ => Ok(()),
    };
    let said = "send 0 (50 f32) of stage 1/forward";
    check(
        (sends, said),
        (|group| group.receive("stage 1/forward", 0, &mut [0.0f32; 51]), "send 0 (51 f32) of stage 1"),
    );
    check((sends, said), (|group| group.receive("stage 1/forward", 0, &mut [0i32; 50]), "send 0 (50 i32) of stage 1"));
    check((sends, said), (|group| group.receive("stage 2", 0, &mut [0.0f32; 50]), "send 0 (50 f32) of stage 2"));
    // Whoever is in a collective operation sends nothing before it is over.
    check(SUM, (|group| group.receive("stage 2", 0, &mut [0.0f32; 50]), "send 0 (50 f32) of stage 2"));
}

/// The control: calls that agree end well.
#[test]
fn the_same_calls_agree() {
    let ranks = ranks(4);
    for end in each(&ranks, &[0, 1, 2, 3], |group, _| sum(group).and_then(|()| group.barrier("after"))) {
        assert_eq!(end, Ok(()));
    }
}

#[test]
fn ranks_that_are_not_part_of_it_hear_of_it_too() {
    let ranks = ranks(3);
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let group = ranks[2].collectives.sub_group(&[1, 2]).expect("a sub-group");
            group.barrier("elsewhere").expect_err("rank 1 never comes").to_string()
        });
        each(&ranks, &[0, 1], |group, rank| {
            let site = ["one", "other"][rank];
            group.barrier(site).expect_err("they differ");
        });
        let error = waits.join().expect("no panic");
        assert!(error.contains(" ended it: step 0: rank ") && error.contains("barrier 0 of other"), "{error}");
    });
}
