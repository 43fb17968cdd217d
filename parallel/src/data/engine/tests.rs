//! Ranks as threads over the channel transport.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use compression::Codec;

use super::*;
use crate::data::exchange::Group;
use crate::data::norm::SquaredNorm;
use crate::data::{Gradient, GradientStream, Parameter, Plan};
use crate::note::Note;
use crate::transport::channel::{ChannelTransport, network};

mod among;

const RANKS: usize = 3;

fn plan() -> Arc<Plan> {
    let parameter = |name: &str, shape: &[usize]| Parameter { name: name.into(), shape: shape.to_vec() };
    let parameters = vec![parameter("table", &[300, 256]), parameter("norm", &[77]), parameter("head", &[280, 256])];
    Arc::new(Plan::new(parameters, 1 << 10).expect("small"))
}

fn streams(codec: Codec) -> Vec<(GradientStream, Aborter)> {
    let ends: Vec<Arc<ChannelTransport>> = network(RANKS).into_iter().map(Arc::new).collect();
    let inboxes: Vec<Inbox> = ends.iter().map(|_| Inbox::default()).collect();
    for (end, inbox) in ends.iter().zip(&inboxes) {
        end.open(inbox.sink());
    }
    let stream = |(rank, (end, inbox)): (usize, (Arc<ChannelTransport>, Inbox))| {
        let group = Group { rank, ranks: RANKS, members: 1, window: usize::MAX, epoch: 1, chunk_blocks: 64 };
        let aborter = inbox.aborter();
        let exchange = Exchange::new(plan(), group, codec);
        let engine = Engine::start(exchange, end, inbox, Arc::default()).expect("a thread");
        (GradientStream::across(engine), aborter)
    };
    ends.into_iter().zip(inboxes).enumerate().map(stream).collect()
}

fn gradient(rank: usize, step: u64, tensor: usize) -> Vec<f32> {
    let n = plan().parameters()[tensor].shape.iter().product();
    (0..n).map(|i: usize| ((i * 31 + rank * 7 + tensor) as f32 * 0.1 + step as f32).sin() * 1e-2).collect()
}

fn ballot(rank: usize) -> Ballot {
    Ballot {
        finite: true,
        stop: rank == 1,
        busy: false,
        loss: rank as f64,
        compute_s: 0.0,
        parameters: None,
        codec: None,
    }
}

fn step(stream: &GradientStream, rank: usize, number: u64) -> Result<Vec<u32>, String> {
    packed_step(stream, rank, number).map(|(sums, _)| sums)
}

/// The sums, and what zstd served.
fn packed_step(stream: &GradientStream, rank: usize, step: u64) -> Result<(Vec<u32>, Packed), String> {
    stream.begin(step, 1);
    for tensor in (0..3).rev() {
        // One parameter of one rank gives nothing: its place is filled with zeros.
        if (rank, tensor) != (2, 1) {
            stream.add(tensor, Gradient::Host(&gradient(rank, step, tensor)));
        }
    }
    let finished = stream.finish(ballot(rank)).map_err(|error| error.to_string())?;
    assert_eq!(finished.voted.verdict, Verdict::Commit);
    assert_eq!(finished.voted.ballots.iter().map(|ballot| ballot.loss).collect::<Vec<_>>(), [0.0, 1.0, 2.0]);
    assert!(finished.voted.ballots[1].stop && !finished.voted.ballots[0].stop);
    assert!(finished.complete.timing.span.is_some());
    Ok((finished.sum.parameters().flat_map(Cow::into_owned).map(f32::to_bits).collect(), finished.complete.packed))
}

