//! How long a step takes.
//!
//! ```text
//! step = compute (1 + bubble) + sums between tensor ranks + max(0, gradients - window) or the last bucket, whichever is longer
//! ```
//!
//! Sums between tensor ranks are waited for; gradients travel while the model computes: all of the forward pass, and
//! the backward pass but for its last layer. The work of codecs is not counted, nor are latencies.

use parallel::mesh::Axis;

use super::Plan;
use super::part::Part;
use crate::model::Config;
use crate::recipe::Recipe;

/// What is known of a rank and of its link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Floating-point operations a second that a rank does in a step.
    pub flops_per_s: f64,
    /// Bytes a second of a rank's link, each way; `None` where nothing is said of it.
    pub link_bytes_per_s: Option<f64>,
}

/// A step, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Time {
    /// Of computing, without waiting for a stage.
    pub compute_s: f64,
    /// Of the bubble.
    pub bubble_s: f64,
    /// Of sums between tensor ranks.
    pub tensor_s: f64,
    /// Of gradients that computing does not hide.
    pub exposed_s: f64,
    /// Of all.
    pub step_s: f64,
}

/// Operations that a token of a layer takes, forward and backward: two for each weight and direction, of which there are
/// three, and attention over the whole sequence, for it is computed whole and masked.
#[must_use]
pub fn layer_flops(config: &Config, seq_len: usize) -> f64 {
    let (d, f) = (config.hidden_size as f64, config.intermediate_size as f64);
    let shared = (config.num_key_value_heads * config.head_dim()) as f64;
    let weights = 2.0 * d * d + 2.0 * d * shared + 3.0 * d * f;
    6.0 * weights + 12.0 * d * seq_len as f64
}

/// Operations that a token of the head takes.
#[must_use]
pub fn head_flops(config: &Config) -> f64 {
    6.0 * config.vocab_size as f64 * config.hidden_size as f64
}

/// Operations that a token takes.
#[must_use]
pub fn flops(config: &Config, seq_len: usize) -> f64 {
    config.num_hidden_layers as f64 * layer_flops(config, seq_len) + head_flops(config)
}

impl Time {
    /// Of a step of this plan, of the rank that takes longest.
    #[must_use]
    pub fn of(plan: &Plan, recipe: &Recipe, parts: &[Part], figures: &Figures) -> Self {
        let keys = &recipe.parallel;
        let micro_batches = keys.micro_batches.iter().copied().max().unwrap_or(1) as f64;
        let tokens = micro_batches * (recipe.train.micro_batch_size * recipe.train.seq_len) as f64;
        let seq_len = recipe.train.seq_len;
        let of_part = |part: &Part| {
            let head = if part.is_last() { head_flops(&part.config) } else { 0.0 };
            let all = part.layer_count() as f64 * layer_flops(&part.config, seq_len) + head;
            tokens * all / part.mesh.size(Axis::Tensor) as f64
        };
        let costliest = parts.iter().map(of_part).fold(0.0, f64::max);
        let compute_s = costliest / figures.flops_per_s;
        let bubble_s = compute_s * plan.bubble;
        let transfer = |bytes: usize| figures.link_bytes_per_s.map_or(0.0, |link| bytes as f64 / link);
        let most = |of: fn(&super::RankPlan) -> usize| plan.ranks.iter().map(of).max().unwrap_or(0);
        let tensor_s = transfer(most(|rank| rank.sent.tensor_bytes));
        let gradients_s = transfer(most(|rank| rank.sent.data_bytes));
        let layers = parts.iter().map(Part::layer_count).max().unwrap_or(1) as f64;
        // The last bucket is complete only when the backward pass ends.
        let last = (keys.bucket_bytes_max as f64 / (4.0 * plan.parameters as f64)).min(1.0 / layers).min(1.0);
        let window_s = compute_s * (1.0 - 2.0 / 3.0 / layers);
        let exposed_s = (gradients_s - window_s).max(gradients_s * last);
        let step_s = compute_s + bubble_s + tensor_s + exposed_s;
        Self { compute_s, bubble_s, tensor_s, exposed_s, step_s }
    }
}
