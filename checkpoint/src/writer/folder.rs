//! What is done to whole folders: putting them in order, giving them their names, taking them back, retention.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::retention::{SCORE, Verdict};
use super::thread::Target;
use crate::disk::{self, Disk};
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{FileEntry, Manifest};

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

/// Gives the finished folder its name. If that name is taken, as it is after a run was rewound and came to the same step
/// again, the same content counts as committed. Other content is set aside first, under a name that counts as this step's
/// checkpoint while there is no other, so that at every instant there is a whole one.
pub(super) fn put_in_place(target: &Target, manifest: &Manifest) -> Result<PathBuf, CheckpointError> {
    let disk = &*target.disk;
    let partial = target.partial(manifest.step);
    let path = target.folder.join(layout::committed(manifest.step));
    if exists(disk, &path)? {
        if holds(disk, &path, manifest) {
            disk::sync_dir(disk, &target.folder)?;
            give_up(target, manifest.step);
            return Ok(path);
        }
        let name = layout::replaced(manifest.step);
        let aside = target.folder.join(&name);
        // One that an earlier commit of this step replaced waits there when that commit was not kept.
        if exists(disk, &aside)? {
            discard(target, &[name])?;
        }
        disk::rename(disk, &path, &aside)?;
        if let Err(error) = disk::rename(disk, &partial, &path) {
            // Should this fail too, the checkpoint still counts where it is, and the next sweep puts it back.
            let _ = disk.rename(&aside, &path);
            return Err(error);
        }
    } else {
        disk::rename(disk, &partial, &path)?;
    }
    disk::sync_dir(disk, &target.folder)?;
    Ok(path)
}

fn exists(disk: &dyn Disk, path: &Path) -> Result<bool, CheckpointError> {
    disk.exists(path).map_err(CheckpointError::io("look for", path))
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

/// The BLAKE3 of a file as it is now.
pub(super) fn hash(disk: &dyn Disk, path: &Path) -> std::io::Result<String> {
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

/// Removes what `step` replaced and what retention does not keep. The checkpoint is committed by now: a failure
/// here only leaves too much, and the next sweep removes it. Nothing goes for one that does not stand any more.
pub(super) fn retain(target: &Target, step: u64) -> Vec<u64> {
    if !stands(target, step) {
        tracing::warn!(step, "a file of the checkpoint just committed is missing or cut: older ones stay");
        return Vec::new();
    }
    let try_to = || {
        let names = disk::names(&*target.disk, &target.folder)?;
        let verdicts = target.retention.judge(&scores(target, &layout::checkpoints(&names))?, step);
        tracing::debug!(step, ?verdicts, "which checkpoints stay, and why");
        let removed = verdicts.into_iter().filter(|(_, verdict)| *verdict == Verdict::Removed);
        let removed: Vec<u64> = removed.map(|(step, _)| step).collect();
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

/// Whether a checkpoint's manifest is intact and every file that it names there, as long as it says. They were hashed on their way, are
/// synced, and where that is wanted were read again by whoever wrote them.
fn stands(target: &Target, step: u64) -> bool {
    let (disk, path) = (&*target.disk, target.folder.join(layout::committed(step)));
    let file = path.join(layout::MANIFEST);
    let manifest = disk.read(&file).ok().and_then(|text| Manifest::parse(&text, &file).ok());
    let is_there =
        |(name, entry): (&String, &FileEntry)| disk.size(&path.join(name)).is_ok_and(|size| size == entry.bytes);
    manifest.is_some_and(|manifest| manifest.step == step && manifest.files.iter().all(is_there))
}

/// The checkpoints with their scores, which are looked for only where somebody asks. One whose manifest is damaged has none.
///
/// # Errors
/// A manifest that could not be read and may be whole: it may be the best one's, and without its score it would be removed.
fn scores(target: &Target, checkpoints: &BTreeMap<u64, String>) -> Result<BTreeMap<u64, Option<f64>>, CheckpointError> {
    let score = |name: &String| {
        let file = target.folder.join(name).join(layout::MANIFEST);
        let text = target.disk.read(&file).map_err(CheckpointError::io("read the manifest", &file));
        match text.and_then(|text| Manifest::parse(&text, &file)) {
            Ok(manifest) => Ok(manifest.state.get(SCORE).and_then(serde_json::Value::as_f64)),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error),
        }
    };
    let asked = target.retention.keep_best > 0;
    checkpoints.iter().map(|(&step, name)| Ok((step, if asked { score(name)? } else { None }))).collect()
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

/// Removes a step's half-written folder, if it is there, as far as possible.
///
/// It is renamed first, to a name of this rank's own. A removal takes files out one by one, and the lead may be about to
/// commit the folder: with the rename either it is committed whole or it is gone, and of several ranks one removes it.
pub(super) fn give_up(target: &Target, step: u64) {
    give_up_in(&*target.disk, &target.folder, step, target.role.rank());
}

/// Gives up every step that is half-written in `folder`, and what earlier removals left: for a process that ends
/// because its run has ended, or that watched over one. `who` tells those apart that may do so at once.
pub fn give_up_all(disk: &dyn Disk, folder: &Path, who: usize) {
    // A folder that is not there, or no more, has nothing in it.
    for name in disk.list(folder).unwrap_or_default().iter().filter(|name| layout::is_left_over(name)) {
        match name.strip_suffix(".partial").and_then(layout::step_of) {
            Some(step) => give_up_in(disk, folder, step, who),
            // Another process may be removing it too.
            None => _ = disk.remove_dir_all(&folder.join(name)),
        }
    }
}

fn give_up_in(disk: &dyn Disk, folder: &Path, step: u64, who: usize) {
    let (partial, mine) =
        (folder.join(layout::partial(&layout::committed(step))), folder.join(layout::given_up(step, who)));
    let taken = disk.rename(&partial, &mine).or_else(|fault| match fault.kind() {
        // What an earlier removal left.
        ErrorKind::AlreadyExists => disk.remove_dir_all(&mine).and_then(|()| disk.rename(&partial, &mine)),
        _ => Err(fault),
    });
    match taken.and_then(|()| disk.remove_dir_all(&mine)) {
        Ok(()) => {}
        Err(fault) if fault.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %partial.display(), %error, "a half-written checkpoint stays until the next sweep");
        }
    }
}

/// [`give_up`] for a rank whose run goes on. Other ranks may be further, and may have begun the same step anew: a folder in
/// which they have files and this rank has none is theirs.
pub(super) fn take_back(target: &Target, step: u64) {
    let theirs = |names: Vec<String>| !names.is_empty() && !names.iter().any(|name| target.is_own(name));
    if !target.disk.list(&target.partial(step)).is_ok_and(theirs) {
        give_up(target, step);
    }
}
