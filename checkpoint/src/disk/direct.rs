//! Large files past the page cache (`O_DIRECT`).
//!
//! A checkpoint is written to be durable, and few are read. By way of the page cache every byte of one is copied once more into
//! memory that the system must find first, pushes out what training reads, and keeps the system's own threads busy on whatever
//! core they are given. Here a thread hands whole buffers to the disk while the caller hashes what comes next. Whoever reads the
//! file soon, to copy it to a store or because the run is started again, reads it from the disk.
//!
//! What the last buffer has too little for goes the usual way, and so does everything where the file system refuses: some do when
//! the flag is set, and some with the first write.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::real::write_back;
use super::write_fully;

/// A multiple of every disk's block, in memory, in length and in the file.
pub(super) const ALIGNMENT: usize = 4096;
/// What is handed to the disk at once.
const BUFFER_BYTES: usize = 2 << 20;
/// One that is filled, one that is being written, and one between them.
const BUFFERS: usize = 3;

/// The rest of a file, on its way to the disk.
#[derive(Debug)]
pub(super) struct Direct {
    file: Arc<File>,
    current: Buffer,
    /// How many there are, and how many of them the thread has.
    made: usize,
    away: usize,
    full: Option<SyncSender<Buffer>>,
    back: Receiver<(Buffer, io::Result<()>)>,
    thread: Option<JoinHandle<()>>,
}

/// Memory that a disk can read from.
#[derive(Debug)]
struct Buffer {
    memory: Box<[u8]>,
    /// Where the aligned part begins, and how much of it is filled.
    start: usize,
    filled: usize,
}

impl Direct {
    /// Takes over a file whose position is a multiple of [`ALIGNMENT`]; `None` where that cannot be.
    pub(super) fn begin(file: &Arc<File>) -> Option<Self> {
        set_direct(file, true).ok()?;
        let (full, filled) = sync_channel(BUFFERS);
        let (emptied, back) = sync_channel(BUFFERS);
        let to = Arc::clone(file);
        // It has the priority of the thread that makes it.
        let thread = std::thread::Builder::new().name("disk".into()).spawn(move || run(&to, &filled, &emptied));
        match thread {
            Ok(thread) => Some(Self {
                file: Arc::clone(file),
                current: Buffer::new(),
                made: 1,
                away: 0,
                full: Some(full),
                back,
                thread: Some(thread),
            }),
            Err(error) => {
                tracing::debug!(%error, "a file is written by way of the page cache");
                set_direct(file, false).ok().and(None)
            }
        }
    }

    /// Appends `bytes`. An error may be of bytes that were appended before, and is the last word: nothing may follow it.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = self.current.take(bytes);
            if self.current.is_full() {
                let next = match self.made < BUFFERS {
                    true => {
                        self.made += 1;
                        Buffer::new()
                    }
                    false => self.take_back()?,
                };
                let full = std::mem::replace(&mut self.current, next);
                self.full.as_ref().and_then(|line| line.send(full).ok()).ok_or_else(gone)?;
                self.away += 1;
            }
        }
        Ok(())
    }

    /// Waits until everything was handed to the disk, the rest by way of the page cache.
    pub(super) fn finish(mut self) -> io::Result<()> {
        while self.away > 0 {
            self.take_back()?;
        }
        set_direct(&self.file, false)?;
        write_fully(self.current.bytes(), |bytes| (&*self.file).write(bytes))
    }

    fn take_back(&mut self) -> io::Result<Buffer> {
        let (buffer, result) = self.back.recv().map_err(|_| gone())?;
        self.away -= 1;
        result.map(|()| buffer)
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.full = None;
        // It ends with the buffers that it has; what became of them nobody asks.
        self.thread.take().map(JoinHandle::join);
    }
}

impl Buffer {
    fn new() -> Self {
        let memory = vec![0; BUFFER_BYTES + ALIGNMENT].into_boxed_slice();
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, filled: 0 }
    }

    /// Takes what there is room for, and gives back the rest.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - self.filled));
        self.memory[self.start + self.filled..][..now.len()].copy_from_slice(now);
        self.filled += now.len();
        later
    }

    const fn is_full(&self) -> bool {
        self.filled == BUFFER_BYTES
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.filled]
    }
}

