//! Hot loops over rows, each with a plain form that stays as the judge of every faster one.
//!
//! Nothing here knows files or checkpoints: rows come in as [`crate::tensor::RowBlock`]s and columns, results go out as values.

mod patch;

pub use patch::{Layer, PatchCounts, merged_values, pick, union_columns};
