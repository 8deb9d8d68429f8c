//! What can go wrong while extracting.

use std::path::{Path, PathBuf};

use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    mask::MaskError,
};

/// What can go wrong while extracting; nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The targets cannot be selected.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The adapter could not be written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The two have not the same tensors, of the same types and shapes.
    #[error("{}: no adapter can make it from {}:{}", Printable::path(.tuned), Printable(.base), indented_list(.problems))]
    Unlike {
        /// The tuned checkpoint.
        tuned: PathBuf,
        /// The base's name.
        base: String,
        /// One line for each tensor.
        problems: Vec<String>,
    },
    /// Tensors that changed in a way that the adapter asked for cannot hold.
    #[error("{}: what changed from {} does not fit the adapter:{}", Printable::path(.tuned), Printable(.base), indented_list(.problems))]
    Unfit {
        /// The tuned checkpoint.
        tuned: PathBuf,
        /// The base's name.
        base: String,
        /// One line for each tensor.
        problems: Vec<String>,
        /// Why, for each of them.
        reasons: Vec<UnfitReason>,
    },
    /// Nothing changed.
    #[error("{}: {what} the same in {}: there is no delta", Printable::path(.tuned), Printable(.base))]
    Same {
        /// The tuned checkpoint.
        tuned: PathBuf,
        /// The base's name.
        base: String,
        /// What was compared.
        what: &'static str,
    },
    /// A request that makes no sense, whatever the files hold.
    #[error("{0}")]
    Usage(String),
}

/// Why an adapter cannot hold what changed in a tensor.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum UnfitReason {
    /// It has no rows of floats.
    NoFloats,
    /// Changed elements are NaN or infinite.
    NotFinite,
    /// More than the highest density would get a delta: this share, of 1.
    TooDense(f64),
    /// No delta of the type gives some of its elements exactly.
    Inexact,
}

impl Failure for ExtractError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
            Self::Unlike { .. } | Self::Unfit { .. } | Self::Same { .. } => ErrorKind::Refused,
            Self::Usage(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Mask(e) => Some(e),
            Self::Adapter(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Unlike { tuned, .. } | Self::Unfit { tuned, .. } | Self::Same { tuned, .. } => Some(tuned),
            _ => self.inner()?.file(),
        }
    }
}
