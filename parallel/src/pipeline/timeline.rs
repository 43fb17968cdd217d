//! All ranks' schedules on a simulated clock.
//!
//! A rank computes one action after the other. Its output leaves at once and travels; what one rank sends to another arrives
//! in the order in which it was sent. Nobody waits to send. So whether all come to an end does not depend on any time: a
//! schedule that gets stuck does so under all delays, and one that does not, under none.

use std::collections::HashMap;

use thiserror::Error;

use super::{Action, Pass, Pipeline};

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// When the last rank is done.
    pub end: f64,
    /// How long each rank computes.
    pub busy: Vec<f64>,
    /// For each rank, the most messages that each other had sent to it and that it had not used yet.
    pub unused_max: Vec<Vec<usize>>,
}

impl Timeline {
    /// The time in which the busiest rank does nothing, in parts of the time in which it computes: the bubble as the papers
    /// have it.
    #[must_use]
    pub fn bubble(&self) -> f64 {
        let busy = self.busy.iter().copied().fold(0.0, f64::max);
        if busy > 0.0 { self.end / busy - 1.0 } else { 0.0 }
    }
}

/// Why schedules do not make a step.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TimelineError {
    /// An action whose own forward pass was not done before.
    #[error("rank {rank}: {action:?} comes before its forward pass")]
    NotThere {
        /// Who.
        rank: usize,
        /// What.
        action: Action,
    },
    /// An action that is there twice, or that the pipeline has not.
    #[error("rank {rank}: {action:?} is there twice, or is none of this pipeline's")]
    Superfluous {
        /// Who.
        rank: usize,
        /// What.
        action: Action,
    },
    /// Actions that nobody does.
    #[error("rank {rank}: {found} actions, expected {expected}")]
    Missing {
        /// Who.
        rank: usize,
        /// Actions there are.
        found: usize,
        /// Actions there should be.
        expected: usize,
    },
    /// Every rank that is not done waits for another.
    #[error("nobody can go on: rank {rank} waits for rank {from} to do {input:?}, before {action:?}")]
    Stuck {
        /// The first of them.
        rank: usize,
        /// What it wants to do.
        action: Action,
        /// Whom it waits for.
        from: usize,
        /// What for.
        input: Action,
    },
}

/// What everything takes: `compute` by rank and action, `travel` of an action's output by the rank that did it.
pub struct Costs<C, T> {
    /// Of an action.
    pub compute: C,
    /// Of its output.
    pub travel: T,
}

struct Rank {
    next: usize,
    now: f64,
    busy: f64,
    /// When the last message to each rank arrives.
    arrived: Vec<f64>,
}

/// Runs all ranks' schedules, one for each rank of the pipeline.
///
/// # Errors
/// They do not make a step.
///
/// # Panics
/// When there is not one schedule for each rank.
pub fn timeline(
    pipeline: Pipeline,
    schedules: &[Vec<Action>],
    mut costs: Costs<impl FnMut(usize, Action) -> f64, impl FnMut(usize, Action) -> f64>,
) -> Result<Timeline, TimelineError> {
    let stages = pipeline.stages();
    assert_eq!(schedules.len(), stages, "a schedule for each rank");
    let new = || Rank { next: 0, now: 0.0, busy: 0.0, arrived: vec![0.0; stages] };
    let mut ranks: Vec<Rank> = (0..stages).map(|_| new()).collect();
    // By who did it and what: when its output leaves, and when it is there.
    let mut done: HashMap<(usize, Action), (f64, f64)> = HashMap::new();
    let mut used: Vec<Vec<Vec<(f64, f64)>>> = vec![vec![Vec::new(); stages]; stages];
    loop {
        let (mut moves, mut stuck) = (false, None);
        for rank in 0..stages {
            while let Some(&action) = schedules[rank].get(ranks[rank].next) {
                check(pipeline, rank, action, &done)?;
                let start = match pipeline.before(rank, action) {
                    None => ranks[rank].now,
                    Some(input) => match done.get(&input) {
                        Some(&(sent, there)) => {
                            let start = ranks[rank].now.max(there);
                            used[rank][input.0].push((sent, start));
                            start
                        }
                        None => {
                            let (from, input) = input;
                            stuck.get_or_insert(TimelineError::Stuck { rank, action, from, input });
                            break;
                        }
                    },
                };
                let cost = (costs.compute)(rank, action);
                let own = &mut ranks[rank];
                (own.now, own.busy, own.next) = (start + cost, own.busy + cost, own.next + 1);
                let mut there = own.now;
                if let Some((to, _)) = pipeline.after(rank, action) {
                    there = (own.now + (costs.travel)(rank, action)).max(own.arrived[to]);
                    own.arrived[to] = there;
                }
                done.insert((rank, action), (own.now, there));
                moves = true;
            }
        }
        match stuck {
            None => break,
            Some(stuck) if !moves => return Err(stuck),
            Some(_) => {}
        }
    }
    let expected = 2 * pipeline.micro_batches() * pipeline.virtual_stages();
    if let Some(rank) = (0..stages).find(|&rank| schedules[rank].len() != expected) {
        return Err(TimelineError::Missing { rank, found: schedules[rank].len(), expected });
    }
    Ok(Timeline {
        end: ranks.iter().map(|rank| rank.now).fold(0.0, f64::max),
        busy: ranks.iter().map(|rank| rank.busy).collect(),
        unused_max: used.iter().map(|from| from.iter().map(|intervals| at_once(intervals)).collect()).collect(),
    })
}

fn check(
    pipeline: Pipeline,
    rank: usize,
    action: Action,
    done: &HashMap<(usize, Action), (f64, f64)>,
) -> Result<(), TimelineError> {
    let exists = action.piece < pipeline.virtual_stages() && action.micro_batch < pipeline.micro_batches();
    if !exists || done.contains_key(&(rank, action)) {
        return Err(TimelineError::Superfluous { rank, action });
    }
    let forward = Action { pass: Pass::Forward, ..action };
    if action.pass == Pass::Backward && !done.contains_key(&(rank, forward)) {
        return Err(TimelineError::NotThere { rank, action });
    }
    Ok(())
}

/// The most intervals that hold one moment. What ends when another begins counts with it.
fn at_once(intervals: &[(f64, f64)]) -> usize {
    let mut events: Vec<(f64, bool)> = intervals.iter().flat_map(|&(from, to)| [(from, false), (to, true)]).collect();
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut now, mut most) = (0usize, 0);
    for (_, ends) in events {
        if ends {
            now -= 1;
        } else {
            now += 1;
            most = most.max(now);
        }
    }
    most
}
