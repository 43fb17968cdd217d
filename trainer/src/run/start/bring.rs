//! The newest checkpoint of a run, from the store to here, where there is none as new.

use std::time::Instant;

use checkpoint::CheckpointError;
use checkpoint::disk::RealDisk;
use checkpoint::reader;
use checkpoint::store::{At, Remote, Seat};
use serde_json::json;

use crate::data::cache::replace;
use crate::error::{Error, Result};
use crate::log::say;
use crate::recipe::raw;
use crate::run::folder::{Folder, differences};
use crate::run::metrics::event_before;
use crate::run::{Request, upload};

/// Looks into the store before a run begins. A new one must find nothing of its name there; one that goes on brings what is
/// newer than all that is here, into a folder of its own if there is none. `rank` leads the folder.
///
/// # Errors
/// A run of the name is there; what is newest there is damaged and nobody said that an earlier one will do; the store does
/// not answer and there is nothing here to go on from.
pub fn bring(request: &Request, rank: usize) -> Result<()> {
    let Some(remote) = upload::remote(request)? else { return Ok(()) };
    let (runs, name) = (&request.recipe.metrics.runs_dir, &request.name);
    if !request.resume {
        Folder::check_free(runs, name)?;
        let Some(at) = remote.list()?.pop() else { return Ok(()) };
        let (url, step) = (remote.url(), at.step);
        let what = format!(
            "{url} has checkpoints of a run of this name, the newest of step {step}: go on with it by --resume, start \
             another by --name OTHER, or name another place in checkpoint.upload_to"
        );
        return Err(Error::Run { name: name.clone(), what });
    }
    let here = reader::list(&runs.join(name).join("checkpoints"))?.last().map(|&(step, _)| step);
    let there = match remote.list() {
        Ok(there) => there,
        Err(error) if here.is_some() => {
            say(&format!("run {name}: going on from what is here, the store may have more: {error}"));
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    for at in newer(&there, here, rank) {
        match one(request, &remote, at) {
            Ok(()) => return Ok(()),
            Err(Error::Checkpoint(error)) if error.is_damage() => damaged(request, at, &error)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The copies to try, the newest first: of each step the one of this rank's own folder, if there is one.
fn newer(there: &[At], here: Option<u64>, rank: usize) -> Vec<At> {
    let own = |at: At| at.seat == Seat::Machine(rank);
    let mut copies: Vec<At> = Vec::new();
    for &At { step, seat } in there.iter().filter(|at| here.is_none_or(|here| at.step > here)).rev() {
        let at = At { step, seat };
        match copies.last_mut().filter(|last| last.step == step) {
            // The lowest, in the order of seats, unless this rank's own was found.
            Some(last) => *last = if own(*last) { *last } else { at },
            None => copies.push(at),
        }
    }
    copies
}

/// Says of a damaged copy what to do about it, or passes over it where that was said.
fn damaged(request: &Request, at: At, error: &CheckpointError) -> Result<()> {
    let (name, step) = (request.name.clone(), at.step);
    if request.resume_from_earlier {
        say(&format!("run {name}: the copy of step {step} in the store is damaged, and passed over: {error}"));
        return Ok(());
    }
    let what = format!(
        "its newest checkpoint, of step {step}, is in the store alone, and damaged: {error}\n--resume-from-earlier goes on \
         from the newest one that is whole, there or here"
    );
    Err(Error::Run { name, what })
}

fn one(request: &Request, remote: &Remote, at: At) -> Result<()> {
    let (runs, name, url, start) = (&request.recipe.metrics.runs_dir, &request.name, remote.url_of(at), Instant::now());
    let recipe = remote.attachment(at, "recipe.toml")?;
    let (old, _) = raw::read(&String::from_utf8_lossy(&recipe), &[]);
    // Whatever can be refused is refused before anything is read or made.
    differences(name, &old, &request.raw)?;
    say(&format!("run {name}: bringing the checkpoint of step {} from {url}", at.step));
    let existing = Folder::resume(runs, name, &request.raw)?;
    let is_new = existing.is_none();
    let folder = match existing {
        Some((folder, _)) => folder,
        None => Folder::create(runs, name)?,
    };
    let fetched: Result<()> = (|| {
        remote.fetch(at, &RealDisk, &folder.checkpoints())?;
        // Now it is the folder of a run, which goes on like any other.
        let file = folder.file("recipe.toml");
        if file.exists() { Ok(()) } else { replace(&file, &recipe) }
    })();
    if fetched.is_err() && is_new {
        folder.abandon();
    }
    fetched?;
    let fields = json!({ "url": url, "seconds": start.elapsed().as_secs_f64() });
    event_before(folder.path(), "downloaded", at.step, fields);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_first_and_of_each_step_the_own_one() {
        let at = |step, seat| At { step, seat };
        let (shared, machine) = (Seat::Shared, Seat::Machine);
        let there =
            [at(1, shared), at(2, machine(0)), at(2, machine(3)), at(4, shared), at(4, machine(1)), at(4, machine(2))];
        assert_eq!(newer(&there, None, 3), [at(4, shared), at(2, machine(3)), at(1, shared)]);
        assert_eq!(newer(&there, Some(1), 0), [at(4, shared), at(2, machine(0))]);
        assert_eq!(newer(&there, Some(2), 1), [at(4, machine(1))]);
        assert_eq!(newer(&there, Some(4), 1), []);
    }
}
