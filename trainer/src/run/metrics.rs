//! What a run writes as it goes: `metrics.jsonl` (one object a step), `events.jsonl` (what is not a step), and
//! TensorBoard's files. While the disk is full, what belongs into them waits in memory ([`appended`]).

pub mod appended;

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use compression::Codec;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::tensorboard::EventFile;
use crate::data::cache::replace;
use crate::error::{Error, Result};
use crate::log::say;

use appended::Appended;

/// One line of `metrics.jsonl`. Seconds end in `_s`, bytes in `_bytes`; fields without meaning in this run are null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Counted from 1.
    pub step: u64,
    /// Steps since the start of the run that were skipped, this one included: something was not finite on some rank.
    #[serde(default)]
    pub skipped_steps: u64,
    /// Mean cross entropy of the step's tokens in nats, before the update; null when it was not finite.
    pub loss: Option<f64>,
    /// Mean cross entropy of held-out tokens in nats, after the update, where it was evaluated.
    pub eval_loss: Option<f64>,
    /// Of this step.
    pub learning_rate: f64,
    /// Global norm before clipping; null when it was not finite.
    pub grad_norm: Option<f64>,
    /// Tokens since the start of the run, this step included.
    pub tokens: u64,
    /// Tokens of this step over its seconds.
    pub tokens_per_s: f64,
    /// The step, without evaluation and checkpoint.
    pub step_s: f64,
    /// Forward passes.
    pub forward_s: f64,
    /// Backward passes.
    pub backward_s: f64,
    /// The rank whose forward and backward passes took longest.
    #[serde(default)]
    pub slowest_rank: usize,
    /// The seconds that they took.
    #[serde(default)]
    pub slowest_compute_s: f64,
    /// Encoding of the gradients whose way ended in this step; 0 with one rank, which encodes nothing.
    pub encode_s: f64,
    /// Waiting for votes, and for sums, as a rule of the step before; 0 with one rank.
    pub wait_s: f64,
    /// What no computing hid: the same as `wait_s`.
    pub exposed_s: f64,
    /// Waiting for activations and gradients of other stages; null where there are none.
    #[serde(default)]
    pub stage_wait_s: Option<f64>,
    /// Part of the gradients' way in which nobody waited; null where none ended in this step.
    pub overlap: Option<f64>,
    /// Bytes sent to peers since the line before this one; 0 with one rank.
    pub wire_bytes_sent: u64,
    /// Bytes received from peers since the line before this one; 0 with one rank.
    pub wire_bytes_received: u64,
    /// What gradients travelled in; null with one rank.
    pub codec: Option<Codec>,
    /// Buckets whose payloads this rank sent in zstd frames.
    #[serde(default)]
    pub zstd_buckets: usize,
    /// The copy into the snapshot that was taken since the line before this one; 0 without one.
    pub checkpoint_stall_s: f64,
    /// Resident memory of the process; null where the system does not tell.
    pub memory_bytes: Option<u64>,
}

/// The open files.
#[derive(Debug)]
pub struct Metrics {
    metrics: Appended,
    events: Appended,
    tensorboard: Option<EventFile>,
    folder: PathBuf,
}

