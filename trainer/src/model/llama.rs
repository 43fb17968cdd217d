//! The decoder. Shapes: B batch, T tokens, D width, V vocabulary.

use std::fmt;
use std::ops::Range;

use burn::Tensor;
use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, TensorData};

use super::attention::{Attention, KvCache, Positions};
use super::config::Config;
use super::layers::{Embedding, Hook, Linear, RmsNorm, project};
use crate::kernels::cross_entropy::cross_entropy;
use crate::kernels::cross_entropy_rows::{SomeRows, cross_entropy_of_some};
use crate::kernels::swiglu::swiglu;

/// A decoder with its head, as Hugging Face's `LlamaForCausalLM`; or a [piece](Piece) of one, which takes activations where it
/// does not begin with the embedding, and gives them where it does not end with the head.
#[derive(Module, Debug)]
pub struct Llama {
    /// Everything but the head.
    pub model: Decoder,
    /// `[V, D]`; `None` when the embedding table serves as the head, and in a piece without one.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: Config,
    #[module(skip)]
    piece: Piece,
    #[module(skip)]
    rows: Option<SomeRows>,
}

/// The decoder without its head.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[V, D]`; in the first piece of a model, and in the last one too where it serves as the head.
    pub embed_tokens: Option<Embedding>,
    /// The layers, first to last.
    pub layers: Vec<Block>,
    /// Before the head; in the last piece.
    pub norm: Option<RmsNorm>,
}

/// Some layers of a model that follow each other, and what stands before the first of all layers and behind the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The layers.
    pub layers: Range<usize>,
    /// Whether it begins with the embedding.
    pub first: bool,
    /// Whether it ends with the head.
    pub last: bool,
}

impl Piece {
    /// All of a model.
    #[must_use]
    pub const fn whole(config: &Config) -> Self {
        Self { layers: 0..config.num_hidden_layers, first: true, last: true }
    }

    /// Whether it has the embedding table: as such, or as the head.
    #[must_use]
    pub const fn has_table(&self, config: &Config) -> bool {
        self.first || (self.last && config.tie_word_embeddings)
    }

    /// Whether it has the parameter of this logical name.
    #[must_use]
    pub fn has(&self, config: &Config, name: &str) -> bool {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match layer {
            Some(layer) => self.layers.contains(&layer),
            None if name.starts_with("model.embed_tokens.") => self.has_table(config),
            None => self.last,
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention.
    pub self_attn: Attention,
    /// Before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward part.
    pub mlp: Mlp,
}

/// SwiGLU: `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[F, D]`
    pub gate_proj: Linear,
    /// `[F, D]`
    pub up_proj: Linear,
    /// `[D, F]`
    pub down_proj: Linear,
}

/// What one parameter of a model is built from.
#[derive(Debug)]
pub struct Leaf {
    /// The values, in the shape that was asked for, or of a part of it: some heads of the attention, some of a SwiGLU's
    /// width, some rows of the vocabulary.
    pub values: Values,
    /// The slot.
    pub hook: Hook,
}

/// Where the values of a parameter come from.
pub enum Values {
    /// They are there.
    Now(TensorData),
    /// They are asked for when the forward pass first uses the parameter, and have this shape.
    WhenUsed(Vec<usize>, Box<dyn FnOnce() -> TensorData + Send + Sync>),
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(data) => f.debug_tuple("Now").field(&data.shape()).finish(),
            Self::WhenUsed(shape, _) => f.debug_tuple("WhenUsed").field(shape).finish(),
        }
    }
}

impl Llama {
    /// Builds a model on `device`, asking `source` for every parameter by logical name and shape. On a device with
    /// autodiff the parameters are tracked.
    pub fn build(config: &Config, device: &Device, source: &mut dyn FnMut(&str, &[usize]) -> Leaf) -> Self {
        Self::build_piece(config, Piece::whole(config), device, source)
    }

    /// The same, of a piece of it.
    pub fn build_piece(
        config: &Config,
        piece: Piece,
        device: &Device,
        source: &mut dyn FnMut(&str, &[usize]) -> Leaf,
    ) -> Self {
        let mut builder = Builder { config, device, source };
        let model = Decoder {
            embed_tokens: piece.has_table(config).then(|| {
                let (weight, hook) = builder.leaf("model.embed_tokens", [config.vocab_size, config.hidden_size]);
                Embedding::new(weight, hook)
            }),
            layers: piece.layers.clone().map(|layer| builder.block(layer)).collect(),
            norm: piece.last.then(|| builder.norm("model.norm")),
        };
        let has_head = piece.last && !config.tie_word_embeddings;
        let lm_head = has_head.then(|| builder.linear("lm_head", [config.vocab_size, config.hidden_size]));
        Self { model, lm_head, config: config.clone(), piece, rows: None }
    }

