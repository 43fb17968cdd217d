//! Rows of a table that a step has not touched.
//!
//! A table of embeddings has a gradient in the rows of the step's tokens alone. What earlier steps left out of the others is
//! small, since tables travel in eight bits at least, but it would be sent in the next steps, smaller each time, and a dozen
//! steps would pass before their payload is zeros, which frames [leave out](crate::frame). So a block of a table whose gradient
//! is zero is sent as zeros, and what was left out of it waits for its next gradient. Nothing is lost: it stays in the residual.

use std::ops::Range;

use compression::{BLOCK, Codec, Found, Part, Payload, Workers};

use bytes::Bytes;

/// Encodes parts of tables. It keeps memory for what waits.
#[derive(Debug, Default)]
pub(super) struct Untouched {
    blocks: Vec<Range<usize>>,
    residual: Vec<f32>,
}

impl Untouched {
    /// As [`Workers::encode`], but that what was left out of blocks of zeros is left out again.
    pub(super) fn encode(
        &mut self,
        workers: &Workers,
        codec: Codec,
        values: &mut [f32],
        residual: &[f32],
        payload: &mut [u8],
    ) -> Found {
        self.find(values);
        // What leaves nothing out sends everything.
        if self.blocks.is_empty() || !codec.is_lossy() {
            return workers.encode(codec, values, residual, payload);
        }
        self.residual.clear();
        self.residual.extend_from_slice(residual);
        self.blocks.iter().for_each(|block| self.residual[block.clone()].fill(0.0));
        let found = workers.encode(codec, values, &self.residual, payload);
        self.blocks.iter().for_each(|block| values[block.clone()].copy_from_slice(&residual[block.clone()]));
        found
    }

    /// As [`Workers::pass_on`], with [`encode`](Self::encode).
    #[expect(clippy::too_many_arguments, reason = "those of `Workers::pass_on`")]
    pub(super) fn pass_on(
        &mut self,
        workers: &Workers,
        codec: Codec,
        parts: &[Part<'_, Bytes>],
        sum: &mut [f32],
        residual: &[f32],
        payload: &mut [u8],
        decoded: &mut [f32],
    ) -> Found {
        workers.reduce(parts, sum);
        let found = self.encode(workers, codec, sum, residual, payload);
        if found == Found::Finite {
            let written = Payload::new(codec, sum.len(), &*payload).expect("an encoder's payload");
            workers.decode(&written, decoded);
        }
        found
    }

    fn find(&mut self, values: &[f32]) {
        self.blocks.clear();
        let blocks = (0..values.len()).step_by(BLOCK).map(|start| start..(start + BLOCK).min(values.len()));
        self.blocks.extend(blocks.filter(|block| values[block.clone()].iter().all(|&value| value == 0.0)));
    }
}
