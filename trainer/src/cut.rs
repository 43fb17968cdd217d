//! How a model is cut between the ranks that hold it together: layers between the stages of a pipeline, and every layer
//! between the ranks of a tensor group.
//!
//! The cut follows from recipe and model alone, so that all ranks make the same one without talking.

use std::ops::Range;

use parallel::data::Part;
use parallel::mesh::{Axis, Mesh};
use parallel::pipeline::execute::{has_room, message_bytes};
use parallel::pipeline::split::{LayerCosts, SplitError, given, split};
use parallel::pipeline::{Kind, Pipeline, PipelineError};

use crate::error::{Error, Result};
use crate::model::{Config, Piece};
use crate::plan::time::{head_flops, layer_flops};
use crate::recipe::Recipe;
use crate::tensor::parts;

/// What every rank has of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    mesh: Mesh,
    kind: Kind,
    /// Layers of every piece, in the order of the model.
    pieces: Vec<Range<usize>>,
}

impl Cut {
    /// As a recipe has it.
    ///
    /// # Errors
    /// A split that does not fit the model.
    pub fn new(recipe: &Recipe, config: &Config) -> Result<Self> {
        let keys = &recipe.parallel;
        let wanted = keys.layers.as_deref();
        let pieces = pieces(config, recipe.train.seq_len, keys.pipeline * keys.virtual_stages, wanted);
        let pieces = pieces.map_err(|error| Error::Usage(format!("parallel.layers: {error}")))?;
        Ok(Self { mesh: keys.mesh(), kind: keys.schedule, pieces })
    }

    /// These pieces on this mesh.
    #[must_use]
    pub const fn of(mesh: Mesh, kind: Kind, pieces: Vec<Range<usize>>) -> Self {
        Self { mesh, kind, pieces }
    }

    /// Whether activations of the recipe's micro-batches may wait at every stage.
    ///
    /// # Errors
    /// They may not.
    pub fn has_room(&self, recipe: &Recipe, config: &Config) -> Result<()> {
        let (train, keys) = (&recipe.train, &recipe.parallel);
        let parts = if keys.sequence { keys.tensor } else { 1 };
        let elements = train.micro_batch_size * train.seq_len / parts * config.hidden_size;
        let bytes = message_bytes(elements, keys.activation_codec);
        for &micro_batches in &keys.micro_batches {
            let pipeline = self.pipeline(micro_batches).map_err(|error| Error::Usage(error.to_string()))?;
            let room = (0..keys.pipeline).try_for_each(|stage| has_room(pipeline, stage, bytes));
            room.map_err(|room| Error::Usage(format!("parallel.pipeline = {}: {room}", keys.pipeline)))?;
        }
        Ok(())
    }

    /// All ranks.
    #[must_use]
    pub const fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// Layers of every piece, in the order of the model.
    #[must_use]
    pub fn pieces(&self) -> &[Range<usize>] {
        &self.pieces
    }

    /// In which order stages work on so many micro-batches.
    ///
    /// # Errors
    /// There is no such schedule.
    pub fn pipeline(&self, micro_batches: usize) -> std::result::Result<Pipeline, PipelineError> {
        let stages = self.mesh.size(Axis::Pipeline);
        Pipeline::new(self.kind, stages, self.pieces.len() / stages, micro_batches)
    }

    /// The pieces of a rank, in the order of the model.
    #[must_use]
    pub fn pieces_of(&self, rank: usize) -> Vec<Piece> {
        let (stages, stage) = (self.mesh.size(Axis::Pipeline), self.mesh.coordinates(rank).on(Axis::Pipeline));
        let piece = |(place, layers): (usize, &Range<usize>)| Piece {
            layers: layers.clone(),
            first: place == 0,
            last: place + 1 == self.pieces.len(),
        };
        self.pieces.iter().enumerate().skip(stage).step_by(stages).map(piece).collect()
    }

    /// What a rank holds of each parameter of which it holds something, in the order of the forward pass. Of a tied table that
    /// the first and the last stage hold, the first one's counts.
    ///
    /// # Errors
    /// A model whose parameters do not fit the address space.
    pub fn parts(&self, config: &Config, rank: usize) -> Result<Vec<Part>> {
        let (tensor, ranks) = (self.mesh.coordinates(rank).on(Axis::Tensor), self.mesh.size(Axis::Tensor));
        let pieces = self.pieces_of(rank);
        let has = |part: &Part| pieces.iter().any(|piece| piece.has(config, &part.whole.name));
        let counts = |part: Part| {
            let is_copy = is_table(&part.whole.name) && !pieces.iter().any(|piece| piece.first);
            let counts = part.counts && !is_copy;
            part.counting(counts)
        };
        Ok(parts::parts(config, tensor, ranks)?.into_iter().filter(has).map(counts).collect())
    }
}

