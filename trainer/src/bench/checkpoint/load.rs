//! How fast a checkpoint is read: in processes of their own, as that of a resume is. Only their memory is new; that of a process which has
//! worked before was touched before, and an allocator that hands it out again may have to clear it.

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use checkpoint::reader::{Checkpoint, Want};
use serde::{Deserialize, Serialize};

use super::work::{median, plain_read_s};
use crate::error::{Error, Result};

/// Seconds in which all of a checkpoint is opened, read and hashed, in one pass.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Loads {
    /// Into new memory, as a resume does.
    pub load_s: f64,
    /// Into memory that is there.
    pub load_again_s: f64,
    /// The bytes of the first rank's file alone into new memory, by one thread, without a hash.
    pub read_s: f64,
}

/// The medians of so many processes.
///
/// # Errors
/// One of them fails.
pub(super) fn in_processes(path: &Path, rounds: usize) -> Result<Loads> {
    let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    let mut loads: Vec<Loads> = Vec::new();
    for _ in 0..rounds {
        let mut command = Command::new(&program);
        let command = command.args(["bench", "checkpoint", "--json", "--load"]).arg(path).stderr(Stdio::inherit());
        let output = command.output().map_err(Error::io("start", &program))?;
        let line = serde_json::from_slice(&output.stdout);
        loads.push(
            line.map_err(|error| Error::Usage(format!("bench checkpoint: no line of a process that loads: {error}")))?,
        );
    }
    let of = |what: fn(&Loads) -> f64| median(&mut loads.iter().map(what).collect::<Vec<f64>>());
    Ok(Loads { load_s: of(|one| one.load_s), load_again_s: of(|one| one.load_again_s), read_s: of(|one| one.read_s) })
}

/// Measures in this process, which has done nothing before.
///
/// # Errors
/// The checkpoint is damaged, or the disk fails.
pub(super) fn here(path: &Path) -> Result<Loads> {
    let (load_s, mut values) = timed(path, None)?;
    let read_s = plain_read_s(path)?;
    let (load_again_s, _) = timed(path, Some(std::mem::take(&mut values)))?;
    Ok(Loads { load_s, load_again_s, read_s })
}

/// Opens a checkpoint and loads all of it to where an earlier load has put it, or into new memory.
fn timed(path: &Path, there: Option<Vec<Vec<f32>>>) -> Result<(f64, Vec<Vec<f32>>)> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(path)?;
    let tensors = || checkpoint.manifest().tensors.iter();
    let new = || tensors().map(|(_, tensor)| vec![0.0; tensor.shape.iter().product()]).collect();
    let mut values: Vec<Vec<f32>> = there.unwrap_or_else(new);
    let mut wants: Vec<_> =
        tensors().zip(&mut values).map(|((name, tensor), to)| Want::all(name, &tensor.shape, to)).collect();
    checkpoint.load(&mut wants)?;
    drop(wants);
    let seconds = start.elapsed().as_secs_f64();
    black_box(&values);
    Ok((seconds, values))
}
