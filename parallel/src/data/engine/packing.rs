//! zstd as a lossless second stage: which buckets it serves, and why.
//!
//! A frame's payload may stand in a zstd frame; whoever receives it has the same payload. So this is each sender's own
//! business, bucket by bucket. It is worth its time only while the link is slow: what it takes to pack and to unpack must
//! be less than what the link saves. Both are measured: while a bucket is packed, every step of it; while it is not, one
//! frame of it now and then.

use std::time::Instant;

use bytes::Bytes;

use crate::frame::{HEADER_BYTES, Packer, pack};

/// Steps between two trials of a bucket that is not packed.
const TRY_EVERY: u64 = 64;

/// What was measured of one bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Facts {
    /// Bytes that would have been sent.
    pub raw_bytes: u64,
    /// Bytes that were sent.
    pub packed_bytes: u64,
    /// Seconds of packing.
    pub pack_s: f64,
    /// Seconds of unpacking, at one receiver.
    pub unpack_s: f64,
}

/// Whether to pack, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Whether to pack.
    pub packs: bool,
    /// One sentence, with numbers.
    pub reason: String,
}

/// A bucket that is packed from now on, or no longer.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Which bucket.
    pub bucket: usize,
    /// What holds from now on.
    pub decision: Decision,
}

/// Whether packing saves more time on a link of so many bytes a second than it takes. A bucket that nothing was measured
/// of is not packed.
#[must_use]
pub fn decide(facts: &Facts, link_bytes_per_s: f64) -> Decision {
    let saved_bytes = facts.raw_bytes.saturating_sub(facts.packed_bytes);
    let saved_s = saved_bytes as f64 / link_bytes_per_s;
    let cost_s = facts.pack_s + facts.unpack_s;
    let packs = saved_s > cost_s;
    let reason = format!(
        "zstd makes {} of {} bytes, which saves {:.2} ms at {:.1} MB/s and takes {:.2} ms",
        facts.packed_bytes,
        facts.raw_bytes,
        saved_s * 1e3,
        link_bytes_per_s / 1e6,
        cost_s * 1e3
    );
    Decision { packs, reason }
}

/// What packs the frames of one rank.
#[derive(Debug)]
pub(super) struct Packing {
    packer: Packer,
    link_bytes_per_s: f64,
    buckets: Vec<Bucket>,
    step: u64,
    /// The last frame, plain and packed: an owner sends one to all.
    last: Option<(Bytes, Bytes)>,
    changes: Vec<Change>,
}

#[derive(Clone, Debug, Default)]
struct Bucket {
    packs: bool,
    facts: Facts,
    /// Whether a frame was tried in this step.
    tried: bool,
}

impl Packing {
    /// For so many buckets, on a link of so many bytes a second.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn new(buckets: usize, link_bytes_per_s: f64) -> std::io::Result<Self> {
        let (packer, buckets) = (Packer::new()?, vec![Bucket::default(); buckets]);
        Ok(Self { packer, link_bytes_per_s, buckets, step: 0, last: None, changes: Vec::new() })
    }

    /// A step begins: what the last one measured decides.
    pub(super) fn begin(&mut self, step: u64) {
        self.step = step;
        self.last = None;
        for (number, bucket) in self.buckets.iter_mut().enumerate() {
            bucket.tried = false;
            let facts = std::mem::take(&mut bucket.facts);
            if facts.raw_bytes == 0 {
                continue;
            }
            let decision = decide(&facts, self.link_bytes_per_s);
            if decision.packs != bucket.packs {
                bucket.packs = decision.packs;
                self.changes.push(Change { bucket: number, decision });
            }
        }
    }

    /// What changed since this was asked last.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Buckets that are packed.
    pub(super) fn packed(&self) -> usize {
        self.buckets.iter().filter(|bucket| bucket.packs).count()
    }

    /// The frame as it is to be sent.
    pub(super) fn pack(&mut self, number: usize, frame: Bytes) -> Bytes {
        let bucket = &mut self.buckets[number];
        if !bucket.packs {
            // Buckets take turns, so that no step tries them all.
            let turn = (self.step + number as u64).is_multiple_of(TRY_EVERY);
            if turn && !bucket.tried {
                bucket.tried = true;
                measure(&mut self.packer, &frame, &mut bucket.facts);
            }
            return frame;
        }
        let same = |plain: &Bytes| plain.as_ptr() == frame.as_ptr() && plain.len() == frame.len();
        if let Some((_, packed)) = self.last.as_ref().filter(|(plain, _)| same(plain)) {
            bucket.facts.raw_bytes += frame.len() as u64;
            bucket.facts.packed_bytes += packed.len() as u64;
            return packed.clone();
        }
        let packed = measure(&mut self.packer, &frame, &mut bucket.facts);
        self.last = Some((frame, packed.clone()));
        packed
    }
}

