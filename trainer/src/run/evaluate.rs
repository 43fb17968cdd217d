//! The loss on held-out text.

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use parallel::collective::KEPT_BYTES_MAX;
use parallel::data::StreamError;
use parallel::data::engine::Engine;
use parallel::note::VALUES_MAX;
use parallel::progress::{Progress, Stage};

use super::signals::Stop;
use crate::data::tokens::Tokens;
use crate::error::Result;
use crate::model::{Config, Llama};
use crate::pipeline::{self, AHEAD_MAX};
use crate::replica::Replica;
use crate::step::{Batch, plain_model, plain_pieces, scalar, values};

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
    let computes = Computes::new(at, weights);
    let (whole, seq) = (usize::try_from(tokens.windows(at.seq_len)).unwrap_or(usize::MAX), at.seq_len);
    let count = if windows == 0 { whole } else { windows.min(whole) };
    let starts: Vec<usize> = (0..count).map(|i| i * whole / count * seq).collect();
    let mut batches: Vec<(Vec<usize>, usize)> = starts.chunks(at.rows).map(|some| (some.to_vec(), seq)).collect();
    let rest = (tokens.len() - 1) - whole * seq;
    if windows == 0 && rest > 0 {
        batches.push((vec![whole * seq], rest));
    }
    // Ranks that hold one model together take the same batches, and one of them says the sums.
    let (rank, ranks) = at.engine.map_or((0, 1), |engine| (engine.group().rank, engine.group().ranks));
    let (replica, speaker) = at.replica.map_or((1, 0), |replica| (replica.ranks(), replica.speaker()));
    let mut sum = Evaluation { nats: 0.0, tokens: 0 };
    for round in batches.chunks(VALUES_MAX * ranks) {
        let mut own = Vec::new();
        let mine: Vec<&(Vec<usize>, usize)> = round.iter().skip(rank).step_by(ranks).collect();
        for some in mine.chunks(computes.at_once(at)) {
            at.progress.enter(Stage::Evaluating);
            if at.stops()? {
                own.clear();
                break;
            }
            let some: Vec<Batch> = some.iter().map(|(starts, length)| batch(tokens, starts, *length)).collect();
            own.extend(computes.losses(at, &some)?);
        }
        at.progress.enter(Stage::Waiting);
        let all = match at.engine {
            Some(engine) => engine.gather(own).map_err(StreamError::from)?,
            None => vec![own],
        };
        at.progress.enter(Stage::Evaluating);
        // A rank that was asked to stop has sent fewer than its share.
        let all: Vec<&Vec<f64>> = all.iter().skip(speaker).step_by(replica).collect();
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
    /// The other ranks that hold this model, where several hold it together.
    pub replica: Option<&'a Replica>,
    /// How far this rank is.
    pub progress: &'a Progress,
}

impl Place<'_> {
    /// Whether this rank was asked to stop, or another one that holds the same model: they stop at the same batch.
    fn stops(&self) -> Result<bool> {
        match self.replica {
            Some(replica) => replica.any("evaluate/stop", self.stop.asked()),
            None => Ok(self.stop.asked()),
        }
    }
}

/// What computes losses: the model, or what this rank has of it.
struct Computes {
    pieces: Vec<Llama>,
    replica: Option<Replica>,
}

impl Computes {
    fn new(at: &Place<'_>, weights: &[Vec<f32>]) -> Self {
        // The last window may have a number of tokens that cannot be cut.
        let replica = at.replica.map(Replica::with_all_tokens);
        let pieces = match &replica {
            Some(replica) => plain_pieces(replica, at.config, at.device, weights),
            None => vec![plain_model(at.config, at.device, weights)],
        };
        Self { pieces, replica }
    }

    /// Batches between two places at which somebody may ask to stop: with stages as many as may wait at one, whose activations
    /// are f32 at the most.
    fn at_once(&self, at: &Place<'_>) -> usize {
        let bytes = size_of::<f32>() * at.rows * at.seq_len * at.config.hidden_size * self.pieces.len();
        if self.stage().is_some() { (KEPT_BYTES_MAX / bytes).clamp(1, AHEAD_MAX) } else { 1 }
    }

    fn stage(&self) -> Option<&pipeline::Stage> {
        self.replica.as_ref().and_then(Replica::stage)
    }

    /// The loss of each batch, in nats; nothing where another rank of the replica says it.
    fn losses(&self, at: &Place<'_>, batches: &[Batch]) -> Result<Vec<f64>> {
        let mut losses = Vec::new();
        let check = || self.replica.as_ref().map_or(Ok(()), |replica| replica.check(at.step));
        let Some(stage) = self.stage() else {
            for batch in batches {
                let [inputs, targets] = batch.tensors(at.device);
                let loss = self.pieces[0].loss(inputs, targets);
                check()?;
                losses.push(scalar(loss, at.step)?);
            }
            return Ok(losses);
        };
        let length = |batch: &Batch| batch.targets.len() / batch.rows;
        let elements = |number: usize| batches[number].targets.len() * at.config.hidden_size;
        stage.forward(batches.len(), elements, |action, input| {
            let (batch, model) = (&batches[action.micro_batch], &self.pieces[action.piece]);
            let [inputs, targets] = batch.tensors(at.device);
            let shape = [batch.rows, length(batch), at.config.hidden_size];
            let x = match input {
                Some(values) => Tensor::from_data(TensorData::new(values, shape), at.device),
                None => model.embed(inputs),
            };
            let y = model.decode(x, length(batch), None);
            let out = match model.piece().last {
                true => {
                    losses.push(scalar(model.loss_behind(y, targets), at.step)?);
                    None
                }
                false => Some(values(y, at.step)?),
            };
            check()?;
            Ok(out)
        })?;
        Ok(losses)
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
