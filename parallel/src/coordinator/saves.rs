//! Checkpoints on their way: parts from every rank, then one commit a folder, then everybody knows.

use std::collections::BTreeMap;

use super::MESSAGE_BYTES_MAX;
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{Commit, Committed, Part, Settled};

/// So many checkpoints may be on their way; a further one gives up the oldest, for which somebody has not answered.
const OPEN_MAX: usize = 8;
/// What a commit holds besides its parts, and what goes around each part.
const COMMIT_BYTES: usize = 1 << 10;
const AROUND_PART_BYTES: usize = 16;

/// The checkpoints that are being written.
#[derive(Debug)]
pub(super) struct Saves {
    ranks: usize,
    token: String,
    open: BTreeMap<u64, Save>,
}

#[derive(Debug)]
struct Save {
    parts: Vec<Option<Result<String, String>>>,
    /// The leads' answers, once they were told to commit.
    committed: Option<BTreeMap<usize, Option<Result<(), String>>>>,
}

impl Saves {
    pub(super) fn new(ranks: usize, token: &str) -> Self {
        Self { ranks, token: token.to_owned(), open: BTreeMap::new() }
    }

    /// A rank's part is durable, or failed. When all are here, every lead commits its folder, or all drop the step.
    pub(super) fn part(&mut self, rank: usize, part: Part, lead_of: &[usize]) -> Vec<(usize, To)> {
        let (step, ranks) = (part.step, self.ranks);
        let mut sends = Vec::new();
        if !self.open.contains_key(&step)
            && self.open.len() >= OPEN_MAX
            && let Some((&oldest, _)) = self.open.first_key_value()
        {
            let what = format!("{} has not answered, and {OPEN_MAX} checkpoints are under way", self.missing(oldest));
            sends = self.settle(oldest, Some(what));
        }
        let save = self.open.entry(step).or_insert_with(|| Save { parts: vec![None; ranks], committed: None });
        if save.committed.is_some() {
            tracing::warn!(rank, step, "a second part of a checkpoint that is being committed is ignored");
            return sends;
        }
        save.parts[rank] = Some(part.error.map_or(Ok(part.json), Err));
        if save.parts.iter().any(Option::is_none) {
            return sends;
        }
        if let Some((rank, error)) = failure(save.parts.iter().enumerate()) {
            sends.extend(self.settle(step, Some(format!("rank {rank}: {error}"))));
            return sends;
        }
        let of = |lead: usize| -> Vec<String> {
            let own = save.parts.iter().zip(lead_of).filter(move |&(_, &of)| of == lead);
            own.filter_map(|(part, _)| part.clone()?.ok()).collect()
        };
        let id = id(&self.token, step);
        let commit = |lead| Commit { step, id: id.clone(), parts: of(lead) };
        let commits: Vec<(usize, Commit)> = leads(lead_of).map(|lead| (lead, commit(lead))).collect();
        if let Some(bytes) = commits.iter().map(|(_, commit)| bytes(commit)).find(|&bytes| bytes > MESSAGE_BYTES_MAX) {
            let what = format!("the list of its parts has {bytes} bytes, a message at most {MESSAGE_BYTES_MAX}");
            sends.extend(self.settle(step, Some(what)));
            return sends;
        }
        save.committed = Some(leads(lead_of).map(|lead| (lead, None)).collect());
        sends.extend(commits.into_iter().map(|(lead, commit)| (lead, To::Commit(commit))));
        sends
    }

    /// A folder has the checkpoint, or will not have it. When all have answered, everybody is told.
    pub(super) fn committed(&mut self, rank: usize, committed: Committed) -> Vec<(usize, To)> {
        let step = committed.step;
        let save = self.open.get_mut(&step);
        let Some(answers) = save.and_then(|save| save.committed.as_mut()).filter(|answers| answers.contains_key(&rank))
        else {
            tracing::warn!(rank, step, "nobody asked this rank to commit this checkpoint: ignored");
            return Vec::new();
        };
        answers.insert(rank, Some(committed.error.map_or(Ok(()), Err)));
        if answers.values().any(Option::is_none) {
            return Vec::new();
        }
        let error = failure(answers.iter().map(|(&rank, answer)| (rank, answer)));
        self.settle(step, error.map(|(rank, error)| format!("rank {rank}: {error}")))
    }

    fn settle(&mut self, step: u64, error: Option<String>) -> Vec<(usize, To)> {
        self.open.remove(&step);
        let settled = Settled { step, id: id(&self.token, step), error };
        (0..self.ranks).map(|rank| (rank, To::Settled(settled.clone()))).collect()
    }

    /// "rank 1": the first that a checkpoint still waits for.
    fn missing(&self, step: u64) -> String {
        let save = self.open.get(&step);
        let part = save.and_then(|save| save.parts.iter().position(Option::is_none));
        let lead = || save?.committed.as_ref()?.iter().find(|(_, answer)| answer.is_none()).map(|(&rank, _)| rank);
        part.or_else(lead).map_or_else(|| "nobody".into(), |rank| format!("rank {rank}"))
    }
}

/// The ranks that commit a folder each.
fn leads(lead_of: &[usize]) -> impl Iterator<Item = usize> {
    lead_of.iter().enumerate().filter(|&(rank, &lead)| rank == lead).map(|(rank, _)| rank)
}

/// What a commit takes as a message, at most.
fn bytes(commit: &Commit) -> usize {
    COMMIT_BYTES + commit.parts.iter().map(|part| part.len() + AROUND_PART_BYTES).sum::<usize>()
}

fn failure<'a, T: 'a>(
    mut results: impl Iterator<Item = (usize, &'a Option<Result<T, String>>)>,
) -> Option<(usize, String)> {
    results.find_map(|(rank, result)| match result {
        Some(Err(error)) => Some((rank, error.clone())),
        _ => None,
    })
}

/// The common id of one commit over all folders.
fn id(token: &str, step: u64) -> String {
    blake3::hash(format!("{token} {step}").as_bytes()).to_hex()[..32].to_owned()
}
