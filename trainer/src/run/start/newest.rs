//! The checkpoint that a run goes on from, where its newest one may be damaged.

use std::path::PathBuf;

use checkpoint::damaged::{self, Survey};
use checkpoint::disk::RealDisk;
use checkpoint::reader::Checkpoint;
use serde_json::{Value, json};

use super::Books;
use crate::error::{Error, Result};
use crate::log::say;
use crate::run::folder::Folder;

/// Where a run goes on.
#[derive(Debug, Default)]
pub struct Newest {
    /// `None` when it was killed before its first checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// What was newer, and damaged.
    pub set_aside: Vec<SetAside>,
}

/// A damaged checkpoint that counts no more.
#[derive(Debug)]
pub struct SetAside {
    step: u64,
    error: String,
    kept_as: PathBuf,
}

impl SetAside {
    /// The fields of its event.
    fn fields(&self) -> Value {
        json!({ "error": self.error, "kept_as": self.kept_as })
    }
}

impl Books {
    /// Writes down which checkpoints were damaged.
    pub(super) fn set_aside(&mut self, set_aside: &[SetAside]) {
        for damaged in set_aside {
            self.metrics.event("checkpoint_damaged", damaged.step, damaged.fields());
        }
    }
}

/// The newest checkpoint of a run, verified whole.
///
/// # Errors
/// It is damaged, and nobody said that an earlier one will do; or none is whole.
pub fn newest(folder: &Folder, from_earlier: bool) -> Result<Newest> {
    let Survey { good, damaged } = damaged::survey(&folder.checkpoints())?;
    let Some(first) = damaged.first() else { return Ok(Newest { checkpoint: good, set_aside: Vec::new() }) };
    let fault = |what: String| Error::Run { name: folder.name().into(), what };
    let Some(good) = good else {
        let all: Vec<String> = damaged.iter().map(|damaged| format!("\n  {}", damaged.error)).collect();
        let what = "none of its checkpoints is whole:";
        let way_out = "restore one of them from a copy, or start another run with --name";
        return Err(fault(format!("{what}{}\n{way_out}", all.concat())));
    };
    if !from_earlier {
        let step = good.step();
        return Err(fault(format!(
            "its newest checkpoint is damaged: {}\n--resume-from-earlier goes on from step {step}, the newest that is \
             whole, and keeps what is damaged under another name",
            first.error
        )));
    }
    let mut set_aside = Vec::new();
    for damaged in damaged {
        let kept_as = damaged::set_aside(&RealDisk, &damaged)?;
        let error = damaged.error.to_string();
        say(&format!("run {}: damaged, and kept as {}: {error}", folder.name(), kept_as.display()));
        set_aside.push(SetAside { step: damaged.step, error, kept_as });
    }
    // It may itself have waited under another name; that one did not change.
    Ok(Newest { checkpoint: Some(good), set_aside })
}

/// Says of a damaged checkpoint that all machines have, and that is not the newest of each, what to do about it.
pub fn explain(run: &str, step: u64, error: Error) -> Error {
    match error {
        Error::Checkpoint(error) if error.is_damage() => Error::Run {
            name: run.into(),
            what: format!(
                "the checkpoint of step {step}, the newest that all machines have, is damaged: {error}\n\
                 --resume-from-earlier looks for one that is whole on all of them"
            ),
        },
        other => other,
    }
}
