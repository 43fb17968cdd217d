//! Attention. Shapes: B batch, T new tokens, S all tokens, H query heads, K key-value heads, E elements a head, D width.

use burn::Tensor;
use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, TensorData};

use super::config::Config;
use super::layers::Linear;

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
    /// Query heads.
    #[module(skip)]
    pub heads: usize,
    /// Key and value heads.
    #[module(skip)]
    pub shared_heads: usize,
}

/// What all layers share in one forward pass over T tokens that stand at positions `start..start + T`.
#[derive(Clone, Debug)]
pub struct Positions {
    /// `[1, 1, T, E]`
    cos: Tensor<4>,
    /// `[1, 1, T, E]`
    sin: Tensor<4>,
    /// `[1, 1, T, S]`, true where a token must not look; `None` for a single new token, which may look everywhere.
    hidden: Option<Tensor<4, Bool>>,
}

impl Positions {
    /// Rotations and mask for `count` tokens that follow `start` others.
    #[must_use]
    pub fn new(config: &Config, start: usize, count: usize, device: &Device) -> Self {
        let dim = config.head_dim();
        let mut cos = Vec::with_capacity(count * dim);
        let mut sin = Vec::with_capacity(count * dim);
        for position in start..start + count {
            // Both halves of a head turn by the same angles: Hugging Face's layout, not interleaved pairs.
            let angles = (0..dim).map(|i| {
                let exponent = (2 * (i % (dim / 2))) as f64 / dim as f64;
                position as f64 * libm::pow(config.rope_theta, -exponent)
            });
            for angle in angles {
                cos.push(libm::cos(angle) as f32);
                sin.push(libm::sin(angle) as f32);
            }
        }
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [1, 1, count, dim]), device);
        let hidden = (count > 1).then(|| {
            let all = start + count;
            let mask = (0..count).flat_map(|i| (0..all).map(move |j| j > start + i)).collect::<Vec<bool>>();
            Tensor::from_data(TensorData::new(mask, [1, 1, count, all]), device)
        });
        Self { cos: table(cos), sin: table(sin), hidden }
    }

    fn rotate(&self, x_bhte: Tensor<4>) -> Tensor<4> {
        let half = x_bhte.dims()[3] / 2;
        let left = x_bhte.clone().narrow(3, 0, half);
        let right = x_bhte.clone().narrow(3, half, half);
        x_bhte * self.cos.clone() + Tensor::cat(vec![right.neg(), left], 3) * self.sin.clone()
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
        let split = |x: Tensor<3>, heads: usize| {
            let e = x.dims()[2] / heads;
            x.reshape([b, t, heads, e]).swap_dims(1, 2)
        };
        let q_bhte = positions.rotate(split(self.q_proj.forward(x_btd.clone()), self.heads));
        let k_bkte = positions.rotate(split(self.k_proj.forward(x_btd.clone()), self.shared_heads));
        let v_bkte = split(self.v_proj.forward(x_btd), self.shared_heads);
        let (k_bkse, v_bkse) = match cache {
            Some(cache) => cache.extend(k_bkte, v_bkte),
            None => (k_bkte, v_bkte),
        };
        let e = q_bhte.dims()[3];
        let k_bhse = self.share(k_bkse);
        let v_bhse = self.share(v_bkse);
        let scores_bhts = q_bhte.mul_scalar(1.0 / (e as f64).sqrt()).matmul(k_bhse.swap_dims(2, 3));
        let scores_bhts = match &positions.hidden {
            Some(hidden) => {
                let shape = scores_bhts.dims();
                scores_bhts.mask_fill(hidden.clone().expand(shape), f32::NEG_INFINITY)
            }
            None => scores_bhts,
        };
        let y_bhte = softmax(scores_bhts, 3).matmul(v_bhse);
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