#[test]
fn ranks_in_threads_get_the_same_sums_and_the_same_numbers_however_they_are_scheduled() {
    for codec in Codec::ALL {
        let ranks = streams(codec);
        let results: Vec<_> = std::thread::scope(|scope| {
            let run = |(rank, (stream, _)): (usize, &(GradientStream, Aborter))| {
                let mut sums = Vec::new();
                for number in 1..6 {
                    sums.push(step(stream, rank, number).expect("all ranks are there"));
                    let engine = stream.engine().expect("several ranks");
                    let gathered = engine.gather(vec![rank as f64; rank + 1]).expect("all ranks are there");
                    assert_eq!(gathered, [vec![0.0], vec![1.0; 2], vec![2.0; 3]]);
                }
                sums
            };
            let threads: Vec<_> = ranks.iter().enumerate().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert!(results.iter().all(|sums| *sums == results[0]), "{codec}");
        if codec == Codec::Fp32 {
            let mut expected = gradient(0, 5, 1);
            expected.iter_mut().zip(gradient(1, 5, 1)).for_each(|(sum, g)| *sum += g);
            let expected: Vec<u32> = expected.iter().map(|x| (x + 0.0).to_bits()).collect();
            assert_eq!(results[0][4][300 * 256..300 * 256 + 77], expected);
        }
    }
}

/// An engine of rank 0 whose others are not there, and what it tells by itself.
fn telling() -> (Engine, Sink, Aborter, Receiver<String>) {
    let end = Arc::new(network(RANKS).remove(0));
    let (tell, told) = channel();
    let inbox = Inbox::default().telling(move |fault| tell.send(fault.to_string()).expect("somebody listens"));
    let (sink, aborter) = (inbox.sink(), inbox.aborter());
    let group = Group { rank: 0, ranks: RANKS, members: 1, window: usize::MAX, epoch: 1, chunk_blocks: 64 };
    let engine = Engine::start(Exchange::new(plan(), group, Codec::Int8), end, inbox, Arc::default());
    (engine.expect("a thread"), sink, aborter, told)
}

#[test]
fn a_loss_is_told_while_the_rank_computes_with_what_it_needs_next_of_the_lost_one() {
    let (engine, sink, _, told) = telling();
    engine.begin(3);
    sink(Incoming::Lost { rank: 2, why: "the connection was closed".into() });
    let fault = told.recv_timeout(Duration::from_secs(60)).expect("it is told");
    let expected = "step 3: rank 2 is lost: the connection was closed; the next of it that this rank needs is rank 2's part of bucket 0, parameter ";
    assert!(fault.starts_with(expected), "{fault}");
}

#[test]
fn that_somebody_has_ended_the_run_is_not_told_again() {
    let (engine, _, aborter, told) = telling();
    aborter.abort("rank 1 failed");
    assert_eq!(engine.gather(Vec::new()), Err(EngineError::Aborted("rank 1 failed".into())));
    drop(engine);
    assert_eq!(told.recv().map_err(drop), Err(()), "it says nothing");
}

#[test]
fn a_lost_rank_wakes_whoever_waits_and_the_message_says_what_it_waited_for() {
    let mut ranks = streams(Codec::Int8);
    let (waiting, _) = ranks.remove(0);
    let inbox = ranks[0].1.clone();
    drop(inbox);
    let error = std::thread::scope(|scope| {
        let waits = scope.spawn(|| step(&waiting, 0, 1));
        // Whether the loss comes before the wait or into it, it must end it.
        let events = waiting.engine().expect("several ranks").events.clone();
        let lost = Incoming::Lost { rank: 1, why: "the connection was closed".into() };
        events.send(Event::Incoming(lost, None)).expect("alive");
        waits.join().expect("no panic").expect_err("rank 1 is gone")
    });
    assert!(error.contains("step ") && error.contains("rank 1 is lost: the connection was closed"), "{error}");
    // And it stays so.
    assert!(step(&waiting, 0, 2).expect_err("still gone").contains("rank 1 is lost"));
}

#[test]
fn an_abort_wakes_whoever_waits() {
    let ranks = streams(Codec::Int8);
    let error = std::thread::scope(|scope| {
        let waits = scope.spawn(|| step(&ranks[0].0, 0, 1));
        ranks[0].1.abort("the coordinator says so");
        waits.join().expect("no panic").expect_err("aborted")
    });
    assert_eq!(error, "the coordinator says so");
}

#[test]
fn garbage_and_what_is_too_early_or_out_of_turn_end_the_step_with_the_senders_name() {
    let far = Note::Ballot(ballot(1), SquaredNorm::default()).write(1, 9);
    let foreign = Note::Values(vec![1.0]).write(2, 0);
    let round = Note::Values(vec![1.0]).write(1, 3);
    for (bytes, said) in [
        (Bytes::from_static(b"GET / HTTP/1.1\r\n"), "rank 1, step 1: a frame has at least 52 bytes"),
        (Bytes::from(vec![b'x'; 80]), "starts with \"TRIB\""),
        (far, "rank 1, step 1: a ballot of step 9"),
        (foreign, "epoch 2, expected epoch 1"),
        (round, "numbers of round 3, this rank is at round 0"),
    ] {
        let ranks = streams(Codec::Int8);
        let stream = &ranks[0].0;
        stream.begin(1, 1);
        let events = stream.engine().expect("several ranks").events.clone();
        events.send(Event::Incoming(Incoming::Message { from: 1, bytes }, None)).expect("alive");
        let error = stream.finish(ballot(0)).map(|_| ()).expect_err("garbage").to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn what_comes_before_its_step_is_kept_within_bounds() {
    let ranks = streams(Codec::Fp32);
    let stream = &ranks[0].0;
    let events = stream.engine().expect("several ranks").events.clone();
    let flood = Bytes::from(vec![0; 1 << 20]);
    for _ in 0..8 {
        events.send(Event::Incoming(Incoming::Message { from: 2, bytes: flood.clone() }, None)).expect("alive");
    }
    stream.begin(1, 1);
    let error = stream.finish(ballot(0)).map(|_| ()).expect_err("a flood").to_string();
    assert!(error.contains("rank 2") && error.contains("bytes that a step may send"), "{error}");
}

#[test]
fn a_mark_says_what_a_rank_waits_for() {
    let ranks = streams(Codec::Int8);
    let (stream, aborter) = &ranks[0];
    let progress = stream.engine().expect("several ranks").progress().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| step(stream, 0, 1).expect_err("aborted"));
        // Bounded by the hang guard of the test runner alone: the mark comes when the engine has looked.
        while !progress.mark().text.contains("rank 1's part of bucket 0, parameter head") {
            std::thread::sleep(Duration::from_millis(1));
        }
        aborter.abort("enough");
    });
}

#[test]
fn ranks_time_their_links_and_go_on_as_if_nothing_had_been() {
    let ranks = streams(Codec::Int8);
    std::thread::scope(|scope| {
        for (rank, (stream, _)) in ranks.iter().enumerate() {
            scope.spawn(move || {
                let engine = stream.engine().expect("several ranks");
                let before = engine.progress().mark().count;
                engine.link_bytes_per_s().expect("all ranks are there");
                let rate = engine.link_bytes_per_s().expect("and once more");
                assert!(rate > 0.0 && rate.is_finite(), "{rate}");
                // Every part of it counts as progress, so that a slow link is no stall.
                assert!(engine.progress().mark().count >= before + 32);
                step(stream, rank, 1).expect("all ranks are there");
                assert_eq!(engine.gather(vec![1.0]), Ok(vec![vec![1.0]; RANKS]));
            });
        }
    });
}

#[test]
fn a_rank_that_is_lost_in_the_burst_is_named_with_what_was_missing() {
    let ranks = streams(Codec::Int8);
    let engine = ranks[0].0.engine().expect("several ranks");
    let events = engine.events.clone();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| engine.link_bytes_per_s().expect_err("rank 2 is gone").to_string());
        // The others are at the burst but send none of it.
        for from in [1, 2] {
            let bytes = Note::Values(Vec::new()).write(1, 0);
            events.send(Event::Incoming(Incoming::Message { from, bytes }, None)).expect("alive");
        }
        let filler = Note::Filler.write(1, 0);
        events.send(Event::Incoming(Incoming::Message { from: 2, bytes: filler }, None)).expect("alive");
        while !engine.progress().mark().text.contains("rank 2's burst, of which 1 of 32 parts are here") {
            std::thread::sleep(Duration::from_millis(1));
        }
        let lost = Incoming::Lost { rank: 2, why: "the connection was closed".into() };
        events.send(Event::Incoming(lost, None)).expect("alive");
        let error = waits.join().expect("no panic");
        assert!(
            error.contains("rank 2 is lost: the connection was closed; this rank waited for rank 2's burst"),
            "{error}"
        );
    });
    // A part that nobody waits for is an error with its sender's name.
    let ranks = streams(Codec::Int8);
    let stream = &ranks[0].0;
    let events = stream.engine().expect("several ranks").events.clone();
    stream.begin(1, 1);
    let bytes = Note::Filler.write(1, 0);
    events.send(Event::Incoming(Incoming::Message { from: 1, bytes }, None)).expect("alive");
    let error = stream.finish(ballot(0)).map(|_| ()).expect_err("not from the rank before").to_string();
    assert!(error.contains("rank 1, step 1: note 0 of a burst, expected note 0 of 32 from rank 2"), "{error}");
}

