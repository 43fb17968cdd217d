//! How long the stages of a pipeline wait for each other, beside the formula of the papers: the executor that runs use, over
//! ranks as threads whose passes sleep in place of computing. Prints one JSON object a pipeline.
//!
//! `cargo run -p parallel --example pipeline_bubble`

use std::error::Error;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use compression::Codec;
use parallel::collective::{Collectives, Mailbox, Place};
use parallel::pipeline::execute::{Way, execute};
use parallel::pipeline::{Action, Kind, Pass, Pipeline};
use parallel::transport::channel::network;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A micro-batch's forward pass through a stage, all of its pieces. A backward pass takes twice as long.
const FORWARD: Duration = Duration::from_millis(12);
/// Elements of activations: one megabyte.
const ELEMENTS: usize = 1 << 18;
const ROUNDS: usize = 5;

fn main() -> Outcome<()> {
    use Kind::{GPipe, Interleaved, OneForwardOneBackward};
    let cases = [
        (GPipe, 4, 1, 8),
        (OneForwardOneBackward, 2, 1, 4),
        (OneForwardOneBackward, 2, 1, 16),
        (OneForwardOneBackward, 4, 1, 8),
        (OneForwardOneBackward, 4, 1, 32),
        (OneForwardOneBackward, 8, 1, 16),
        (Interleaved, 2, 2, 4),
        (Interleaved, 4, 2, 8),
        (Interleaved, 4, 4, 8),
    ];
    for (kind, stages, pieces, passes) in cases {
        let pipeline = Pipeline::new(kind, stages, pieces, passes)?;
        let mut rounds = (0..ROUNDS).map(|_| step(pipeline)).collect::<Outcome<Vec<Duration>>>()?;
        rounds.sort();
        let (step_s, compute_s) = (rounds[ROUNDS / 2].as_secs_f64(), (FORWARD * 3 * passes as u32).as_secs_f64());
        let bubble = step_s / compute_s - 1.0;
        println!(
            "{{\"schedule\":\"{kind:?}\",\"stages\":{stages},\"virtual_stages\":{pieces},\"micro_batches\":{passes},\
             \"step_s\":{step_s:.4},\"compute_s\":{compute_s:.4},\"bubble\":{bubble:.4},\"bubble_formula\":{:.4}}}",
            pipeline.bubble()
        );
    }
    Ok(())
}

/// How long a step takes, from when all are ready to the end of the last.
fn step(pipeline: Pipeline) -> Outcome<Duration> {
    let stages = pipeline.stages();
    let ends: Vec<_> = network(stages).into_iter().map(Arc::new).collect();
    let ranks = ends.iter().enumerate().map(|(rank, end)| {
        let mailbox = Mailbox::new(Place { rank, ranks: stages, epoch: 1 }, Arc::default());
        end.open(mailbox.sink(Arc::new(|_| {})));
        Collectives::new(mailbox, end.clone())
    });
    let (ranks, ready) = (ranks.collect::<Vec<_>>(), Barrier::new(stages));
    let one = |collectives: &Collectives| -> Outcome<(Instant, Instant)> {
        let group = collectives.sub_group(&(0..stages).collect::<Vec<_>>())?;
        let way = Way { group: &group, site: "step", elements: ELEMENTS, codec: Codec::Fp32 };
        ready.wait();
        let start = Instant::now();
        execute(pipeline, way, |action, input| sleep(pipeline, group.index(), action, input))?;
        Ok((start, Instant::now()))
    };
    thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || one(rank))).collect();
        let mut spans = Vec::new();
        for thread in threads {
            spans.push(thread.join().map_err(|_| "a stage panicked")??);
        }
        let (start, end) = (spans.iter().map(|span| span.0).min(), spans.iter().map(|span| span.1).max());
        Ok(end.zip(start).map_or(Duration::ZERO, |(end, start)| end - start))
    })
}

/// In place of a pass of one piece.
fn sleep(
    pipeline: Pipeline,
    stage: usize,
    action: Action,
    input: Option<Vec<f32>>,
) -> Result<Option<Vec<f32>>, std::convert::Infallible> {
    let of_stage = if action.pass == Pass::Forward { FORWARD } else { 2 * FORWARD };
    thread::sleep(of_stage / pipeline.virtual_stages() as u32);
    Ok(pipeline.after(stage, action).map(|_| input.unwrap_or_else(|| vec![0.0; ELEMENTS])))
}
