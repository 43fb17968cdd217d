//! The commands on checkpoints that are there: `inspect`, `verify` and `checkpoint diff`.
//!
//! - `text`: what they print for people. `stored`: of copies in a store.

mod stored;
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use checkpoint::compare::{self, Comparison, How};
use checkpoint::manifest::FileEntry;
use checkpoint::reader::{self, Audit, Checkpoint, audit};
use checkpoint::store::Settings;
use checkpoint::{inspect, layout};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::print;
use crate::error::{Error, Result};
use crate::recipe::raw::{self, Reader};

#[derive(Debug, Args)]
pub(super) struct Where {
    /// Where runs are looked for by name
    #[arg(long, default_value = "runs")]
    runs_dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A checkpoint, or a run (folder, name, or URL in a store), whose newest is meant
    #[arg(value_name = "CHECKPOINT|RUN")]
    what: PathBuf,
    /// Every tensor in a row of its own, however many there are
    #[arg(long)]
    all: bool,
    /// Also read every tensor, and print the CRC-32 of its elements
    #[arg(long)]
    checksums: bool,
    #[command(flatten)]
    place: Where,
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// A checkpoint, or a run (folder, name, or URL in a store), all of whose are checked
    #[arg(value_name = "CHECKPOINT|RUN")]
    what: PathBuf,
    #[command(flatten)]
    place: Where,
}

#[derive(Debug, Subcommand)]
pub(super) enum Group {
    /// Compare two checkpoints bit by bit; the exit code is 0 where they are equal, 1 where they are not
    Diff(Diff),
}

#[derive(Debug, Args)]
pub(super) struct Diff {
    /// A checkpoint, or a run (folder or name), whose newest is meant
    #[arg(value_name = "CHECKPOINT|RUN")]
    a: PathBuf,
    /// The other one
    #[arg(value_name = "CHECKPOINT|RUN")]
    b: PathBuf,
    #[command(flatten)]
    place: Where,
}

/// What a name on the command line means.
enum Found {
    Checkpoint(PathBuf),
    /// The folder of checkpoints, and the committed ones in it by step.
    Run(PathBuf, Vec<PathBuf>),
}

fn find(what: &Path, runs: &Path) -> Result<Found> {
    let named = runs.join(what);
    let file_name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_step = |path: &Path| layout::step_of(&file_name(path)).is_some();
    let kind = |path: &Path| [layout::MANIFEST, "checkpoints"].iter().any(|name| path.join(name).exists());
    // A folder here that only shares its name with a run is not meant.
    let path = if kind(what) || is_step(what) || !named.is_dir() { what } else { &named };
    let usage = |found: &str| {
        let path = path.display();
        Err(Error::Usage(format!("{path}: expected a checkpoint, or the folder or the name of a run; {found}")))
    };
    if !path.is_dir() {
        return usage("there is no such folder");
    }
    if path.join(layout::MANIFEST).exists() || is_step(path) {
        return Ok(Found::Checkpoint(path.to_owned()));
    }
    let folder = path.join("checkpoints");
    if !folder.is_dir() {
        return usage("it has neither manifest.json nor checkpoints/");
    }
    let checkpoints: Vec<PathBuf> = reader::list(&folder)?.into_iter().map(|(_, path)| path).collect();
    if checkpoints.is_empty() {
        return usage("the run has no checkpoint yet");
    }
    Ok(Found::Run(folder, checkpoints))
}

/// The checkpoint that is meant, or the newest of the run.
fn one(what: &Path, runs: &Path) -> Result<Checkpoint> {
    let path = match find(what, runs)? {
        Found::Checkpoint(path) => path,
        Found::Run(_, mut checkpoints) => checkpoints.pop().expect("a run without any is an error"),
    };
    Ok(Checkpoint::open(&path)?)
}

pub(super) fn inspect(args: &Inspect, settings: &Settings) -> Result<ExitCode> {
    if let Some(url) = stored::url(&args.what) {
        return stored::inspect(url, args, settings);
    }
    let (checkpoint, others) = match find(&args.what, &args.place.runs_dir)? {
        Found::Checkpoint(path) => (Checkpoint::open(&path)?, Vec::new()),
        Found::Run(_, mut all) => {
            let newest = all.pop().expect("a run without any is an error");
            (Checkpoint::open(&newest)?, all)
        }
    };
    let checksums = match args.checksums {
        true => Some(checksums(&checkpoint)?),
        false => None,
    };
    if args.place.json {
        return print(&format!("{}\n", contents(&checkpoint, &others, checksums.as_deref())));
    }
    print(&text::contents(&checkpoint, &others, args.all, checksums.as_deref()))
}

/// The checksum of every tensor, in name order.
fn checksums(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let names = checkpoint.manifest().tensors.keys();
    names.map(|name| Ok(format!("{:08x}", inspect::crc32(checkpoint, name)?))).collect()
}

