//! Which copies stay, and what becomes of the others and of left-overs.
//!
//! A copy is removed in the order opposite to that in which it came: announced in `manifest.json.partial`, then the manifest,
//! which ends it, then the files, and the announcement last. So what a crash leaves has no manifest and says itself which
//! objects are ours; no other object is ever deleted.

use std::collections::BTreeMap;
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

/// Removes what retention does not keep once the copy of `at` is complete, and returns the steps. One whose manifest makes no
/// sense stays: nobody knows what belongs to it.
pub(super) async fn retain(shelf: &Shelf, at: At, retention: &Retention) -> Result<Vec<u64>, CheckpointError> {
    let listing = shelf.list().await?;
    let verdicts = retention.judge(&scores(shelf, &listing, at.seat, retention).await?, at.step);
    let mut removed = Vec::new();
    for (step, verdict) in verdicts {
        if verdict != Verdict::Removed {
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
