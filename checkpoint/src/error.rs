//! Everything that can go wrong with a checkpoint or an export: what was expected, what came, where, and the way out.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use compression::{Region, RegionError};
use safetensors::SafeTensorError;
use thiserror::Error;

/// The one error of this crate.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("could not {operation} {}: {source}{}", path.display(), way_out(source))]
    Io {
        /// What was tried, as "write the file".
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The manifest's text and the hash in its second line disagree, or there is none.
    #[error(
        "{}: the manifest is damaged: its text hashes to BLAKE3 {found}, its second line should say so and says \
         {expected}; resume from another checkpoint",
        path.display()
    )]
    ManifestHash {
        /// The manifest.
        path: PathBuf,
        /// What its second line says.
        expected: String,
        /// What its text hashes to.
        found: String,
    },
    /// The manifest is intact but is not one of ours.
    #[error("{}: expected a manifest of format \"{}\": {why}", path.display(), crate::manifest::FORMAT)]
    ManifestText {
        /// The manifest.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// The checkpoint was written by a newer build.
    #[error(
        "{}: the manifest has version {found}, this build reads version {supported}; update tributary to read it",
        path.display()
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version that this build reads and writes.
        supported: u64,
    },
    /// The manifest speaks of another step than its folder's name.
    #[error("{}: the folder is named for step {expected}, its manifest says step {found}; rename the folder", path.display())]
    Step {
        /// The checkpoint.
        path: PathBuf,
        /// The step in the folder's name.
        expected: u64,
        /// The step in the manifest.
        found: u64,
    },
    /// A file name that could lead out of the folder, or that the format keeps for itself.
    #[error("{}: the file name {name:?} cannot be used: {why}", path.display())]
    FileName {
        /// Where the name stands or was to be written.
        path: PathBuf,
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A tensor name that is empty, reserved, or given twice.
    #[error("the tensor name {name:?} cannot be used: {why}")]
    TensorName {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A shape or region that makes no sense.
    #[error("{}: tensor {tensor}: {source}", path.display())]
    Region {
        /// The manifest or folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What does not fit.
        source: RegionError,
    },
    /// The pieces of a tensor do not fit together, or not in a way that this build reads.
    #[error("{}: tensor {tensor} of shape {shape:?}: {why}", path.display())]
    Pieces {
        /// The manifest.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What does not fit.
        why: String,
    },
    /// Elements that were asked for lie in no piece of this checkpoint: another machine stored them.
    #[error(
        "{}: tensor {tensor}: elements {} of its {count} are in no piece of this checkpoint; copy it from the machine \
         that holds it",
        path.display(),
        several(absent)
    )]
    Absent {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The elements asked for and not there, ascending.
        absent: Vec<Range<usize>>,
        /// Elements of the whole tensor.
        count: usize,
    },
    /// A file that the manifest names is not there.
    #[error("{}: the manifest names this file and it is missing; resume from another checkpoint", path.display())]
    FileMissing {
        /// The file.
        path: PathBuf,
    },
    /// A file has another size than the manifest says.
    #[error("{}: expected {expected} bytes, found {found}: the file is cut short or changed; resume from another checkpoint", path.display())]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes in the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A file has other bytes than the manifest says.
    #[error("{}: expected BLAKE3 {expected}, found {found}: the file is damaged; resume from another checkpoint", path.display())]
    FileHash {
        /// The file.
        path: PathBuf,
        /// The hash in the manifest.
        expected: String,
        /// The hash of the bytes on disk.
        found: String,
    },
    /// A part of a file has other bytes than the manifest says.
    #[error(
        "{}: bytes {range:?} do not hash to what the manifest says: the file is damaged; resume from another checkpoint",
        path.display()
    )]
    FileRange {
        /// The file.
        path: PathBuf,
        /// The first block of it that is damaged.
        range: Range<u64>,
    },
    /// The manifest has no such file.
    #[error("{}: there is no file {name:?} in it; it has {}", path.display(), present.join(", "))]
    NoFile {
        /// The checkpoint or export.
        path: PathBuf,
        /// The file asked for.
        name: String,
        /// What there is.
        present: Vec<String>,
    },
    /// There is no such tensor.
    #[error("{}: there is no tensor {tensor:?} among its {count}; was it written from another model?", path.display())]
    NoTensor {
        /// The checkpoint or file.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
        /// Tensors that there are.
        count: usize,
    },
    /// A tensor has another shape than asked for.
    #[error(
        "{}: tensor {tensor}: expected shape {expected:?}, found {found:?}; was it written from another model?",
        path.display()
    )]
    TensorShape {
        /// The checkpoint or file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape asked for.
        expected: Vec<usize>,
        /// The shape on disk.
        found: Vec<usize>,
    },
    /// The values are not as many as the shape says.
    #[error("tensor {tensor}: shape {shape:?} has {expected} elements, the slice has {found}")]
    Elements {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Elements of the shape.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A slice has another length than the part of a tensor that it is to hold.
    #[error("tensor {tensor}: {} are {}, the slice has {found}", elements_of(region), region.len())]
    Slice {
        /// The tensor.
        tensor: String,
        /// The elements asked for.
        region: Region,
        /// Elements given.
        found: usize,
    },
    /// A tensor has a type that cannot be read here.
    #[error("{}: tensor {tensor}: expected {expected}, found type {found}", path.display())]
    TensorType {
        /// The checkpoint or file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What can be read.
        expected: &'static str,
        /// The type on disk.
        found: String,
    },
    /// A file is no safetensors file.
    #[error("{}: not a safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What its reader said.
        source: SafeTensorError,
    },
    /// A packed file has the right hash and is not what it should be.
    #[error("{}: not a packed safetensors file: {why}; resume from another checkpoint", path.display())]
    Packed {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// Something could not be written as JSON.
    #[error("{}: could not be written as JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the serialiser said.
        source: serde_json::Error,
    },
    /// A snapshot did not fill a tensor; writing it would store what an earlier snapshot left in the buffer.
    #[error("step {step}: the snapshot did not fill tensor {tensor}; fill everything that the writer was made with")]
    Unfilled {
        /// The step.
        step: u64,
        /// The first tensor that was not asked for.
        tensor: String,
    },
    /// The writer's thread panicked at this snapshot; it goes on with the next.
    #[error(
        "step {step}: the checkpoint writer panicked: {what}; earlier checkpoints are untouched, please report this"
    )]
    Panicked {
        /// The step.
        step: u64,
        /// The panic's message.
        what: String,
    },
    /// The writer's thread is no more.
    #[error("step {step}: the checkpoint writer's thread has died; earlier checkpoints are untouched, restart the run")]
    Gone {
        /// The step.
        step: u64,
    },
    /// The ranks' parts of a step do not make a checkpoint.
    #[error("{}: step {step} cannot be committed: {why}; earlier checkpoints are untouched", path.display())]
    Commit {
        /// The folder of checkpoints.
        path: PathBuf,
        /// The step.
        step: u64,
        /// Why not.
        why: String,
    },
    /// The writer was told to abandon what it had not begun.
    #[error("step {step}: the run was abandoned before this was written; earlier checkpoints are untouched")]
    Abandoned {
        /// The step.
        step: u64,
    },
    /// Ranks write a checkpoint together, and one of them could not.
    #[error("step {step}: the ranks could not write the checkpoint together: {why}")]
    Peer {
        /// The step.
        step: u64,
        /// Which one, and why.
        why: String,
    },
    /// The folder to export to is there already.
    #[error("{}: it exists already and an export replaces nothing; remove it or choose another name", path.display())]
    ExportExists {
        /// The folder.
        path: PathBuf,
    },
    /// The folder in which an export is put together is there and holds what no export of ours put there.
    #[error("{}: an export is put together here, but it holds {foreign:?}, which is not ours; move it away", path.display())]
    ExportPartial {
        /// The folder.
        path: PathBuf,
        /// The first name that is not ours.
        foreign: String,
    },
    /// A finite value becomes infinite in the type asked for.
    #[error("{}: tensor {tensor}: {value:e} is beyond the range of {dtype}; export as f32{}", path.display(), crate::safetensors_file::wider(*dtype))]
    Range {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first value that does not fit.
        value: f32,
        /// The type.
        dtype: crate::Dtype,
    },
    /// Not the name of a type.
    #[error("expected one of f32, bf16, f16, found {found:?}")]
    UnknownType {
        /// What came.
        found: String,
    },
}

