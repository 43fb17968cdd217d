//! A file to which whole records are appended, on a disk that may be full for a while.
//!
//! A write that fails may leave a part of a record. That is taken back, so that the file ends with a whole one, and the record
//! waits in memory, up to a bound, until a later write finds room for all that wait.

use std::fs::File;
use std::io::{self, Write as _};

/// What waits for one file at the most: lines of metrics of about a hundred thousand steps.
pub const PENDING_BYTES_MAX: usize = 64 << 20;

/// An open file and what waits for it.
#[derive(Debug)]
pub struct Appended {
    /// Open for appending: the next write follows what is left when something was taken back.
    file: File,
    /// What people call it.
    name: &'static str,
    /// Bytes of it that are whole records.
    written: u64,
    /// Whether a part of a record may be behind those.
    is_torn: bool,
    /// Records that the disk had no room for yet.
    pending: Vec<u8>,
    /// How many these are.
    waiting: u64,
    /// Records that memory had no room for either, since the disk last had.
    dropped: u64,
}

/// A record is not in the file.
#[derive(Debug)]
pub struct Refused {
    /// What the disk said.
    pub error: io::Error,
    /// Records that wait by now.
    pub waiting: u64,
    /// Records that are lost by now, this one the last of them if there are any.
    pub dropped: u64,
}

impl Refused {
    /// Whether this is the first that waits.
    #[must_use]
    pub const fn is_first(&self) -> bool {
        self.waiting == 1 && self.dropped == 0
    }
}

impl Appended {
    /// A file that is open for appending, and that nobody else writes to.
    ///
    /// # Errors
    /// The system does not say how long it is.
    pub fn new(file: File, name: &'static str) -> io::Result<Self> {
        let written = file.metadata()?.len();
        Ok(Self { file, name, written, is_torn: false, pending: Vec::new(), waiting: 0, dropped: 0 })
    }

    /// Writes a record behind those that wait.
    ///
    /// # Errors
    /// The disk takes none of them. The record waits then too, or is dropped where [`PENDING_BYTES_MAX`] do already.
    pub fn append(&mut self, record: &[u8]) -> Result<(), Refused> {
        self.append_by(record, |file, bytes| file.write_all(bytes))
    }

    /// As [`append`](Self::append), and says in the log when records begin to wait, and when they begin to be lost.
    pub fn append_or_tell(&mut self, record: &[u8]) {
        let (name, appended) = (self.name, self.append(record));
        match appended {
            Err(refused) if refused.is_first() => {
                tracing::warn!("{name}: what is to be written waits in memory: {}", refused.error);
            }
            Err(Refused { error, dropped: 1, .. }) => {
                tracing::warn!(
                    "{name}: no more can wait in memory, and what follows is lost until there is room: {error}"
                );
            }
            _ => {}
        }
    }

