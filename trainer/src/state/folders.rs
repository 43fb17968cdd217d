//! A checkpoint in several folders, of machines that share none: whoever needs what its own does not have gets it from a rank
//! that does.
//!
//! All ranks tell each other which pieces their folders have, once, and at every load what they want that is not all in their
//! own. From that each computes the same: who sends whom which elements, in which order. What all folders together lack is an
//! error of every rank, before anything is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use checkpoint::reader::{Checkpoint, Want};
use checkpoint::{CheckpointError, layout};
use compression::Region;
use parallel::collective::SubGroup;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::mesh::Mesh;
use super::residuals::{PART, site};
use crate::error::{Error, Result};

/// What a rank may say at once: the pieces of a hundred thousand tensors are less.
const TEXT_BYTES_MAX: i64 = 1 << 30;

/// The folders in which a checkpoint lies, as one rank sees them.
#[derive(Debug)]
pub struct Folders<'a> {
    run: &'a str,
    checkpoint: &'a Checkpoint,
    others: Option<Others<'a>>,
}

/// The ranks that see other folders.
#[derive(Debug)]
struct Others<'a> {
    all: &'a SubGroup,
    /// Of each rank the one that leads its folder.
    lead_of: &'a [usize],
    /// What each folder has, by its lead.
    held: BTreeMap<usize, Held>,
}

/// What one folder has.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Held {
    files: BTreeSet<String>,
    tensors: BTreeMap<String, Vec<Region>>,
}

/// A part of a tensor that a rank wants, and that is not all in its own folder.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    tensor: String,
    shape: Vec<usize>,
    region: Region,
}

/// Elements of a request, counted in its region, ascending.
type Elements = Vec<Range<usize>>;

/// Where the elements of a request are.
struct Sources {
    /// In which folder which of them, by its lead; the asking rank's own comes first.
    from: Vec<(usize, Elements)>,
    /// Those that no folder has.
    missing: Elements,
}

impl<'a> Folders<'a> {
    /// One folder, which all ranks see.
    #[must_use]
    pub const fn one(run: &'a str, checkpoint: &'a Checkpoint) -> Self {
        Self { run, checkpoint, others: None }
    }

    /// Those of all ranks, each of which has the checkpoint of the same commit in its own; `lead_of` says of each rank which one
    /// leads the folder that it sees. All ranks call it at the same place.
    ///
    /// # Errors
    /// A rank is lost, or what it says makes no sense.
    pub fn of_all(
        run: &'a str,
        checkpoint: &'a Checkpoint,
        (all, lead_of): (&'a SubGroup, &'a [usize]),
    ) -> Result<Self> {
        let rank = all.members()[all.index()];
        let manifest = checkpoint.manifest();
        let own = (lead_of[rank] == rank).then(|| Held {
            files: manifest.files.keys().cloned().collect(),
            tensors: (manifest.tensors.iter())
                .map(|(name, entry)| (name.clone(), entry.pieces.iter().map(|piece| piece.region.clone()).collect()))
                .collect(),
        });
        let held = tell_all(all, "resume/which pieces are where", &own.unwrap_or_default())?;
        let held = held.into_iter().enumerate().filter(|(rank, _)| lead_of[*rank] == *rank).collect();
        Ok(Self { run, checkpoint, others: Some(Others { all, lead_of, held }) })
    }

