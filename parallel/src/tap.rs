//! Closures on the two directions of the autodiff graph.
//!
//! Two operations, both a backend extension of burn:
//!
//! - [`through`]`(x, forward, backward)` runs one closure on the value in the forward pass and another on the gradient
//!   in the backward pass. Every parallel operation of Megatron-LM (Shoeybi et al. 2019, <https://arxiv.org/abs/1909.08053>)
//!   is a pair of this kind.
//! - [`tap`]`(weight, anchor, emit)` is the identity; its backward hands the finished gradient of `weight` to `emit`.
//!
//! # Why a tap needs an anchor
//!
//! burn runs its tape by depth, deepest first. A tap on a leaf has depth 1, so it would fire at the very end of
//! `backward()`, after every other layer. With the activation that the layer consumes as a second parent (to which no
//! gradient flows) the tap is as deep as its layer and fires as soon as that layer's gradient is complete, while
//! earlier layers still compute. So a tap is made at the point of use, in every forward pass anew.
//!
//! # Lifetimes
//!
//! A tapped tensor lives for one forward and one backward pass. A weight that is used twice (a tied head) is tapped
//! once, and the tapped tensor is used twice: the tap then fires once, with the sum.

mod backend;

use std::fmt;
use std::sync::Arc;

use burn::Tensor;
use burn::backend::{Dispatch, DispatchTensor};

use backend::TapBackend;

/// What a tap does with the gradient. It returns the gradient that the weight itself should still receive, or `None`,
/// which frees the gradient at once.
#[derive(Clone)]
pub struct Emit(Arc<dyn Fn(DispatchTensor) -> Option<DispatchTensor> + Send + Sync>);

impl Emit {
    /// A closure that takes the gradient as a tensor of `D` dimensions.
    ///
    /// It runs on the thread that called `backward()`, between two steps of the tape, and must not block for long.
    pub fn new<const D: usize>(emit: impl Fn(Tensor<D>) -> Option<Tensor<D>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(move |gradient| emit(Tensor::from_dispatch(gradient)).map(Tensor::into_dispatch)))
    }

    fn call(&self, gradient: DispatchTensor) -> Option<DispatchTensor> {
        (self.0)(gradient)
    }
}

impl fmt::Debug for Emit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Emit")
    }
}

/// One closure for the value and one for the gradient. Either may change the shape; the gradient closure receives the
/// shape of the forward's output and must return the shape of its input.
#[derive(Clone)]
pub struct Pair {
    forward: Arc<dyn Fn(DispatchTensor) -> DispatchTensor + Send + Sync>,
    backward: Arc<dyn Fn(DispatchTensor) -> DispatchTensor + Send + Sync>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pair")
    }
}

/// The identity on `weight`, whose backward hands the complete gradient to `emit`.
///
/// `anchor` is the activation that is consumed together with `weight` and decides when the tap fires (see the module's
/// text). Without one the tap fires at the end of the backward pass, which is right for an embedding table and for
/// nothing else. On a device without autodiff this is the identity and `emit` is never called.
pub fn tap<const D: usize, const E: usize>(weight: Tensor<D>, anchor: Option<&Tensor<E>>, emit: Emit) -> Tensor<D> {
    let weight = weight.into_dispatch();
    Tensor::from_dispatch(match anchor {
        Some(anchor) => Dispatch::tap(weight, anchor.clone().into_dispatch(), emit),
        None => Dispatch::tap_leaf(weight, emit),
    })
}

/// Runs `forward` on the value now, and `backward` on the gradient in the backward pass.
///
/// Neither closure sees an autodiff tensor: nothing inside them is recorded.
pub fn through<const D: usize>(
    x: Tensor<D>,
    forward: impl Fn(Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
    backward: impl Fn(Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
) -> Tensor<D> {
    let pair = Pair {
        forward: Arc::new(move |x| forward(Tensor::from_dispatch(x)).into_dispatch()),
        backward: Arc::new(move |gradient| backward(Tensor::from_dispatch(gradient)).into_dispatch()),
    };
    Tensor::from_dispatch(Dispatch::through(x.into_dispatch(), pair))
}

#[cfg(test)]
mod tests;
