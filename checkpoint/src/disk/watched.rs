//! A disk whose calls somebody watches: [`Watch`] is asked before those that order what survives a crash, and does every write.

use std::fmt::Debug;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use super::{Disk, DiskFile};

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    CreateDir,
    Sync,
    SyncDir,
    Rename,
}

/// What happens to the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// It reports success and does nothing.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests leave something out"))]
    Skip,
}

/// Who watches. It may block.
pub trait Watch: Send + Sync + Debug {
    fn before(&self, _: Call) -> Fate {
        Fate::Pass
    }

    /// Writes all of `bytes` to `file`.
    fn write(&self, file: &mut dyn DiskFile, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    /// What is read of a file that was opened for it.
    fn reading(&self, file: Box<dyn Read + Send>) -> Box<dyn Read + Send> {
        file
    }
}

/// `inner`, watched.
#[derive(Debug)]
pub struct Watched<W> {
    inner: Arc<dyn Disk>,
    watch: Arc<W>,
}

struct WatchedFile<W> {
    inner: Box<dyn DiskFile>,
    watch: Arc<W>,
}

impl<W: Watch> Watched<W> {
    pub fn new(inner: Arc<dyn Disk>, watch: W) -> Self {
        Self { inner, watch: Arc::new(watch) }
    }
}

/// Makes the call, unless it is to be skipped.
fn unless_skipped(watch: &impl Watch, call: Call, make: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    match watch.before(call) {
        Fate::Pass => make(),
        Fate::Skip => Ok(()),
    }
}

impl<W: Watch> DiskFile for WatchedFile<W> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.watch.write(&mut *self.inner, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        unless_skipped(&*self.watch, Call::Sync, || self.inner.sync())
    }
}

impl<W: Watch + 'static> Disk for Watched<W> {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        unless_skipped(&*self.watch, Call::CreateDir, || self.inner.create_dir(path))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(WatchedFile { inner: self.inner.create(path)?, watch: Arc::clone(&self.watch) }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        unless_skipped(&*self.watch, Call::SyncDir, || self.inner.sync_dir(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        unless_skipped(&*self.watch, Call::Rename, || self.inner.rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.inner.list(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        Ok(self.watch.reading(self.inner.open(path)?))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        self.inner.size(path)
    }
}
