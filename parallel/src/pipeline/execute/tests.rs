//! A toy model in place of a real one: piece k makes `a x + b` of every element x, and the loss is half the sum of squares. Every
//! gradient is known, and its bits are those of one rank that does everything by itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::*;
use crate::collective::{Collectives, Mailbox, Place};
use crate::pipeline::Kind;
use crate::transport::channel::network;
use crate::transport::simulated::{Network, Quality};
use crate::transport::{Incoming, Loss, Sink};

const ELEMENTS: usize = 3;

/// One rank's pieces, what they have kept for their backward passes, and their gradients.
struct Toy {
    pipeline: Pipeline,
    stage: usize,
    kept: HashMap<(usize, usize), Vec<f32>>,
    gradients: Vec<[f32; 2]>,
    loss: f32,
}

impl Toy {
    fn new(pipeline: Pipeline, stage: usize) -> Self {
        let gradients = vec![[0.0; 2]; pipeline.virtual_stages()];
        Self { pipeline, stage, kept: HashMap::new(), gradients, loss: 0.0 }
    }

    fn weights(place: usize) -> [f32; 2] {
        [1.0 + 0.37 / (place + 1) as f32, 0.11 * place as f32 - 0.3]
    }

    fn compute(&mut self, action: Action, input: Option<Vec<f32>>) -> Option<Vec<f32>> {
        let Action { pass, piece, micro_batch } = action;
        let place = self.pipeline.place(self.stage, piece);
        let [a, b] = Self::weights(place);
        let is_last = place + 1 == self.pipeline.pieces();
        match pass {
            Pass::Forward => {
                let tokens = || (0..ELEMENTS).map(|i| 0.7 * i as f32 - 0.1 * micro_batch as f32).collect();
                let x: Vec<f32> = input.unwrap_or_else(tokens);
                let y = x.iter().map(|x| a * x + b).collect();
                self.kept.insert((piece, micro_batch), x);
                if is_last {
                    self.kept.insert((usize::MAX, micro_batch), y);
                    return None;
                }
                Some(y)
            }
            Pass::Backward => {
                let gradient = input.unwrap_or_else(|| {
                    let y = self.kept.remove(&(usize::MAX, micro_batch)).expect("the loss was computed");
                    self.loss += 0.5 * y.iter().map(|y| y * y).sum::<f32>();
                    y
                });
                let x = self.kept.remove(&(piece, micro_batch)).expect("it was kept");
                let [da, db] = &mut self.gradients[piece];
                *da += gradient.iter().zip(&x).map(|(g, x)| g * x).sum::<f32>();
                *db += gradient.iter().sum::<f32>();
                (place > 0).then(|| gradient.iter().map(|g| g * a).collect())
            }
        }
    }
}

/// The gradients of all pieces, in the order of the model, and the loss, as bits.
fn bits(toys: &[Toy]) -> Vec<u32> {
    let pipeline = toys[0].pipeline;
    let of_place = |place: usize| toys[place % pipeline.stages()].gradients[place / pipeline.stages()];
    let loss: f32 = toys.iter().map(|toy| toy.loss).sum();
    (0..pipeline.pieces()).flat_map(of_place).chain([loss]).map(f32::to_bits).collect()
}

/// One after the other, by hand.
fn by_one(pipeline: Pipeline) -> Vec<u32> {
    let mut toys: Vec<Toy> = (0..pipeline.stages()).map(|stage| Toy::new(pipeline, stage)).collect();
    for micro_batch in 0..pipeline.micro_batches() {
        for pass in [Pass::Forward, Pass::Backward] {
            let mut input = None;
            for turn in 0..pipeline.pieces() {
                let place = if pass == Pass::Forward { turn } else { pipeline.pieces() - 1 - turn };
                let (stage, piece) = (place % pipeline.stages(), place / pipeline.stages());
                input = toys[stage].compute(Action { pass, piece, micro_batch }, input);
            }
        }
    }
    bits(&toys)
}

