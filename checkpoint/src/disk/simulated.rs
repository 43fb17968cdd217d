//! A disk in memory that forgets what was not synced.
//!
//! It is as unkind as POSIX allows: bytes are kept only by a sync of their file, names only by a sync of their folder,
//! and what [`Disk::remove_dir_all`] takes out of a folder is gone for good even if the folder's own disappearance, or a
//! rename before it, is not durable yet. Renames are atomic. What was not synced may reach the disk all the same, in any
//! order and torn inside a sector ([`SimulatedDisk::after_crash_in_disorder`]). After a sync that failed, no later one
//! makes the same bytes durable, as on Linux, where the first failure forgets them.
//!
//! - `crash`: the states that a machine may find after a loss of power.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Cursor, Read};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskFile, write_fully};

mod crash;

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
    failures: BTreeMap<usize, Failure>,
}

#[derive(Clone, Copy, Debug)]
enum Failure {
    Error(io::ErrorKind),
    /// A write takes half of what it was given, and says so; other calls are as ever.
    Short,
}

#[derive(Clone, Debug)]
enum Node {
    /// `forgotten`: a sync has failed, and what was not durable by then never will be.
    File { written: Vec<u8>, synced: Vec<u8>, forgotten: bool },
    /// `changes`: what was done to the names since they were synced.
    Folder { entries: BTreeMap<String, usize>, synced: BTreeMap<String, usize>, changes: Vec<Change> },
}

/// One change of a folder's names, which a loss of power keeps or not.
#[derive(Clone, Debug)]
enum Change {
    Add { name: String, node: usize },
    Remove { name: String },
    Rename { from: String, to: String, node: usize },
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
        lock(&self.state).failures.insert(index, Failure::Error(kind));
    }

    /// Operation number `index`, if it is a write, takes half of its bytes. Whoever writes on then loses nothing.
    pub fn short_at(&self, index: usize) {
        lock(&self.state).failures.insert(index, Failure::Short);
    }

    /// Operations so far, failed ones too.
    #[must_use]
    pub fn operations(&self) -> usize {
        lock(&self.state).operations
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
        Self::Folder { entries: BTreeMap::new(), synced: BTreeMap::new(), changes: Vec::new() }
    }

    const fn file() -> Self {
        Self::File { written: Vec::new(), synced: Vec::new(), forgotten: false }
    }
}

impl State {
    /// Counts an operation, and says whether it is to be a short one.
    fn begin(&mut self) -> io::Result<bool> {
        let index = self.operations;
        self.operations += 1;
        if self.crash_at.is_some_and(|crash| index >= crash) {
            return Err(io::Error::other("the simulated machine has lost its power"));
        }
        match self.failures.remove(&index) {
            None => Ok(false),
            Some(Failure::Short) => Ok(true),
            Some(Failure::Error(kind)) => Err(kind.into()),
        }
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

    /// The names in a folder, and what was done to them since they were synced.
    fn entries(&mut self, folder: usize) -> io::Result<(&mut BTreeMap<String, usize>, &mut Vec<Change>)> {
        match &mut self.nodes[folder] {
            Node::Folder { entries, changes, .. } => Ok((entries, changes)),
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
        let (entries, changes) = self.entries(folder)?;
        if entries.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        entries.insert(name.clone(), number);
        changes.push(Change::Add { name, node: number });
        self.nodes.push(node);
        Ok(number)
    }

    fn drop_name(&mut self, folder: usize, name: String) -> io::Result<()> {
        let (entries, changes) = self.entries(folder)?;
        entries.remove(&name);
        changes.push(Change::Remove { name });
        Ok(())
    }

    /// Takes up to `count` names out of a folder for good, and everything below them. What was done to the folder before and
    /// not synced never was.
    fn empty(&mut self, folder: usize, count: usize) {
        let Node::Folder { entries, synced, changes } = &mut self.nodes[folder] else { return };
        let doomed: Vec<(String, usize)> =
            entries.iter().take(count).map(|(name, &node)| (name.clone(), node)).collect();
        for (name, _) in &doomed {
            entries.remove(name);
            synced.remove(name);
        }
        changes.clear();
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
        let node = state.add(path, Node::file())?;
        Ok(Box::new(SimulatedFile { state: Arc::clone(&self.state), node }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        let folder = state.find(path)?;
        match &mut state.nodes[folder] {
            Node::Folder { entries, synced, changes } => {
                synced.clone_from(entries);
                changes.clear();
            }
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
        let (entries, changes) = state.entries(folder)?;
        if entries.contains_key(&new) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = entries.remove(&old).ok_or(io::ErrorKind::NotFound)?;
        entries.insert(new.clone(), node);
        changes.push(Change::Rename { from: old, to: new, node });
        Ok(())
    }

    /// A call that fails has removed half of the names.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let begun = state.begin();
        let (folder, name) = state.place(path)?;
        let doomed = state.find(path)?;
        let count = state.entries(doomed)?.0.len();
        if let Err(fault) = begun {
            state.empty(doomed, count.div_ceil(2));
            return Err(fault);
        }
        state.empty(doomed, count);
        state.drop_name(folder, name)
    }

    /// The name comes back with a loss of power unless the folder is synced.
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.begin()?;
        let ((folder, name), file) = (state.place(path)?, state.find(path)?);
        if let Node::Folder { .. } = &state.nodes[file] {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        state.drop_name(folder, name)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut state = lock(&self.state);
        state.begin()?;
        let folder = state.find(path)?;
        Ok(state.entries(folder)?.0.keys().cloned().collect())
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

impl SimulatedFile {
    /// One call of the system, and one operation. One that fails has written half of the bytes.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.state);
        let begun = state.begin();
        let count = match begun {
            Ok(false) => bytes.len(),
            // To take nothing would be an error.
            Ok(true) => bytes.len().div_ceil(2),
            Err(_) => bytes.len() / 2,
        };
        if let Node::File { written, .. } = &mut state.nodes[self.node] {
            written.extend_from_slice(&bytes[..count]);
        }
        begun.map(|_| count)
    }
}

impl DiskFile for SimulatedFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_fully(bytes, |bytes| self.write(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let begun = state.begin();
        if let Node::File { written, synced, forgotten } = &mut state.nodes[self.node] {
            if begun.is_err() {
                *forgotten = written != synced;
            } else if !*forgotten {
                synced.clone_from(written);
            }
        }
        begun.map(|_| ())
    }
}

#[cfg(test)]
mod tests;