    /// The same, of a table and a head that have some rows of the vocabulary.
    #[must_use]
    pub fn over(self, rows: Option<SomeRows>) -> Self {
        Self { rows, ..self }
    }

    /// The shape of the model.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Where its parameters are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.model.layers[0].input_layernorm.weight.val().device()
    }

    /// Which piece of a model it is.
    #[must_use]
    pub const fn piece(&self) -> &Piece {
        &self.piece
    }

    /// Logits `[B, T, V]`, or of some rows of the vocabulary, of tokens `[B, T]`. With caches (one a layer) the tokens follow those that the caches hold.
    ///
    /// # Panics
    /// It is a piece of a model.
    pub fn forward(&self, tokens_bt: Tensor<2, Int>, caches: Option<&mut [KvCache]>) -> Tensor<3> {
        let [_, t] = tokens_bt.dims();
        // A tied head shares the table as this pass uses it.
        let table_vd = self.table();
        let x_btd = self.look_up(table_vd.clone(), tokens_bt);
        let x_btd = self.decode(x_btd, t, caches);
        self.logits(x_btd, || table_vd)
    }

    /// What the layers see of tokens `[B, T]`: `[B, T, D]`, or the part of it that a rank has.
    ///
    /// # Panics
    /// It is not the first piece.
    pub fn embed(&self, tokens_bt: Tensor<2, Int>) -> Tensor<3> {
        self.look_up(self.table(), tokens_bt)
    }

    /// Through the layers of this piece, of sequences of `t` tokens. With caches (one a layer) they follow those that the caches
    /// hold.
    pub fn decode(&self, x_btd: Tensor<3>, t: usize, caches: Option<&mut [KvCache]>) -> Tensor<3> {
        let start = caches.as_ref().and_then(|caches| caches.first()).map_or(0, KvCache::len);
        let positions = Positions::new(&self.config, start, t);
        let mut caches = caches.map(<[KvCache]>::iter_mut);
        self.model
            .layers
            .iter()
            .fold(x_btd, |x_btd, block| block.forward(x_btd, &positions, caches.as_mut().and_then(Iterator::next)))
    }

    /// The sum over all tokens of the cross entropy between the logits and `targets_bt`, in nats: `[1]`.
    ///
    /// # Panics
    /// It is a piece of a model.
    pub fn loss(&self, tokens_bt: Tensor<2, Int>, targets_bt: Tensor<2, Int>) -> Tensor<1> {
        self.loss_of(self.forward(tokens_bt, None), targets_bt)
    }

    /// The same, of what came out of the last layer.
    ///
    /// # Panics
    /// It is not the last piece.
    pub fn loss_behind(&self, x_btd: Tensor<3>, targets_bt: Tensor<2, Int>) -> Tensor<1> {
        self.loss_of(self.logits_behind(x_btd), targets_bt)
    }

    /// Logits of what came out of the last layer.
    ///
    /// # Panics
    /// It is not the last piece.
    pub fn logits_behind(&self, x_btd: Tensor<3>) -> Tensor<3> {
        self.logits(x_btd, || self.table())
    }

    fn table(&self) -> Tensor<2> {
        self.model.embed_tokens.as_ref().expect("this piece has the table").table()
    }

    fn look_up(&self, table_vd: Tensor<2>, tokens_bt: Tensor<2, Int>) -> Tensor<3> {
        let rows = self.rows.as_ref().map(|some| &some.rows);
        self.model.embed_tokens.as_ref().expect("this piece has the table").look_up(table_vd, tokens_bt, rows)
    }

    fn logits(&self, x_btd: Tensor<3>, table: impl FnOnce() -> Tensor<2>) -> Tensor<3> {
        let x_btd = self.model.norm.as_ref().expect("this is the last piece").forward(x_btd);
        match &self.lm_head {
            Some(head) => head.forward(x_btd),
            None => project(x_btd, table()),
        }
    }

    fn loss_of(&self, logits_btv: Tensor<3>, targets_bt: Tensor<2, Int>) -> Tensor<1> {
        let ([b, t, v], [rows, columns]) = (logits_btv.dims(), targets_bt.dims());
        assert_eq!((b, t), (rows, columns), "a target for every token");
        let (logits_nv, targets_n) = (logits_btv.reshape([b * t, v]), targets_bt.reshape([b * t]));
        match &self.rows {
            None => cross_entropy(logits_nv, targets_n),
            Some(rows) => cross_entropy_of_some(logits_nv, targets_n, rows),
        }
    }
}

