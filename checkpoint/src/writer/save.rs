//! What the writer's thread does with a snapshot: one rank's part, and the commit of all parts.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::Value;

use super::part::{Files, assemble};
use super::thread::Target;
use super::{Attachment, Outcome, Part, folder};
use crate::disk;
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{FORMAT, FileEntry, Manifest};
use crate::packed;
use crate::safetensors_file::{self, Dtype, Entry, Written};

/// What a checkpoint holds besides tensors.
#[derive(Debug)]
pub(super) struct Extras {
    pub state: Value,
    pub attachments: Vec<Attachment>,
}

/// What the lead commits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Commit<'a> {
    pub step: u64,
    pub id: &'a str,
    pub parts: &'a [Part],
    pub extras: &'a Extras,
}

/// What a commit has put in place.
#[derive(Debug)]
pub(super) struct Saved {
    /// Its folder.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Bytes that they would have if none were packed.
    pub unpacked_bytes: u64,
}

/// A writer alone: writes the one part, commits it, and then removes what retention gives up.
pub(super) fn save(target: &Target, step: u64, values: &[f32], extras: &Extras) -> Outcome {
    let started = Instant::now();
    let saved = folder::sweep(target)
        .and_then(|()| write(target, step, values))
        .and_then(|part| commit(target, &Commit { step, id: "", parts: &[part], extras }));
    match saved {
        Ok(Saved { path, bytes, unpacked_bytes }) => {
            let seconds = started.elapsed().as_secs_f64();
            Outcome::Committed { step, path, bytes, unpacked_bytes, seconds, removed: folder::retain(target, step) }
        }
        Err(error) => {
            folder::give_up(target, step);
            Outcome::Failed { step, error }
        }
    }
}

/// Writes this rank's file into the step's folder, which it makes if no other rank has, and makes the file durable. Its
/// name is durable with the commit.
pub(super) fn write(target: &Target, step: u64, values: &[f32]) -> Result<Part, CheckpointError> {
    let disk = &*target.disk;
    let (packs, rank) = (target.packed.load(Ordering::SeqCst), target.role.rank());
    let (partial, file) = (target.partial(step), if packs { layout::packed_shard } else { layout::shard }(rank));
    disk::create_dir(disk, &partial)?;
    let path = partial.join(&file);
    disk::clear_file(disk, &path)?;
    let stored = || (target.pieces.iter().zip(&target.ranges)).filter(|(piece, _)| !piece.region.is_empty());
    let shapes: Vec<Vec<usize>> = stored().map(|(piece, _)| piece.stored_shape()).collect();
    let entries: Vec<Entry<'_>> = (stored().zip(&shapes))
        .map(|((piece, range), shape)| Entry { name: &piece.tensor, shape, values: &values[range.clone()] })
        .collect();
    let (Written { bytes, blake3, subtrees }, unpacked_bytes) = if packs {
        let (written, unpacked_bytes) = packed::write(disk, &path, &entries)?;
        (written, Some(unpacked_bytes))
    } else {
        (safetensors_file::write(disk, &path, &entries, Dtype::F32, &[])?, None)
    };
    if target.read_back.load(Ordering::SeqCst) {
        let found = folder::hash(disk, &path).map_err(CheckpointError::io("read the file", &path))?;
        if found != blake3 {
            let why = format!(
                "{file} was written with BLAKE3 {blake3}, and read from the disk again it has {found}: the disk, or the memory, changes bytes"
            );
            return Err(CheckpointError::Commit { path: target.folder.clone(), step, why });
        }
    }
    let entry = FileEntry { bytes, blake3, unpacked_bytes, subtrees };
    Ok(Part { file, entry, pieces: target.pieces.clone() })
}

/// [`write`] for a rank of several, which also makes the file's name durable: the lead may be another machine, and over a
/// network its sync of the folder need not speak for what this machine has done there.
pub(super) fn write_member(target: &Target, step: u64, values: &[f32]) -> Result<Part, CheckpointError> {
    let part = write(target, step, values)?;
    disk::sync_dir(&*target.disk, &target.partial(step))?;
    Ok(part)
}

/// Makes a checkpoint of the parts that lie in the step's folder: the attachments, then the manifest, then the rename.
pub(super) fn commit(target: &Target, order: &Commit<'_>) -> Result<Saved, CheckpointError> {
    let disk = &*target.disk;
    let &Commit { step, id, parts, extras } = order;
    let partial = target.partial(step);
    let path = partial.join(layout::MANIFEST);
    if !parts.iter().any(|part| target.is_own(&part.file)) {
        let own = layout::shard(target.role.rank());
        let why = format!("the part of the rank that commits, {own}, is not among the {} parts", parts.len());
        return Err(CheckpointError::Commit { path: target.folder.clone(), step, why });
    }
    let (tensors, mut files) = assemble(parts, &path)?;
    check_sizes(target, step, &files)?;
    for Attachment { name, bytes } in &extras.attachments {
        check_attachment(name, &files, &partial)?;
        let file = partial.join(name);
        disk::clear_file(disk, &file)?;
        let Written { bytes, blake3, subtrees } = safetensors_file::write_bytes(disk, &file, bytes)?;
        files.insert(name.clone(), FileEntry { bytes, blake3, unpacked_bytes: None, subtrees });
    }
    let bytes: u64 = files.values().map(|file| file.bytes).sum();
    // The parts are what other processes said.
    let unpacked_bytes = files.values().map(FileEntry::plain_bytes).fold(0, u64::saturating_add);
    let (format, version) = (FORMAT.into(), Manifest::version_of(&files));
    let (id, state) = (id.to_owned(), extras.state.clone());
    let manifest = Manifest { format, version, step, id, tensors, files, state };
    disk::clear_file(disk, &path)?;
    let own = safetensors_file::write_bytes(disk, &path, &manifest.render(&path)?)?.bytes;
    disk::sync_dir(disk, &partial)?;
    let path = folder::put_in_place(target, &manifest)?;
    Ok(Saved { path, bytes: bytes + own, unpacked_bytes: unpacked_bytes.saturating_add(own) })
}

/// Looks that every rank's file is there as it was reported.
fn check_sizes(target: &Target, step: u64, files: &Files) -> Result<(), CheckpointError> {
    for (name, entry) in files {
        let path = target.partial(step).join(name);
        let found = match target.disk.size(&path) {
            Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => None,
            other => Some(other.map_err(CheckpointError::io("look at the file", &path))?),
        };
        if found != Some(entry.bytes) {
            let found = found.map_or("it is not there".to_owned(), |found| format!("found {found}"));
            let why = format!("{name} was reported with {} bytes, {found}", entry.bytes);
            return Err(CheckpointError::Commit { path: target.folder.clone(), step, why });
        }
    }
    Ok(())
}

fn check_attachment(name: &str, files: &Files, partial: &Path) -> Result<(), CheckpointError> {
    let taken = || files.contains_key(name).then_some("the checkpoint has a file of that name");
    match layout::fault_of_file_name(name).or_else(taken) {
        Some(why) => Err(CheckpointError::FileName { path: partial.to_path_buf(), name: name.to_owned(), why }),
        None => Ok(()),
    }
}
