//! Where copies of checkpoints are kept: a URL, checked before anything begins.

use std::fmt;

/// What a URL may begin with.
pub const SCHEMES: &[&str] = &["s3://", "gs://", "az://", "file://"];

/// The longest URL. Names of objects go on from it, and no store takes more than 1024 bytes.
const URL_BYTES_MAX: usize = 700;

/// Which kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Amazon S3 and whatever speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A folder, as of a file server that is mounted here.
    File,
}

/// A place in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    scheme: Scheme,
    /// The bucket or container; empty of a folder.
    bucket: String,
    /// What the names of all objects begin with: components without empty ones, none at a bucket's root.
    prefix: Vec<String>,
}

impl Place {
    /// Reads a URL. It has no room for credentials: they belong into the environment.
    ///
    /// # Errors
    /// What was expected, and what came.
    pub fn parse(url: &str) -> Result<Self, String> {
        let known = [Scheme::S3, Scheme::Gs, Scheme::Az, Scheme::File];
        let found = SCHEMES.iter().zip(known).find_map(|(name, scheme)| Some((scheme, url.strip_prefix(name)?)));
        let Some((scheme, rest)) = found else {
            return Err(format!("expected a URL that begins with one of {}, found {url:?}", SCHEMES.join(", ")));
        };
        if url.len() > URL_BYTES_MAX {
            return Err(format!("expected at most {URL_BYTES_MAX} bytes, found {}", url.len()));
        }
        if rest.contains(['@', '?', '#']) {
            return Err(
                "expected a bucket and a prefix and nothing else: credentials and options come from the environment \
                 (AWS_ACCESS_KEY_ID and the like)"
                    .into(),
            );
        }
        let (bucket, path) = match (scheme, rest.split_once('/')) {
            (Scheme::File, Some(("", path))) => (String::new(), path),
            (Scheme::File, _) => return Err(format!("expected an absolute path, as file:///mnt/runs, found {url:?}")),
            (_, Some((bucket, path))) => (bucket.to_owned(), path),
            (_, None) => (rest.to_owned(), ""),
        };
        if let Some(why) = fault_of_bucket(scheme, &bucket) {
            return Err(format!("{why}, found {bucket:?}"));
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        let prefix: Vec<String> = path.split('/').filter(|_| !path.is_empty()).map(Into::into).collect();
        if let Some(odd) = prefix.iter().find(|name| !is_plain(name)) {
            return Err(format!(
                "expected names of letters, digits and -_.=+, between single slashes, none of them . or .., found {odd:?}"
            ));
        }
        if scheme == Scheme::File && prefix.is_empty() {
            return Err("expected a folder, found the root of all".into());
        }
        Ok(Self { scheme, bucket, prefix })
    }

    /// A place below this one. `name` is a plain name.
    #[must_use]
    pub fn below(&self, name: &str) -> Self {
        assert!(is_plain(name), "{name:?} is no name below {self}");
        let mut below = self.clone();
        below.prefix.push(name.into());
        below
    }

    /// Which kind of store.
    #[must_use]
    pub const fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The bucket or container.
    #[must_use]
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// What the names of all objects begin with.
    #[must_use]
    pub fn prefix(&self) -> String {
        self.prefix.join("/")
    }

    /// The last component, and the place above it; `None` at the root.
    #[must_use]
    pub fn split(&self) -> Option<(Self, &str)> {
        let (last, above) = self.prefix.split_last()?;
        Some((Self { scheme: self.scheme, bucket: self.bucket.clone(), prefix: above.to_vec() }, last))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(SCHEMES[self.scheme as usize])?;
        to.write_str(&self.bucket)?;
        self.prefix.iter().try_for_each(|name| write!(to, "/{name}"))
    }
}

/// Letters and digits that no store, file system or shell takes for anything else.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.=+,".contains(c);
    !name.is_empty() && name.chars().all(plain) && !matches!(name, "." | "..")
}

/// The stores' own rules, as far as they agree.
fn fault_of_bucket(scheme: Scheme, bucket: &str) -> Option<&'static str> {
    if scheme == Scheme::File {
        return None;
    }
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let inner =
        |c: char| edge(c) || c == '-' || (scheme != Scheme::Az && c == '.') || (scheme == Scheme::Gs && c == '_');
    let fine = (3..=63).contains(&bucket.len())
        && bucket.chars().all(inner)
        && bucket.starts_with(edge)
        && bucket.ends_with(edge);
    (!fine).then_some("expected the name of a bucket after the scheme, 3 to 63 lower-case letters, digits and hyphens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_store_bucket_and_prefix() {
        for (url, scheme, bucket, prefix) in [
            ("s3://models/llama/runs", Scheme::S3, "models", "llama/runs"),
            ("s3://models/llama/", Scheme::S3, "models", "llama"),
            ("s3://models", Scheme::S3, "models", ""),
            ("s3://models/", Scheme::S3, "models", ""),
            ("gs://my_models.example/a", Scheme::Gs, "my_models.example", "a"),
            ("az://container/a=b/c", Scheme::Az, "container", "a=b/c"),
            ("file:///mnt/nfs", Scheme::File, "", "mnt/nfs"),
        ] {
            let place = Place::parse(url).unwrap();
            assert_eq!((place.scheme(), place.bucket(), &*place.prefix()), (scheme, bucket, prefix), "{url}");
            assert_eq!(place.to_string(), url.trim_end_matches('/'));
            let below = place.below("run-1");
            assert_eq!(below.split(), Some((place.clone(), "run-1")));
            assert_eq!(Place::parse(&below.to_string()), Ok(below), "what is printed can be read");
        }
    }

    #[test]
    fn everything_else_is_refused_with_what_was_expected() {
        for (url, said) in [
            ("", "one of s3://"),
            ("/mnt/nfs", "one of s3://"),
            ("http://bucket/a", "one of s3://"),
            ("S3://bucket", "one of s3://"),
            ("s3://", "the name of a bucket"),
            ("s3:///a", "the name of a bucket"),
            ("s3://ab", "the name of a bucket"),
            ("s3://Bucket", "the name of a bucket"),
            ("s3://-bucket", "the name of a bucket"),
            ("az://a.container", "the name of a bucket"),
            ("s3://key:secret@bucket/a", "come from the environment"),
            ("s3://bucket/a?region=x", "come from the environment"),
            ("s3://bucket//a", "single slashes"),
            ("s3://bucket/a/../b", "single slashes"),
            ("s3://bucket/a b", "single slashes"),
            ("s3://bucket/a%2fb", "single slashes"),
            ("file://host/a", "an absolute path"),
            ("file://a", "an absolute path"),
            ("file:///", "a folder"),
        ] {
            let why = Place::parse(url).unwrap_err();
            assert!(why.contains(said), "{url:?}: {why}");
        }
        assert!(Place::parse(&format!("s3://bucket/{}", "a".repeat(700))).unwrap_err().contains("at most 700"));
    }
}
