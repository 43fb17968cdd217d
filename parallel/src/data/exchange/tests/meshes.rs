//! Runs whose ranks change on the way: their number, and how many of them are a machine.

use compression::{Region, Residual};
use proptest::prelude::*;

use super::nodes::booked_of_nodes;
use super::*;

/// Machines, ranks of each, and what their gradients travel in.
type Mesh = (usize, usize, Codec);

/// What a fold gets wrong in a control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// The first sender that left something out counts twice.
    Twice,
    /// It does not count.
    Forgotten,
}

fn sides((nodes, members, codec): Mesh, bucket_bytes_max: usize) -> Vec<Exchange> {
    let ranks = nodes * members;
    let plan = Arc::new(Plan::new(plan().parameters().to_vec(), bucket_bytes_max).expect("small"));
    // One rank alone sends nothing, and compresses nothing.
    let codec = if ranks == 1 { Codec::Fp32 } else { codec };
    let group = |rank| Group { members, window: 3, ..group(rank, ranks, 32 + 7 * ranks) };
    (0..ranks).map(|rank| Exchange::new(plan.clone(), group(rank), codec)).collect()
}

/// What all of `before` left out, onto `after`; what additions rounded away is entered.
fn fold(exact: &mut Exact, before: &[Exchange], after: &mut [Exchange], wrong: Wrong) {
    let ranks = after.len();
    for (tensor, parameter) in plan().parameters().iter().enumerate() {
        let whole = Region::whole(&parameter.shape).expect("small");
        let region = |rank| {
            let owned = shard(whole.len(), rank, ranks);
            Region { flat_start: owned.start, flat_end: owned.end, ..whole.clone() }
        };
        let regions: Vec<Region> = (0..ranks).map(region).collect();
        let mut kept: Vec<Residual> = before.iter().flat_map(|side| side.residuals(tensor)).collect();
        let left = |kept: &Residual| kept.side != Side::Owner && kept.values.iter().any(|x| *x != 0.0);
        if let Some(at) = kept.iter().position(left) {
            match wrong {
                Wrong::Nothing => {}
                Wrong::Twice => kept.push(Residual { side: Side::Sender { rank: 99 }, ..kept[at].clone() }),
                Wrong::Forgotten => _ = kept.remove(at),
            }
        }
        let cut = compression::residual::recut(&parameter.shape, &kept, &regions, |x| exact.add(x)).expect("they fit");
        for (side, owner) in after.iter_mut().zip(cut) {
            side.restore(tensor, &vec![0.0; whole.len()], owner).expect("its shard");
        }
    }
}

fn ledger(meshes: &[Mesh], wrong: Wrong) -> Exact {
    let (mut exact, mut number) = (Exact::default(), 0);
    let mut now: Vec<Exchange> = Vec::new();
    for (index, &mesh) in meshes.iter().enumerate() {
        let mut next = sides(mesh, (1 << 16) << (4 * (index % 3)));
        fold(&mut exact, &now, &mut next, wrong);
        now = next;
        for _ in 0..2 {
            number += 1;
            booked_of_nodes(&mut exact, &mut now, number);
        }
    }
    remembered(&mut exact, &now, false);
    exact
}

#[test]
fn on_one_two_four_three_and_one_rank_nothing_is_lost() {
    let chain = [1, 2, 4, 3, 1].map(|ranks| (ranks, 1, Codec::Int8));
    assert!(ledger(&chain, Wrong::Nothing).is_zero());
    assert!(!ledger(&chain, Wrong::Twice).is_zero(), "the control: a sender counts twice");
    assert!(!ledger(&chain, Wrong::Forgotten).is_zero(), "the control: a sender is forgotten");
}

#[test]
fn the_residual_of_a_machine_counts_once_whatever_its_ranks_become() {
    let chain = [(2, 2, Codec::Int8), (4, 1, Codec::Int4), (3, 2, Codec::Sparse24Int8), (1, 4, Codec::Int8)];
    assert!(ledger(&chain, Wrong::Nothing).is_zero());
    for wrong in [Wrong::Twice, Wrong::Forgotten] {
        assert!(!ledger(&chain[..2], wrong).is_zero(), "the control: {wrong:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    #[test]
    fn nothing_is_lost_over_any_change_of_ranks_machines_buckets_and_codec(
        meshes in prop::collection::vec((1usize..4, 1usize..4, 0..Codec::ALL.len()), 2..4),
    ) {
        let chain: Vec<Mesh> =
            meshes.into_iter().map(|(nodes, members, codec)| (nodes, members, Codec::ALL[codec])).collect();
        prop_assert!(ledger(&chain, Wrong::Nothing).is_zero());
    }
}
