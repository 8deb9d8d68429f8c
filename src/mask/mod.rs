//! Policy: which weights of a checkpoint take part.

mod document;
mod error;
mod file;
#[cfg(test)]
pub(crate) mod samples;
mod sparse;
mod sparse_writer;

pub use document::{BaseInfo, FileKind, Recipe};
pub use error::MaskError;
pub use file::{MaskFile, MaskWriter};
pub use sparse::TargetInfo;

pub(crate) use document::{FORMAT_VERSION, TargetEntries, parse_document};
pub(crate) use sparse::{Part, SparseFile};
pub(crate) use sparse_writer::SparseWriter;