impl Metrics {
    /// Opens the files of a run folder. `resumed_at` cuts `metrics.jsonl` to that step.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn open(folder: &Path, resumed_at: Option<u64>, tensorboard: bool) -> Result<Self> {
        if let Some(step) = resumed_at {
            cut(&folder.join("metrics.jsonl"), step)?;
        }
        let tensorboard = if tensorboard { Some(EventFile::create(folder, resumed_at)?) } else { None };
        let (metrics, events) = (open(folder, "metrics.jsonl")?, open(folder, "events.jsonl")?);
        Ok(Self { metrics, events, tensorboard, folder: folder.to_owned() })
    }

    /// Writes one step. When the disk is full the line is kept and tried again with the next one; training goes on.
    ///
    /// # Errors
    /// More lines are waiting than is reasonable to keep.
    pub fn step(&mut self, line: &Line) -> Result<()> {
        let path = self.folder.join("metrics.jsonl");
        let text = to_line(line).map_err(Error::io("write", &path))?;
        if let Err(refused) = self.metrics.append(&text) {
            let (is_first, is_lost) = (refused.is_first(), refused.dropped > 0);
            let error = Error::io("write", path)(refused.error);
            if is_first {
                say(&format!("step {}: kept in memory, training goes on: {error}", line.step));
            }
            if is_lost {
                return Err(error);
            }
        }
        if let Some(file) = &mut self.tensorboard {
            let mut values = vec![("learning_rate", line.learning_rate), ("tokens_per_s", line.tokens_per_s)];
            values.extend(line.loss.map(|x| ("loss", x)));
            values.extend(line.grad_norm.map(|x| ("grad_norm", x)));
            values.extend(line.eval_loss.map(|x| ("eval_loss", x)));
            file.scalars(line.step, &values);
        }
        Ok(())
    }

    /// Writes the lines that are waiting.
    ///
    /// # Errors
    /// There is still no room for them.
    pub fn flush(&mut self) -> Result<()> {
        self.metrics.flush().map_err(Error::io("write", self.folder.join("metrics.jsonl")))
    }

    /// Writes what is not a step: `kind`, the step at which it happened, and its own fields.
    pub fn event(&mut self, kind: &str, step: u64, fields: Value) {
        self.events.append_or_tell(&event_line(kind, step, fields));
    }
}

/// As [`Metrics::event`], of a run that has not begun, into its folder.
pub fn event_before(folder: &Path, kind: &str, step: u64, fields: Value) {
    let line = event_line(kind, step, fields);
    match open(folder, "events.jsonl") {
        Ok(mut events) => events.append_or_tell(&line),
        Err(error) => tracing::warn!("events.jsonl cannot be written: {error}"),
    }
}

fn open(folder: &Path, name: &'static str) -> Result<Appended> {
    let path = folder.join(name);
    let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
    end_with_a_line(&file, &path).map_err(Error::io("mend", &path))?;
    Appended::new(file, name).map_err(Error::io("read", path))
}

/// Takes away a last line that a crash has left incomplete, so that the next one is no part of it.
fn end_with_a_line(file: &File, path: &Path) -> std::io::Result<()> {
    let text = std::fs::read(path)?;
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    if whole < text.len() { file.set_len(whole as u64) } else { Ok(()) }
}

fn event_line(kind: &str, step: u64, fields: Value) -> Vec<u8> {
    let mut object = json!({ "event": kind, "step": step });
    if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
        object.extend(fields);
    }
    tracing::info!("{object}");
    format!("{object}\n").into_bytes()
}

/// A line, to be written at once, so that a kill leaves at most the last line incomplete.
fn to_line(value: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Keeps the lines up to `step`; what a kill left incomplete goes too.
fn cut(path: &Path, step: u64) -> Result<()> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let is_kept = |line: &&[u8]| {
        line.ends_with(b"\n") && serde_json::from_slice::<Line>(line).is_ok_and(|line| line.step <= step)
    };
    let kept: Vec<&[u8]> = text.split_inclusive(|&byte| byte == b'\n').filter(is_kept).collect();
    replace(path, &kept.concat())
}

/// Resident memory of this process in bytes, where the system tells it.
#[must_use]
pub fn memory_bytes() -> Option<u64> {
    status_kib("VmRSS:").map(|kib| kib * 1024)
}

/// The largest that the resident memory was.
#[must_use]
pub fn memory_bytes_max() -> Option<u64> {
    status_kib("VmHWM:").map(|kib| kib * 1024)
}

