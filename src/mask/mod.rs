//! Masks: the weights of a checkpoint that take part.
//!
//! A mask lists the chosen columns of each row of each target tensor, with the recipe that chose them. [`create_mask`]
//! selects targets by pattern, ranks their weights by a score and chooses within rows, tensors or the whole model. The
//! on-disk structures that masks and adapters share (columns, row offsets, the JSON document) are read and written
//! here, one run of rows at a time.

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
