//! Pieces of a sharded state, and any state from them.

use std::sync::Arc;

use checkpoint::disk::RealDisk;
use checkpoint::reader::Checkpoint;
use checkpoint::writer::{Member, Offer, Outcome, Retention, Writer};
use parallel::data::Plan;
use parallel::data::exchange::{Exchange, Group};
use serde_json::json;

use super::*;
use crate::model::Config;
use crate::recipe;
use crate::state::{self, Meta, residuals::Kept};
use crate::tensor::parts::parts;

fn config() -> Config {
    let text = "
        [model]\nhidden_size = 256\nintermediate_size = 24\nnum_hidden_layers = 1\nnum_attention_heads = 4
        [tokenizer]\nvocab_size = 300\n[data]\nsource = 'text'\ntrain = ['x']
        [train]\nsteps = 5\nseq_len = 8\nmicro_batch_size = 2\n[schedule]\nlearning_rate = 1e-2";
    let recipe = recipe::read("test", text, &[]).expect("a good recipe").1;
    Config::from_keys(&recipe.model, 300, 8, None).expect("complete")
}

/// A state all of whose elements are others; `shift` tells masters from replicas.
fn whole(config: &Config, shift: f32) -> Vec<Vec<f32>> {
    let mut next = shift;
    let mut value = || {
        next += 1.0;
        next
    };
    config.parameters().iter().map(|parameter| (0..parameter.elements()).map(|_| value()).collect()).collect()
}

/// The state of one rank of such.
fn state(config: &Config, sharding: Sharding) -> State {
    let [replicas, masters, m, v] = [0.0, 0.25, 0.5, 0.75].map(|shift| whole(config, shift));
    let mut state = State::fresh(replicas).sharded(&config.parameters(), sharding);
    for (index, parameter) in config.parameters().iter().enumerate() {
        let own = sharding.owned(parameter.elements());
        state.m[index].copy_from_slice(&m[index][own.clone()]);
        state.v[index].copy_from_slice(&v[index][own.clone()]);
        if sharding.has_master(parameter) {
            state.masters[index].copy_from_slice(&masters[index][own]);
        }
    }
    state
}

fn meta(config: &Config) -> Meta {
    serde_json::from_value(json!({
        "step": 4, "updates": 4, "skips": 0, "good_step": 4, "samples": 1, "tokens": 1, "loss": 1.0, "seed": 1,
        "corpus_hash": "", "recipe_hash": "", "model": config, "end_of_text": "x",
    }))
    .expect("complete")
}

/// What one of so many ranks writes that see one folder.
fn share(config: &Config, rank: usize, ranks: usize, sharding: Sharding) -> Share {
    let own = |part: Part| Own { range: shard(part.region.len(), rank, ranks), part };
    let own = parts(config, 0, 1).expect("small").into_iter().map(own).collect();
    Share { rank, ranks, data: rank, replicas: ranks, own, kept: Kept::Nothing, sharding }
}

/// Writes the checkpoint of so many ranks, and returns its folder.
fn written(config: &Config, ranks: usize, codec: Option<Codec>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = Arc::new(Plan::new(config.parameters(), 1 << 20).expect("small"));
    let mut writers: Vec<Writer> = Vec::new();
    let mut parts = Vec::new();
    for rank in 0..ranks {
        let sharding = codec.map_or(Sharding::NONE, |codec| Sharding::of(rank, ranks, codec));
        let share = share(config, rank, ranks, sharding);
        let (pieces, member) = (state::pieces(&share), Member { rank, lead: rank == 0 });
        let retention = Retention { keep_last: 0, keep_every: 0, keep_best: 0 };
        let mut writer =
            Writer::member(Arc::new(RealDisk), folder.path().into(), pieces, member, retention).expect("a thread");
        let state = state(config, sharding);
        let group = Group { rank, ranks, members: 1, window: 1, epoch: 1, chunk_blocks: 64 };
        let exchange = Exchange::new(plan.clone(), group, Codec::Int8);
        let offer = writer.offer(4, json!(meta(config)), Vec::new(), |snapshot| {
            state.snapshot_share(snapshot, &share, &exchange, &[]);
        });
        assert!(matches!(offer, Offer::Taken { .. }));
        for outcome in writer.flush() {
            match outcome {
                Outcome::Written { part, .. } => parts.push(part),
                other => panic!("{other:?}"),
            }
        }
        writers.push(writer);
    }
    writers[0].commit(4, "id".into(), parts);
    let outcomes = writers[0].flush();
    assert!(outcomes.iter().any(|outcome| matches!(outcome, Outcome::Committed { .. })), "{outcomes:?}");
    folder
}

