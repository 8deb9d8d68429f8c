//! What can go wrong with PEFT adapters, each error naming the file.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{CheckpointError, Printable},
    error::{ErrorKind, Failure},
};

/// What can go wrong while reading a PEFT adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeftError {
    /// A file could not be read, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A key of the config has a value that it cannot have.
    #[error("{}: `{key}`: {what}", Printable::path(.path))]
    Config {
        /// The config file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, found and expected.
        what: String,
    },
    /// The adapter is fine, but of a form that this program does not implement.
    #[error("{}: {what}", Printable::path(.path))]
    Unsupported {
        /// The config file or the adapter's tensors.
        path: PathBuf,
        /// The form, by name.
        what: String,
    },
}

impl PeftError {
    /// A value that a key cannot have.
    pub(super) fn config(path: &Path, key: &str, what: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), key: Printable(key).to_string(), what: what.into() }
    }
    /// A form that is not implemented.
    pub(super) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into() }
    }
}

impl Failure for PeftError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Config { .. } => ErrorKind::BadInput,
            Self::Unsupported { .. } => ErrorKind::Refused,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Config { path, .. } | Self::Unsupported { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }
}
