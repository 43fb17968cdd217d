//! The backend extension behind [`tap`](super::tap), [`fused`](super::fused) and [`fused_pair`](super::fused_pair).
//!
//! Plain backends do what the forward pass asks; `Autodiff` records one step whose backward calls the closure. A
//! backend is added with one line at the end of this file.

use std::fmt;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, backend_extension,
};

use super::{Back, Emit, Fused};

/// What a backend must offer so that closures can run on its tensors.
#[backend_extension(Flex, LibTorch: cfg(feature = "libtorch"), Cube: cfg(feature = "cube"), Autodiff)]
pub trait TapBackend: Backend {
    /// The identity on `x`; `emit` takes the gradient. `anchor` only decides the depth on the tape.
    fn tap(x: FloatTensor<Self>, anchor: FloatTensor<Self>, emit: Emit) -> FloatTensor<Self>;
    /// The same without an anchor.
    fn tap_leaf(x: FloatTensor<Self>, emit: Emit) -> FloatTensor<Self>;
    /// An operation of one input with its own backward.
    fn fused(x: FloatTensor<Self>, operation: Fused<1>) -> FloatTensor<Self>;
    /// An operation of two inputs with its own backward.
    fn fused_pair(x: FloatTensor<Self>, y: FloatTensor<Self>, operation: Fused<2>) -> FloatTensor<Self>;
}

/// Turns a backend's own tensor into one whose device is known at run time only, and back.
pub trait Lift: Backend {
    /// The backend's tensor, without autodiff.
    fn lift(x: FloatTensor<Self>) -> DispatchTensor;
    /// The inverse of [`lift`](Self::lift).
    fn lower(x: DispatchTensor) -> FloatTensor<Self>;
}

/// The backward step of a tap. The weight is always the first parent; an anchor, where there is one, is the second and
/// receives nothing.
#[derive(Debug)]
struct TapStep;

impl<B: Backend + Lift, const N: usize> Backward<B, N> for TapStep {
    type State = Emit;

    fn backward(self, ops: Ops<Emit, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<B>(&ops.node);
        let kept = ops.state.call(B::lift(gradient));
        if let (Some(weight), Some(kept)) = (&ops.parents[0], kept) {
            gradients.register::<B>(weight.id, B::lower(kept));
        }
    }
}

/// The backward of an operation, with whatever its forward kept.
#[derive(Clone)]
struct Kept<const N: usize>(Back<N>);

impl<const N: usize> fmt::Debug for Kept<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

/// The backward step of an operation of `N` inputs.
#[derive(Debug)]
struct FusedStep;

impl<B: Backend + Lift, const N: usize> Backward<B, N> for FusedStep {
    type State = Kept<N>;

    fn backward(self, ops: Ops<Kept<N>, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<B>(&ops.node);
        let inputs = (ops.state.0)(B::lift(gradient));
        for (parent, gradient) in ops.parents.iter().zip(inputs) {
            if let Some(parent) = parent {
                gradients.register::<B>(parent.id, B::lower(gradient));
            }
        }
    }
}

impl<B: TapBackend + Lift, C: CheckpointStrategy> TapBackend for Autodiff<B, C> {
    fn tap(x: FloatTensor<Self>, anchor: FloatTensor<Self>, emit: Emit) -> FloatTensor<Self> {
        match Backward::<B, 2>::prepare::<C>(TapStep, [x.node(), anchor.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(emit, x.into_primitive()),
            OpsKind::UnTracked(step) => step.finish(x.into_primitive()),
        }
    }

    fn tap_leaf(x: FloatTensor<Self>, emit: Emit) -> FloatTensor<Self> {
        match Backward::<B, 1>::prepare::<C>(TapStep, [x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(emit, x.into_primitive()),
            OpsKind::UnTracked(step) => step.finish(x.into_primitive()),
        }
    }

    fn fused(x: FloatTensor<Self>, operation: Fused<1>) -> FloatTensor<Self> {
        let guard = x.node();
        let (out, back) = operation.call([B::lift(x.into_primitive())]);
        match Backward::<B, 1>::prepare::<C>(FusedStep, [guard]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(Kept(back), B::lower(out)),
            OpsKind::UnTracked(step) => step.finish(B::lower(out)),
        }
    }

    fn fused_pair(x: FloatTensor<Self>, y: FloatTensor<Self>, operation: Fused<2>) -> FloatTensor<Self> {
        let guards = [x.node(), y.node()];
        let (out, back) = operation.call([B::lift(x.into_primitive()), B::lift(y.into_primitive())]);
        match Backward::<B, 2>::prepare::<C>(FusedStep, guards).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(Kept(back), B::lower(out)),
            OpsKind::UnTracked(step) => step.finish(B::lower(out)),
        }
    }
}

/// One line per backend: its type, and its variant of [`DispatchTensorKind`].
macro_rules! backend {
    ($kind:ident) => {
        impl Lift for burn::backend::$kind {
            fn lift(x: FloatTensor<Self>) -> DispatchTensor {
                DispatchTensor {
                    kind: DispatchTensorKind::$kind(BackendTensor::Float(x)),
                    autodiff: DispatchAutodiffContext::Disabled,
                }
            }

            fn lower(x: DispatchTensor) -> FloatTensor<Self> {
                match x.kind {
                    DispatchTensorKind::$kind(x) => x.float(),
                    #[allow(unreachable_patterns, reason = "the only variant in a build with one backend")]
                    _ => panic!("a closure of a tap must return a tensor of the backend it was given one of"),
                }
            }
        }

        impl TapBackend for burn::backend::$kind {
            fn tap(x: FloatTensor<Self>, _anchor: FloatTensor<Self>, _emit: Emit) -> FloatTensor<Self> {
                x
            }

            fn tap_leaf(x: FloatTensor<Self>, _emit: Emit) -> FloatTensor<Self> {
                x
            }

            fn fused(x: FloatTensor<Self>, operation: Fused<1>) -> FloatTensor<Self> {
                Self::lower(operation.call([Self::lift(x)]).0)
            }

            fn fused_pair(x: FloatTensor<Self>, y: FloatTensor<Self>, operation: Fused<2>) -> FloatTensor<Self> {
                Self::lower(operation.call([Self::lift(x), Self::lift(y)]).0)
            }
        }
    };
}

backend!(Flex);
#[cfg(feature = "libtorch")]
backend!(LibTorch);
#[cfg(feature = "cube")]
backend!(Cube);
