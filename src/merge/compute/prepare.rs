//! Reading what has to be known of a whole target.

use std::collections::BTreeMap;

use super::{
    norms::column_factors,
    prepared::{Prepared, ReadRows, Scattered},
};
use crate::{
    checkpoint::Context,
    merge::{
        MergeError,
        plan::{Does, MergeTarget},
    },
};

/// Rows of a sparse target that are read at once.
const RUN: u64 = 1 << 16;

/// Reads what is needed: for magnitudes of columns all rows of the originals, once; sparse deltas on a tensor that is stored the other
/// way round, 16 bytes each.
///
/// # Errors
/// A failure to read, a norm that is zero or no number.
pub(in crate::merge) fn prepare<'t>(
    ctx: &Context<'_>,
    target: &'t MergeTarget<'t>,
    originals: &ReadRows<'_>,
) -> Result<Prepared<'t>, MergeError> {
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
    Ok(Prepared { target, factors, scattered })
}
