//! What can go wrong while comparing.

use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, ErrorKind},
    mask::MaskError,
};

/// What can go wrong while comparing; files that differ are a report.
#[derive(Debug, thiserror::Error)]
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

impl DiffError {
    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
        }
    }
}
