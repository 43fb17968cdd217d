//! AdamW (Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>) over flat ranges, and the schedule of its
//! learning rate.
//!
//! The update of an element depends on that element alone: any cut into ranges, and any number of threads, gives the
//! same bits.

use rayon::prelude::*;

use crate::recipe::resolved::{Optimizer, Schedule};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// One step's numbers, the same for every element of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// What a weight is multiplied with before the update: `1 - learning_rate * weight_decay`.
    keep: f32,
    /// `learning_rate / (1 - beta1^t)`
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`
    root_correction: f32,
    /// What the gradient is multiplied with first: the clipping factor.
    scale: f32,
}

/// The flat range of one parameter that an update goes through; all four have the same length.
#[derive(Debug)]
pub struct Range<'a> {
    /// Parameters.
    pub weights: &'a mut [f32],
    /// Their gradient, before clipping.
    pub gradients: &'a [f32],
    /// First moment.
    pub m: &'a mut [f32],
    /// Second moment.
    pub v: &'a mut [f32],
}

impl AdamW {
    /// The numbers of update `t` (counted from 1). `decay` is off for 1-D tensors.
    #[must_use]
    pub fn new(keys: &Optimizer, learning_rate: f64, t: u64, scale: f32, decay: bool) -> Self {
        let weight_decay = if decay { keys.weight_decay } else { 0.0 };
        let t = t as f64;
        Self {
            beta1: keys.beta1 as f32,
            beta2: keys.beta2 as f32,
            eps: keys.eps as f32,
            keep: (1.0 - learning_rate * weight_decay) as f32,
            rate: (learning_rate / (1.0 - libm::pow(keys.beta1, t))) as f32,
            root_correction: (1.0 / libm::sqrt(1.0 - libm::pow(keys.beta2, t))) as f32,
            scale,
        }
    }

    /// Updates one range in place.
    ///
    /// # Panics
    /// When the four slices differ in length.
    pub fn update(&self, range: &mut Range<'_>) {
        let n = range.weights.len();
        assert!(range.gradients.len() == n && range.m.len() == n && range.v.len() == n, "one range, one length");
        let chunks = range
            .weights
            .par_chunks_mut(CHUNK)
            .zip(range.gradients.par_chunks(CHUNK))
            .zip(range.m.par_chunks_mut(CHUNK).zip(range.v.par_chunks_mut(CHUNK)));
        chunks.for_each(|((weights, gradients), (m, v))| {
            for (((w, g), m), v) in weights.iter_mut().zip(gradients).zip(m).zip(v) {
                let g = g * self.scale;
                *m = self.beta1 * *m + (1.0 - self.beta1) * g;
                *v = self.beta2 * *v + (1.0 - self.beta2) * (g * g);
                *w = *w * self.keep - self.rate * (*m / (v.sqrt() * self.root_correction + self.eps));
            }
        });
    }
}

/// The learning rate of step `step` (counted from 1): linear warm-up to the peak, then a cosine (Loshchilov and Hutter
/// 2017, <https://arxiv.org/abs/1608.03983>) down to the minimum at the last step.
#[must_use]
pub fn learning_rate(schedule: &Schedule, step: u64, steps: u64) -> f64 {
    if step < schedule.warmup_steps {
        return schedule.learning_rate * step as f64 / schedule.warmup_steps as f64;
    }
    let part = (step - schedule.warmup_steps) as f64 / (steps - schedule.warmup_steps).max(1) as f64;
    let cosine = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * part.min(1.0)));
    schedule.min_learning_rate + (schedule.learning_rate - schedule.min_learning_rate) * cosine
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: Optimizer = Optimizer { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, sharded: None };

    fn run(decay: bool, cut: usize) -> Vec<f32> {
        let gradient: Vec<f32> = (0..40_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut weights: Vec<f32> = (0..40_000).map(|i| (i as f32 * 0.11).cos()).collect();
        let (mut m, mut v) = (vec![0.0; 40_000], vec![0.0; 40_000]);
        for t in 1..4 {
            let update = AdamW::new(&KEYS, 1e-2, t, 0.5, decay);
            for start in (0..40_000).step_by(cut) {
                let end = (start + cut).min(40_000);
                update.update(&mut Range {
                    weights: &mut weights[start..end],
                    gradients: &gradient[start..end],
                    m: &mut m[start..end],
                    v: &mut v[start..end],
                });
            }
        }
        weights
    }

    #[test]
    fn any_cut_into_ranges_gives_the_same_bits() {
        let whole = run(true, 40_000);
        assert_eq!(whole, run(true, 4_321));
        assert_ne!(whole, run(false, 40_000), "the decay must matter");
    }

    #[test]
    fn the_update_is_the_papers() {
        let (mut w, mut m, mut v) = (0.5f64, 0.0f64, 0.0f64);
        let (mut weights, mut first, mut second) = ([0.5f32], [0.0f32], [0.0f32]);
        for t in 1..6u32 {
            let g = f64::from(t) * 0.3 - 0.7;
            m = 0.9 * m + 0.1 * g;
            v = 0.95 * v + 0.05 * g * g;
            let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t as i32)), v / (1.0 - 0.95f64.powi(t as i32)));
            w -= 1e-2 * (m_hat / (v_hat.sqrt() + 1e-8) + 0.1 * w);
            AdamW::new(&KEYS, 1e-2, u64::from(t), 1.0, true).update(&mut Range {
                weights: &mut weights,
                gradients: &[g as f32],
                m: &mut first,
                v: &mut second,
            });
        }
        assert!((f64::from(weights[0]) - w).abs() < 1e-6, "{} {w}", weights[0]);
    }

    #[test]
    fn the_rate_climbs_to_its_peak_and_ends_at_its_minimum() {
        let schedule = Schedule { learning_rate: 1.0, warmup_steps: 4, min_learning_rate: 0.1 };
        let at = |step| learning_rate(&schedule, step, 12);
        assert_eq!([at(1), at(2), at(4)], [0.25, 0.5, 1.0]);
        assert!((at(8) - 0.55).abs() < 1e-12 && (at(12) - 0.1).abs() < 1e-12);
        let cold = Schedule { warmup_steps: 0, ..schedule };
        assert!(learning_rate(&cold, 1, 12) < 1.0 && learning_rate(&cold, 1, 12) > 0.95);
    }
}