fn pipelines() -> Vec<Pipeline> {
    let kinds = [
        (Kind::GPipe, 3, 1, 5),
        (Kind::OneForwardOneBackward, 1, 1, 3),
        (Kind::OneForwardOneBackward, 2, 1, 6),
        (Kind::OneForwardOneBackward, 4, 1, 3),
        (Kind::OneForwardOneBackward, 4, 1, 9),
        (Kind::Interleaved, 2, 2, 4),
        (Kind::Interleaved, 2, 3, 6),
        (Kind::Interleaved, 4, 2, 8),
    ];
    kinds
        .map(|(kind, stages, pieces, passes)| Pipeline::new(kind, stages, pieces, passes).expect("a pipeline"))
        .to_vec()
}

fn nobody() -> Sink {
    Arc::new(|_| {})
}

type Ended = Result<Duration, ExecuteError<&'static str>>;

/// One stage's step, as `does` has it computed.
fn step(
    pipeline: Pipeline,
    collectives: &Collectives,
    does: impl FnMut(Action, Option<Vec<f32>>) -> Result<Option<Vec<f32>>, &'static str>,
) -> Ended {
    let all: Vec<usize> = (0..pipeline.stages()).collect();
    let group = collectives.sub_group(&all).expect("all of them");
    execute(pipeline, Way { group: &group, site: "step", elements: ELEMENTS, codec: Codec::Fp32 }, does)
}

/// Ranks as threads on a channel. Rank `victim` fails at its action of this number, and the others are told.
fn run(pipeline: Pipeline, victim: Option<(usize, usize)>) -> (Vec<Toy>, Vec<Ended>) {
    run_each(&vec![pipeline; pipeline.stages()], victim)
}

/// The same, each rank with a pipeline of its own.
fn run_each(pipelines: &[Pipeline], victim: Option<(usize, usize)>) -> (Vec<Toy>, Vec<Ended>) {
    let stages = pipelines.len();
    let ends: Vec<_> = network(stages).into_iter().map(Arc::new).collect();
    let open = |rank: usize| {
        let mailbox = Mailbox::new(Place { rank, ranks: stages, epoch: 1 }, Arc::default());
        ends[rank].open(mailbox.sink(nobody()));
        (mailbox.sink(nobody()), Collectives::new(mailbox, ends[rank].clone()))
    };
    let ranks: Vec<(Sink, Collectives)> = (0..stages).map(open).collect();
    let one = |stage: usize| {
        let (mut toy, mut actions) = (Toy::new(pipelines[stage], stage), 0);
        let ended = step(pipelines[stage], &ranks[stage].1, |action, input| {
            actions += 1;
            if victim == Some((stage, actions - 1)) {
                return Err("it was killed");
            }
            Ok(toy.compute(action, input))
        });
        if ended.is_err() && victim.is_some_and(|(rank, _)| rank == stage) {
            let lost = |rank| Incoming::Lost { rank, why: "the connection was closed".into() };
            ranks.iter().enumerate().filter(|(rank, _)| *rank != stage).for_each(|(_, (sink, _))| sink(lost(stage)));
        }
        (toy, ended)
    };
    thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..stages).map(|stage| scope.spawn(move || one(stage))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).unzip()
    })
}

#[test]
fn every_schedule_gives_the_gradients_of_one_rank_bit_for_bit() {
    for pipeline in pipelines() {
        let (toys, ended) = run(pipeline, None);
        assert!(ended.iter().all(Result::is_ok), "{pipeline:?}: {ended:?}");
        assert_eq!(bits(&toys), by_one(pipeline), "{pipeline:?}");
        assert!(toys.iter().all(|toy| toy.kept.is_empty()), "{pipeline:?}: nothing is kept for a pass that was done");
    }
    // The control: a gradient that one stage leaves out is noticed.
    let pipeline = Pipeline::new(Kind::OneForwardOneBackward, 2, 1, 6).expect("a pipeline");
    let (mut toys, _) = run(pipeline, None);
    toys[1].gradients[0][0] = 0.0;
    assert_ne!(bits(&toys), by_one(pipeline));
}

#[test]
fn ranks_that_are_cut_differently_find_that_out() {
    let of = |pieces| Pipeline::new(Kind::Interleaved, 2, pieces, 2).expect("a pipeline");
    let ended = run_each(&[of(2), of(3)], None).1;
    let said = ended[0].as_ref().expect_err("they are not at the same").to_string();
    assert!(
        said.contains("step/backward/piece 1/micro-batch 0") && said.contains("step/forward/piece 2/micro-batch 0"),
        "{said}"
    );
    let told = ended[1].as_ref().expect_err("it was told").to_string();
    assert!(told.starts_with("rank 0 ended it: "), "{told}");
}

