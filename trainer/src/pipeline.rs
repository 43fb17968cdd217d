//! Pipeline parallelism: one rank's stage of a model. What a stage computes is plain pieces of the model, each a graph of its own;
//! `step/staged.rs` has the passes.
//!
//! Between pieces travel activations `[B, T, D]` and their gradients; with tensor ranks every rank talks with the one of its
//! own place in the stage beside. A tied embedding table is on the first and on the last stage: each has its own gradients of it, as the
//! embedding and as the head, which are summed once a step, when both have gone through all micro-batches. So both update
//! it alike, and their copies stay the same bits.

use std::time::Duration;

use compression::Codec;
use parallel::collective::{Collectives, Reduction, SubGroup};
use parallel::mesh::Axis;
use parallel::pipeline::execute::{ExecuteError, Way, execute};
use parallel::pipeline::{Action, Pass};

use crate::cut::Cut;
use crate::error::{Error, Result};
use crate::model::{Config, Piece};

/// Held-out passes that are under way between two places at which all ranks of a replica meet, and so the most activations that
/// wait for a slow stage.
pub const AHEAD_MAX: usize = 16;

/// One rank's stage, and its tie to those before and behind it.
#[derive(Clone, Debug)]
pub struct Stage {
    cut: Cut,
    pieces: Vec<Piece>,
    group: SubGroup,
    /// The ranks that hold a tied table, where this is one of them.
    ends: Option<SubGroup>,
    codec: Codec,
    /// Keeps its gradient of the tied table to itself: a test's control.
    #[cfg(test)]
    pub(crate) without_tie: bool,
}

impl Stage {
    /// That of a rank; `None` where there is one stage. `codec` is what activations and their gradients travel in.
    ///
    /// # Errors
    /// There is no such rank.
    pub fn new(
        collectives: &Collectives,
        (cut, rank): (&Cut, usize),
        config: &Config,
        codec: Codec,
    ) -> Result<Option<Self>> {
        let mesh = cut.mesh();
        if mesh.size(Axis::Pipeline) == 1 {
            return Ok(None);
        }
        let group = collectives.sub_group(&mesh.group(Axis::Pipeline, rank))?;
        let ends = mesh.ends(rank);
        let ends = match config.tie_word_embeddings && ends.contains(&rank) {
            true => Some(collectives.sub_group(&ends)?),
            false => None,
        };
        Ok(Some(Self {
            cut: cut.clone(),
            pieces: cut.pieces_of(rank),
            group,
            ends,
            codec,
            #[cfg(test)]
            without_tie: false,
        }))
    }

    /// Its pieces, in the order of the model.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether it has the tokens, and waits for nobody before its first pass.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.pieces[0].first
    }

    /// Whether it shares a tied embedding table.
    #[must_use]
    pub const fn ties(&self) -> bool {
        self.ends.is_some()
    }

    /// Does its part of a step of so many micro-batches; `compute` as in [`execute`]. Returns how long it waited for inputs.
    ///
    /// # Errors
    /// Those of `compute`; a rank is lost.
    pub fn run(
        &self,
        step: u64,
        (micro_batches, elements): (usize, usize),
        compute: impl FnMut(Action, Option<Vec<f32>>) -> Result<Option<Vec<f32>>>,
    ) -> Result<Duration> {
        let pipeline = self.cut.pipeline(micro_batches).map_err(|error| Error::Usage(error.to_string()))?;
        let site = format!("step {step}");
        execute(pipeline, self.way(&site, elements), compute).map_err(explain)
    }

    /// Takes so many held-out micro-batches forward, none backward. All stages call it with the same, at most [`AHEAD_MAX`].
    /// `elements` are those of a micro-batch's activations.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn forward(
        &self,
        micro_batches: usize,
        elements: impl Fn(usize) -> usize,
        mut compute: impl FnMut(Action, Option<Vec<f32>>) -> Result<Option<Vec<f32>>>,
    ) -> Result<()> {
        assert!(micro_batches <= AHEAD_MAX, "{micro_batches} passes, all of which may wait at one stage");
        let stage = self.group.index();
        // Who is before and behind whom is the same for any number of micro-batches that the schedule takes.
        let pipeline = self.cut.pipeline(micro_batches.next_multiple_of(self.group.members().len()));
        let pipeline = pipeline.map_err(|error| Error::Usage(error.to_string()))?;
        for piece in 0..self.pieces.len() {
            for micro_batch in 0..micro_batches {
                let action = Action { pass: Pass::Forward, piece, micro_batch };
                let way = self.way("evaluate", elements(micro_batch));
                let input = match pipeline.before(stage, action) {
                    Some((from, _)) => Some(way.receive(action, self.group.members()[from]).map_err(explain)?),
                    None => None,
                };
                let output = compute(action, input)?;
                if let (Some(output), Some((to, of))) = (output, pipeline.after(stage, action)) {
                    way.send(of, self.group.members()[to], output)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the other end's gradient of a tied table to this one's. Both have the same bits.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn tie(&self, gradient: &mut [f32]) -> Result<()> {
        #[cfg(test)]
        if self.without_tie {
            return Ok(());
        }
        match &self.ends {
            Some(ends) => Ok(ends.all_reduce("model.embed_tokens.weight/tied", Reduction::Sum, gradient)?),
            None => Ok(()),
        }
    }

    fn way<'a>(&'a self, site: &'a str, elements: usize) -> Way<'a> {
        Way { group: &self.group, site, elements, codec: self.codec }
    }
}

fn explain(error: ExecuteError<Error>) -> Error {
    match error {
        ExecuteError::Compute { error, .. } => error,
        ExecuteError::Collective(error) => error.into(),
        other => Error::Usage(format!("[parallel]: {other}")),
    }
}
