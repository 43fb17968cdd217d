//! Who is lost, and whose fault it is.

use std::time::Duration;

use super::worker::Worker;
use super::{ERROR_CHARS_MAX, Output, Phase, SLEPT, State, TRY_AGAIN, interval, silence, text};
use crate::wire::control::to_worker::What as To;
use crate::wire::control::{Beat, Lost};

/// The code with which Rust ends a process that has panicked.
const PANICKED: i32 = 101;
/// How long a closed connection may wait for the system's word on how its process ended, and an ended process for its
/// last words.
const CLOSED_FOR: Duration = Duration::from_millis(200);
/// How many times longer a rank may take for what no step measures: an export, the disk.
const SLOW_TIMES: u32 = 20;

impl State {
    pub(super) fn tick(&mut self, now: Duration, out: &mut Vec<Output>) {
        let gap = now.saturating_sub(self.last_tick);
        if gap > interval(self.options.peer_timeout) * SLEPT {
            self.slept(now, gap);
        }
        self.last_tick = now;
        if self.ended.is_some() {
            return;
        }
        self.to_all(&To::Beat(Beat {}), out);
        if self.phase < Phase::Running && now.saturating_sub(self.began) > self.options.join_within {
            return self.end(self.who_is_missing(), TRY_AGAIN, out);
        }
        if let Some((rank, how)) = self.closed(now).or_else(|| self.silent(now)) {
            return self.lost(now, rank, &how, out);
        }
        if let Some(verdict) = self.parted(now) {
            return self.end(verdict, TRY_AGAIN, out);
        }
        self.stalled(now, out);
    }

    /// It was this process that slept: nobody was silent, and what others had to say still waits to be read.
    fn slept(&mut self, now: Duration, gap: Duration) {
        self.began += gap;
        for worker in self.workers.values_mut() {
            worker.heard = now;
            worker.advanced = now;
            if let Some((at, _)) = &mut worker.closed {
                *at = now;
            }
        }
        self.losses.values_mut().for_each(|(at, _)| *at = now);
    }

    /// A rank whose connection or process ended a while ago, and that said nothing.
    fn closed(&self, now: Duration) -> Option<(usize, String)> {
        let mut open = self.workers.iter().filter(|(_, worker)| worker.left.is_none());
        open.find_map(|(&rank, worker)| {
            let (at, how) = worker.closed.as_ref()?;
            (now.saturating_sub(*at) > CLOSED_FOR).then(|| (rank, how.clone()))
        })
    }

    /// The rank that has been silent for longest, if that is too long.
    fn silent(&self, now: Duration) -> Option<(usize, String)> {
        let open = self.workers.iter().filter(|(_, worker)| worker.left.is_none());
        let (&rank, worker) = open.min_by_key(|(_, worker)| worker.heard)?;
        let quiet = now.saturating_sub(worker.heard);
        let how = format!("has been silent for {:.1} s", quiet.as_secs_f64());
        (quiet > silence(self.options.peer_timeout)).then_some((rank, how))
    }

    pub(super) fn note_loss(&mut self, now: Duration, by: usize, lost: &Lost) {
        let about = lost.rank as usize;
        if about >= self.options.ranks || about == by {
            tracing::warn!(rank = by, about, "a report about a rank that cannot be lost to it is ignored");
            return;
        }
        // What comes later knows more: what the rank lacks.
        let (_, why) = self.losses.entry((by, about)).or_insert_with(|| (now, String::new()));
        *why = text(&lost.why, ERROR_CHARS_MAX);
    }

    /// A rank that has lost another a while ago, though that one has been heard since, or has left in good order. A dead
    /// one is found out by its silence; one that has left itself needs nobody, nor does one that waits for nobody.
    fn parted(&self, now: Duration) -> Option<String> {
        let patience = self.options.peer_timeout / 4;
        let has_left = |rank: &usize| self.workers.get(rank).is_some_and(|worker| worker.left.is_some());
        let heard = |rank: &usize, since: Duration| self.workers.get(rank).is_some_and(|worker| worker.heard > since);
        let waits = |rank: &usize| self.workers.get(rank).is_some_and(|worker| worker.mark.waits);
        let ripe = self.losses.iter().filter(|((by, about), (at, _))| {
            let is_missed = if has_left(about) { waits(by) } else { heard(about, *at) };
            now.saturating_sub(*at) > patience && !has_left(by) && heard(by, *at) && is_missed
        });
        let ((by, about), (_, why)) = ripe.min_by_key(|(_, (at, _))| *at)?;
        let though = if has_left(about) { "which has left after its last step" } else { "though both are alive" };
        let (by, about) = (self.name(*by), self.name(*about));
        Some(format!("{by} lost {about}, {though}: {why}{}", self.marks(now, None)))
    }

