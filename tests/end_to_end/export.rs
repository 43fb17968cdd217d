//! Export, generation from the exported folder alone, and new runs that start from weights.

use std::borrow::Cow;

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};
use checkpoint::export::Dtype;
use checkpoint::reader::{self, Checkpoint};
use trainer::export::Export;
use trainer::model::Config;
use trainer::state::State;
use trainer::step::plain_model;
use trainer::weights::Weights;

use crate::support::{Place, RECIPE, text};

fn logits(weights: &Weights) -> Vec<f32> {
    let model = plain_model(&weights.config, &Device::flex(), &weights.read(&weights.config).expect("its own shape"));
    let ids: Vec<i32> = (0..40).map(|i| i * 7 % 300).collect();
    let tokens: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [1, 40]), &Device::flex());
    model.forward(tokens, None).into_data().as_slice::<f32>().expect("f32").to_vec()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn exported_logits_equal_the_trained_models_and_other_types_come_close() {
    let place = Place::new();
    place.train("a", &["--set", "model.tie_word_embeddings=false"]).ok();
    let (_, newest) = reader::list(&place.path("runs/a/checkpoints")).expect("readable").pop().expect("one");
    let trained = logits(&Weights::checkpoint(Checkpoint::open(&newest).expect("whole")).expect("ours"));
    let runs = place.path("runs");
    let exported = |what: &str| logits(&Weights::open(&place.path(what), &runs).expect("an export"));
    assert!(largest_difference(&trained, &exported("runs/a/export")) <= 1e-5);

    place.run(&["export", "a", "--dtype", "bf16", "--out", "half"]).ok();
    let half = largest_difference(&trained, &exported("half"));
    assert!(half > 0.0 && half < 0.5, "{half}");
    let newest = newest.display().to_string();
    place.run(&["export", &newest, "--format", "hf", "--out", "from-checkpoint"]).ok();
    assert!(largest_difference(&trained, &exported("from-checkpoint")) <= 1e-5);
    let files =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(place.names("from-checkpoint"), files);
}

#[test]
fn an_export_of_weights_in_memory_has_their_logits() {
    let config = Config {
        vocab_size: 300,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        initializer_range: 0.3,
    };
    let state = State::initial(&config, 4);
    let place = Place::new();
    place.train("a", &["--set", "train.steps=5", "--set", "schedule.warmup_steps=0"]).ok();
    let tokenizer = std::fs::read(place.path("runs/a/export/tokenizer.json")).expect("readable");
    let export = Export {
        config: &config,
        tokenizer: &tokenizer,
        end_of_text: "<|endoftext|>",
        end_of_text_id: 0,
        dtype: Dtype::F32,
    };
    let give = |index: usize| Ok(Cow::Borrowed(&*state.weights[index]));
    export.write(&place.path("out"), give).expect("a new folder");
    let ids: Vec<i32> = (0..40).map(|i| i * 7 % 300).collect();
    let tokens: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [1, 40]), &Device::flex());
    let in_memory = plain_model(&config, &Device::flex(), &state.weights).forward(tokens, None).into_data();
    let exported = logits(&Weights::open(&place.path("out"), &place.path("runs")).expect("an export"));
    assert!(largest_difference(in_memory.as_slice::<f32>().expect("f32"), &exported) <= 1e-5);
}

#[test]
fn generation_needs_the_folder_alone_and_stdout_carries_the_continuation_alone() {
    let place = Place::new();
    let sample = place.train("a", &[]).ok().stdout;
    let moved = tempfile::tempdir().expect("a folder");
    let dir = moved.path().join("model");
    std::fs::rename(place.path("runs/a/export"), &dir).expect("one file system");
    let dir = dir.display().to_string();
    let say = |more: &[&str]| {
        place.run(&[&["generate", &dir, "--prompt", "fn f", "--max-tokens", "8"], more].concat()).ok().stdout
    };
    let greedy = say(&[]);
    assert_eq!(greedy, say(&["--temperature", "0", "--seed", "5"]));
    assert!(sample.contains(&format!("---\nfn f{greedy}---\n")), "{sample}\n{greedy}");
    let drawn = |seed: &str| say(&["--temperature", "1.5", "--top-p", "0.95", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"));
    assert!((2..6).any(|seed| drawn(&seed.to_string()) != drawn("1")));
    let long = place.run(&["generate", &dir, "--prompt", "fn f", "--max-tokens", "500"]).ok();
    assert!(long.stdout.len() > greedy.len());
}

#[test]
fn a_new_run_from_a_run_a_checkpoint_or_an_export_starts_where_that_one_ended() {
    let place = Place::new();
    place.train("a", &[]).ok();
    let last: f64 = place.curve("a").last().expect("steps")[1].parse().expect("a number");
    let first: f64 = place.curve("a")[0][1].parse().expect("a number");
    let (_, newest) = reader::list(&place.path("runs/a/checkpoints")).expect("readable").pop().expect("one");
    let recipe = RECIPE.replace("[tokenizer]\nvocab_size = 300\n", "").replace("TEXT", &text().display().to_string());
    let mut curves = Vec::new();
    for (name, from) in [("b", "a"), ("c", newest.to_str().expect("UTF-8")), ("d", "runs/a/export")] {
        // Only the source is named: every size comes with it.
        let model = recipe.find("[model]").expect("a section")..recipe.find("[data]").expect("a section");
        let mut recipe = recipe.clone();
        recipe.replace_range(model, &format!("[model]\nfrom = '{from}'\n"));
        std::fs::write(place.path("small.toml"), recipe).expect("writable");
        place.train(name, &["--set", "train.seed=9", "--set", "train.steps=5"]).ok();
        curves.push(place.curve(name));
    }
    assert!(curves.iter().all(|curve| *curve == curves[0]));
    let start: f64 = curves[0][0][1].parse().expect("a number");
    assert!((start - last).abs() < (start - first).abs() / 4.0, "{first} {last} {start}");
    assert_eq!(curves[0].len(), 5, "fresh steps");
    // It can go on when what it started from is gone.
    std::fs::remove_dir_all(place.path("runs/a")).expect("ours");
    place.train("d", &["--resume", "--set", "train.seed=9", "--set", "train.steps=7"]).ok();
    assert_eq!(place.curve("d").len(), 7);
}
