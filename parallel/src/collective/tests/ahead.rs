//! What waits from a rank that is ahead is bounded.

use super::*;

const KEPT: usize = 64 << 10;
/// The largest part that such a mailbox takes, in f32.
const PART: usize = KEPT / 4 / 4;
const CUTS: Cuts = Cuts { piece_bytes: 4 << 10, direct_bytes_max: 1 << 10 };

#[test]
fn no_rank_is_so_far_ahead_that_there_is_no_room_for_what_it_sends() {
    let ranks = ranks_keeping(KEPT, 3, CUTS);
    each(&ranks, &[0, 1, 2], |group, rank| {
        for round in 0..40 {
            // Someone else is late each time.
            if round % 3 == rank {
                (0..200).for_each(|_| thread::yield_now());
            }
            let mut values = vec![1.0f32; 3 * PART];
            group.all_reduce("sum", Reduction::Sum, &mut values).expect("room for it");
            assert_eq!(values, vec![3.0; 3 * PART]);
            group.broadcast("give", round % 3, &mut values[..PART]).expect("room for it");
            group.all_gather("gather", &vec![rank as f32; PART], &mut values).expect("room for it");
            assert!(values.iter().enumerate().all(|(at, value)| *value == (at / PART) as f32));
        }
    });
}

#[test]
fn sends_that_nobody_receives_are_refused_by_name_before_they_fill_the_memory() {
    let pass = |receives: bool| {
        let ranks = ranks_keeping(KEPT, 2, CUTS);
        let group = |rank: usize| ranks[rank].collectives.sub_group(&[0, 1]).expect("both");
        let (sender, receiver) = (group(0), group(1));
        let mut values = vec![0.0f32; PART];
        for _ in 0..5 {
            sender.send("stage 1", 1, &vec![1.0f32; PART]).expect("it does not wait");
            if receives {
                receiver.receive("stage 1", 0, &mut values)?;
            }
        }
        ranks[1].mailbox.check()
    };
    let error = pass(false).expect_err("too many").to_string();
    assert!(error.starts_with("rank 0 sent ") && error.ends_with("at most 65536 are kept"), "{error}");
    // The control: as many that are received.
    assert_eq!(pass(true), Ok(()));
}
