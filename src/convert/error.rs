//! What can go wrong while converting.

use std::path::{Path, PathBuf};

use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    foreign::PeftError,
    mask::MaskError,
};

/// What can go wrong while converting; nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Columns could not be read.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// An adapter could not be read or written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// What another tool wrote is not what it should be.
    #[error(transparent)]
    Peft(PeftError),
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
    /// The format asked for cannot hold what the input has.
    #[error("{}: {what}{}", Printable::path(.path), indented_list(.problems))]
    Unfit {
        /// The input.
        path: PathBuf,
        /// Which format, and why.
        what: String,
        /// One line for each tensor, where it is about tensors.
        problems: Vec<String>,
    },
    /// Targets that PEFT's sparse methods do not take: they know `nn.Linear` alone.
    #[error("{}: PEFT's {format} takes the weights of nn.Linear modules only:{}", Printable::path(.path), indented_list(.problems))]
    NotLinear {
        /// The input.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// One line for each target.
        problems: Vec<String>,
        /// Whether the base would tell of some of them what they are.
        needs_base: bool,
    },
    /// Foreign formats do not know their base.
    #[error("{}: an adapter in the format {format} does not know its base", Printable::path(.path))]
    NoBase {
        /// The input.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// A request that makes no sense, whatever the files hold.
    #[error("{0}")]
    Usage(String),
}

impl Failure for ConvertError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
            Self::Peft(e) => e.kind(),
            Self::Unmatched { .. } | Self::Unfit { .. } | Self::NotLinear { .. } => ErrorKind::Refused,
            Self::NoBase { .. } | Self::Usage(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Mask(e) => Some(e),
            Self::Adapter(e) => Some(e),
            Self::Peft(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Unmatched { path, .. }
            | Self::Unfit { path, .. }
            | Self::NotLinear { path, .. }
            | Self::NoBase { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }
}

impl From<PeftError> for ConvertError {
    fn from(error: PeftError) -> Self {
        match error {
            PeftError::Checkpoint(error) => error.into(),
            other => Self::Peft(other),
        }
    }
}
