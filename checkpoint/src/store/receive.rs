//! The way back: a copy is read in parts of bounded size, hashed as it comes, and kept only when it was found right.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt as _};
use tokio::task::JoinHandle;

use super::error::failed;
use super::merge::merge;
use super::retain::manifest;
use super::send::{check_hash, check_size};
use super::shelf::{At, Object, Seat, Shelf};
use crate::disk::{self, Disk, ensure_folder};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::FileEntry;
use crate::reader::{Audit, Damage};

/// Bytes of one request.
const PART_BYTES: u64 = 8 << 20;
/// Requests that are on their way at a time.
const PARTS_IN_FLIGHT: usize = 4;

/// Requests for the parts of one object, in order. Those that nobody waits for any more end with it.
struct Parts(VecDeque<JoinHandle<object_store::Result<Bytes>>>);

impl Drop for Parts {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl Parts {
    fn ask(&mut self, store: &Arc<dyn ObjectStore>, object: &Object, range: Range<u64>) {
        let (store, path) = (store.clone(), object.path.clone());
        self.0.push_back(tokio::spawn(async move { store.get_range(&path, range).await }));
    }
}

/// Reads a file of a copy from start to end, hands every part to `take`, and compares the hash of all with the manifest's.
async fn read(
    shelf: &Shelf,
    at: At,
    (name, entry): (&str, &FileEntry),
    mut take: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let object = shelf.object(at, name)?;
    let mut hasher = blake3::Hasher::new();
    let mut parts = Parts(VecDeque::new());
    let (mut asked, mut read) = (0, 0);
    while read < entry.bytes {
        while asked < entry.bytes && parts.0.len() < PARTS_IN_FLIGHT {
            let end = entry.bytes.min(asked + PART_BYTES);
            parts.ask(&shelf.store, &object, asked..end);
            asked = end;
        }
        let part = parts.0.pop_front().expect("one is on its way").await;
        let part = part.map_err(object_store::Error::from).flatten().map_err(failed("read", &object.url))?;
        let wanted = PART_BYTES.min(entry.bytes - read);
        if part.len() as u64 != wanted {
            let found = read + part.len() as u64;
            return Err(CheckpointError::FileSize { path: object.url.into(), expected: entry.bytes, found });
        }
        hasher.update(&part);
        take(&part)?;
        read += wanted;
    }
    check_hash(Path::new(&object.url), entry, hasher.finalize())
}

/// A small file of a copy.
pub(super) async fn attachment(shelf: &Shelf, at: At, name: &str) -> Result<Vec<u8>, CheckpointError> {
    let (manifest, _) = manifest(shelf, at).await?;
    let entry = manifest.files.get(name).ok_or_else(|| CheckpointError::NoFile {
        path: at.below(&shelf.place).to_string().into(),
        name: name.to_owned(),
        present: manifest.files.keys().cloned().collect(),
    })?;
    let bytes = shelf.get(at, name).await?;
    check_hash(Path::new(&shelf.object(at, name)?.url), entry, blake3::hash(&bytes))?;
    Ok(bytes.into())
}

/// Hashes every file of a copy, and goes on after the first fault. Nothing is kept. What is in the files is not looked at.
///
/// # Errors
/// The store does not answer, which says nothing of the copy.
pub(super) async fn audit(shelf: &Shelf, at: At) -> Result<Audit, CheckpointError> {
    let there = shelf.list().await?.remove(&at).unwrap_or_default();
    let manifest = match manifest(shelf, at).await {
        Ok((manifest, _)) => manifest,
        Err(error) if error.is_damage() => {
            let damage = Damage { file: layout::MANIFEST.into(), error, tensors: Vec::new() };
            return Ok(Audit { step: None, files: 0, bytes_good: 0, absent: 0, damage: vec![damage] });
        }
        Err(error) => return Err(error),
    };
    let (step, files, absent) = (Some(at.step), manifest.files.len(), manifest.absent_count());
    let mut audit = Audit { step, files, bytes_good: 0, absent, damage: Vec::new() };
    for (name, entry) in &manifest.files {
        let whole = match check_size(shelf, at, name, entry, there.get(name).copied()) {
            Ok(()) => read(shelf, at, (name, entry), |_| Ok(())).await,
            Err(error) => Err(error),
        };
        match whole {
            Ok(()) => audit.bytes_good += entry.bytes,
            Err(error) if error.is_damage() => {
                let tensors = manifest.pieces_in(name).iter().map(|(tensor, ..)| (*tensor).to_owned()).collect();
                audit.damage.push(Damage { file: name.clone(), error, tensors });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(audit)
}

/// Brings the copies of some seats into `folder`, as one checkpoint, by the same commit as one of this machine: it is there
/// whole, or not at all.
///
/// # Errors
/// What is damaged or missing of them, what the store says, what the disk says. What was begun is removed as far as possible. If the
/// last sync of the folder alone fails, the checkpoint stands there whole, but might not survive a loss of power.
pub(super) async fn fetch(
    shelf: &Shelf,
    step: u64,
    seats: &[Seat],
    disk: &dyn Disk,
    folder: &Path,
) -> Result<PathBuf, CheckpointError> {
    let name = layout::committed(step);
    let (path, partial) = (folder.join(&name), folder.join(layout::partial(&name)));
    ensure_folder(disk, folder)?;
    if disk.exists(&partial).map_err(CheckpointError::io("look for", &partial))? {
        disk::remove(disk, &partial)?;
    }
    let fetched = fill(shelf, step, seats, disk, &partial).await.and_then(|()| {
        disk::rename(disk, &partial, &path)?;
        disk::sync_dir(disk, folder)
    });
    if let Err(error) = fetched {
        // What stays, the next start removes.
        let _ = disk.remove_dir_all(&partial);
        return Err(error);
    }
    Ok(path)
}

async fn fill(
    shelf: &Shelf,
    step: u64,
    seats: &[Seat],
    disk: &dyn Disk,
    partial: &Path,
) -> Result<(), CheckpointError> {
    let (mut manifests, mut text) = (Vec::new(), Bytes::new());
    for &seat in seats {
        let (manifest, its_text) = manifest(shelf, At { step, seat }).await?;
        // The very text, where it is that of a machine.
        text = its_text;
        manifests.push(manifest);
    }
    let (merged, files) = merge(&manifests, Path::new(&shelf.place.to_string()))?;
    if manifests.len() > 1 {
        text = merged.render(partial)?.into();
    }
    let mut listing = shelf.list().await?;
    // Before anything is read: what is not there cannot be fetched.
    for (seat, name) in &files {
        let at = At { step, seat: seats[*seat] };
        check_size(shelf, at, name, &merged.files[name], listing.entry(at).or_default().get(name).copied())?;
    }
    disk::create_dir(disk, partial)?;
    for (seat, name) in &files {
        let (at, path) = (At { step, seat: seats[*seat] }, partial.join(name));
        let mut file = disk.create(&path).map_err(CheckpointError::io("make the file", &path))?;
        read(shelf, at, (name, &merged.files[name]), |part| {
            file.write_all(part).map_err(CheckpointError::io("write the file", &path))
        })
        .await?;
        file.sync().map_err(CheckpointError::io("sync the file", &path))?;
    }
    let path = partial.join(layout::MANIFEST);
    let mut file = disk.create(&path).map_err(CheckpointError::io("make the file", &path))?;
    file.write_all(&text).map_err(CheckpointError::io("write the file", &path))?;
    file.sync().map_err(CheckpointError::io("sync the file", &path))?;
    disk::sync_dir(disk, partial)
}

#[cfg(test)]
mod crash_tests;
