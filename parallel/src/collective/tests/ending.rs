//! Losses, aborts, floods and damage end every wait.

use super::*;
use crate::collective::message::HEADER_BYTES;
use crate::transport::Loss;

/// An all-reduce for which only rank 0 has come, and what ends it once it waits.
fn ended(ends: impl FnOnce(&[Rank])) -> String {
    let ranks = ranks(3);
    ranks[0].progress.begin(8);
    let all = [0, 1, 2];
    thread::scope(|scope| {
        let group = ranks[0].collectives.sub_group(&all).expect("all of them");
        let waits = scope.spawn(move || {
            let ended = group.all_reduce("norm/forward", Reduction::Sum, &mut [1.0f32; 3]).expect_err("nobody came");
            assert_eq!(group.barrier("later"), Err(without_wait(ended.clone())), "it stays so");
            ended.to_string()
        });
        let mark = loop {
            let mark = ranks[0].progress.mark();
            if mark.text.contains("rank 1's") {
                break mark;
            }
            thread::yield_now();
        };
        let text = "step 8, in the forward pass, waiting for the other ranks: \
                    rank 1's all_reduce 0 (sum of 3 f32) of norm/forward";
        assert_eq!((&*mark.text, mark.waits), (text, true));
        ends(&ranks);
        let error = waits.join().expect("no panic");
        assert!(!ranks[0].progress.mark().waits);
        error
    })
}

fn without_wait(error: CollectiveError) -> CollectiveError {
    match error {
        CollectiveError::Lost(loss) => Loss { waited: None, ..loss }.into(),
        other => other,
    }
}

#[test]
fn a_lost_rank_wakes_whoever_waits_and_the_engine_hears_of_it_too() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let error = ended(|ranks| {
        let heard = heard.clone();
        let sink = ranks[0].mailbox.sink(Arc::new(move |incoming| lock(&heard).push(incoming)));
        sink(Incoming::Lost { rank: 2, why: "the connection was closed".into() });
    });
    let waited = "this rank waited for rank 1's all_reduce 0 (sum of 3 f32) of norm/forward";
    assert_eq!(error, format!("step 8: rank 2 is lost: the connection was closed; {waited}"));
    assert_eq!(*lock(&heard), [Incoming::Lost { rank: 2, why: "the connection was closed".into() }]);
}

#[test]
fn an_abort_wakes_whoever_waits() {
    assert_eq!(ended(|ranks| ranks[0].mailbox.abort("the coordinator says so")), "the coordinator says so");
}

#[test]
fn what_is_not_collective_goes_to_the_engine() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (ranks, noted) = (ranks(2), heard.clone());
    let sink = ranks[0].mailbox.sink(Arc::new(move |incoming| lock(&noted).push(incoming)));
    for bytes in [&b"TRIB"[..], b"TRIN", b"TRI", b"", b"tric"] {
        let incoming = Incoming::Message { from: 1, bytes: bytes.into() };
        sink(incoming.clone());
        assert_eq!(lock(&heard).pop(), Some(incoming));
    }
    assert!(ranks[0].mailbox.check().is_ok() && ranks[0].mailbox.is_empty());
}

/// What rank 0 receives of rank 1's send when it comes to it as `change` makes it.
fn received(change: impl FnOnce(&mut Vec<u8>)) -> (Result<Vec<u8>, CollectiveError>, Vec<Incoming>) {
    let (came, heard) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (ranks, caught, noted) = (ranks(2), came.clone(), heard.clone());
    ranks[0].end.open(Arc::new(move |incoming| lock(&caught).push(incoming)));
    let group = ranks[1].collectives.sub_group(&[0, 1]).expect("both");
    group.send("here", 0, b"twelve bytes").expect("a member");
    let Some(Incoming::Message { from, bytes }) = lock(&came).pop() else { panic!("it was sent") };
    let mut bytes = bytes.to_vec();
    change(&mut bytes);
    let sink = ranks[0].mailbox.sink(Arc::new(move |incoming| lock(&noted).push(incoming)));
    sink(Incoming::Message { from, bytes: bytes.into() });
    let heard = lock(&heard).clone();
    if matches!(heard[..], [Incoming::Message { .. }]) {
        return (Ok(Vec::new()), heard);
    }
    let mut values = [0; 12];
    let group = ranks[0].collectives.sub_group(&[0, 1]).expect("both");
    let found = group.receive("here", 1, &mut values).map(|()| values.to_vec());
    // Whoever sees damage says so to the others.
    let told = ranks[1].mailbox.check();
    assert_eq!(found.is_err(), matches!(told, Err(CollectiveError::Refused { by: 0, .. })), "{told:?}");
    (found, heard)
}

#[test]
fn every_flipped_bit_is_noticed_and_ends_both_ranks() {
    assert_eq!(received(|_| {}), (Ok(b"twelve bytes".to_vec()), vec![]));
    let bits = 8 * (HEADER_BYTES + 4 + 12);
    for bit in 0..bits {
        let (found, to_engine) = received(|bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        if bit < 32 {
            // The engine refuses what starts as nothing does.
            assert_eq!(to_engine.len(), 1, "bit {bit}");
        } else {
            assert!(matches!(found, Err(CollectiveError::Message { from: 1, .. })), "bit {bit}: {found:?}");
            // Gradients may be all that it waits for.
            assert!(matches!(to_engine[..], [Incoming::Unreadable { from: 1, .. }]), "bit {bit}: {to_engine:?}");
        }
    }
    let (cut, _) = received(|bytes| _ = bytes.pop());
    assert!(
        cut.expect_err("cut").to_string().starts_with("rank 1: a collective message with this header has 16 bytes")
    );
}

#[test]
fn messages_of_another_epoch_or_of_nobody_are_refused() {
    for (from, epoch) in [(1, EPOCH + 1), (0, EPOCH), (2, EPOCH)] {
        let ranks = ranks(2);
        let stranger = Mailbox::new(Place { rank: 1, ranks: 2, epoch }, Arc::default());
        let sink = ranks[0].mailbox.sink(nobody());
        ranks[0].end.open(Arc::new(move |incoming| {
            let Incoming::Message { bytes, .. } = incoming else { return };
            sink(Incoming::Message { from, bytes });
        }));
        let stranger = Collectives::new(stranger, ranks[1].end.clone());
        stranger.sub_group(&[0, 1]).expect("both").send("here", 0, &[1u8]).expect("a member");
        let group = ranks[0].collectives.sub_group(&[0, 1]).expect("both");
        let error = group.barrier("here").expect_err("not of this run").to_string();
        let said = format!("rank {from} sent a collective message of epoch {epoch}, expected epoch 7 and another rank");
        assert!(error.starts_with(&said), "{error}");
    }
}
