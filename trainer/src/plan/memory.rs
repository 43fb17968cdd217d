//! What a rank takes while it trains.

use compression::{BLOCK, Codec};
use parallel::data::plan::Plan as Buckets;
use parallel::data::rules::{codec_of, may_be_lossy};
use parallel::data::shard::shard;
use parallel::mesh::Axis;

use super::part::{Held, Part};
use super::{activations, is_lossy, kept};
use crate::recipe::Recipe;
use crate::state::residuals::Kept;

/// What every thread that computes keeps for the products of matrices.
const PRODUCT_BYTES: usize = 1 << 20;
/// Everything else of the program: tokenizer, threads, connections.
const PROGRAM_BYTES: usize = 3 << 20;

/// Bytes that a rank takes at the peak, term by term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The weights, and their copy on the device, which on the host is host memory too.
    pub parameters_bytes: usize,
    /// Both moments; with a sharded optimiser those of its shard, and the shard's master where that is not the replica.
    pub optimizer_bytes: usize,
    /// Buckets, and between ranks the sum, as it came, and what a rank owns of it.
    pub gradients_bytes: usize,
    /// What was left out, as a sender and as an owner.
    pub residuals_bytes: usize,
    /// What the backward pass needs of the forward pass, and what comes on top of it at the peak.
    pub activations_bytes: usize,
    /// The host buffer of a checkpoint. A second one, as large, is made where a checkpoint is due while one is being written.
    pub snapshot_bytes: usize,
    /// Of products of matrices, of codecs and of the program itself.
    pub program_bytes: usize,
}

impl Memory {
    /// Of this part. `codec` is what gradients travel in.
    #[must_use]
    pub fn of(recipe: &Recipe, part: &Part, codec: Option<Codec>, sharded: Option<Codec>) -> Self {
        let parameters = part.held();
        let elements: usize = parameters.iter().map(|p| p.elements()).sum();
        let (data, place) = (part.mesh.size(Axis::Data), part.at.on(Axis::Data));
        let own = |all: usize| shard(all, place, data).len();
        let owned: usize = parameters.iter().map(|p| own(p.elements())).sum();
        let float = size_of::<f32>();
        let (mut senders, mut owners) = (0, 0);
        if let Some(codec) = codec {
            let buckets = Buckets::new(part.parameters(), recipe.parallel.bucket_bytes_max).ok();
            for bucket in buckets.iter().flat_map(Buckets::buckets) {
                // What a bucket's sender left out lies in a buffer of the bucket's size.
                let lossy = |&index: &usize| is_lossy(&parameters[index].whole, Some(codec))[0];
                senders += if bucket.parameters.iter().any(lossy) { bucket.elements } else { 0 };
            }
            // Owners that send parameters leave nothing of sums out.
            let lossy = parameters.iter().filter(|p| sharded.is_none() && is_lossy(&p.whole, Some(codec))[1]);
            owners = lossy.map(|p| own(p.elements())).sum();
        }
        let optimizer = match sharded.filter(|_| data > 1) {
            None => 2 * elements,
            Some(codec) => {
                // A master beside the replica, where they differ.
                let differs = |p: &&Held| codec_of(&p.whole, codec).is_lossy();
                2 * owned + parameters.iter().filter(differs).map(|p| own(p.elements())).sum::<usize>()
            }
        };
        // Whoever has other ranks sums with them, if only with itself.
        let sums = part.mesh.ranks() > 1;
        let came = |p: &Held| {
            let codec = match sharded.filter(|_| data > 1) {
                Some(codec) => codec_of(&p.whole, codec),
                None => codec_of(&p.whole, codec.unwrap_or(Codec::Fp32)).second_stage(),
            };
            codec.payload_bytes(p.elements())
        };
        let came: usize = parameters.iter().map(came).sum();
        Self {
            parameters_bytes: float * 2 * elements,
            optimizer_bytes: float * optimizer,
            gradients_bytes: if sums { float * (elements + owned) + came } else { float * elements },
            residuals_bytes: float * (senders + owners),
            activations_bytes: float * activations(recipe, part),
            snapshot_bytes: float * snapshot(recipe, part, owned),
            program_bytes: program(recipe, data, codec),
        }
    }

    /// All of it.
    #[must_use]
    pub fn peak_bytes(&self) -> usize {
        self.terms().into_iter().map(|(_, bytes)| bytes).sum()
    }

    /// By name.
    #[must_use]
    pub const fn terms(&self) -> [(&'static str, usize); 7] {
        [
            ("parameters", self.parameters_bytes),
            ("optimizer", self.optimizer_bytes),
            ("gradients", self.gradients_bytes),
            ("residuals", self.residuals_bytes),
            ("activations", self.activations_bytes),
            ("snapshot", self.snapshot_bytes),
            ("program", self.program_bytes),
        ]
    }
}

/// Elements at the peak: of all passes that are in flight, and on top of them.
fn activations(recipe: &Recipe, part: &Part) -> usize {
    let (rows, seq_len) = (recipe.train.micro_batch_size, recipe.train.seq_len);
    let (layers, pieces) = (part.layer_count(), part.layers.len());
    let stage = part.at.on(Axis::Pipeline);
    let in_flight = if part.pipeline.stages() > 1 { part.pipeline.in_flight_max(stage) } else { 1 };
    // Of each pass the layers of a piece; the head's part is gone before the next pass comes to it.
    let kept = activations::kept(part, rows, seq_len, in_flight * layers.div_ceil(pieces), part.is_last());
    kept.saturating_add_signed(activations::transient(part, rows, seq_len))
}

/// Elements of the buffer into which a checkpoint's share is copied. All ranks are taken to share a folder.
fn snapshot(recipe: &Recipe, part: &Part, owned: usize) -> usize {
    let (data, place) = (part.mesh.size(Axis::Data), part.at.on(Axis::Data));
    let lossy = || part.held().into_iter().filter(|p| may_be_lossy(&p.whole)).map(|p| p.elements());
    let own = || lossy().map(|all| shard(all, place, data).len()).sum::<usize>();
    3 * owned
        + match kept(recipe, data) {
            Kept::Nothing => 0,
            Kept::Folded => own(),
            Kept::Exact => lossy().sum::<usize>() + own(),
        }
}

/// Threads' own memory, a chunk in several forms, and the rest.
fn program(recipe: &Recipe, data: usize, codec: Option<Codec>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pinned = recipe.parallel.pin && data > 1;
    let threads = match recipe.device.threads {
        0 if pinned => cores.div_ceil(data),
        0 => cores,
        threads => threads,
    };
    let chunk = recipe.parallel.chunk_elements.next_multiple_of(BLOCK);
    // Zeros, a node's sum, what waits of a table, what an owner decodes, and a payload.
    let chunks = codec.map_or(0, |codec| 4 * size_of::<f32>() * chunk + codec.payload_bytes(chunk));
    PROGRAM_BYTES + threads * PRODUCT_BYTES + chunks
}
