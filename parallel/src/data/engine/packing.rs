//! zstd as a lossless second stage: which buckets it serves, and why.
//!
//! A frame's payload may stand in a zstd frame; whoever receives it has the same payload. So this is each sender's own
//! business, bucket by bucket. It is worth its time only while the link is slow: what it takes to pack and to unpack must
//! be less than what the link saves. Both are measured: while a bucket is packed, every step of it; while it is not, a step
//! of it at first and now and then.

use std::collections::HashMap;
use std::time::Instant;

use bytes::Bytes;

use crate::frame::{HEADER_BYTES, Packer, pack};

/// Steps between two trials of a bucket that is not packed.
const TRY_EVERY: u64 = 64;
/// Packing must save so many times what it takes before it begins; once it has begun, as much as it takes.
const MARGIN: f64 = 1.1;
/// Steps in a row in which packing did not pay before it ends: one slow step is no reason.
const MISSES_MAX: u8 = 3;

/// What one step measured of one bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Facts {
    /// Bytes that would have been sent.
    raw_bytes: u64,
    /// Bytes that were sent, or in a trial would have been.
    packed_bytes: u64,
    /// Seconds of packing.
    pack_s: f64,
    /// Raw bytes of the frames that receivers have to unpack.
    unpack_bytes: u64,
    /// Raw bytes that were unpacked here to see how long that takes, and the seconds.
    timed: Option<(u64, f64)>,
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

/// Whether packing saves more time on a link of so many bytes a second than it takes. What nothing was measured of is not
/// packed.
fn decide(facts: &Facts, link_bytes_per_s: f64, packs: bool) -> Decision {
    let saved_bytes = facts.raw_bytes.saturating_sub(facts.packed_bytes);
    let saved_s = saved_bytes as f64 / link_bytes_per_s;
    // Every frame is unpacked once by whoever receives it, and a rank receives about as much as it sends.
    let unpack_s = facts.timed.map_or(0.0, |(bytes, s)| s / bytes.max(1) as f64 * facts.unpack_bytes as f64);
    let cost_s = facts.pack_s + unpack_s;
    let reason = format!(
        "zstd makes {} of {} bytes, which saves {:.2} ms at {:.1} MB/s and takes {:.2} ms",
        facts.packed_bytes,
        facts.raw_bytes,
        saved_s * 1e3,
        link_bytes_per_s / 1e6,
        cost_s * 1e3
    );
    Decision { packs: saved_s > cost_s * if packs { 1.0 } else { MARGIN }, reason }
}

/// What packs the frames of one rank.
#[derive(Debug)]
pub(super) struct Packing {
    packer: Packer,
    link_bytes_per_s: f64,
    buckets: Vec<Bucket>,
    step: u64,
    /// The step's frames that go to several ranks, plain and packed, by the address of the plain one.
    shared: HashMap<usize, (Bytes, Bytes)>,
    changes: Vec<Change>,
}

#[derive(Clone, Debug, Default)]
struct Bucket {
    packs: bool,
    facts: Facts,
    /// The last step in which it was tried.
    tried: Option<u64>,
    misses: u8,
}