    /// Writes the records that wait.
    ///
    /// # Errors
    /// The disk does not take them, and they wait on.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flush_by(|file, bytes| file.write_all(bytes))
    }

    fn append_by(
        &mut self,
        record: &[u8],
        write: impl FnOnce(&mut File, &[u8]) -> io::Result<()>,
    ) -> Result<(), Refused> {
        let before = self.pending.len();
        self.pending.extend_from_slice(record);
        self.waiting += 1;
        let Err(error) = self.flush_by(write) else { return Ok(()) };
        // Behind one that is lost none waits, however short: there is one gap.
        if self.dropped > 0 || self.pending.len() > PENDING_BYTES_MAX {
            self.pending.truncate(before);
            self.waiting -= 1;
            self.dropped += 1;
        }
        Err(Refused { error, waiting: self.waiting, dropped: self.dropped })
    }

    fn flush_by(&mut self, write: impl FnOnce(&mut File, &[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        if self.is_torn {
            self.file.set_len(self.written)?;
            self.is_torn = false;
        }
        if let Err(error) = write(&mut self.file, &self.pending) {
            // At once, for others may be reading; what cannot be taken back now is before the next write.
            self.is_torn = self.file.set_len(self.written).is_err();
            return Err(error);
        }
        self.written += self.pending.len() as u64;
        self.pending.clear();
        (self.waiting, self.dropped) = (0, 0);
        Ok(())
    }

    /// For tests: goes on with another open file, and returns the one that it had.
    #[cfg(test)]
    pub fn exchange(&mut self, file: File) -> File {
        std::mem::replace(&mut self.file, file)
    }
}

impl Drop for Appended {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            let (name, lost) = (self.name, self.waiting + self.dropped);
            tracing::warn!("{name}: there was no room to the end for {lost} records, and they are lost: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::path::{Path, PathBuf};

    use super::*;

    /// An empty file in a folder.
    fn records(folder: &Path) -> (PathBuf, Appended) {
        let path = folder.join("records");
        let file = OpenOptions::new().create(true).append(true).open(&path).expect("writable");
        (path, Appended::new(file, "records").expect("a file"))
    }

    /// A disk that has room for so many bytes more.
    fn full(room: usize) -> impl FnOnce(&mut File, &[u8]) -> io::Result<()> {
        move |file, bytes| {
            file.write_all(&bytes[..room.min(bytes.len())])?;
            Err(io::ErrorKind::StorageFull.into())
        }
    }

    #[test]
    fn a_part_of_a_record_is_taken_back_and_all_follow_in_order_when_there_is_room() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, mut records) = records(folder.path());
        let text = || fs::read_to_string(&path).expect("readable");
        records.append(b"one\n").expect("there is room");
        for (record, waiting) in [("two\n", 1), ("three\n", 2)] {
            // The first write that fails leaves a part of "two", the next one all of it and a part of "three".
            let refused = records.append_by(record.as_bytes(), full(6 * waiting as usize - 4)).expect_err("it is full");
            assert_eq!((refused.waiting, refused.dropped, refused.is_first()), (waiting, 0, waiting == 1));
            assert_eq!(text(), "one\n", "whole records only");
        }
        records.append(b"four\n").expect("there is room again");
        assert_eq!(text(), "one\ntwo\nthree\nfour\n");
        // The control: without the way back there is half of one before the next.
        full(2)(&mut records.file, b"five\n").expect_err("it is full");
        records.append(b"six\n").expect("there is room");
        assert!(text().ends_with("four\nfisix\n"));
    }

    #[test]
    fn what_cannot_be_taken_back_at_once_goes_before_the_next_write() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, mut records) = records(folder.path());
        let text = || fs::read_to_string(&path).expect("readable");
        records.append(b"one\n").expect("writable");
        let good = records.exchange(File::open(&path).expect("readable"));
        let torn = |_: &mut File, bytes: &[u8]| {
            full(2)(&mut OpenOptions::new().append(true).open(&path).expect("writable"), bytes)
        };
        records.append_by(b"two\n", torn).expect_err("it is full");
        assert_eq!(text(), "one\ntw", "a file that is open for reading cannot be cut");
        records.append(b"three\n").expect_err("nor can it be written");
        records.exchange(good);
        records.append(b"four\n").expect("writable");
        assert_eq!(text(), "one\ntwo\nthree\nfour\n");
    }

    #[test]
    fn what_waits_is_bounded_and_behind_what_is_lost_nothing_waits() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, mut records) = records(folder.path());
        let long = vec![b'x'; PENDING_BYTES_MAX / 2 + 1];
        let mut refused = |record: &[u8]| {
            let Refused { waiting, dropped, .. } = records.append_by(record, full(0)).expect_err("it is full");
            (waiting, dropped)
        };
        assert_eq!([refused(&long), refused(&long), refused(b"short")], [(1, 0), (1, 1), (1, 2)]);
        records.flush().expect("there is room");
        assert_eq!(fs::metadata(&path).expect("a file").len(), long.len() as u64);
        let refused = records.append_by(b"short", full(0)).expect_err("it is full again");
        assert!(refused.is_first(), "what was lost is counted anew: {refused:?}");
        drop(records);
        assert_eq!(fs::metadata(&path).expect("a file").len(), long.len() as u64 + 5, "the end tries once more");
    }
}
