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
/// step makes a checkpoint, so the steps since the last whole one stay. One whose manifest makes no sense stays too: nobody
/// knows what belongs to it.
///
/// # Errors
/// The store does not answer; what is there may be needed then, and nothing more goes.
pub(super) async fn retain(
    shelf: &Shelf,
    at: At,
    seats: &[Seat],
    retention: &Retention,
) -> Result<Vec<u64>, CheckpointError> {
    let listing = shelf.list().await?;
    let verdicts = retention.judge(&scores(shelf, &listing, at.seat, retention).await?, at.step);
    if verdicts.values().all(|&verdict| verdict != Verdict::Removed) {
        return Ok(Vec::new());
    }
    let whole = newest_whole(shelf, &listing, seats, at.step).await?;
    let mut removed = Vec::new();
    for (step, verdict) in verdicts {
        let may_go = whole.is_some_and(|whole| step < whole);
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

/// The newest step, up to this one, that whoever lost all folders could go on from: of which all of `seats` have a complete
/// copy, of one commit, each with its own part.
async fn newest_whole(
    shelf: &Shelf,
    listing: &Listing,
    seats: &[Seat],
    up_to: u64,
) -> Result<Option<u64>, CheckpointError> {
    let is_there = |step: u64| seats.iter().all(|&seat| listing.get(&At { step, seat }).is_some_and(is_complete));
    let steps: BTreeSet<u64> = listing.keys().map(|at| at.step).filter(|&step| step <= up_to).collect();
    for step in steps.into_iter().rev().filter(|&step| is_there(step)) {
        if fit(shelf, step, seats).await? {
            return Ok(Some(step));
        }
    }
    Ok(None)
}

/// Whether the copies that these seats have of a step are of one commit, each with the part of the rank that leads its folder.
/// A run that went back writes a step again, and a machine that took another's place may have copied that one's folder.
async fn fit(shelf: &Shelf, step: u64, seats: &[Seat]) -> Result<bool, CheckpointError> {
    let mut first = None;
    for &seat in seats {
        let found = match manifest(shelf, At { step, seat }).await {
            Ok((manifest, _)) => manifest,
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        let has_own = match seat {
            Seat::Shared => true,
            Seat::Machine(rank) => {
                [layout::shard(rank), layout::packed_shard(rank)].iter().any(|name| found.files.contains_key(name))
            }
        };
        if !has_own || *first.get_or_insert_with(|| found.id.clone()) != found.id {
            return Ok(false);
        }
    }
    Ok(true)
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
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use serde_json::json;

    use super::*;
    use crate::manifest;
    use crate::store::place::Place;

    /// The text of a manifest that names this commit and this file.
    fn text(step: u64, id: &str, file: &str) -> Vec<u8> {
        let files = json!({ file: { "bytes": 1, "blake3": "0".repeat(64) } });
        let body = json!({
            "format": manifest::FORMAT, "version": manifest::VERSION, "step": step, "id": id, "tensors": {}, "files": files,
            "state": {},
        });
        manifest::sealed(&body)
    }

    #[test]
    fn the_newest_whole_step_is_the_last_of_which_all_machines_have_their_part_of_one_commit() {
        let place = Place::parse("s3://bucket/runs/a").expect("a place");
        let shelf = Shelf { store: Arc::new(InMemory::new()), place };
        let (a, b) = (Seat::Machine(0), Seat::Machine(2));
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let own = |seat| layout::shard(if seat == a { 0 } else { 2 });
        let put = |step, seat, name: &str, text: Vec<u8>| {
            runtime.block_on(shelf.put(At { step, seat }, name, text.into())).expect("memory takes it");
        };
        let copy = |step, seat, id: &str, file: &str| put(step, seat, layout::MANIFEST, text(step, id, file));
        for (step, seat, id) in [(10, a, "1"), (10, b, "1"), (20, a, "2"), (20, b, "2"), (30, a, "3"), (40, a, "4")] {
            copy(step, seat, id, &own(seat));
        }
        put(30, b, &own(b), vec![1]);
        let newest = |seats: &[Seat], up_to| {
            let found = async { newest_whole(&shelf, &shelf.list().await?, seats, up_to).await };
            runtime.block_on(found).expect("an answer")
        };
        assert_eq!(newest(&[a, b], 40), Some(20), "of step 30 a machine's manifest is not there, of step 40 nothing");
        assert_eq!(newest(&[a], 40), Some(40));
        assert_eq!(newest(&[a, b, Seat::Machine(4)], 40), None);
        // A run that went back has written step 40 once more, and this machine has not copied that one yet.
        copy(40, b, "of another commit", &own(b));
        assert_eq!(newest(&[a, b], 40), Some(20));
        // It took the other machine's place, with that one's folder.
        copy(40, b, "4", &own(a));
        assert_eq!(newest(&[a, b], 40), Some(20));
        put(40, b, layout::MANIFEST, b"{}".to_vec());
        assert_eq!(newest(&[a, b], 40), Some(20), "one that is damaged");
        copy(40, b, "4", &own(b));
        assert_eq!(newest(&[a, b], 40), Some(40));
        assert_eq!(newest(&[a, b], 39), Some(20));
    }
}
