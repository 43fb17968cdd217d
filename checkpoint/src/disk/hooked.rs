//! For tests: a simulated disk with a closure before every sync, every rename and every new folder.

use std::fmt::{self, Debug};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use super::{Disk, DiskFile, SimulatedDisk};

/// What the hook is asked about.
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
    Skip,
}

type Hook = dyn Fn(Call) -> Fate + Send + Sync;

/// `inner`, with `hook` asked first. A hook may block or panic.
pub struct Hooked {
    inner: SimulatedDisk,
    hook: Arc<Hook>,
}

struct HookedFile {
    inner: Box<dyn DiskFile>,
    hook: Arc<Hook>,
}

impl Hooked {
    pub fn new(inner: &SimulatedDisk, hook: impl Fn(Call) -> Fate + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), hook: Arc::new(hook) })
    }
}

impl Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooked").finish_non_exhaustive()
    }
}

impl Disk for Hooked {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match (self.hook)(Call::CreateDir) {
            Fate::Pass => self.inner.create_dir(path),
            Fate::Skip => Ok(()),
        }
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(HookedFile { inner: self.inner.create(path)?, hook: Arc::clone(&self.hook) }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match (self.hook)(Call::SyncDir) {
            Fate::Pass => self.inner.sync_dir(path),
            Fate::Skip => Ok(()),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match (self.hook)(Call::Rename) {
            Fate::Pass => self.inner.rename(from, to),
            Fate::Skip => Ok(()),
        }
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
        self.inner.open(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        self.inner.size(path)
    }
}

impl DiskFile for HookedFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        match (self.hook)(Call::Sync) {
            Fate::Pass => self.inner.sync(),
            Fate::Skip => Ok(()),
        }
    }
}
