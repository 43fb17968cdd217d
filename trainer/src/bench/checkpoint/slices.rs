//! Steps in turns: some beside something, some while it is held back, and so on until it is over.

use super::work::{Work, mean};
use crate::error::Result;

/// Seconds of a turn, about: short beside the changes of a machine's speed, and long beside the time in which something lets
/// itself be held back.
const TURN_S: f64 = 0.12;
/// Steps of a turn that count, at the least.
const STEPS_MIN: usize = 3;

/// The steps of all turns.
#[derive(Debug, Default)]
pub(super) struct Slices {
    /// Turns beside it, each with those before and after it while it was held back.
    turns: Vec<Turn>,
}

#[derive(Clone, Debug)]
struct Turn {
    busy: Vec<f64>,
    quiet: Vec<f64>,
}

impl Slices {
    /// Takes turns until it is over; `switch` lets it go on or holds it back, and says whether it is over.
    ///
    /// # Errors
    /// What `switch` says.
    pub(super) fn measure(work: &mut Work, mut switch: impl FnMut(bool) -> Result<bool>) -> Result<Self> {
        let steps = ((TURN_S / work.step_s()) as usize).max(STEPS_MIN);
        // In the first step it may not have noticed yet.
        let turn = |work: &mut Work| {
            work.step_s();
            work.steps_s(steps)
        };
        let mut turns = Vec::new();
        switch(false)?;
        let mut before = turn(work);
        loop {
            let over = switch(true)?;
            let busy = turn(work);
            // It may have come to its end in the middle of this turn, which does not count then, unless it is the only one.
            let over = switch(false)? || over;
            if over && !turns.is_empty() {
                return Ok(Self { turns });
            }
            let after = turn(work);
            turns.push(Turn { busy, quiet: [before, after.clone()].concat() });
            before = after;
            if over {
                return Ok(Self { turns });
            }
        }
    }

    /// How many turns there were beside it.
    pub(super) const fn busy(&self) -> usize {
        self.turns.len()
    }

    /// Of each turn the mean step beside it, over that of the turns around it.
    pub(super) fn ratios(&self) -> Vec<f64> {
        self.turns.iter().map(|turn| mean(&turn.busy) / mean(&turn.quiet)).collect()
    }

    /// The mean of all steps beside it over that of the others.
    pub(super) fn sum_ratio(&self) -> f64 {
        let all = |steps: fn(&Turn) -> &Vec<f64>| mean(&self.turns.iter().flat_map(steps).copied().collect::<Vec<_>>());
        all(|turn| &turn.busy) / all(|turn| &turn.quiet)
    }
}

impl<'a> FromIterator<&'a Self> for Slices {
    fn from_iter<T: IntoIterator<Item = &'a Self>>(all: T) -> Self {
        Self { turns: all.into_iter().flat_map(|slices| &slices.turns).cloned().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_taken_until_it_is_over_and_the_last_of_several_does_not_count() {
        for (allowed, counted) in [(1, 1), (2, 1), (5, 4)] {
            let mut work = Work::new(1);
            let (mut on_before, mut begun) = (true, 0);
            let slices = Slices::measure(&mut work, |on| {
                assert_ne!(on, on_before, "it is let go on and held back in turns");
                on_before = on;
                begun += usize::from(on);
                Ok(!on && begun == allowed)
            });
            let slices = slices.expect("it says nothing");
            assert_eq!((begun, slices.busy()), (allowed, counted), "of {allowed}");
            assert!(slices.turns.iter().all(|turn| turn.quiet.len() == 2 * turn.busy.len()));
        }
    }

    #[test]
    fn ratios_are_of_a_turn_and_its_neighbours() {
        let turn = |busy: f64, quiet: [f64; 2]| Turn { busy: vec![busy; 2], quiet: quiet.to_vec() };
        let slices = Slices { turns: vec![turn(3.0, [1.0, 2.0]), turn(9.0, [2.0, 4.0])] };
        assert_eq!(slices.ratios(), [2.0, 3.0]);
        assert_eq!(slices.sum_ratio(), 6.0 / 2.25);
        let both: Slices = [&slices, &slices].into_iter().collect();
        assert_eq!(both.busy(), 4);
    }
}
