//! Where `tracing` goes: warnings to stderr, everything from `info` on to the run's log once there is a run.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};

use crate::error::{Error, Result};

/// Lines that came before there was a folder, or the open log.
#[derive(Debug)]
enum Sink {
    Early(Vec<u8>),
    File(File),
}

/// Writes a line to stderr for people. A stderr that is closed or full takes nothing away from the run.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The log of a run. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RunLog(Arc<Mutex<Sink>>);

/// The most that is kept before there is a folder.
const EARLY_BYTES_MAX: usize = 1 << 20;

impl RunLog {
    /// Installs the subscriber of this process. `filter` is in the notation of `RUST_LOG`, for stderr.
    #[must_use]
    pub fn install(filter: Option<&str>) -> Self {
        let log = Self(Arc::new(Mutex::new(Sink::Early(Vec::new()))));
        let wanted = filter.and_then(|filter| {
            EnvFilter::try_new(filter)
                .inspect_err(|error| say(&format!("TRIBUTARY_LOG is not a filter and has no effect: {error}")))
                .ok()
        });
        let stderr = tracing_subscriber::fmt::layer()
            .with_writer(io::stderr)
            .log_internal_errors(false)
            .with_target(false)
            .without_time()
            .with_filter(wanted.unwrap_or_else(|| EnvFilter::new("warn")));
        let file = tracing_subscriber::fmt::layer()
            .with_writer(log.clone())
            .log_internal_errors(false)
            .with_ansi(false)
            .with_filter(LevelFilter::INFO);
        let subscriber = tracing_subscriber::registry().with(stderr).with(file);
        // Only a test that runs the command line in its own process has one already.
        let _ = tracing::subscriber::set_global_default(subscriber);
        log
    }

    /// Opens the file, and writes to it what came before.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn open(&self, path: &Path) -> Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Sink::Early(bytes) = &*sink {
            file.write_all(bytes).map_err(Error::io("write", path))?;
        }
        *sink = Sink::File(file);
        Ok(())
    }
}

impl Write for RunLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Sink::Early(early) if early.len() + bytes.len() <= EARLY_BYTES_MAX => early.extend_from_slice(bytes),
            Sink::Early(_) => {}
            Sink::File(file) => file.write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for RunLog {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
