use std::collections::BTreeMap;

use proptest::prelude::*;

use super::search::search;
use super::*;
use crate::cut::Cut;

fn recipe(more: &str) -> Recipe {
    let text = format!(
        "[model]\nhidden_size = 64\nintermediate_size = 172\nnum_hidden_layers = 8\nnum_attention_heads = 8\n\
         num_key_value_heads = 2\n[tokenizer]\nvocab_size = 1001\n[data]\nsource = 'text'\ntrain = ['none']\n\
         [train]\nsteps = 3\nseq_len = 32\nmicro_batch_size = 2\nmicro_batches = 8\n[schedule]\nlearning_rate = 1e-3\n{more}"
    );
    crate::recipe::read("test", &text, &[]).expect("a recipe").1
}

fn config(recipe: &Recipe) -> Config {
    Config::from_keys(&recipe.model, 1001, recipe.train.seq_len, None).expect("a shape")
}

fn shape(data: usize, pipeline: usize, tensor: usize) -> Shape {
    let mesh = Mesh::new(data, pipeline, tensor).expect("a mesh");
    Shape { mesh, schedule: Kind::OneForwardOneBackward, virtual_stages: 1, sharded: None }
}

fn plan(shape: Shape) -> Plan {
    let recipe = recipe("");
    Plan::new(&recipe, &config(&recipe), shape, None).expect("a plan")
}

proptest! {
    #[test]
    fn parts_of_a_replica_hold_every_element_once_but_for_what_is_repeated(
        stages in 1usize..5, tensor in prop::sample::select(vec![1usize, 2, 4, 8]), tied in any::<bool>(),
    ) {
        let config = Config { tie_word_embeddings: tied, ..config(&recipe("")) };
        let mesh = Mesh::new(1, stages, tensor).expect("a mesh");
        let pipeline = Pipeline::new(Kind::OneForwardOneBackward, stages, 1, 8).expect("a pipeline");
        let mut held = BTreeMap::new();
        let pieces = pieces(&config, 32, stages, None).expect("enough layers");
        let cut = Cut::of(mesh, Kind::OneForwardOneBackward, pieces.clone());
        for rank in 0..mesh.ranks() {
            let parameters = Part::new(&config, mesh, pipeline, &pieces, rank).parameters();
            // What is planned is what a run has.
            let run: Vec<_> = cut.parts(&config, rank).expect("small").iter().map(|part| part.parameter()).collect();
            prop_assert_eq!(&parameters, &run);
            for parameter in parameters {
                *held.entry(parameter.name.clone()).or_insert(0) += parameter.elements();
            }
        }
        for parameter in config.parameters() {
            let kind = parameter.name.rsplit('.').nth(1).unwrap_or_default();
            let times = match kind {
                _ if kind.ends_with("norm") || kind.ends_with("layernorm") => tensor,
                "k_proj" | "v_proj" => parallel::mesh::replicas(config.num_key_value_heads, tensor),
                "embed_tokens" if tied && stages > 1 => 2,
                _ => 1,
            };
            prop_assert_eq!(held.get(&parameter.name).copied(), Some(times * parameter.elements()), "{}", parameter.name);
        }
    }
}

#[test]
fn one_rank_sends_nothing() {
    let one = plan(shape(1, 1, 1));
    assert_eq!((one.ranks.len(), one.ranks[0].sent, one.codec), (1, Sent::default(), None));
}

