//! The static plan of buckets.
//!
//! A bucket is what leaves as one piece. Buckets are filled in the order of the backward pass, last layer first, which
//! is the reverse of the order in which the model declares its parameters. The plan depends on names and shapes alone,
//! so that every rank makes the same one without talking, and a parameter that gets no gradient in some step (an expert
//! that saw no token) still has its place.
//!
//! Where several ranks hold one model together, each has a plan of its own [parts](Part).

use std::ops::Range;

use compression::region::{RegionError, elements};

use super::part::Part;

/// A parameter as the rest of the house knows it: by logical name and shape. burn's `ParamId` is random per process and
/// never leaves the trainer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// The logical name, in Hugging Face's spelling.
    pub name: String,
    /// Sizes of the dimensions, in the exported layout.
    pub shape: Vec<usize>,
}

impl Parameter {
    /// How many elements it has.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Where a parameter's gradient lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which bucket.
    pub bucket: usize,
    /// Which elements of it.
    pub range: Range<usize>,
}

/// One bucket: the parameters in it, in the order in which their gradients come out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Indices into [`Plan::parameters`].
    pub parameters: Vec<usize>,
    /// Elements of all of them together.
    pub elements: usize,
}

/// The plan of one model: same input, same plan, on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    parameters: Vec<Parameter>,
    parts: Vec<Part>,
    slots: Vec<Slot>,
    buckets: Vec<Bucket>,
}

impl Plan {
    /// Puts `parameters` (in the order of the forward pass) into buckets of at most `bucket_bytes_max` bytes of f32. A
    /// parameter that is larger has a bucket of its own.
    ///
    /// # Errors
    /// A shape whose number of elements does not fit the address space.
    pub fn new(parameters: Vec<Parameter>, bucket_bytes_max: usize) -> Result<Self, RegionError> {
        let parts = parameters.into_iter().map(Part::whole).collect::<Result<Vec<_>, _>>()?;
        Self::of_parts(parts, bucket_bytes_max)
    }

    /// As [`new`](Self::new), of what this rank holds of each parameter.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_parts(parts: Vec<Part>, bucket_bytes_max: usize) -> Result<Self, RegionError> {
        let parameters: Vec<Parameter> = parts.iter().map(Part::parameter).collect();
        let bucket_elements_max = (bucket_bytes_max / size_of::<f32>()).max(1);
        let mut slots = vec![Slot { bucket: 0, range: 0..0 }; parameters.len()];
        let mut buckets: Vec<Bucket> = Vec::new();
        for (index, parameter) in parameters.iter().enumerate().rev() {
            let count = elements(&parameter.shape)?;
            let fits = buckets.last().is_some_and(|bucket| bucket.elements + count <= bucket_elements_max);
            if !fits {
                buckets.push(Bucket { parameters: Vec::new(), elements: 0 });
            }
            let last = buckets.len() - 1;
            let bucket = &mut buckets[last];
            slots[index] = Slot { bucket: last, range: bucket.elements..bucket.elements + count };
            bucket.parameters.push(index);
            bucket.elements += count;
        }
        Ok(Self { parameters, parts, slots, buckets })
    }

    /// The parameters in the order of the forward pass, which is the logical order of every sum over parameters. Where this
    /// rank holds a part of one, it has that part's shape.
    #[must_use]
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// What this rank holds of each parameter.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Where the gradient of parameter `index` lies.
    #[must_use]
    pub fn slot(&self, index: usize) -> &Slot {
        &self.slots[index]
    }

    /// The buckets in the order in which they fill.
    #[must_use]
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Elements of all parameters together.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.elements).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parameters(sizes: &[usize]) -> Vec<Parameter> {
        sizes.iter().enumerate().map(|(i, &n)| Parameter { name: format!("p{i}"), shape: vec![n] }).collect()
    }

    #[test]
    fn the_last_layer_is_in_the_first_bucket() {
        let plan = Plan::new(parameters(&[100, 10, 10, 10]), 80).expect("small");
        let order: Vec<_> = plan.buckets().iter().map(|b| b.parameters.clone()).collect();
        assert_eq!(order, [vec![3, 2], vec![1], vec![0]]);
        assert_eq!(plan.slot(2), &Slot { bucket: 0, range: 10..20 });
        assert_eq!(plan.elements(), 130);
    }

    proptest! {
        #[test]
        fn every_element_has_exactly_one_place(sizes in prop::collection::vec(0usize..50, 0..20), max in 1usize..400) {
            let plan = Plan::new(parameters(&sizes), max).expect("small");
            let mut seen: Vec<Vec<bool>> = plan.buckets().iter().map(|b| vec![false; b.elements]).collect();
            for (index, &size) in sizes.iter().enumerate() {
                let slot = plan.slot(index);
                prop_assert_eq!(slot.range.len(), size);
                for place in &mut seen[slot.bucket][slot.range.clone()] {
                    prop_assert!(!std::mem::replace(place, true));
                }
            }
            prop_assert!(seen.iter().flatten().all(|&place| place));
            for bucket in plan.buckets() {
                prop_assert!(bucket.elements * 4 <= max.max(4) || bucket.parameters.iter().filter(|&&p| sizes[p] > 0).count() == 1);
            }
        }
    }
}
