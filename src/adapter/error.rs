//! What can go wrong with adapters, each error naming the file.

use std::path::{Path, PathBuf};

use crate::{
    checkpoint::{Checkpoint, CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    mask::{BaseInfo, MaskError},
};

/// What can go wrong while reading, writing or starting an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The columns or the document are not what they should be.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The mask or adapter was made from another base.
    #[error("{}: tensor \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    WrongBase {
        /// The mask or adapter.
        path: PathBuf,
        /// The first tensor whose values differ.
        tensor: String,
        /// Both bases.
        what: String,
    },
    /// A packed adapter without its columns, and no base to choose them from.
    #[error("{}: its columns are derived from its base, which is not given", Printable::path(.path))]
    NeedsBase {
        /// The packed adapter.
        path: PathBuf,
    },
    /// Columns that cannot be left out.
    #[error("{}: its columns cannot be derived from a base: {what}", Printable::path(.path))]
    NotDerived {
        /// The adapter.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// Tensors that the base does not have as a foreign adapter needs them.
    #[error("{}: {} of {n_targets} tensors do not match the base {}:{}", Printable::path(.path), .problems.len(), Printable(.base), indented_list(.problems))]
    Unmatched {
        /// The foreign adapter.
        path: PathBuf,
        /// The base's name.
        base: String,
        /// Tensors of the foreign adapter.
        n_targets: usize,
        /// One line for each that does not match.
        problems: Vec<String>,
    },
    /// An adapter's id is 64 hexadecimal digits.
    #[error("\"{}\" is no adapter's id: 64 hexadecimal digits are", Printable(.0))]
    MalformedId(String),
}

impl AdapterError {
    /// This failure to read an adapter back, met after it was written at `path`.
    pub(crate) fn after_commit(self, path: &Path) -> Self {
        match self {
            Self::Checkpoint(e) => e.after_commit(path, "read back").into(),
            other => other,
        }
    }

    /// The base is another than the one `path` was made from; `subject` is what the file is to the reader ("it", "the mask"),
    /// `tensor` the first that differs.
    pub(crate) fn other_base(
        subject: &str,
        path: &Path,
        tensor: &str,
        made_from: &BaseInfo,
        base: &Checkpoint,
    ) -> Self {
        let (made_from, found) = (Printable(&made_from.name), base.name());
        Self::WrongBase {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            what: format!(
                "{subject} was made from {made_from}, {} has other values at its positions",
                Printable(&found)
            ),
        }
    }
}

impl Failure for AdapterError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::WrongBase { .. } | Self::NotDerived { .. } | Self::Unmatched { .. } => ErrorKind::Refused,
            Self::NeedsBase { .. } | Self::MalformedId(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Mask(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::WrongBase { path, .. }
            | Self::NeedsBase { path }
            | Self::NotDerived { path, .. }
            | Self::Unmatched { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::NeedsBase { .. } => Some("--base BASE derives them".to_owned()),
            _ => self.inner()?.hint(),
        }
    }
}
