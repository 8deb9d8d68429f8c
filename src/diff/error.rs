//! What can go wrong while comparing.

use crate::{
    adapter::AdapterError,
    checkpoint::CheckpointError,
    error::{ErrorKind, Failure},
    mask::MaskError,
};

/// What can go wrong while comparing; files that differ are a report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// A file could not be read, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A mask could not be read.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// An adapter could not be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

impl Failure for DiffError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Mask(e) => Some(e),
            Self::Adapter(e) => Some(e),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            // Their advice is about outputs and `--targets`, which a comparison does not have.
            Self::Checkpoint(_) | Self::Mask(_) => None,
            Self::Adapter(e) => e.hint(),
        }
    }
}