/// Whether this is the name of the embedding table.
#[must_use]
pub fn is_table(name: &str) -> bool {
    name == "model.embed_tokens.weight"
}

/// The layers of every piece: as they were given, or such that the costliest piece does as few operations as can be.
///
/// # Errors
/// Fewer layers than pieces, or layers that were given and are no split of the model's.
pub fn pieces(
    config: &Config,
    seq_len: usize,
    pieces: usize,
    wanted: Option<&[usize]>,
) -> std::result::Result<Vec<Range<usize>>, SplitError> {
    let layers = config.num_hidden_layers;
    match wanted {
        Some(counts) => given(layers, pieces, counts),
        None => split(&costs(config, seq_len), pieces),
    }
}

/// What every layer and the head cost, in operations a token; the embedding looks up, and costs nothing.
fn costs(config: &Config, seq_len: usize) -> LayerCosts {
    let layer = layer_flops(config, seq_len) as u64;
    LayerCosts { layers: vec![layer; config.num_hidden_layers], before: 0, after: head_flops(config) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(layers: usize, tied: bool) -> Config {
        Config { num_hidden_layers: layers, ..parts::tests::config(2, 2, tied) }
    }

    #[test]
    fn what_counts_of_all_ranks_is_every_element_of_a_replica_once() {
        for (tied, stages, virtual_stages, tensor) in
            [(true, 1, 1, 1), (true, 2, 1, 1), (false, 2, 1, 2), (true, 2, 2, 2), (true, 4, 1, 1), (false, 3, 1, 1)]
        {
            let config = config(5, tied);
            let mesh = Mesh::new(2, stages, tensor).expect("a mesh");
            let kind = if virtual_stages > 1 { Kind::Interleaved } else { Kind::GPipe };
            let pieces = pieces(&config, 16, stages * virtual_stages, None).expect("enough layers");
            let cut = Cut::of(mesh, kind, pieces);
            let parts: Vec<Vec<Part>> =
                (0..mesh.ranks()).map(|rank| cut.parts(&config, rank).expect("small")).collect();
            for parameter in config.parameters() {
                let mut seen = vec![0.0; parameter.elements()];
                for part in mesh.replica(2 * stages * tensor - 1).flat_map(|rank| &parts[rank]) {
                    if part.whole == parameter && part.counts {
                        let mut once = vec![0.0; parameter.elements()];
                        part.put(&vec![1.0; part.region.len()], &mut once);
                        seen.iter_mut().zip(once).for_each(|(seen, once)| *seen += once);
                    }
                }
                assert!(seen.iter().all(|&seen| seen == 1.0), "{} on {mesh}", parameter.name);
            }
            // Both replicas are cut alike, and every rank's parts are in the order of the model.
            let each = stages * tensor;
            assert_eq!(parts[..each], parts[each..]);
            let order: Vec<String> = config.parameters().into_iter().map(|parameter| parameter.name).collect();
            let place = |part: &Part| order.iter().position(|name| *name == part.whole.name);
            assert!(parts.iter().all(|parts| parts.is_sorted_by_key(place)));
        }
    }

    #[test]
    fn a_tied_table_is_on_both_ends_and_nothing_else_is_anywhere_twice() {
        let config = config(4, true);
        let mesh = Mesh::new(1, 2, 1).expect("a mesh");
        let cut = Cut::of(mesh, Kind::GPipe, pieces(&config, 16, 2, Some(&[1, 3])).expect("a split"));
        let names = |rank: usize| -> Vec<(String, bool)> {
            let parts = cut.parts(&config, rank).expect("small");
            parts.into_iter().map(|part| (part.whole.name, part.counts)).collect()
        };
        let [first, last] = [names(0), names(1)];
        assert_eq!((&*first[0].0, first[0].1), ("model.embed_tokens.weight", true));
        assert_eq!((&*last[0].0, last[0].1), ("model.embed_tokens.weight", false));
        assert_eq!(first.len() + last.len(), config.parameters().len() + 1);
        assert_eq!(last.last().map(|(name, _)| &**name), Some("model.norm.weight"));
        assert_eq!(cut.pieces_of(1), [Piece { layers: 1..4, first: false, last: true }]);
    }

    #[test]
    fn a_head_that_costs_as_much_as_layers_leaves_the_last_piece_fewer() {
        let mut config = config(4, false);
        config.vocab_size = 400;
        let sizes = |config: &Config| -> Vec<usize> {
            pieces(config, 16, 2, None).expect("enough").iter().map(ExactSizeIterator::len).collect()
        };
        assert_eq!(sizes(&config), [3, 1]);
        config.vocab_size = 1;
        assert_eq!(sizes(&config), [2, 2]);
    }
}
