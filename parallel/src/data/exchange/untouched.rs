//! Rows of a table that a step has not touched.
//!
//! A table of embeddings has a gradient in the rows of the step's tokens alone. What earlier steps left out of the others is
//! small, since tables travel in eight bits at least, but it would be sent in the next steps, smaller each time, and a dozen
//! steps would pass before their payload is zeros, which frames [leave out](crate::frame). So a block of a table whose gradient
//! is zero is sent as zeros, and what was left out of it waits for its next gradient. Nothing is lost: it stays in the residual.

use std::ops::Range;

use compression::{BLOCK, Codec, Found, Owned, Part, Payload, Workers};

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
        // What leaves nothing out sends everything.
        if !codec.is_lossy() {
            return workers.encode(codec, values, residual, payload);
        }
        self.find(values);
        if self.blocks.is_empty() {
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
    pub(super) fn pass_on(&mut self, workers: &Workers, parts: &[Part<'_, Bytes>], to: Owned<'_>) -> Found {
        let Owned { codec, sum, residual, payload, decoded } = to;
        workers.reduce(parts, sum);
        let found = self.encode(workers, codec, sum, residual, payload);
        if found == Found::Finite {
            let written = Payload::new(codec, sum.len(), &*payload).expect("an encoder's payload");
            workers.decode(&written, decoded);
        }
        found
    }

    fn find(&mut self, values: &[f32]) {
        let blocks = values.chunks(BLOCK).enumerate().filter(|(_, block)| is_zero(block));
        self.blocks.clear();
        self.blocks.extend(blocks.map(|(number, block)| number * BLOCK..number * BLOCK + block.len()));
    }
}

/// Without an early end behind the first value, so that a compiler makes wide instructions of it: what begins with a zero is
/// zeros mostly.
fn is_zero(block: &[f32]) -> bool {
    block[0] == 0.0 && block.iter().fold(0, |all, value| all | value.to_bits() << 1) == 0
}
