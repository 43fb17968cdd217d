//! The machine's own file system, behind the seam.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::Path;
use std::sync::Arc;

#[cfg(target_os = "linux")]
use super::direct::{self, Direct};
use super::{Disk, DiskFile, write_fully};
use crate::regular;

/// The machine's own file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

/// Bytes after which the system is asked to begin bringing them to the disk. By itself it waits until a tenth of the
/// memory is dirty, or for the sync, and the disk idles while a thread hashes.
const WRITE_BACK: u64 = 8 << 20;

/// Bytes after which a file is written past the page cache: small ones are read soon, and often.
#[cfg(target_os = "linux")]
const DIRECT_FROM: u64 = 8 << 20;

/// An open file, and how much of it was handed to the disk.
#[derive(Debug)]
struct RealFile {
    file: Arc<File>,
    written: u64,
    handed: u64,
    #[cfg(target_os = "linux")]
    way: Way,
}

/// How a file is written.
#[cfg(target_os = "linux")]
#[derive(Debug)]
enum Way {
    /// By way of the page cache, as long as it is small.
    Small,
    /// So whatever it becomes.
    Cached,
    /// Past the page cache.
    Direct(Direct),
    /// Not at all any more: something of what was appended is lost.
    Failed,
}

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile {
            file: Arc::new(File::create_new(path)?),
            written: 0,
            handed: 0,
            #[cfg(target_os = "linux")]
            way: Way::Small,
        }))
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
        Ok(Box::new(Passing::begin(regular::open(path)?)))
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

/// A file that is read once, from its beginning to its end: from the disk, where the page cache holds nothing of it that is still to be
/// written. What it leaves in there pushes nothing else out.
struct Passing(File);

impl Passing {
    fn begin(file: File) -> Self {
        forget(&file);
        Self(file)
    }
}

/// Gives back what the page cache holds of a file. A system that does not take the advice keeps what it likes.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables, reason = "there is no such advice"))]
fn forget(file: &File) {
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

impl Read for Passing {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        forget(&self.0);
    }
}

impl DiskFile for RealFile {
    #[cfg(target_os = "linux")]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if matches!(self.way, Way::Small) && self.written + bytes.len() as u64 > DIRECT_FROM {
            let boundary = self.written.next_multiple_of(direct::ALIGNMENT as u64);
            let (before, bytes) = bytes.split_at(bytes.len().min((boundary - self.written) as usize));
            self.write_cached(before)?;
            self.way = Direct::begin(&self.file).map_or(Way::Cached, Way::Direct);
            return if bytes.is_empty() { Ok(()) } else { self.write_all(bytes) };
        }
        match &mut self.way {
            Way::Direct(direct) => {
                let appended = direct.append(bytes);
                if appended.is_err() {
                    self.way = Way::Failed;
                }
                appended
            }
            Way::Small | Way::Cached => self.write_cached(bytes),
            Way::Failed => Err(lost()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_cached(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        match std::mem::replace(&mut self.way, Way::Failed) {
            Way::Failed => return Err(lost()),
            Way::Small => self.way = Way::Small,
            Way::Cached => self.way = Way::Cached,
            Way::Direct(direct) => {
                direct.finish()?;
                self.way = Way::Cached;
            }
        }
        self.file.sync_all()
    }
}

#[cfg(target_os = "linux")]
fn lost() -> io::Error {
    io::Error::other("what was written before could not be brought to the disk")
}

impl RealFile {
    fn write_cached(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_fully(bytes, |bytes| (&*self.file).write(bytes))?;
        self.written += bytes.len() as u64;
        if self.written - self.handed >= WRITE_BACK {
            write_back(&self.file, self.handed, self.written);
            self.handed = self.written;
        }
        Ok(())
    }
}

/// Begins to bring the bytes `start..end` to the disk, and does not wait for it. Only the sync promises anything: what
/// goes wrong here it tells.
#[cfg(target_os = "linux")]
pub(super) fn write_back(file: &File, start: u64, end: u64) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The failure is the system's word, and from then on nothing succeeds that would stand behind a hole.
    #[test]
    #[cfg(target_os = "linux")]
    fn after_a_failure_nothing_is_written_or_synced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        drop(File::create_new(&path).unwrap());
        // One that cannot be written to.
        let file = Arc::new(File::open(&path).unwrap());
        let Some(direct) = Direct::begin(&file) else { return };
        let mut file = RealFile { file, written: DIRECT_FROM, handed: DIRECT_FROM, way: Way::Direct(direct) };
        let piece = vec![7; 1 << 20];
        let failed = (0..20).find_map(|_| file.write_all(&piece).err()).unwrap();
        assert_eq!(failed.raw_os_error(), Some(rustix::io::Errno::BADF.raw_os_error()), "{failed}");
        for _ in 0..5 {
            assert!(file.write_all(&piece).unwrap_err().to_string().contains("written before"));
            assert!(file.sync().unwrap_err().to_string().contains("written before"));
        }
    }

    #[test]
    fn a_file_of_any_size_in_any_pieces_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let all: Vec<u8> = (0..(23u32 << 20) + 77).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let ends = [0, 4095, 8 << 20, (8 << 20) + 1, (8 << 20) + 4096, all.len()];
        for (number, end) in ends.into_iter().enumerate() {
            for piece in [1000, 4096, 1 << 20, 9 << 20, usize::MAX] {
                let path = folder.path().join(format!("{number}-{piece}"));
                let mut file = RealDisk.create(&path).unwrap();
                all[..end].chunks(piece.min(all.len())).for_each(|piece| file.write_all(piece).unwrap());
                file.sync().unwrap();
                // What follows a sync is part of it, too.
                file.write_all(b"more").unwrap();
                file.sync().unwrap();
                assert!(fs::read(&path).unwrap() == [&all[..end], b"more"].concat(), "{end} bytes by {piece}");
                fs::remove_file(&path).unwrap();
            }
        }
    }
}
