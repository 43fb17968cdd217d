//! Owners that send parameters in place of sums: the sharded optimiser (Rajbhandari et al. 2020, ZeRO,
//! <https://arxiv.org/abs/1910.02054>).
//!
//! The first stage, the votes and the norm are as ever. An owner's sum stays as it is, in f32, where it was added. When
//! all have voted for the step the owner updates its shard of each tensor, in the order in which the next forward pass needs
//! them, and says for each what is to be sent ([`own_mut`](Exchange::own_mut), [`publish`](Exchange::publish)): in `fp32`
//! the parameters themselves, to the last bit; in `int8` what its master has and its replica has not, so that what the
//! codec leaves out is in the next difference. Everybody has the same of it from a decoder, the owner too.
//!
//! What owners of sums had left out when a run goes on with a sharded optimiser is added to the first sum that counts.

use std::ops::Range;

use compression::{Codec, Found, Payload, codec::TOO_LARGE};

use super::{Exchange, Outgoing};
use crate::data::rules::codec_of;

impl Exchange {
    /// A side that sends parameters of what it owns, in this codec where their kind allows it.
    ///
    /// # Panics
    /// When the codec is neither `fp32` nor `int8`.
    #[must_use]
    pub fn sending_parameters(mut self, codec: Codec) -> Self {
        assert!(matches!(codec, Codec::Fp32 | Codec::Int8), "parameters travel as fp32 or int8, not as {codec}");
        self.parameters = Some(codec);
        self
    }

    /// What the parameters of a tensor travel in; `None` where sums travel. As `fp32` they are the parameters, as `int8`
    /// what is to be added to them.
    #[must_use]
    pub fn parameter_codec(&self, index: usize) -> Option<Codec> {
        // Inside a node everything travels as it is.
        let inside = self.group.members > 1 && self.group.nodes().count() == 1;
        let codec = |codec| if inside { Codec::Fp32 } else { codec };
        self.parameters.map(|asked| codec_of(&self.plan.parts()[index].whole, codec(asked)))
    }

    /// Where parameters travel: the sum of our own shard of a tensor, and the place for what is to be sent of it.
    pub fn own_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.tensors[index].reduced
    }

    /// Sends what [`own_mut`](Self::own_mut) holds of a tensor. A step that counts sends each tensor once, and one that is
    /// skipped none.
    ///
    /// # Panics
    /// When the step is not decided, sums travel, or it was sent before.
    pub fn publish(&mut self, index: usize, out: &mut dyn FnMut(Outgoing)) {
        let codec = self.parameter_codec(index).expect("parameters travel");
        assert!(self.decided, "parameters follow the votes");
        let (rank, own) = (self.group.rank, self.owned(index));
        for (chunk, range) in self.chunks_of(index, rank).enumerate() {
            assert!(!self.tensors[index].done[rank][chunk], "parameters are sent once a step");
            let tensor = &mut self.tensors[index];
            let values = &mut tensor.reduced[range.start - own.start..range.end - own.start];
            let mut payload = tensor.sum.buffer(rank, chunk, codec.payload_bytes(values.len()));
            let found = match codec {
                Codec::Fp32 => write(values, &mut payload),
                _ => self.workers.encode(codec, values, &self.zeros[..values.len()], &mut payload),
            };
            if found == Found::NonFinite {
                // The others must not wait. From now on this rank votes against every step.
                self.broken = true;
                codec.write_zeros(values.len(), &mut payload);
            }
            self.tell(index, &range, &payload);
            self.have(index, chunk, Payload::new(codec, range.len(), payload).expect("an encoder's payload"));
        }
        self.pump(out);
    }

    /// A chunk of our own shard is added and stays here, `inside` of it.
    pub(super) fn keep(&mut self, index: usize, inside: Range<usize>) {
        let tensor = &mut self.tensors[index];
        let sum = &mut tensor.reduced[inside.clone()];
        match tensor.owner.get(inside) {
            Some(owner) => sum.iter_mut().zip(owner).for_each(|(sum, left)| *sum = (*sum + left) + 0.0),
            // As an encoder does, so that no -0.0 remains.
            None => sum.iter_mut().for_each(|sum| *sum += 0.0),
        }
        // What an encoder would have refused.
        self.finite &= sum.iter().all(|sum| sum.abs() < TOO_LARGE);
        if self.plan.parts()[index].counts {
            self.norm.add(sum);
        }
    }

    /// The step is skipped: nobody sends parameters.
    pub(super) fn expect_nothing(&mut self) {
        self.missing = 0;
        self.tensors.iter_mut().for_each(|tensor| tensor.missing = 0);
        self.completed.clear();
    }
}

/// Writes f32 to the last bit: of a parameter -0.0 is a value like any other.
fn write(values: &[f32], payload: &mut [u8]) -> Found {
    for (bytes, value) in payload.chunks_exact_mut(size_of::<f32>()).zip(values) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    if compression::codec::all_finite(values) { Found::Finite } else { Found::NonFinite }
}
