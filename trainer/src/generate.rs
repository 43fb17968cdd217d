//! Text from a model: greedy, or drawn with temperature and top-p (Holtzman et al. 2020) under a seed.

use burn::Tensor;
use burn::tensor::{Device, Int, TensorData};

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::model::attention::KvCache;
use crate::rng;
use crate::tensor::Slice;

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
/// is whole. Ranks that hold slices of a model call it together, and all have the same text.
///
/// # Errors
/// A device that fails, an output that is closed; with slices, a rank that is lost.
pub fn generate(
    (model, slice): (&Llama, Option<&Slice>),
    tokenizer: &Tokenizer,
    ids: Vec<u32>,
    count: usize,
    sampling: Sampling,
    mut out: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Ending> {
    let device = model.model.norm.weight.val().device();
    let longest = model.config().max_position_embeddings;
    let mut caches = vec![KvCache::default(); model.config().num_hidden_layers];
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
        let logits = last_logits(model, &new, &mut caches, &device)?;
        let logits = match slice {
            Some(slice) => slice.check(0).and_then(|()| slice.all_logits(&logits))?,
            None => logits,
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

fn last_logits(model: &Llama, ids: &[u32], caches: &mut [KvCache], device: &Device) -> Result<Vec<f32>> {
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let count = ids.len();
    let tokens: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [1, count]), device);
    let logits = model.forward(tokens, Some(caches)).narrow(1, count - 1, 1);
    let failed = |what: String| Error::Device { step: 0, what };
    let data = logits.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
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
