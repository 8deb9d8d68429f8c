//! Norms of columns, for magnitudes of weights that are stored the other way round: known only when all rows were seen.

use super::{
    compute::{Block, GROUP_ROWS, factor_of, merge_cost, row_blocks},
    factors::read_f32,
    plan::{Magnitude, Plan, Product, Step, Target},
};
use crate::{
    checkpoint::{Checkpoint, Context, for_each_ordered, window_cost},
    merge::MergeError,
    tensor::with_float,
};

/// For each target of a plan, what brings its columns to their magnitudes, where it has magnitudes of columns.
///
/// Reads those tensors once, from `originals`. Squares are summed in float64, over groups of 16 rows and then over the groups,
/// both ascending. Memory: the factors, and a few blocks per thread.
pub(super) fn column_factors(
    ctx: &Context<'_>,
    originals: &Checkpoint,
    plan: &Plan<'_>,
) -> Result<Vec<Option<Vec<f32>>>, MergeError> {
    plan.targets.iter().map(|target| factors_of(ctx, originals, target)).collect()
}

fn factors_of(ctx: &Context<'_>, originals: &Checkpoint, target: &Target<'_>) -> Result<Option<Vec<f32>>, MergeError> {
    let Some((product, magnitude)) = target.steps.iter().find_map(of_columns) else { return Ok(None) };
    let tensor = originals.tensor(target.name()).expect("the originals have the plan's tensors");
    let n_columns = target.n_columns as usize;
    let mut squares = vec![0.0f64; n_columns];
    for_each_ordered(
        ctx,
        row_blocks(ctx, target.n_rows, target.n_columns),
        |rows| {
            let n_rows = rows.end - rows.start;
            let sums = n_rows.div_ceil(GROUP_ROWS) * target.n_columns * 8;
            window_cost(n_rows * target.row_bytes()) + merge_cost(ctx, target, rows) + sums
        },
        |rows| {
            let bytes = tensor.window(ctx, rows.start * target.row_bytes()..rows.end * target.row_bytes())?;
            let groups = with_float!(tensor.info.dtype, T => {
                let mut block = Block::<T>::new(ctx, target, rows.clone(), &bytes)?;
                block.add_product(ctx, &product, rows)?;
                let n_rows = (rows.end - rows.start) as usize;
                let mut groups = Vec::new();
                for first in (0..n_rows).step_by(GROUP_ROWS as usize) {
                    let mut sums = vec![0.0f64; n_columns];
                    block.add_squares(first..n_rows.min(first + GROUP_ROWS as usize), &mut sums);
                    groups.push(sums);
                }
                groups
            }, else unreachable!("targets are floats"));
            tensor.shard.confirm(&bytes)?;
            Ok(groups)
        },
        |_, groups| {
            for group in groups {
                squares.iter_mut().zip(group).for_each(|(sum, part)| *sum += part);
            }
            Ok::<_, MergeError>(())
        },
    )?;
    let magnitudes = read_f32(magnitude.shard, magnitude.info, 0..target.n_columns)?;
    let factor = |(column, (&m, &sum)): (usize, (&f32, &f64))| factor_of(m, sum, || format!("column {column}"), target);
    Ok(Some(magnitudes.iter().zip(&squares).enumerate().map(factor).collect::<Result<_, _>>()?))
}

/// A step's product and its magnitudes, where those are of columns.
fn of_columns<'a>(step: &Step<'a>) -> Option<(Product<'a>, Magnitude<'a>)> {
    let Step::LowRank(product) = step else { return None };
    Some((*product, product.magnitude.filter(|magnitude| magnitude.of_columns)?))
}
