//! What has to be known of a whole target before any of its rows can be computed.

use std::{collections::BTreeMap, ops::Range};

use crate::merge::{MergeError, plan::MergeTarget};

/// Reads the originals of a run of a target's rows.
pub(in crate::merge) type ReadRows<'r> = dyn Fn(&Range<u64>) -> Result<Vec<u8>, MergeError> + Sync + 'r;

/// A target whose rows can be computed, in any order.
pub(in crate::merge) struct Prepared<'t> {
    pub(in crate::merge) target: &'t MergeTarget<'t>,
    /// By the term's index: what brings the columns to their magnitudes.
    pub(super) factors: BTreeMap<usize, Vec<f32>>,
    /// By the term's index: sparse deltas whose rows are the tensor's columns.
    pub(super) scattered: BTreeMap<usize, Scattered>,
}

/// Deltas by their place in the tensor.
pub(in crate::merge) struct Scattered(pub(super) Vec<(u64, f32)>);

impl Scattered {
    /// Those in a run of elements, ascending.
    pub(super) fn of(&self, elements: Range<u64>) -> impl Iterator<Item = (u64, f32)> {
        let first = self.0.partition_point(|(flat, _)| *flat < elements.start);
        self.0[first..].iter().copied().take_while(move |(flat, _)| *flat < elements.end)
    }
}

impl Prepared<'_> {
    pub(super) fn column_factors(&self, term: usize) -> &[f32] {
        self.factors.get(&term).expect("norms of columns are taken before")
    }
    pub(super) fn scattered(&self, term: usize) -> Option<&Scattered> {
        self.scattered.get(&term)
    }
}
