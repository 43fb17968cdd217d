//! Ranks as threads, with pieces so small that a few elements are several.

use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use half::bf16;
use proptest::prelude::*;

use super::sub_group::block;
use super::*;
use crate::progress::Progress;
use crate::transport::channel::{ChannelTransport, network};
use crate::transport::simulated::Random;
use crate::transport::{Incoming, Sink};

mod ahead;
mod disagreement;
mod ending;
mod engine;
mod grpc;
mod message;
mod operations;
mod order;

const EPOCH: u32 = 7;
/// Only a guard: nothing here takes so long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
const SMALL: Cuts = Cuts { piece_bytes: 64, direct_bytes_max: 128 };
const REDUCTIONS: [Reduction; 3] = [Reduction::Sum, Reduction::Max, Reduction::Min];

/// One rank of a channel network.
struct Rank {
    end: Arc<ChannelTransport>,
    mailbox: Mailbox,
    progress: Arc<Progress>,
    collectives: Collectives,
}

/// Ranks whose engines want nothing.
fn ranks(count: usize) -> Vec<Rank> {
    ranks_keeping(KEPT_BYTES_MAX, count, SMALL)
}

fn ranks_keeping(kept_bytes_max: usize, count: usize, cuts: Cuts) -> Vec<Rank> {
    let ends: Vec<_> = network(count).into_iter().map(Arc::new).collect();
    let rank = |(rank, end): (usize, Arc<ChannelTransport>)| {
        let progress = Arc::<Progress>::default();
        let mailbox = Mailbox::keeping(kept_bytes_max, Place { rank, ranks: count, epoch: EPOCH }, progress.clone());
        end.open(mailbox.sink(nobody()));
        let collectives = Collectives::cut(mailbox.clone(), end.clone(), cuts);
        Rank { end, mailbox, progress, collectives }
    };
    ends.into_iter().enumerate().map(rank).collect()
}

/// An engine that nothing comes to but what is wrong.
fn nobody() -> Sink {
    let wrong = |incoming: &Incoming| matches!(incoming, Incoming::Lost { .. } | Incoming::Unreadable { .. });
    Arc::new(move |incoming| assert!(wrong(&incoming), "{incoming:?} is not the engine's"))
}

/// What each rank of a sub-group makes of its part of it, in a thread each.
fn each<T: Send>(ranks: &[Rank], members: &[usize], does: impl Fn(&SubGroup, usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let start = |&rank: &usize| {
            let (does, collectives) = (&does, &ranks[rank].collectives);
            scope.spawn(move || does(&collectives.sub_group(members).expect("one of them"), rank))
        };
        let threads: Vec<_> = members.iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// A type of elements with a plain reduction of its own.
trait Sample: Element + PartialEq + fmt::Debug {
    /// Any value.
    fn sample(random: &mut Random) -> Self;
    /// What tells it from all others.
    fn bits(self) -> u64;
    /// Of at least two.
    fn plain(reduction: Reduction, parts: &[Self]) -> Self;
}

fn samples<T: Sample>(seed: u64, rank: usize, elements: usize) -> Vec<T> {
    let mut random = Random::new(seed.wrapping_mul(31).wrapping_add(rank as u64));
    (0..elements).map(|_| T::sample(&mut random)).collect()
}

fn bits<T: Sample>(values: &[T]) -> Vec<u64> {
    values.iter().map(|value| value.bits()).collect()
}

fn plain_float(reduction: Reduction, parts: &[f32]) -> f32 {
    // -0.0 is below 0.0.
    let rank = |value: &f32| (*value, value.is_sign_positive());
    let ordered = |one: &&f32, other: &&f32| rank(one).partial_cmp(&rank(other)).expect("no NaN");
    match reduction {
        _ if parts.iter().any(|part| part.is_nan()) => f32::NAN,
        Reduction::Sum => {
            let sum = parts[1..].iter().fold(parts[0], |sum, part| sum + part);
            if sum.is_nan() { f32::NAN } else { sum }
        }
        Reduction::Max => *parts.iter().max_by(ordered).expect("two at least"),
        Reduction::Min => *parts.iter().min_by(ordered).expect("two at least"),
    }
}

fn any_float(random: &mut Random) -> f32 {
    match random.below(16) {
        0 => [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xffc0_0bad), f32::MIN_POSITIVE / 4.0]
            [random.below(6) as usize],
        1 => f32::from_bits(random.next() as u32),
        _ => (random.next() as i32) as f32 / (1u64 << random.below(40)) as f32,
    }
}

impl Sample for f32 {
    fn sample(random: &mut Random) -> Self {
        any_float(random)
    }

    fn bits(self) -> u64 {
        self.to_bits().into()
    }

    fn plain(reduction: Reduction, parts: &[Self]) -> Self {
        plain_float(reduction, parts)
    }
}

impl Sample for bf16 {
    fn sample(random: &mut Random) -> Self {
        Self::from_bits((any_float(random).to_bits() >> 16) as u16)
    }

    fn bits(self) -> u64 {
        self.to_bits().into()
    }

    fn plain(reduction: Reduction, parts: &[Self]) -> Self {
        let wide: Vec<f32> = parts.iter().map(|part| f32::from_bits(u32::from(part.to_bits()) << 16)).collect();
        let bits = plain_float(reduction, &wide).to_bits();
        // The nearest, ties to even: half a place less one is added, and the last bit that stays.
        Self::from_bits(((u64::from(bits) + 0x7fff + u64::from(bits >> 16 & 1)) >> 16) as u16)
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Sample for $type {
            fn sample(random: &mut Random) -> Self {
                (random.next() >> random.below(64)) as Self
            }

            fn bits(self) -> u64 {
                self as u64
            }

            fn plain(reduction: Reduction, parts: &[Self]) -> Self {
                let all = parts.iter().map(|&part| i128::from(part));
                (match reduction {
                    Reduction::Sum => all.sum::<i128>(),
                    Reduction::Max => all.max().expect("two at least"),
                    Reduction::Min => all.min().expect("two at least"),
                }) as Self
            }
        }
    )*};
}

integers!(i32, i64, u8);

/// A set of the ranks below `ranks`, not empty.
fn subset(ranks: usize, random: &mut Random) -> Vec<usize> {
    let bits = 1 + random.below((1 << ranks) - 1);
    (0..ranks).filter(|rank| bits >> rank & 1 == 1).collect()
}