/// The thread: one buffer after the other. After a failure it writes nothing more.
fn run(file: &File, full: &Receiver<Buffer>, back: &SyncSender<(Buffer, io::Result<()>)>) {
    let (mut direct, mut failed) = (true, false);
    for mut buffer in full {
        let result = if failed {
            Err(io::Error::other("what comes before it could not be written"))
        } else {
            write_fully(buffer.bytes(), |bytes| match (&*file).write(bytes) {
                Err(error) if direct && error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    direct = false;
                    set_direct(file, false)?;
                    (&*file).write(bytes)
                }
                other => other,
            })
        };
        failed |= result.is_err();
        if !direct && let Ok(end) = (&*file).stream_position() {
            write_back(file, end - buffer.filled as u64, end);
        }
        buffer.filled = 0;
        if back.send((buffer, result)).is_err() {
            return;
        }
    }
}

/// Whether what is written to the file from now on goes past the page cache.
fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, on);
    Ok(fcntl_setfl(file, flags)?)
}

fn gone() -> io::Error {
    io::Error::other("the thread that writes has died; please report this")
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read as _;
    use std::path::Path;

    use super::*;

    fn create(path: &Path) -> Arc<File> {
        Arc::new(OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap())
    }

    fn bytes(length: usize) -> Vec<u8> {
        (0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    #[test]
    fn what_was_appended_in_any_pieces_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let lengths = [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 9 * BUFFER_BYTES + 12_345];
        for (number, length) in lengths.into_iter().enumerate() {
            let (path, all) = (folder.path().join(number.to_string()), bytes(length));
            let file = create(&path);
            let Some(mut direct) = Direct::begin(&file) else {
                println!("not tried: the file system of {} knows no O_DIRECT", folder.path().display());
                return;
            };
            assert!(fcntl_getfl(&*file).unwrap().contains(OFlags::DIRECT));
            let mut rest = &all[..];
            let mut piece = 1;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(piece));
                direct.append(now).unwrap();
                (rest, piece) = (later, piece * 3 % 1_000_003);
            }
            direct.finish().unwrap();
            assert!(!fcntl_getfl(&*file).unwrap().contains(OFlags::DIRECT));
            assert!(std::fs::read(&path).unwrap() == all, "{length} bytes");
        }
    }

    #[test]
    fn where_the_system_refuses_a_write_it_goes_by_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let (path, all) = (folder.path().join("file"), bytes(5 * BUFFER_BYTES + 7));
        let file = create(&path);
        // Behind one byte nothing is aligned.
        (&*file).write_all(&all[..1]).unwrap();
        let Some(mut direct) = Direct::begin(&file) else { return };
        direct.append(&all[1..]).unwrap();
        direct.finish().unwrap();
        let mut found = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut found).unwrap();
        assert!(found == all);
    }

    #[test]
    fn a_failure_is_told_by_what_follows_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        drop(create(&path));
        // A file that cannot be written to.
        let file = Arc::new(File::open(&path).unwrap());
        let Some(mut direct) = Direct::begin(&file) else { return };
        let error = direct.append(&bytes(10 * BUFFER_BYTES)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::BADF.raw_os_error()), "{error}");
        // And where nothing follows, by the end.
        let mut direct = Direct::begin(&file).unwrap();
        direct.append(&bytes(BUFFER_BYTES)).unwrap();
        let error = direct.finish().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::BADF.raw_os_error()), "{error}");
    }

    #[test]
    fn one_that_is_given_up_leaves_no_thread() {
        let folder = tempfile::tempdir().unwrap();
        let file = create(&folder.path().join("file"));
        let Some(mut direct) = Direct::begin(&file) else { return };
        direct.append(&bytes(4 * BUFFER_BYTES)).unwrap();
        drop(direct);
        assert_eq!(Arc::strong_count(&file), 1, "the thread had the other one");
    }
}
