//! Copies of checkpoints in an object store, so that they outlive the machine.
//!
//! A copy is the files of a checkpoint's folder as objects of the same names. `docs/checkpoint-format.md` says in which order
//! they come and go, and why a copy is whole exactly when its manifest is there.
//!
//! - `place`: the URL. `open`: from it and the environment to a client.
//! - `shelf`: the names of objects, and single requests. `error`: what a refusal means.
//! - `send`: a checkpoint's way into the store. `receive`: the way back, and the check of what is there; `merge`: what
//!   several machines have, put together.
//! - `retain`: which copies stay, and what becomes of left-overs.
//! - `uploader`: the thread that does it while training goes on.

mod error;
mod merge;
mod open;
pub mod place;
mod receive;
mod retain;
mod send;
mod shelf;
pub mod uploader;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::disk::Disk;
use crate::error::CheckpointError;
use crate::manifest::Manifest;
use crate::reader::Audit;

pub use open::Settings;
pub use place::Place;
pub use shelf::{At, Seat};
use shelf::{Shelf, is_complete};
pub use uploader::{News, Task, Uploader};

/// A store that was asked what it has, and has not said so by then, is not there.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// The copies of one run's checkpoints. Every call waits for the store.
#[derive(Debug)]
pub struct Remote {
    shelf: Shelf,
    runtime: Waits,
}

/// A runtime whose end waits for nothing: a look-up of a name, or a mount, that hangs must not hold up the process.
#[derive(Debug)]
struct Waits(Option<Runtime>);

impl Waits {
    fn block_on<T>(&self, answer: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("it is there until it is dropped").block_on(answer)
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Remote {
    /// Those at the place of a run. Nothing is sent yet.
    ///
    /// # Errors
    /// Something of the environment makes no sense.
    pub fn open(place: &Place, settings: &Settings) -> Result<Self, CheckpointError> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(CheckpointError::io("start a runtime for", Path::new(&place.to_string())))?;
        let runtime = Waits(Some(runtime));
        Ok(Self { shelf: Shelf::open(place, settings)?, runtime })
    }

    /// The place.
    #[must_use]
    pub fn url(&self) -> String {
        self.shelf.place.to_string()
    }

    /// The URL of a copy.
    #[must_use]
    pub fn url_of(&self, at: At) -> String {
        at.below(&self.shelf.place).to_string()
    }

    /// The copies that count, by step ascending.
    ///
    /// # Errors
    /// The store refuses, or does not answer in [`ANSWER_WITHIN`].
    pub fn list(&self) -> Result<Vec<At>, CheckpointError> {
        let listing = self.soon("list", self.shelf.list())?;
        Ok(listing.into_iter().filter(|(_, objects)| is_complete(objects)).map(|(at, _)| at).collect())
    }

    /// A copy's manifest.
    ///
    /// # Errors
    /// It is damaged; the store refuses, or does not answer in [`ANSWER_WITHIN`].
    pub fn manifest(&self, at: At) -> Result<Manifest, CheckpointError> {
        self.soon("read", retain::manifest(&self.shelf, at)).map(|(manifest, _)| manifest)
    }

    /// The bytes of a small file of a copy.
    ///
    /// # Errors
    /// As [`manifest`](Self::manifest); no such file.
    pub fn attachment(&self, at: At, name: &str) -> Result<Vec<u8>, CheckpointError> {
        self.soon("read", receive::attachment(&self.shelf, at, name))
    }

    /// Reads and hashes every file of a copy, and keeps nothing.
    ///
    /// # Errors
    /// The store refuses or does not answer, which says nothing of the copy.
    pub fn audit(&self, at: At) -> Result<Audit, CheckpointError> {
        self.runtime.block_on(receive::audit(&self.shelf, at))
    }

    /// Brings the copies that some machines have of a step into a folder of checkpoints, put together, and returns where that
    /// is. What all ranks have alike comes from the first of `seats`.
    ///
    /// # Errors
    /// What is damaged or missing of them, or does not fit together; what the store or the disk says. The folder has no such checkpoint then.
    pub fn fetch(&self, step: u64, seats: &[Seat], disk: &dyn Disk, folder: &Path) -> Result<PathBuf, CheckpointError> {
        self.runtime.block_on(receive::fetch(&self.shelf, step, seats, disk, folder))
    }

    fn soon<T>(
        &self,
        operation: &'static str,
        answer: impl Future<Output = Result<T, CheckpointError>>,
    ) -> Result<T, CheckpointError> {
        let answer = async { tokio::time::timeout(ANSWER_WITHIN, answer).await };
        self.runtime.block_on(answer).unwrap_or_else(|_| {
            let why = format!(
                "it has not answered in {} s: is the address right, and the network up?",
                ANSWER_WITHIN.as_secs()
            );
            Err(CheckpointError::Store { operation, url: self.url(), why, again: true })
        })
    }
}
