//! Tensor parallelism, applied to the model from outside: which part of each parameter a rank holds, and what becomes of a
//! layer's output on its way to the next ([Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053), and for sequences
//! [Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198)).
//!
//! | layer | a rank holds | what becomes of its output | with `parallel.sequence` |
//! | --- | --- | --- | --- |
//! | embedding | rows of the vocabulary | the sum over the ranks (*g*) | each rank its tokens of the sum |
//! | norms | all | its gradient is the sum over the ranks (*f*) | all tokens; the gain's gradient is summed over the ranks |
//! | query, key, value, gate, up | rows: heads, or the width | stays | stays |
//! | output, down | columns | the sum over the ranks (*g*) | each rank its tokens of the sum |
//! | head | rows of the vocabulary | stays: the cross entropy takes parts | stays |
//!
//! So the parts of a block begin behind a norm, in one place for all that read it, and end at a layer of columns. Of key and
//! value heads that are fewer than ranks several ranks hold the same one; each has its own queries' part of the gradient,
//! which is added over them.
//!
//! - [`parts`](mod@parts): which part of each parameter a rank holds.

pub mod parts;

use std::ops::Range;
use std::sync::Arc;

use burn::Tensor;
use parallel::collective::{Collectives, Reduction};
use parallel::mesh::{Axis, Mesh, cut, replicas};
use parallel::tensor::{TensorError, TensorGroup};

use crate::error::{Error, Result};
use crate::kernels::cross_entropy_rows::{Reduce, SomeRows};
use crate::model::{After, Config};

/// What is left out or wrong: the controls of the test that all meshes give the same losses, and of no other use.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Nothing sums the gradients of what all ranks have.
    WithoutF,
    /// A mean where a sum is due.
    Mean,
    /// Ranks that hold the same key and value heads keep their gradients to themselves.
    ReplicasApart,
    /// The gains of norms, of which each rank has seen its tokens alone, keep their gradients to themselves.
    NormsApart,
}

/// One rank's slice of a model, and its tie to the ranks that hold the others.
#[derive(Clone, Debug)]
pub struct Slice {
    group: TensorGroup,
    /// The ranks that hold the same key and value heads, if there are several.
    replicas: Option<TensorGroup>,
    config: Config,
    sequence: bool,
    #[cfg(test)]
    pub(crate) wrong: Option<Wrong>,
}

impl Slice {
    /// The slice of a rank of the mesh; `None` where every rank holds whole layers.
    ///
    /// # Errors
    /// There is no such rank.
    pub fn new(
        collectives: &Collectives,
        (mesh, rank): (Mesh, usize),
        config: &Config,
        sequence: bool,
    ) -> Result<Option<Self>> {
        let ranks = mesh.size(Axis::Tensor);
        if ranks == 1 {
            return Ok(None);
        }
        let all = mesh.group(Axis::Tensor, rank);
        let members = collectives.sub_group(&all)?;
        let group = TensorGroup::new(members);
        let several = replicas(config.num_key_value_heads, ranks);
        let first = group.index() / several * several;
        let replicas = match several {
            1 => None,
            _ => Some(group.of_some(collectives.sub_group(&all[first..first + several])?)),
        };
        let config = config.clone();
        Ok(Some(Self {
            group,
            replicas,
            config,
            sequence,
            #[cfg(test)]
            wrong: None,
        }))
    }

    /// The same, where every rank has all tokens of a sequence, whatever its length: for held-out text.
    #[must_use]
    pub fn with_all_tokens(&self) -> Self {
        Self { sequence: false, ..self.clone() }
    }

    /// Into how many parts tokens are cut where nothing is computed from all of them.
    #[must_use]
    pub fn token_parts(&self) -> usize {
        if self.sequence { self.group.ranks() } else { 1 }
    }

    /// What went wrong in a pass, if something did.
    ///
    /// # Errors
    /// That.
    pub fn check(&self, step: u64) -> Result<()> {
        self.group.check().map_err(|error| match error {
            TensorError::Collective(error) => error.into(),
            other => Error::Device { step, what: other.to_string() },
        })
    }

