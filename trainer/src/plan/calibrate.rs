//! What this machine's device takes for real steps, on tokens without a meaning. This alone of a plan opens a device.

use std::time::Instant;

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use parallel::mesh::Mesh;
use parallel::pipeline::Kind;
use parallel::pipeline::split::LayerCosts;
use parallel::tap::backward_from;

use super::{Plan, Shape, time};
use crate::device;
use crate::error::{Error, Result};
use crate::model::{Config, Hook, Leaf, Llama, Piece, Values};
use crate::recipe::Recipe;
use crate::state::State;
use crate::step::{Batch, Stepper, Word, scalar, untouched};

/// Why steps of the whole model do not fit into so much memory, if they do not.
#[must_use]
pub fn too_large(recipe: &Recipe, config: &Config, memory_bytes: usize) -> Option<String> {
    let mesh = Mesh::new(1, 1, 1).ok()?;
    let shape = Shape { mesh, schedule: Kind::OneForwardOneBackward, virtual_stages: 1, sharded: None };
    Plan::new(&alone(recipe), config, shape, None).ok()?.too_large(memory_bytes)
}

/// The recipe of one rank that takes as many micro-batches as the one with the most of them.
fn alone(recipe: &Recipe) -> Recipe {
    let mut alone = recipe.clone();
    let most = recipe.parallel.micro_batches.iter().copied().max().unwrap_or(1);
    alone.parallel.micro_batches = vec![most];
    (alone.parallel.data, alone.parallel.pipeline, alone.parallel.tensor, alone.parallel.group) = (1, 1, 1, 1);
    (alone.parallel.sequence, alone.parallel.layers) = (false, None);
    alone
}

/// Operations a second of real steps of one rank; the median step counts, the first does not.
///
/// # Errors
/// A device that cannot be opened, or fails.
pub fn flops_per_s(recipe: &Recipe, config: &Config, steps: u32) -> Result<f64> {
    let stepper = Stepper::new(config, &device::open(&recipe.device)?, recipe.parallel.bucket_bytes_max)?;
    let mut state = State::initial(config, 1);
    let alone = alone(recipe);
    // A step's update is not each micro-batch's.
    let batches: Vec<Batch> = (0..alone.parallel.micro_batches[0]).map(|_| batch(recipe, config)).collect();
    let seconds = median(steps, || stepper.step(&mut state, &alone, &batches, Word::default(), untouched).map(|_| ()))?;
    let tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    Ok(time::flops(config, recipe.train.seq_len) * tokens as f64 / seconds)
}

/// What a layer, the embedding before the first and the head behind the last take of a micro-batch, forward and backward, in
/// nanoseconds; of as many passes the median.
///
/// # Errors
/// As [`flops_per_s`].
pub fn layer_costs(recipe: &Recipe, config: &Config, passes: u32) -> Result<LayerCosts> {
    let device = device::open(&recipe.device)?.autodiff();
    // All layers are alike: one is enough, and small beside a model that one device cannot hold.
    let one = Config { num_hidden_layers: 1, ..config.clone() };
    let weights = State::initial(&one, 1).weights;
    let batch = batch(recipe, config);
    let seconds = |first: bool, last: bool| {
        let model = build(&one, Piece { layers: 0..1, first, last }, &device, &weights);
        median(passes, || pass(&model, &batch, &device))
    };
    let [layer, with_table, with_head] = [(false, false), (true, false), (false, true)].map(|(a, b)| seconds(a, b));
    let (layer, with_table, with_head) = (layer?, with_table?, with_head?);
    let nanoseconds = |seconds: f64| (seconds.max(0.0) * 1e9) as u64;
    Ok(LayerCosts {
        layers: vec![nanoseconds(layer).max(1); config.num_hidden_layers],
        before: nanoseconds(with_table - layer),
        after: nanoseconds(with_head - layer),
    })
}

fn batch(recipe: &Recipe, config: &Config) -> Batch {
    let (rows, vocabulary) = (recipe.train.micro_batch_size, config.vocab_size);
    let tokens = rows * recipe.train.seq_len;
    let ids = |shift: usize| (0..tokens).map(|i| ((i + shift) * 2_654_435_761 % vocabulary) as i32).collect();
    Batch { inputs: ids(0), targets: ids(1), rows }
}

fn build(config: &Config, piece: Piece, device: &Device, weights: &[Vec<f32>]) -> Llama {
    let parameters = config.parameters();
    Llama::build_piece(config, piece, device, &mut |name, shape| {
        let index = parameters.iter().position(|parameter| parameter.name == name).expect("the model's parameters");
        let values = Values::Now(TensorData::new(weights[index].clone(), shape.to_vec()));
        Leaf { values, hook: Hook::default() }
    })
}

/// A forward and a backward pass of a piece, until its numbers are there.
fn pass(model: &Llama, batch: &Batch, device: &Device) -> Result<()> {
    let [inputs, targets] = batch.tensors(device);
    let (length, piece) = (batch.targets.len() / batch.rows, model.piece());
    let shape = [batch.rows, length, model.config().hidden_size];
    let numbers = || {
        let values: Vec<f32> =
            (0..shape.iter().product::<usize>()).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect();
        Tensor::<3>::from_data(TensorData::new(values, shape), device)
    };
    let x = if piece.first { model.embed(inputs) } else { numbers().require_grad() };
    let y = model.decode(x, length, None);
    let end = match piece.last {
        true => {
            let loss = model.loss_behind(y, targets);
            let value = loss.clone().inner();
            loss.backward();
            value
        }
        false => {
            let gradient = numbers().inner();
            let value = y.clone().inner().slice([0..1, 0..1, 0..1]).reshape([1]);
            backward_from(y, gradient);
            value
        }
    };
    scalar(end, 0).map(|_| ())
}

fn median(times: u32, mut does: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::new();
    for time in 0..=times {
        let start = Instant::now();
        does()?;
        // The first one warms everything up.
        if time > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().ok_or_else(|| Error::Usage("expected at least one step".into()))
}