#[test]
fn more_ranks_take_less_memory_each_and_what_they_send_follows_the_axis() {
    let one = plan(shape(1, 1, 1)).peak_bytes();
    let tensor = plan(shape(1, 1, 2));
    let stages = plan(shape(1, 2, 1));
    assert!(tensor.peak_bytes() < one && stages.peak_bytes() < one);
    let sent = tensor.ranks[0].sent;
    assert!(sent.tensor_bytes > 0 && sent.data_bytes == 0 && sent.pipeline_bytes == 0, "{sent:?}");
    // Eight micro-batches of 64 tokens and 64 elements, there and back, and the tied table's gradient.
    assert_eq!(stages.ranks[0].sent.pipeline_bytes, 4 * (8 * 64 * 64 + 1001 * 64));
    assert!((stages.bubble - 1.0 / 8.0).abs() < 1e-12);
    let (whole, sharded) = (plan(shape(4, 1, 1)), plan(Shape { sharded: Some(Codec::Fp32), ..shape(4, 1, 1) }));
    assert!(sharded.ranks[0].memory.optimizer_bytes < whole.ranks[0].memory.optimizer_bytes / 3);
    // With a table that is large enough to be compressed: as f32 four bytes come back for each of its elements, and as int8
    // differences as many as sums take, beside a master.
    let large = |sharded| {
        let recipe = recipe("");
        let config = Config { vocab_size: 4000, ..config(&recipe) };
        Plan::new(&recipe, &config, Shape { sharded, ..shape(4, 1, 1) }, None).expect("a plan")
    };
    let [whole, sharded, int8] = [None, Some(Codec::Fp32), Some(Codec::Int8)].map(large);
    let sent = |plan: &Plan| plan.ranks[0].sent.data_bytes;
    assert!(sent(&sharded) > sent(&whole));
    assert_eq!(sent(&int8), sent(&whole), "gradients and sums are int8 in this recipe");
    assert!(int8.ranks[0].memory.optimizer_bytes > sharded.ranks[0].memory.optimizer_bytes);
}

#[test]
fn what_does_not_fit_is_refused_with_the_largest_term() {
    let plan = plan(shape(1, 1, 1));
    let peak = plan.peak_bytes();
    assert_eq!(plan.too_large(peak), None);
    let why = plan.too_large(peak - 1).expect("a byte too much");
    assert!(
        why.starts_with(&format!("it does not fit: rank 0 would take {peak} bytes at the peak, expected at most")),
        "{why}"
    );
    assert!(why.contains(" are the most of it, "), "{why}");
}

#[test]
fn faults_of_a_mesh_are_named_all_at_once() {
    let recipe = recipe("");
    let error = Plan::new(&recipe, &config(&recipe), shape(1, 9, 3), None).expect_err("no such mesh").to_string();
    assert!(error.contains("divide the 8 query heads") && error.contains("divide the 2 key-value heads"), "{error}");
    assert!(error.contains("at least a layer for each of 9 stages"), "{error}");
}

#[test]
fn a_search_keeps_the_step() {
    let recipe = recipe("");
    let config = config(&recipe);
    let figures = Figures { flops_per_s: 1e9, link_bytes_per_s: Some(1e8) };
    let found = search(&recipe, &config, 8, Some(&figures), None).expect("meshes");
    assert_eq!(found.plans.len(), 10, "all ways to write 8 as a product of three");
    assert!(found.plans.iter().all(|plan| plan.sequences == 16 && plan.mesh.ranks() == 8));
    let step_s = |plan: &Plan| plan.time.expect("a time").step_s;
    assert!(found.plans.windows(2).all(|pair| step_s(&pair[0]) <= step_s(&pair[1])));
    // With too little memory there is none, and with five ranks none keeps the step.
    let none = search(&recipe, &config, 8, None, Some(1)).expect("meshes");
    assert_eq!((none.plans.len(), none.too_large), (0, 10));
    let five = search(&recipe, &config, 5, None, None).expect("meshes");
    assert_eq!(
        five.plans.iter().map(|plan| plan.mesh.to_string()).collect::<Vec<_>>(),
        ["data 1 x pipeline 5 x tensor 1"]
    );
    assert!(search(&recipe, &config, 0, None, None).is_err());
}

#[test]
fn a_slower_link_makes_a_longer_step_and_hides_what_it_can() {
    let recipe = recipe("[parallel]\ndata = 2\n");
    let config = config(&recipe);
    let step_s = |link| {
        let figures = Figures { flops_per_s: 1e9, link_bytes_per_s: link };
        Plan::new(&recipe, &config, shape(2, 1, 1), Some(&figures)).expect("a plan").time.expect("a time")
    };
    let (none, fast, slow) = (step_s(None), step_s(Some(1e9)), step_s(Some(1e5)));
    assert_eq!(none.exposed_s, 0.0);
    assert!(fast.exposed_s < 0.01 * fast.compute_s, "{fast:?}");
    assert!(slow.exposed_s > slow.compute_s, "{slow:?}");
}

