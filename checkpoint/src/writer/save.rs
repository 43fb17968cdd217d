//! What the writer's thread does with one snapshot.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use compression::Region;
use serde_json::Value;

use super::{Attachment, Outcome, Retention, TensorSpec};
use crate::disk::{self, Disk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{DTYPE, FORMAT, FileEntry, Manifest, Piece, TensorEntry, VERSION};
use crate::safetensors_file::{self, Dtype, Entry, Written};

/// Where everything goes, and what it is.
#[derive(Debug)]
pub(super) struct Target {
    pub disk: Arc<dyn Disk>,
    pub folder: PathBuf,
    pub specs: Vec<TensorSpec>,
    /// Where each tensor lies in a host buffer.
    pub ranges: Vec<Range<usize>>,
    pub retention: Retention,
}

/// One snapshot.
#[derive(Debug)]
pub(super) struct Job {
    pub step: u64,
    pub state: Value,
    pub attachments: Vec<Attachment>,
    pub values: Vec<f32>,
}

/// Writes, commits, and then removes what retention gives up.
pub(super) fn save(target: &Target, job: &Job) -> Outcome {
    let step = job.step;
    let started = Instant::now();
    let partial = target.folder.join(layout::partial(&layout::committed(step)));
    let saved = sweep(target)
        .and_then(|()| write(target, job, &partial))
        .and_then(|(manifest, bytes)| Ok((commit(target, &partial, &manifest)?, bytes)));
    match saved {
        Ok((path, bytes)) => {
            let seconds = started.elapsed().as_secs_f64();
            Outcome::Committed { step, path, bytes, seconds, removed: retain(target, step) }
        }
        Err(error) => {
            remove_if_possible(target, &partial);
            Outcome::Failed { step, error }
        }
    }
}

/// Puts the folder in order after a crash or a failed clean-up: what was half written or half removed goes, and a
/// checkpoint that was set aside for one that never came takes its name back.
pub(super) fn sweep(target: &Target) -> Result<(), CheckpointError> {
    let disk = &*target.disk;
    let names = disk::names(disk, &target.folder)?;
    for name in names.iter().filter(|name| layout::is_left_over(name)) {
        disk::remove(disk, &target.folder.join(name))?;
    }
    for (name, step) in names.iter().filter_map(|name| Some((name, layout::replaced_step_of(name)?))) {
        if names.contains(&layout::committed(step)) {
            discard(target, std::slice::from_ref(name))?;
        } else {
            disk::rename(disk, &target.folder.join(name), &target.folder.join(layout::committed(step)))?;
        }
    }
    Ok(())
}

/// Writes the whole checkpoint into `partial` and makes it durable there. Returns its manifest and its bytes.
fn write(target: &Target, job: &Job, partial: &Path) -> Result<(Manifest, u64), CheckpointError> {
    let disk = &*target.disk;
    disk.create_dir(partial).map_err(CheckpointError::io("make the folder", partial))?;
    let mut files = BTreeMap::new();
    let shard = layout::shard(0);
    let entries: Vec<Entry<'_>> = (target.specs.iter().zip(&target.ranges))
        .map(|(spec, range)| Entry { name: &spec.name, shape: &spec.shape, values: &job.values[range.clone()] })
        .collect();
    let written = safetensors_file::write(disk, &partial.join(&shard), &entries, Dtype::F32, &[])?;
    files.insert(shard.clone(), file_entry(written));
    for Attachment { name, bytes } in &job.attachments {
        check_attachment(name, &files, partial)?;
        let written = safetensors_file::write_bytes(disk, &partial.join(name), bytes)?;
        files.insert(name.clone(), file_entry(written));
    }
    let path = partial.join(layout::MANIFEST);
    let tensors = tensors(target, &shard)?;
    let mut bytes: u64 = files.values().map(|file| file.bytes).sum();
    let manifest =
        Manifest { format: FORMAT.into(), version: VERSION, step: job.step, tensors, files, state: job.state.clone() };
    bytes += safetensors_file::write_bytes(disk, &path, &manifest.render(&path)?)?.bytes;
    disk::sync_dir(disk, partial)?;
    Ok((manifest, bytes))
}

fn tensors(target: &Target, shard: &str) -> Result<BTreeMap<String, TensorEntry>, CheckpointError> {
    let entry = |spec: &TensorSpec| {
        let (path, tensor) = (target.folder.clone(), spec.name.clone());
        let region = Region::whole(&spec.shape).map_err(|source| CheckpointError::Region { path, tensor, source })?;
        let piece = Piece { file: shard.to_owned(), key: spec.name.clone(), region };
        Ok((spec.name.clone(), TensorEntry { dtype: DTYPE.into(), shape: spec.shape.clone(), pieces: vec![piece] }))
    };
    target.specs.iter().map(entry).collect()
}

fn file_entry(written: Written) -> FileEntry {
    FileEntry { bytes: written.bytes, blake3: written.blake3 }
}

fn check_attachment(name: &str, files: &BTreeMap<String, FileEntry>, partial: &Path) -> Result<(), CheckpointError> {
    let taken = || files.contains_key(name).then_some("the checkpoint has a file of that name");
    match layout::fault_of_file_name(name).or_else(taken) {
        Some(why) => Err(CheckpointError::FileName { path: partial.to_path_buf(), name: name.to_owned(), why }),
        None => Ok(()),
    }
}

/// Gives the finished folder its name. If that name is taken, as it is after a run was rewound and came to the same step
/// again, the same content counts as committed. Other content is set aside first, under a name that counts as this step's
/// checkpoint while there is no other, so that at every instant there is a whole one.
fn commit(target: &Target, partial: &Path, manifest: &Manifest) -> Result<PathBuf, CheckpointError> {
    let disk = &*target.disk;
    let path = target.folder.join(layout::committed(manifest.step));
    if disk.exists(&path).map_err(CheckpointError::io("look for", &path))? {
        if holds(disk, &path, manifest) {
            disk::sync_dir(disk, &target.folder)?;
            remove_if_possible(target, partial);
            return Ok(path);
        }
        let aside = target.folder.join(layout::replaced(manifest.step));
        disk::rename(disk, &path, &aside)?;
        if let Err(error) = disk::rename(disk, partial, &path) {
            // Should this fail too, the checkpoint still counts where it is, and the next sweep puts it back.
            let _ = disk.rename(&aside, &path);
            return Err(error);
        }
    } else {
        disk::rename(disk, partial, &path)?;
    }
    disk::sync_dir(disk, &target.folder)?;
    Ok(path)
}

/// Whether the checkpoint in `path` is intact and holds what `expected` says. Whatever cannot be read is not intact.
fn holds(disk: &dyn Disk, path: &Path, expected: &Manifest) -> bool {
    let file = path.join(layout::MANIFEST);
    let manifest = disk.read(&file).ok().and_then(|text| Manifest::parse(&text, &file).ok());
    manifest.as_ref() == Some(expected)
        && expected
            .files
            .iter()
            .all(|(name, entry)| hash(disk, &path.join(name)).is_ok_and(|found| found == entry.blake3))
}

fn hash(disk: &dyn Disk, path: &Path) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = disk.open(path)?;
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(count) => {
                hasher.update(&chunk[..count]);
            }
            Err(fault) if fault.kind() == ErrorKind::Interrupted => {}
            Err(fault) => return Err(fault),
        }
    }
}

