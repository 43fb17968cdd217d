//! The machine's own file system, behind the seam.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::Path;

use super::{Disk, DiskFile, write_fully};

/// The machine's own file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

/// Bytes after which the system is asked to begin bringing them to the disk. By itself it waits until a tenth of the
/// memory is dirty, or for the sync, and the disk idles while a thread hashes.
const WRITE_BACK: u64 = 8 << 20;

/// An open file, and how much of it was handed to the disk.
#[derive(Debug)]
struct RealFile {
    file: File,
    written: u64,
    handed: u64,
}

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile { file: File::create_new(path)?, written: 0, handed: 0 }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename_noreplace(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(File::open(path)?))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    /// By way of an open file: network file systems promise to look anew when a file is opened, not when it is asked for
    /// its size.
    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(File::open(path)?.metadata()?.len())
    }
}

impl DiskFile for RealFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_fully(bytes, |bytes| (&self.file).write(bytes))?;
        self.written += bytes.len() as u64;
        if self.written - self.handed >= WRITE_BACK {
            write_back(&self.file, self.handed, self.written);
            self.handed = self.written;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Begins to bring the bytes `start..end` to the disk, and does not wait for it. Only the sync promises anything: what
/// goes wrong here it tells.
#[cfg(target_os = "linux")]
fn write_back(file: &File, start: u64, end: u64) {
    // "Not needed" starts the write-back of dirty pages; they leave the cache only once they are clean, which these are not.
    let len = std::num::NonZeroU64::new(end - start);
    let _ = rustix::fs::fadvise(file, start, len, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
const fn write_back(_file: &File, _start: u64, _end: u64) {}

/// `rename` alone replaces an empty folder without a word, so the kernel is asked not to.
#[cfg(target_os = "linux")]
fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;

    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without the flag, NFS among them.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => rename_if_free(from, to),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    rename_if_free(from, to)
}

fn rename_if_free(from: &Path, to: &Path) -> io::Result<()> {
    if to.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}
