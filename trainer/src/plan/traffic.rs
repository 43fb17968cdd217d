//! Bytes that a rank sends in a step.

use compression::{BLOCK, Codec};
use parallel::data::nodes::Nodes;
use parallel::data::rules::codec_of;
use parallel::data::shard::{Ways, payload_bytes_both_ways, shard};
use parallel::frame::HEADER_BYTES;
use parallel::mesh::Axis;
use parallel::pipeline::execute::message_bytes;

use super::part::{Held, Part};
use crate::recipe::Recipe;

/// Around a frame: its header, gRPC's (5 bytes) and HTTP/2's (9 bytes).
const FRAME_BYTES: usize = HEADER_BYTES + 5 + 9;
/// A ballot to one rank, with what is around it.
const BALLOT_BYTES: usize = 28 + 49 + 80 + 5 + 9;
/// An all-reduce of no more bytes is one exchange between all members.
const DIRECT_BYTES_MAX: usize = 16 << 10;

/// Bytes by axis, payload and what is around it; without TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Gradients, sums and ballots.
    pub data_bytes: usize,
    /// Activations and their gradients to the stages beside, and a tied table's gradient.
    pub pipeline_bytes: usize,
    /// Sums of activations and of their gradients.
    pub tensor_bytes: usize,
}

impl Sent {
    /// Of this part. `codec` is what gradients travel in, `sharded` what parameters do, where those come back from owners.
    #[must_use]
    pub fn of(recipe: &Recipe, part: &Part, codec: Option<Codec>, sharded: Option<Codec>) -> Self {
        Self {
            data_bytes: codec.map_or(0, |codec| data(recipe, part, (codec, sharded))),
            pipeline_bytes: pipeline(recipe, part),
            tensor_bytes: tensor(recipe, part),
        }
    }

    /// All of it.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.data_bytes + self.pipeline_bytes + self.tensor_bytes
    }
}

fn data(recipe: &Recipe, part: &Part, (codec, sharded): (Codec, Option<Codec>)) -> usize {
    let (ranks, rank) = (part.mesh.size(Axis::Data), part.at.on(Axis::Data));
    let nodes = Nodes { rank, ranks, members: recipe.parallel.group };
    let ways = |held: &Held| {
        let there = codec_of(&held.whole, codec);
        let back = sharded.map_or(there.second_stage(), |sent| codec_of(&held.whole, sent));
        Ways { elements: held.elements(), there, back }
    };
    let tensors: Vec<Ways> = part.held().iter().map(ways).collect();
    let payload = payload_bytes_both_ways(&tensors, nodes);
    let frames: usize = tensors.iter().map(|ways| frames(ways.elements, recipe, nodes)).sum();
    payload.inside + payload.across + frames * FRAME_BYTES + (ranks - 1) * BALLOT_BYTES
}

/// Frames in which a tensor and its sum leave this rank: of the same kinds as
/// [`payload_bytes_both_ways`].
fn frames(elements: usize, recipe: &Recipe, nodes: Nodes) -> usize {
    let chunk = recipe.parallel.chunk_elements / BLOCK * BLOCK;
    let of = |owner: usize| {
        let chunks = shard(elements, owner, nodes.ranks).len().div_ceil(chunk);
        let times = match () {
            () if nodes.adds(owner) != nodes.rank => 1,
            () if owner == nodes.rank => nodes.members - 1 + nodes.count() - 1,
            () => nodes.members - 1 + 1,
        };
        chunks * times
    };
    (0..nodes.ranks).map(of).sum()
}

/// Tokens of a micro-batch, and the most micro-batches of a rank.
fn tokens(recipe: &Recipe) -> (usize, usize) {
    let most = recipe.parallel.micro_batches.iter().copied().max().unwrap_or(1);
    (recipe.train.micro_batch_size * recipe.train.seq_len, most)
}

/// For every piece the activations to the next one and their gradients to the one before, and a tied table's gradient as f32.
fn pipeline(recipe: &Recipe, part: &Part) -> usize {
    let (stages, stage) = (part.mesh.size(Axis::Pipeline), part.at.on(Axis::Pipeline));
    if stages == 1 {
        return 0;
    }
    let (tokens, micro_batches) = tokens(recipe);
    // Where tensor ranks cut sequences, each hands on its part.
    let tokens = if recipe.parallel.sequence { tokens / part.mesh.size(Axis::Tensor) } else { tokens };
    let activation = message_bytes(tokens * part.config.hidden_size, recipe.parallel.activation_codec);
    let of_piece = |piece| {
        let place = part.pipeline.place(stage, piece);
        usize::from(place > 0) + usize::from(place + 1 < part.pipeline.pieces())
    };
    let messages: usize = (0..part.layers.len()).map(of_piece).sum();
    let table = size_of::<f32>() * part.vocabulary * part.config.hidden_size;
    let is_end = part.is_first() || part.is_last();
    micro_batches * messages * activation + if part.config.tie_word_embeddings && is_end { table } else { 0 }
}

/// Of every layer two sums in each direction (Shoeybi et al. 2019), of the embedding one forward and of the head one backward;
/// of the loss three numbers a token.
fn tensor(recipe: &Recipe, part: &Part) -> usize {
    let members = part.mesh.size(Axis::Tensor);
    if members == 1 {
        return 0;
    }
    let (tokens, micro_batches) = tokens(recipe);
    let all_reduce = |elements: usize| {
        let bytes = size_of::<f32>() * elements;
        if bytes <= DIRECT_BYTES_MAX { (members - 1) * bytes } else { 2 * (members - 1) * bytes / members }
    };
    let ends = usize::from(part.is_first()) + usize::from(part.is_last());
    let sums = 4 * part.layer_count() + ends;
    let loss = if part.is_last() { 3 * all_reduce(tokens) } else { 0 };
    micro_batches * (sums * all_reduce(tokens * part.config.hidden_size) + loss)
}