/// A step of 512 tokens of a layer of 43,264 weights eight times, and of a head of 64,064: six operations for each weight and
/// token, and for each token of a layer twelve for each element of each of the 32 tokens that attention looks at.
const LAYER: f64 = 6.0 * (2.0 * 64.0 * 64.0 + 2.0 * 64.0 * 16.0 + 3.0 * 64.0 * 172.0) + 12.0 * 64.0 * 32.0;
const HEAD: f64 = 6.0 * 1001.0 * 64.0;

/// What a step takes, of given terms.
#[derive(Clone, Copy)]
struct Terms {
    /// Operations of the costliest rank.
    flops: f64,
    bubble: f64,
    tensor_bytes: f64,
    data_bytes: f64,
    /// The part of gradients that comes with the last bucket, and layers of the costliest stage.
    last: f64,
    layers: f64,
}

impl Terms {
    fn step_s(self, flops_per_s: f64, link: f64) -> f64 {
        let compute = self.flops / flops_per_s;
        let window = compute - compute * 2.0 / (3.0 * self.layers);
        let gradients = self.data_bytes / link;
        let exposed = f64::max(gradients - window, gradients * self.last);
        compute + compute * self.bubble + self.tensor_bytes / link + exposed
    }
}

#[test]
fn a_predicted_step_is_the_arithmetic_of_what_was_given() {
    let tokens = 8.0 * 2.0 * 32.0;
    // Buckets hold more than the model, so that with several layers one layer's part is the last.
    let all = tokens * (8.0 * LAYER + HEAD);
    for (mesh, flops, bubble, layers) in [
        ((1, 1, 1), all, 0.0, 8.0),
        ((2, 1, 1), all, 0.0, 8.0),
        ((1, 1, 2), all / 2.0, 0.0, 8.0),
        // Five layers, and three with the head, which costs as much as one and a third.
        ((1, 2, 1), tokens * 5.0 * LAYER, 1.0 / 8.0, 5.0),
        ((2, 1, 4), all / 4.0, 0.0, 8.0),
    ] {
        let recipe = recipe(&format!("[parallel]\ndata = {}\n", mesh.0));
        let planned = |flops_per_s, link| {
            let figures = Figures { flops_per_s, link_bytes_per_s: link };
            let shape = shape(mesh.0, mesh.1, mesh.2);
            Plan::new(&recipe, &config(&recipe), shape, Some(&figures)).expect("a plan")
        };
        let step_s = |flops_per_s, link| planned(flops_per_s, link).time.expect("a time").step_s;
        let sent = planned(1e9, None).ranks.iter().map(|rank| rank.sent).collect::<Vec<_>>();
        let most = |of: fn(&Sent) -> usize| sent.iter().map(of).max().expect("a rank") as f64;
        let (tensor_bytes, data_bytes) = (most(|sent| sent.tensor_bytes), most(|sent| sent.data_bytes));
        assert_eq!((data_bytes > 0.0, tensor_bytes > 0.0), (mesh.0 > 1, mesh.2 > 1), "{mesh:?}");
        let terms = Terms { flops, bubble, tensor_bytes, data_bytes, last: 1.0 / layers, layers };
        let same = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        // A link that hides all but the last bucket's, and one that hides nothing; a device three times as fast.
        for (flops_per_s, link) in [(1e9, 1e8), (3e9, 1e8), (1e9, 1e4)] {
            let found = step_s(flops_per_s, Some(link));
            assert!(same(found, terms.step_s(flops_per_s, link)), "{mesh:?}: {found}");
            // The controls: without any one of the terms that the mesh has, it is another one.
            let without = [
                (true, Terms { flops: flops * (1.0 - 12.0 * 64.0 * 32.0 / LAYER), ..terms }),
                (bubble > 0.0, Terms { bubble: 0.0, ..terms }),
                (tensor_bytes > 0.0, Terms { tensor_bytes: 0.0, ..terms }),
                (data_bytes > 0.0, Terms { data_bytes: 0.0, ..terms }),
            ];
            for (has, wrong) in without {
                assert_eq!(same(found, wrong.step_s(flops_per_s, link)), !has, "{mesh:?}");
            }
        }
        // Without a link nothing is said of it.
        assert!(same(step_s(1e9, None), flops / 1e9 * (1.0 + bubble)), "{mesh:?}");
    }
}
