//! Hugging Face folders: `model.safetensors` and the small files around it, written at once or not at all.
//!
//! An export is put together in `DIR.partial` beside `DIR`, synced, and renamed. It never replaces a folder that exists.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::disk::{self, Disk, RealDisk};
use crate::error::CheckpointError;
use crate::layout;
use crate::safetensors_file::{self, Outline};

mod folder;

pub use crate::safetensors_file::Dtype;
pub use folder::Folder;

/// The file that holds the tensors.
pub const MODEL: &str = "model.safetensors";

/// A tensor to be exported.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name, in Hugging Face's spelling.
    pub name: String,
    /// Sizes of its dimensions.
    pub shape: Vec<usize>,
}

/// What is exported.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// Small files, `config.json` and the like, by name.
    pub files: &'a [(&'a str, Vec<u8>)],
    /// The tensors of [`MODEL`].
    pub tensors: &'a [Tensor],
    /// What they are stored as.
    pub dtype: Dtype,
}

/// Writes the folder `dir` of this content. Returns the bytes of all files. `give` has the elements of a tensor, row-major,
/// by its index: it is asked for each once, in the order of their names, so that no more than one need be in memory.
/// Folders above `dir` are made if they do not exist; a `DIR.partial` that an earlier export left is replaced.
///
/// # Errors
/// A `dir` that exists, names or values that cannot be written, what the file system says, or what `give` does.
pub fn write_folder<'v, E: From<CheckpointError>>(
    dir: &Path,
    content: Content<'_>,
    give: impl FnMut(usize) -> Result<Cow<'v, [f32]>, E>,
) -> Result<u64, E> {
    write_folder_on(&RealDisk, dir, content, give)
}

/// [`write_folder`] on any disk.
///
/// # Errors
/// Those of [`write_folder`].
pub fn write_folder_on<'v, E: From<CheckpointError>>(
    disk: &dyn Disk,
    dir: &Path,
    content: Content<'_>,
    give: impl FnMut(usize) -> Result<Cow<'v, [f32]>, E>,
) -> Result<u64, E> {
    let partial = beside(dir)?;
    let names = check_names(dir, content.files)?;
    if disk.exists(dir).map_err(CheckpointError::io("look for", dir))? {
        return Err(CheckpointError::ExportExists { path: dir.to_path_buf() }.into());
    }
    disk::ensure_folder(disk, disk::parent(dir))?;
    clear(disk, &partial, &names)?;
    disk.create_dir(&partial).map_err(CheckpointError::io("make the folder", &partial))?;
    let written = write_files(disk, &partial, content, give).and_then(|bytes| {
        disk::rename(disk, &partial, dir)?;
        disk::sync_dir(disk, disk::parent(dir))?;
        Ok(bytes)
    });
    if written.is_err() {
        // Best effort: what stays is replaced by the next export. After the rename there is nothing of this name.
        let _ = disk.remove_dir_all(&partial);
    }
    written
}

fn write_files<'v, E: From<CheckpointError>>(
    disk: &dyn Disk,
    partial: &Path,
    Content { files, tensors, dtype }: Content<'_>,
    give: impl FnMut(usize) -> Result<Cow<'v, [f32]>, E>,
) -> Result<u64, E> {
    let outlines: Vec<Outline<'_>> = tensors.iter().map(|tensor| (&*tensor.name, &*tensor.shape)).collect();
    // Hugging Face's loaders refuse files that do not name their framework.
    let metadata = [("format", "pt")];
    let model = partial.join(MODEL);
    let mut bytes = safetensors_file::write_as_given(disk, &model, &outlines, (dtype, &metadata), give)?.bytes;
    for (name, content) in files {
        bytes += safetensors_file::write_bytes(disk, &partial.join(name), content)?.bytes;
    }
    disk::sync_dir(disk, partial)?;
    Ok(bytes)
}

/// `DIR.partial` for `DIR`.
fn beside(dir: &Path) -> Result<PathBuf, CheckpointError> {
    let name = dir.file_name().and_then(|name| name.to_str()).ok_or_else(|| CheckpointError::FileName {
        path: dir.to_path_buf(),
        name: dir.display().to_string(),
        why: "an export needs a folder with a name of its own, in UTF-8",
    })?;
    Ok(dir.with_file_name(layout::partial(name)))
}

/// Every name that the export will hold.
fn check_names<'a>(dir: &Path, files: &[(&'a str, Vec<u8>)]) -> Result<BTreeSet<&'a str>, CheckpointError> {
    let mut names = BTreeSet::from([MODEL]);
    for (name, _) in files {
        let taken = || (!names.insert(name)).then_some("the export has a file of that name");
        if let Some(why) = layout::fault_of_file_name(name).or_else(taken) {
            return Err(CheckpointError::FileName { path: dir.to_path_buf(), name: (*name).to_owned(), why });
        }
    }
    Ok(names)
}

/// Removes what an earlier export left. It is ours if it holds nothing but files of the names that we write.
fn clear(disk: &dyn Disk, partial: &Path, names: &BTreeSet<&str>) -> Result<(), CheckpointError> {
    if !disk.exists(partial).map_err(CheckpointError::io("look for", partial))? {
        return Ok(());
    }
    let found = disk::names(disk, partial)?;
    if let Some(foreign) = found.into_iter().find(|name| !names.contains(name.as_str())) {
        return Err(CheckpointError::ExportPartial { path: partial.to_path_buf(), foreign });
    }
    disk::remove(disk, partial)
}

#[cfg(test)]
mod tests;