#[test]
fn zstd_changes_no_bit_of_any_sum_and_says_what_it_serves_and_why() {
    let sums = |link_bytes_per_s: Option<f64>| -> Vec<(Vec<Vec<u32>>, usize, Vec<String>)> {
        let ranks = streams(Codec::Int8);
        std::thread::scope(|scope| {
            let run = |(rank, (stream, _)): (usize, &(GradientStream, Aborter))| {
                if let Some(rate) = link_bytes_per_s {
                    stream.engine().expect("several ranks").pack(rate).expect("memory");
                }
                let (mut sums, mut reasons, mut buckets) = (Vec::new(), Vec::new(), 0);
                // Past the first trial of every bucket.
                for number in 60..72 {
                    let (sum, packed) = packed_step(stream, rank, number).expect("all ranks are there");
                    sums.push(sum);
                    buckets = packed.buckets;
                    reasons.extend(packed.changes.into_iter().map(|change| change.decision.reason));
                }
                (sums, buckets, reasons)
            };
            let threads: Vec<_> = ranks.iter().enumerate().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    };
    let (plain, packed) = (sums(None), sums(Some(1.0)));
    for ((plain, none, silent), (packed, buckets, reasons)) in plain.iter().zip(&packed) {
        assert!(plain == packed, "the same bits");
        assert!(*none == 0 && silent.is_empty());
        assert!(*buckets > 0 && reasons.iter().all(|reason| reason.contains("zstd")), "{buckets} {reasons:?}");
    }
}