impl Packing {
    /// For so many buckets, on a link of so many bytes a second.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn new(buckets: usize, link_bytes_per_s: f64) -> std::io::Result<Self> {
        let (packer, buckets) = (Packer::new()?, vec![Bucket::default(); buckets]);
        Ok(Self { packer, link_bytes_per_s, buckets, step: 0, shared: HashMap::new(), changes: Vec::new() })
    }

    /// The link's rate was measured anew; what is packed goes on until it is measured.
    pub(super) const fn set_link(&mut self, bytes_per_s: f64) {
        self.link_bytes_per_s = bytes_per_s;
    }

    /// A step begins: what the last one measured decides.
    pub(super) fn begin(&mut self, step: u64) {
        self.step = step;
        self.shared.clear();
        for (number, bucket) in self.buckets.iter_mut().enumerate() {
            let facts = std::mem::take(&mut bucket.facts);
            if facts.raw_bytes == 0 {
                continue;
            }
            let decision = decide(&facts, self.link_bytes_per_s, bucket.packs);
            bucket.misses = if decision.packs { 0 } else { bucket.misses.saturating_add(1) };
            let changes = if bucket.packs { bucket.misses >= MISSES_MAX } else { decision.packs };
            if changes {
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

    /// The frame as it is to be sent. One that is `shared` goes to several ranks, and is packed once.
    pub(super) fn pack(&mut self, number: usize, frame: Bytes, shared: bool) -> Bytes {
        let bucket = &mut self.buckets[number];
        // After the first time buckets take turns, so that no step tries them all. A trial is of all frames of a step: the
        // first one may be a norm's, of a few bytes.
        let turn = (self.step + number as u64).is_multiple_of(TRY_EVERY);
        let tries = bucket.tried.is_none_or(|tried| turn || tried == self.step);
        if !bucket.packs && !tries {
            return frame;
        }
        bucket.tried = Some(self.step);
        // The plain frame is kept, so that no other can have its address.
        let address = frame.as_ptr() as usize;
        let packed = match self.shared.get(&address) {
            Some((_, packed)) => packed.clone(),
            None => measure(&mut self.packer, &frame, &mut bucket.facts),
        };
        if shared {
            self.shared.entry(address).or_insert_with(|| (frame.clone(), packed.clone()));
        }
        let facts = &mut bucket.facts;
        facts.raw_bytes += frame.len() as u64;
        facts.packed_bytes += packed.len() as u64;
        if packed.len() < frame.len() {
            facts.unpack_bytes += frame.len() as u64;
        }
        if bucket.packs { packed } else { frame }
    }
}

/// Packs a frame, and enters what that took. Unpacking is timed on the first frame of a step that gets smaller.
fn measure(packer: &mut Packer, frame: &Bytes, facts: &mut Facts) -> Bytes {
    let start = Instant::now();
    let packed = pack(frame, packer);
    facts.pack_s += start.elapsed().as_secs_f64();
    let Some(packed) = packed else { return frame.clone() };
    if facts.timed.is_none() {
        let start = Instant::now();
        let unpacked = zstd::bulk::decompress(&packed[HEADER_BYTES..], frame.len());
        facts.timed = Some((frame.len() as u64, start.elapsed().as_secs_f64()));
        debug_assert!(unpacked.is_ok_and(|unpacked| unpacked == frame[HEADER_BYTES..]), "lossless");
    }
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
        let timed = Some((100_000, 1e-4));
        let facts =
            Facts { raw_bytes: 1_000_000, packed_bytes: 900_000, pack_s: 0.002, unpack_bytes: 1_000_000, timed };
        let slow = decide(&facts, 25e6, false);
        assert!(slow.packs);
        assert_eq!(
            slow.reason,
            "zstd makes 900000 of 1000000 bytes, which saves 4.00 ms at 25.0 MB/s and takes 3.00 ms"
        );
        assert!(!decide(&facts, 125e6, true).packs);
        // About as much as it takes: no reason to begin, and none to end.
        let near = 100_000.0 / 3.1e-3;
        assert!(!decide(&facts, near, false).packs && decide(&facts, near, true).packs);
        // What does not get smaller never pays, nor does what nobody measured.
        assert!(!decide(&Facts { packed_bytes: 1_000_000, ..facts }, 1.0, false).packs);
        assert!(!decide(&Facts { packed_bytes: 1_000_001, ..facts }, 1.0, true).packs);
        assert!(!decide(&Facts::default(), 1.0, true).packs);
        assert!(!decide(&facts, f64::INFINITY, true).packs && !decide(&facts, f64::NAN, true).packs);
    }

    #[test]
    fn a_bucket_is_tried_in_its_turn_packed_while_it_pays_and_left_alone_when_it_stops() {
        // A link of a byte a second: whatever gets smaller pays.
        let mut packing = Packing::new(2, 1.0).expect("memory");
        let noise = |i: usize| {
            let x = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            ((x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 56) as u8
        };
        let (even, noise) = (frame(0, |_| 1), frame(0, noise));
        packing.begin(1);
        assert!(packing.pack(0, noise.clone(), true) == noise, "a first trial, which finds nothing");
        packing.begin(2);
        assert!(packing.pack(0, even.clone(), true) == even, "not its turn");
        packing.begin(TRY_EVERY);
        // What comes first does not decide alone.
        assert!(
            packing.pack(0, noise.clone(), true) == noise && packing.pack(0, even.clone(), true) == even,
            "only a trial"
        );
        packing.begin(TRY_EVERY + 1);
        assert_eq!((packing.packed(), packing.take_changes().len()), (1, 1));
        let packed = packing.pack(0, even.clone(), true);
        assert!(packed.len() < even.len() / 2);
        assert!(Header::read(&packed) == Header::read(&even));
        assert!(packing.pack(0, even.clone(), true) == packed, "one for all receivers");
        for miss in 0..u64::from(MISSES_MAX) {
            packing.begin(TRY_EVERY + 2 + miss);
            assert_eq!(packing.packed(), 1, "one step is no reason");
            assert!(packing.pack(0, noise.clone(), true) == noise, "what does not get smaller goes as it is");
        }
        packing.begin(TRY_EVERY + 10);
        let changes = packing.take_changes();
        assert!(packing.packed() == 0 && changes.len() == 1 && !changes[0].decision.packs, "{changes:?}");
        assert!(packing.pack(0, even.clone(), true) == even);
    }
}
