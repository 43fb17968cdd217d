//! What the thread says once it knows: its vote, the verdict, and which sums are here.

use std::collections::VecDeque;
use std::time::Instant;

use super::{Way, Work, lock};
use crate::data::engine::burst::Burst;
use crate::data::engine::replies::Reply;
use crate::data::engine::{EngineError, Packed, Settled, Voted};
use crate::data::exchange::{Exchange, Vote};
use crate::data::norm::SquaredNorm;
use crate::note::{Ballot, Note};

impl Work {
    /// Says what is known now and was not before.
    pub(super) fn answer(&mut self) -> Result<(), EngineError> {
        self.vote()?;
        self.tell_sums()?;
        let round = |queue: &VecDeque<(u64, Vec<f64>)>| queue.front().is_some_and(|&(round, _)| round == self.round);
        if self.gathering && self.values.iter().all(round) {
            self.gathering = false;
            self.round += 1;
            let values = self.values.iter_mut().filter_map(VecDeque::pop_front).map(|(_, values)| values).collect();
            return self.reply(Reply::Gathered(values));
        }
        if self.bursting
            && let Some(bytes_per_s) = self.burst.bytes_per_s()
        {
            self.bursting = false;
            self.burst = Burst::new(self.group);
            return self.reply(Reply::Burst(bytes_per_s));
        }
        Ok(())
    }

    /// Votes when everything that the vote is about is known, and decides the step when all have.
    fn vote(&mut self) -> Result<(), EngineError> {
        let Some((ballot, sent)) = self.own else { return Ok(()) };
        let rank = self.members.rank();
        if !sent {
            let exchange = lock(&self.exchange);
            if !exchange.is_reduced() {
                return Ok(());
            }
            let (ballot, norm) =
                (Ballot { finite: ballot.finite && exchange.vote().finite, ..ballot }, exchange.norm());
            drop(exchange);
            self.own = Some((ballot, true));
            self.ballots[rank] = Some((ballot, norm));
            self.trace_vote(rank);
            self.to_all(&Note::Ballot(ballot, norm).write(self.group.epoch, self.step));
        }
        if self.ballots.iter().any(Option::is_none) {
            return Ok(());
        }
        let mut norm = SquaredNorm::default();
        let (ballots, norms): (Vec<Ballot>, Vec<SquaredNorm>) = self.ballots.iter().copied().flatten().unzip();
        norms.iter().for_each(|part| norm.merge(part));
        let votes: Vec<Vote> = ballots.iter().map(|ballot| Vote { step: self.step, finite: ballot.finite }).collect();
        let (verdict, buffers) = lock(&self.exchange).close(&votes);
        (self.own, self.voted) = (None, true);
        self.progress.waits_for(None);
        self.progress.collective(format!("votes of step {}", self.step));
        // Nothing goes before the sums any more.
        self.encoding(None, Exchange::pump);
        self.reply(Reply::Voted(Box::new(Voted { verdict, ballots, norm, buffers })))
    }

    /// Once all have voted, tells which sums are here; and with the last of them the step is over.
    fn tell_sums(&mut self) -> Result<(), EngineError> {
        if !self.voted {
            return Ok(());
        }
        let mut exchange = lock(&self.exchange);
        let completed = exchange.take_completed();
        let is_complete = exchange.is_complete();
        if is_complete {
            let mut way = Way {
                transport: &*self.transport,
                handed: &self.handed,
                members: &self.members,
                packing: &mut self.packing,
                nodes: self.group.nodes(),
            };
            exchange.release(&mut |out| way.hand(out));
        }
        drop(exchange);
        completed.into_iter().try_for_each(|index| self.reply(Reply::Sum(index)))?;
        if !is_complete {
            return Ok(());
        }
        (self.voted, self.open) = (false, false);
        let (packed_buckets, changes) = match &mut self.packing {
            Some(packing) => (packing.packed(), packing.take_changes()),
            None => (0, Vec::new()),
        };
        let packed = Packed { buckets: packed_buckets, changes };
        let (encode_s, first_encode, last_sum) = (self.encode_s, self.first_encode, Instant::now());
        self.progress.waits_for(None);
        self.progress.collective(format!("sums of step {}", self.step));
        self.reply(Reply::Settled(Box::new(Settled { encode_s, first_encode, last_sum, packed })))
    }
}
