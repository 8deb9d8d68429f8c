//! Errors on the way from a file of rows to token ids.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    checkpoint::{CheckpointError, Printable},
    error::{ErrorKind, Failure},
};

/// The position of a row in its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowLocation {
    /// JSON lines: the line number, from 1.
    Line(u64),
    /// A JSON array: the index, from 0 as in `jq`, and the line on which the element begins, from 1.
    Element(u64, u64),
}

impl fmt::Display for RowLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Element(index, line) => write!(f, "row [{index}] (line {line})"),
        }
    }
}

/// Errors of reading data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be read, or is invalid.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An invalid row.
    #[error("{}: {place}: {what}", Printable::path(.path))]
    BadRow {
        /// The file.
        path: PathBuf,
        /// The position of the row.
        place: RowLocation,
        /// The field, and what is wrong with it.
        what: String,
    },
    /// No usable rows.
    #[error("{}: {what}", Printable::path(.path))]
    Empty {
        /// The file.
        path: PathBuf,
        /// Why there are none.
        what: String,
    },
    /// An invalid request, whatever the files contain.
    #[error("{0}")]
    Usage(String),
}

impl Failure for DataError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::BadRow { .. } | Self::Empty { .. } => ErrorKind::BadInput,
            Self::Usage(_) => ErrorKind::Usage,
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
            Self::BadRow { path, .. } | Self::Empty { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }
}

/// Why a row could not be processed.
pub(super) enum Failed {
    /// The row is invalid.
    Row(String),
    /// Another error, or the user stopped the command.
    Other(DataError),
}

impl Failed {
    /// The error of a row of a file.
    pub(super) fn at(self, path: &Path, place: RowLocation) -> DataError {
        match self {
            Self::Row(what) => DataError::BadRow { path: path.to_owned(), place, what },
            Self::Other(error) => error,
        }
    }
}

impl From<String> for Failed {
    fn from(what: String) -> Self {
        Self::Row(what)
    }
}

impl From<DataError> for Failed {
    fn from(error: DataError) -> Self {
        Self::Other(error)
    }
}

impl From<CheckpointError> for Failed {
    fn from(error: CheckpointError) -> Self {
        Self::Other(error.into())
    }
}
