//! The layers that own parameters. Shapes: B batch, T tokens, D width in, F width out, V vocabulary.

use burn::Tensor;
use burn::module::{Module, Param};
use burn::tensor::{Int, module};
use parallel::tap::{Emit, tap};

use crate::kernels::rms_norm::rms_norm;

/// A layer's one slot: empty outside training; in training it takes the layer's gradient out of the backward pass.
#[derive(Clone, Debug, Default)]
pub struct Hook {
    emit: Option<Emit>,
    /// The control of the test that gradients leave while earlier layers still compute.
    #[cfg(test)]
    without_anchor: bool,
}

impl Hook {
    /// A slot that hands the gradient to `emit`.
    #[must_use]
    pub const fn new(emit: Emit) -> Self {
        Self {
            emit: Some(emit),
            #[cfg(test)]
            without_anchor: false,
        }
    }

    #[cfg(test)]
    pub(crate) const fn without_anchor(emit: Emit) -> Self {
        Self { emit: Some(emit), without_anchor: true }
    }

    /// The weight as the forward pass should use it. `anchor` is the activation that is consumed together with it.
    fn apply<const D: usize, const E: usize>(&self, weight: Tensor<D>, anchor: Option<&Tensor<E>>) -> Tensor<D> {
        #[cfg(test)]
        let anchor = anchor.filter(|_| !self.without_anchor);
        match &self.emit {
            Some(emit) => tap(weight, anchor, emit.clone()),
            None => weight,
        }
    }
}

/// `y = x Wᵀ`, without bias.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[F, D]`, as Hugging Face stores it.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    hook: Hook,
}

impl Linear {
    /// A layer over these weights.
    #[must_use]
    pub const fn new(weight: Param<Tensor<2>>, hook: Hook) -> Self {
        Self { weight, hook }
    }

    /// `[B, T, D]` to `[B, T, F]`.
    pub fn forward(&self, x_btd: Tensor<3>) -> Tensor<3> {
        let weight_fd = self.hook.apply(self.weight.val(), Some(&x_btd));
        project(x_btd, weight_fd)
    }
}

/// `[B, T, D]` times the transpose of `[F, D]`.
pub fn project(x_btd: Tensor<3>, weight_fd: Tensor<2>) -> Tensor<3> {
    let [b, t, d] = x_btd.dims();
    let [f, _] = weight_fd.dims();
    x_btd.reshape([b * t, d]).matmul(weight_fd.transpose()).reshape([b, t, f])
}

/// A table of vectors, one for each token.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[V, D]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    hook: Hook,
}

impl Embedding {
    /// A table over these weights.
    #[must_use]
    pub const fn new(weight: Param<Tensor<2>>, hook: Hook) -> Self {
        Self { weight, hook }
    }

    /// The table as one forward pass should use it, in all its places: a tied head shares it, and its gradient comes out
    /// once, with the sum. The end of the backward pass is where an embedding's gradient is complete, so it has no
    /// anchor.
    #[must_use]
    pub fn table(&self) -> Tensor<2> {
        self.hook.apply(self.weight.val(), None::<&Tensor<2>>)
    }
}

/// `[B, T]` tokens to `[B, T, D]`.
#[must_use]
pub fn look_up(table_vd: Tensor<2>, tokens_bt: Tensor<2, Int>) -> Tensor<3> {
    module::embedding(table_vd, tokens_bt)
}

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[D]`.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
    #[module(skip)]
    hook: Hook,
}

impl RmsNorm {
    /// A norm with this gain.
    #[must_use]
    pub const fn new(weight: Param<Tensor<1>>, eps: f64, hook: Hook) -> Self {
        Self { weight, eps, hook }
    }

    /// `[B, T, D]` to the same shape.
    pub fn forward(&self, x_btd: Tensor<3>) -> Tensor<3> {
        let weight = self.hook.apply(self.weight.val(), Some(&x_btd));
        rms_norm(x_btd, weight, self.eps)
    }
}
