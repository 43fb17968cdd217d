//! Who may join, and as which rank.

use std::time::Duration;

use super::worker::Worker;
use super::{NAME_CHARS_MAX, Output, State, line};
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{Hello, Refused, Welcome};

/// A worker that keeps being refused, or a stranger, may write so often into the log.
const REFUSAL_LOGGED_EVERY: Duration = Duration::from_secs(1);

impl State {
    pub(super) fn hello(
        &mut self,
        now: Duration,
        connection: u64,
        hello: &Hello,
        differences: &[String],
        out: &mut Vec<Output>,
    ) {
        match self.place(hello, differences) {
            Ok(rank) => {
                let welcome = Welcome {
                    rank: rank as u32,
                    ranks: self.options.ranks as u32,
                    recipe: self.options.recipe.clone(),
                    name: self.options.name.clone(),
                    resume: self.options.resume,
                    resume_from_earlier: self.options.resume_from_earlier,
                    resume_without_residuals: self.options.resume_without_residuals,
                    peer_timeout_s: self.options.peer_timeout.as_secs_f64(),
                    restart: self.options.restart,
                    host: self.options.host.clone(),
                    pid: self.options.pid,
                    choose_codec_anew: self.options.choose_codec_anew,
                    metrics_address: self.options.metrics_address.clone(),
                };
                out.push(Output::Send { connection, what: To::Welcome(welcome) });
                self.workers.insert(rank, Worker::new(now, connection, line(&hello.host, NAME_CHARS_MAX), hello.pid));
            }
            Err((why, again)) => {
                if self.refusal_logged.is_none_or(|at| now.saturating_sub(at) >= REFUSAL_LOGGED_EVERY) {
                    self.refusal_logged = Some(now);
                    tracing::warn!(host = line(&hello.host, NAME_CHARS_MAX), pid = hello.pid, why, "refused a worker");
                }
                out.push(Output::Send { connection, what: To::Refused(Refused { why, again }) });
                out.push(Output::Close { connection });
            }
        }
    }

    /// The rank of a new worker, or why it has none, and whether it may be welcome later.
    fn place(&self, hello: &Hello, differences: &[String]) -> Result<usize, (String, bool)> {
        let ranks = self.options.ranks;
        if self.ended.is_some() {
            return Err(("the run is ending".into(), true));
        }
        if hello.version != self.options.version {
            let (theirs, ours) = (line(&hello.version, NAME_CHARS_MAX), &self.options.version);
            return Err((
                format!("it is version {theirs}, the coordinator is {ours}: run the same build on every machine"),
                false,
            ));
        }
        if !differences.is_empty() {
            return Err((format!("its recipe differs from the coordinator's:\n  {}", differences.join("\n  ")), false));
        }
        let wanted = hello.rank.map(|rank| rank as usize);
        if let Some(rank) = wanted.filter(|&rank| rank >= ranks) {
            return Err((format!("it asks for rank {rank}, the recipe's mesh has ranks 0 to {}", ranks - 1), false));
        }
        // A rank whose connection is gone ends the run in a moment; its successor is welcome to the next one.
        let ending = self.workers.values().any(|worker| worker.closed.is_some());
        match wanted.or_else(|| (0..ranks).find(|rank| !self.workers.contains_key(rank))) {
            Some(rank) if !self.workers.contains_key(&rank) => Ok(rank),
            Some(rank) => {
                Err((format!("{} has joined already: give each worker a rank of its own", self.name(rank)), ending))
            }
            None => Err((format!("the recipe's mesh has {ranks} ranks and all of them have joined"), ending)),
        }
    }
}
