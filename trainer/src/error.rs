//! Everything that can go wrong in this crate, by kind, with what was expected, what came, and the way out.

use std::io;
use std::path::PathBuf;

use checkpoint::CheckpointError;
use thiserror::Error;

use crate::recipe::Faults;
use crate::run::signals::TRY_AGAIN;

/// The errors of the trainer.
#[derive(Debug, Error)]
pub enum Error {
    /// The recipe is at fault.
    #[error(transparent)]
    Recipe(#[from] Faults),
    /// A file or folder could not be read or written.
    #[error("could not {action} {path}: {source}{}", way_out(source))]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A crate of the corpus is not in the local cargo registry.
    #[error(
        "data: the sources of {missing} are not in the cargo registry below {registry}: expected them there because \
         this project's Cargo.lock pins them; run `cargo fetch --locked` in the repository, or name crates that are there"
    )]
    MissingCrate {
        /// All that are missing.
        missing: String,
        /// Where they were looked for.
        registry: PathBuf,
    },
    /// Files of the corpus are not there.
    #[error("{key}: expected files, there is none of this name: {missing}; paths count from the current folder")]
    MissingText {
        /// The recipe's key.
        key: &'static str,
        /// All that are missing.
        missing: String,
    },
    /// A folder that the recipe names cannot be used.
    #[error("{key}: could not create {path}: {source}; name a folder that can be made and written")]
    Folder {
        /// The recipe's key.
        key: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The corpus is not the one that the recipe pins.
    #[error(
        "data: the corpus has BLAKE3 {found}, the recipe's data.blake3 expects {expected}: some text differs; restore \
         it (a copy in cargo's registry that was edited comes back when its folder is removed and `cargo fetch` runs), or \
         write the new hash into the recipe if the change is meant"
    )]
    CorpusChanged {
        /// From the recipe.
        expected: String,
        /// Of the text that is there.
        found: String,
    },
    /// What stands in a file is not what should stand there.
    #[error("{path}: {what}")]
    Text {
        /// Which file, with the line where there is one.
        path: String,
        /// Expected, found, how to mend it.
        what: String,
    },
    /// The tokenizer is at fault.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Weights do not fit the model that the recipe asks for. One line each.
    #[error("the weights in {path} do not fit the model that is asked for:\n  {}", .mismatches.join("\n  "))]
    Mismatch {
        /// Where the weights come from.
        path: PathBuf,
        /// Every mismatch.
        mismatches: Vec<String>,
    },
    /// A run folder is not in the state that the command needs.
    #[error("run {name}: {what}")]
    Run {
        /// The run's name.
        name: String,
        /// Expected, found, how to mend it.
        what: String,
    },
    /// Something on the command line, or an input that it names, is at fault.
    #[error("{0}")]
    Usage(String),
    /// Too many steps in a row were skipped.
    #[error(
        "step {step}: {skips} steps in a row had non-finite gradients (train.skip_max = {skip_max}); parameters are as \
         after step {good}; lower schedule.learning_rate, or look at the data"
    )]
    NotFinite {
        /// The step at which the run gave up.
        step: u64,
        /// How many in a row.
        skips: u64,
        /// The limit.
        skip_max: u64,
        /// The last step that was applied.
        good: u64,
    },
    /// A gradient did not add up.
    #[error(transparent)]
    Stream(#[from] parallel::data::StreamError),
    /// The replicas are not equal.
    #[error(
        "after step {step} the parameters of rank {rank} are not those of rank {other}: BLAKE3 {} and {}; do all ranks \
         run the same build on the same kind of device? go on with --resume from the checkpoint before", .hashes[1], .hashes[0]
    )]
    Replicas {
        /// The step after which they differ.
        step: u64,
        /// The first rank that differs.
        rank: usize,
        /// The rank that it differs from, which is to hold the same.
        other: usize,
        /// Of that one and of the first.
        hashes: [String; 2],
    },
    /// The coordinator.
    #[error(transparent)]
    Control(#[from] parallel::control::ControlError),
    /// The connections to the other ranks.
    #[error(transparent)]
    Transport(#[from] parallel::transport::grpc::TransportError),
    /// The ranks could not bring each other what they need to start.
    #[error(transparent)]
    Collective(#[from] parallel::collective::CollectiveError),
    /// A run over several processes came to its end, and the coordinator said why.
    #[error("{0}")]
    Verdict(String, u8),
    /// A checkpoint or an export.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor could not be read back from the device.
    #[error("step {step}: {what}")]
    Device {
        /// The step.
        step: u64,
        /// What the backend said.
        what: String,
    },
}

/// What a person can do about an error of the system, where that is plain.
fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => ": check the path",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": make room, then go on with --resume",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ": name a place that can be written",
        _ => "",
    }
}

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The exit code of a process that ends with this error: 2 for bad usage or a bad recipe, else 1.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        use parallel::control::ControlError;
        match self {
            Self::Recipe(_) | Self::Usage(_) | Self::Mismatch { .. } | Self::Run { .. } => 2,
            Self::Control(ControlError::Refused { .. } | ControlError::Mismatch { .. }) => 2,
            Self::Control(ControlError::NotThere { .. }) | Self::Transport(_) => TRY_AGAIN,
            Self::Checkpoint(CheckpointError::Store { again: true, .. }) => TRY_AGAIN,
            Self::Control(ControlError::Ended(ending)) => ending.code,
            Self::Verdict(_, code) => *code,
            _ => 1,
        }
    }

    /// Whether it is about what ranks are to each other, so that where all of them are belongs to it.
    #[must_use]
    pub const fn is_between_ranks(&self) -> bool {
        use parallel::collective::CollectiveError;
        use parallel::data::StreamError;
        use parallel::data::engine::EngineError;
        match self {
            Self::Collective(error) => !matches!(error, CollectiveError::Call { .. }),
            Self::Stream(StreamError::Engine(error)) => !matches!(error, EngineError::Gone),
            other => matches!(other, Self::Replicas { .. }),
        }
    }
}
