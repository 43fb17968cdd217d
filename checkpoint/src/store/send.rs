//! A checkpoint's way into a store: announced first, then the files, the manifest last.
//!
//! There is no rename, and none is needed: a copy counts from the moment in which its manifest is there, and that object is
//! written in one request. Before it `manifest.json.partial`, the same text, announces which files will come, so that what a
//! crash leaves can be told from what others keep here.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt as _, PutPayload};
use tokio::task::JoinSet;

use super::error::failed;
use super::retain::{remove, tidy};
use super::shelf::{At, Shelf, is_complete};
use crate::disk::Disk;
use crate::error::CheckpointError;
use crate::layout;
use crate::manifest::{FileEntry, Manifest};

/// A file up to this size goes in one request; of a longer one this is a part. Stores want at least 5 MiB.
const PART_BYTES: u64 = 8 << 20;
/// Stores take 10 000 parts at the most; of a file that would need more they are longer.
const PARTS_MAX: u64 = 9_000;
/// Parts of a file that are on their way at a time.
const PARTS_IN_FLIGHT: usize = 4;
/// Files that are open at a time. Of more, those behind are opened when it is their turn.
const OPEN_MAX: usize = 128;

/// One file of the folder, open: retention may take the folder away meanwhile, and what is open stays readable.
struct Source<'a> {
    name: &'a str,
    entry: &'a FileEntry,
    path: PathBuf,
    reader: Box<dyn Read + Send>,
}

impl<'a> Source<'a> {
    fn open(
        disk: &dyn Disk,
        folder: &Path,
        (name, entry): (&'a String, &'a FileEntry),
    ) -> Result<Self, CheckpointError> {
        let path = folder.join(name);
        let reader = disk.open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CheckpointError::FileMissing { path: path.clone() },
            _ => CheckpointError::Io { operation: "open the file", path: path.clone(), source },
        })?;
        Ok(Self { name, entry, path, reader })
    }
}

/// Copies the checkpoint in `folder` to the store, and returns the bytes of its files.
///
/// # Errors
/// A file that is missing or not as its manifest says, also because it changed while it was read; whatever the store says.
/// The copy does not count then.
pub(super) async fn send(shelf: &Shelf, at: At, disk: &dyn Disk, folder: &Path) -> Result<u64, CheckpointError> {
    let path = folder.join(layout::MANIFEST);
    let text = Bytes::from(disk.read(&path).map_err(CheckpointError::io("read the manifest", &path))?);
    let manifest = Manifest::parse(&text, &path)?;
    let mut files = manifest.files.iter();
    let open = |file| Source::open(disk, folder, file);
    let sources: Vec<Source<'_>> = files.by_ref().take(OPEN_MAX).map(open).collect::<Result<_, _>>()?;
    let there = shelf.objects(at).await?;
    // Another checkpoint of this step, as of a run that was rewound, goes first. The same one counts on meanwhile: each
    // of its objects is replaced by equal bytes, in one instant each. Half of another one goes first as well: once this
    // one is announced, nobody would know which files were that one's.
    let announced = layout::partial(layout::MANIFEST);
    if is_complete(&there) {
        if shelf.get(at, layout::MANIFEST).await? != text {
            remove(shelf, at).await?;
        }
    } else if there.contains_key(&announced) && shelf.get(at, &announced).await? != text {
        tidy(shelf, at, &there).await?;
    }
    shelf.put(at, &announced, text.clone()).await?;
    for source in sources.into_iter().map(Ok).chain(files.map(open)) {
        put(shelf, at, source?).await?;
    }
    let there = shelf.objects(at).await?;
    // Whoever swept here meanwhile has taken files away.
    if !there.contains_key(&announced) || shelf.get(at, &announced).await? != text {
        let (operation, url) = ("go on with", shelf.object(at, &announced)?.url);
        let why = "another process writes to the same place: give one of the two runs another name or prefix".into();
        return Err(CheckpointError::Store { operation, url, why, again: false });
    }
    for (name, entry) in &manifest.files {
        check_size(shelf, at, name, entry, there.get(name).copied())?;
    }
    shelf.put(at, layout::MANIFEST, text).await?;
    shelf.delete(at, &announced).await?;
    Ok(manifest.files.values().map(|file| file.bytes).sum())
}

/// Checks that an object is there and as long as a manifest says.
pub(super) fn check_size(
    shelf: &Shelf,
    at: At,
    name: &str,
    entry: &FileEntry,
    found: Option<u64>,
) -> Result<(), CheckpointError> {
    let path = || Ok::<_, CheckpointError>(shelf.object(at, name)?.url.into());
    match found {
        None => Err(CheckpointError::FileMissing { path: path()? }),
        Some(found) if found != entry.bytes => {
            Err(CheckpointError::FileSize { path: path()?, expected: entry.bytes, found })
        }
        Some(_) => Ok(()),
    }
}

