//! From a URL and the environment to a store that answers: who may in, and how long to try.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use super::error::failed;
use super::place::{Place, Scheme};
use crate::error::CheckpointError;

/// A connection is made in so many seconds, or tried again.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// One request with one part of a file takes so long at the most.
const REQUEST_WITHIN: Duration = Duration::from_secs(120);
/// How often a request is tried again, and until when the last try may begin.
const RETRIES_MAX: usize = 5;
const RETRY_WITHIN: Duration = Duration::from_secs(60);
/// Waits between two tries double from the first of these to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Variables of the environment that say who may write to a store, and where it is.
#[derive(Clone, Default)]
pub struct Settings(Vec<(String, String)>);

impl Settings {
    /// Those of these variables that stores know.
    pub fn of(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let known = |name: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
        Self(variables.into_iter().filter(|(name, value)| known(name) && !value.is_empty()).collect())
    }

    fn get(&self, wanted: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
    }

    /// Whether everything of S3 goes to an endpoint without TLS. Then no certificates are needed, and a machine may have none.
    fn is_plain(&self) -> bool {
        let endpoints = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
        let endpoint = endpoints.iter().find_map(|name| self.get(name));
        // Tokens come from another service, over TLS.
        endpoint.is_some_and(|url| url.starts_with("http://")) && self.get("AWS_WEB_IDENTITY_TOKEN_FILE").is_none()
    }

    fn lower(&self) -> impl Iterator<Item = (String, String)> {
        self.0.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
    }
}

impl fmt::Debug for Settings {
    /// The names alone: the values are secrets.
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// A client of the store. Nothing is sent yet.
pub(super) fn open(place: &Place, settings: &Settings) -> Result<Arc<dyn ObjectStore>, CheckpointError> {
    // `reqwest` takes the provider of the process, and panics without. That there is one already is as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let options = ClientOptions::new().with_connect_timeout(CONNECT_WITHIN).with_timeout(REQUEST_WITHIN);
    let options = if place.scheme() == Scheme::S3 && settings.is_plain() {
        options.with_no_system_certificates(true)
    } else {
        options
    };
    let (init_backoff, max_backoff) = BACKOFF;
    let backoff = BackoffConfig { init_backoff, max_backoff, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_WITHIN };
    // What a store does not know of the environment is for somebody else.
    macro_rules! configured {
        ($builder:expr) => {
            settings.lower().fold($builder.with_client_options(options).with_retry(retry), |builder, (name, value)| {
                match name.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                }
            })
        };
    }
    let built: Result<Arc<dyn ObjectStore>, object_store::Error> = match place.scheme() {
        Scheme::S3 => {
            // Not all that speak S3's protocol delete several objects in one request, and nobody here asks for that.
            let builder = AmazonS3Builder::new().with_config(AmazonS3ConfigKey::DisableBulkDelete, "true");
            configured!(builder).with_bucket_name(place.bucket()).build().map(|store| Arc::new(store) as _)
        }
        Scheme::Gs => configured!(GoogleCloudStorageBuilder::new())
            .with_bucket_name(place.bucket())
            .build()
            .map(|store| Arc::new(store) as _),
        Scheme::Az => configured!(MicrosoftAzureBuilder::new())
            .with_container_name(place.bucket())
            .build()
            .map(|store| Arc::new(store) as _),
        Scheme::File => Ok(Arc::new(LocalFileSystem::new().with_automatic_cleanup(true).with_fsync(true)) as _),
    };
    built.map_err(failed("make a client for", &place.to_string()))
}

/// Looks that a folder is there: a file server that is not mounted must not be taken for an empty one.
///
/// A mount that hangs takes a thread of its own with it, and not the wait's limit.
pub(super) async fn check_folder(place: &Place) -> Result<(), CheckpointError> {
    if place.scheme() != Scheme::File {
        return Ok(());
    }
    let path = format!("/{}", place.prefix());
    let looked = tokio::task::spawn_blocking(move || std::fs::read_dir(path).map(|_| ())).await;
    looked.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| CheckpointError::Store {
        operation: "look into the folder",
        url: place.to_string(),
        why: format!("{error}; mount the file server, or make the folder if it is none"),
        again: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        Settings::of(pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())))
    }

    #[test]
    fn secrets_are_not_printed() {
        let settings = settings(&[("AWS_SECRET_ACCESS_KEY", "hush"), ("HOME", "/root"), ("GOOGLE_BEARER_TOKEN", "")]);
        assert_eq!(format!("{settings:?}"), r#"["AWS_SECRET_ACCESS_KEY"]"#);
    }

    #[test]
    fn every_kind_of_store_has_a_client() {
        let keys =
            [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:1")];
        let azure = [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")];
        let google = [("GOOGLE_SKIP_SIGNATURE", "true")];
        for (url, settings) in [
            ("s3://bucket/a", settings(&keys)),
            ("az://container", settings(&azure)),
            ("gs://bucket", settings(&google)),
            ("file:///tmp", settings(&[])),
        ] {
            let store = open(&Place::parse(url).unwrap(), &settings);
            let no_certificates = |error: &CheckpointError| error.to_string().contains("install ca-certificates");
            assert!(store.as_ref().err().is_none_or(no_certificates), "{url}: {store:?}");
        }
        let half = settings(&keys[..1]);
        let message = open(&Place::parse("s3://bucket").unwrap(), &half).unwrap_err().to_string();
        assert!(message.contains("s3://bucket") && message.contains("AWS_SECRET_ACCESS_KEY"), "{message}");
    }
}
