//! Which part of each parameter a rank of a tensor group holds.

use std::ops::Range;

use parallel::data::{Parameter, Part};
use parallel::mesh::{cut, key_value_heads, replicas};

use super::{Role, layer};
use crate::error::{Error, Result};
use crate::model::Config;

/// What rank `rank` of `ranks` holds of each parameter, in the order of the forward pass. The mesh was checked against the
/// model.
///
/// # Errors
/// A model whose parameters do not fit the address space.
pub fn parts(config: &Config, rank: usize, ranks: usize) -> Result<Vec<Part>> {
    config.parameters().into_iter().map(|parameter| of(config, parameter, rank, ranks)).collect()
}

/// What it holds of one of them.
///
/// # Errors
/// As [`parts`].
pub fn part(config: &Config, index: usize, rank: usize, ranks: usize) -> Result<Part> {
    let parameter = config.parameters().swap_remove(index);
    of(config, parameter, rank, ranks)
}

fn of(config: &Config, parameter: Parameter, rank: usize, ranks: usize) -> Result<Part> {
    let whole = parameter.shape.clone();
    let heads = |heads: Range<usize>| heads.start * config.head_dim()..heads.end * config.head_dim();
    let query = heads(cut(config.num_attention_heads, rank, ranks));
    let part = match (Role::of(layer(&parameter.name)), parameter.name.contains(".self_attn.")) {
        (Role::Norm, _) => Part::whole(parameter).map(|part| part.counting(rank == 0)),
        (Role::KeyValue, _) => {
            let shared = config.num_key_value_heads;
            // Of those that hold the same head the first one counts.
            let counts = rank.is_multiple_of(replicas(shared, ranks));
            Part::slice(parameter, 0, heads(key_value_heads(shared, rank, ranks))).map(|part| part.counting(counts))
        }
        (Role::Rows, true) => Part::slice(parameter, 0, query),
        (Role::Columns, true) => Part::slice(parameter, 1, query),
        (Role::Columns, false) => Part::slice(parameter, 1, cut(whole[1], rank, ranks)),
        (Role::Rows, false) | (Role::Embedding | Role::Head, _) => {
            Part::slice(parameter, 0, cut(whole[0], rank, ranks))
        }
    };
    part.map_err(|error| Error::Usage(error.to_string()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn config(heads: usize, shared: usize, tied: bool) -> Config {
        Config {
            vocab_size: 19,
            hidden_size: 4 * heads,
            intermediate_size: 21,
            num_hidden_layers: 2,
            num_attention_heads: heads,
            num_key_value_heads: shared,
            max_position_embeddings: 32,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: tied,
            initializer_range: 0.02,
        }
    }

    #[test]
    fn what_counts_of_all_parts_is_every_element_once() {
        for (heads, shared, tied) in [(4, 4, true), (8, 2, false), (8, 1, true), (4, 2, false)] {
            let config = config(heads, shared, tied);
            for ranks in [1, 2, 4] {
                let all: Vec<Vec<Part>> = (0..ranks).map(|rank| parts(&config, rank, ranks).expect("small")).collect();
                for (index, parameter) in config.parameters().into_iter().enumerate() {
                    let mut seen = vec![0.0; parameter.elements()];
                    for (rank, parts) in all.iter().enumerate() {
                        let part = &parts[index];
                        assert_eq!(part, &self::part(&config, index, rank, ranks).expect("small"));
                        if part.counts {
                            let mut once = vec![0.0; parameter.elements()];
                            part.put(&vec![1.0; part.region.len()], &mut once);
                            seen.iter_mut().zip(once).for_each(|(seen, once)| *seen += once);
                        }
                    }
                    assert!(seen.iter().all(|&seen| seen == 1.0), "{} over {ranks} ranks", parameter.name);
                }
            }
        }
    }

    #[test]
    fn a_rank_has_the_key_and_value_heads_that_its_queries_look_at() {
        for (heads, shared, ranks) in [(8, 2, 4), (8, 4, 2), (8, 1, 4), (8, 8, 4)] {
            let config = config(heads, shared, true);
            for rank in 0..ranks {
                let rows = |name: &str| {
                    let parts = parts(&config, rank, ranks).expect("small");
                    let part = parts.into_iter().find(|part| part.whole.name.ends_with(name)).expect("a layer");
                    part.region.start[0] / config.head_dim()..part.region.end[0] / config.head_dim()
                };
                let (query, key) = (rows("q_proj.weight"), rows("k_proj.weight"));
                let wanted: Vec<usize> = query.clone().map(|head| head / (heads / shared)).collect();
                assert_eq!(wanted.first(), Some(&key.start));
                assert_eq!(wanted.last().map(|last| last + 1), Some(key.end));
                // Repeated by as many as its own queries are to a head, each finds its own.
                let group = query.len() / key.len();
                assert!(wanted.iter().enumerate().all(|(at, &head)| key.start + at / group == head));
            }
        }
    }
}
