//! Tensor parallelism's operations: what the members of a tensor group exchange inside a forward and a backward pass.
//!
//! All are [`through`]: one collective operation on the value, another one, or none, on its gradient.
//!
//! | operation | forward | backward | of |
//! | --- | --- | --- | --- |
//! | [`copy`](TensorGroup::copy), *f* | nothing | all-reduce | Shoeybi et al. 2019, <https://arxiv.org/abs/1909.08053> |
//! | [`reduce`](TensorGroup::reduce), *g* | all-reduce | nothing | the same |
//! | [`gather`](TensorGroup::gather) | all-gather of tokens | reduce-scatter | Korthikanti et al. 2022, <https://arxiv.org/abs/2205.05198> |
//! | [`scatter`](TensorGroup::scatter) | reduce-scatter of tokens | all-gather | the same |
//!
//! Values travel as f32, through host memory, and are added in rank order: all members go on with the same bits. A site is
//! the name of the layer, with the direction behind it.
//!
//! # Errors
//!
//! Inside a closure of the autodiff graph nothing can be returned. So the first error is kept, every later operation does
//! nothing, with zeros for a result, and whoever runs the step asks [`check`](TensorGroup::check) after each pass,
//! before anything is made of the numbers.
//!
//! - `tokens`: how a tensor's tokens lie when they are cut between the members.

mod tokens;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::Tensor;
use burn::tensor::{Device, TensorData};
use thiserror::Error;

use crate::collective::{CollectiveError, Reduction, SubGroup};
use crate::tap::through;

/// Why the numbers of a pass mean nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TensorError {
    /// The other members.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A tensor could not be read back as f32.
    #[error("{site}: a tensor could not be read as f32: {why}")]
    Read {
        /// Where.
        site: String,
        /// What the backend said.
        why: String,
    },
    /// Tokens that cannot be shared out evenly.
    #[error("{site}: {tokens} tokens cannot be cut into {members} equal parts")]
    Tokens {
        /// Where.
        site: String,
        /// Of a sequence.
        tokens: usize,
        /// Of the tensor group.
        members: usize,
    },
}

/// The ranks that hold one model together, or some of them, as one of them sees it. Clones share the error that is kept.
#[derive(Clone, Debug)]
pub struct TensorGroup {
    group: SubGroup,
    fault: Arc<Mutex<Option<TensorError>>>,
}

/// What a collective operation makes of a member's values.
type Call = fn(&SubGroup, &str, Vec<f32>) -> Result<Vec<f32>, CollectiveError>;

impl TensorGroup {
    /// The group of these ranks.
    #[must_use]
    pub fn new(group: SubGroup) -> Self {
        Self { group, fault: Arc::default() }
    }

    /// Some members of this group, whose errors count as its own.
    #[must_use]
    pub fn of_some(&self, group: SubGroup) -> Self {
        Self { group, fault: self.fault.clone() }
    }

