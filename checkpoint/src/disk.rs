//! The one seam to the file system.
//!
//! Everything that the writer and the exporter do to a disk goes through [`Disk`], so that a test can stop the machine
//! between any two operations ([`SimulatedDisk`]) and look at what is left.

use std::fmt::Debug;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::layout;

#[cfg(target_os = "linux")]
mod direct;
#[cfg(test)]
pub(crate) mod hooked;
pub(crate) mod paced;
mod real;
mod simulated;
pub(crate) mod watched;

pub use real::RealDisk;
pub use simulated::SimulatedDisk;

/// A file system, as far as checkpoints need one.
///
/// Nothing is durable before it is synced: a file's bytes by [`DiskFile::sync`], a name (made, renamed or removed) by
/// [`Disk::sync_dir`] of the folder that holds it.
pub trait Disk: Send + Sync + Debug {
    /// Makes one folder; its parent exists.
    ///
    /// # Errors
    /// What the file system says, `AlreadyExists` among it.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes a new, empty file for writing.
    ///
    /// # Errors
    /// What the file system says; `AlreadyExists` when the name is taken.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the file system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Gives a file or folder another name in one atomic act. It never replaces anything.
    ///
    /// # Errors
    /// What the file system says; `AlreadyExists` when `to` exists.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a folder and what is in it. A failure may leave some of it.
    ///
    /// # Errors
    /// What the file system says.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the file system says; `NotFound` when there is none.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// The names in a folder, files and folders alike, in no particular order. Names that are not UTF-8 are left out:
    /// none of ours is one of them.
    ///
    /// # Errors
    /// What the file system says.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Opens a file for reading from its start.
    ///
    /// # Errors
    /// What the file system says.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>>;

    /// Whether a file or folder of this name exists.
    ///
    /// # Errors
    /// What the file system says when it cannot tell.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Bytes of a file, as another process that wrote and synced it left it.
    ///
    /// # Errors
    /// What the file system says; `NotFound` when there is none.
    fn size(&self, path: &Path) -> io::Result<u64>;

