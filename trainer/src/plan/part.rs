//! Which part of a model a rank has.

use std::ops::Range;

use parallel::data::Parameter;
use parallel::mesh::{Axis, Coordinates, Mesh, cut, key_value_heads};
use parallel::pipeline::Pipeline;

use crate::model::Config;

/// What a rank has of a parameter.
#[derive(Clone, Debug)]
pub struct Held {
    /// As it is exported.
    pub whole: Parameter,
    /// What the rank has of it, under the same name.
    pub own: Parameter,
}

impl Held {
    /// Elements that the rank has.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.own.elements()
    }
}

/// One rank's part.
#[derive(Clone, Debug)]
pub struct Part {
    /// The model.
    pub config: Config,
    /// All ranks.
    pub mesh: Mesh,
    /// The order in which its stages work.
    pub pipeline: Pipeline,
    /// Where this rank is.
    pub at: Coordinates,
    /// Layers of each of its pieces.
    pub layers: Vec<Range<usize>>,
    /// Query heads of a layer.
    pub heads: usize,
    /// Key and value heads of a layer.
    pub key_value_heads: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl Part {
    /// The part of `rank`; `pieces` are the layers of every piece.
    #[must_use]
    pub fn new(config: &Config, mesh: Mesh, pipeline: Pipeline, pieces: &[Range<usize>], rank: usize) -> Self {
        let at = mesh.coordinates(rank);
        let own =
            (0..pipeline.virtual_stages()).map(|piece| pieces[pipeline.place(at.on(Axis::Pipeline), piece)].clone());
        let (tensor, of) = (at.on(Axis::Tensor), mesh.size(Axis::Tensor));
        Self {
            layers: own.collect(),
            heads: cut(config.num_attention_heads, tensor, of).len(),
            key_value_heads: key_value_heads(config.num_key_value_heads, tensor, of).len(),
            feed_forward: cut(config.intermediate_size, tensor, of).len(),
            vocabulary: cut(config.vocab_size, tensor, of).len(),
            config: config.clone(),
            mesh,
            pipeline,
            at,
        }
    }

    /// Whether it has the first layer, and with it the embedding.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.at.on(Axis::Pipeline) == 0
    }

    /// Whether it has the last layer, and with it the head and the loss.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.at.on(Axis::Pipeline) + 1 == self.mesh.size(Axis::Pipeline)
    }

    /// How many layers it has.
    #[must_use]
    pub fn layer_count(&self) -> usize {
        self.layers.iter().map(ExactSizeIterator::len).sum()
    }

    /// Its parameters, in the order of the forward pass. A tied table is on the first and on the last stage.
    #[must_use]
    pub fn parameters(&self) -> Vec<Parameter> {
        self.held().into_iter().map(|held| held.own).collect()
    }

    /// The same, each beside the whole that it is of: what a part travels in follows the whole.
    #[must_use]
    pub fn held(&self) -> Vec<Held> {
        let held = |whole: Parameter| Some(Held { own: self.own(whole.clone())?, whole });
        self.config.parameters().into_iter().filter_map(held).collect()
    }

    /// What it has of a parameter of the whole model.
    fn own(&self, Parameter { name, shape }: Parameter) -> Option<Parameter> {
        let config = &self.config;
        let is_there = match layer(&name) {
            Some(layer) => self.layers.iter().any(|layers| layers.contains(&layer)),
            None if name.starts_with("model.embed_tokens") => {
                self.is_first() || (self.is_last() && config.tie_word_embeddings)
            }
            None => self.is_last(),
        };
        if !is_there {
            return None;
        }
        let (head, rest) = (config.head_dim(), shape.get(1).copied().unwrap_or(0));
        let kind = name.rsplit('.').nth(1).unwrap_or_default();
        let shape = match kind {
            "embed_tokens" | "lm_head" => vec![self.vocabulary, rest],
            "q_proj" => vec![self.heads * head, rest],
            "k_proj" | "v_proj" => vec![self.key_value_heads * head, rest],
            "o_proj" => vec![shape[0], self.heads * head],
            "gate_proj" | "up_proj" => vec![self.feed_forward, rest],
            "down_proj" => vec![shape[0], self.feed_forward],
            _ => shape,
        };
        Some(Parameter { name, shape })
    }
}

/// The layer that a parameter is of.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
