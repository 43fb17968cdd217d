//! What error feedback remembers of one region.
//!
//! An encoder reads the residual of the last committed step and writes the next one beside it. When all ranks agree
//! that the step counts, the two swap; when the step is skipped, the old one stays as it was, and the next encode writes
//! over the other. So a skipped step leaves no trace. Memory: 8 bytes an element while a run trains; 4 are kept.

/// The two buffers of one region.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    committed: Vec<f32>,
    next: Vec<f32>,
}

impl Residual {
    /// Nothing remembered yet, for a region of so many elements.
    #[must_use]
    pub fn zeros(elements: usize) -> Self {
        Self::restore(vec![0.0; elements])
    }

    /// What a checkpoint kept.
    #[must_use]
    pub fn restore(committed: Vec<f32>) -> Self {
        Self { next: vec![0.0; committed.len()], committed }
    }

    /// What the committed steps left out: what a checkpoint keeps.
    #[must_use]
    pub fn committed(&self) -> &[f32] {
        &self.committed
    }

    /// The committed residual of some elements, and the place for what this step leaves out of them.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn split(&mut self, range: std::ops::Range<usize>) -> (&[f32], &mut [f32]) {
        (&self.committed[range.clone()], &mut self.next[range])
    }

    /// The step counts: what it left out is remembered. Every element must have been encoded in this step.
    pub const fn commit(&mut self) {
        std::mem::swap(&mut self.committed, &mut self.next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Codec;

    #[test]
    fn a_skipped_step_leaves_no_trace() {
        let mut residual = Residual::zeros(3);
        let mut payload = Vec::new();
        let mut encode = |residual: &mut Residual, gradient: &[f32]| {
            let (old, new) = residual.split(0..3);
            let _ = Codec::Int8.encode(gradient, old, &mut payload, new);
            payload.clone()
        };
        encode(&mut residual, &[1.0, 0.3, -0.7]);
        residual.commit();
        let before = residual.committed().to_vec();
        assert_ne!(before, [0.0; 3]);
        let sent = encode(&mut residual.clone(), &[0.1, 0.2, 0.3]);
        // Not committed: neither a good gradient nor a bad one changes what the next step sends.
        encode(&mut residual, &[9.0, 9.0, 9.0]);
        encode(&mut residual, &[f32::NAN, 0.0, 0.0]);
        assert_eq!(residual.committed(), before);
        assert_eq!(encode(&mut residual, &[0.1, 0.2, 0.3]), sent);
    }
}
