//! What several machines have of one commit, put together to one checkpoint.
//!
//! Each machine's folder has the whole of what all ranks have alike, and of the rest what its own ranks stored. So of the
//! machines after the first only those pieces are taken whose elements nobody before has.

use std::collections::btree_map::Entry;
use std::path::Path;

use crate::error::CheckpointError;
use crate::manifest::{Manifest, TensorEntry};

/// The manifest of all of it, and which of the `parts` has each of its files. `path` is for messages.
///
/// # Errors
/// Parts of different commits, or such as do not fit together.
pub(super) fn merge(parts: &[Manifest], path: &Path) -> Result<(Manifest, Vec<(usize, String)>), CheckpointError> {
    let mut merged = parts[0].clone();
    let mut files: Vec<(usize, String)> = merged.files.keys().map(|name| (0, name.clone())).collect();
    for (index, part) in parts.iter().enumerate().skip(1) {
        if (part.step, &part.id) != (merged.step, &merged.id) {
            let why = format!("its id is {:?} on one machine and {:?} on another", merged.id, part.id);
            return Err(CheckpointError::Commit { path: path.into(), step: merged.step, why });
        }
        for (name, tensor) in &part.tensors {
            for file in add(&mut merged, name, tensor, path)? {
                match merged.files.entry(file) {
                    Entry::Vacant(free) => {
                        files.push((index, free.key().clone()));
                        free.insert(part.files[&files[files.len() - 1].1].clone());
                    }
                    Entry::Occupied(taken) if *taken.get() == part.files[taken.key()] => {}
                    Entry::Occupied(taken) => {
                        let why = format!("two machines have different files {:?}", taken.key());
                        return Err(CheckpointError::Commit { path: path.into(), step: merged.step, why });
                    }
                }
            }
        }
    }
    merged.version = Manifest::version_of(&merged.files);
    Ok((merged, files))
}

/// Adds the pieces that are missing of a tensor, and returns the files in which they lie.
fn add(merged: &mut Manifest, name: &str, tensor: &TensorEntry, path: &Path) -> Result<Vec<String>, CheckpointError> {
    let empty = || TensorEntry { pieces: Vec::new(), ..tensor.clone() };
    let known = merged.tensors.entry(name.to_owned()).or_insert_with(empty);
    let fault = |why| {
        let (path, tensor, shape) = (path.into(), name.to_owned(), tensor.shape.clone());
        Err(CheckpointError::Pieces { path, tensor, shape, why })
    };
    if known.shape != tensor.shape {
        return fault(format!("another machine has it as {:?}", known.shape));
    }
    let mut files = Vec::new();
    for piece in &tensor.pieces {
        match known.held_of(&piece.region) {
            held if held == piece.region.len() => {}
            0 => {
                known.pieces.push(piece.clone());
                known.sort();
                files.push(piece.file.clone());
            }
            _ => return fault(format!("of {:?} another machine has a part", piece.region)),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use compression::Region;
    use serde_json::Value;

    use super::*;
    use crate::layout::shard;
    use crate::manifest::{DTYPE, FORMAT, FileEntry, Piece, VERSION};

    /// A tensor, and the ranks that hold elements of it.
    type Held<'a> = (&'a str, &'a [(usize, Range<usize>)]);

    /// A machine's manifest: tensors with their pieces, each in the file of a rank.
    fn manifest(id: &str, tensors: &[Held<'_>]) -> Manifest {
        let file = |rank: &usize| {
            let blake3 = blake3::hash(&rank.to_le_bytes()).to_hex().to_string();
            (shard(*rank), FileEntry { bytes: 1, blake3, unpacked_bytes: None, subtrees: None })
        };
        let piece = |name: &str, (rank, range): &(usize, Range<usize>)| {
            let region = Region { flat_start: range.start, flat_end: range.end, ..Region::whole(&[8]).unwrap() };
            Piece { file: shard(*rank), key: name.into(), region }
        };
        let tensor = |(name, pieces): &Held<'_>| {
            let pieces = pieces.iter().map(|at| piece(name, at)).collect();
            ((*name).to_owned(), TensorEntry { dtype: DTYPE.into(), shape: vec![8], pieces })
        };
        let ranks = tensors.iter().flat_map(|(_, pieces)| pieces.iter().map(|(rank, _)| rank));
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            step: 3,
            id: id.into(),
            tensors: tensors.iter().map(tensor).collect(),
            files: ranks.map(file).collect(),
            state: Value::Null,
        }
    }

    #[test]
    fn each_machine_adds_what_nobody_before_it_has() {
        let parts = [
            manifest("x", &[("w", &[(0, 0..8)]), ("w.owner", &[(0, 0..4)]), ("w.sender.0000", &[(0, 0..8)])]),
            manifest("x", &[("w", &[(1, 0..5), (2, 5..8)]), ("w.owner", &[(1, 4..6), (2, 6..8)])]),
            manifest("x", &[("w", &[(3, 0..8)])]),
        ];
        let (merged, files) = merge(&parts, Path::new("a")).unwrap();
        let flat = |piece: &Piece| piece.region.flat_start..piece.region.flat_end;
        let held = |name: &str| merged.tensors[name].pieces.iter().map(flat).collect::<Vec<_>>();
        assert_eq!((merged.tensors["w"].absent_count(), held("w").len()), (0, 1));
        assert_eq!(merged.tensors["w.sender.0000"].absent_count(), 0);
        assert_eq!(held("w.owner"), [0..4, 4..6, 6..8]);
        assert_eq!(files, [(0, shard(0)), (1, shard(1)), (1, shard(2))], "rank 3 has nothing that is missing");
        assert_eq!(merged.files.len(), 3);
        // It can be written and read like any other.
        let text = merged.render(Path::new("a")).unwrap();
        assert_eq!(Manifest::parse(&text, Path::new("a")).unwrap(), merged);
        // The other way round everything is there as well.
        let turned = [parts[1].clone(), parts[0].clone()];
        let (merged, _) = merge(&turned, Path::new("a")).unwrap();
        assert!(merged.tensors.values().all(|tensor| tensor.absent_count() == 0));
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let one = manifest("x", &[("w", &[(0, 0..4)])]);
        for (other, said) in [
            (manifest("y", &[("w", &[(1, 4..8)])]), "its id is \"x\" on one machine and \"y\""),
            (manifest("x", &[("w", &[(1, 2..8)])]), "another machine has a part"),
        ] {
            let message = merge(&[one.clone(), other], Path::new("a")).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
        let mut other = manifest("x", &[("w", &[(0, 4..8)])]);
        other.files.values_mut().for_each(|file| file.bytes = 2);
        let message = merge(&[one, other], Path::new("a")).unwrap_err().to_string();
        assert!(message.contains("two machines have different files \"rank-0000.safetensors\""), "{message}");
    }
}