/// All that a manifest says, in names that stay.
fn contents(checkpoint: &Checkpoint, others: &[PathBuf], checksums: Option<&[String]>) -> Value {
    let manifest = checkpoint.manifest();
    let tensors = manifest.tensors.iter().enumerate().map(|(index, (name, entry))| {
        let pieces = entry.pieces.iter().map(|piece| {
            let mut told = json!({ "file": piece.file, "key": piece.key, "region": piece.region });
            if piece.region.is_interval(&entry.shape) {
                (told["start"], told["end"]) = (piece.region.flat_start.into(), piece.region.flat_end.into());
            }
            told
        });
        let mut tensor = json!({
            "name": name,
            "dtype": entry.dtype,
            "shape": entry.shape,
            "elements": entry.elements(),
            "absent_elements": entry.absent_count(),
            "pieces": pieces.collect::<Vec<_>>(),
        });
        if let Some(checksums) = checksums {
            tensor["crc32"] = json!(checksums[index]);
        }
        tensor
    });
    let files = manifest.files.iter();
    json!({
        "path": checkpoint.path(),
        "step": manifest.step,
        "id": manifest.id,
        "format": manifest.format,
        "version": manifest.version,
        "mesh": mesh_of(checkpoint),
        "bytes": manifest.files.values().map(|file| file.bytes).fold(0, u64::saturating_add),
        "files": files.map(file_json).collect::<Vec<_>>(),
        "tensors": tensors.collect::<Vec<_>>(),
        "state": manifest.state,
        "older": others,
    })
}

fn file_json((name, file): (&String, &FileEntry)) -> Value {
    let mut object = json!({ "name": name, "bytes": file.bytes, "blake3": file.blake3 });
    if let Some(unpacked_bytes) = file.unpacked_bytes {
        object["unpacked_bytes"] = unpacked_bytes.into();
    }
    object
}

/// Data x pipeline x tensor ranks of the run that wrote a checkpoint, as it says itself or by its recipe; `None` where
/// another program wrote it.
fn mesh_of(checkpoint: &Checkpoint) -> Option<String> {
    let recipe = || {
        let (raw, _) = raw::read(&String::from_utf8_lossy(&checkpoint.attachment("recipe.toml").ok()?), &[]);
        Reader(&raw).count("parallel.data")
    };
    let count = |axis: &str| checkpoint.state().pointer(&format!("/mesh/{axis}")).and_then(Value::as_u64);
    let data = count("data").or_else(|| Some(recipe()? as u64))?;
    // Versions that wrote none had none.
    let [pipeline, tensor] = ["pipeline", "tensor"].map(|axis| count(axis).unwrap_or(1));
    Some(format!("{data} x {pipeline} x {tensor}"))
}

pub(super) fn verify(args: &Verify, settings: &Settings) -> Result<ExitCode> {
    if let Some(url) = stored::url(&args.what) {
        return stored::verify(url, args.place.json, settings);
    }
    let (folder, checkpoints) = match find(&args.what, &args.place.runs_dir)? {
        Found::Checkpoint(path) => (None, vec![path]),
        Found::Run(folder, checkpoints) => (Some(folder), checkpoints),
    };
    let mut whole = true;
    for path in &checkpoints {
        let audit = audit(path);
        whole &= audit.damage.is_empty();
        say_audited(path, &audit, args.place.json)?;
    }
    if let (Some(folder), false) = (folder, args.place.json) {
        print(&text::left_over(&folder)?)?;
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Each as soon as it is known: the next may take minutes.
fn say_audited(path: &Path, audit: &Audit, json: bool) -> Result<ExitCode> {
    print(&if json { format!("{}\n", audited(path, audit)) } else { text::audited(path, audit) })
}

fn audited(path: &Path, audit: &Audit) -> Value {
    let damage = audit
        .damage
        .iter()
        .map(|damage| json!({ "file": damage.file, "error": damage.error.to_string(), "tensors": damage.tensors }));
    json!({
        "path": path,
        "step": audit.step,
        "whole": audit.damage.is_empty(),
        "files": audit.files,
        "bytes_good": audit.bytes_good,
        "elements_absent": audit.absent,
        "damage": damage.collect::<Vec<_>>(),
    })
}

pub(super) fn group(group: &Group) -> Result<ExitCode> {
    match group {
        Group::Diff(args) => diff(args),
    }
}

fn diff(args: &Diff) -> Result<ExitCode> {
    let (a, b) = (one(&args.a, &args.place.runs_dir)?, one(&args.b, &args.place.runs_dir)?);
    let comparison = compare::compare(&a, &b)?;
    if args.place.json {
        print(&format!("{}\n", compared(&a, &b, &comparison)))?;
    } else {
        print(&text::compared(&a, &b, &comparison))?;
    }
    Ok(if comparison.is_equal() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compared(a: &Checkpoint, b: &Checkpoint, comparison: &Comparison) -> Value {
    let tensor = |name: &str, how: &How| match how {
        How::OnlyInA => json!({ "name": name, "only_in": "a" }),
        How::OnlyInB => json!({ "name": name, "only_in": "b" }),
        How::Shape { a, b } => json!({ "name": name, "shape_a": a, "shape_b": b }),
        How::Held { only_in_a, only_in_b } => {
            json!({ "name": name, "elements_only_in_a": only_in_a, "elements_only_in_b": only_in_b })
        }
        How::Values(values) => json!({
            "name": name,
            "first": values.first,
            "index": values.index,
            // JSON has no infinities and no NaN.
            "a": values.a.to_string(),
            "b": values.b.to_string(),
            "different_elements": values.count,
            "elements": values.of,
            "largest_difference": values.largest.is_finite().then_some(values.largest),
            "largest_at": values.largest_at,
        }),
    };
    let state = comparison.state.iter().map(|other| json!({ "path": other.path, "a": other.a, "b": other.b }));
    json!({
        "a": a.path(),
        "b": b.path(),
        "equal": comparison.is_equal(),
        "equal_tensors": comparison.equal,
        "tensors": comparison.tensors.iter().map(|other| tensor(&other.name, &other.how)).collect::<Vec<_>>(),
        "state": state.collect::<Vec<_>>(),
        "attachments": comparison.attachments,
    })
}
