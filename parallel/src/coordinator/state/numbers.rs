//! What ranks last said of themselves, for whoever shows it.

use super::State;
use super::worker::Worker;
use crate::wire::control::Numbers;

/// What a rank last said of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct RankNumbers {
    /// The rank.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// Where it is, and whether it waits there for other ranks.
    pub at: String,
    /// See `at`.
    pub waits: bool,
    /// What its last step took; nothing before the first.
    pub numbers: Option<Numbers>,
}

impl State {
    /// What every rank last said of itself.
    #[must_use]
    pub fn numbers(&self) -> Vec<RankNumbers> {
        let of = |(&rank, worker): (&usize, &Worker)| RankNumbers {
            rank,
            host: worker.host.clone(),
            pid: worker.pid,
            at: worker.place(),
            waits: worker.mark.waits,
            numbers: worker.mark.numbers.clone(),
        };
        self.workers.iter().map(of).collect()
    }
}