    /// What there is in this rank's own.
    #[must_use]
    pub const fn here(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Whether any of them has something of the tensor of this name.
    #[must_use]
    pub fn has(&self, tensor: &str) -> bool {
        let there = |others: &Others<'_>| others.held.values().any(|held| held.tensors.contains_key(tensor));
        self.checkpoint.has(tensor) || self.others.as_ref().is_some_and(there)
    }

    /// Reads these parts to where they are wanted, from whichever folder has them. Where there are several, all ranks call it at
    /// the same place, each with its own wants, or with none. Memory: a message beside what is wanted, and 16 bytes for each run
    /// of elements that two boxes have in common.
    ///
    /// # Errors
    /// Elements that are in no folder; what is damaged; a rank is lost.
    pub fn load(&self, wants: &mut [Want<'_>]) -> Result<()> {
        let Some(others) = &self.others else {
            return self.checkpoint.load(wants).map(|_| ()).map_err(|error| match error {
                CheckpointError::Absent { tensor, absent, .. } => {
                    self.gone(&tensor, absent.first().cloned().unwrap_or_default())
                }
                other => other.into(),
            });
        };
        let rank = others.all.members()[others.all.index()];
        // An owner of nothing of a tensor needs nobody to name it.
        let some = wants.iter_mut().filter(|want| !want.region.is_empty());
        let (mut near, mut far): (Vec<_>, Vec<_>) = some.partition(|want| self.is_here(want));
        let request = |want: &&mut Want<'_>| Request {
            tensor: want.tensor.to_owned(),
            shape: want.shape.to_vec(),
            region: want.region.clone(),
        };
        let own: Vec<Request> = far.iter().map(request).collect();
        let requests: Vec<Vec<Request>> = tell_all(others.all, "resume/who lacks what", &own)?;
        let each =
            || requests.iter().enumerate().flat_map(|(to, asked)| asked.iter().map(move |request| (to, request)));
        for (to, request) in each() {
            if let Some(first) = others.sources(to, request).missing.first() {
                let Request { tensor, shape, region } = request;
                let run = region.part(first.clone()).runs(shape).next();
                return Err(self.gone(tensor, run.unwrap_or_default()));
            }
        }
        let mut here: Vec<Want<'_>> = near.iter_mut().map(|want| again(want)).collect();
        self.checkpoint.load(&mut here)?;
        let (mut next, mut sent) = (0, 0);
        for (to, request) in each() {
            let out = if to == rank { Some(&mut *far[next].out) } else { None };
            next += usize::from(to == rank);
            self.serve(others, (to, request), out, &mut sent)?;
        }
        Ok(())
    }

    /// Whether all of it is in this rank's folder.
    fn is_here(&self, want: &Want<'_>) -> bool {
        let pieces = self.checkpoint.manifest().tensors.get(want.tensor).map(|entry| &entry.pieces);
        let held = pieces.into_iter().flatten().map(|piece| piece.region.overlap(&want.region));
        held.sum::<usize>() == want.region.len()
    }

    /// Brings the elements of one request to `out`, which the asking rank has; `sent` counts them, on all ranks alike.
    fn serve(
        &self,
        others: &Others<'_>,
        (to, request): (usize, &Request),
        mut out: Option<&mut [f32]>,
        sent: &mut usize,
    ) -> Result<()> {
        let rank = others.all.members()[others.all.index()];
        let site = site("resume", &request.tensor);
        for (lead, elements) in others.sources(to, request).from {
            for some in messages(&elements) {
                let count: usize = some.iter().map(ExactSizeIterator::len).sum();
                let is_own = lead == others.lead_of[to];
                if let Some(out) = &mut out {
                    let mut values = vec![0.0; count];
                    match is_own {
                        true => self.read(request, &some, &mut values)?,
                        false => others.all.receive(&site, lead, &mut values)?,
                    }
                    put(&values, &some, out);
                } else if lead == rank && !is_own {
                    let mut values = vec![0.0; count];
                    self.read(request, &some, &mut values)?;
                    others.all.send(&site, to, &values)?;
                }
                *sent += if is_own { 0 } else { count };
                if *sent >= PART {
                    *sent = 0;
                    // Who sends does not wait: without this it would be ahead by the whole checkpoint.
                    others.all.barrier("resume/what was sent")?;
                }
            }
        }
        Ok(())
    }

    /// Reads some elements of a request, one after the other.
    fn read(&self, request: &Request, elements: &[Range<usize>], values: &mut [f32]) -> Result<()> {
        let mut rest = values;
        let wants = elements.iter().map(|range| {
            let (out, more) = std::mem::take(&mut rest).split_at_mut(range.len());
            rest = more;
            let (tensor, shape, region) = (&*request.tensor, &*request.shape, request.region.part(range.clone()));
            Want { tensor, shape, region, out }
        });
        self.checkpoint.load(&mut wants.collect::<Vec<_>>())?;
        Ok(())
    }

    /// These elements are in no folder.
    fn gone(&self, tensor: &str, elements: Range<usize>) -> Error {
        let step = self.checkpoint.step();
        let before = super::meta(self.checkpoint).and_then(|meta| Mesh::of(self.checkpoint, &meta));
        let (of, absent) = match before {
            Ok(before) => {
                let absent = (0..before.ranks()).filter(|&writer| !self.has_file_of(writer));
                let said = |writer| format!("what rank {writer} wrote on host {}", before.host_of_rank(writer));
                (format!(" of {before}"), absent.map(said).collect())
            }
            Err(_) => (String::new(), Vec::new()),
        };
        let who = if absent.is_empty() { "some of it".to_owned() } else { absent.join(", and ") };
        Error::Run {
            name: self.run.into(),
            what: format!(
                "its checkpoint of step {step} is{of}, and {who} is in no run folder of the ranks that are here: elements \
                 {elements:?} of {tensor} are missing\nstart a worker on that machine too, or copy its folder of that \
                 checkpoint to a machine that takes part"
            ),
        }
    }

    fn has_file_of(&self, writer: usize) -> bool {
        let names = [layout::shard(writer), layout::packed_shard(writer)];
        let there =
            |others: &Others<'_>| others.held.values().any(|held| names.iter().any(|name| held.files.contains(name)));
        names.iter().any(|name| self.checkpoint.manifest().files.contains_key(name))
            || self.others.as_ref().is_some_and(there)
    }
}

impl Others<'_> {
    /// Where the elements of a rank's request are: as many as there are in its own folder, and the rest in the first that has it.
    fn sources(&self, to: usize, Request { tensor, region, .. }: &Request) -> Sources {
        let own = self.lead_of[to];
        let leads = std::iter::once(own).chain(self.held.keys().copied().filter(|&lead| lead != own));
        let mut from = Vec::new();
        let mut missing = Elements::from_iter((!region.is_empty()).then(|| 0..region.len()));
        for lead in leads {
            let pieces = self.held[&lead].tensors.get(tensor).into_iter().flatten();
            let mut held: Elements = pieces
                .filter(|piece| piece.start.len() == region.start.len())
                .flat_map(|piece| region.shared(piece))
                .map(|run| run.here..run.here + run.len)
                .collect();
            held.sort_unstable_by_key(|range| range.start);
            let (found, rest) = divide(&missing, &held);
            if !found.is_empty() {
                from.push((lead, found));
            }
            missing = rest;
            if missing.is_empty() {
                break;
            }
        }
        Sources { from, missing }
    }
}

