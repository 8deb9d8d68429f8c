//! How much the adapters of a plan can change their targets at most, known from the adapters alone: what decides whether a merge is
//! examined for overflow before it writes, and which deltas are compared with the originals.

use std::collections::BTreeMap;

use super::{
    compute::row_blocks,
    factors::read_f32,
    plan::{Plan, Product, Step, Target},
};
use crate::{
    backend::largest_finite,
    checkpoint::{CheckpointError, Context, for_each_ordered, window_cost},
    merge::{
        MergeError,
        plausible::{can_overflow, needs_originals},
    },
};

/// What is known of one target.
#[derive(Clone, Debug, Default)]
pub(super) struct Bound {
    /// By the index of a source: no delta that it adds to a weight has a larger magnitude.
    pub(super) by_source: BTreeMap<usize, f64>,
    /// Whether a finite weight may become infinite or NaN.
    pub(super) can_overflow: bool,
}

impl Bound {
    /// Whether the originals have to be measured before all deltas can be called plausible.
    pub(super) fn needs_originals(&self) -> bool {
        self.by_source.values().any(|&delta| needs_originals(delta))
    }

    fn raise(&mut self, source: usize, delta: f64) {
        let largest = self.by_source.entry(source).or_default();
        // A NaN stays.
        if !(delta <= *largest || largest.is_nan()) {
            *largest = delta;
        }
    }
}

/// The bounds of every target of a plan, in its order. Reads the adapters once. Memory: factors of about a window per thread.
pub(super) fn bounds(ctx: &Context<'_>, plan: &Plan<'_>) -> Result<Vec<Bound>, MergeError> {
    let mut bounds = Vec::with_capacity(plan.targets.len());
    for_each_ordered(
        ctx,
        &plan.targets,
        |_| 4 * window_cost(ctx.window_bytes()),
        |target| Ok(bound_of(ctx, target)?),
        |_, bound| {
            bounds.push(bound);
            Ok::<_, MergeError>(())
        },
    )?;
    Ok(bounds)
}

fn bound_of(ctx: &Context<'_>, target: &Target<'_>) -> Result<Bound, CheckpointError> {
    let dtype = target.tensor.info.dtype;
    let mut bound = Bound::default();
    // What a weight may become by being replaced or brought to a magnitude.
    let mut largest = 0.0f64;
    for (step, &source) in target.steps.iter().zip(&target.step_sources) {
        match step {
            Step::LowRank(product) => {
                bound.raise(source, product_bound(ctx, product)?);
                if let Some(magnitude) = &product.magnitude {
                    let n = if magnitude.of_columns { target.n_columns } else { product.n_rows };
                    let start = magnitude.start;
                    let norm = largest_of(&read_f32(magnitude.shard, magnitude.info, start..start + n)?);
                    largest = largest.max(norm);
                    // A row of equal weights with this norm.
                    let length = if magnitude.of_columns { target.n_rows } else { target.n_columns };
                    bound.raise(source, norm / (length as f64).sqrt());
                }
            }
            Step::Sparse { adapter, target, scale, .. } => {
                let delta = adapter.largest_delta(target).map_or(f64::INFINITY, f64::from);
                bound.raise(source, delta * scale.abs());
            }
            Step::Bias { shard, info, scale } => {
                let delta = largest_of(&read_f32(shard, info, 0..target.n_rows)?);
                bound.raise(source, delta * f64::from(scale.abs()));
            }
        }
    }
    let sum: f64 = bound.by_source.values().sum();
    bound.can_overflow = can_overflow(dtype, sum);
    if let Some((shard, info)) = target.full {
        for rows in row_blocks(ctx, target.n_rows, target.n_columns) {
            ctx.check()?;
            let elements = rows.start * target.n_columns..rows.end * target.n_columns;
            largest = largest.max(largest_of(&read_f32(shard, info, elements)?));
        }
        if let Some(source) = target.full_source {
            bound.raise(source, largest);
        }
    }
    // Half of the range is left to roundings.
    bound.can_overflow |= largest > largest_finite(dtype) / 2.0;
    Ok(bound)
}

/// The largest length of a row of `u` times that of a column of `v`, scaled: no element of the product is larger.
fn product_bound(ctx: &Context<'_>, product: &Product<'_>) -> Result<f64, CheckpointError> {
    let (rank, n_columns) = (product.rank, product.columns.n);
    let step = (ctx.window_bytes() / 8 / rank.max(1)).max(1);
    let mut row = 0.0f64;
    for first in (0..product.n_rows).step_by(step as usize) {
        ctx.check()?;
        let u = product.u.read(first..product.n_rows.min(first + step), 0..rank)?;
        row = u.chunks_exact(rank.max(1) as usize).map(squares).fold(row, f64::max);
    }
    let mut column = 0.0f64;
    for first in (0..n_columns).step_by(step as usize) {
        ctx.check()?;
        let n = step.min(n_columns - first) as usize;
        let v = product.v.read(0..rank, first..first + n as u64)?;
        let mut sums = vec![0.0f64; n];
        for v in v.chunks_exact(n) {
            sums.iter_mut().zip(v).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
        }
        column = sums.into_iter().fold(column, f64::max);
    }
    Ok((row * column).sqrt() * f64::from(product.scale.abs()))
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

fn largest_of(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(f64::from(value.abs())))
}