    /// Which member this rank is.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.group.index()
    }

    /// The members, for what is no part of a pass.
    #[must_use]
    pub const fn members(&self) -> &SubGroup {
        &self.group
    }

    /// How many members there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.group.members().len()
    }

    /// What went wrong first, if something did. After an error nothing here is done any more.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), TensorError> {
        self.fault().clone().map_or(Ok(()), Err)
    }

    /// Megatron's f: the value as it is, which all members have; its gradient is the sum of theirs. It stands where the
    /// members' parts of a layer begin.
    #[must_use]
    pub fn copy<const D: usize>(&self, x: Tensor<D>, name: &str) -> Tensor<D> {
        let (group, site) = (self.clone(), format!("{name}/backward"));
        through(x, |x| x, move |gradient| group.sum(gradient, &site))
    }

    /// Megatron's g: the sum of the members' values; the gradient of each is the sum's. It stands where the members' parts
    /// of a layer end.
    #[must_use]
    pub fn reduce<const D: usize>(&self, x: Tensor<D>, name: &str) -> Tensor<D> {
        let (group, site) = (self.clone(), format!("{name}/forward"));
        through(x, move |x| group.sum(x, &site), |gradient| gradient)
    }

    /// All tokens of which each member has its part: `[B, T / N, D]` to `[B, T, D]`. The gradient of a member's part is the sum
    /// of what all members have for it.
    #[must_use]
    pub fn gather(&self, x_btd: Tensor<3>, name: &str) -> Tensor<3> {
        let (forward, backward) = (self.clone(), self.clone());
        let [there, back] = self.sites(name);
        through(x_btd, move |x| forward.all_gather(x, &there), move |g| backward.reduce_scatter(g, &back))
    }

    /// Each member's part of the tokens of the sum of all members' values: `[B, T, D]` to `[B, T / N, D]`. The gradient has
    /// all tokens again.
    #[must_use]
    pub fn scatter(&self, x_btd: Tensor<3>, name: &str) -> Tensor<3> {
        let (forward, backward) = (self.clone(), self.clone());
        let [there, back] = self.sites(name);
        through(x_btd, move |x| forward.reduce_scatter(x, &there), move |g| backward.all_gather(g, &back))
    }

    /// The sum of all members' tensors, which no graph remembers: for a gradient of which each member has a part.
    #[must_use]
    pub fn sum<const D: usize>(&self, x: Tensor<D>, site: &str) -> Tensor<D> {
        let (shape, device) = (x.dims(), x.device());
        let sum: Call = |group, site, mut values| {
            group.all_reduce(site, Reduction::Sum, &mut values)?;
            Ok(values)
        };
        self.call(x, site, (shape, &device), |values| values, sum)
    }

    /// Reduces numbers over all members, in place. After an error they stay as they are.
    pub fn reduce_values(&self, site: &str, reduction: Reduction, values: &mut [f32]) {
        if self.fault().is_none()
            && let Err(error) = self.group.all_reduce(site, reduction, values)
        {
            self.keep(error.into());
        }
    }

    fn all_gather(&self, x_btd: Tensor<3>, site: &str) -> Tensor<3> {
        let ([b, t, d], n, device) = (x_btd.dims(), self.ranks(), x_btd.device());
        let gather: Call = |group, site, values| {
            let mut all = vec![0.0; values.len() * group.members().len()];
            group.all_gather(site, &values, &mut all)?;
            Ok(all)
        };
        let out = self.call(x_btd, site, ([n * b, t, d], &device), |values| values, gather);
        // Members are outermost as they come.
        tokens::join(out, n)
    }

    fn reduce_scatter(&self, x_btd: Tensor<3>, site: &str) -> Tensor<3> {
        let ([b, t, d], n, device) = (x_btd.dims(), self.ranks(), x_btd.device());
        if !t.is_multiple_of(n) {
            self.keep(TensorError::Tokens { site: site.to_owned(), tokens: t, members: n });
            return Tensor::zeros([b, t.div_ceil(n), d], &device);
        }
        let scatter: Call = |group, site, values| {
            let mut own = vec![0.0; values.len() / group.members().len()];
            group.reduce_scatter(site, Reduction::Sum, &values, &mut own)?;
            Ok(own)
        };
        self.call(x_btd, site, ([b, t / n, d], &device), |x| tokens::cut(x, n), scatter)
    }

    /// Takes a tensor to the host, through a collective operation, and back. After an error there are zeros.
    fn call<const D: usize, const E: usize>(
        &self,
        x: Tensor<D>,
        site: &str,
        (shape, device): ([usize; E], &Device),
        arrange: impl FnOnce(Tensor<D>) -> Tensor<D>,
        call: Call,
    ) -> Tensor<E> {
        if self.fault().is_none() {
            match read(arrange(x), site).and_then(|values| Ok(call(&self.group, site, values)?)) {
                Ok(values) => return Tensor::from_data(TensorData::new(values, shape), device),
                Err(error) => self.keep(error),
            }
        }
        Tensor::zeros(shape, device)
    }

    fn sites(&self, name: &str) -> [String; 2] {
        ["forward", "backward"].map(|way| format!("{name}/{way}"))
    }

    fn keep(&self, error: TensorError) {
        self.fault().get_or_insert(error);
    }

    fn fault(&self) -> MutexGuard<'_, Option<TensorError>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read<const D: usize>(x: Tensor<D>, site: &str) -> Result<Vec<f32>, TensorError> {
    let failed = |why: String| TensorError::Read { site: site.to_owned(), why };
    let data = x.try_into_data().map_err(|error| failed(format!("{error:?}")))?;
    data.try_into_vec::<f32>().map_err(|error| failed(format!("{error:?}")))
}

#[cfg(test)]
mod tests;
