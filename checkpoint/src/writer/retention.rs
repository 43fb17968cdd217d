//! Which checkpoints stay: a pure function that gives its reasons.

use std::collections::BTreeMap;

/// Which checkpoints stay. Whatever one of the three keeps, stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// How many of the newest, the one just committed among them; 0 keeps all.
    pub keep_last: usize,
    /// Those of every so many steps; 0 for none.
    pub keep_every: u64,
    /// How many of those with the lowest [`SCORE`]; 0 for none.
    pub keep_best: usize,
}

/// The number in a checkpoint's state that tells how good it is: less is better. One that has none is not among the best.
pub const SCORE: &str = "eval_loss";

/// Why a checkpoint stays, or that it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was committed just now.
    Newest,
    /// Its step is a later one: a run that was rewound has left it, and nobody asked for its removal.
    Later,
    /// It is one of the last.
    Last,
    /// Its step is a multiple of [`Retention::keep_every`].
    Every,
    /// It is one of the best.
    Best,
    /// Nothing keeps it.
    Removed,
}

impl Retention {
    /// The last so many, and no others; 0 keeps all.
    #[must_use]
    pub const fn last(keep_last: usize) -> Self {
        Self { keep_last, keep_every: 0, keep_best: 0 }
    }

    /// What becomes of the checkpoints of these steps, with the score of each, after `step` was committed. The one of `step`
    /// stays whatever else is said, and only those below it may go.
    #[must_use]
    pub fn judge(&self, scores: &BTreeMap<u64, Option<f64>>, step: u64) -> BTreeMap<u64, Verdict> {
        let last = if self.keep_last == 0 { usize::MAX } else { self.keep_last };
        let up_to = || scores.range(..=step);
        let last: Vec<u64> = up_to().rev().take(last).map(|(&step, _)| step).collect();
        let scored = up_to().filter_map(|(&step, &score)| Some((score.filter(|score| score.is_finite())?, step)));
        let mut best: Vec<(f64, u64)> = scored.collect();
        // Of equal ones the later: it has seen more.
        best.sort_by(|(a, early), (b, late)| a.total_cmp(b).then(late.cmp(early)));
        best.truncate(self.keep_best);
        let verdict = |other: u64| match () {
            () if other == step => Verdict::Newest,
            () if other > step => Verdict::Later,
            () if last.contains(&other) => Verdict::Last,
            () if self.keep_every > 0 && other.is_multiple_of(self.keep_every) => Verdict::Every,
            () if best.iter().any(|&(_, best)| best == other) => Verdict::Best,
            () => Verdict::Removed,
        };
        scores.keys().map(|&other| (other, verdict(other))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`Retention::judge`] says of `steps`, in their order, as one letter each.
    fn check(steps: &[(u64, Option<f64>)], step: u64, retention: Retention) -> String {
        let verdicts = retention.judge(&steps.iter().copied().collect(), step);
        assert_eq!(verdicts.len(), steps.len());
        let letter = |(step, _): &(u64, _)| match verdicts[step] {
            Verdict::Newest => 'n',
            Verdict::Later => '>',
            Verdict::Last => 'l',
            Verdict::Every => 'e',
            Verdict::Best => 'b',
            Verdict::Removed => '-',
        };
        steps.iter().map(letter).collect()
    }

    #[test]
    fn what_stays_and_why() {
        let plain: Vec<(u64, Option<f64>)> = [10, 20, 30, 40].map(|step| (step, None)).to_vec();
        let keep = |keep_last, keep_every, keep_best| Retention { keep_last, keep_every, keep_best };
        assert_eq!(check(&plain, 40, keep(2, 0, 0)), "--ln");
        assert_eq!(check(&plain, 40, keep(1, 0, 0)), "---n");
        assert_eq!(check(&plain, 40, keep(0, 0, 0)), "llln");
        assert_eq!(check(&plain, 40, keep(9, 0, 0)), "llln");
        assert_eq!(check(&plain, 20, keep(1, 0, 0)), "-n>>", "later steps are left alone");
        assert_eq!(check(&plain, 40, keep(1, 20, 0)), "-e-n");
        assert_eq!(check(&plain, 40, keep(2, 10, 0)), "eeln");
        assert_eq!(check(&plain, 40, keep(1, 7, 0)), "---n");
        assert_eq!(check(&plain, 40, keep(1, 0, 3)), "---n", "nothing was evaluated");
        let scored = [(10, Some(2.0)), (20, Some(1.0)), (30, None), (40, Some(3.0)), (50, Some(9.0))];
        assert_eq!(check(&scored, 50, keep(1, 0, 1)), "-b--n");
        assert_eq!(check(&scored, 50, keep(1, 0, 2)), "bb--n");
        assert_eq!(check(&scored, 50, keep(2, 10, 1)), "eeeln", "the first reason is told");
        assert_eq!(check(&scored, 50, keep(1, 0, 99)), "bb-bn", "the newest is one of the best, too, and named once");
        assert_eq!(check(&scored, 20, keep(1, 0, 1)), "-n>>>", "a later one takes nobody's place");
        let odd = [(10, Some(f64::NAN)), (20, Some(f64::NEG_INFINITY)), (30, Some(1.0)), (40, Some(1.0)), (50, None)];
        assert_eq!(check(&odd, 50, keep(1, 0, 1)), "---bn", "what is not finite is no score; of equals the later");
    }

    /// Over any run, whatever is kept: the newest always, and a best one until a better comes.
    #[test]
    fn the_newest_is_never_removed() {
        for (keep_last, keep_every, keep_best) in [(1, 0, 0), (1, 3, 1), (2, 0, 2), (0, 1, 0), (5, 7, 3)] {
            let retention = Retention { keep_last, keep_every, keep_best };
            let mut held: BTreeMap<u64, Option<f64>> = BTreeMap::new();
            let mut all: Vec<(u64, f64)> = Vec::new();
            for step in 1..=60u64 {
                let score = ((step * 37) % 61) as f64;
                held.insert(step, (step % 2 == 0).then_some(score));
                all.extend((step % 2 == 0).then_some((step, score)));
                for (other, verdict) in retention.judge(&held, step) {
                    assert!(other != step || verdict == Verdict::Newest);
                    if verdict == Verdict::Removed {
                        held.remove(&other);
                    }
                }
                all.sort_by(|a, b| a.1.total_cmp(&b.1));
                let best = all.iter().take(keep_best);
                assert!(best.clone().all(|(step, _)| held.contains_key(step)), "{retention:?} after {step}: {held:?}");
                let every = (1..=step).filter(|step| keep_every > 0 && step % keep_every == 0);
                assert!(every.clone().all(|step| held.contains_key(&step)));
            }
        }
    }
}