#[test]
fn delays_change_no_bit_and_nobody_gets_stuck() {
    let quality = Quality { delay_max: Duration::from_millis(50), bytes_per_s: 1e6 };
    for (seed, pipeline) in pipelines().into_iter().enumerate() {
        let stages = pipeline.stages();
        let network = Network::new(stages, quality, seed as u64);
        let open = |rank: usize| {
            let mailbox = Mailbox::new(Place { rank, ranks: stages, epoch: 1 }, Arc::default());
            network.open(rank, mailbox.sink(nobody()));
            Collectives::new(mailbox, Arc::new(network.end(rank)))
        };
        let ranks: Vec<_> = (0..stages).map(open).collect();
        let (running, toys) = (AtomicUsize::new(stages), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for (stage, collectives) in ranks.iter().enumerate() {
                let (running, toys) = (&running, &toys);
                scope.spawn(move || {
                    let mut toy = Toy::new(pipeline, stage);
                    let ended = step(pipeline, collectives, |action, input| Ok(toy.compute(action, input)));
                    running.fetch_sub(1, Ordering::SeqCst);
                    ended.expect("nobody is lost");
                    toys.lock().expect("no panic").push(toy);
                });
            }
            while running.load(Ordering::SeqCst) > 0 {
                match network.next() {
                    Some(at) => network.advance(at),
                    None => thread::yield_now(),
                }
            }
        });
        let mut toys = toys.into_inner().expect("no panic");
        toys.sort_by_key(|toy| toy.stage);
        assert_eq!(bits(&toys), by_one(pipeline), "{pipeline:?}");
    }
}

#[test]
fn a_rank_that_dies_at_any_action_is_named_by_all_others() {
    for pipeline in [(Kind::OneForwardOneBackward, 3, 1, 4), (Kind::Interleaved, 2, 2, 2)]
        .map(|(kind, stages, pieces, passes)| Pipeline::new(kind, stages, pieces, passes).expect("a pipeline"))
    {
        for victim in 0..pipeline.stages() {
            for at in 0..pipeline.schedule(victim).len() {
                let (_, ended) = run(pipeline, Some((victim, at)));
                for (stage, ended) in ended.iter().enumerate() {
                    match ended {
                        Err(ExecuteError::Compute { error: "it was killed", .. }) => assert_eq!(stage, victim),
                        Err(ExecuteError::Collective(CollectiveError::Lost(Loss { rank, .. }))) => {
                            assert!(*rank == victim && stage != victim);
                        }
                        // Whoever needs nothing more of the others may be done.
                        Ok(_) => assert_ne!(stage, victim),
                        other => panic!("{pipeline:?}, rank {victim} at {at}: rank {stage} ended with {other:?}"),
                    }
                }
                // Whoever waits for the first of its messages cannot be done.
                assert!(at > 0 || ended.iter().all(Result::is_err), "{pipeline:?}, rank {victim}: {ended:?}");
            }
        }
    }
}

#[test]
fn a_group_of_other_ranks_and_activations_without_room_are_refused() {
    let pipeline = Pipeline::new(Kind::GPipe, 2, 1, 8).expect("a pipeline");
    let mailbox = Mailbox::new(Place { rank: 0, ranks: 2, epoch: 1 }, Arc::default());
    let end = Arc::new(network(2).remove(0));
    let collectives = Collectives::new(mailbox, end);
    let nothing = |_: Action, _: Option<Vec<f32>>| -> Result<Option<Vec<f32>>, &str> { panic!("nothing is computed") };
    let try_with = |members: &[usize], elements| {
        let group = collectives.sub_group(members).expect("some");
        execute(pipeline, Way { group: &group, site: "step", elements, codec: Codec::Fp32 }, nothing)
            .expect_err("refused")
            .to_string()
    };
    assert_eq!(try_with(&[0], 1), "a pipeline of 2 stages over 1 ranks");
    let said = try_with(&[0, 1], 1 << 25);
    assert!(said.starts_with("up to 16 messages of 134217728 bytes may wait from one rank"), "{said}");
}
