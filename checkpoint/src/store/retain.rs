//! Which copies stay, and what becomes of the others and of left-overs.
//!
//! A copy is removed in the order opposite to that in which it came: announced in `manifest.json.partial`, then the manifest,
//! which ends it, then the files, and the announcement last. So what a crash leaves has no manifest and says itself which
//! objects are ours; no other object is ever deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;

use super::shelf::{At, Listing, Seat, Shelf, is_complete};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::Manifest;
use crate::writer::{Retention, SCORE, Verdict};

/// The complete copies of a seat, with the score of each where `retention` asks for it. One whose manifest is damaged has none.
///
/// # Errors
/// A manifest that could not be read: it may be the best one's, and without its score it would be removed.
pub(super) async fn scores(
    shelf: &Shelf,
    listing: &Listing,
    seat: Seat,
    retention: &Retention,
) -> Result<BTreeMap<u64, Option<f64>>, CheckpointError> {
    let mut scores = BTreeMap::new();
    for (&at, _) in listing.iter().filter(|(at, objects)| at.seat == seat && is_complete(objects)) {
        let score = match retention.keep_best {
            0 => None,
            _ => match manifest(shelf, at).await {
                Ok((manifest, _)) => score(&manifest),
                Err(error) if error.is_damage() => None,
                Err(error) => return Err(error),
            },
        };
        scores.insert(at.step, score);
    }
    Ok(scores)
}

/// The number by which a checkpoint is ranked.
pub(super) fn score(manifest: &Manifest) -> Option<f64> {
    manifest.state.get(SCORE)?.as_f64()
}

/// A copy's manifest, checked, and its very text.
pub(super) async fn manifest(shelf: &Shelf, at: At) -> Result<(Manifest, Bytes), CheckpointError> {
    let text = shelf.get(at, layout::MANIFEST).await?;
    let url = shelf.object(at, layout::MANIFEST)?.url;
    let manifest = Manifest::parse(&text, Path::new(&url))?;
    if manifest.step == at.step {
        return Ok((manifest, text));
    }
    let path = at.below(&shelf.place).to_string().into();
    Err(CheckpointError::Step { path, expected: at.step, found: manifest.step })
}

/// Removes what retention does not keep once the copy of `at` is complete, and returns the steps. What all of `seats` have of a
/// step makes a checkpoint, so of one that still lacks some the steps since the last whole one stay. One whose manifest makes no sense stays: nobody knows
/// what belongs to it.
pub(super) async fn retain(
    shelf: &Shelf,
    at: At,
    seats: &[Seat],
    retention: &Retention,
) -> Result<Vec<u64>, CheckpointError> {
    let listing = shelf.list().await?;
    let verdicts = retention.judge(&scores(shelf, &listing, at.seat, retention).await?, at.step);
    let whole = newest_whole(&listing, seats, at.step);
    let mut removed = Vec::new();
    for (step, verdict) in verdicts {
        let may_go = step > at.step || whole.is_some_and(|whole| step < whole);
        if verdict != Verdict::Removed || !may_go {
            continue;
        }
        match remove(shelf, At { step, seat: at.seat }).await {
            Ok(()) => removed.push(step),
            Err(error) if error.is_damage() => {
                tracing::warn!(step, %error, "a copy in the store stays: what belongs to it is not known");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// The newest step, up to this one, of which all of `seats` have a complete copy.
fn newest_whole(listing: &Listing, seats: &[Seat], up_to: u64) -> Option<u64> {
    let is_there = |step: u64| seats.iter().all(|&seat| listing.get(&At { step, seat }).is_some_and(is_complete));
    let steps: BTreeSet<u64> = listing.keys().map(|at| at.step).filter(|&step| step <= up_to).collect();
    steps.into_iter().rev().find(|&step| is_there(step))
}

/// Removes a copy.
pub(super) async fn remove(shelf: &Shelf, at: At) -> Result<(), CheckpointError> {
    let (manifest, text) = manifest(shelf, at).await?;
    let announced = layout::partial(layout::MANIFEST);
    shelf.put(at, &announced, text).await?;
    shelf.delete(at, layout::MANIFEST).await?;
    clear(shelf, at, &manifest).await
}

/// Deletes the files that an announcement names, and then the announcement.
async fn clear(shelf: &Shelf, at: At, manifest: &Manifest) -> Result<(), CheckpointError> {
    for name in manifest.files.keys() {
        shelf.delete(at, name).await?;
    }
    shelf.delete(at, &layout::partial(layout::MANIFEST)).await
}

/// Removes what crashes left half-written or half-removed of a seat's copies.
pub(super) async fn sweep(shelf: &Shelf, seat: Seat) -> Result<(), CheckpointError> {
    for (at, objects) in shelf.list().await?.into_iter().filter(|(at, _)| at.seat == seat) {
        tidy(shelf, at, &objects).await?;
    }
    Ok(())
}

/// Removes what is half-written or half-removed of a copy, which has these objects; one that counts stays.
pub(super) async fn tidy(shelf: &Shelf, at: At, objects: &BTreeMap<String, u64>) -> Result<(), CheckpointError> {
    let announced = layout::partial(layout::MANIFEST);
    if !objects.contains_key(&announced) {
        return Ok(());
    }
    if is_complete(objects) {
        // It was complete already, or not touched yet.
        return shelf.delete(at, &announced).await;
    }
    let text = shelf.get(at, &announced).await?;
    let url = shelf.object(at, &announced)?.url;
    match Manifest::parse(&text, Path::new(&url)) {
        Ok(manifest) => clear(shelf, at, &manifest).await,
        Err(error) => {
            tracing::warn!(%error, "a left-over in the store stays: what belongs to it is not known");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_step_is_the_last_that_all_machines_have() {
        let objects = |names: &[&str]| names.iter().map(|&name| (name.to_owned(), 1)).collect::<BTreeMap<_, _>>();
        let (a, b) = (Seat::Machine(0), Seat::Machine(2));
        let whole = || objects(&[layout::MANIFEST]);
        let mut listing = Listing::new();
        for (step, seat) in [(10, a), (10, b), (20, a), (20, b), (30, a), (40, a), (40, b)] {
            listing.insert(At { step, seat }, whole());
        }
        listing.insert(At { step: 30, seat: b }, objects(&["rank-0002.safetensors"]));
        let newest = |seats: &[Seat], up_to| newest_whole(&listing, seats, up_to);
        assert_eq!(newest(&[a, b], 30), Some(20), "of step 30 a machine's manifest is not there");
        assert_eq!(newest(&[a, b], 40), Some(40));
        assert_eq!(newest(&[a], 30), Some(30));
        assert_eq!(newest(&[a, b, Seat::Machine(4)], 40), None);
    }
}
