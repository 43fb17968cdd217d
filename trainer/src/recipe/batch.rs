//! What a resume with other ranks or micro-batches must keep: the sequences of a step. With more or fewer of them another
//! loss would go down, and the steps that follow would read other text.

use super::raw::{Raw, Reader};

/// A step's sequences, and where they come from.
struct Batch {
    ranks: usize,
    /// Forward passes a step, of all ranks.
    passes: usize,
    /// Sequences of each.
    size: usize,
}

impl Batch {
    fn of(raw: &Raw) -> Option<Self> {
        let keys = Reader(raw);
        let ranks = keys.count("parallel.data")?;
        let passes = match keys.counts("parallel.micro_batches") {
            Some(shares) => shares.iter().sum(),
            None => keys.count("train.micro_batches")? * ranks,
        };
        Some(Self { ranks, passes, size: keys.count("train.micro_batch_size")? })
    }

    const fn sequences(&self) -> usize {
        self.passes * self.size
    }

    /// What would keep a step of so many sequences on these ranks.
    fn keeping(&self, sequences: usize) -> String {
        let Self { ranks, size, .. } = *self;
        let passes = sequences / size;
        if !sequences.is_multiple_of(size) || passes < ranks {
            let largest = sequences / ranks;
            let Some(size) = (1..=largest).rev().find(|size| sequences.is_multiple_of(*size)) else {
                return format!("at most {sequences} ranks can share them");
            };
            return format!(
                "{ranks} ranks can share them with train.micro_batch_size = {size} or another divisor below"
            );
        }
        if passes.is_multiple_of(ranks) {
            return format!("train.micro_batches = {} keeps them", passes / ranks);
        }
        let share = |rank: usize| (passes / ranks + usize::from(rank < passes % ranks)).to_string();
        let shares: Vec<String> = (0..ranks).map(share).collect();
        format!("parallel.micro_batches = [{}] keeps them", shares.join(", "))
    }
}

/// Why a run of the recipe `old` cannot go on with `new`, if the sequences of a step are not as many.
#[must_use]
pub fn fault(old: &Raw, new: &Raw) -> Option<String> {
    let (old, new) = (Batch::of(old)?, Batch::of(new)?);
    let (was, is) = (old.sequences(), new.sequences());
    let of = |batch: &Batch| format!("{} micro-batches of {} over {} ranks", batch.passes, batch.size, batch.ranks);
    (was != is).then(|| {
        format!(
            "a step of the run has {was} sequences ({}), the recipe makes it {is} ({}); {}",
            of(&old),
            of(&new),
            new.keeping(was)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::raw;
    use super::*;

    fn recipe(ranks: usize, micro_batches: usize, size: usize, shares: Option<&str>) -> Raw {
        let mut sets = vec![
            format!("parallel.data={ranks}"),
            format!("train.micro_batches={micro_batches}"),
            format!("train.micro_batch_size={size}"),
        ];
        sets.extend(shares.map(|shares| format!("parallel.micro_batches={shares}")));
        raw::read("[train]\nsteps = 3\n", &sets).0
    }

    #[test]
    fn as_many_sequences_a_step_may_come_from_other_ranks() {
        let old = recipe(2, 2, 2, None);
        for (ranks, micro_batches, size, shares) in
            [(1, 4, 2, None), (4, 1, 2, None), (3, 9, 2, Some("[2, 1, 1]")), (8, 1, 1, None), (1, 1, 8, None)]
        {
            assert_eq!(fault(&old, &recipe(ranks, micro_batches, size, shares)), None, "{ranks} ranks");
        }
    }

    #[test]
    fn another_batch_is_refused_with_the_values_that_keep_it() {
        let old = recipe(2, 2, 2, None);
        let check = |new: Raw, said: &str| {
            let what = fault(&old, &new).expect("another batch");
            assert!(what.contains("has 8 sequences (4 micro-batches of 2 over 2 ranks)"), "{what}");
            assert!(what.ends_with(said), "{what}");
        };
        check(
            recipe(4, 2, 2, None),
            "makes it 16 (8 micro-batches of 2 over 4 ranks); train.micro_batches = 1 keeps them",
        );
        check(recipe(1, 1, 2, None), "train.micro_batches = 4 keeps them");
        check(recipe(3, 2, 2, None), "parallel.micro_batches = [2, 1, 1] keeps them");
        check(recipe(8, 1, 2, None), "8 ranks can share them with train.micro_batch_size = 1 or another divisor below");
        check(recipe(2, 2, 3, None), "2 ranks can share them with train.micro_batch_size = 4 or another divisor below");
        check(recipe(9, 1, 2, None), "at most 8 ranks can share them");
    }
}
