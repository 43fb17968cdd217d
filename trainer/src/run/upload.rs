//! Copies of a run's checkpoints in a store. Whoever gives checkpoints their name copies them: the only process, or the
//! lowest rank of those that share a folder.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint::disk::RealDisk;
use checkpoint::store::{News, Remote, Seat, Task, Uploader};
use parallel::progress::Stage;
use serde_json::json;

use super::{Request, Run};
use crate::error::{Error, Result};
use crate::run::folder::check_name;
use crate::run::start::retention;

/// How long to wait before saying again that one still waits.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The run's place in the store, if its recipe names one.
///
/// # Errors
/// A name that is none, or an environment that makes no sense.
pub fn remote(request: &Request) -> Result<Option<Remote>> {
    let Some(place) = &request.recipe.checkpoint.upload_to else { return Ok(None) };
    check_name(&request.name)?;
    Ok(Some(Remote::open(&place.below(&request.name), &request.store)?))
}

/// Starts the thread that copies what is committed in `folder`, that of `seat`; `seats` are all of the run, which goes on from
/// step `from`.
///
/// # Errors
/// As [`remote`]; the system refuses a thread.
pub fn start(
    request: &Request,
    folder: PathBuf,
    (seat, seats): (Seat, Vec<Seat>),
    from: u64,
) -> Result<Option<Uploader>> {
    let Some(remote) = remote(request)? else { return Ok(None) };
    let task = Task { folder, disk: Arc::new(RealDisk), seat, seats, retention: retention(&request.recipe), from };
    let uploader = Uploader::start(remote, task).map_err(Error::io("start a thread in", "this process"))?;
    Ok(Some(uploader))
}

impl Run {
    /// A checkpoint was committed. Nothing waits for its copy.
    pub(super) fn upload(&self, step: u64) {
        if let Some(uploader) = &self.uploader {
            uploader.offer(step);
        }
    }

    /// Writes down what became of copies since the last time.
    pub(super) fn hear_of_uploads(&mut self) {
        let news = self.uploader.as_ref().map(Uploader::news).unwrap_or_default();
        news.into_iter().for_each(|news| self.tell_of_upload(news, ", training goes on"));
    }

    fn tell_of_upload(&mut self, news: News, then: &str) {
        match news {
            News::Uploaded { step, url, bytes, seconds, removed } => {
                let fields = json!({ "url": url, "bytes": bytes, "seconds": seconds, "removed": removed });
                self.event("uploaded", step, fields);
            }
            News::Failed { step, error } => {
                self.event("upload_failed", step, json!({ "error": error.to_string() }));
                self.warn(&format!("the checkpoint of step {step} was not uploaded{then}: {error}"));
            }
            News::Passed { step, why } => self.event("upload_skipped", step, json!({ "why": why })),
        }
    }

    /// Waits for the last copy, for as long as the recipe says. Training is over by now, and nothing else is lost if it fails.
    pub(super) fn finish_uploads(&mut self) {
        self.hear_of_uploads();
        let Some(uploader) = self.uploader.take() else { return };
        let within = self.recipe.checkpoint.upload_wait_s;
        let until = Instant::now() + Duration::from_secs_f64(within);
        if let Some(step) = uploader.missing().last() {
            self.say(&format!("waiting for the copy of step {step}'s checkpoint, at most {within} s"));
        }
        self.stepper.progress().enter(Stage::Ending);
        uploader.finish();
        let mut failed = BTreeSet::new();
        let (mut over, mut in_time) = (false, true);
        while !over {
            let left = until.saturating_duration_since(Instant::now());
            let news = uploader.wait(left.min(LOOK_AGAIN));
            in_time = news.is_none();
            over = in_time || left.is_zero();
            for news in news.unwrap_or_default() {
                if let News::Failed { step, .. } = &news {
                    failed.insert(*step);
                }
                self.tell_of_upload(news, "");
            }
            // The wait has a bound of its own: nobody needs to take this rank for stuck.
            self.stepper.progress().advance();
        }
        for step in uploader.missing().into_iter().filter(|step| !failed.contains(step)) {
            let error = match in_time {
                true => "the store did not take another one, and it was not tried".to_owned(),
                false => format!("it was not done {within} s after the run's end (checkpoint.upload_wait_s)"),
            };
            self.event("upload_failed", step, json!({ "error": error }));
            self.warn(&format!("the checkpoint of step {step} was not uploaded: {error}; --resume tries again"));
        }
    }
}
