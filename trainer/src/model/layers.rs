//! The layers that own parameters. Shapes: B batch, T tokens, D width in, F width out, V vocabulary.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use burn::Tensor;
use burn::module::{Module, Param};
use burn::tensor::{Int, module};
use parallel::tap::{Emit, tap};

use crate::kernels::rms_norm::rms_norm;

/// What becomes of a layer's output, `[B, T, D]`, on its way to the next.
#[derive(Clone)]
pub struct After(Arc<dyn Fn(Tensor<3>) -> Tensor<3> + Send + Sync>);

impl After {
    /// This.
    pub fn new(after: impl Fn(Tensor<3>) -> Tensor<3> + Send + Sync + 'static) -> Self {
        Self(Arc::new(after))
    }
}

impl fmt::Debug for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("After")
    }
}

/// A layer's one slot, empty where one process has the whole model and does not train. In training it takes the layer's
/// gradient out of the backward pass; and where the layer is a part of one, it makes the whole layer's output of the part's.
#[derive(Clone, Debug, Default)]
pub struct Hook {
    emit: Option<Emit>,
    after: Option<After>,
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
            after: None,
            #[cfg(test)]
            without_anchor: false,
        }
    }

    /// The same, and what becomes of the layer's output, if something does.
    #[must_use]
    pub fn then(self, after: Option<After>) -> Self {
        Self { after, ..self }
    }

    #[cfg(test)]
    pub(crate) const fn without_anchor(emit: Emit) -> Self {
        Self { emit: Some(emit), after: None, without_anchor: true }
    }

    /// The output as the next layer should have it.
    fn leave(&self, y_btd: Tensor<3>) -> Tensor<3> {
        match &self.after {
            Some(After(after)) => after(y_btd),
            None => y_btd,
        }
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
        self.hook.leave(project(x_btd, weight_fd))
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

    /// `[B, T]` tokens to `[B, T, D]`, in a table that [`table`](Self::table) gave. Where it has some `rows` of the vocabulary
    /// only, other tokens have zeros.
    #[must_use]
    pub fn look_up(&self, table_vd: Tensor<2>, tokens_bt: Tensor<2, Int>, rows: Option<&Range<usize>>) -> Tensor<3> {
        let x_btd = match rows {
            None => module::embedding(table_vd, tokens_bt),
            Some(rows) => look_up_some(table_vd, tokens_bt, rows),
        };
        self.hook.leave(x_btd)
    }
}

fn look_up_some(table_vd: Tensor<2>, tokens_bt: Tensor<2, Int>, rows: &Range<usize>) -> Tensor<3> {
    let ([b, t], [_, d]) = (tokens_bt.dims(), table_vd.dims());
    let (first, end) = (rows.start as i64, rows.end as i64);
    let absent_bt = tokens_bt.clone().lower_elem(first).bool_or(tokens_bt.clone().greater_equal_elem(end));
    // What is absent looks up the first row, and forgets it.
    let place_bt = tokens_bt.sub_scalar(first).mask_fill(absent_bt.clone(), 0);
    let absent_btd = absent_bt.reshape([b, t, 1]).expand([b, t, d]);
    module::embedding(table_vd, place_bt).mask_fill(absent_btd, 0.0)
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
        self.hook.leave(rms_norm(x_btd, weight, self.eps))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn tables_of_some_rows_add_up_to_the_whole_table_and_so_do_their_gradients() {
        let device = Device::flex().autodiff();
        let numbers: Vec<f32> = (0..14).map(|i| i as f32 + 1.0).collect();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(vec![0, 6, 3, 3, 2, 5], [2, 3]), &device);
        let run = |rows: Option<Range<usize>>| {
            let some = rows.clone().unwrap_or(0..7);
            let values = numbers[2 * some.start..2 * some.end].to_vec();
            let weight = Param::from_tensor(Tensor::from_data(TensorData::new(values, [some.len(), 2]), &device));
            let layer = Embedding::new(weight, Hook::default());
            let out = layer.look_up(layer.table(), tokens.clone(), rows.as_ref());
            let weights = out.ones_like().cumsum(1);
            let gradients = (out.clone() * weights).sum().backward();
            let gradient = layer.weight.val().grad(&gradients).expect("a parameter");
            let values = |data: TensorData| data.try_into_vec::<f32>().expect("f32");
            (values(out.into_data()), values(gradient.into_data()))
        };
        let (out, gradient) = run(None);
        let parts = [run(Some(0..3)), run(Some(3..7))];
        let sum: Vec<f32> = parts[0].0.iter().zip(&parts[1].0).map(|(a, b)| a + b).collect();
        assert_eq!(sum, out);
        assert_eq!([parts[0].1.clone(), parts[1].1.clone()].concat(), gradient);
    }
}