/// What of `ranges` is in `held`, and what is not; all ascend.
fn divide(ranges: &[Range<usize>], held: &[Range<usize>]) -> (Elements, Elements) {
    let (mut found, mut rest) = (Elements::new(), Elements::new());
    let mut next = 0;
    for range in ranges {
        let mut start = range.start;
        while next < held.len() && held[next].end <= start {
            next += 1;
        }
        for other in held[next..].iter().take_while(|other| other.start < range.end) {
            let (from, to) = (other.start.max(start), other.end.min(range.end));
            if from >= to {
                continue;
            }
            if start < from {
                rest.push(start..from);
            }
            match found.last_mut() {
                Some(last) if last.end == from => last.end = to,
                _ => found.push(from..to),
            }
            start = to;
        }
        if start < range.end {
            rest.push(start..range.end);
        }
    }
    (found, rest)
}

/// Cuts ranges into lists of at most [`PART`] elements, and of as many ranges as are read at a time.
fn messages(elements: &[Range<usize>]) -> Vec<Elements> {
    const RANGES: usize = 1 << 16;
    let (mut all, mut some, mut count) = (Vec::new(), Elements::new(), 0);
    for range in elements {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + PART - count);
            some.push(start..end);
            count += end - start;
            start = end;
            if count == PART || some.len() == RANGES {
                all.push(std::mem::take(&mut some));
                count = 0;
            }
        }
    }
    all.extend((!some.is_empty()).then_some(some));
    all
}

