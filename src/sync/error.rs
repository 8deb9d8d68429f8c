//! What can go wrong while exporting and applying deltas.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
};

/// What can go wrong while exporting and applying deltas; nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tensors that the base does not have as the input needs them.
    #[error("{}: {} of {n_targets} tensors do not match the base {}:{}", Printable::path(.path), .problems.len(), Printable(.base), indented_list(.problems))]
    Unmatched {
        /// The input.
        path: PathBuf,
        /// The base's name.
        base: String,
        /// Tensors of the input.
        n_targets: usize,
        /// One line for each that does not match.
        problems: Vec<String>,
    },
    /// There is no delta, it has no room for a tensor, or it was made for other bytes.
    #[error("{}: {what}{}", Printable::path(.path), indented_list(.problems))]
    Unfit {
        /// The input.
        path: PathBuf,
        /// Why.
        what: String,
        /// One line for each tensor, where there are several.
        problems: Vec<String>,
    },
}

impl Failure for SyncError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(error) => error.kind(),
            Self::Unmatched { .. } | Self::Unfit { .. } => ErrorKind::Refused,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(error) => Some(error),
            Self::Unmatched { .. } | Self::Unfit { .. } => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Unmatched { path, .. } | Self::Unfit { path, .. } => Some(path),
            Self::Checkpoint(error) => error.file(),
        }
    }
}
