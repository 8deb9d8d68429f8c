//! Policy: which weights of a checkpoint take part.
//!
//! A mask lists chosen columns for each row of each target tensor, and the recipe that chose them. What masks and adapters have
//! in common on disk (columns, row offsets, the JSON document) is read and written here, a run of rows at a time.

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