fn status_kib(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use super::*;

    fn line(step: u64) -> Line {
        Line {
            step,
            skipped_steps: 0,
            loss: Some(1.0 / 3.0),
            eval_loss: None,
            learning_rate: 1e-3,
            grad_norm: None,
            tokens: 8 * step,
            tokens_per_s: 1.0,
            step_s: 0.1,
            forward_s: 0.0,
            backward_s: 0.0,
            slowest_rank: 0,
            slowest_compute_s: 0.0,
            encode_s: 0.0,
            wait_s: 0.0,
            exposed_s: 0.0,
            stage_wait_s: None,
            overlap: None,
            wire_bytes_sent: 0,
            wire_bytes_received: 0,
            codec: Some(Codec::Int4),
            zstd_buckets: 0,
            checkpoint_stall_s: 0.0,
            memory_bytes: None,
        }
    }

    #[test]
    fn a_resume_cuts_later_steps_and_a_broken_last_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut metrics = Metrics::open(folder.path(), None, true).expect("writable");
        for step in 1..=5 {
            metrics.step(&line(step)).expect("writable");
        }
        metrics.event("checkpoint", 3, json!({ "seconds": 1 }));
        drop(metrics);
        let path = folder.path().join("metrics.jsonl");
        let mut text = std::fs::read_to_string(&path).expect("readable");
        text.push_str("{\"step\": 6, \"lo");
        std::fs::write(&path, text).expect("writable");

        drop(Metrics::open(folder.path(), Some(3), true).expect("writable"));
        let text = std::fs::read_to_string(&path).expect("readable");
        let lines: Vec<Line> = text.lines().map(|line| serde_json::from_str(line).expect("whole lines")).collect();
        assert_eq!(lines, [line(1), line(2), line(3)]);
        let events = std::fs::read_to_string(folder.path().join("events.jsonl")).expect("readable");
        assert_eq!(events, "{\"event\":\"checkpoint\",\"seconds\":1,\"step\":3}\n");
    }

    /// What a run of five steps leaves, where the disk takes nothing of the third and fourth: the text of metrics and events, and
    /// the length of TensorBoard's file, which has times in it.
    fn left_by(is_full_for_a_while: bool) -> (String, String, u64) {
        let folder = tempfile::tempdir().expect("a folder");
        let paths = || std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("a file").path());
        let mut metrics = Metrics::open(folder.path(), None, true).expect("writable");
        let mut good = Vec::new();
        for step in 1..=5 {
            if is_full_for_a_while && step == 3 {
                // Half a record comes to the disk of each, and what is open for reading alone takes no more, nor takes it back.
                for path in paths() {
                    let mut file = OpenOptions::new().append(true).open(path).expect("writable");
                    file.write_all(b"{\"half").expect("writable");
                }
                let full = || File::open(folder.path().join("metrics.jsonl")).expect("readable");
                good = files(&mut metrics).into_iter().map(|file| file.exchange(full())).collect();
            }
            if step == 5 {
                for (file, good) in files(&mut metrics).into_iter().zip(good.drain(..)) {
                    file.exchange(good);
                }
            }
            metrics.step(&line(step)).expect("it is written, or waits");
            metrics.event("step", step, json!({}));
        }
        metrics.flush().expect("writable");
        drop(metrics);
        let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("readable");
        let mut board = paths().filter(|path| path.to_string_lossy().contains("tfevents"));
        let board = board.next().expect("TensorBoard's file");
        (text("metrics.jsonl"), text("events.jsonl"), std::fs::metadata(board).expect("a file").len())
    }

    fn files(metrics: &mut Metrics) -> [&mut Appended; 3] {
        [&mut metrics.metrics, &mut metrics.events, metrics.tensorboard.as_mut().expect("wanted").appended()]
    }

    #[test]
    fn a_disk_that_is_full_for_a_while_costs_no_file_a_record() {
        let whole = left_by(false);
        assert_eq!((whole.0.lines().count(), whole.1.lines().count()), (5, 5));
        assert_eq!(left_by(true), whole);
    }
}
