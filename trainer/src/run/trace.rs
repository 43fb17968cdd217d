//! `--trace`: a picture of what each rank does when, over the first steps after a start.
//!
//! Each rank writes `trace/rank-N.json` when those steps are over, and puts the files of all ranks that are there by
//! then together as `trace.json`. Whoever writes last has all of them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parallel::data::Plan;
use parallel::trace::{Label, Trace, Track, merge};

use crate::data::cache::replace;
use crate::error::{Error, Result};

/// One rank's trace, from its start to its files.
#[derive(Debug)]
pub struct Tracing {
    trace: Arc<Trace>,
    /// The last step that it shows.
    last: u64,
    files: Files,
    writer: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug)]
struct Files {
    /// The run's folder.
    folder: PathBuf,
    rank: usize,
}

impl Tracing {
    /// Begins to record the `steps` steps after step `before`. What an earlier start has left there goes away; to be
    /// called before this rank is connected, so that no rank of this start has written yet.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn begin(folder: &Path, rank: usize, plan: Arc<Plan>, before: u64, steps: u64) -> Result<Self> {
        let files = Files { folder: folder.to_owned(), rank };
        let traces = files.traces();
        std::fs::create_dir_all(&traces).map_err(Error::io("create", traces))?;
        for old in files.parts()?.into_iter().chain([files.all()]) {
            match std::fs::remove_file(&old) {
                // All ranks of a start do this.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.map_err(Error::io("remove", old))?,
            }
        }
        Ok(Self { trace: Arc::new(Trace::new(rank, plan)), last: before.saturating_add(steps), files, writer: None })
    }

    /// Where to enter what happens.
    #[must_use]
    pub const fn trace(&self) -> &Arc<Trace> {
        &self.trace
    }

    /// Enters a span of the training thread that ends now.
    pub fn span(&self, name: &'static str, begin: Instant, step: u64) {
        self.trace.span(Track::Compute, begin, Label::new(name, step));
    }

    /// Starts to write once the last step that is shown is over; training goes on meanwhile.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn after(&mut self, step: u64) -> Result<()> {
        if step < self.last || self.writer.is_some() {
            return Ok(());
        }
        let (trace, files) = (self.trace.clone(), self.files.clone());
        let write = move || {
            if let Err(error) = trace.finish().map_or(Ok(()), |text| files.write(&text)) {
                tracing::warn!("there is no trace of this rank: {error}");
            }
        };
        let writer = std::thread::Builder::new().name("trace".into()).spawn(write);
        self.writer = Some(writer.map_err(Error::io("start a thread in", "this process"))?);
        Ok(())
    }

    /// Writes what there is, if that was not done, and waits until it is written.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn end(&mut self) -> Result<()> {
        self.after(self.last)?;
        if let Some(Err(panic)) = self.writer.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
        Ok(())
    }
}

impl Files {
    fn traces(&self) -> PathBuf {
        self.folder.join("trace")
    }

    /// The files of the ranks that have written, in rank order.
    fn parts(&self) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(self.traces()).map_err(Error::io("read", self.traces()))?.flatten();
        let rank = |name: &str| name.strip_prefix("rank-")?.strip_suffix(".json")?.parse::<usize>().ok();
        let named = entries.filter_map(|entry| Some((rank(&entry.file_name().to_string_lossy())?, entry.path())));
        let mut parts: Vec<(usize, PathBuf)> = named.collect();
        parts.sort();
        Ok(parts.into_iter().map(|(_, path)| path).collect())
    }

    fn all(&self) -> PathBuf {
        self.folder.join("trace.json")
    }

    /// Writes this rank's file, and the one of all ranks anew. One rank at a time: the last one sees all.
    fn write(&self, text: &str) -> Result<()> {
        let lock = self.traces().join(".lock");
        let held = File::create(&lock).and_then(|file| file.lock().map(|()| file)).map_err(Error::io("lock", lock))?;
        replace(&self.traces().join(format!("rank-{}.json", self.rank)), text.as_bytes())?;
        let parts = self.parts()?;
        let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(Error::io("read", path));
        let texts: Vec<String> = parts.iter().map(read).collect::<Result<_>>()?;
        replace(&self.all(), merge(texts.iter().map(String::as_str)).as_bytes())?;
        drop(held);
        tracing::info!("{} shows {} of the ranks; https://ui.perfetto.dev opens it", self.all().display(), parts.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use parallel::data::Parameter;

    use super::*;

    #[test]
    fn the_last_rank_that_writes_puts_all_of_this_start_together_and_nothing_is_written_before_its_last_step() {
        let folder = tempfile::tempdir().expect("a folder");
        let plan = Plan::new(vec![Parameter { name: "a".into(), shape: vec![4] }], 16).expect("small");
        let plan = Arc::new(plan);
        let begin = |rank, before| Tracing::begin(folder.path(), rank, plan.clone(), before, 2).expect("writable");
        let all = || std::fs::read_to_string(folder.path().join("trace.json")).unwrap_or_default();
        let mut ranks = [begin(0, 5), begin(1, 5)];
        for tracing in &mut ranks {
            tracing.span("step", Instant::now(), 6);
            tracing.after(6).expect("nothing to do");
            assert!(tracing.writer.is_none());
            tracing.after(7).expect("a thread");
            tracing.end().expect("written");
        }
        assert!(all().contains("\"rank 0\"") && all().contains("\"rank 1\""), "{}", all());
        // Another start shows nothing of the one before it, and one that ends early what there is.
        let mut alone = begin(1, 9);
        assert_eq!(all(), "");
        alone.span("step", Instant::now(), 10);
        alone.end().expect("written");
        assert!(!all().contains("\"rank 0\"") && !all().contains("\"step\":6"), "{}", all());
        assert!(all().contains("\"rank 1\"") && all().contains("\"step\":10"), "{}", all());
    }
}
