//! The decoder against what its parts promise: names, causality, the cache, grouped heads, tied heads.

use std::sync::{Arc, Mutex};

use burn::module::ModuleVisitor;
use burn::module::Param;
use parallel::tap::Emit;

use super::*;
use crate::model::init;

fn config(tied: bool, shared: usize) -> Config {
    Config {
        vocab_size: 19,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: shared,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        initializer_range: 0.5,
    }
}

fn model(config: &Config, device: &Device) -> Llama {
    Llama::build(config, device, &mut |name, shape| {
        let mut values = vec![1.0; shape.iter().product()];
        if shape.len() > 1 {
            init::normal(3, name, config.initializer_range, &mut values);
        }
        Leaf { values: Values::Now(TensorData::new(values, shape.to_vec())), hook: Hook::default() }
    })
}

fn tokens(ids: &[i32], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), device)
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().as_slice::<f32>().expect("f32").to_vec()
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4 * (1.0 + a.abs()))
}

#[derive(Default)]
struct Names {
    path: Vec<String>,
    found: Vec<(String, Vec<usize>)>,
}

impl ModuleVisitor for Names {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        self.found.push((self.path.join("."), parameter.val().dims().to_vec()));
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

#[test]
fn the_modules_and_the_list_of_parameters_agree_on_names_and_shapes() {
    for (tied, shared) in [(true, 4), (false, 2)] {
        let config = config(tied, shared);
        let mut names = Names::default();
        model(&config, &Device::flex()).visit(&mut names);
        let mut listed: Vec<_> = config.parameters().into_iter().map(|p| (p.name, p.shape)).collect();
        names.found.sort();
        listed.sort();
        assert_eq!(names.found, listed);
    }
}

#[test]
fn a_token_changes_the_logits_at_its_place_and_after_and_none_before() {
    let device = Device::flex();
    let config = config(true, 2);
    let model = model(&config, &device);
    let a = values(model.forward(tokens(&[1, 2, 3, 4, 5], &device), None));
    let b = values(model.forward(tokens(&[1, 2, 7, 4, 5], &device), None));
    let v = config.vocab_size;
    for place in 0..5 {
        let same = a[place * v..(place + 1) * v] == b[place * v..(place + 1) * v];
        assert_eq!(same, place < 2, "place {place}");
    }
}

#[test]
fn tokens_one_at_a_time_with_a_cache_give_the_logits_of_all_at_once() {
    let device = Device::flex();
    for (tied, shared) in [(true, 4), (false, 1)] {
        let config = config(tied, shared);
        let model = model(&config, &device);
        let ids = [3, 1, 4, 1, 5, 9];
        let whole = values(model.forward(tokens(&ids, &device), None));
        let mut caches = vec![KvCache::default(); config.num_hidden_layers];
        let mut pieces = values(model.forward(tokens(&ids[..3], &device), Some(&mut caches)));
        for id in &ids[3..] {
            pieces.extend(values(model.forward(tokens(&[*id], &device), Some(&mut caches))));
        }
        assert!(close(&whole, &pieces));
    }
}

#[test]
fn the_loss_is_the_cross_entropy_and_its_gradient_agrees_with_differences() {
    let device = Device::flex().autodiff();
    let config = config(true, 2);
    let build = |bump: f32, device: &Device| {
        Llama::build(&config, device, &mut |name, shape| {
            let mut values = vec![1.0; shape.iter().product()];
            if shape.len() > 1 {
                init::normal(3, name, 0.3, &mut values);
            }
            if name == "model.layers.0.self_attn.k_proj.weight" {
                values[5] += bump;
            }
            Leaf { values: Values::Now(TensorData::new(values, shape.to_vec())), hook: Hook::default() }
        })
    };
    let loss = |bump: f32| {
        let plain = Device::flex();
        let model = build(bump, &plain);
        values(model.loss(tokens(&[3, 1, 4, 1], &plain), tokens(&[1, 4, 1, 5], &plain)))[0]
    };
    let logits = values(build(0.0, &device).forward(tokens(&[3, 1, 4, 1], &device), None));
    let expected: f64 = [1usize, 4, 1, 5]
        .iter()
        .zip(logits.chunks(config.vocab_size))
        .map(|(&target, row)| {
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            sum.ln() - f64::from(row[target])
        })
        .sum();
    assert!((f64::from(loss(0.0)) - expected).abs() < 1e-4);

    let model = build(0.0, &device);
    let gradients = model.loss(tokens(&[3, 1, 4, 1], &device), tokens(&[1, 4, 1, 5], &device)).backward();
    let weight = model.model.layers[0].self_attn.k_proj.weight.val();
    let found = values(weight.grad(&gradients).expect("a parameter"))[5];
    let expected = (loss(0.01) - loss(-0.01)) / 0.02;
    assert!((found - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{found} {expected}");
}

/// Names of parameters in the order in which their gradients leave; one of them may lack its anchor.
fn emissions(config: &Config, without_anchor: Option<&str>) -> Vec<String> {
    let device = Device::flex().autodiff();
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let model = Llama::build(config, &device, &mut |name, shape| {
        let (log, own) = (log.clone(), name.to_owned());
        let note = move || log.lock().expect("one thread").push(own.clone());
        let emit = match shape.len() {
            1 => Emit::new::<1>(move |_| {
                note();
                None
            }),
            _ => Emit::new::<2>(move |_| {
                note();
                None
            }),
        };
        let hook = if without_anchor == Some(name) { Hook::without_anchor(emit) } else { Hook::new(emit) };
        let mut values = vec![1.0; shape.iter().product()];
        if shape.len() > 1 {
            init::normal(3, name, 0.3, &mut values);
        }
        Leaf { values: Values::Now(TensorData::new(values, shape.to_vec())), hook }
    });
    model.loss(tokens(&[3, 1, 4, 1], &device), tokens(&[1, 4, 1, 5], &device)).backward();
    let names = log.lock().expect("one thread");
    names.clone()
}

#[test]
fn gradients_leave_layer_by_layer_last_layer_first_and_each_once() {
    for (tied, shared) in [(true, 4), (false, 2)] {
        let config = config(tied, shared);
        let names = emissions(&config, None);
        let layer = |name: &str| match name.split('.').collect::<Vec<_>>()[..] {
            [_, "layers", layer, ..] => layer.parse::<usize>().expect("a number") + 1,
            [_, "embed_tokens", _] => 0,
            _ => usize::MAX,
        };
        let layers: Vec<usize> = names.iter().map(|name| layer(name)).collect();
        assert!(layers.is_sorted_by(|a, b| a >= b), "{names:?}");
        let mut listed: Vec<_> = config.parameters().into_iter().map(|parameter| parameter.name).collect();
        let mut sorted = names.clone();
        sorted.sort();
        listed.sort();
        assert_eq!(sorted, listed, "each once");

        // The control: without its anchor a gradient of the last layer waits for those of the first.
        let last = "model.layers.1.mlp.down_proj.weight";
        let names = emissions(&config, Some(last));
        let place = |name: &str| names.iter().position(|other| other == name).expect("it leaves");
        assert!(place(last) > place("model.layers.0.mlp.gate_proj.weight"), "{names:?}");
    }
}
