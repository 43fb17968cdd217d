//! What several ranks left out of their gradients, where one rank goes on alone: it has nobody to send anything to, and
//! adds it to its next gradient that counts.

use super::plan::Plan;

/// What was left out, by parameter. A step that is skipped sends nothing, so it is owed until a step counts.
#[derive(Clone, Debug, Default)]
pub struct Owed {
    /// A vector for each parameter of the plan, an empty one for nothing; none at all where nothing was ever owed.
    left: Vec<Vec<f32>>,
}

impl Owed {
    /// Nothing yet, of a plan with so many parameters.
    #[must_use]
    pub fn new(parameters: usize) -> Self {
        Self { left: vec![Vec::new(); parameters] }
    }

    /// Enters what was left out of one parameter, as long as the parameter.
    pub fn enter(&mut self, index: usize, left: Vec<f32>) {
        self.left[index] = left;
    }

    /// Whether something was owed when this process began: a checkpoint of it has a place for it.
    #[must_use]
    pub const fn has_place(&self) -> bool {
        !self.left.is_empty()
    }

    /// What is still owed of one parameter; `None` for zeros.
    #[must_use]
    pub fn of(&self, index: usize) -> Option<&[f32]> {
        self.left.get(index).map(Vec::as_slice).filter(|left| !left.is_empty())
    }

    /// A step counted, and everything was in its gradient.
    pub fn settle(&mut self) {
        self.left.iter_mut().for_each(|left| *left = Vec::new());
    }

    /// Adds it to the gradients of a step, as an owner adds what it left out.
    pub(super) fn add_to(&self, plan: &Plan, buffers: &mut [Vec<f32>]) {
        for (index, left) in self.left.iter().enumerate().filter(|(_, left)| !left.is_empty()) {
            let slot = plan.slot(index);
            let gradient = &mut buffers[slot.bucket][slot.range.clone()];
            assert_eq!(gradient.len(), left.len(), "as long as the parameter");
            // Plus zero, so that there is no negative zero.
            gradient.iter_mut().zip(left).for_each(|(gradient, left)| *gradient = (*gradient + left) + 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::plan::Parameter;
    use crate::data::stream::{Gradient, GradientStream};
    use crate::note::Ballot;

    fn sum(stream: &GradientStream, step: u64, gradient: [f32; 2]) -> Vec<f32> {
        stream.begin(step, 2);
        for micro_batch in 0..2 {
            stream.begin_micro_batch(micro_batch);
            stream.add(1, Gradient::Host(&gradient));
        }
        let ballot =
            Ballot { finite: true, stop: false, busy: false, loss: 0.0, compute_s: 0.0, parameters: None, codec: None };
        stream.finish(ballot).expect("no fault").sum.parameter(1).to_vec()
    }

    #[test]
    fn what_is_owed_is_in_every_gradient_until_one_counts() {
        let parameter = |name: &str, n| Parameter { name: name.into(), shape: vec![n] };
        let plan = Plan::new(vec![parameter("a", 3), parameter("b", 2)], 1 << 20).expect("small");
        let stream = GradientStream::new(Arc::new(plan));
        assert!(!stream.owed().has_place());
        let mut owed = Owed::new(2);
        owed.enter(1, vec![0.5, -2.0]);
        stream.owe(owed);
        // The first two steps are skipped, which is for who takes the step to say.
        for step in 1..4 {
            assert_eq!(sum(&stream, step, [1.0, 1.0]), [2.5, 0.0], "step {step}");
            assert_eq!(stream.owed().of(1), Some(&[0.5, -2.0][..]));
        }
        stream.owed().settle();
        assert_eq!(sum(&stream, 4, [1.0, 1.0]), [2.0, 2.0], "once and no more");
        assert!(stream.owed().has_place() && stream.owed().of(1).is_none());
    }
}
