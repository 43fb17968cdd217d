use proptest::prelude::*;

use super::*;

fn mesh(data: usize, pipeline: usize, tensor: usize) -> Mesh {
    Mesh::new(data, pipeline, tensor).expect("a mesh")
}

fn model() -> Shape {
    Shape { heads: 8, key_value_heads: 2, layers: 6, vocabulary: 259, feed_forward: 171, sequence: Some(64) }
}

fn hosts(list: &str) -> Vec<String> {
    list.split_whitespace().map(str::to_owned).collect()
}

proptest! {
    #[test]
    fn every_rank_is_in_one_group_of_each_axis_and_groups_of_two_axes_meet_once(
        data in 1usize..5, pipeline in 1usize..5, tensor in 1usize..5,
    ) {
        let mesh = mesh(data, pipeline, tensor);
        prop_assert_eq!(mesh.ranks(), data * pipeline * tensor);
        for rank in 0..mesh.ranks() {
            let at = mesh.coordinates(rank);
            prop_assert_eq!(mesh.rank(at), rank);
            let place = |axis| at.on(axis);
            let formula = (place(Axis::Data) * pipeline + place(Axis::Pipeline)) * tensor + place(Axis::Tensor);
            prop_assert_eq!(formula, rank);
            for axis in Axis::ALL {
                let group = mesh.group(axis, rank);
                prop_assert_eq!(group[at.on(axis)], rank);
                prop_assert!(group.iter().all(|&other| mesh.group(axis, other) == group));
                for other in Axis::ALL.into_iter().filter(|&other| other != axis) {
                    let shared = mesh.group(other, rank).into_iter().filter(|member| group.contains(member));
                    prop_assert_eq!(shared.collect::<Vec<_>>(), [rank]);
                }
            }
            prop_assert!(mesh.replica(rank).contains(&rank));
            prop_assert!(mesh.replica(rank).all(|other| mesh.coordinates(other).on(Axis::Data) == at.on(Axis::Data)));
        }
        for axis in Axis::ALL {
            let mut all = mesh.groups(axis).concat();
            prop_assert_eq!(mesh.groups(axis).len() * mesh.size(axis), mesh.ranks());
            all.sort_unstable();
            prop_assert_eq!(all, (0..mesh.ranks()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn parts_cover_the_whole_and_differ_by_one(whole in 0usize..5000, ranks in 1usize..17) {
        let parts: Vec<_> = (0..ranks).map(|rank| cut(whole, rank, ranks)).collect();
        prop_assert!(parts[0].start == 0 && parts[ranks - 1].end == whole);
        prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        let sizes = || parts.iter().map(ExactSizeIterator::len);
        prop_assert!(sizes().max().unwrap_or(0) - sizes().min().unwrap_or(0) <= 1);
        prop_assert!(whole < ranks || sizes().all(|size| size > 0));
    }

    #[test]
    fn a_rank_has_the_key_value_heads_that_its_query_heads_look_at(
        few in 1usize..6, more in 1usize..6, groups in 1usize..5, shares in any::<bool>(),
    ) {
        // Ranks that share heads out, or heads that are on several ranks.
        let (kv, ranks) = if shares { (few * more, few) } else { (few, few * more) };
        let heads = few * more * groups;
        let times = heads / kv;
        let shape = Shape { heads, key_value_heads: kv, sequence: None, ..model() };
        prop_assert_eq!(mesh(1, 1, ranks).check(ranks, &shape, 1), Ok(()));
        let mut holders = vec![0; kv];
        for rank in 0..ranks {
            let own = key_value_heads(kv, rank, ranks);
            let looks_at: Vec<usize> = cut(heads, rank, ranks).map(|query| query / times).collect();
            prop_assert!(looks_at.iter().all(|head| own.contains(head)));
            prop_assert!(own.clone().all(|head| looks_at.contains(&head)));
            own.for_each(|head| holders[head] += 1);
        }
        prop_assert_eq!(holders, vec![replicas(kv, ranks); kv]);
    }

    #[test]
    fn an_arrangement_is_a_permutation_and_lets_no_more_groups_cross_than_must(
        machines in prop::collection::vec(0usize..4, 12),
    ) {
        let hosts: Vec<String> = machines.iter().map(|machine| format!("host{machine}")).collect();
        let mesh = mesh(3, 2, 2);
        let order = arrange(mesh, &hosts);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..12).collect::<Vec<_>>());
        let placed: Vec<String> = order.iter().map(|&place| hosts[place].clone()).collect();
        let whole: usize = (0..4).map(|machine| machines.iter().filter(|&&m| m == machine).count() / 2).sum();
        prop_assert_eq!(crossings(mesh, Axis::Tensor, &placed).len(), 6 - whole);
    }
}

#[test]
fn tensor_groups_are_neighbours_and_replicas_are_outermost() {
    let mesh = mesh(2, 2, 2);
    assert_eq!(mesh.group(Axis::Tensor, 5), [4, 5]);
    assert_eq!(mesh.group(Axis::Pipeline, 5), [5, 7]);
    assert_eq!(mesh.group(Axis::Data, 5), [1, 5]);
    assert_eq!(mesh.replica(5), 4..8);
    assert_eq!(mesh.ends(5), [5, 7]);
    assert_eq!(Mesh::ONE.ends(0), [0]);
    assert_eq!(mesh.to_string(), "data 2 x pipeline 2 x tensor 2");
}

#[test]
fn a_tensor_group_on_two_machines_is_named_and_one_in_its_machine_is_not() {
    let mesh = mesh(1, 2, 2);
    assert_eq!(crossings(mesh, Axis::Tensor, &hosts("a a b b")), []);
    let crossing = crossings(mesh, Axis::Pipeline, &hosts("a a b b"));
    assert_eq!(crossing.len(), 2, "stages may lie apart, and it is said");
    // The control: every second rank on another machine.
    let named: Vec<String> = crossings(mesh, Axis::Tensor, &hosts("a b a b")).iter().map(ToString::to_string).collect();
    assert_eq!(
        named,
        [
            "the tensor group of ranks [0, 1] is on several machines: a, b",
            "the tensor group of ranks [2, 3] is on several machines: a, b",
        ]
    );
    assert_eq!(arrange(mesh, &hosts("a b a b")), [0, 2, 1, 3]);
}

#[test]
fn a_mesh_that_cannot_be_names_every_fault_at_once() {
    let check = |result: Result<(), MeshFaults>, expected: &[&str]| {
        let found = result.err().map(|faults| faults.to_string()).unwrap_or_default();
        assert_eq!(found.lines().collect::<Vec<_>>(), expected);
    };
    check(
        Mesh::new(0, 0, 2).map(|_| ()),
        &[
            "expected at least 1 rank on the axis data, found 0",
            "expected at least 1 rank on the axis pipeline, found 0",
        ],
    );
    check(Mesh::new(64, 4, 5).map(|_| ()), &["expected at most 1024 ranks, found 64 x 4 x 5"]);
    check(
        Mesh::new(usize::MAX, 4, 5).map(|_| ()),
        &[&format!("expected at most 1024 ranks, found {} x 4 x 5", usize::MAX)],
    );
    check(mesh(1, 2, 4).check(8, &model(), 3), &[]);
    let narrow = Shape { vocabulary: 2, feed_forward: 2, ..model() };
    check(
        mesh(1, 2, 3).check(8, &narrow, 4),
        &[
            "expected 6 ranks for data 1 x pipeline 2 x tensor 3, found 8",
            "expected the tensor ranks to divide the 8 query heads, found 3; 1, 2, 4, 8 would",
            "expected the 3 tensor ranks to divide the 2 key-value heads, or to be a multiple of them, so that each rank \
             has as many or each head is on as many ranks",
            "expected at least a layer for each of 2 stages x 4 virtual stages, found 6 layers",
            "expected at least a token of the vocabulary for each of 3 tensor ranks, found 2",
            "expected a feed-forward layer at least as wide as the 3 tensor ranks, found 2",
            "expected the 3 tensor ranks to divide a sequence of 64 tokens, for sequence parallelism gives each as many",
        ],
    );
    check(
        Mesh::ONE.check(1, &model(), 2),
        &["expected 1 virtual stage, or several with at least 2 stages, found 2 with 1 stage"],
    );
    check(
        mesh(1, 2, 1).check(2, &model(), 0),
        &["expected 1 virtual stage, or several with at least 2 stages, found 0 with 2 stages"],
    );
}
