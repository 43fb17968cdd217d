//! Text from a model: greedy, or drawn with temperature and top-p (Holtzman et al. 2020) under a seed.

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::model::attention::KvCache;
use crate::replica::Replica;
use crate::rng;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; below 1 sharpens, above 1 flattens.
    pub temperature: f64,
    /// Draw among the likeliest tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Names the stream of random numbers.
    pub seed: u64,
}

/// What says what may come next.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A model.
    Model(&'a Llama),
    /// Ranks that hold one together, and what this one has of it, piece by piece.
    Replica(&'a Replica, &'a [Llama]),
}

/// Why the text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As many tokens as were asked for.
    Count,
    /// The model ended the text.
    EndOfText,
    /// The model's longest context is full.
    Context,
}

/// The tokens that a continuation of `prompt` starts from: a text starts after the end of the one before it, as in
/// training. `from` names where the prompt was written, `longest` is the model's context.
///
/// # Errors
/// A prompt that the tokenizer cannot say or the context cannot hold.
pub fn prompt_tokens(tokenizer: &Tokenizer, from: &str, prompt: &str, longest: usize) -> Result<Vec<u32>> {
    let mut ids = vec![tokenizer.end_of_text()];
    ids.extend(tokenizer.encode_prompt(from, prompt)?);
    if ids.len() > longest {
        let (most, found) = (longest - 1, ids.len() - 1);
        return Err(Error::Usage(format!(
            "{from}: expected at most {most} tokens (the model's context is {longest}), found {found}"
        )));
    }
    Ok(ids)
}

/// Continues `ids` (of [`prompt_tokens`]) by at most `count` tokens and hands each piece of text to `out` as soon as it
/// is whole. Ranks that hold a model together call it together, and all have the same text.
///
/// # Errors
/// A device that fails, an output that is closed; of several ranks, one that is lost.
pub fn generate(
    source: Source<'_>,
    tokenizer: &Tokenizer,
    ids: Vec<u32>,
    count: usize,
    sampling: Sampling,
    mut out: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Ending> {
    let pieces = match source {
        Source::Model(model) => std::slice::from_ref(model),
        Source::Replica(_, pieces) => pieces,
    };
    let longest = pieces[0].config().max_position_embeddings;
    let mut caches: Vec<_> = pieces.iter().map(|piece| vec![KvCache::default(); piece.piece().layers.len()]).collect();
    let start = ids.len();
    let mut new = ids;
    let (mut said, mut shown) = (Vec::new(), 0);
    let mut ending = Ending::Count;
    let closed = Error::io("write", "standard output");
    let mut show = |text: &str, shown: &mut usize| {
        let piece = text.get(*shown..).unwrap_or_default().to_owned();
        *shown = text.len();
        out(&piece)
    };
    for turn in 0..count {
        if start + said.len() > longest {
            ending = Ending::Context;
            break;
        }
        let logits = match source {
            Source::Model(model) => last_logits(model, &new, &mut caches[0])?,
            Source::Replica(replica, pieces) => replica.last_logits(pieces, &new, &mut caches)?,
        };
        let next = choose(&logits, sampling, turn as u64);
        if next == tokenizer.end_of_text() {
            ending = Ending::EndOfText;
            break;
        }
        said.push(next);
        new = vec![next];
        // A character may take several tokens: what ends in a replacement character may not be whole yet.
        let text = tokenizer.decode(&said)?;
        if !text.ends_with('\u{fffd}')
            && let Err(error) = show(&text, &mut shown)
        {
            return Err(closed(error));
        }
    }
    show(&tokenizer.decode(&said)?, &mut shown).map_err(closed)?;
    Ok(ending)
}

fn last_logits(model: &Llama, ids: &[u32], caches: &mut [KvCache]) -> Result<Vec<f32>> {
    last(model.forward(tokens(ids, &model.device()), Some(caches)))
}

/// One row of tokens.
pub(crate) fn tokens(ids: &[u32], device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let count = ids.len();
    Tensor::from_data(TensorData::new(ids, [1, count]), device)
}

/// The numbers of the last token.
pub(crate) fn last(logits_btv: Tensor<3>) -> Result<Vec<f32>> {
    let [_, count, _] = logits_btv.dims();
    let failed = |what: String| Error::Device { step: 0, what };
    let data = logits_btv.narrow(1, count - 1, 1).try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    Ok(data.iter::<f32>().collect())
}

/// The next token. Ties go to the lower id.
fn choose(logits: &[f32], sampling: Sampling, turn: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return order.first().map_or(0, |&id| id as u32);
    }
    let largest = order.first().map_or(0.0, |&id| f64::from(logits[id]));
    let weight = |id: usize| libm::exp((f64::from(logits[id]) - largest) / sampling.temperature);
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut kept = 0.0;
    let mut nucleus = 0;
    while nucleus < order.len() && (nucleus == 0 || kept < sampling.top_p * total) {
        kept += weight(order[nucleus]);
        nucleus += 1;
    }
    let mut left = rng::uniform(sampling.seed, turn) * kept;
    for &id in &order[..nucleus] {
        left -= weight(id);
        if left < 0.0 {
            return id as u32;
        }
    }
    order.get(nucleus.saturating_sub(1)).map_or(0, |&id| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64, seed: u64) -> Sampling {
        Sampling { temperature, top_p, seed }
    }

    #[test]
    fn greedy_takes_the_likeliest_and_the_lower_of_equals() {
        assert_eq!(choose(&[0.0, 2.0, 2.0, 1.0], sampling(0.0, 1.0, 1), 0), 1);
    }

    #[test]
    fn a_small_nucleus_is_greedy_and_draws_follow_the_probabilities() {
        let logits = [1.0f32, 3.0, 2.0];
        assert!((0..100).all(|turn| choose(&logits, sampling(1.0, 0.5, 1), turn) == 1));
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (id, &logit) in logits.iter().enumerate() {
            let hits = (0..20_000).filter(|&turn| choose(&logits, sampling(1.0, 1.0, 9), turn) == id as u32).count();
            let expected = f64::from(logit).exp() / total;
            assert!((hits as f64 / 20_000.0 - expected).abs() < 0.015, "{id}: {hits}");
        }
        // Without the third token the other two share its probability.
        assert!((0..2_000).all(|turn| choose(&logits, sampling(1.0, 0.9, 9), turn) != 0));
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let draw = |seed| (0..30).map(|turn| choose(&logits, sampling(1.0, 1.0, seed), turn)).collect::<Vec<_>>();
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
