//! What two regions of one tensor have in common.
//!
//! The interval of a region of `n` dimensions is at most `2 n - 1` boxes: a part of a row, whole rows, a part of a row, and
//! so on for planes. Two regions share what their boxes share, so that counting costs nothing for large tensors, and the
//! runs of what is shared are found without looking at elements.

use std::ops::Range;

use super::Region;

/// Elements that two regions have in common, one after the other in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shared {
    /// The first of them, counted from the first element of the one region.
    pub here: usize,
    /// The same, counted from the first element of the other.
    pub there: usize,
    /// How many they are.
    pub len: usize,
}

/// A box of a tensor, `start..end` in each dimension; it has an element.
#[derive(Clone)]
struct Cuboid {
    start: Vec<usize>,
    end: Vec<usize>,
}

impl Region {
    /// How many elements the two have in common. Both lie in one tensor.
    #[must_use]
    pub fn overlap(&self, other: &Self) -> usize {
        if let Some(interval) = self.in_one_box(other) {
            return interval.len();
        }
        self.common(other).iter().map(|common| common.sizes().product::<usize>()).sum()
    }

    /// The elements that the two have in common, ascending. Both lie in one tensor.
    #[must_use]
    pub fn shared(&self, other: &Self) -> Vec<Shared> {
        if let Some(interval) = self.in_one_box(other) {
            if interval.is_empty() {
                return Vec::new();
            }
            let (here, there) = (interval.start - self.flat_start, interval.start - other.flat_start);
            return vec![Shared { here, there, len: interval.len() }];
        }
        let mut shared = Vec::new();
        for common in self.common(other) {
            common.runs(self, other, &mut shared);
        }
        shared.sort_unstable();
        shared.dedup_by(|next, run| {
            let goes_on = run.here + run.len == next.here && run.there + run.len == next.there;
            run.len += if goes_on { next.len } else { 0 };
            goes_on
        });
        shared
    }

    /// What the intervals have in common, where they are of the same box, or of none that meet.
    fn in_one_box(&self, other: &Self) -> Option<Range<usize>> {
        let meet = |dim: usize| self.start[dim].max(other.start[dim]) < self.end[dim].min(other.end[dim]);
        if self.is_empty() || other.is_empty() || !(0..self.start.len()).all(meet) {
            return Some(self.flat_start..self.flat_start);
        }
        let start = self.flat_start.max(other.flat_start);
        let end = self.flat_end.min(other.flat_end);
        ((&self.start, &self.end) == (&other.start, &other.end)).then_some(start..end.max(start))
    }

    fn common(&self, other: &Self) -> Vec<Cuboid> {
        let theirs = other.boxes();
        self.boxes().iter().flat_map(|own| theirs.iter().filter_map(|their| own.meet(their))).collect()
    }

    /// The region as boxes, ascending.
    fn boxes(&self) -> Vec<Cuboid> {
        let mut found = Vec::new();
        let mut place = Cuboid { start: self.start.clone(), end: self.end.clone() };
        self.cut(0, self.flat_start..self.flat_end, &mut place, &mut found);
        found
    }

    /// Cuts an interval of the elements of the dimensions from `dim` on; `place` says where the others are.
    fn cut(&self, dim: usize, interval: Range<usize>, place: &mut Cuboid, found: &mut Vec<Cuboid>) {
        if interval.is_empty() {
            return;
        }
        let Some(&origin) = self.start.get(dim) else {
            return found.push(place.clone());
        };
        let behind: usize = (dim + 1..self.start.len()).map(|dim| self.end[dim] - self.start[dim]).product();
        let mut take = |indices: Range<usize>, rest: Option<Range<usize>>| {
            (place.start[dim], place.end[dim]) = (origin + indices.start, origin + indices.end);
            match rest {
                Some(rest) => self.cut(dim + 1, rest, place, found),
                None => found.push(place.clone()),
            }
        };
        let (first, last) = (interval.start / behind, (interval.end - 1) / behind);
        let (before, after) = (interval.start % behind, interval.end % behind);
        if first == last {
            let start = first * behind;
            take(first..first + 1, Some(interval.start - start..interval.end - start));
        } else {
            if before > 0 {
                take(first..first + 1, Some(before..behind));
            }
            let whole = first + usize::from(before > 0)..last + usize::from(after == 0);
            if !whole.is_empty() {
                take(whole, None);
            }
            if after > 0 {
                take(last..last + 1, Some(0..after));
            }
        }
        (place.start[dim], place.end[dim]) = (origin, self.end[dim]);
    }

    /// The number of an element in the region; it lies in the region.
    fn number(&self, index: &[usize]) -> usize {
        let place = |number, dim| number * (self.end[dim] - self.start[dim]) + index[dim] - self.start[dim];
        (0..index.len()).fold(0, place) - self.flat_start
    }
}