fn put(values: &[f32], ranges: &[Range<usize>], out: &mut [f32]) {
    let mut rest = values;
    for range in ranges {
        let (these, others) = rest.split_at(range.len());
        out[range.clone()].copy_from_slice(these);
        rest = others;
    }
}

/// The same want, for a call.
fn again<'b>(want: &'b mut Want<'_>) -> Want<'b> {
    Want { tensor: want.tensor, shape: want.shape, region: want.region.clone(), out: &mut *want.out }
}

/// What every rank says, by rank. All of them call it at the same place.
fn tell_all<T: Serialize + DeserializeOwned>(all: &SubGroup, site: &str, own: &T) -> Result<Vec<T>> {
    let fault =
        |error: serde_json::Error| Error::Text { path: site.to_owned(), what: format!("from another rank: {error}") };
    let text = serde_json::to_vec(own).map_err(fault)?;
    let mut lengths = vec![0i64; all.members().len()];
    all.all_gather(site, &[text.len() as i64], &mut lengths)?;
    let mut said = Vec::new();
    for (index, (&member, &length)) in all.members().iter().zip(&lengths).enumerate() {
        if !(0..=TEXT_BYTES_MAX).contains(&length) {
            let what = format!("expected at most {TEXT_BYTES_MAX} bytes from rank {member}, found {length}");
            return Err(Error::Text { path: site.to_owned(), what });
        }
        let mut bytes = if index == all.index() { text.clone() } else { vec![0; length as usize] };
        for part in bytes.chunks_mut(size_of::<f32>() * PART) {
            all.broadcast(site, member, part)?;
        }
        said.push(serde_json::from_slice(&bytes).map_err(fault)?);
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranges, each as its first element and the one behind its last.
    fn ranges(bounds: &[[usize; 2]]) -> Elements {
        bounds.iter().map(|&[start, end]| start..end).collect()
    }

    #[test]
    fn what_is_held_of_some_ranges_is_found_and_the_rest_is_left() {
        let check = |asked: &[[usize; 2]], held: &[[usize; 2]], found: &[[usize; 2]], rest: &[[usize; 2]]| {
            let divided = divide(&ranges(asked), &ranges(held));
            assert_eq!(divided, (ranges(found), ranges(rest)), "{asked:?} of {held:?}");
        };
        check(&[[0, 10]], &[[0, 10]], &[[0, 10]], &[]);
        check(&[[0, 10]], &[], &[], &[[0, 10]]);
        check(&[[0, 10]], &[[2, 4], [4, 6], [8, 20]], &[[2, 6], [8, 10]], &[[0, 2], [6, 8]]);
        check(&[[0, 3], [5, 9]], &[[1, 7]], &[[1, 3], [5, 7]], &[[0, 1], [7, 9]]);
        check(&[[4, 6]], &[[0, 4], [6, 8]], &[], &[[4, 6]]);
        // Two folders may have the same.
        check(&[[0, 8]], &[[0, 5], [1, 3], [3, 6]], &[[0, 6]], &[[6, 8]]);
    }

    #[test]
    fn messages_are_no_longer_than_a_call_may_bring_and_have_every_element_once() {
        let ranges = [0..PART - 1, PART..PART + 3, 2 * PART..4 * PART];
        let all = messages(&ranges);
        let lengths: Vec<usize> = all.iter().map(|some| some.iter().map(ExactSizeIterator::len).sum()).collect();
        assert_eq!(lengths, [PART, PART, PART, 2]);
        let every: Vec<usize> = all.iter().flatten().map(|range| range.start).collect();
        assert!(every.is_sorted());
        assert_eq!(lengths.iter().sum::<usize>(), ranges.iter().map(ExactSizeIterator::len).sum::<usize>());
    }
}
