//! What a run writes for people, opened where it starts.

use parallel::wire::control::Welcome;
use serde_json::json;

use super::rank::RunFolder;
use crate::error::Result;
use crate::run::Request;
use crate::run::folder::Folder;
use crate::run::metrics::Metrics;
use crate::run::progress::Progress as Bar;

/// What a run writes for people.
pub struct Books {
    /// `metrics.jsonl` and its like.
    pub metrics: Metrics,
    /// What is said while it runs.
    pub progress: Bar,
    /// Seconds of the processes that it goes on from.
    pub wall_before_s: f64,
}

impl Books {
    /// Those of one process.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn open(request: &Request, folder: &Folder, resumed_at: Option<u64>, changed: &[String]) -> Result<Self> {
        let recipe = &request.recipe;
        let mut metrics = Metrics::open(folder.path(), resumed_at, recipe.metrics.tensorboard)?;
        let progress = Bar::new(resumed_at.unwrap_or(0), recipe.train.steps, recipe.metrics.log_every);
        if let Some(step) = resumed_at {
            metrics.event("resumed", step, json!({ "changed": changed }));
            progress.say(&format!("run {}: going on after step {step}", folder.name()));
            for change in changed {
                progress.say(&format!("changed: {change}"));
            }
        }
        let before = resumed_at.and_then(|_| folder.summary());
        Ok(Self { metrics, progress, wall_before_s: before.map_or(0.0, |summary| summary.wall_s) })
    }

    /// Those that rank 0 writes for all.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn of_ranks(
        request: &Request,
        folder: &RunFolder,
        (step, folded): (u64, bool),
        welcome: &Welcome,
    ) -> Result<Self> {
        let RunFolder { folder, changed, set_aside, .. } = folder;
        // What came from a store alone has no run.json yet.
        let resumed = request.resume && (step > 0 || folder.file("run.json").exists());
        let mut books = Self::open(request, folder, resumed.then_some(step), changed)?;
        books.set_aside(set_aside);
        if welcome.restart > 0 {
            books.metrics.event("restart", step, json!({ "restart": welcome.restart }));
        }
        if resumed && folded {
            books
                .progress
                .say("the checkpoint keeps what ranks had left out added up: from here on the bits are other ones");
        }
        if let Some(url) = &welcome.metrics_address {
            books.serves(url, step);
        }
        Ok(books)
    }

    /// Says where numbers are served for Prometheus.
    pub fn serves(&mut self, url: &str, step: u64) {
        self.metrics.event("prometheus", step, json!({ "url": url }));
        self.progress.say(&format!("metrics for Prometheus: {url}"));
    }
}
