//! What adapters do to a stored tensor, as a ledger records it.

use serde::{Deserialize, Serialize};

/// What one adapter, by its place among the ledger's active ones, does to a tensor.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RecordedTerm(pub(in crate::merge) usize, pub(in crate::merge) RecordedChange);

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::merge) enum RecordedChange {
    /// The adapter's target of this name.
    Sparse(String),
    LowRank(RecordedProduct),
    Bias(RecordedBias),
    /// The adapter's tensor of this name.
    Full(String),
    Rows(RecordedRows),
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::merge) struct RecordedRows {
    pub(in crate::merge) tensor: String,
    /// Which row of the stored tensor each is for, and which of the adapter's it is.
    pub(in crate::merge) places: Vec<(u64, u64)>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::merge) struct RecordedBias {
    pub(in crate::merge) tensor: String,
    pub(in crate::merge) scale: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::merge) struct RecordedProduct {
    /// The first row of the stored tensor, and how many.
    pub(in crate::merge) rows: [u64; 2],
    /// First, step and number of the stored tensor's columns; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::merge) columns: Option<[u64; 3]>,
    pub(in crate::merge) rank: u64,
    pub(in crate::merge) scale: f64,
    pub(in crate::merge) u: RecordedMatrix,
    pub(in crate::merge) v: RecordedMatrix,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::merge) magnitude: Option<RecordedMagnitude>,
}

/// A tensor of the adapter; the element of row 0 and column 0, and the strides of rows and columns, in elements.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(in crate::merge) struct RecordedMatrix(
    pub(in crate::merge) String,
    pub(in crate::merge) u64,
    pub(in crate::merge) u64,
    pub(in crate::merge) u64,
);

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::merge) struct RecordedMagnitude {
    pub(in crate::merge) tensor: String,
    pub(in crate::merge) of_columns: bool,
    pub(in crate::merge) start: u64,
}