    /// A local process ended.
    pub(super) fn exited(&mut self, now: Duration, pid: u32, how: &str, code: Option<i32>, out: &mut Vec<Output>) {
        if self.ended.is_some() {
            return;
        }
        // In containers process ids are the same on many hosts.
        let host = self.options.host.clone();
        let found = self.workers.iter_mut().find(|(_, worker)| worker.pid == pid && worker.host == host);
        match (found, code) {
            (None, code) => {
                let code = code.and_then(|code| u8::try_from(code).ok()).filter(|&code| code > 0).unwrap_or(TRY_AGAIN);
                self.end(format!("process {pid} {how} before it had joined"), code, out);
            }
            (Some((_, worker)), _) if worker.left.is_some() => {}
            // Its last words may still be on their way.
            (Some((_, worker)), Some(code)) => {
                worker.closed = Some((now, how.to_owned()));
                worker.exit = Some(code);
            }
            // It has none. What the others lack of it may be.
            (Some((_, worker)), None) => {
                let since = worker.closed.as_ref().map_or(now, |(at, _)| *at);
                worker.closed = Some((since, how.to_owned()));
            }
        }
    }

    /// Ends a run in which somebody who does not wait for others makes no progress.
    fn stalled(&mut self, now: Duration, out: &mut Vec<Output>) {
        let stuck = |worker: &Worker| {
            let timeout = self.options.peer_timeout;
            let usual = worker.median_step().map(|median| timeout.max(median * 10));
            let limit = match (usual, &worker.mark) {
                (usual, mark) if mark.slow => Some(usual.unwrap_or(timeout) * SLOW_TIMES),
                // Whoever waits computes nothing: that needs no measure of a step.
                (usual, mark) if mark.waits => Some(usual.unwrap_or(timeout)),
                // Before the first step is complete nobody knows how long one may take.
                (usual, _) => usual,
            };
            limit.is_some_and(|limit| now.saturating_sub(worker.advanced) > limit)
        };
        let here: Vec<_> = self.workers.iter().filter(|(_, worker)| worker.left.is_none()).collect();
        let late: Vec<_> = here.iter().filter(|(_, worker)| stuck(worker)).collect();
        match late.iter().find(|(_, worker)| !worker.mark.waits) {
            Some(&&(&rank, worker)) => {
                let since = now.saturating_sub(worker.advanced).as_secs_f64();
                self.lost(now, rank, &format!("is alive but has made no progress for {since:.1} s"), out);
            }
            None if late.len() == here.len() && !late.is_empty() => {
                let marks = self.marks(now, None);
                self.end(format!("no rank makes progress and all wait for each other{marks}"), TRY_AGAIN, out);
            }
            None => {}
        }
    }

    /// Ends the run because of one rank.
    fn lost(&mut self, now: Duration, rank: usize, how: &str, out: &mut Vec<Output>) {
        let at = self.workers.get(&rank).map_or("", |worker| &worker.mark.text);
        let at = if at.is_empty() { String::new() } else { format!("; it was last seen at {at}") };
        let verdict = format!("{} {how}{at}{}", self.name(rank), self.marks(now, Some(rank)));
        let code = match self.workers.get(&rank).and_then(|worker| worker.exit) {
            // It has judged itself: another try comes to the same.
            Some(1 | PANICKED) => 1,
            Some(2) => 2,
            _ => TRY_AGAIN,
        };
        self.end(verdict, code, out);
    }

    /// Where everybody is, but for one, and what they say of the loss of that one.
    pub(super) fn marks(&self, now: Duration, but: Option<usize>) -> String {
        let others = self.workers.iter().filter(|&(&rank, _)| Some(rank) != but);
        let quiet = |worker: &Worker| {
            let quiet = now.saturating_sub(worker.heard);
            let long = worker.left.is_none() && quiet > interval(self.options.peer_timeout) * SLEPT;
            if long { format!(", silent for {:.1} s", quiet.as_secs_f64()) } else { String::new() }
        };
        let lacks = |by: usize| {
            let loss = but.and_then(|about| self.losses.get(&(by, about)));
            loss.map_or_else(String::new, |(_, why)| format!("; it says: {why}"))
        };
        let line = |(&rank, worker): (&usize, &Worker)| {
            format!("\n  {}: {}{}{}", self.name(rank), worker.place(), quiet(worker), lacks(rank))
        };
        others.map(line).collect()
    }
}