/// Packs a frame, and enters what that took. Unpacking is timed on the first frame of a step, and scaled for the others.
fn measure(packer: &mut Packer, frame: &Bytes, facts: &mut Facts) -> Bytes {
    let start = Instant::now();
    let packed = pack(frame, packer);
    facts.pack_s += start.elapsed().as_secs_f64();
    let (packed, is_packed) = packed.map_or_else(|| (frame.clone(), false), |packed| (packed, true));
    if is_packed {
        if facts.raw_bytes == 0 {
            let start = Instant::now();
            let unpacked = zstd::bulk::decompress(&packed[HEADER_BYTES..], frame.len());
            facts.unpack_s = start.elapsed().as_secs_f64();
            debug_assert!(unpacked.is_ok_and(|unpacked| unpacked == frame[HEADER_BYTES..]), "lossless");
        } else {
            facts.unpack_s += facts.unpack_s / facts.raw_bytes as f64 * frame.len() as f64;
        }
    }
    facts.raw_bytes += frame.len() as u64;
    facts.packed_bytes += packed.len() as u64;
    packed
}

#[cfg(test)]
mod tests {
    use compression::Codec;

    use super::*;
    use crate::frame::{Header, Phase};

    fn frame(bucket: u32, fill: impl Fn(usize) -> u8) -> Bytes {
        let header = Header {
            phase: Phase::Scatter,
            codec: Codec::Bf16,
            epoch: 1,
            step: 1,
            bucket,
            tensor: 0,
            start: 0,
            elements: 1 << 14,
        };
        header.frame(&(0..1 << 15).map(fill).collect::<Vec<u8>>())
    }

    #[test]
    fn packing_pays_while_the_link_is_slower_than_the_packer() {
        let facts = Facts { raw_bytes: 1_000_000, packed_bytes: 900_000, pack_s: 0.002, unpack_s: 0.001 };
        let slow = decide(&facts, 25e6);
        assert!(slow.packs);
        assert_eq!(
            slow.reason,
            "zstd makes 900000 of 1000000 bytes, which saves 4.00 ms at 25.0 MB/s and takes 3.00 ms"
        );
        assert!(!decide(&facts, 125e6).packs);
        // What does not get smaller never pays, nor does what nobody measured.
        assert!(!decide(&Facts { packed_bytes: 1_000_000, ..facts }, 1.0).packs);
        assert!(!decide(&Facts { packed_bytes: 1_000_001, ..facts }, 1.0).packs);
        assert!(!decide(&Facts::default(), 1.0).packs);
        assert!(!decide(&facts, f64::INFINITY).packs && !decide(&facts, f64::NAN).packs);
    }

    #[test]
    fn a_bucket_is_tried_in_its_turn_packed_while_it_pays_and_left_alone_when_it_stops() {
        // A link of a byte a second: whatever gets smaller pays.
        let mut packing = Packing::new(2, 1.0).expect("memory");
        let noise = |i: usize| {
            let x = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            ((x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 56) as u8
        };
        let (even, noise) = (frame(0, |_| 0), frame(0, noise));
        packing.begin(1);
        assert!(packing.pack(0, even.clone()) == even, "not its turn");
        packing.begin(TRY_EVERY);
        assert!(packing.pack(0, even.clone()) == even, "a trial changes nothing yet");
        packing.begin(TRY_EVERY + 1);
        assert_eq!((packing.packed(), packing.take_changes().len()), (1, 1));
        let packed = packing.pack(0, even.clone());
        assert!(packed.len() < even.len() / 2);
        assert!(Header::read(&packed) == Header::read(&even));
        assert!(packing.pack(0, even.clone()) == packed, "one for all receivers");
        packing.begin(TRY_EVERY + 2);
        assert_eq!(packing.packed(), 1);
        assert!(packing.pack(0, noise.clone()) == noise, "what does not get smaller goes as it is");
        packing.begin(TRY_EVERY + 3);
        let changes = packing.take_changes();
        assert!(packing.packed() == 0 && changes.len() == 1 && !changes[0].decision.packs, "{changes:?}");
        assert!(packing.pack(0, even.clone()) == even);
    }
}
