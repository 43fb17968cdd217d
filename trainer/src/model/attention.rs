//! Attention. Shapes: B batch, T new tokens, S all tokens, H query heads, K key-value heads, E elements a head, D width.

use std::sync::Arc;

use burn::Tensor;
use burn::module::Module;

use super::config::Config;
use super::layers::Linear;
use crate::kernels::rotary::{Angles, rotate};
use crate::kernels::softmax::causal_softmax;

/// Grouped-query self-attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[H * E, D]`
    pub q_proj: Linear,
    /// `[K * E, D]`
    pub k_proj: Linear,
    /// `[K * E, D]`
    pub v_proj: Linear,
    /// `[D, H * E]`
    pub o_proj: Linear,
    /// Query heads that this layer has.
    #[module(skip)]
    pub heads: usize,
    /// Key and value heads that it has.
    #[module(skip)]
    pub shared_heads: usize,
}

/// What all layers share in one forward pass over T tokens that stand at positions `start..start + T`.
#[derive(Clone, Debug)]
pub struct Positions(Arc<Angles>);

impl Positions {
    /// The rotations of `count` tokens that follow `start` others.
    #[must_use]
    pub fn new(config: &Config, start: usize, count: usize) -> Self {
        Self(Arc::new(Angles::new(config.rope_theta, config.head_dim(), start, count)))
    }
}

/// Keys and values of the tokens that were already seen, `[B, K, S, E]` each.
#[derive(Clone, Debug, Default)]
pub struct KvCache(Option<(Tensor<4>, Tensor<4>)>);

impl KvCache {
    /// Tokens that it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn extend(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let all = match self.0.take() {
            Some((k, v)) => (Tensor::cat(vec![k, keys], 2), Tensor::cat(vec![v, values], 2)),
            None => (keys, values),
        };
        self.0 = Some(all.clone());
        all
    }
}

impl Attention {
    /// `[B, T, D]` to the same shape. With a cache the new tokens also look at those in it.
    pub fn forward(&self, x_btd: Tensor<3>, positions: &Positions, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [b, t, _] = x_btd.dims();
        let q_bhte = rotate(self.q_proj.forward(x_btd.clone()), self.heads, &positions.0);
        let k_bkte = rotate(self.k_proj.forward(x_btd.clone()), self.shared_heads, &positions.0);
        let e = q_bhte.dims()[3];
        let v_bkte = self.v_proj.forward(x_btd).reshape([b, t, self.shared_heads, e]).swap_dims(1, 2);
        let (k_bkse, v_bkse) = match cache {
            Some(cache) => cache.extend(k_bkte, v_bkte),
            None => (k_bkte, v_bkte),
        };
        let scores_bhts = q_bhte.matmul(self.share(k_bkse).swap_dims(2, 3));
        let weights_bhts = causal_softmax(scores_bhts, 1.0 / (e as f32).sqrt());
        let y_bhte = weights_bhts.matmul(self.share(v_bkse));
        self.o_proj.forward(y_bhte.swap_dims(1, 2).reshape([b, t, self.heads * e]))
    }

    /// Repeats every key-value head for the query heads of its group.
    fn share(&self, x_bkse: Tensor<4>) -> Tensor<4> {
        let group = self.heads / self.shared_heads;
        if group == 1 {
            return x_bkse;
        }
        let [b, k, s, e] = x_bkse.dims();
        x_bkse.reshape([b, k, 1, s, e]).expand([b, k, group, s, e]).reshape([b, k * group, s, e])
    }
}
