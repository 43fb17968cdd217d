//! Closures on the two directions of the autodiff graph.
//!
//! All of them are one backend extension of burn:
//!
//! - [`through`]`(x, forward, backward)` runs one closure on the value in the forward pass and another on the gradient
//!   in the backward pass. Every parallel operation of Megatron-LM (Shoeybi et al. 2019, <https://arxiv.org/abs/1909.08053>)
//!   is a pair of this kind.
//! - [`tap`]`(weight, anchor, emit)` is the identity; its backward hands the finished gradient of `weight` to `emit`.
//! - [`fused`] and [`fused_pair`] are operations of one and two inputs whose backward is a closure that the forward
//!   returns, with whatever it kept: what kernels with a handwritten backward are made of.
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
use burn::tensor::Gradients;

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

/// From the gradient of an operation's output to the gradients of its `N` inputs.
pub(crate) type Back<const N: usize> = Arc<dyn Fn(DispatchTensor) -> [DispatchTensor; N] + Send + Sync>;

type Forward<const N: usize> = Arc<dyn Fn([DispatchTensor; N]) -> (DispatchTensor, Back<N>) + Send + Sync>;

/// An operation of `N` inputs with its own backward. None of its closures sees an autodiff tensor.
#[derive(Clone)]
pub struct Fused<const N: usize>(Forward<N>);

impl<const N: usize> Fused<N> {
    fn call(&self, inputs: [DispatchTensor; N]) -> (DispatchTensor, Back<N>) {
        (self.0)(inputs)
    }
}

impl<const N: usize> fmt::Debug for Fused<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fused")
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

/// Runs `forward` on the value now, and `backward` on the gradient in the backward pass. Either may change the shape;
/// `backward` receives the shape of the forward's output and must return the shape of its input.
///
/// Neither closure sees an autodiff tensor: nothing inside them is recorded.
pub fn through<const D: usize>(
    x: Tensor<D>,
    forward: impl Fn(Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
    backward: impl Fn(Tensor<D>) -> Tensor<D> + Send + Sync + 'static,
) -> Tensor<D> {
    let backward = Arc::new(backward);
    fused(x, move |x| {
        let backward = backward.clone();
        (forward(x), move |gradient| backward(gradient))
    })
}

/// Goes backward from `y`, whose gradient is this one: where one stage of a pipeline takes up what the next one has begun. Both are
/// on the same device, `gradient` outside of every graph.
///
/// # Panics
/// When `y` is in no graph.
pub fn backward_from<const D: usize>(y: Tensor<D>, gradient: Tensor<D>) -> Gradients {
    let end: Tensor<1> = fused(y, move |y| {
        let gradient = gradient.clone();
        (Tensor::zeros([1], &y.device()), move |_: Tensor<1>| gradient.clone())
    });
    end.backward()
}

/// An operation of one input. `forward` returns the output and the closure that turns the output's gradient into the
/// input's; without autodiff that closure is dropped at once.
pub fn fused<const D: usize, const E: usize, B>(
    x: Tensor<D>,
    forward: impl Fn(Tensor<D>) -> (Tensor<E>, B) + Send + Sync + 'static,
) -> Tensor<E>
where
    B: Fn(Tensor<E>) -> Tensor<D> + Send + Sync + 'static,
{
    let operation = Fused::<1>(Arc::new(move |[x]| {
        let (out, backward) = forward(Tensor::from_dispatch(x));
        (out.into_dispatch(), Arc::new(move |g| [backward(Tensor::from_dispatch(g)).into_dispatch()]) as Back<1>)
    }));
    Tensor::from_dispatch(Dispatch::fused(x.into_dispatch(), operation))
}

/// An operation of two inputs, like [`fused`].
pub fn fused_pair<const D1: usize, const D2: usize, const E: usize, B>(
    x: Tensor<D1>,
    y: Tensor<D2>,
    forward: impl Fn(Tensor<D1>, Tensor<D2>) -> (Tensor<E>, B) + Send + Sync + 'static,
) -> Tensor<E>
where
    B: Fn(Tensor<E>) -> (Tensor<D1>, Tensor<D2>) + Send + Sync + 'static,
{
    let operation = Fused::<2>(Arc::new(move |[x, y]| {
        let (out, backward) = forward(Tensor::from_dispatch(x), Tensor::from_dispatch(y));
        let back = move |g| {
            let (x, y) = backward(Tensor::from_dispatch(g));
            [x.into_dispatch(), y.into_dispatch()]
        };
        (out.into_dispatch(), Arc::new(back) as Back<2>)
    }));
    Tensor::from_dispatch(Dispatch::fused_pair(x.into_dispatch(), y.into_dispatch(), operation))
}

#[cfg(test)]
mod tests;
