//! What leaves, and when.

use std::ops::Range;

use bytes::Bytes;
use compression::{Codec, Found};

use super::{Exchange, Job, Outgoing};
use crate::frame::{Header, Phase};

impl Exchange {
    /// Says that a frame to a rank has left, so that the next one may.
    pub fn left(&mut self, to: usize, out: &mut dyn FnMut(Outgoing)) {
        self.queues[to].left();
        self.pump(out);
    }

    /// Hands over what still waits once the sum is complete, whatever the window: these are sums, which are encoded already,
    /// and other ranks may need them after this one has left.
    pub fn release(&mut self, out: &mut dyn FnMut(Outgoing)) {
        self.hand_over(usize::MAX, out);
    }

    /// Hands over whatever may leave, first to the next rank.
    pub fn pump(&mut self, out: &mut dyn FnMut(Outgoing)) {
        self.hand_over(self.group.window, out);
    }

    fn hand_over(&mut self, window: usize, out: &mut dyn FnMut(Outgoing)) {
        for to in self.group.nodes().others() {
            while let Some(job) = self.queues[to].pop(window, self.decided) {
                let (phase, index, frame) = match job {
                    Job::Ready(index, _, frame) => (Phase::Gather, index, frame),
                    Job::Encode(phase, index, range) => (phase, index, self.encode(phase, index, &range)),
                };
                out(Outgoing { to, bucket: self.plan.slot(index).bucket, phase, frame });
            }
        }
    }

    /// Encodes a chunk of our gradient, or of the node's with what was left out before.
    fn encode(&mut self, phase: Phase, index: usize, range: &Range<usize>) -> Bytes {
        let (codec, lies) = (self.codec_in(phase, index), self.lies(index, range));
        let bucket = &mut self.buckets[self.plan.slot(index).bucket];
        let values = &mut bucket.given.as_mut().expect("it was given when it was queued")[lies.clone()];
        let residual = match bucket.sender.is_empty() || phase == Phase::Inner {
            true => &self.zeros[..values.len()],
            false => &bucket.sender[lies],
        };
        self.payload.resize(codec.payload_bytes(values.len()), 0);
        let found = match self.tensors[index].may_leave_rows && phase == Phase::Scatter {
            true => self.untouched.encode(&self.workers, codec, values, residual, &mut self.payload),
            false => self.workers.encode(codec, values, residual, &mut self.payload),
        };
        if found == Found::NonFinite {
            // The others must not wait: they get zeros, and the vote makes everybody skip.
            self.finite = false;
            codec.write_zeros(values.len(), &mut self.payload);
        }
        self.unsent -= 1;
        self.frame(phase, index, range, &self.payload)
    }

    /// What a tensor travels in on this part of its way.
    pub(super) fn codec_in(&self, phase: Phase, index: usize) -> Codec {
        match phase {
            Phase::Inner => Codec::Fp32,
            Phase::Scatter => self.tensors[index].codec,
            Phase::Gather => self.parameter_codec(index).unwrap_or_else(|| self.tensors[index].codec.second_stage()),
        }
    }

    pub(super) fn frame(&self, phase: Phase, index: usize, range: &Range<usize>, payload: &[u8]) -> Bytes {
        let header = Header {
            phase,
            codec: self.codec_in(phase, index),
            epoch: self.group.epoch,
            step: self.step,
            bucket: self.plan.slot(index).bucket as u32,
            tensor: index as u32,
            start: range.start as u64,
            elements: range.len() as u32,
        };
        header.frame(payload)
    }
}
