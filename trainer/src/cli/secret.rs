//! What keeps strangers out of a run: the join secret, a flag in its place, or loopback.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::sync::Arc;

use parallel::transport::tls::{Keys, SECRET_BYTES, Security};

use crate::error::{Error, Result};
use crate::log::say;

/// The secret itself.
const SECRET: &str = "TRIBUTARY_JOIN_SECRET";
/// A file with the secret.
const FILE: &str = "TRIBUTARY_JOIN_SECRET_FILE";

/// What the environment and `--trusted-network` ask for. Only the keys go on from here, not the secret; it is never an
/// argument, which others on the machine could read. Workers find it in the environment that they inherit.
///
/// # Errors
/// Both variables, a file that cannot be read, or a secret that can be guessed.
pub(super) fn security(trusted_network: bool, get: impl Fn(&str) -> Option<OsString>) -> Result<Security> {
    // The flag comes first: it is what the person has just written.
    if trusted_network {
        return Ok(Security::TrustedNetwork);
    }
    let (from, secret) = match (get(SECRET), get(FILE)) {
        (None, None) => return Ok(Security::Loopback),
        (Some(_), Some(_)) => {
            return Err(Error::Usage(format!("{SECRET} and {FILE}: expected one of them, found both")));
        }
        (Some(secret), None) => (SECRET.to_owned(), secret.into_vec()),
        (None, Some(file)) => read(Path::new(&file))?,
    };
    // What an editor or `echo` puts behind it is not a part of it.
    let end = secret.iter().rposition(|byte| !b"\r\n".contains(byte)).map_or(0, |last| last + 1);
    match Keys::of(&secret[..end]) {
        Ok(keys) => Ok(Security::Tls(Arc::new(keys))),
        Err(error) => Err(Error::Usage(format!("{from}: {error}"))),
    }
}

/// The name of the file, and what is in it, as far as that could be a secret.
fn read(path: &Path) -> Result<(String, Vec<u8>)> {
    let from = format!("{FILE}: {}", path.display());
    // One byte more than a secret may have, and the end of a line: what is longer is seen to be.
    let most = *SECRET_BYTES.end() as u64 + 3;
    let mut secret = Vec::new();
    let read = File::open(path).and_then(|file| file.take(most).read_to_end(&mut secret));
    read.map_err(|error| Error::Usage(format!("{from}: expected a file with the secret: {error}")))?;
    Ok((from, secret))
}

/// Says aloud that connections are plain.
pub(super) fn warn_of_plain(security: &Security, get: impl Fn(&str) -> Option<OsString>) {
    if let Security::TrustedNetwork = security {
        let unused = [SECRET, FILE].into_iter().find(|name| get(name).is_some());
        let unused = unused.map_or_else(String::new, |name| format!("; {name} is not used"));
        say(&format!(
            "WARNING: --trusted-network: connections are neither encrypted nor authenticated; whoever reaches these ports \
             can read and change this run{unused}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "sixteen bytes...";

    /// What comes of these variables.
    fn of(secret: Option<&str>, file: Option<&str>, trusted_network: bool) -> Result<Security> {
        let get = |name: &str| match name {
            SECRET => secret.map(OsString::from),
            FILE => file.map(OsString::from),
            other => panic!("{other} is none of its business"),
        };
        security(trusted_network, get)
    }

    #[test]
    fn a_secret_means_tls_and_without_one_there_is_only_loopback_or_the_flag() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        std::fs::write(&path, format!("{GOOD}\r\n")).expect("writable");
        let file = path.to_str();
        assert!(matches!(of(None, None, false), Ok(Security::Loopback)));
        assert!(matches!(of(Some(GOOD), None, false), Ok(Security::Tls(_))));
        assert!(matches!(of(None, file, false), Ok(Security::Tls(_))));
        assert!(matches!(of(None, None, true), Ok(Security::TrustedNetwork)));
        assert!(matches!(of(Some(GOOD), None, true), Ok(Security::TrustedNetwork)));
        assert!(matches!(of(None, file, true), Ok(Security::TrustedNetwork)));
    }

    #[test]
    fn what_is_no_secret_is_refused_by_name_and_not_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).expect("writable");
            path.display().to_string()
        };
        let (short, long) = (write("short", b"fifteen bytes..\n"), write("long", &[b'x'; 9000]));
        let (missing, good) = (folder.path().join("missing").display().to_string(), write("good", GOOD.as_bytes()));
        let check = |secret: Option<&str>, file: Option<&str>, said: &[&str]| {
            let error = of(secret, file, false).expect_err("no secret");
            let text = format!("{error} {error:?}");
            assert!(said.iter().all(|said| text.contains(said)), "expected {said:?} in {text}");
            assert!(!["fifteen", "sixteen", "xxx"].iter().any(|secret| text.contains(secret)), "{text}");
        };
        check(Some(GOOD), Some(&good), &[SECRET, FILE, "expected one of them, found both"]);
        check(Some(""), None, &[SECRET, "found 0"]);
        check(
            Some("fifteen bytes..\n"),
            None,
            &["JOIN_SECRET: expected a secret of 16 to 4096 bytes, found 15", "openssl"],
        );
        check(None, Some(&short), &[FILE, &short, "expected a secret of 16 to 4096 bytes, found 15"]);
        check(None, Some(&long), &[FILE, &long, "expected a secret of 16 to 4096 bytes"]);
        check(None, Some(&missing), &[FILE, &missing, "expected a file with the secret"]);
    }

    #[test]
    fn a_secret_is_not_shown() {
        let shown = format!("{:?}", of(Some(GOOD), None, false).expect("good"));
        assert_eq!(shown, "Tls(Keys { .. })");
    }
}
