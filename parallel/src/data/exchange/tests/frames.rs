//! What is sent, and what is refused.

use super::*;

#[test]
fn what_is_sent_is_the_formula_and_a_header_a_frame() {
    use crate::data::shard::payload_bytes_sent;
    use crate::frame::HEADER_BYTES;
    for codec in Codec::ALL {
        let mut sides: Vec<_> = (0..3).map(|rank| side(rank, 3, 64, codec)).collect();
        let (_, sent) = step(&mut sides, 1, |rank, tensor| dense(rank, 1, tensor), |_| 0);
        let tensors: Vec<(usize, Codec)> =
            plan().parameters().iter().map(|p| (p.shape.iter().product(), codec_of(p, codec))).collect();
        for (rank, sent) in sent.into_iter().enumerate() {
            let frames = |owner: usize| -> usize {
                tensors.iter().map(|&(elements, _)| chunks(shard(elements, owner, 3), 64).count()).sum()
            };
            let others: usize = (0..3).filter(|&owner| owner != rank).map(frames).sum();
            let headers = HEADER_BYTES * (others + 2 * frames(rank));
            assert_eq!(sent, payload_bytes_sent(&tensors, rank, 3) + headers, "{codec}, rank {rank}");
        }
    }
}

#[test]
fn frames_without_a_place_are_refused_by_name_and_change_nothing() {
    let mut sides: Vec<_> = (0..2).map(|rank| side(rank, 2, 64, Codec::Int8)).collect();
    let mut other: Vec<_> = (0..2).map(|rank| side(rank, 2, 64, Codec::Bf16)).collect();
    for side in sides.iter_mut().chain(&mut other) {
        side.begin(1);
    }
    let frames = |side: &mut Exchange| {
        let mut frames = Vec::new();
        give(side, 2, |tensor| gradient(1, 1, tensor), &mut |out| frames.push(out.frame));
        frames
    };
    let (frames, foreign) = (frames(&mut sides[1]), frames(&mut other[1]));
    let to_zero = &mut sides[0];
    let mut take = |from: usize, frame: &Bytes| to_zero.receive(from, frame, &mut |_| {}).map_err(|e| e.to_string());
    take(1, &frames[0]).expect("the first");
    assert!(take(1, &frames[0]).expect_err("again").contains("a second frame for one chunk"));
    assert!(take(1, &foreign[1]).expect_err("bf16").contains("expected int8, found bf16"));
    assert!(take(7, &frames[1]).expect_err("no rank").contains("expected another rank of 2"));
    let mut damaged = frames[1].to_vec();
    damaged[100] ^= 1;
    assert!(take(1, &damaged.into()).expect_err("damaged").contains("checksum"));
    take(1, &frames[1]).expect("nothing was taken from the bad ones");
    to_zero.begin(2);
    let stale = to_zero.receive(1, &frames[1], &mut |_| {}).expect_err("of step 1").to_string();
    assert!(stale.contains("expected epoch 1, step 2; a frame of epoch 1, step 1 came"), "{stale}");
}
