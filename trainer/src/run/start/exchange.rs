//! How a rank's gradients are cut and encoded, and with whom they are summed.

use std::sync::Arc;

use compression::{BLOCK, Codec, Workers};
use parallel::data::Plan;
use parallel::data::exchange::{Exchange, Group};
use parallel::mesh::{Axis, Mesh, crossings};

use crate::device;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::recipe::resolved::Parallel;
use crate::run::Request;
use crate::run::join::Met;

/// This rank's side of the sum.
///
/// # Errors
/// There are no threads for it.
pub fn exchange(request: &Request, plan: Arc<Plan>, group: Group, codec: Codec) -> Result<Exchange> {
    let exchange = Exchange::new(plan, group, codec).with_workers(workers(&request.recipe)?);
    let exchange = if request.tamper.no_feedback { exchange.without_feedback() } else { exchange };
    Ok(match request.recipe.optimizer.sharded.filter(|_| group.ranks > 1) {
        Some(codec) => exchange.sending_parameters(codec),
        None => exchange,
    })
}

/// How this rank's gradients are cut, and with whom they are summed.
pub fn group(recipe: &Recipe, (axes, rank): (Mesh, usize), met: &Met) -> Group {
    let Parallel { group, chunk_elements, window_chunks, .. } = recipe.parallel;
    let nobody = String::new();
    let of = |rank: usize| met.start.peers.get(rank).map_or(&nobody, |peer| &peer.host);
    let data = axes.coordinates(rank).on(Axis::Data);
    let node: Vec<usize> =
        (data / group * group..(data / group + 1) * group).map(|data| axes.beside(rank, Axis::Data, data)).collect();
    let first = node[0];
    if let Some(&other) = node.iter().find(|&&other| of(other) != of(first)) {
        let (here, there) = (of(first), of(other));
        tracing::warn!(
            "parallel.group = {group}: rank {first} is on {here} and rank {other} on {there}; between them gradients travel as f32"
        );
    }
    let hosts: Vec<String> = (0..axes.ranks()).map(|rank| of(rank).clone()).collect();
    if let Some(crossing) = crossings(axes, Axis::Tensor, &hosts).first() {
        tracing::warn!("{crossing}: every layer waits for their network");
    }
    let (ranks, epoch, chunk_blocks) = (axes.size(Axis::Data), met.start.epoch, chunk_elements / BLOCK);
    Group { rank: data, ranks, members: group, epoch, chunk_blocks, window: window_chunks }
}

/// The threads that encode. Beside a processor that computes, more than one would only take its cores away.
fn workers(recipe: &Recipe) -> Result<Workers> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = match (recipe.compression.threads, device::is_host(&recipe.device.backend)) {
        (0, true) => 1,
        (0, false) => cores.min(4),
        (threads, _) => threads,
    };
    Workers::new(threads).map_err(|error| Error::Usage(format!("compression.threads = {threads}: {error}")))
}