    /// A whole file, for the small ones.
    ///
    /// # Errors
    /// What the file system says.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// A file open for writing.
pub trait DiskFile: Send {
    /// Appends all of `bytes`.
    ///
    /// # Errors
    /// What the file system says; some of the bytes may have been written.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written durable. The file's name is a matter of [`Disk::sync_dir`].
    ///
    /// # Errors
    /// What the file system says. What was written is in doubt from then on, even if a later call succeeds.
    fn sync(&mut self) -> io::Result<()>;
}

/// Writes all of `bytes` by as many calls of `write` as that takes: a call may write less than it was given, and says how
/// much.
fn write_fully(mut bytes: &[u8], mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(fault) if fault.kind() == io::ErrorKind::Interrupted => {}
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}

/// The folder that holds `path`'s name.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Makes `path` and the folders above it that do not exist yet, durably. Several processes may do so at once.
pub(crate) fn ensure_folder(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    let mut missing: Vec<PathBuf> = Vec::new();
    let mut next = path;
    while !disk.exists(next).map_err(CheckpointError::io("look for", next))? && next != parent(next) {
        missing.push(next.to_path_buf());
        next = parent(next);
    }
    // Whoever made it may have died before its name was durable, unless a checkpoint was committed in it since.
    let is_new = |names: Vec<String>| names.iter().all(|name| layout::step_of(name).is_none());
    if missing.is_empty() && disk.list(path).is_ok_and(is_new) {
        // A folder above it that may not be read is nobody's of ours.
        let _ = disk.sync_dir(parent(path));
    }
    for folder in missing.iter().rev() {
        create_dir(disk, folder)?;
        sync_dir(disk, parent(folder))?;
    }
    Ok(())
}

/// [`Disk::create_dir`], content with a folder that exists: another process may have been faster.
pub(crate) fn create_dir(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    match disk.create_dir(path) {
        Err(fault) if fault.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(CheckpointError::io("make the folder", path)),
    }
}

/// [`Disk::remove_file`], content with a file that does not exist.
pub(crate) fn clear_file(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    match disk.remove_file(path) {
        Err(fault) if fault.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(CheckpointError::io("remove the left-over file", path)),
    }
}

/// [`Disk::sync_dir`] with an error that says where.
pub(crate) fn sync_dir(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    disk.sync_dir(path).map_err(CheckpointError::io("sync the folder", path))
}

/// [`Disk::rename`] with an error that says where.
pub(crate) fn rename(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), CheckpointError> {
    disk.rename(from, to).map_err(CheckpointError::io("rename to its final name the folder", from))
}

/// [`Disk::remove_dir_all`] with an error that says where.
pub(crate) fn remove(disk: &dyn Disk, path: &Path) -> Result<(), CheckpointError> {
    disk.remove_dir_all(path).map_err(CheckpointError::io("remove the folder", path))
}

/// [`Disk::list`] with an error that says where.
pub(crate) fn names(disk: &dyn Disk, path: &Path) -> Result<Vec<String>, CheckpointError> {
    disk.list(path).map_err(CheckpointError::io("list the folder", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the writer relies on, asked of the real disk and of its twin alike.
    fn check(disk: &dyn Disk, root: &Path) {
        let (a, b) = (root.join("a"), root.join("b"));
        ensure_folder(disk, &a.join("deep").join("er")).expect("free names");
        assert_eq!(disk.create_dir(&a).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(disk.create_dir(&root.join("no/parent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        let mut file = disk.create(&a.join("file")).unwrap();
        file.write_all(b"one ").unwrap();
        file.write_all(b"two").unwrap();
        file.sync().unwrap();
        assert_eq!(disk.read(&a.join("file")).unwrap(), b"one two");
        assert_eq!(disk.create(&a.join("file")).err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(disk.read(&a.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.size(&a.join("file")).unwrap(), 7);
        assert_eq!(disk.size(&a.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(disk.create(&a.join("gone")).unwrap());
        disk.remove_file(&a.join("gone")).unwrap();
        assert_eq!(disk.remove_file(&a.join("gone")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(disk.remove_file(&a.join("deep")).is_err(), "a folder is no file");
        create_dir(disk, &a).expect("a folder that is there will do");
        clear_file(disk, &a.join("gone")).expect("what is not there is cleared");
        disk.create_dir(&b).unwrap();
        assert_eq!(
            disk.rename(&a, &b).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists,
            "an empty folder is not free"
        );
        disk.remove_dir_all(&b).unwrap();
        disk.rename(&a, &b).unwrap();
        disk.sync_dir(root).unwrap();
        assert!(!disk.exists(&a).unwrap() && disk.exists(&b).unwrap());
        let mut names = disk.list(&b).unwrap();
        names.sort();
        assert_eq!(names, ["deep", "file"]);
        assert_eq!(disk.list(&a).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.remove_dir_all(&a).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_real_disk_and_its_twin_answer_alike() {
        let root = tempfile::tempdir().unwrap();
        check(&RealDisk, root.path());
        check(&SimulatedDisk::new(), Path::new("/"));
    }

    #[test]
    fn what_a_call_leaves_over_the_next_one_writes() {
        let mut answers = vec![Ok(2), Err(io::ErrorKind::Interrupted.into()), Ok(1), Ok(3)].into_iter();
        let mut given = Vec::new();
        let write = |bytes: &[u8]| {
            given.push(bytes.to_vec());
            answers.next().unwrap()
        };
        write_fully(b"abcdef", write).unwrap();
        assert_eq!(given, [&b"abcdef"[..], b"cdef", b"cdef", b"def"]);
        assert_eq!(write_fully(b"a", |_| Ok(0)).unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn a_relative_name_lies_in_the_current_folder() {
        assert_eq!(parent(Path::new("checkpoints")), Path::new("."));
        assert_eq!(parent(Path::new("runs/a")), Path::new("runs"));
        assert_eq!(parent(Path::new("/")), Path::new("/"));
        ensure_folder(&RealDisk, Path::new(".")).unwrap();
    }
}
