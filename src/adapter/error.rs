//! What can go wrong with adapters, each error naming the file.

use std::path::PathBuf;

use crate::{
    checkpoint::{CheckpointError, ErrorKind, Printable},
    mask::MaskError,
};

/// What can go wrong while reading, writing or starting an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file could not be read or written, or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The columns or the document are not what they should be.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The mask was made from another base.
    #[error("{}: tensor \"{}\": {what}", Printable::path(.path), Printable(.tensor))]
    WrongBase {
        /// The mask.
        path: PathBuf,
        /// The first tensor whose values differ.
        tensor: String,
        /// Both bases.
        what: String,
    },
    /// An adapter's id is 64 hexadecimal digits.
    #[error("\"{}\" is no adapter's id: 64 hexadecimal digits are", Printable(.0))]
    MalformedId(String),
}

impl AdapterError {
    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::WrongBase { .. } => ErrorKind::Refused,
            Self::MalformedId(_) => ErrorKind::Usage,
        }
    }
}