/// Removes what `step` replaced and what lies beyond the number to keep. The checkpoint is committed by now: a failure
/// here only leaves too much, and the next save sweeps.
fn retain(target: &Target, step: u64) -> Vec<u64> {
    let try_to = || {
        let names = disk::names(&*target.disk, &target.folder)?;
        let removed = layout::beyond(layout::checkpoints(&names).into_keys(), step, target.retention.keep_last);
        let doomed = |name: &&String| {
            let replaced = layout::replaced_step_of(name);
            replaced == Some(step) || replaced.or(layout::step_of(name)).is_some_and(|other| removed.contains(&other))
        };
        let doomed: Vec<String> = names.iter().filter(doomed).cloned().collect();
        discard(target, &doomed)?;
        Ok(removed)
    };
    try_to().unwrap_or_else(|error: CheckpointError| {
        tracing::warn!(step, %error, "older checkpoints could not be removed");
        Vec::new()
    })
}

/// Removes folders under names that never count. Those names are durable before the first file goes, so that no crash
/// leaves half a folder under the name of a checkpoint.
fn discard(target: &Target, names: &[String]) -> Result<(), CheckpointError> {
    if names.is_empty() {
        return Ok(());
    }
    let disk = &*target.disk;
    let gone = |name: &String| target.folder.join(layout::partial(name));
    for name in names {
        disk::rename(disk, &target.folder.join(name), &gone(name))?;
    }
    disk::sync_dir(disk, &target.folder)?;
    names.iter().try_for_each(|name| disk::remove(disk, &gone(name)))
}

fn remove_if_possible(target: &Target, partial: &Path) {
    match target.disk.remove_dir_all(partial) {
        Ok(()) => {}
        Err(fault) if fault.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %partial.display(), %error, "a half-written checkpoint stays until the next one");
        }
    }
}
