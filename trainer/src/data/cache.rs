//! Files that are made once and found again by the hash of what they were made from.
//!
//! An entry is two files: `KIND-HASH` and `KIND-HASH.blake3`, the hash of the first. Both are written beside their
//! places and renamed, the hash last; a file that does not match its hash is made anew, and the log says so.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A folder of entries.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
}

/// An entry that was found or made.
#[derive(Debug)]
pub struct Entry {
    /// Where it lies.
    pub path: PathBuf,
    /// What is in it.
    pub bytes: Vec<u8>,
}

impl Cache {
    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|source| Error::Folder {
            key: "data.cache_dir",
            path: folder.to_owned(),
            source,
        })?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The entry of that kind for this key, read whole; `make` is called with the reason when there is no good one.
    ///
    /// # Errors
    /// What `make` returns, or an entry that cannot be written.
    pub fn find_or_make(&self, kind: &str, key: &str, make: impl FnOnce(&str) -> Result<Vec<u8>>) -> Result<Entry> {
        let path = self.folder.join(format!("{kind}-{}", &blake3::hash(key.as_bytes()).to_hex()[..32]));
        let reason = match check(&path) {
            Ok(bytes) => return Ok(Entry { path, bytes }),
            Err(reason) => reason,
        };
        if reason != ABSENT {
            tracing::warn!("the cached {kind} {} {reason}: it is made anew", path.display());
        }
        let bytes = make(reason)?;
        replace(&path, &bytes)?;
        replace(&hash_path(&path), blake3::hash(&bytes).to_hex().as_bytes())?;
        Ok(Entry { path, bytes })
    }
}

/// The reason of an entry that was never made.
pub const ABSENT: &str = "is not there";

/// The bytes of a good entry, or why there is none.
fn check(path: &Path) -> std::result::Result<Vec<u8>, &'static str> {
    let expected = std::fs::read(hash_path(path)).map_err(|_| ABSENT)?;
    let bytes = std::fs::read(path).map_err(|_| "cannot be read")?;
    match expected.as_slice() == blake3::hash(&bytes).to_hex().as_bytes() {
        true => Ok(bytes),
        false => Err("is damaged"),
    }
}

fn hash_path(path: &Path) -> PathBuf {
    path.with_extension("blake3")
}

/// Writes a file so that its place holds either what was there before or all of `bytes`.
///
/// # Errors
/// It cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = temporary(folder).map_err(Error::io("write in", folder))?;
    let write = |file: &mut File| file.write_all(bytes).and_then(|()| file.sync_all());
    write(file.as_file_mut()).map_err(Error::io("write", path))?;
    file.persist(path).map_err(|error| Error::io("replace", path)(error.error))?;
    sync_names(folder)
}

/// Makes the names in a folder durable.
///
/// # Errors
/// What the system says.
#[cfg(unix)]
pub fn sync_names(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder).and_then(|names| names.sync_all()).map_err(Error::io("sync", folder))
}

/// Elsewhere a folder cannot be opened.
#[cfg(not(unix))]
pub const fn sync_names(_: &Path) -> Result<()> {
    Ok(())
}

/// A temporary file that others may read once it has its name, as far as the umask lets them.
fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.prefix(".new-").tempfile_in(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_and_anew_only_when_it_is_damaged() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::open(folder.path()).expect("writable");
        let get = |made: &mut Option<String>| {
            let entry = cache.find_or_make("thing", "key", |reason| {
                *made = Some(reason.to_owned());
                Ok(b"value".to_vec())
            });
            entry.expect("made or found")
        };
        let mut made = None;
        let path = get(&mut made).path;
        assert_eq!(made.take().as_deref(), Some(ABSENT));
        assert_eq!(get(&mut made).bytes, b"value");
        assert_eq!(made, None);
        for damage in [&b"valuE"[..], b"", b"value and more"] {
            std::fs::write(&path, damage).expect("writable");
            assert_eq!(get(&mut made).bytes, b"value");
            assert_eq!(made.take().as_deref(), Some("is damaged"));
        }
    }
}
