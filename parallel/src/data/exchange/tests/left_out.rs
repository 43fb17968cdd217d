//! What was left out: flushed, folded onto another mesh, refused, or nothing.

use compression::Region;

use super::*;

#[test]
fn a_flush_sends_everything_that_was_left_out_and_all_residuals_are_zero() {
    for codec in [Codec::Int8, Codec::Sparse24Int4] {
        let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 64, codec)).collect();
        let given = |number: u64| move |rank, tensor| gradient(rank, number, tensor);
        step(&mut sides, 1, given(1), |_| 0);
        assert!(sides.iter().all(|side| state(side).iter().any(|bits| *bits != 0)), "there is something to flush");
        let before: Vec<_> = sides.iter().map(|side| residuals(side, 0)).collect();
        sides.iter_mut().for_each(Exchange::flush);
        // A step that is skipped flushes nothing.
        let poisoned = |rank, tensor| vec![if rank == 0 { f32::NAN } else { 1.0 }; gradient(rank, 1, tensor).len()];
        assert_eq!(step(&mut sides, 2, poisoned, |_| 0).0, Verdict::Skip);
        assert_eq!(sides.iter().map(|side| residuals(side, 0)).collect::<Vec<_>>(), before);
        step(&mut sides, 3, |rank, tensor| vec![0.0; gradient(rank, 1, tensor).len()], |_| 0);
        for (rank, side) in sides.iter().enumerate() {
            assert!(state(side).iter().all(|bits| *bits == 0), "{codec}");
            // The sum of zeros is what was left out: by all senders, and by the owner.
            let owned = shard(side.sum(0).len(), rank, 3);
            let sent = |at: usize| before.iter().map(|[sender, _]| sender[at]).fold(0.0, |sum, x| sum + x);
            let expected: Vec<f32> =
                owned.clone().zip(&before[rank][1]).map(|(at, owner)| (sent(at) + owner) + 0.0).collect();
            assert_eq!(sides[0].sum(0)[owned], expected);
        }
        step(&mut sides, 4, given(4), |_| 0);
        assert!(state(&sides[0]).iter().any(|bits| *bits != 0), "the codec is back");
    }
}

/// Three ranks become two with other buckets, chunks and another codec; what is remembered is folded and goes on.
fn ledger_over_a_change_of_mesh(forget: bool) -> Exact {
    let mut exact = Exact::default();
    let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 32, Codec::Sparse24Int8)).collect();
    for number in 1..3 {
        booked(&mut exact, &mut sides, number, |rank, tensor| gradient(rank, number, tensor));
    }
    let other = Arc::new(Plan::new(plan().parameters().to_vec(), 1 << 30).expect("small"));
    let mut fewer: Vec<_> = (0..2).map(|rank| Exchange::new(other.clone(), group(rank, 2, 100), Codec::Int4)).collect();
    for (tensor, parameter) in plan().parameters().iter().enumerate() {
        let whole = Region::whole(&parameter.shape).expect("small");
        let owned = [0, 1].map(|rank| shard(whole.len(), rank, 2));
        let regions = owned.map(|owned| Region { flat_start: owned.start, flat_end: owned.end, ..whole.clone() });
        let kept: Vec<_> = sides.iter().flat_map(|side| side.residuals(tensor)).collect();
        // What an addition rounds away is missing from its result.
        let cut = compression::residual::recut(&parameter.shape, &kept, &regions, |x| exact.add(x)).expect("they fit");
        for (side, owner) in fewer.iter_mut().zip(cut) {
            side.restore(tensor, &vec![0.0; whole.len()], owner).expect("its shard");
        }
    }
    for number in 3..5 {
        booked(&mut exact, &mut fewer, number, |rank, tensor| gradient(rank, number, tensor));
    }
    remembered(&mut exact, &fewer, forget);
    exact
}

#[test]
fn nothing_is_lost_when_the_mesh_the_buckets_and_the_codec_change() {
    assert!(ledger_over_a_change_of_mesh(false).is_zero());
    assert!(!ledger_over_a_change_of_mesh(true).is_zero(), "the control: one owner forgets");
}

#[test]
fn residuals_of_another_shape_are_refused_and_nothing_changes() {
    let mut side = side(0, 2, 64, Codec::Int8);
    let owned = side.owned(0).len();
    let error = side.restore(0, &[0.0; 3], vec![0.0; owned]).expect_err("three elements").to_string();
    assert!(error.contains("a residual of 76800 elements was expected, 3 found") || error.contains("76800"), "{error}");
    assert!(side.restore(0, &vec![1.0; 76_800], vec![0.0; owned + 1]).is_err());
    assert!(side.residuals(0).is_empty());
}

#[test]
fn residuals_take_no_memory_where_nothing_is_left_out() {
    let mut sides: Vec<_> = (0..2).map(|rank| side(rank, 2, 64, Codec::Fp32)).collect();
    step(&mut sides, 1, |rank, tensor| gradient(rank, 1, tensor), |_| 0);
    assert!(sides.iter().all(|side| side.residuals(0).is_empty()));
    sides.iter_mut().for_each(|side| side.set_codec(Codec::Int4));
    step(&mut sides, 2, |rank, tensor| gradient(rank, 2, tensor), |_| 0);
    assert!(sides.iter().all(|side| side.residuals(0).len() == 2));
    sides.iter_mut().for_each(|side| side.set_codec(Codec::Fp32));
    step(&mut sides, 3, |rank, tensor| gradient(rank, 3, tensor), |_| 0);
    assert!(sides.iter().all(|side| side.residuals(0).is_empty()), "fp32 has sent them");
}