async fn put(shelf: &Shelf, at: At, source: Source<'_>) -> Result<(), CheckpointError> {
    let object = shelf.object(at, source.name)?;
    let refused = || failed("write", &object.url);
    let mut source = Hashing { source, read: 0, hasher: blake3::Hasher::new() };
    let part_bytes = part_bytes(source.source.entry.bytes);
    if source.source.entry.bytes <= part_bytes {
        let bytes = source.next(part_bytes)?;
        source.finish()?;
        return shelf.store.put(&object.path, bytes.into()).await.map(|_| ()).map_err(refused());
    }
    let mut upload = shelf.store.put_multipart(&object.path).await.map_err(refused())?;
    let sent = match parts(&mut *upload, &mut source, part_bytes, &object.url).await.and_then(|()| source.finish()) {
        // Only now is there an object.
        Ok(()) => upload.complete().await.map(|_| ()).map_err(refused()),
        Err(error) => Err(error),
    };
    if sent.is_err() {
        // What cannot be taken back now, the store's own rules for unfinished uploads take away; and of one that was completed
        // although nobody learned of it, there is nothing to take back.
        let _ = upload.abort().await;
    }
    sent
}

/// Sends a file part by part, a few at a time.
async fn parts(
    upload: &mut dyn MultipartUpload,
    source: &mut Hashing<'_>,
    part_bytes: u64,
    url: &str,
) -> Result<(), CheckpointError> {
    let mut under_way = JoinSet::new();
    let sent = async {
        loop {
            let part = source.next(part_bytes)?;
            let at_end = part.is_empty();
            if !at_end {
                under_way.spawn(upload.put_part(PutPayload::from(part)));
            }
            while under_way.len() >= PARTS_IN_FLIGHT || (at_end && !under_way.is_empty()) {
                let sent = under_way.join_next().await.expect("there are some");
                sent.map_err(object_store::Error::from).flatten().map_err(failed("write a part of", url))?;
            }
            if at_end {
                return Ok(());
            }
        }
    }
    .await;
    // A part that came after the upload was aborted would stay.
    under_way.shutdown().await;
    sent
}

/// The longest part of a file of so many bytes: whole megabytes.
fn part_bytes(file_bytes: u64) -> u64 {
    file_bytes.div_ceil(PARTS_MAX).next_multiple_of(1 << 20).max(PART_BYTES)
}

/// A file that is hashed while it is read, and must be what the manifest says.
struct Hashing<'a> {
    source: Source<'a>,
    read: u64,
    hasher: blake3::Hasher,
}

impl Hashing<'_> {
    /// The next part; an empty one at the end.
    fn next(&mut self, bytes_max: u64) -> Result<Vec<u8>, CheckpointError> {
        let wanted = bytes_max.min(self.source.entry.bytes - self.read);
        let mut part = Vec::with_capacity(wanted as usize);
        let read = (&mut self.source.reader).take(wanted).read_to_end(&mut part);
        read.map_err(CheckpointError::io("read the file", &self.source.path))?;
        self.read += part.len() as u64;
        if part.len() as u64 != wanted {
            return Err(self.other_size(self.read));
        }
        self.hasher.update(&part);
        Ok(part)
    }

    /// Looks that all of it was as it should be, and that nothing follows.
    fn finish(&mut self) -> Result<(), CheckpointError> {
        let more =
            self.source.reader.read(&mut [0]).map_err(CheckpointError::io("read the file", &self.source.path))?;
        if more > 0 {
            return Err(self.other_size(self.read + more as u64));
        }
        check_hash(&self.source.path, self.source.entry, self.hasher.finalize())
    }

    fn other_size(&self, found: u64) -> CheckpointError {
        CheckpointError::FileSize { path: self.source.path.clone(), expected: self.source.entry.bytes, found }
    }
}

/// Compares the hash of bytes with a manifest's.
pub(super) fn check_hash(path: &Path, entry: &FileEntry, found: blake3::Hash) -> Result<(), CheckpointError> {
    let (expected, found) = (&entry.blake3, found.to_hex());
    if found.as_str() == expected {
        return Ok(());
    }
    Err(CheckpointError::FileHash { path: path.into(), expected: expected.clone(), found: found.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_has_more_parts_than_stores_take() {
        for (bytes, part) in
            [(0, 8 << 20), (8 << 20, 8 << 20), (70 << 30, 8 << 20), (80 << 30, 10 << 20), (5 << 40, 583 << 20)]
        {
            assert_eq!(part_bytes(bytes), part, "{bytes}");
            assert!(bytes.div_ceil(part_bytes(bytes)) <= 10_000);
        }
    }
}
