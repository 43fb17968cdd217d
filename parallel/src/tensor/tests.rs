//! Every operation against what it says, forward and backward; and what an error leaves behind. Members are threads.

use std::sync::mpsc::channel;
use std::thread;

use super::*;
use crate::collective::{Collectives, Mailbox, Place};
use crate::progress::Progress;
use crate::transport::Incoming;
use crate::transport::channel::network;

const B: usize = 2;
const T: usize = 6;
const D: usize = 3;

/// The members of a tensor group, and their mailboxes.
fn members(count: usize) -> Vec<(TensorGroup, Mailbox)> {
    let all: Vec<usize> = (0..count).collect();
    let member = |(rank, end): (usize, _)| {
        let end: Arc<crate::transport::channel::ChannelTransport> = Arc::new(end);
        let place = Place { rank, ranks: count, epoch: 1 };
        let mailbox = Mailbox::new(place, Arc::<Progress>::default());
        end.open(mailbox.sink(Arc::new(|_| ())));
        let group = Collectives::new(mailbox.clone(), end).sub_group(&all).expect("all ranks");
        (TensorGroup::new(group), mailbox)
    };
    network(count).into_iter().enumerate().map(member).collect()
}

/// Whole numbers, so that sums are exact, and other ones for every member.
fn numbers(member: usize, seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + member * 13 + seed * 5) % 23) as f32 - 11.0).collect()
}

/// The output of an operation on `[B, tokens, D]`, and the gradient of its input when the output's is `numbers`.
fn run(member: usize, tokens: usize, operation: impl Fn(Tensor<3>) -> Tensor<3>) -> (Vec<f32>, Vec<f32>) {
    let device = Device::flex().autodiff();
    let data = TensorData::new(numbers(member, 1, B * tokens * D), [B, tokens, D]);
    let x = Tensor::<3>::from_data(data, &device).require_grad();
    let y = operation(x.clone());
    let shape = y.dims();
    let weights = TensorData::new(numbers(member, 2, shape.iter().product()), shape);
    let gradients = (y.clone() * Tensor::from_data(weights, &device)).sum().backward();
    let values = |x: Tensor<3>| x.into_data().try_into_vec::<f32>().expect("f32");
    (values(y.inner()), values(x.grad(&gradients).expect("an input")))
}

fn sum(parts: &[Vec<f32>]) -> Vec<f32> {
    (0..parts[0].len()).map(|i| parts.iter().map(|part| part[i]).sum()).collect()
}

/// The tokens of one member of a `[B, T, D]`.
fn part(all: &[f32], member: usize, n: usize) -> Vec<f32> {
    let each = T / n * D;
    (0..B).flat_map(|b| all[b * T * D + member * each..][..each].to_vec()).collect()
}

/// All tokens of members' parts.
fn whole(parts: &[Vec<f32>]) -> Vec<f32> {
    let each = parts[0].len() / B;
    (0..B).flat_map(|b| parts.iter().flat_map(move |part| part[b * each..(b + 1) * each].to_vec())).collect()
}

#[test]
fn every_operation_does_what_it_says_in_both_directions() {
    type Way = fn(&[Vec<f32>], usize) -> Vec<f32>;
    type Operation = fn(&TensorGroup, Tensor<3>) -> Tensor<3>;
    let own: Way = |all, member| all[member].clone();
    let summed: Way = |all, _| sum(all);
    let gathered: Way = |all, _| whole(all);
    let scattered: Way = |all, member| part(&sum(all), member, all.len());
    let table: [(&str, Operation, bool, Way, Way); 4] = [
        ("copy", |group, x| group.copy(x, "layer"), false, own, summed),
        ("reduce", |group, x| group.reduce(x, "layer"), false, summed, own),
        ("gather", |group, x| group.gather(x, "layer"), true, gathered, scattered),
        ("scatter", |group, x| group.scatter(x, "layer"), false, scattered, gathered),
    ];
    for n in [1, 2, 3] {
        for (name, operation, of_a_part, forward, backward) in table {
            let tokens = if of_a_part { T / n } else { T };
            let found: Vec<_> = thread::scope(|scope| {
                let each = |(member, (group, _)): (usize, (TensorGroup, Mailbox))| {
                    scope.spawn(move || {
                        let found = run(member, tokens, |x| operation(&group, x));
                        assert_eq!(group.check(), Ok(()));
                        found
                    })
                };
                let threads: Vec<_> = members(n).into_iter().enumerate().map(each).collect();
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
            });
            let inputs: Vec<_> = (0..n).map(|member| numbers(member, 1, B * tokens * D)).collect();
            let weights: Vec<_> = (0..n).map(|member| numbers(member, 2, found[member].0.len())).collect();
            for (member, (value, gradient)) in found.into_iter().enumerate() {
                assert_eq!(value, forward(&inputs, member), "{name} of {n}, forward");
                assert_eq!(gradient, backward(&weights, member), "{name} of {n}, backward");
            }
        }
    }
}

#[test]
fn a_lost_member_ends_the_pass_with_its_name_and_everything_after_it_at_once() {
    let mut two = members(2);
    let (_, _gone) = two.pop().expect("two");
    let (group, mailbox) = two.pop().expect("two");
    let sink = mailbox.sink(Arc::new(|_| ()));
    let (began, begun) = channel();
    thread::scope(|scope| {
        let pass = scope.spawn(|| {
            began.send(()).expect("somebody listens");
            // Both passes come to their end, with the right shapes.
            let (value, gradient) = run(0, T, |x| group.copy(group.reduce(x, "layers.3.o_proj"), "norm"));
            assert_eq!((value.len(), gradient.len()), (B * T * D, B * T * D));
            let part = group.scatter(Tensor::zeros([B, T, D], &Device::flex()), "norm");
            assert_eq!(part.dims(), [B, T / 2, D]);
            group.check()
        });
        begun.recv().expect("it began");
        // Before the wait or in it: either way it ends.
        sink(Incoming::Lost { rank: 1, why: "the connection was closed".into() });
        let error = pass.join().expect("no panic").expect_err("rank 1 is gone");
        assert!(error.to_string().contains("rank 1 is lost: the connection was closed"), "{error}");
        let same = group.check().expect_err("it stays");
        assert_eq!(same, error);
    });
}

#[test]
fn tokens_that_cannot_be_shared_are_named_and_nobody_waits() {
    let (group, _) = members(4).remove(0);
    let part = group.scatter(Tensor::zeros([1, 6, D], &Device::flex()), "layers.0.o_proj");
    assert_eq!(part.dims(), [1, 2, D]);
    let error = group.check().expect_err("6 tokens of 4 members").to_string();
    assert_eq!(error, "layers.0.o_proj/forward: 6 tokens cannot be cut into 4 equal parts");
}

#[test]
fn numbers_are_reduced_in_place() {
    let found: Vec<Vec<f32>> = thread::scope(|scope| {
        let each = |(member, (group, _)): (usize, (TensorGroup, Mailbox))| {
            scope.spawn(move || {
                let mut values = vec![member as f32, -(member as f32)];
                group.reduce_values("largest", Reduction::Max, &mut values);
                group.reduce_values("sum", Reduction::Sum, &mut values);
                values
            })
        };
        let threads: Vec<_> = members(3).into_iter().enumerate().map(each).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(found, vec![vec![6.0, 0.0]; 3]);
}
