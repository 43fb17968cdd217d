//! Everything that is damaged in a checkpoint, not only the first of it.

use std::path::Path;

use super::Checkpoint;
use super::stored::Stored;
use crate::error::CheckpointError;
use crate::layout;

/// What an [`audit`] found.
#[derive(Debug)]
pub struct Audit {
    /// Optimiser steps done, if the manifest can be read.
    pub step: Option<u64>,
    /// Files that the manifest names.
    pub files: usize,
    /// Bytes of those that are as it says.
    pub bytes_good: u64,
    /// Elements that the tensors have and no file here is said to hold: another machine may have them.
    pub absent: usize,
    /// Everything else; a checkpoint is whole when there is none.
    pub damage: Vec<Damage>,
}

/// One file that is not as the manifest says, or the manifest itself.
#[derive(Debug)]
pub struct Damage {
    /// Its name in the checkpoint.
    pub file: String,
    /// What is wrong with it.
    pub error: CheckpointError,
    /// Tensors of which it holds a part, in name order.
    pub tensors: Vec<String>,
}

/// Hashes every file of the checkpoint in the folder `path` on all cores, and looks that every piece is where the
/// manifest says. Where [`Checkpoint::verify`] stops at the first fault, this goes on to the end. Files that the manifest
/// does not name are ignored.
#[must_use]
pub fn audit(path: &Path) -> Audit {
    let manifest = match Checkpoint::manifest_of(path) {
        Ok(manifest) => manifest,
        Err(error) => {
            let damage = Damage { file: layout::MANIFEST.into(), error, tensors: Vec::new() };
            return Audit { step: None, files: 0, bytes_good: 0, absent: 0, damage: vec![damage] };
        }
    };
    let (step, files, absent) = (Some(manifest.step), manifest.files.len(), manifest.absent_count());
    let mut audit = Audit { step, files, bytes_good: 0, absent, damage: Vec::new() };
    for (name, entry) in &manifest.files {
        let held = manifest.pieces_in(name);
        let stored = Stored::open(path, name, entry, true);
        let checked = stored.and_then(|stored| {
            let reading = stored.reading()?;
            reading.check()?;
            reading.check_pieces(&held)
        });
        match checked {
            Ok(()) => audit.bytes_good += entry.bytes,
            Err(error) => {
                let tensors = held.iter().map(|(tensor, ..)| (*tensor).to_owned()).collect();
                audit.damage.push(Damage { file: name.clone(), error, tensors });
            }
        }
    }
    audit
}
