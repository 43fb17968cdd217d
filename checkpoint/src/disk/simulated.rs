//! A disk in memory that forgets what was not synced.
//!
//! It is as unkind as POSIX allows: bytes are kept only by a sync of their file, names only by a sync of their folder,
//! and what [`Disk::remove_dir_all`] takes out of a folder is gone for good even if the folder's own disappearance, or a
//! rename before it, is not durable yet. Renames are atomic.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Cursor, Read};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskFile};

/// A file system in memory that counts operations, fails where it is told to, and can lose its power. Clones share one
/// disk. Every call of [`Disk`] and [`DiskFile`] is one operation, counted from 0.
#[derive(Clone, Debug)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Debug)]
struct State {
    /// Files and folders by number, as inodes are; 0 is the root. None is ever freed.
    nodes: Vec<Node>,
    operations: usize,
    crash_at: Option<usize>,
    failures: BTreeMap<usize, io::ErrorKind>,
}

#[derive(Clone, Debug)]
enum Node {
    File { written: Vec<u8>, synced: Vec<u8> },
    Folder { entries: BTreeMap<String, usize>, synced: BTreeMap<String, usize> },
}

#[derive(Debug)]
struct SimulatedFile {
    state: Arc<Mutex<State>>,
    node: usize,
}

impl Default for SimulatedDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl SimulatedDisk {
    /// An empty disk: the root folder alone.
    #[must_use]
    pub fn new() -> Self {
        Self::of(vec![Node::folder()])
    }

    fn of(nodes: Vec<Node>) -> Self {
        let state = State { nodes, operations: 0, crash_at: None, failures: BTreeMap::new() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Every operation from number `index` on fails, as on a machine that lost its power.
    pub fn crash_at(&self, index: usize) {
        lock(&self.state).crash_at = Some(index);
    }

    /// Operation number `index` alone fails, with this kind of error.
    pub fn fail_at(&self, index: usize, kind: io::ErrorKind) {
        lock(&self.state).failures.insert(index, kind);
    }

    /// Operations so far, failed ones too.
    #[must_use]
    pub fn operations(&self) -> usize {
        lock(&self.state).operations
    }

    /// The disk that a machine finds after a loss of power: what was durable, and no fault planned.
    #[must_use]
    pub fn after_crash(&self) -> Self {
        let durable = |node: &Node| match node {
            Node::File { synced, .. } => Node::File { written: synced.clone(), synced: synced.clone() },
            Node::Folder { synced, .. } => Node::Folder { entries: synced.clone(), synced: synced.clone() },
        };
        Self::of(lock(&self.state).nodes.iter().map(durable).collect())
    }

    /// The disk that the next process finds when only the process died: everything that was done, and no fault planned.
    #[must_use]
    pub fn after_kill(&self) -> Self {
        Self::of(lock(&self.state).nodes.clone())
    }

    /// Copies everything into `folder` of the real disk, for code that maps files. It counts as no operation.
    ///
    /// # Errors
    /// What the real file system says.
    pub fn dump(&self, folder: &Path) -> io::Result<()> {
        dump(&lock(&self.state), 0, folder)
    }
}

fn dump(state: &State, node: usize, path: &Path) -> io::Result<()> {
    match &state.nodes[node] {
        Node::File { written, .. } => fs::write(path, written),
        Node::Folder { entries, .. } => {
            fs::create_dir_all(path)?;
            entries.iter().try_for_each(|(name, &child)| dump(state, child, &path.join(name)))
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Every change is a single assignment, so that a panic elsewhere leaves nothing half done.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    const fn folder() -> Self {
        Self::Folder { entries: BTreeMap::new(), synced: BTreeMap::new() }
    }
}

impl State {
    fn begin(&mut self) -> io::Result<()> {
        let index = self.operations;
        self.operations += 1;
        if self.crash_at.is_some_and(|crash| index >= crash) {
            return Err(io::Error::other("the simulated machine has lost its power"));
        }
        self.failures.remove(&index).map_or(Ok(()), |kind| Err(kind.into()))
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut node = 0;
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    let Node::Folder { entries, .. } = &self.nodes[node] else {
                        return Err(io::ErrorKind::NotADirectory.into());
                    };
                    node = *name.to_str().and_then(|name| entries.get(name)).ok_or(io::ErrorKind::NotFound)?;
                }
                Component::ParentDir | Component::Prefix(_) => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(node)
    }

    fn entries(&mut self, folder: usize) -> io::Result<&mut BTreeMap<String, usize>> {
        match &mut self.nodes[folder] {
            Node::Folder { entries, .. } => Ok(entries),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// The folder that holds the last name of `path`, and that name.
    fn place(&self, path: &Path) -> io::Result<(usize, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.find(super::parent(path))?, name.to_owned()))
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let (folder, name) = self.place(path)?;
        let number = self.nodes.len();
        let entries = self.entries(folder)?;
        if entries.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        entries.insert(name, number);
        self.nodes.push(node);
        Ok(number)
    }

    /// Takes up to `count` names out of a folder for good, and everything below them.
    fn empty(&mut self, folder: usize, count: usize) {
        let Node::Folder { entries, synced } = &mut self.nodes[folder] else { return };
        let doomed: Vec<(String, usize)> =
            entries.iter().take(count).map(|(name, &node)| (name.clone(), node)).collect();
        for (name, _) in &doomed {
            entries.remove(name);
            synced.remove(name);
        }
        for (_, node) in doomed {
            self.empty(node, usize::MAX);
        }
    }
}

impl Disk for SimulatedDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        state.add(path, Node::folder()).map(|_| ())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = lock(&self.state);
        state.begin()?;
        let node = state.add(path, Node::File { written: Vec::new(), synced: Vec::new() })?;
        Ok(Box::new(SimulatedFile { state: Arc::clone(&self.state), node }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        let folder = state.find(path)?;
        match &mut state.nodes[folder] {
            Node::Folder { entries, synced } => synced.clone_from(entries),
            Node::File { .. } => return Err(io::ErrorKind::NotADirectory.into()),
        }
        Ok(())
    }

    /// Within one folder only: that is where a sync of the folder makes both sides of a rename durable at once.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        let ((folder, old), (other, new)) = (state.place(from)?, state.place(to)?);
        if folder != other {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the simulated disk renames within one folder only",
            ));
        }
        let entries = state.entries(folder)?;
        if entries.contains_key(&new) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = entries.remove(&old).ok_or(io::ErrorKind::NotFound)?;
        entries.insert(new, node);
        Ok(())
    }

