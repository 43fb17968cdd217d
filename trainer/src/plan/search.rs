//! The meshes of so many ranks, the best first.
//!
//! A step keeps its sequences and a forward pass its rows: with fewer replicas each has more micro-batches. Best is the
//! shortest step where figures are given, else the least memory of a rank, and then the fewest bytes.

use parallel::mesh::{Axis, Mesh, RANKS_MAX};
use parallel::pipeline::Kind;

use super::time::Figures;
use super::{Plan, Shape};
use crate::error::{Error, Result};
use crate::model::Config;
use crate::recipe::Recipe;

/// Meshes that fit, the best first, and how many there were that do not.
#[derive(Debug)]
pub struct Found {
    /// Those that fit.
    pub plans: Vec<Plan>,
    /// Meshes whose ranks would need more memory than there is.
    pub too_large: usize,
    /// Meshes that do not fit the model or the batch.
    pub impossible: usize,
}

/// Plans every mesh of `ranks` ranks. `memory_bytes` is what a rank may take.
///
/// # Errors
/// No ranks, or more than there may be.
pub fn search(
    recipe: &Recipe,
    config: &Config,
    ranks: usize,
    figures: Option<&Figures>,
    memory_bytes: Option<usize>,
) -> Result<Found> {
    if !(1..=RANKS_MAX).contains(&ranks) {
        return Err(Error::Usage(format!("--search: expected 1 to {RANKS_MAX} ranks, found {ranks}")));
    }
    let passes: usize = recipe.parallel.micro_batches.iter().sum();
    let mut found = Found { plans: Vec::new(), too_large: 0, impossible: 0 };
    let divisors = |n: usize| (1..=n).filter(move |d| n.is_multiple_of(*d));
    for data in divisors(ranks) {
        for tensor in divisors(ranks / data) {
            let mesh = Mesh::new(data, ranks / data / tensor, tensor);
            let plan = mesh.map_err(|_| ()).and_then(|mesh| on(recipe, config, mesh, passes, figures));
            match plan {
                Err(()) => found.impossible += 1,
                Ok(plan) if memory_bytes.is_some_and(|bytes| plan.too_large(bytes).is_some()) => found.too_large += 1,
                Ok(plan) => found.plans.push(plan),
            }
        }
    }
    let step_s = |plan: &Plan| plan.time.map_or(0.0, |time| time.step_s);
    let bytes = |plan: &Plan| plan.ranks.iter().map(|rank| rank.sent.bytes()).max();
    found.plans.sort_by(|a, b| {
        let by_step = step_s(a).total_cmp(&step_s(b));
        by_step.then(a.peak_bytes().cmp(&b.peak_bytes())).then(bytes(a).cmp(&bytes(b)))
    });
    Ok(found)
}

/// The same step on another mesh.
fn on(
    recipe: &Recipe,
    config: &Config,
    mesh: Mesh,
    passes: usize,
    figures: Option<&Figures>,
) -> std::result::Result<Plan, ()> {
    let data = mesh.size(Axis::Data);
    if !passes.is_multiple_of(data) {
        return Err(());
    }
    let mut recipe = recipe.clone();
    recipe.parallel.data = data;
    recipe.parallel.micro_batches = vec![passes / data; data];
    // A machine's ranks are another number now.
    recipe.parallel.group = 1;
    let shape =
        Shape { mesh, schedule: Kind::OneForwardOneBackward, virtual_stages: 1, sharded: recipe.optimizer.sharded };
    Plan::new(&recipe, config, shape, figures).map_err(|_| ())
}
