//! What the primitive of tensor parallelism costs by itself: a forward and a backward pass of one model with and without a
//! `through` that does nothing wherever a slice has one that exchanges something. The two take turns, and medians are compared.
//!
//! ```text
//! cargo run --release --example through_overhead -- [passes] [hidden] [layers] [sequences] [tokens]
//! ```

use std::time::Instant;

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};
use parallel::tap::through;
use trainer::model::{After, Config, Hook, Leaf, Llama, Values, init};

fn model(config: &Config, device: &Device, with: bool) -> (Llama, usize) {
    let mut places = 0;
    let model = Llama::build(config, device, &mut |name, shape| {
        let mut values = vec![1.0; shape.iter().product()];
        if shape.len() > 1 {
            init::normal(1, name, config.initializer_range, &mut values);
        }
        // Norms begin the parts of a block; columns and the embedding end them.
        let exchanges = ["norm.weight", "o_proj.weight", "down_proj.weight", "embed_tokens.weight"];
        let exchanges = exchanges.iter().any(|end| name.ends_with(end)) && with;
        places += usize::from(exchanges);
        let after = exchanges.then(|| After::new(|x| through(x, |x| x, |gradient| gradient)));
        Leaf { values: Values::Now(TensorData::new(values, shape.to_vec())), hook: Hook::default().then(after) }
    });
    (model, places)
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("numbers"));
    let mut next = |usual| numbers.next().unwrap_or(usual);
    let (passes, hidden, layers, rows, seq) = (next(15), next(384), next(6), next(4), next(128));
    let config = Config {
        vocab_size: 4096,
        hidden_size: hidden,
        intermediate_size: hidden * 8 / 3,
        num_hidden_layers: layers,
        num_attention_heads: 6,
        num_key_value_heads: 6,
        max_position_embeddings: seq,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        initializer_range: 0.02,
    };
    let device = Device::flex().autodiff();
    let ids = |shift: usize| -> Tensor<2, Int> {
        let ids: Vec<i32> = (0..rows * seq).map(|i| ((i + shift) * 2_654_435_761 % 4096) as i32).collect();
        Tensor::from_data(TensorData::new(ids, [rows, seq]), &device)
    };
    let models = [false, true].map(|with| model(&config, &device, with));
    let mut seconds = [Vec::new(), Vec::new()];
    for pass in 0..2 * (passes + 1) {
        // Whoever is second has warmer caches: they take turns at that too.
        let which = (pass + pass / 2) % 2;
        let start = Instant::now();
        let loss = models[which].0.loss(ids(0), ids(1));
        std::hint::black_box(loss.backward());
        if pass > 1 {
            seconds[which].push(start.elapsed().as_secs_f64());
        }
    }
    let [without, with] = seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    });
    let millions = config.parameter_count() as f64 / 1e6;
    println!(
        "{millions:.1} M parameters, {rows} x {seq} tokens, {} places: {without:.4} s a pass without, {with:.4} s with, {:+.2} %",
        models[1].1,
        100.0 * (with / without - 1.0)
    );
}
