//! The checkpoint that a run goes on from, where its newest one may be damaged.

use std::path::PathBuf;

use checkpoint::CheckpointError;
use checkpoint::damaged::{self, Survey};
use checkpoint::disk::RealDisk;
use checkpoint::reader::{Checkpoint, Want};
use serde_json::{Value, json};

use super::Books;
use crate::error::{Error, Result};
use crate::log::say;
use crate::model::Config;
use crate::run::folder::Folder;
use crate::state::sharding::Sharding;
use crate::state::{self, Meta, State};
use crate::tensor::parts::parts;

/// What a checkpoint held, read and verified in one pass.
#[derive(Debug)]
pub struct Loaded {
    /// Which commit it is of: its step, and its id.
    of: (u64, String),
    pub state: State,
    pub meta: Meta,
}

impl Loaded {
    /// Whether this is what the checkpoint holds of a model of this shape.
    pub fn is_of(&self, checkpoint: &Checkpoint, config: &Config) -> bool {
        let of = (self.of.0, &*self.of.1);
        of == (checkpoint.step(), checkpoint.id()) && self.meta.model.parameters() == config.parameters()
    }
}

/// Where a run goes on.
#[derive(Debug, Default)]
pub struct Newest {
    /// `None` when it was killed before its first checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// What is in it, if this folder has all of it.
    pub loaded: Option<Loaded>,
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

/// The newest checkpoint of a run, verified whole, and loaded in the same pass where this rank `keeps_all` of it.
///
/// # Errors
/// It is damaged, and nobody said that an earlier one will do; or none is whole.
pub fn newest(folder: &Folder, from_earlier: bool, keeps_all: bool) -> Result<Newest> {
    // Where ranks keep parts of the state, none has room for all of it.
    let load = |checkpoint: &Checkpoint| match keeps_all {
        true => load(checkpoint),
        false => checkpoint.verify().map(|_| None),
    };
    let Survey { good, damaged } = damaged::survey(&folder.checkpoints(), load)?;
    let (checkpoint, loaded) = good.map_or((None, None), |(good, loaded)| (Some(good), loaded));
    let Some(first) = damaged.first() else { return Ok(Newest { checkpoint, loaded, set_aside: Vec::new() }) };
    let fault = |what: String| Error::Run { name: folder.name().into(), what };
    let Some(good) = checkpoint else {
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
    Ok(Newest { checkpoint: Some(good), loaded, set_aside })
}

/// Reads every byte of a checkpoint once, the state to where a run needs it.
fn load(checkpoint: &Checkpoint) -> std::result::Result<Option<Loaded>, CheckpointError> {
    let verify = || checkpoint.verify().map(|_| None);
    // What is no state of a run, or not all of one, is told as that, and only once it is known to be whole.
    let Ok(meta) = state::meta(checkpoint) else { return verify() };
    let Ok(parts) = parts(&meta.model, 0, 1) else { return verify() };
    let all = |wants: &mut [Want<'_>]| checkpoint.load_and_verify(wants).map(|_| ());
    match State::load((&meta, &parts, Sharding::NONE), |name| checkpoint.has(name), all) {
        Ok(state) => Ok(Some(Loaded { of: (checkpoint.step(), checkpoint.id().to_owned()), state, meta })),
        Err(
            CheckpointError::NoTensor { .. } | CheckpointError::TensorShape { .. } | CheckpointError::Absent { .. },
        ) => verify(),
        Err(fault) => Err(fault),
    }
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
