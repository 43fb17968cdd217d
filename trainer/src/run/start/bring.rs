//! What the store has of a run, from there to here: the newest checkpoint, where there is none as new; and for machines with
//! folders of their own the newest that all of them have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use checkpoint::disk::RealDisk;
use checkpoint::reader::{self, Checkpoint};
use checkpoint::store::{At, Remote, Seat};
use checkpoint::{CheckpointError, Manifest, layout};
use serde_json::json;

use crate::data::cache::replace;
use crate::error::{Error, Result};
use crate::log::say;
use crate::recipe::raw;
use crate::run::folder::{Folder, differences};
use crate::run::metrics::event_before;
use crate::run::{Request, upload};

/// What a store has of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Copies {
    step: u64,
    /// The commit's name; empty for what one process alone wrote.
    id: String,
    /// Whose folders are there, of one commit; the lowest first.
    seats: Vec<Seat>,
    /// Ranks of which nothing is there: their machine has not copied it.
    missing: Vec<usize>,
}

/// Looks into the store before a run begins. A new one must find nothing of its name there; one that goes on brings what is
/// newer than all that is here, into a folder of its own if there is none; with folders of several machines also an older one,
/// if it is the newest that the store has of all. `rank` leads the folder, and `lead_of` says of each rank who leads its own.
///
/// # Errors
/// A run of the name is there; what is newest there is damaged and nobody said that an earlier one will do; the store does
/// not answer and there is nothing here to go on from.
pub fn bring(request: &Request, rank: usize, lead_of: &[usize]) -> Result<()> {
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
    let mine = mine(&runs.join(name).join("checkpoints"))?;
    let here = mine.last_key_value().map(|(&step, _)| step);
    let there = match remote.list() {
        Ok(there) => there,
        Err(error) if here.is_some() => {
            say(&format!("run {name}: going on from what is here, the store may have more: {error}"));
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    // Folders of several machines go on from a step that all of them have: one that is older than what is here may be it.
    let apart = lead_of.iter().any(|&lead| lead != lead_of[0]);
    let is_newer = |step: u64| here.is_none_or(|here| step > here);
    let steps: BTreeSet<u64> = there.iter().map(|at| at.step).filter(|&step| apart || is_newer(step)).collect();
    // A copy that is damaged on another machine is known there alone; it goes on from the step before.
    let enough = if apart && request.resume_from_earlier { 2 } else { 1 };
    let (mut incomplete, mut found) = (Vec::new(), 0);
    for step in steps.into_iter().rev() {
        // What may turn out not to be needed ends no run.
        let is_needed = is_newer(step) && found == 0;
        let copies = match copies(&remote, &there, step) {
            Ok(copies) => copies,
            Err(Error::Checkpoint(error)) if error.is_damage() && is_needed => {
                damaged(request, step, &error)?;
                continue;
            }
            Err(error) if is_needed => return Err(error),
            Err(error) => {
                say(&format!("run {name}: the copy of step {step} in the store is passed over: {error}"));
                match error {
                    Error::Checkpoint(error) if error.is_damage() => continue,
                    // The next would not be answered either.
                    _ => return Ok(()),
                }
            }
        };
        if !copies.missing.is_empty() {
            if is_newer(step) {
                let missing = &copies.missing;
                say(&format!(
                    "run {name}: the store lacks what ranks {missing:?} had of step {step}: looking further back"
                ));
                incomplete.push(copies);
            }
            continue;
        }
        match mine.get(&step) {
            Some(id) if *id == copies.id => found += 1,
            // It was written again here since, and the others may have that one or an earlier.
            Some(_) => {}
            None => match one(request, &remote, &copies, (rank, lead_of)) {
                Ok(()) => found += 1,
                Err(Error::Checkpoint(error)) if error.is_damage() && is_needed => damaged(request, step, &error)?,
                Err(error @ Error::Checkpoint(_)) if !is_needed => {
                    say(&format!("run {name}: the copy of step {step} in the store is passed over: {error}"));
                }
                Err(error) => return Err(error),
            },
        }
        if found == enough {
            return Ok(());
        }
    }
    match incomplete.first() {
        // Better than nothing: all parameters are there, and what else is missing will be named.
        Some(copies) if here.is_none() && found == 0 => one(request, &remote, copies, (rank, lead_of)),
        _ => Ok(()),
    }
}

/// The steps that a folder has checkpoints of, and the name of each one's commit; of one that is damaged, nothing that any has.
fn mine(checkpoints: &Path) -> Result<BTreeMap<u64, String>> {
    let id = |path: PathBuf| Checkpoint::open(&path).map_or_else(|_| "damaged".into(), |it| it.manifest().id.clone());
    Ok(reader::list(checkpoints)?.into_iter().map(|(step, path)| (step, id(path))).collect())
}

/// What there is of a step.
fn copies(remote: &Remote, there: &[At], step: u64) -> Result<Copies> {
    let of_step = || there.iter().filter(|at| at.step == step);
    if of_step().any(|at| at.seat == Seat::Shared) {
        let id = remote.manifest(At { step, seat: Seat::Shared })?.id;
        return Ok(Copies { step, id, seats: vec![Seat::Shared], missing: Vec::new() });
    }
    let mut seats = Vec::new();
    let mut first: Option<Manifest> = None;
    let mut files = BTreeSet::new();
    for &at in of_step() {
        let manifest = remote.manifest(at)?;
        let first = first.get_or_insert_with(|| manifest.clone());
        if first.id == manifest.id {
            seats.push(at.seat);
            files.extend(manifest.files.into_keys());
        }
    }
    // What an older version wrote has one axis.
    let on = |axis: &str| first.as_ref().and_then(|first| first.state.pointer("/mesh")?.get(axis)?.as_u64());
    let ranks = on("data")
        .map_or(0, |data| data.saturating_mul(on("pipeline").unwrap_or(1)).saturating_mul(on("tensor").unwrap_or(1)));
    let is_there =
        |&rank: &usize| [layout::shard(rank), layout::packed_shard(rank)].iter().any(|name| files.contains(name));
    // No run has more, whatever stands there.
    let missing = (0..ranks.min(parallel::mesh::RANKS_MAX as u64) as usize).filter(|rank| !is_there(rank)).collect();
    let id = first.map(|first| first.id).unwrap_or_default();
    Ok(Copies { step, id, seats, missing })
}

/// Which copies this folder's lead brings: its own, or where it has none the first; and the lowest lead also those of
/// machines that are gone, of which nobody else would bring what their ranks had left out.
fn wanted(seats: &[Seat], rank: usize, lead_of: &[usize]) -> Vec<Seat> {
    let own = Seat::Machine(rank);
    let first = if seats.contains(&own) { own } else { seats[0] };
    let is_gone = |seat: Seat| matches!(seat, Seat::Machine(lead) if !lead_of.contains(&lead));
    let lowest = lead_of.iter().min() == Some(&rank);
    let gone = seats.iter().copied().filter(|&seat| lowest && seat != first && is_gone(seat));
    std::iter::once(first).chain(gone).collect()
}

/// Says of a damaged copy what to do about it, or passes over it where that was said.
fn damaged(request: &Request, step: u64, error: &CheckpointError) -> Result<()> {
    let name = request.name.clone();
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

fn one(request: &Request, remote: &Remote, copies: &Copies, (rank, lead_of): (usize, &[usize])) -> Result<()> {
    let (runs, name, start) = (&request.recipe.metrics.runs_dir, &request.name, Instant::now());
    let (step, seats) = (copies.step, wanted(&copies.seats, rank, lead_of));
    let at = At { step, seat: seats[0] };
    let urls: Vec<String> = seats.iter().map(|&seat| remote.url_of(At { step, seat })).collect();
    let urls = urls.join(" and ");
    let recipe = remote.attachment(at, "recipe.toml")?;
    let (old, _) = raw::read(&String::from_utf8_lossy(&recipe), &[]);
    // Whatever can be refused is refused before anything is read or made.
    differences(name, &old, &request.raw)?;
    say(&format!("run {name}: bringing the checkpoint of step {step} from {urls}"));
    let existing = Folder::resume(runs, name, &request.raw)?;
    let is_new = existing.is_none();
    let folder = match existing {
        Some((folder, _)) => folder,
        None => Folder::create(runs, name)?,
    };
    let fetched: Result<()> = (|| {
        // From here on it is the folder of a run, which goes on like any other, also where this process dies half-way.
        let file = folder.file("recipe.toml");
        if !file.exists() {
            replace(&file, &recipe)?;
        }
        remote.fetch(step, &seats, &RealDisk, &folder.checkpoints())?;
        Ok(())
    })();
    if fetched.is_err() && is_new {
        folder.abandon();
    }
    fetched?;
    let fields = json!({ "url": urls, "seconds": start.elapsed().as_secs_f64() });
    event_before(folder.path(), "downloaded", step, fields);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_brings_its_own_and_the_lowest_what_nobody_else_would() {
        let machine = Seat::Machine;
        let seats = [machine(0), machine(2), machine(4)];
        // The same machines, and one of them a new one.
        let [a, b, c] = [0, 2, 4].map(|rank| wanted(&seats, rank, &[0, 0, 2, 2, 4]));
        assert_eq!([a, b, c], [[machine(0)], [machine(2)], [machine(4)]]);
        assert_eq!(wanted(&seats, 5, &[0, 0, 2, 2, 4, 5]), [machine(0)], "what all have alike is anywhere");
        // Two of them, and one alone.
        assert_eq!(wanted(&seats, 0, &[0, 0, 0, 0, 4]), [machine(0), machine(2)]);
        assert_eq!(wanted(&seats, 4, &[0, 0, 0, 0, 4]), [machine(4)]);
        assert_eq!(wanted(&seats, 0, &[0]), seats);
        // One folder's, whoever asks.
        assert_eq!(wanted(&[Seat::Shared], 2, &[0, 0, 2]), [Seat::Shared]);
    }
}
