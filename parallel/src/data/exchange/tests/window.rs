//! What waits for a slow rank.

use super::*;

/// Bytes of frames that wait for a rank behind its window.
fn waiting_bytes(side: &Exchange, to: usize) -> usize {
    side.queues[to].waiting_bytes()
}

/// What a rank that is never read from makes rank 0 of four hold, at most: frames under way to it, and bytes of frames
/// that wait behind them.
fn held_for_a_slow_rank(window: usize) -> (usize, usize) {
    const SLOW: usize = 2;
    let side = |rank| Exchange::new(plan(), Group { window, ..group(rank, 4, 8) }, Codec::Int8);
    let mut sides: Vec<_> = (0..4).map(side).collect();
    sides.iter_mut().for_each(|side| side.begin(1));
    let mut waiting = Vec::new();
    for bucket in 0..plan().buckets().len() {
        for (rank, side) in sides.iter_mut().enumerate() {
            give(side, bucket, |tensor| gradient(rank, 1, tensor), &mut |out| waiting.push((rank, out)));
        }
    }
    let (mut under_way, mut waits) = (0, 0);
    let mut stuck: Vec<(usize, Outgoing)> = Vec::new();
    loop {
        // To the slow rank only what nothing else is left for.
        let next = match waiting.iter().position(|(_, out): &(_, Outgoing)| out.to != SLOW) {
            Some(at) => waiting.swap_remove(at),
            None if !waiting.is_empty() => waiting.remove(0),
            None => break,
        };
        stuck.clear();
        stuck.extend(waiting.iter().filter(|(from, out)| (*from, out.to) == (0, SLOW)).cloned());
        (under_way, waits) = (under_way.max(stuck.len()), waits.max(waiting_bytes(&sides[0], SLOW)));
        let (from, out) = next;
        sides[out.to].receive(from, &out.frame, &mut |next| waiting.push((out.to, next))).expect("good frames");
        sides[from].left(out.to, &mut |next| waiting.push((from, next)));
    }
    assert!(sides.iter().all(|side| side.is_complete() && sums(side) == sums(&sides[0])));
    (under_way, waits)
}

#[test]
fn a_slow_rank_makes_the_others_hold_a_window_of_frames_and_their_own_sums_and_no_more() {
    let own_sums: usize = plan()
        .parameters()
        .iter()
        .map(|parameter| {
            let codec = codec_of(parameter, Codec::Int8).second_stage();
            let owned = chunks(shard(parameter.elements(), 0, 4), 8);
            owned.map(|chunk| codec.payload_bytes(chunk.len()) + crate::frame::HEADER_BYTES).sum::<usize>()
        })
        .sum();
    let (under_way, waits) = held_for_a_slow_rank(3);
    assert!(under_way <= 3, "{under_way} frames");
    assert!(waits <= own_sums, "{waits} bytes, of {own_sums} that its own sums have");
    // The control: without a window everything is encoded at once.
    let (under_way, _) = held_for_a_slow_rank(usize::MAX);
    assert!(under_way > 15, "{under_way} frames");
}

#[test]
fn a_gradient_is_encoded_when_it_may_leave() {
    let group = Group { window: 2, ..group(0, 2, 16) };
    let mut side = Exchange::new(plan(), group, Codec::Int8);
    side.begin(1);
    let mut sent = 0;
    for bucket in 0..plan().buckets().len() {
        give(&mut side, bucket, |tensor| gradient(0, 1, tensor), &mut |_| sent += 1);
    }
    assert_eq!(sent, 2);
    assert!(!side.is_reduced(), "it cannot vote before it has looked at all of its gradient");
    let chunks: usize = (0..TENSORS).map(|tensor| side.chunks_of(tensor, 1).count()).sum();
    while sent < chunks {
        let before = sent;
        side.left(1, &mut |_| sent += 1);
        assert_eq!(sent, before + 1);
    }
    assert_eq!(side.unsent, 0);
}
