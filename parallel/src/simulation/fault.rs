//! What goes wrong, and what must be said of it.

use super::Random;

/// What goes wrong in a run. It happens at a random moment, if the run still lasts then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// A rank is far slower than all others, from the beginning.
    Slow(usize),
    /// A rank finds a NaN in this step.
    Nan(usize, u64),
    /// A process is killed.
    Kill(usize),
    /// A process is stopped, and its connections stay.
    Stop(usize),
    /// A rank computes for ever. Its heartbeats come.
    Stuck(usize),
    /// A rank's training fails.
    Fail(usize),
    /// The connections between two ranks break.
    Cut(usize, usize),
    /// Nothing passes between two ranks, and nobody is told.
    Silence(usize, usize),
    /// The network falls into two parts, the ranks below this one and the others: nothing passes between them, and nobody is
    /// told. The coordinator hears of both.
    Parted(usize),
    /// A bit of a message from one rank to another changes.
    Damage(usize, usize),
    /// A rank sums other sizes than the others, from the beginning.
    Differs(usize),
    /// The coordinator's process is killed.
    KillCoordinator,
    /// The coordinator's process is stopped.
    StopCoordinator,
}

/// The most ranks that a run has.
const RANKS_MAX: usize = 8;

/// What a rank whose training fails says.
pub(super) const FAILURE: &str = "no space left on the device";

impl Fault {
    pub(super) fn drawn(random: &mut Random, ranks: usize) -> Self {
        let rank = random.below(ranks as u64) as usize;
        let other = (rank + 1 + random.below(ranks as u64 - 1) as usize) % ranks;
        match random.below(18) {
            0 => Self::Slow(rank),
            // Few of them, so that runs without faults need not be made anew for each.
            1 => Self::Nan(ranks - 1, 2),
            2 | 3 => Self::Kill(rank),
            4 | 5 => Self::Stop(rank),
            6 => Self::Stuck(rank),
            7 => Self::Fail(rank),
            8 | 9 => Self::Cut(rank, other),
            10 => Self::Silence(rank, other),
            11 => Self::Damage(rank, other),
            12 => Self::KillCoordinator,
            13 => Self::StopCoordinator,
            14 => Self::Parted(1 + random.below(ranks as u64 - 1) as usize),
            15 => Self::Differs(rank),
            _ => Self::None,
        }
    }

    /// Whether a run with it goes on to its end.
    pub(super) const fn is_harmless(self) -> bool {
        matches!(self, Self::None | Self::Slow(_) | Self::Nan(..))
    }

    /// Whether this process says no more by itself.
    pub(super) fn silences(self, rank: usize) -> bool {
        self == Self::Kill(rank) || self == Self::Stop(rank)
    }

    /// Whether everybody has ended within the peer timeout of it, once all ranks are at their steps. The others are noticed
    /// when a rank has made no progress for longer than ten steps take, or when the next message comes.
    pub(super) const fn is_told_at_once(self) -> bool {
        matches!(
            self,
            Self::Kill(_)
                | Self::Stop(_)
                | Self::Fail(_)
                | Self::Cut(..)
                | Self::Damage(..)
                | Self::KillCoordinator
                | Self::StopCoordinator
        )
    }

    /// Whether a verdict names the guilty.
    pub(super) fn is_named(self, verdict: &str) -> bool {
        let starts = |rank: usize| verdict.starts_with(&format!("rank {rank} ("));
        let missing =
            |rank: usize| verdict.starts_with("the run has not started") && verdict.contains(&format!("rank {rank} "));
        let waits_for = |rank: usize| verdict.contains(&format!("rank {rank}'s"));
        match self {
            Self::None | Self::Slow(_) | Self::Nan(..) => false,
            Self::Kill(rank) | Self::Stop(rank) => starts(rank) || missing(rank),
            Self::Stuck(rank) => starts(rank) && verdict.contains("no progress"),
            Self::Fail(rank) => starts(rank) && verdict.contains(FAILURE),
            Self::Cut(a, b) => {
                (starts(a) && verdict.contains(&format!("lost rank {b} (")))
                    || (starts(b) && verdict.contains(&format!("lost rank {a} (")))
            }
            Self::Silence(a, b) => verdict.starts_with("no rank makes progress") && (waits_for(a) || waits_for(b)),
            // Each says whom it waits for, and some of them for the other part.
            Self::Parted(first) => {
                let across = |line: &str| {
                    let of = (0..RANKS_MAX).find(|rank| line.trim().starts_with(&format!("rank {rank} (")));
                    let mut peers = (0..RANKS_MAX).filter(|peer| of.is_some_and(|of| (of < first) != (*peer < first)));
                    peers.any(|peer| line.contains(&format!("rank {peer}'s")))
                };
                verdict.starts_with("no rank makes progress") && verdict.lines().any(across)
            }
            Self::Damage(from, to) => starts(to) && verdict.contains(&format!("rank {from}")),
            // It finds fault with a message of another rank, or another rank with one of its.
            Self::Differs(rank) => starts(rank) || verdict.contains(&format!(" failed: rank {rank}, step ")),
            Self::KillCoordinator | Self::StopCoordinator => {
                verdict.starts_with("the coordinator") || verdict.starts_with("no coordinator")
            }
        }
    }
}
