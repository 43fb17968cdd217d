//! Collective operations beside the engine of gradients, on one transport.

use bytes::Bytes;
use compression::Codec;

use super::*;
use crate::data::engine::{Engine, Inbox};
use crate::data::exchange::{Exchange, Group};
use crate::data::{Gradient, GradientStream, Parameter, Plan};
use crate::note::Ballot;

const RANKS: usize = 3;
const SHAPES: [&[usize]; 3] = [&[40, 256], &[77], &[30, 256]];

fn gradient(rank: usize, step: u64, tensor: usize) -> Vec<f32> {
    let elements = SHAPES[tensor].iter().product();
    (0..elements).map(|at: usize| ((at * 31 + rank * 7 + tensor) as f32 * 0.1 + step as f32).sin()).collect()
}

fn stream(rank: usize, end: &Arc<ChannelTransport>, inbox: Inbox) -> GradientStream {
    let parameter = |(index, shape): (usize, &&[usize])| Parameter { name: index.to_string(), shape: shape.to_vec() };
    let plan = Plan::new(SHAPES.iter().enumerate().map(parameter).collect(), 1 << 10).expect("small");
    let group = Group { rank, ranks: RANKS, members: 1, epoch: EPOCH, chunk_blocks: 4, window: 2 };
    let exchange = Exchange::new(Arc::new(plan), group, Codec::Fp32);
    GradientStream::across(Engine::start(exchange, end.clone(), inbox, Arc::default()).expect("a thread"))
}

#[test]
fn gradients_and_operations_within_the_backward_pass_are_both_right() {
    let ranks = ranks(RANKS);
    let inboxes: Vec<Inbox> = ranks.iter().map(|_| Inbox::default()).collect();
    for (rank, inbox) in ranks.iter().zip(&inboxes) {
        rank.end.open(rank.mailbox.sink(inbox.sink()));
    }
    let streams: Vec<_> =
        inboxes.into_iter().enumerate().map(|(rank, inbox)| stream(rank, &ranks[rank].end, inbox)).collect();
    each(&ranks, &[0, 1, 2], |group, rank| {
        let pair = (rank != 1).then(|| ranks[rank].collectives.sub_group(&[0, 2]).expect("one of them"));
        for step in 1..6 {
            streams[rank].begin(step, 1);
            for tensor in (0..SHAPES.len()).rev() {
                let sum_of = |members: &[usize]| -> Vec<f32> {
                    let parts: Vec<_> = members.iter().map(|&member| gradient(member, step + 9, tensor)).collect();
                    (0..parts[0].len()).map(|at| f32::plain(Reduction::Sum, &at_of(&parts, at))).collect()
                };
                let mut activation = gradient(rank, step + 9, tensor);
                group.all_reduce("layer/backward", Reduction::Sum, &mut activation).expect("all are here");
                assert_eq!(activation, sum_of(&[0, 1, 2]));
                streams[rank].add(tensor, Gradient::Host(&gradient(rank, step, tensor)));
                if let Some(pair) = &pair {
                    let mut activation = gradient(rank, step + 9, tensor);
                    pair.all_reduce("layer/backward", Reduction::Sum, &mut activation).expect("both are here");
                    assert_eq!(activation, sum_of(&[0, 2]));
                }
            }
            let (stop, loss, compute_s) = (false, 0.0, 0.0);
            let ballot = Ballot { finite: true, stop, busy: false, loss, compute_s, parameters: None, codec: None };
            let finished = streams[rank].finish(ballot).expect("all are here");
            for (tensor, sum) in finished.sum.parameters().enumerate() {
                let parts: Vec<_> = (0..RANKS).map(|member| gradient(member, step, tensor)).collect();
                let expected = (0..sum.len()).map(|at| f32::plain(Reduction::Sum, &at_of(&parts, at)) + 0.0);
                assert_eq!(sum, expected.collect::<Vec<f32>>());
            }
        }
    });
}

#[test]
fn what_is_no_collective_message_ends_a_step_that_asks_for_none_and_is_told_before_anybody_asks() {
    let ranks = ranks(RANKS);
    let (tell, told) = channel();
    let inbox = Inbox::default().telling(move |fault| tell.send(fault.to_string()).expect("somebody listens"));
    ranks[0].end.open(ranks[0].mailbox.sink(inbox.sink()));
    let stream = stream(0, &ranks[0].end, inbox);
    stream.begin(1, 1);
    // As a frame of gradients whose fourth byte was damaged on its way.
    ranks[1].end.send(0, Bytes::from_static(b"TRIC, and then what was a frame of gradients"));
    let fault = told.recv_timeout(HANG).expect("it is told");
    assert!(fault.starts_with("rank 1, step 1: "), "{fault}");
    let (stop, loss, compute_s) = (false, 0.0, 0.0);
    let ballot = Ballot { finite: true, stop, busy: false, loss, compute_s, parameters: None, codec: None };
    assert_eq!(stream.vote(ballot).map(drop).expect_err("it is over").to_string(), fault);
}

fn at_of(parts: &[Vec<f32>], at: usize) -> Vec<f32> {
    parts.iter().map(|part| part[at]).collect()
}
