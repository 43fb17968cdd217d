//! The checkpoint that a run goes on from, where its newest one may be damaged.

use std::path::PathBuf;

use checkpoint::damaged::{self, Survey};
use checkpoint::disk::RealDisk;
use checkpoint::manifest::{FileEntry, TensorEntry};
use checkpoint::reader::{Checkpoint, Want};
use checkpoint::{CheckpointError, Manifest};
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
    if !parts.iter().all(|part| is_here(checkpoint.manifest(), &part.whole.name)) {
        return verify();
    }
    let all = |wants: &mut [Want<'_>]| checkpoint.load_and_verify(wants).map(|_| ());
    match State::load((&meta, &parts, Sharding::NONE), |name| checkpoint.has(name), all) {
        Ok(state) => Ok(Some(Loaded { of: (checkpoint.step(), checkpoint.id().to_owned()), state, meta })),
        Err(
            CheckpointError::NoTensor { .. } | CheckpointError::TensorShape { .. } | CheckpointError::Absent { .. },
        ) => verify(),
        Err(fault) => Err(fault),
    }
}

/// Whether all of a tensor is here, as far as a manifest can tell. What is not takes no memory: its shape is a claim that no file
/// bears out.
fn is_here(manifest: &Manifest, tensor: &str) -> bool {
    let bytes = manifest.files.values().map(FileEntry::plain_bytes).fold(0, u64::saturating_add);
    let has_room = |entry: &TensorEntry| entry.elements() as u64 <= bytes / size_of::<f32>() as u64;
    manifest.tensors.get(tensor).is_some_and(|entry| entry.absent_count() == 0 && has_room(entry))
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use checkpoint::writer::{Outcome, Retention, Writer};
    use compression::Region;
    use parallel::data::owed::Owed;

    use super::*;
    use crate::tensor::parts::tests::config;

    const TABLE: &str = "model.embed_tokens.weight";

    /// The checkpoint of a small model, with what `change` makes of its state.
    fn saved(change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, Checkpoint) {
        let (folder, config) = (tempfile::tempdir().expect("a folder"), config(2, 2, true));
        let (path, specs) = (folder.path().to_owned(), state::specs(&config));
        let mut writer = Writer::new(Arc::new(RealDisk), path, specs, Retention::last(0)).expect("writable");
        let mut said = json!({
            "step": 4, "updates": 4, "skips": 0, "good_step": 4, "samples": 1, "tokens": 1, "loss": 1.0, "seed": 1,
            "corpus_hash": "", "recipe_hash": "", "model": config, "end_of_text": "x",
        });
        change(&mut said);
        writer.offer(4, said, Vec::new(), |snapshot| {
            State::initial(&config, 1).snapshot(snapshot, &config, &Owed::default());
        });
        let outcomes = writer.flush();
        let [Outcome::Committed { path, .. }] = &outcomes[..] else { panic!("{outcomes:?}") };
        let checkpoint = Checkpoint::open(path).expect("it was committed");
        (folder, checkpoint)
    }

    #[test]
    fn a_model_that_is_not_that_of_the_tensors_is_refused_before_anything_is_as_long_as_it() {
        let check = |change: &dyn Fn(&mut Value), expected: &[&str]| {
            let (_folder, checkpoint) = saved(change);
            assert!(load(&checkpoint).expect("every byte is right").is_none(), "nothing is loaded");
            let message = state::meta(&checkpoint).expect_err("another model").to_string();
            assert!(message.contains("step-00000004"), "{message}");
            assert!(expected.iter().all(|words| message.contains(words)), "{message}");
        };
        let layers = |said: &mut Value, layers: u64| said["model"]["num_hidden_layers"] = layers.into();
        let vocabulary = |said: &mut Value| said["model"]["vocab_size"] = (1u64 << 50).into();
        check(&vocabulary, &[TABLE, "expected [1125899906842624, 8]", "found [19, 8]"]);
        check(&|said: &mut Value| layers(said, 1 << 40), &["at most 60 with 60 tensors, found 1099511627776"]);
        let third = ["model.layers.2.input_layernorm.weight", "expected [8]", "found no such tensor"];
        check(&|said: &mut Value| layers(said, 3), &third);
        // Where a folder may have the tensors of some stages alone, their number says nothing of the others.
        let stages = |said: &mut Value| {
            said["mesh"] = json!({ "data": 1, "pipeline": 2, "tensor": 1, "group": 1 });
            layers(said, 1 << 40);
        };
        check(&stages, &["at most 1024 with 60 tensors, found 1099511627776"]);
        // The control: the model as it is.
        let (_folder, checkpoint) = saved(|_| {});
        let loaded = load(&checkpoint).expect("every byte is right").expect("all of it is here");
        assert!(loaded.is_of(&checkpoint, &config(2, 2, true)));
    }

    #[test]
    fn tensors_that_no_file_has_room_for_take_no_memory() {
        let shape: Vec<usize> = vec![1 << 50, 8];
        for has_pieces in [false, true] {
            let (_folder, checkpoint) = saved(|said| said["model"]["vocab_size"] = shape[0].into());
            let (file, mut manifest) = (checkpoint.path().join("manifest.json"), checkpoint.manifest().clone());
            for suffix in ["", ".m", ".v"] {
                let tensor = manifest.tensors.get_mut(&format!("{TABLE}{suffix}")).expect("the table");
                tensor.shape.clone_from(&shape);
                match has_pieces {
                    true => tensor.pieces[0].region = Region::whole(&shape).expect("it can be counted"),
                    false => tensor.pieces.clear(),
                }
            }
            std::fs::write(&file, manifest.render(&file).expect("it could be so")).expect("writable");
            let checkpoint = Checkpoint::open(checkpoint.path()).expect("its hash is right");
            state::meta(&checkpoint).expect("the model is that of the tensors");
            let loaded = load(&checkpoint);
            match has_pieces {
                true => assert!(loaded.is_err_and(|error| error.to_string().contains("found [19, 8]"))),
                false => assert!(loaded.expect("what is named is right").is_none()),
            }
        }
    }
}
