//! Norms of columns, for magnitudes of weights that are stored the other way round: known only when all rows were seen.

use super::{
    prepared::ReadRows,
    rows::{Block, HASH_ROWS, factor_of, merge_cost, row_blocks},
};
use crate::{
    checkpoint::{Context, for_each_ordered, window_cost},
    merge::{
        MergeError,
        factors::read_f32,
        plan::{Magnitude, MergeTarget, Product},
    },
    tensor::with_float,
};

/// What brings the columns of a target to the magnitudes of one of its products, `[n_columns]`.
///
/// Reads the originals once. Squares are summed in float64, over groups of 16 rows and then over the groups, both ascending. Memory:
/// the factors, and a few blocks per thread.
pub(super) fn column_factors(
    ctx: &Context<'_>,
    target: &MergeTarget<'_>,
    (product, magnitude): (&Product<'_>, &Magnitude<'_>),
    originals: &ReadRows<'_>,
) -> Result<Vec<f32>, MergeError> {
    let n_columns = target.n_columns as usize;
    let mut squares = vec![0.0f64; n_columns];
    for_each_ordered(
        ctx,
        row_blocks(ctx, target.n_rows, target.n_columns),
        |rows| {
            let n_rows = rows.end - rows.start;
            let sums = n_rows.div_ceil(HASH_ROWS) * target.n_columns * 8;
            2 * window_cost(n_rows * target.row_bytes()) + merge_cost(ctx, target, rows) + sums
        },
        |rows| {
            let bytes = originals(rows)?;
            with_float!(target.tensor.info.dtype, T => {
                let mut block = Block::<T>::new(target, rows.clone(), &bytes);
                block.add_product(ctx, product, rows)?;
                let n_rows = (rows.end - rows.start) as usize;
                let mut groups = Vec::new();
                for first in (0..n_rows).step_by(HASH_ROWS as usize) {
                    let mut sums = vec![0.0f64; n_columns];
                    block.add_squares(first..n_rows.min(first + HASH_ROWS as usize), &mut sums);
                    groups.push(sums);
                }
                Ok(groups)
            }, else unreachable!("targets are floats"))
        },
        |_, groups| {
            for group in groups {
                squares.iter_mut().zip(group).for_each(|(sum, part)| *sum += part);
            }
            Ok::<_, MergeError>(())
        },
    )?;
    let magnitudes = read_f32(magnitude.shard, magnitude.info, magnitude.start..magnitude.start + target.n_columns)?;
    let factor = |(column, (&m, &sum)): (usize, (&f32, &f64))| factor_of(m, sum, || format!("column {column}"), target);
    magnitudes.iter().zip(&squares).enumerate().map(factor).collect()
}
