//! A run as a seed draws it: what is summed, over which network, and what goes wrong.

use std::sync::Arc;
use std::time::Duration;

use compression::Codec;

use super::fault::Fault;
use crate::data::{Parameter, Plan};
use crate::transport::simulated::{Quality, Random};

/// A run, as a seed draws it.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub(super) seed: u64,
    pub(super) ranks: usize,
    pub(super) steps: u64,
    pub(super) codec: Codec,
    /// What parameters travel in; nothing where sums do.
    pub(super) parameters: Option<Codec>,
    pub(super) chunk_blocks: usize,
    /// Ranks of a node, and frames under way to one rank.
    pub(super) members: usize,
    pub(super) window: usize,
    pub(super) bucket_bytes: usize,
    pub(super) micro_batches: usize,
    pub(super) quality: Quality,
    /// The longest that one gradient takes.
    pub(super) compute: Duration,
    pub(super) fault: Fault,
    pub(super) fault_at: When,
    /// What must be named: the fault, but in a control.
    pub(super) expects: Fault,
    /// A control: sums are added in the order of arrival.
    pub(super) by_arrival: bool,
    /// A control: the coordinator sends its heartbeats and never looks who is lost.
    pub(super) blind: bool,
}

/// As small as they may be whose gradients are compressed, and two that travel as they are. The last one is a table.
const SHAPES: [(&str, &[usize]); 4] =
    [("matrix", &[256, 256]), ("norm", &[77]), ("small", &[3, 50]), ("model.embed_tokens.weight", &[256, 256])];

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    At(Duration),
    /// When all ranks together have completed so many steps.
    Steps(usize),
}

impl Setting {
    pub(super) fn drawn(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let ranks = 2 + random.below(7) as usize;
        let fault = Fault::drawn(&mut random, ranks);
        let mut one_of = |values: &[u64]| values[random.below(values.len() as u64) as usize];
        // Time passes while engines are late. With frames of single blocks they have so many turns that a step may take as long as
        // a peer may be silent.
        let chunk_blocks = one_of(&[2, 7, 64, 512]) as usize;
        Self {
            seed,
            ranks,
            steps: 4,
            chunk_blocks,
            bucket_bytes: one_of(&[4, 1 << 10, 1 << 20]) as usize,
            micro_batches: one_of(&[1, 2]) as usize,
            codec: Codec::ALL[one_of(&[0, 1, 2, 3, 4, 5]) as usize],
            quality: Quality {
                delay_max: Duration::from_micros(one_of(&[0, 100, 5_000, 50_000])),
                bytes_per_s: one_of(&[2_000_000, 25_000_000, 1_000_000_000]) as f64,
            },
            compute: Duration::from_millis(one_of(&[0, 2, 30])),
            members: Self::divisor(ranks, random.below(4) as usize),
            // In the smallest frames and one at a time a step would take longer than a peer may.
            window: if chunk_blocks == 2 { 1 << 20 } else { [1, 3, 1 << 20][random.below(3) as usize] },
            fault,
            // In the middle of the run, however long that is; or while it begins, or ends.
            fault_at: match random.below(4) {
                0 => When::At(random.duration(Duration::from_millis(1500))),
                _ => When::Steps(1 + random.below((ranks * 3) as u64) as usize),
            },
            expects: fault,
            by_arrival: false,
            blind: false,
            parameters: [None, Some(Codec::Fp32), Some(Codec::Int8)][random.below(3) as usize],
        }
    }

    /// One of the numbers that divide all ranks.
    fn divisor(ranks: usize, which: usize) -> usize {
        let divisors: Vec<usize> = (1..=ranks).filter(|members| ranks.is_multiple_of(*members)).collect();
        divisors[which % divisors.len()]
    }

    /// The same sums on a network without delays, without faults, in other pieces.
    pub(super) fn calm(&self) -> Self {
        let quality = Quality { delay_max: Duration::ZERO, bytes_per_s: 1e12 };
        let fault = if matches!(self.fault, Fault::Nan(..)) { self.fault } else { Fault::None };
        let (chunk_blocks, bucket_bytes, window, compute) = (33, 1 << 12, 1 << 20, Duration::ZERO);
        Self {
            quality,
            fault,
            expects: fault,
            chunk_blocks,
            bucket_bytes,
            window,
            compute,
            blind: false,
            ..self.clone()
        }
    }

    pub(super) const fn skips(&self) -> Option<u64> {
        match self.fault {
            Fault::Nan(_, step) => Some(step),
            _ => None,
        }
    }

    /// What a rank sums.
    pub(super) fn plan(&self, rank: usize) -> Arc<Plan> {
        let named = |(index, (name, _)): (usize, &(&str, _))| Parameter {
            name: (*name).into(),
            shape: self.shape(rank, index),
        };
        let parameters = SHAPES.iter().enumerate().map(named).collect();
        Arc::new(Plan::new(parameters, self.bucket_bytes).expect("small"))
    }

    fn shape(&self, rank: usize, index: usize) -> Vec<usize> {
        let mut shape = SHAPES[index].1.to_vec();
        if self.fault == Fault::Differs(rank) && index == 0 {
            shape[0] += 128;
        }
        shape
    }

    /// Another one for every rank, step and micro-batch, whatever the seed.
    pub(super) fn gradient(&self, rank: usize, step: u64, micro_batch: usize, index: usize) -> Vec<f32> {
        let elements: usize = self.shape(rank, index).iter().product();
        let mut x = (rank as u64 * 64 + step) * 64 + micro_batch as u64 * 8 + index as u64;
        let mut value = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.01
        };
        let mut values: Vec<f32> = (0..elements).map(|_| value()).collect();
        if index == SHAPES.len() - 1 {
            // A step touches a fourth of its rows.
            let rows = values.chunks_mut(256).enumerate();
            rows.filter(|(row, _)| !(row + rank + step as usize).is_multiple_of(4)).for_each(|(_, row)| row.fill(0.0));
        }
        if self.fault == Fault::Nan(rank, step) {
            values[elements / 2] = f32::NAN;
        }
        values
    }
}
