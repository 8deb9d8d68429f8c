//! Errors of choosing connections and reading masks.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
};

/// Errors of choosing connections and reading masks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// A file could not be read or written, or is invalid.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A NaN cannot be ranked.
    #[error(
        "{}: tensor \"{}\": row {row}, column {column}: the {what} is not a number",
        Printable::path(.path),
        Printable(.tensor)
    )]
    NotANumber {
        /// The file.
        path: PathBuf,
        /// The tensor's name as stored.
        tensor: String,
        /// The first row with a NaN (a stored column if the tensor is transposed).
        row: u64,
        /// The first column with a NaN in that row.
        column: u64,
        /// `weight`, `gradient` or `score`.
        what: &'static str,
    },
    /// Target patterns that match no tensor of the model.
    #[error("{}: no tensor that can be masked matches {}; the model has:{}", Printable::path(.path), quoted(.patterns), indented_list(.kinds))]
    NoMatch {
        /// The checkpoint.
        path: PathBuf,
        /// The patterns.
        patterns: Vec<String>,
        /// The tensors of the model, one line per kind.
        kinds: Vec<String>,
    },
    /// The file is of another kind than expected.
    #[error("{}: this is {found}; expected {expected}", Printable::path(.path))]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// The kind of the file.
        found: String,
        /// The expected kind.
        expected: &'static str,
    },
    /// The file's format is newer than this program.
    #[error("{}: its format is version {version}, at most {known} is supported: was it made by a newer neuroada-ckpt?", Printable::path(.path))]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
        /// The newest version that this program supports.
        known: u64,
    },
    /// Parts that do not form a whole mask.
    #[error("{}: {what}", Printable::path(.path))]
    Parts {
        /// The part that does not match.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// The GPU failed.
    #[error(transparent)]
    Gpu(#[from] crate::backend::AcceleratorError),
    /// The orientation of a weight is unknown.
    #[error(
        "{}: tensor \"{}\": neither its shape nor the model's type tells whether it is stored as [d_out, d_in] or as [d_in, d_out]",
        Printable::path(.path),
        Printable(.tensor)
    )]
    Axes {
        /// The shard that holds it.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its kind.
        kind: String,
    },
    /// An invalid request, whatever the files contain.
    #[error("{0}")]
    Usage(String),
}

impl Failure for MaskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(error) => error.kind(),
            Self::NotANumber { .. } | Self::WrongKind { .. } | Self::NewerVersion { .. } => ErrorKind::BadInput,
            Self::Gpu(_) => ErrorKind::Io,
            Self::Parts { .. } | Self::Axes { .. } => ErrorKind::Refused,
            Self::NoMatch { .. } | Self::Usage(_) => ErrorKind::Usage,
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
            Self::NotANumber { path, .. }
            | Self::NoMatch { path, .. }
            | Self::WrongKind { path, .. }
            | Self::NewerVersion { path, .. }
            | Self::Parts { path, .. }
            | Self::Axes { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Gpu(_) => Some("--device cpu does the same without the GPU".to_owned()),
            _ => self.inner()?.hint(),
        }
    }
}

/// Names in double quotes, separated by commas.
fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("\"{}\"", Printable(name))).collect::<Vec<_>>().join(", ")
}
