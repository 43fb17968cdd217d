//! The shape of a model.

use parallel::data::Parameter;
use serde::{Deserialize, Serialize};

use crate::recipe::resolved::ModelKeys;

/// The most layers that a recipe may ask for.
pub const LAYERS_MAX: usize = 1024;

/// Everything that decides the shapes and the arithmetic of a decoder; the fields of Hugging Face's `LlamaConfig`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

impl Config {
    /// The shape that a recipe asks for: what it writes, else what `from` has, else the default. `None` when a size is
    /// neither written nor known.
    #[must_use]
    pub fn from_keys(keys: &ModelKeys, vocab_size: usize, seq_len: usize, from: Option<&Self>) -> Option<Self> {
        let size = |written: Option<usize>, known: fn(&Self) -> usize| written.or_else(|| from.map(known));
        let heads = size(keys.num_attention_heads, |c| c.num_attention_heads)?;
        Some(Self {
            vocab_size,
            hidden_size: size(keys.hidden_size, |c| c.hidden_size)?,
            intermediate_size: size(keys.intermediate_size, |c| c.intermediate_size)?,
            num_hidden_layers: size(keys.num_hidden_layers, |c| c.num_hidden_layers)?,
            num_attention_heads: heads,
            num_key_value_heads: size(keys.num_key_value_heads, |c| c.num_key_value_heads).unwrap_or(heads),
            max_position_embeddings: size(keys.max_position_embeddings, |c| c.max_position_embeddings)
                .unwrap_or(seq_len),
            rope_theta: keys.rope_theta.or_else(|| from.map(|c| c.rope_theta)).unwrap_or(10_000.0),
            rms_norm_eps: keys.rms_norm_eps.or_else(|| from.map(|c| c.rms_norm_eps)).unwrap_or(1e-5),
            tie_word_embeddings: keys
                .tie_word_embeddings
                .or_else(|| from.map(|c| c.tie_word_embeddings))
                .unwrap_or(true),
            initializer_range: keys.initializer_range,
        })
    }

    /// Elements a head.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Every parameter in the order of the forward pass. A tied head has none of its own.
    #[must_use]
    pub fn parameters(&self) -> Vec<Parameter> {
        self.each_parameter().collect()
    }

    /// The same, one after the other, so that a shape that somebody else wrote can be compared with what there is before
    /// anything is as long as that model.
    pub fn each_parameter(&self) -> impl Iterator<Item = Parameter> {
        let table = |name: &str| parameter(name, &[self.vocab_size, self.hidden_size]);
        let first = table("model.embed_tokens.weight");
        let layers = (0..self.num_hidden_layers).flat_map(move |layer| self.layer(layer));
        let norm = parameter("model.norm.weight", &[self.hidden_size]);
        let head = (!self.tie_word_embeddings).then(|| table("lm_head.weight"));
        std::iter::once(first).chain(layers).chain([norm]).chain(head)
    }

    /// The parameters of a layer.
    fn layer(&self, layer: usize) -> [Parameter; 9] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let shared = self.num_key_value_heads * self.head_dim();
        let of = |name: &str, shape: &[usize]| parameter(&format!("model.layers.{layer}.{name}.weight"), shape);
        [
            of("input_layernorm", &[hidden]),
            of("self_attn.q_proj", &[hidden, hidden]),
            of("self_attn.k_proj", &[shared, hidden]),
            of("self_attn.v_proj", &[shared, hidden]),
            of("self_attn.o_proj", &[hidden, hidden]),
            of("post_attention_layernorm", &[hidden]),
            of("mlp.gate_proj", &[inner, hidden]),
            of("mlp.up_proj", &[inner, hidden]),
            of("mlp.down_proj", &[hidden, inner]),
        ]
    }

    /// Elements of all parameters.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().map(|parameter| parameter.shape.iter().product::<usize>()).sum()
    }

    /// What would make the arithmetic impossible; a `config.json` may say anything.
    ///
    /// # Errors
    /// The first impossibility.
    pub fn check(&self) -> Result<(), String> {
        let (hidden, heads, shared) = (self.hidden_size, self.num_attention_heads, self.num_key_value_heads);
        if heads == 0 || shared == 0 || hidden == 0 || self.vocab_size == 0 || self.max_position_embeddings == 0 {
            return Err("expected sizes of at least 1, found 0".into());
        }
        if hidden % heads != 0 || (hidden / heads) % 2 != 0 {
            return Err(format!("expected an even number of elements a head, found {hidden} / {heads}"));
        }
        if heads % shared != 0 {
            return Err(format!("expected num_key_value_heads to divide the {heads} heads, found {shared}"));
        }
        Ok(())
    }
}

fn parameter(name: &str, shape: &[usize]) -> Parameter {
    Parameter { name: name.to_owned(), shape: shape.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::keys::{Kind, find};

    #[test]
    fn no_recipe_asks_for_more_layers_than_checkpoints_may_have() {
        let key = find("model.num_hidden_layers").expect("a key");
        assert_eq!(key.kind, Kind::Integer(1, LAYERS_MAX as i64));
    }
}
