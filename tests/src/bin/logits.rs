//! Prints the tokens of a prompt and the logits after each of them, as one JSON object, from an exported folder:
//! `cargo run -p tests --bin logits -- DIR PROMPT`. `tests/peers/check_transformers.py` compares them with its own.

use std::path::Path;

use anyhow::{Context as _, Result};
use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};
use trainer::step::plain_model;
use trainer::weights::Weights;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().context("usage: logits DIR PROMPT")?;
    let prompt = args.next().context("usage: logits DIR PROMPT")?;
    let weights = Weights::open(Path::new(&dir), Path::new(""))?;
    let tokenizer = weights.tokenizer()?;
    let device = Device::flex();
    let model = plain_model(&weights.config, &device, &weights.read(&weights.config)?);
    let ids: Vec<i32> = tokenizer.encode_prompt("PROMPT", &prompt)?.into_iter().map(|id| id as i32).collect();
    let tokens: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids.clone(), [1, ids.len()]), &device);
    let logits: Vec<f32> = model.forward(tokens, None).into_data().iter::<f32>().collect();
    println!("{}", serde_json::json!({ "ids": ids, "vocab": weights.config.vocab_size, "logits": logits }));
    Ok(())
}
