//! What has to be known of a whole target before any of its rows can be computed.

use std::{collections::BTreeMap, ops::Range};

use super::norms::{ReadRows, column_factors};
use crate::{
    checkpoint::Context,
    merge::{
        MergeError,
        plan::{Does, Target},
    },
};

/// Rows of a sparse target that are read at once.
const RUN: u64 = 1 << 16;

/// A target whose rows can be computed, in any order.
pub(in crate::merge) struct Prepared<'t> {
    pub(in crate::merge) target: &'t Target<'t>,
    /// By the term's index: what brings the columns to their magnitudes.
    factors: BTreeMap<usize, Vec<f32>>,
    /// By the term's index: sparse deltas whose rows are the tensor's columns.
    scattered: BTreeMap<usize, Scattered>,
}

/// Deltas by their place in the tensor.
pub(in crate::merge) struct Scattered(Vec<(u64, f32)>);

impl Scattered {
    /// Those in a run of elements, ascending.
    pub(super) fn of(&self, elements: Range<u64>) -> impl Iterator<Item = (u64, f32)> {
        let first = self.0.partition_point(|(flat, _)| *flat < elements.start);
        self.0[first..].iter().copied().take_while(move |(flat, _)| *flat < elements.end)
    }
}

impl<'t> Prepared<'t> {
    /// Reads what is needed: for magnitudes of columns all rows of the originals, once; sparse deltas on a tensor that is stored the other
    /// way round, 16 bytes each.
    ///
    /// # Errors
    /// A failure to read, a norm that is zero or no number.
    pub(in crate::merge) fn new(
        ctx: &Context<'_>,
        target: &'t Target<'t>,
        originals: &ReadRows<'_>,
    ) -> Result<Self, MergeError> {
        let (mut factors, mut scattered) = (BTreeMap::new(), BTreeMap::new());
        for (index, term) in target.terms.iter().enumerate() {
            match &term.does {
                Does::LowRank(product) => {
                    if let Some(magnitude) = product.magnitude.as_ref().filter(|magnitude| magnitude.of_columns) {
                        factors.insert(index, column_factors(ctx, target, (product, magnitude), originals)?);
                    }
                }
                Does::Sparse { adapter, target: sparse } if sparse.transposed => {
                    let mut deltas = Vec::with_capacity(sparse.nnz as usize);
                    for rows in adapter.row_ranges(ctx, sparse, RUN)? {
                        let read = adapter.read_rows(ctx, sparse, rows.clone())?;
                        for row in 0..read.columns.n_rows() {
                            let place = |column: u32| sparse.layout.flat(rows.start + row as u64, u64::from(column));
                            let values = &read.values[read.columns.row_range(row)];
                            let own = read.columns.row(row).iter().zip(values);
                            deltas.extend(own.map(|(&column, &delta)| (place(column), delta)));
                        }
                    }
                    deltas.sort_unstable_by_key(|(flat, _)| *flat);
                    scattered.insert(index, Scattered(deltas));
                }
                _ => {}
            }
        }
        Ok(Self { target, factors, scattered })
    }

    pub(super) fn column_factors(&self, term: usize) -> &[f32] {
        self.factors.get(&term).expect("norms of columns are taken before")
    }
    pub(super) fn scattered(&self, term: usize) -> Option<&Scattered> {
        self.scattered.get(&term)
    }
}
