//! The loss on held-out text.

use burn::tensor::Device;
use parallel::data::StreamError;
use parallel::data::engine::Engine;
use parallel::note::VALUES_MAX;
use parallel::progress::{Progress, Stage};

use super::signals::Stop;
use crate::data::tokens::Tokens;
use crate::error::Result;
use crate::model::Config;
use crate::step::{Batch, plain_model, scalar, sliced_model};
use crate::tensor::Slice;

/// The sum of the cross entropy over a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum in nats.
    pub nats: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
}

impl Evaluation {
    /// Mean in nats a token.
    #[must_use]
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }
}

/// Evaluates `windows` windows of `seq_len` tokens, evenly spread over the text; 0 for every token, the last and shorter
/// window included. Each token is predicted from those before it in its window. Ranks take turns with the batches; the
/// sum is in the order of the batches, the same bits at any number of ranks. `None` when any rank was asked to stop.
///
/// # Errors
/// The device fails, or another rank.
pub fn evaluate(at: &Place<'_>, weights: &[Vec<f32>], tokens: &Tokens, windows: usize) -> Result<Option<Evaluation>> {
    let model = match at.slice {
        // The last window may have a number of tokens that cannot be cut.
        Some(slice) => sliced_model(&slice.with_all_tokens(), at.config, at.device, weights)?,
        None => plain_model(at.config, at.device, weights),
    };
    let (whole, seq) = (usize::try_from(tokens.windows(at.seq_len)).unwrap_or(usize::MAX), at.seq_len);
    let count = if windows == 0 { whole } else { windows.min(whole) };
    let starts: Vec<usize> = (0..count).map(|i| i * whole / count * seq).collect();
    let mut batches: Vec<(Vec<usize>, usize)> = starts.chunks(at.rows).map(|some| (some.to_vec(), seq)).collect();
    let rest = (tokens.len() - 1) - whole * seq;
    if windows == 0 && rest > 0 {
        batches.push((vec![whole * seq], rest));
    }
    // Ranks that hold one model together take the same batches, and have the same sums.
    let (rank, ranks) = at.engine.map_or((0, 1), |engine| (engine.group().rank, engine.group().ranks));
    let replica = at.engine.map_or(1, |engine| engine.members().ranks() / ranks);
    let mut sum = Evaluation { nats: 0.0, tokens: 0 };
    for round in batches.chunks(VALUES_MAX * ranks) {
        let mut own = Vec::new();
        for (starts, length) in round.iter().skip(rank).step_by(ranks) {
            at.progress.enter(Stage::Evaluating);
            if at.stops()? {
                own.clear();
                break;
            }
            let [inputs, targets] = batch(tokens, starts, *length).tensors(at.device);
            let loss = model.loss(inputs, targets);
            at.slice.map_or(Ok(()), |slice| slice.check(at.step))?;
            own.push(scalar(loss, at.step)?);
        }
        at.progress.enter(Stage::Waiting);
        let all = match at.engine {
            Some(engine) => engine.gather(own).map_err(StreamError::from)?,
            None => vec![own],
        };
        // A rank that was asked to stop has sent fewer than its share.
        let all: Vec<&Vec<f64>> = all.iter().step_by(replica).collect();
        let whole = (0..ranks).all(|rank| all[rank].len() == round.iter().skip(rank).step_by(ranks).count());
        if !whole {
            return Ok(None);
        }
        for (index, (starts, length)) in round.iter().enumerate() {
            sum.nats += all[index % ranks][index / ranks];
            sum.tokens += (starts.len() * length) as u64;
        }
    }
    Ok(Some(sum))
}

/// Where and when an evaluation runs.
#[derive(Debug)]
pub struct Place<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// Without autodiff.
    pub device: &'a Device,
    /// Tokens a window.
    pub seq_len: usize,
    /// Windows a forward pass.
    pub rows: usize,
    /// For messages.
    pub step: u64,
    /// Asked between two batches.
    pub stop: &'a Stop,
    /// The way to the other ranks, if there are any.
    pub engine: Option<&'a Engine>,
    /// This rank's slice of the model, where several hold it together.
    pub slice: Option<&'a Slice>,
    /// How far this rank is.
    pub progress: &'a Progress,
}

impl Place<'_> {
    /// Whether this rank was asked to stop, or another one that holds the same model: they stop at the same batch.
    fn stops(&self) -> Result<bool> {
        match self.slice {
            Some(slice) => slice.any("evaluate/stop", self.stop.asked()),
            None => Ok(self.stop.asked()),
        }
    }
}

/// The windows that start at these tokens, with what follows each token.
#[must_use]
pub fn batch(tokens: &Tokens, starts: &[usize], length: usize) -> Batch {
    let mut batch = Batch { inputs: Vec::new(), targets: Vec::new(), rows: starts.len() };
    for &start in starts {
        tokens.read(start, length, &mut batch.inputs);
        tokens.read(start + 1, length, &mut batch.targets);
    }
    batch
}