impl CheckpointError {
    /// Whether what is on the disk is at fault, so that another checkpoint may be whole; and not this build, this user, or
    /// machines that are not here.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            // A disk that is only out of reach, or a process that is out of something, says nothing of the bytes.
            Self::Io { source, .. } => {
                use io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
                let kinds = [InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof];
                kinds.contains(&source.kind()) || source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
            }
            Self::Version { .. } | Self::Absent { .. } => false,
            _ => true,
        }
    }

    /// For `map_err`: keeps what was tried, and where.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { operation, path, source }
    }
}

/// Which elements these are, as words.
fn elements_of(Region { start, end, flat_start, flat_end }: &Region) -> String {
    let box_of =
        if start.iter().any(|&start| start > 0) { format!(" of the box {start:?} to {end:?}") } else { String::new() };
    format!("elements {flat_start}..{flat_end}{box_of}")
}

/// The first few of these ranges, as words.
fn several(ranges: &[Range<usize>]) -> String {
    const NAMED_MAX: usize = 4;
    let named: Vec<String> = ranges.iter().take(NAMED_MAX).map(|range| format!("{range:?}")).collect();
    let more = ranges.len().saturating_sub(NAMED_MAX);
    named.join(", ") + &if more > 0 { format!(" and {more} more ranges") } else { String::new() }
}

fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space or keep fewer checkpoints",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; choose a folder that can be written",
        _ => "",
    }
}
