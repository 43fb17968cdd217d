//! What other ranks' messages do: gradients, sums and notes, those of the next step too.

use std::time::Instant;

use bytes::Bytes;

use super::{Work, lock};
use crate::data::engine::EngineError;
use crate::data::exchange::Exchange;
use crate::frame::{Phase, peek};
use crate::note::{Note, is_note};
use crate::trace::{Label, Track};

/// Gathered messages that a rank may be ahead.
const VALUES_AHEAD_MAX: usize = 4;

impl Work {
    pub(super) fn message(&mut self, from: usize, bytes: Bytes) -> Result<(), EngineError> {
        let step = self.step;
        if is_note(&bytes) {
            return self.note(from, bytes);
        }
        if !self.open || peek(&bytes).is_some_and(|(of, ..)| of == step + 1) {
            return self.keep(from, bytes);
        }
        let start = self.trace.as_ref().map(|_| Instant::now());
        let Some(index) = self.members.index_of(from) else {
            let what = format!("a gradient, and this rank sums its own with ranks {:?}", self.members.members());
            return Err(EngineError::OutOfTurn { from, step, what });
        };
        let phase = lock(&self.exchange).take(index, &bytes).map_err(|error| error.sent_by(from))?;
        self.progress.advance();
        if let (Some(trace), Some(start)) = (&self.trace, start) {
            let name = match phase {
                Phase::Scatter | Phase::Inner => "reduce",
                Phase::Gather => "keep",
            };
            trace.span(Track::Gradients, start, Label { of_rank: Some(from), ..Label::of(name, &bytes) });
        }
        self.encoding(None, Exchange::pump);
        Ok(())
    }

    fn note(&mut self, from: usize, bytes: Bytes) -> Result<(), EngineError> {
        let (note, epoch, number) =
            Note::read(&bytes).map_err(|error| EngineError::Note { from, step: self.step, error })?;
        let out_of_turn = |what: String| Err(EngineError::OutOfTurn { from, step: self.step, what });
        if epoch != self.group.epoch || from >= self.members.ranks() || from == self.members.rank() {
            return out_of_turn(format!("a message of epoch {epoch}, expected epoch {}", self.group.epoch));
        }
        match note {
            Note::Values(values) => {
                let queue = &mut self.values[from];
                if number != queue.back().map_or(self.round, |(last, _)| last + 1) || queue.len() >= VALUES_AHEAD_MAX {
                    return out_of_turn(format!("numbers of round {number}, this rank is at round {}", self.round));
                }
                queue.push_back((number, values));
                Ok(())
            }
            Note::Filler => {
                // Of a rank that sums with others no note is due.
                let from = self.members.index_of(from).unwrap_or(usize::MAX);
                match self.burst.take(from, number, Instant::now()) {
                    Ok(()) => {
                        self.progress.advance();
                        Ok(())
                    }
                    Err(what) => out_of_turn(what),
                }
            }
            Note::Ballot(..) if !self.open || number == self.step + 1 => self.keep(from, bytes),
            Note::Ballot(ballot, norm) if number == self.step && self.ballots[from].is_none() => {
                self.ballots[from] = Some((ballot, norm));
                self.trace_vote(from);
                Ok(())
            }
            Note::Ballot(..) => out_of_turn(format!("a ballot of step {number}")),
        }
    }

    /// Keeps what came for the next step.
    fn keep(&mut self, from: usize, bytes: Bytes) -> Result<(), EngineError> {
        let sum = self.early_bytes.get_mut(from).map(|sum| {
            *sum += bytes.len() + size_of::<(usize, Bytes)>();
            *sum
        });
        if sum.is_none_or(|sum| sum > self.early_bytes_max) {
            let what = format!("more than the {} bytes that a step may send", self.early_bytes_max);
            return Err(EngineError::OutOfTurn { from, step: self.step, what });
        }
        self.early.push((from, bytes));
        Ok(())
    }
}
