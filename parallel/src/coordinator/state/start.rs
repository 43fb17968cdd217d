//! From the first greeting to the first step: what must be the same, who shares a folder, where to go on from.

use std::fmt::Write as _;

use super::worker::Worker;
use super::{NAME_CHARS_MAX, Output, Phase, State, USAGE, line};
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{Held, Look, Peer, Places, Start};

impl State {
    /// Goes to the next phase of the start when every rank is ready for it.
    pub(super) fn advance(&mut self, out: &mut Vec<Output>) {
        if self.workers.len() < self.options.ranks {
            return;
        }
        let all = |ready: fn(&Worker) -> bool| self.workers.values().all(ready);
        match self.phase {
            Phase::Joining if all(|worker| worker.prepared.is_some()) => {
                if let Err(what) = self.same_properties() {
                    return self.end(what, USAGE, out);
                }
                self.phase = Phase::Looking;
                let nonce = |worker: &Worker| worker.prepared.as_ref().map(|p| p.nonce.clone());
                let nonces = self.workers.values().filter_map(nonce).collect();
                self.to_all(&To::Look(Look { nonces }), out);
            }
            Phase::Looking if all(|worker| worker.seen.is_some()) => {
                self.lead_of = self.leads();
                self.phase = Phase::Holding;
                let lead_of = self.lead_of.iter().map(|&rank| rank as u32).collect();
                self.to_all(&To::Places(Places { lead_of }), out);
            }
            Phase::Holding if all(|worker| worker.holds.is_some()) => match self.newest_common() {
                Ok(from) => {
                    self.phase = Phase::Running;
                    let peer = |worker: &Worker| Peer {
                        data_address: worker.prepared.as_ref().map_or_else(String::new, |p| p.data_address.clone()),
                        host: worker.host.clone(),
                        pid: worker.pid,
                    };
                    let peers = self.workers.values().map(peer).collect();
                    let first_step = from.as_ref().map_or(0, |held| held.step) + 1;
                    self.workers.values_mut().for_each(|worker| worker.first_step = first_step);
                    let (epoch, token) = (self.options.epoch, self.options.token.clone());
                    self.to_all(&To::Start(Start { epoch, token, peers, from }), out);
                }
                Err(what) => self.end(what, USAGE, out),
            },
            _ => {}
        }
    }

    /// Compares what must be the same everywhere, and says all that is not.
    fn same_properties(&self) -> Result<(), String> {
        let of = |rank: usize| self.workers[&rank].prepared.iter().flat_map(|prepared| &prepared.properties);
        let value = |rank: usize, name: &str| of(rank).find(|property| property.name == name).map(|found| &found.value);
        let shown = |value: Option<&String>| value.map_or_else(|| "nothing".into(), |text| line(text, NAME_CHARS_MAX));
        let mut faults = String::new();
        for rank in 1..self.options.ranks {
            // What only one of the two has differs as well.
            let only_there = of(rank).filter(|there| value(0, &there.name).is_none());
            for name in of(0).chain(only_there).map(|property| &property.name) {
                let (first, other) = (value(0, name), value(rank, name));
                if first != other {
                    let (name, first, other) = (line(name, NAME_CHARS_MAX), shown(first), shown(other));
                    let (first_name, other_name) = (self.name(0), self.name(rank));
                    let _ = write!(faults, "\n  {name}: {first_name} has {first}, {other_name} has {other}");
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(format!("the ranks differ where they must be the same:{faults}")) }
    }

    /// For each rank the lowest one that shares its folder. Two ranks share one if each sees the other's nonce; to share
    /// is transitive, also where somebody's view of a network folder is not yet complete.
    fn leads(&self) -> Vec<usize> {
        let sees = |a: usize, b: usize| {
            let nonce = self.workers[&b].prepared.as_ref().map(|prepared| &prepared.nonce);
            nonce.is_some_and(|nonce| self.workers[&a].seen.as_ref().is_some_and(|seen| seen.contains(nonce)))
        };
        let ranks = self.options.ranks;
        let mut lead_of: Vec<usize> = (0..ranks).collect();
        for rank in 0..ranks {
            for other in (0..rank).filter(|&other| sees(rank, other) && sees(other, rank)) {
                let (a, b) = (lead_of[rank], lead_of[other]);
                lead_of.iter_mut().filter(|lead| **lead == a.max(b)).for_each(|lead| *lead = a.min(b));
            }
        }
        lead_of
    }

    /// The newest checkpoint that every folder has.
    fn newest_common(&self) -> Result<Option<Held>, String> {
        let leads: Vec<usize> = (0..self.options.ranks).filter(|&rank| self.lead_of[rank] == rank).collect();
        let held = |rank: usize| self.workers[&rank].holds.as_deref().unwrap_or_default();
        let common = held(0).iter().filter(|have| leads.iter().all(|&lead| held(lead).contains(have)));
        if let Some(newest) = common.max_by_key(|held| held.step) {
            return Ok(Some(newest.clone()));
        }
        if leads.iter().all(|&lead| held(lead).is_empty()) {
            return Ok(None);
        }
        let list = leads.iter().map(|&lead| {
            let held = held(lead).iter().map(|held| format!("step {} ({})", held.step, line(&held.id, NAME_CHARS_MAX)));
            let held: Vec<String> = held.collect();
            let held = if held.is_empty() { "none".into() } else { held.join(", ") };
            format!("\n  {}: {held}", self.name(lead))
        });
        Err(format!(
            "--resume: the machines have no checkpoint of this run in common:{}\ncopy the run's folder from the machine \
             that has the newest one; where they come from a store, remove the copies there that are damaged",
            list.collect::<String>()
        ))
    }

    /// What the start still waits for, when it has waited for too long.
    pub(super) fn who_is_missing(&self) -> String {
        let within = self.options.join_within.as_secs_f64();
        let missing = (0..self.options.ranks).filter_map(|rank| {
            let Some(worker) = self.workers.get(&rank) else { return Some(format!("\n  rank {rank} has not joined")) };
            let what = match self.phase {
                _ if worker.prepared.is_none() => "has joined but is not ready",
                Phase::Looking if worker.seen.is_none() => "has not said which run folders it sees",
                Phase::Holding if worker.holds.is_none() => "has not said which checkpoints it has",
                _ => return None,
            };
            Some(format!("\n  {} {what}: {}", self.name(rank), worker.place()))
        });
        format!(
            "the run has not started within {within} s (parallel.join_timeout_s):{}\nstart what is missing sooner, or \
             allow more time",
            missing.collect::<String>()
        )
    }
}