impl Cuboid {
    fn sizes(&self) -> impl Iterator<Item = usize> {
        self.start.iter().zip(&self.end).map(|(start, end)| end - start)
    }

    fn meet(&self, other: &Self) -> Option<Self> {
        let start: Vec<usize> = self.start.iter().zip(&other.start).map(|(&a, &b)| a.max(b)).collect();
        let end: Vec<usize> = self.end.iter().zip(&other.end).map(|(&a, &b)| a.min(b)).collect();
        start.iter().zip(&end).all(|(start, end)| start < end).then_some(Self { start, end })
    }

    /// The runs of this, which lies in both regions.
    fn runs(&self, here: &Region, there: &Region, runs: &mut Vec<Shared>) {
        // A run has the last dimension, and those before it while this has all that both have of what is behind.
        let (mut len, mut dims) = (1, self.start.len());
        while dims > 0 {
            dims -= 1;
            len *= self.end[dims] - self.start[dims];
            let all = |region: &Region| (self.start[dims], self.end[dims]) == (region.start[dims], region.end[dims]);
            if !all(here) || !all(there) {
                break;
            }
        }
        let mut index = self.start.clone();
        loop {
            runs.push(Shared { here: here.number(&index), there: there.number(&index), len });
            let Some(dim) = (0..dims).rev().find(|&dim| index[dim] + 1 < self.end[dim]) else { return };
            index[dim] += 1;
            index[dim + 1..dims].copy_from_slice(&self.start[dim + 1..dims]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A tensor's shape and two regions of it.
    fn two() -> impl Strategy<Value = (Vec<usize>, Region, Region)> {
        let dim = (1usize..6, [0usize..6, 0..6, 0..6, 0..6], [any::<bool>(), any::<bool>()]);
        (prop::collection::vec(dim, 0..5), [any::<[prop::sample::Index; 2]>(), any::<[prop::sample::Index; 2]>()])
            .prop_map(|(dims, flats)| {
                let shape: Vec<usize> = dims.iter().map(|(size, ..)| *size).collect();
                let region = |which: usize| {
                    let bounds = |(size, cuts, all): &(usize, [usize; 4], [bool; 2])| {
                        let (a, b) = (cuts[2 * which] % (size + 1), cuts[2 * which + 1] % (size + 1));
                        if all[which] { (0, *size) } else { (a.min(b), a.max(b)) }
                    };
                    let (start, end): (Vec<usize>, Vec<usize>) = dims.iter().map(bounds).unzip();
                    let whole = Region::of_box(start, end).expect("small");
                    let [a, b] = flats[which].map(|flat| flat.index(whole.len() + 1));
                    whole.part(a.min(b)..a.max(b))
                };
                (shape, region(0), region(1))
            })
    }

    fn places(region: &Region, shape: &[usize]) -> Vec<usize> {
        region.runs(shape).flatten().collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Against the elements, one by one.
        #[test]
        fn what_is_shared_is_what_both_have((shape, here, there) in two()) {
            let (in_here, in_there) = (places(&here, &shape), places(&there, &shape));
            prop_assert_eq!(in_here.len(), here.len());
            prop_assert!(in_here.is_sorted());
            let numbers: BTreeMap<usize, usize> = in_there.iter().enumerate().map(|(number, &at)| (at, number)).collect();
            let expected: Vec<(usize, usize)> = (in_here.iter().enumerate())
                .filter_map(|(number, at)| Some((number, *numbers.get(at)?)))
                .collect();
            let shared = here.shared(&there);
            let found: Vec<(usize, usize)> =
                shared.iter().flat_map(|run| (0..run.len).map(|i| (run.here + i, run.there + i))).collect();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(here.overlap(&there), expected.len());
            prop_assert_eq!(there.overlap(&here), expected.len());
            let joined = shared.windows(2).any(|runs| {
                (runs[0].here + runs[0].len, runs[0].there + runs[0].len) == (runs[1].here, runs[1].there)
            });
            prop_assert!(!joined, "runs are as long as they can be");
        }
    }

    #[test]
    fn a_column_of_rows_is_found_without_looking_at_elements() {
        let shape = [1 << 40, 1 << 20];
        let rows = Region::of_box(vec![0, 0], shape.to_vec()).expect("fits").part(5..(1 << 59));
        let column = Region::of_box(vec![0, 3], vec![1 << 40, 4]).expect("fits");
        assert_eq!(rows.overlap(&column), (1 << 39) - 1);
        let few = column.part(0..2);
        assert_eq!(few.shared(&rows), [Shared { here: 1, there: (1 << 20) + 3 - 5, len: 1 }]);
    }
}