    /// What becomes of the output of the layer whose weight has this name.
    #[must_use]
    pub fn after(&self, name: &str) -> Option<After> {
        let (layer, sequence, group) = (layer(name), self.sequence, self.group.clone());
        let own = layer.to_owned();
        let after: Box<dyn Fn(Tensor<3>) -> Tensor<3> + Send + Sync> = match Role::of(layer) {
            Role::Norm if sequence => Box::new(move |x| group.gather(x, &own)),
            Role::Norm => Box::new(move |x| group.copy(x, &own)),
            Role::Columns | Role::Embedding if sequence => Box::new(move |x| group.scatter(x, &own)),
            Role::Columns | Role::Embedding => Box::new(move |x| group.reduce(x, &own)),
            Role::Head | Role::KeyValue | Role::Rows => return None,
        };
        #[cfg(test)]
        let after = self.tampered(Role::of(layer), after)?;
        Some(After::new(after))
    }

    #[cfg(test)]
    fn tampered(
        &self,
        role: Role,
        after: Box<dyn Fn(Tensor<3>) -> Tensor<3> + Send + Sync>,
    ) -> Option<Box<dyn Fn(Tensor<3>) -> Tensor<3> + Send + Sync>> {
        let ranks = self.group.ranks() as f64;
        match (self.wrong, role) {
            (Some(Wrong::WithoutF), Role::Norm) => None,
            (Some(Wrong::Mean), Role::Columns) => Some(Box::new(move |x| after(x).div_scalar(ranks))),
            _ => Some(after),
        }
    }

    /// The ranks over which the gradient of the weight of this name is to be summed, as it comes out of a backward pass.
    #[must_use]
    pub fn sums(&self, name: &str) -> Option<&TensorGroup> {
        #[cfg(test)]
        if matches!(
            (self.wrong, Role::of(layer(name))),
            (Some(Wrong::ReplicasApart), Role::KeyValue) | (Some(Wrong::NormsApart), Role::Norm)
        ) {
            return None;
        }
        match Role::of(layer(name)) {
            Role::Norm if self.sequence => Some(&self.group),
            Role::KeyValue => self.replicas.as_ref(),
            _ => None,
        }
    }

    /// The rows of the vocabulary that this rank holds, and the way to those who have the others.
    #[must_use]
    pub fn rows(&self) -> SomeRows {
        let reduce = |site: &'static str, reduction: Reduction| -> Reduce {
            let group = self.group.clone();
            Arc::new(move |values| group.reduce_values(site, reduction, values))
        };
        SomeRows {
            rows: self.vocabulary(),
            largest: reduce("cross_entropy/largest", Reduction::Max),
            sum: reduce("cross_entropy/sum", Reduction::Sum),
        }
    }

    /// The logits of all tokens of the vocabulary, of which every rank of the group gives those that it has. All of them ask at
    /// the same place.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn all_logits(&self, own: &[f32]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.config.vocab_size];
        for (place, &member) in self.group.members().members().iter().enumerate() {
            let rows = &mut all[cut(self.config.vocab_size, place, self.group.ranks())];
            if place == self.group.index() {
                rows.copy_from_slice(own);
            }
            self.group.members().broadcast("generate/logits", member, rows)?;
        }
        Ok(all)
    }

    fn vocabulary(&self) -> Range<usize> {
        cut(self.config.vocab_size, self.group.index(), self.group.ranks())
    }
}

/// What a layer is to the ranks that share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A table with rows of the vocabulary.
    Embedding,
    /// The same, as the head.
    Head,
    /// Held by all.
    Norm,
    /// Rows that are key or value heads.
    KeyValue,
    /// Rows.
    Rows,
    /// Columns.
    Columns,
}

impl Role {
    /// By the last part of its name, in Hugging Face's spelling.
    ///
    /// # Panics
    /// A layer that the model does not have.
    fn of(layer: &str) -> Self {
        match layer.rsplit('.').next().unwrap_or(layer) {
            "embed_tokens" => Self::Embedding,
            "lm_head" => Self::Head,
            "input_layernorm" | "post_attention_layernorm" | "norm" => Self::Norm,
            "k_proj" | "v_proj" => Self::KeyValue,
            "q_proj" | "gate_proj" | "up_proj" => Self::Rows,
            "o_proj" | "down_proj" => Self::Columns,
            other => unreachable!("{other} of {layer}: the model has no such layer"),
        }
    }
}

/// The layer whose weight this is.
fn layer(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}
