//! How fast a link is: every rank sends a burst of filler to the next one at the same time, and times what it receives
//! from the one before it. So each end of every machine's network is loaded both ways, as it is in a step.

use std::time::Instant;

use super::Members;
use crate::data::exchange::Group;
use crate::note::{FILLER_BYTES, Note};
use crate::transport::Transport;

/// Notes of a burst: 8 MiB, which is long enough for a connection to come up to speed and takes a third of a second at
/// 200 Mbit/s.
const NOTES: u64 = 32;

/// One rank's part in it. The next burst begins when all ranks have had theirs.
#[derive(Debug)]
pub(super) struct Burst {
    group: Group,
    taken: u64,
    /// When the first note came, and the last one.
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Burst {
    pub(super) const fn new(group: Group) -> Self {
        Self { group, taken: 0, first: None, last: None }
    }

    /// Sends this rank's burst.
    pub(super) fn send(&self, transport: &dyn Transport, members: &Members) {
        let Group { rank, ranks, epoch, .. } = self.group;
        let next = members.members()[(rank + self.distance()) % ranks];
        (0..NOTES).for_each(|note| transport.send(next, Note::Filler.write(epoch, note)));
    }

    /// Takes a note that came now.
    pub(super) fn take(&mut self, from: usize, note: u64, now: Instant) -> Result<(), String> {
        if from != self.before() || note != self.taken || note >= NOTES {
            let (before, taken) = (self.before(), self.taken);
            return Err(format!("note {note} of a burst, expected note {taken} of {NOTES} from rank {before}"));
        }
        self.taken += 1;
        self.first.get_or_insert(now);
        self.last = Some(now);
        Ok(())
    }

    /// The rate, once all of it is here: what came after the first note over the time since then.
    pub(super) fn bytes_per_s(&self) -> Option<f64> {
        let (first, last) = (self.first?, self.last.filter(|_| self.taken == NOTES)?);
        // A clock may not have moved.
        let seconds = last.duration_since(first).as_secs_f64().max(1e-9);
        Some((NOTES - 1) as f64 * FILLER_BYTES as f64 / seconds)
    }

    /// What is still to come, for people.
    pub(super) fn missing(&self, members: &Members) -> String {
        format!("rank {}'s burst, of which {} of {NOTES} parts are here", members.members()[self.before()], self.taken)
    }

    const fn before(&self) -> usize {
        (self.group.rank + self.group.ranks - self.distance()) % self.group.ranks
    }

    /// To the next rank; where several are a node, to the next node, for what counts is the link between nodes.
    const fn distance(&self) -> usize {
        if self.group.nodes().count() > 1 { self.group.members } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn burst() -> Burst {
        Burst::new(Group { rank: 0, ranks: 3, members: 1, window: usize::MAX, epoch: 1, chunk_blocks: 1 })
    }

    #[test]
    fn the_rate_is_that_of_all_but_the_first_note() {
        let (mut burst, start) = (burst(), Instant::now());
        for note in 0..NOTES {
            assert_eq!(burst.bytes_per_s(), None);
            let at = start + Duration::from_secs(100) + Duration::from_millis(10) * note as u32;
            burst.take(2, note, at).expect("in order");
        }
        let expected = FILLER_BYTES as f64 / 0.01;
        assert!((burst.bytes_per_s().expect("complete") / expected - 1.0).abs() < 1e-9);
    }

    #[test]
    fn another_rank_another_order_and_one_note_too_many_are_refused() {
        let (mut burst, now) = (burst(), Instant::now());
        assert_eq!(
            burst.take(1, 0, now),
            Err("note 0 of a burst, expected note 0 of 32 from rank 2".into()),
            "rank 1 is not the one before rank 0"
        );
        assert!(burst.take(2, 1, now).is_err());
        (0..NOTES).for_each(|note| burst.take(2, note, now).expect("in order"));
        assert!(burst.take(2, NOTES, now).is_err());
    }
}