impl Block {
    fn forward(&self, x_btd: Tensor<3>, positions: &Positions, cache: Option<&mut KvCache>) -> Tensor<3> {
        let x_btd = x_btd.clone() + self.self_attn.forward(self.input_layernorm.forward(x_btd), positions, cache);
        x_btd.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x_btd))
    }
}

impl Mlp {
    fn forward(&self, x_btd: Tensor<3>) -> Tensor<3> {
        self.down_proj.forward(swiglu(self.gate_proj.forward(x_btd.clone()), self.up_proj.forward(x_btd)))
    }
}

struct Builder<'a> {
    config: &'a Config,
    device: &'a Device,
    source: &'a mut dyn FnMut(&str, &[usize]) -> Leaf,
}

impl Builder<'_> {
    fn leaf<const D: usize>(&mut self, name: &str, shape: [usize; D]) -> (Param<Tensor<D>>, Hook) {
        let (weight, hook, _) = self.part(name, shape);
        (weight, hook)
    }

    /// A parameter, or a part of it, which has another shape.
    fn part<const D: usize>(&mut self, name: &str, shape: [usize; D]) -> (Param<Tensor<D>>, Hook, [usize; D]) {
        let Leaf { values, hook } = (self.source)(&format!("{name}.weight"), &shape);
        let found = match &values {
            Values::Now(data) => data.shape().to_vec(),
            Values::WhenUsed(shape, _) => shape.clone(),
        };
        let found: [usize; D] = found.try_into().expect("a part of a parameter has its dimensions");
        assert!(found.iter().zip(&shape).all(|(found, whole)| found <= whole), "{found:?} of {shape:?}");
        let weight = match values {
            Values::Now(data) => Param::from_tensor(Tensor::from_data(data, self.device)),
            Values::WhenUsed(_, values) => {
                let make =
                    move |device: &Device, tracked| Tensor::from_data(values(), device).set_require_grad(tracked);
                Param::uninitialized(ParamId::new(), make, self.device.clone(), true, found.into())
            }
        };
        (weight, hook, found)
    }

    fn linear(&mut self, name: &str, shape: [usize; 2]) -> Linear {
        self.heads(name, shape).0
    }

    /// A layer, and how many heads its rows are.
    fn heads(&mut self, name: &str, shape: [usize; 2]) -> (Linear, usize) {
        let (weight, hook, [rows, _]) = self.part(name, shape);
        (Linear::new(weight, hook), rows / self.config.head_dim())
    }

    fn norm(&mut self, name: &str) -> RmsNorm {
        let (weight, hook) = self.leaf(name, [self.config.hidden_size]);
        RmsNorm::new(weight, self.config.rms_norm_eps, hook)
    }

    fn block(&mut self, layer: usize) -> Block {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let shared = config.num_key_value_heads * config.head_dim();
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let input_layernorm = self.norm(&name("input_layernorm"));
        let (q_proj, heads) = self.heads(&name("self_attn.q_proj"), [hidden, hidden]);
        let (k_proj, shared_heads) = self.heads(&name("self_attn.k_proj"), [shared, hidden]);
        let v_proj = self.linear(&name("self_attn.v_proj"), [shared, hidden]);
        let o_proj = self.linear(&name("self_attn.o_proj"), [hidden, hidden]);
        Block {
            input_layernorm,
            self_attn: Attention { q_proj, k_proj, v_proj, o_proj, heads, shared_heads },
            post_attention_layernorm: self.norm(&name("post_attention_layernorm")),
            mlp: Mlp {
                gate_proj: self.linear(&name("mlp.gate_proj"), [inner, hidden]),
                up_proj: self.linear(&name("mlp.up_proj"), [inner, hidden]),
                down_proj: self.linear(&name("mlp.down_proj"), [hidden, inner]),
            },
        }
    }
}

#[cfg(test)]
mod tests;
