//! Everything before the first step: whatever can be refused is refused here, then the run begins.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use checkpoint::reader::Checkpoint;

use super::folder::{Folder, Status};
use super::save::{newest_good, same_text};
use super::signals::Stop;
use super::{Ended, Parts, Request, Run};
use crate::data;
use crate::device;
use crate::error::{Error, Result};
use crate::generate::prompt_tokens;
use crate::log::say;
use crate::model::Config;
use crate::recipe::Recipe;
use crate::recipe::resolved::TokenizerSource;
use crate::state::State;
use crate::weights::Weights;

/// Trains as ordered.
///
/// # Errors
/// Everything that can go wrong; the run's folder then says `failed`, and its checkpoints are as they were.
pub fn train(request: Request) -> Result<Ended> {
    let started = Instant::now();
    let recipe = &request.recipe;
    device::set_threads(recipe.device.threads);
    let stop =
        Stop::on_signals(recipe.checkpoint.grace_s).map_err(Error::io("listen for signals in", "this process"))?;
    let runs = &recipe.metrics.runs_dir;
    // Whatever can be refused is refused before a new folder is made, and before a text is read if it needs none.
    let existing = match request.resume {
        true => Folder::resume(runs, &request.name, &request.raw)?,
        false => Folder::check_free(runs, &request.name).map(|()| None)?,
    };
    if request.resume && existing.is_none() {
        say(&format!("run {}: there is nothing to resume, so it starts from the beginning", request.name));
    }
    std::fs::create_dir_all(runs).map_err(|source| {
        let key = "metrics.runs_dir";
        Error::Folder { key, path: runs.clone(), source }
    })?;
    let device = device::open(&recipe.device)?;
    let newest = match &existing {
        Some((folder, _)) => newest_good(folder)?,
        None => None,
    };
    not_behind(&request, newest.as_ref())?;
    let from = match (&recipe.model.from, &newest) {
        // What a run started from may be gone by now; its own checkpoints have all that it needs.
        (Some(_), Some(newest)) => Some(Weights::checkpoint(Checkpoint::open(newest.path())?)?),
        (Some(from), None) => Some(Weights::open(from, runs)?),
        (None, _) => None,
    };
    if let Some(from) = &from {
        fits(recipe, from)?;
    }
    let given = from.as_ref().map(|from| (from.tokenizer_json.as_slice(), from.end_of_text.as_str()));
    let data = data::prepare(recipe, given, &request.registry)?;
    let config = shape(recipe, data.tokenizer.vocab_size(), from.as_ref())?;
    if let Some(prompt) = &recipe.export.prompt {
        prompt_tokens(&data.tokenizer, "export.prompt", prompt, config.max_position_embeddings)?;
    }
    let (state, tokens, last_loss) = match (&newest, from) {
        (Some(newest), _) => {
            same_text(&request.name, newest, &data)?;
            let (state, meta) = State::load(newest, &config)?;
            (state, meta.tokens, meta.loss)
        }
        (None, Some(from)) => (State::fresh(from.read(&config)?), 0, None),
        (None, None) => (State::initial(&config, recipe.train.seed), 0, None),
    };
    let resumed = existing.is_some();
    let (folder, changed) = match existing {
        Some(existing) => existing,
        None => (Folder::create(runs, &request.name)?, Vec::new()),
    };
    let committed = newest.map(|newest| newest.step());
    let parts =
        Parts { request, started, stop, device, data, config, state, tokens, last_loss, committed, resumed, changed };
    let mut run = match Run::open(&folder, parts) {
        Ok(run) => run,
        Err(error) => {
            if !resumed {
                folder.abandon();
            }
            return Err(error);
        }
    };
    // A backend may panic in the middle of a step; the run's folder should say that it failed all the same.
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| run.go(&folder)));
    if !matches!(result, Ok(Ok(_))) {
        run.progress.finish();
        // The error that ended the run is the one to report.
        let _ = folder.write_summary(&run.summary(Status::Failed));
    }
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A resumed run cannot have taken more steps than it is to take.
fn not_behind(request: &Request, newest: Option<&Checkpoint>) -> Result<()> {
    match newest {
        Some(newest) if newest.step() > request.recipe.train.steps => Err(Error::Run {
            name: request.name.clone(),
            what: format!(
                "train.steps: expected at least {}, the step of its newest checkpoint, found {}",
                newest.step(),
                request.recipe.train.steps
            ),
        }),
        _ => Ok(()),
    }
}

/// Compares the weights that a run starts from with its recipe, before any text is read.
fn fits(recipe: &Recipe, from: &Weights) -> Result<()> {
    let config = shape(recipe, from.config.vocab_size, Some(from))?;
    from.check(&config)?;
    if let TokenizerSource::File(path) = &recipe.tokenizer.source
        && std::fs::read(path).map_err(Error::io("read", path))? != from.tokenizer_json
    {
        let what = format!("vocabulary: {} is not the tokenizer that the weights were trained with", path.display());
        return Err(Error::Mismatch { path: from.path.clone(), mismatches: vec![what] });
    }
    Ok(())
}

/// The model's shape, compared with the weights that it starts from.
fn shape(recipe: &Recipe, vocab_size: usize, from: Option<&Weights>) -> Result<Config> {
    let known = from.map(|from| &from.config);
    let config = Config::from_keys(&recipe.model, vocab_size, recipe.train.seq_len, known)
        .ok_or_else(|| Error::Usage("[model]: expected every size, or `model.from`".into()))?;
    config.check().map_err(|what| Error::Usage(format!("[model]: {what}")))?;
    if recipe.train.seq_len > config.max_position_embeddings {
        return Err(Error::Usage(format!(
            "train.seq_len: expected at most model.max_position_embeddings = {}, found {}",
            config.max_position_embeddings, recipe.train.seq_len
        )));
    }
    Ok(config)
}
