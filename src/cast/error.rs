//! What can go wrong while casting.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{CheckpointError, Printable},
    error::{ErrorKind, Failure},
    tensor::{Dtype, dtype_name},
};

/// What can go wrong while casting; nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CastError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A finite number would become infinite.
    #[error(
        "{}: \"{}\", row {row}, column {column}: {value:e} is too large for {}",
        Printable::path(.path),
        Printable(.tensor),
        dtype_name(*.dtype)
    )]
    Overflow {
        /// The checkpoint.
        path: PathBuf,
        /// The weight.
        tensor: String,
        /// The first of its rows with such a number, all dimensions but the last counted as rows.
        row: u64,
        /// The column.
        column: u64,
        /// The number.
        value: f64,
        /// The new type.
        dtype: Dtype,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl Failure for CastError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(error) => error.kind(),
            Self::Overflow { .. } => ErrorKind::Refused,
            Self::Usage(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(error) => Some(error),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Overflow { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Overflow { .. } => Some("bf16 has the range of float32; --allow-overflow writes infinity".to_owned()),
            _ => self.inner()?.hint(),
        }
    }
}
