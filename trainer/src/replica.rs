//! The ranks that hold one replica of the model together, as one of them sees it: its slice of every layer, its stage of the
//! pipeline, and the way to the others.

use std::sync::Arc;

use burn::Tensor;
use burn::tensor::TensorData;
use compression::Codec;
use parallel::collective::{Collectives, Reduction, SubGroup};
use parallel::data::Part;
use parallel::mesh::Axis;

use crate::cut::Cut;
use crate::error::Result;
use crate::generate::{last, tokens};
use crate::model::attention::KvCache;
use crate::model::{Config, Llama};
use crate::pipeline::Stage;
use crate::step::{Places, values};
use crate::tensor::Slice;

/// Elements that a member sends the others at once.
const PIECE: usize = 4 << 20;

/// One rank's tie to those that hold the rest of its model.
#[derive(Clone, Debug)]
pub struct Replica {
    cut: Cut,
    config: Config,
    members: SubGroup,
    /// What each member holds, in their order.
    held: Arc<[Vec<Part>]>,
    slice: Option<Slice>,
    stage: Option<Stage>,
}

impl Replica {
    /// That of a rank; `None` where every rank holds a whole model. `sequence` is whether tensor ranks cut sequences too, and
    /// `activations` what travels between stages travels in.
    ///
    /// # Errors
    /// There is no such rank, or a model whose parameters do not fit the address space.
    pub fn new(
        collectives: &Collectives,
        (cut, rank): (Cut, usize),
        config: &Config,
        (sequence, activations): (bool, Codec),
    ) -> Result<Option<Self>> {
        let mesh = cut.mesh();
        let all: Vec<usize> = mesh.replica(rank).collect();
        if all.len() == 1 {
            return Ok(None);
        }
        let members = collectives.sub_group(&all)?;
        let slice = Slice::new(collectives, (mesh, rank), config, sequence)?;
        let stage = Stage::new(collectives, (&cut, rank), config, activations)?;
        let held = all.iter().map(|&member| cut.parts(config, member)).collect::<Result<_>>()?;
        let config = config.clone();
        Ok(Some(Self { cut, config, members, held, slice, stage }))
    }

    /// Its slice of every layer, where several ranks share layers.
    #[must_use]
    pub const fn slice(&self) -> Option<&Slice> {
        self.slice.as_ref()
    }

    /// Its stage, where there are several.
    #[must_use]
    pub const fn stage(&self) -> Option<&Stage> {
        self.stage.as_ref()
    }

    /// How many ranks it is.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.members.members().len()
    }

    /// Which of them says what all of them know together, as the loss: the first that has it.
    #[must_use]
    pub fn speaker(&self) -> usize {
        self.ranks() - self.cut.mesh().size(Axis::Tensor)
    }

    /// How the ranks share the model.
    #[must_use]
    pub fn places(&self) -> Places {
        let size = |axis| self.cut.mesh().size(axis);
        let stages = size(Axis::Pipeline);
        Places { stages, tensor: size(Axis::Tensor), tied: stages > 1 && self.config.tie_word_embeddings }
    }

    /// Whether this rank is the [speaker](Self::speaker).
    #[must_use]
    pub fn speaks(&self) -> bool {
        self.members.index() == self.speaker()
    }

    /// The same, where every rank has all tokens of a sequence, whatever its length: for held-out text.
    #[must_use]
    pub fn with_all_tokens(&self) -> Self {
        Self { slice: self.slice.as_ref().map(Slice::with_all_tokens), ..self.clone() }
    }

    /// What this rank holds of each parameter of which it holds something.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.held[self.members.index()]
    }

    /// What went wrong in a pass, if something did.
    ///
    /// # Errors
    /// That.
    pub fn check(&self, step: u64) -> Result<()> {
        self.slice.as_ref().map_or(Ok(()), |slice| slice.check(step))
    }

    /// Whether any rank of the replica says so. All of them ask at the same place.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn any(&self, site: &str, says: bool) -> Result<bool> {
        let mut said = [u8::from(says)];
        self.members.all_reduce(site, Reduction::Max, &mut said)?;
        Ok(said == [1])
    }

    /// What all tokens of the vocabulary have for what follows `ids`, which follow what the caches hold, one list for each of this
    /// rank's pieces, as [`plain_pieces`](crate::step::plain_pieces) makes them. All ranks of the replica call it together, and all have the same.
    ///
    /// # Errors
    /// The device fails, or a rank is lost.
    pub fn last_logits(&self, pieces: &[Llama], ids: &[u32], caches: &mut [Vec<KvCache>]) -> Result<Vec<f32>> {
        let device = pieces[0].device();
        let tokens = || tokens(ids, &device);
        let mut own = Vec::new();
        match &self.stage {
            None => own = last(pieces[0].forward(tokens(), Some(&mut caches[0])))?,
            Some(stage) => {
                let shape = [1, ids.len(), self.config.hidden_size];
                stage.forward(
                    1,
                    |_| shape.iter().product(),
                    |action, input| {
                        let piece = &pieces[action.piece];
                        let x = match input {
                            Some(values) => Tensor::from_data(TensorData::new(values, shape), &device),
                            None => piece.embed(tokens()),
                        };
                        let y = piece.decode(x, ids.len(), Some(&mut caches[action.piece]));
                        if !piece.piece().last {
                            return values(y, 0).map(Some);
                        }
                        own = last(piece.logits_behind(y))?;
                        Ok(None)
                    },
                )?;
            }
        }
        self.check(0)?;
        let speaks = !own.is_empty();
        let mut all = match &self.slice {
            Some(slice) if speaks => slice.all_logits(&own)?,
            _ if speaks => own,
            _ => vec![0.0; self.config.vocab_size],
        };
        if self.stage.is_some() {
            let speaker = self.members.members()[self.speaker()];
            self.members.broadcast("generate/logits of all", speaker, &mut all)?;
        }
        Ok(all)
    }

    /// All of the parameter of this logical name, of which every rank of the replica gives what it holds, `own`, or nothing. All of
    /// them call it in the same order. Memory: the parameter, and the largest part of it.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn whole(&self, name: &str, own: &[f32]) -> Result<Vec<f32>> {
        let mut whole = Vec::new();
        let site = format!("merge/{name}");
        for (place, (&member, held)) in self.members.members().iter().zip(&*self.held).enumerate() {
            let part = held.iter().find(|part| part.whole.name == name);
            let Some(part) = part.filter(|part| part.counts) else { continue };
            whole.resize(part.whole.elements(), 0.0);
            let mut values = vec![0.0; part.region.len()];
            if place == self.members.index() {
                values.copy_from_slice(own);
            }
            values.chunks_mut(PIECE).try_for_each(|piece| self.members.broadcast(&site, member, piece))?;
            part.put(&values, &mut whole);
        }
        Ok(whole)
    }
}

#[cfg(test)]
impl Replica {
    /// The same, with a fault that a test wants noticed.
    pub(crate) fn with(mut self, wrong: Option<crate::tensor::Wrong>, without_tie: bool) -> Self {
        if let Some(slice) = &mut self.slice {
            slice.wrong = wrong;
        }
        if let Some(stage) = &mut self.stage {
            stage.without_tie = without_tie;
        }
        self
    }
}

#[cfg(test)]
mod tests;
