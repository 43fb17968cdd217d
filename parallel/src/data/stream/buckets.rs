//! Buckets that micro-batches fill.

use burn::Tensor;
use burn::tensor::DType;

use super::{Gradient, StreamError};
use crate::data::plan::Plan;

#[derive(Debug)]
pub(super) struct State {
    pub(super) step: u64,
    /// One buffer a bucket, kept from step to step. The engine has those that are complete.
    pub(super) buffers: Vec<Vec<f32>>,
    /// For each parameter, one past the last micro-batch that gave a gradient; 0 for none in this step, and then its place
    /// in the buffer holds whatever it holds.
    pub(super) given: Vec<usize>,
    /// For each bucket, parameters that the last micro-batch has not given yet.
    pub(super) missing: Vec<usize>,
    pub(super) micro_batch: usize,
    pub(super) micro_batches: usize,
    /// A copy of each complete bucket, where somebody wants it.
    pub(super) own: Option<Vec<Vec<f32>>>,
    /// Whether complete buckets wait for the end of the backward pass.
    pub(super) late: bool,
    /// Buckets in the order in which they became complete.
    pub(super) complete: Vec<usize>,
    /// The first fault of the step. `add` runs inside the backward pass, from which nothing can be returned.
    pub(super) fault: Option<StreamError>,
}

impl State {
    /// What gave no gradient in this step has zeros.
    pub(super) fn fill(&mut self, plan: &Plan, bucket: usize) {
        for &index in plan.buckets()[bucket].parameters.iter().filter(|&&index| self.given[index] == 0) {
            self.buffers[bucket][plan.slot(index).range.clone()].fill(0.0);
        }
    }

    pub(super) fn unreadable(&self, parameter: &str, why: String) -> StreamError {
        StreamError::Read { step: self.step, parameter: parameter.to_owned(), why }
    }

    pub(super) fn take(&mut self, plan: &Plan, bucket: usize) -> Vec<f32> {
        self.fill(plan, bucket);
        let values = std::mem::take(&mut self.buffers[bucket]);
        if let Some(own) = &mut self.own {
            own[bucket].clone_from(&values);
        }
        values
    }

    pub(super) fn add(&mut self, plan: &Plan, index: usize, gradient: Gradient<'_>) -> Result<(), StreamError> {
        let name = || plan.parameters()[index].name.clone();
        if self.given[index] > self.micro_batch {
            return Err(StreamError::Twice { step: self.step, parameter: name(), micro_batch: self.micro_batch });
        }
        let slot = plan.slot(index);
        let sum = &mut self.buffers[slot.bucket][slot.range.clone()];
        let is_first = self.given[index] == 0;
        let found = match gradient {
            Gradient::Host(values) => add_to(sum, values, is_first),
            Gradient::Device(tensor) => {
                let step = self.step;
                let unreadable = |why| StreamError::Read { step, parameter: name(), why };
                read(*tensor, |values| add_to(sum, values, is_first)).map_err(unreadable)?
            }
        };
        if let Err(found) = found {
            return Err(StreamError::Size { step: self.step, parameter: name(), expected: slot.range.len(), found });
        }
        self.given[index] = self.micro_batch + 1;
        if self.micro_batch + 1 == self.micro_batches {
            self.missing[slot.bucket] -= 1;
            if self.missing[slot.bucket] == 0 {
                self.complete.push(slot.bucket);
            }
        }
        Ok(())
    }
}

/// The elements of a tensor on any device, as f32.
pub(super) fn read<R>(tensor: Tensor<1>, with: impl FnOnce(&[f32]) -> R) -> Result<R, String> {
    let data = tensor.try_into_data().map_err(|error| format!("{error:?}"))?;
    let data = if data.dtype() == DType::F32 { data } else { data.convert::<f32>() };
    data.as_slice::<f32>().map(with).map_err(|error| format!("{error:?}"))
}

/// `sum += values`, from zero on when they are the first; or the number of values when it is not the number expected.
fn add_to(sum: &mut [f32], values: &[f32], is_first: bool) -> Result<(), usize> {
    if sum.len() != values.len() {
        return Err(values.len());
    }
    if is_first {
        // Zero plus the value, so that there is no negative zero.
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum = 0.0 + value);
    } else {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    Ok(())
}
