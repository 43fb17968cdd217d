//! A plan as text for people.

use std::fmt::Write as _;

use indicatif::{DecimalBytes, HumanBytes};
use parallel::mesh::Axis;
use parallel::pipeline::split::LayerCosts;

use crate::device;
use crate::plan::search::Found;
use crate::plan::time::Figures;
use crate::plan::{Plan, RankPlan};
use crate::recipe::Recipe;

/// Ranks that take about the same are told of together.
pub(super) fn plan(plan: &Plan, recipe: &Recipe, figures: Option<&Figures>) -> String {
    let mut text = String::new();
    let codec = plan.codec.map_or_else(String::new, |codec| format!(", gradients as {codec}"));
    let _ = writeln!(text, "{}: {} parameters{codec}", plan.mesh, plan.parameters);
    let _ =
        writeln!(text, "a step: {} sequences, {} tokens, {:.3e} operations", plan.sequences, plan.tokens, plan.flops);
    if recipe.device.backend != "flex" {
        let (backend, host) = (&recipe.device.backend, device::is_host(&recipe.device.backend));
        let lies = if host { "" } else { "; parameters' copy and activations lie on the device, the rest on the host" };
        let _ = writeln!(text, "memory was measured on flex, not on {backend}: take it as an estimate{lies}");
    }
    for (ranks, of) in groups(&plan.ranks) {
        let _ = writeln!(text, "\n{ranks}: memory at the peak");
        for (name, bytes) in of.memory.terms() {
            let _ = writeln!(text, "  {name:<12} {:>12}", HumanBytes(bytes as u64).to_string());
        }
        let _ = writeln!(text, "  {:<12} {:>12}", "all", HumanBytes(of.memory.peak_bytes() as u64).to_string());
        let axes = [
            (Axis::Data, of.sent.data_bytes),
            (Axis::Pipeline, of.sent.pipeline_bytes),
            (Axis::Tensor, of.sent.tensor_bytes),
        ];
        for (axis, bytes) in axes.into_iter().filter(|(_, bytes)| *bytes > 0) {
            let _ = writeln!(text, "  sends {} a step on the {axis} axis", DecimalBytes(bytes as u64));
        }
    }
    let _ = writeln!(text, "\na checkpoint: {}", DecimalBytes(plan.checkpoint_bytes as u64));
    if plan.layers.len() > 1 {
        let _ = writeln!(text, "layers of the pipeline's pieces: {:?}", plan.layers);
    }
    if plan.bubble > 0.0 {
        let _ = writeln!(text, "pipeline bubble: {:.1} % of the time in which a stage computes", 100.0 * plan.bubble);
    }
    if let (Some(time), Some(figures)) = (plan.time, figures) {
        let tokens_per_s = plan.tokens as f64 / time.step_s;
        let rate = figures.flops_per_s;
        let _ = writeln!(text, "a step at {rate:.3e} operations/s: {:.4} s, {tokens_per_s:.0} tokens/s", time.step_s);
        let parts = [
            ("computing", time.compute_s),
            ("bubble", time.bubble_s),
            ("tensor sums", time.tensor_s),
            ("gradients", time.exposed_s),
        ];
        let parts: Vec<String> =
            parts.into_iter().filter(|(_, s)| *s > 0.0).map(|(name, s)| format!("{name} {s:.4} s")).collect();
        let _ = writeln!(text, "  {}", parts.join(", "));
        if figures.link_bytes_per_s.is_none() && plan.ranks.len() > 1 {
            let _ = writeln!(text, "  without what waits for the network: --link says how fast it is");
        }
    }
    text
}

/// What was measured of layers, and which split that makes.
pub(super) fn split((costs, layers): &(LayerCosts, Vec<usize>)) -> String {
    let ms = |ns: u64| ns as f64 / 1e6;
    format!(
        "measured of a micro-batch: a layer {:.2} ms, the embedding {:.2} ms, the head {:.2} ms; by that parallel.layers = {layers:?}\n",
        ms(costs.layers[0]),
        ms(costs.before),
        ms(costs.after)
    )
}

/// Ranks whose plans are the same to a hundredth, by the first of them.
fn groups(ranks: &[RankPlan]) -> Vec<(String, &RankPlan)> {
    let mut groups: Vec<(Vec<usize>, &RankPlan)> = Vec::new();
    for (rank, plan) in ranks.iter().enumerate() {
        match groups.iter_mut().find(|(_, of)| is_like(of, plan)) {
            Some((members, _)) => members.push(rank),
            None => groups.push((vec![rank], plan)),
        }
    }
    let name = |members: &[usize]| match members {
        [rank] => format!("rank {rank}"),
        [first, .., last] if last - first + 1 == members.len() => format!("ranks {first} to {last}, each"),
        [first, rest @ ..] => format!("rank {first} and {} like it, each", rest.len()),
        [] => String::new(),
    };
    groups.into_iter().map(|(members, plan)| (name(&members), plan)).collect()
}

fn is_like(a: &RankPlan, b: &RankPlan) -> bool {
    let near = |a: usize, b: usize| a.abs_diff(b) * 100 <= a.max(b);
    near(a.memory.peak_bytes(), b.memory.peak_bytes())
        && near(a.sent.data_bytes, b.sent.data_bytes)
        && near(a.sent.pipeline_bytes, b.sent.pipeline_bytes)
        && near(a.sent.tensor_bytes, b.sent.tensor_bytes)
}

/// Meshes, a line each.
pub(super) fn found(ranks: usize, found: &Found) -> String {
    let mut text = format!("meshes of {ranks} ranks, the best first\n");
    for plan in &found.plans {
        let sent = plan.ranks.iter().map(|rank| rank.sent.bytes()).max().unwrap_or(0);
        let (peak, sent) = (HumanBytes(plan.peak_bytes() as u64), DecimalBytes(sent as u64));
        let _ = write!(text, "  {}: {peak} a rank, sends {sent} a step", plan.mesh);
        if plan.bubble > 0.0 {
            let _ = write!(text, ", bubble {:.1} %", 100.0 * plan.bubble);
        }
        if let Some(time) = plan.time {
            let _ = write!(text, ", {:.4} s a step", time.step_s);
        }
        text.push('\n');
    }
    let Found { too_large, impossible, .. } = found;
    let _ = writeln!(text, "{too_large} more need too much memory, {impossible} do not fit the model or the batch");
    text
}
