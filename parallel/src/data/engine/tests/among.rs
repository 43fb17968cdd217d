//! Two pairs of ranks that sum apart and vote together: of each pair both hold the same part of a model.

use std::borrow::Cow;

use super::*;
use crate::data::Part;
use crate::frame::{Header, Phase};

/// Rank 2 d + t holds part t.
const WORLD: usize = 4;
const ROWS: usize = 300;

/// Half of a table, and a vector of which rank 0's and 2's copy counts.
fn half(t: usize) -> Arc<Plan> {
    let parameter = |name: &str, shape: &[usize]| Parameter { name: name.into(), shape: shape.to_vec() };
    let rows = t * ROWS / 2..(t + 1) * ROWS / 2;
    let table = Part::slice(parameter("up", &[ROWS, 256]), 0, rows).expect("inside");
    let norm = Part::whole(parameter("norm", &[77])).expect("small").counting(t == 0);
    Arc::new(Plan::of_parts(vec![table, norm], 1 << 10).expect("small"))
}

/// The verdict of a step, the sums, and the norm.
type Step = (Verdict, Vec<Vec<f32>>, f64);

fn world(codec: Codec) -> Vec<(GradientStream, Arc<ChannelTransport>)> {
    let ends: Vec<Arc<ChannelTransport>> = network(WORLD).into_iter().map(Arc::new).collect();
    let inboxes: Vec<Inbox> = ends.iter().map(|_| Inbox::default()).collect();
    ends.iter().zip(&inboxes).for_each(|(end, inbox)| end.open(inbox.sink()));
    let rank = |(rank, (end, inbox)): (usize, (Arc<ChannelTransport>, Inbox))| {
        let (d, t) = (rank / 2, rank % 2);
        let group = Group { rank: d, ranks: 2, members: 1, window: 2, epoch: 1, chunk_blocks: 64 };
        let exchange = Exchange::new(half(t), group, codec);
        let members = Members::new(rank, WORLD, &[t, 2 + t]);
        let engine = Engine::start_among((exchange, members), end.clone(), inbox, Arc::default()).expect("a thread");
        (GradientStream::across(engine), end)
    };
    ends.into_iter().zip(inboxes).enumerate().map(rank).collect()
}

/// Ranks of a pair have the same part of the vector's gradient, as both parts of a model do.
fn own(rank: usize, step: u64) -> [Vec<f32>; 2] {
    let numbers = |n: usize, seed: usize| {
        (0..n).map(|i| ((i * 31 + seed * 7) as f32 * 0.1 + step as f32).sin() * 1e-2).collect::<Vec<f32>>()
    };
    [numbers(ROWS / 2 * 256, rank), numbers(77, 10 + rank / 2)]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn each_pair_sums_its_part_all_vote_and_the_norm_counts_every_element_once() {
    for codec in [Codec::Fp32, Codec::Int8] {
        let found: Vec<_> = std::thread::scope(|scope| {
            let run = |(rank, (stream, end)): (usize, (GradientStream, Arc<ChannelTransport>))| {
                let mut steps = Vec::new();
                for step in 1..4 {
                    stream.begin(step, 1);
                    for (tensor, gradient) in own(rank, step).iter().enumerate().rev() {
                        stream.add(tensor, Gradient::Host(gradient));
                    }
                    let finite = (rank, step) != (3, 2);
                    let finished = stream.finish(Ballot { finite, ..ballot(rank) }).expect("all are there");
                    let losses: Vec<f64> = finished.voted.ballots.iter().map(|ballot| ballot.loss).collect();
                    assert_eq!(losses, [0.0, 1.0, 2.0, 3.0]);
                    let sums: Vec<Vec<f32>> = finished.sum.parameters().map(Cow::into_owned).collect();
                    steps.push((finished.voted.verdict, sums, finished.voted.norm));
                }
                let engine = stream.engine().expect("several ranks");
                let gathered = engine.gather(vec![rank as f64]).expect("all are there");
                assert_eq!(gathered, [[0.0], [1.0], [2.0], [3.0]]);
                assert!(engine.link_bytes_per_s().expect("all are there") > 0.0);
                (steps, end)
            };
            let threads: Vec<_> =
                world(codec).into_iter().enumerate().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).map(|(steps, _)| steps).collect()
        });
        let steps: &[Vec<Step>] = &found;
        for (number, verdict) in [Verdict::Commit, Verdict::Skip, Verdict::Commit].into_iter().enumerate() {
            assert!(steps.iter().all(|steps| steps[number].0 == verdict), "a step that one skips all skip");
            for t in 0..2 {
                let of = |rank: usize| steps[rank][number].1.iter().map(|sum| bits(sum)).collect::<Vec<_>>();
                assert_eq!(of(t), of(2 + t), "both ranks of a pair");
                let [a, b] = [own(t, number as u64 + 1), own(2 + t, number as u64 + 1)];
                let exact: Vec<f32> = a[0].iter().zip(&b[0]).map(|(a, b)| 0.0 + a + b).collect();
                // The half has fewer elements than travel compressed; its tensor has more.
                assert_eq!(of(t)[0] == bits(&exact), codec == Codec::Fp32, "{codec}");
            }
            let square = |values: &[f32]| values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            let (first, second) = (&steps[0][number].1, &steps[1][number].1);
            let (once, twice) = (
                square(&first[0]) + square(&second[0]) + square(&first[1]),
                square(&first[0]) + square(&second[0]) + square(&first[1]) + square(&second[1]),
            );
            for steps in steps {
                let norm = steps[number].2;
                assert!((norm - once.sqrt()).abs() < 1e-9 * norm, "{norm} {}", once.sqrt());
                assert!((norm - twice.sqrt()).abs() > 1e-6 * norm, "the control: what two hold, counted twice");
            }
        }
    }
}

#[test]
fn a_gradient_of_a_rank_that_sums_with_others_is_refused_by_name() {
    let world = world(Codec::Fp32);
    let header = Header {
        phase: Phase::Scatter,
        codec: Codec::Fp32,
        epoch: 1,
        step: 1,
        bucket: 0,
        tensor: 1,
        start: 0,
        elements: 77,
    };
    world[0].0.begin(1, 1);
    world[1].1.send(0, header.frame(&[0; 4 * 77]));
    let error = world[0].0.finish(ballot(0)).map(|_| ()).expect_err("rank 1 holds another part").to_string();
    assert!(error.contains("rank 1") && error.contains("sums its own with ranks [0, 2]"), "{error}");
}
