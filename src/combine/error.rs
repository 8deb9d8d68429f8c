//! What can go wrong while combining.

use std::path::{Path, PathBuf};

use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, Printable},
    error::{ErrorKind, Failure},
};

/// What can go wrong while combining adapters; nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CombineError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter could not be read or written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Two adapters were made from different bases.
    #[error("{}: tensor \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    OtherBase {
        /// One of the adapters.
        path: PathBuf,
        /// The first tensor that differs.
        tensor: String,
        /// How.
        what: String,
    },
    /// The adapters have different positions, and no base is given.
    #[error(
        "{}: tensor \"{}\": the adapters change different weights: whether they are of one base cannot be told without it",
        Printable::path(.path),
        Printable(.tensor)
    )]
    NeedsBase {
        /// One of the adapters.
        path: PathBuf,
        /// The first tensor whose positions differ.
        tensor: String,
    },
    /// A request that makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl Failure for CombineError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
            Self::OtherBase { .. } => ErrorKind::Refused,
            Self::NeedsBase { .. } | Self::Usage(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Adapter(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::OtherBase { path, .. } | Self::NeedsBase { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NeedsBase { .. } => Some("--base BASE proves every adapter against it".to_owned()),
            _ => self.inner()?.hint(),
        }
    }
}
