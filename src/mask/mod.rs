//! Policy: which weights of a checkpoint take part.
//!
//! A mask lists chosen columns for each row of each target tensor, and the recipe that chose them. [`create_mask`] selects the
//! targets by pattern, ranks their weights by a score and chooses within rows, tensors or the whole model. What masks and adapters have
//! in common on disk (columns, row offsets, the JSON document) is read and written here, a run of rows at a time.

mod create;
mod cut;
mod document;
mod error;
mod file;
mod join;
mod options;
mod partition;
#[cfg(test)]
pub(crate) mod samples;
mod source;
mod sparse;
mod sparse_writer;
mod targets;

pub use create::{MaskKind, MaskReport, create_mask};
pub use document::{BaseInfo, FileKind, Recipe};
pub use error::MaskError;
pub use file::{MaskFile, MaskWriter};
pub use join::{JoinReport, join_masks};
pub use options::{Amount, MaskOptions, Scope};
pub use partition::Partition;
pub use sparse::TargetInfo;
pub use targets::{LLAMA_PROJECTIONS, Selection, SkippedTensor, select_targets};

pub use crate::backend::ScoreKind;

pub(crate) use document::{TargetEntries, parse_document, parse_header};
pub(crate) use sparse::{POSITION_BYTES, Part, ROW_BYTES, SparseFile, check_targets};
pub(crate) use sparse_writer::SparseWriter;
pub(crate) use targets::{Read, select_rows};
