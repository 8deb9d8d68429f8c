//! What differs between two adapters, two masks or two checkpoints, and how much.
//!
//! Everything is read once, a run of rows or a window of bytes at a time. Sums are taken in float64 over pieces of a fixed
//! size and added up in their order, so a report is the same for any thread count, window size and machine.

mod adapters;
mod checkpoints;
mod error;
mod norms;

pub use adapters::{AdapterDiff, AdapterTensorDiff, Overlap, diff_adapters, diff_masks};
pub use checkpoints::{ChangedTensor, CheckpointDiff, RetypedTensor, diff_checkpoints};
pub use error::DiffError;