fn load(folder: &tempfile::TempDir, config: &Config, sharding: Sharding) -> State {
    let path = folder.path().join(checkpoint::layout::committed(4));
    let checkpoint = Checkpoint::open(&path).expect("a checkpoint");
    checkpoint.verify().expect("whole");
    let (meta, parts) = (state::meta(&checkpoint).expect("ours"), parts(config, 0, 1).expect("small"));
    let load = |wants: &mut [Want<'_>]| checkpoint.load(wants).map(|_| ());
    State::load((&meta, &parts, sharding), |name| checkpoint.has(name), load).expect("everything is there")
}

#[test]
fn a_checkpoint_of_any_ranks_gives_any_rank_its_state_with_shards_or_without() {
    let config = config();
    let both = [None, Some(Codec::Fp32), Some(Codec::Int8)];
    let cases = [(1, None), (2, None), (2, both[1]), (2, both[2]), (3, both[2]), (4, both[1])];
    for (before, codec_before) in cases {
        let folder = written(&config, before, codec_before);
        for (after, codec) in cases {
            for rank in 0..after {
                let sharding = codec.map_or(Sharding::NONE, |codec| Sharding::of(rank, after, codec));
                let found = load(&folder, &config, sharding);
                let mut expected = state(&config, sharding);
                (expected.step, expected.updates, expected.good_step) = (4, 4, 4);
                let lossy = |codec| codec == Some(Codec::Int8);
                let [replicas, masters] = [0.0, 0.25].map(|shift| whole(&config, shift));
                for (index, parameter) in config.parameters().iter().enumerate() {
                    let has_master = Sharding::of(0, 2, Codec::Int8).has_master(parameter);
                    let own = sharding.owned(parameter.elements());
                    match (lossy(codec_before), lossy(codec)) {
                        // Where one is enough it is the owners'.
                        (true, false) if has_master => expected.weights[index].clone_from(&masters[index]),
                        // Where there was one it is both.
                        (false, true) if has_master => expected.masters[index] = replicas[index][own].to_vec(),
                        _ => {}
                    }
                }
                assert!(found == expected, "{before} {codec_before:?} to rank {rank} of {after} {codec:?}");
            }
        }
    }
}

#[test]
fn each_rank_stores_what_it_owns_once_and_replicas_where_they_are_no_masters() {
    let config = config();
    let all: usize = config.parameters().iter().map(Parameter::elements).sum();
    let lossy: usize = config
        .parameters()
        .iter()
        .filter(|p| Sharding::of(0, 2, Codec::Int8).has_master(p))
        .map(|p| p.elements())
        .sum();
    assert!(lossy > 0 && lossy < all);
    for (codec, expected) in [(None, 3 * all), (Some(Codec::Fp32), 3 * all), (Some(Codec::Int8), 3 * all + lossy)] {
        let of = |rank| {
            let sharding = codec.map_or(Sharding::NONE, |codec| Sharding::of(rank, 3, codec));
            state::pieces(&share(&config, rank, 3, sharding)).iter().map(|piece| piece.region.len()).sum::<usize>()
        };
        assert_eq!((0..3).map(of).sum::<usize>(), expected, "{codec:?}");
    }
}
