//! The sparse delta between two checkpoints, out of core.
//!
//! [`extract`] walks a base and its tuned copy together, a run of rows at a time, twice: first it finds out what changed, what
//! a delta can carry and in which type, and refuses all that it must before anything is written; then it writes the
//! adapter. By default the adapter is exact: every merged value is computed and compared with the tuned bits, so that merging gives
//! the tuned checkpoint back byte for byte. With a `k` it holds the largest changes of each row, and the report says how
//! much of the change they are.

mod delta;
mod error;
mod pairs;
mod report;
mod rows;
mod run;

pub use error::{ExtractError, UnfitReason};
pub use report::{ExtractKind, ExtractReport, ExtractedTensor, LeftOut};
pub use run::{ExtractOptions, extract};