    /// A call that fails has removed half of the names.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let begun = state.begin();
        let (folder, name) = state.place(path)?;
        let doomed = state.find(path)?;
        let count = state.entries(doomed)?.len();
        if let Err(fault) = begun {
            state.empty(doomed, count.div_ceil(2));
            return Err(fault);
        }
        state.empty(doomed, count);
        state.entries(folder)?.remove(&name);
        Ok(())
    }

    /// The name comes back with a loss of power unless the folder is synced.
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        let ((folder, name), file) = (state.place(path)?, state.find(path)?);
        if let Node::Folder { .. } = &state.nodes[file] {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        state.entries(folder)?.remove(&name);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut state = lock(&self.state);
        state.begin()?;
        let folder = state.find(path)?;
        Ok(state.entries(folder)?.keys().cloned().collect())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        let mut state = lock(&self.state);
        state.begin()?;
        let file = state.find(path)?;
        match &state.nodes[file] {
            Node::File { written, .. } => Ok(Box::new(Cursor::new(written.clone()))),
            Node::Folder { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let mut state = lock(&self.state);
        state.begin()?;
        match state.find(path) {
            Ok(_) => Ok(true),
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        let mut state = lock(&self.state);
        state.begin()?;
        let file = state.find(path)?;
        match &state.nodes[file] {
            Node::File { written, .. } => Ok(written.len() as u64),
            Node::Folder { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }
}

impl DiskFile for SimulatedFile {
    /// A call that fails has written half of the bytes.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let begun = state.begin();
        let count = if begun.is_ok() { bytes.len() } else { bytes.len() / 2 };
        if let Node::File { written, .. } = &mut state.nodes[self.node] {
            written.extend_from_slice(&bytes[..count]);
        }
        begun
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        if let Node::File { written, synced } = &mut state.nodes[self.node] {
            synced.clone_from(written);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
