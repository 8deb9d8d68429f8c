//! How much the adapters of a plan can change their targets at most, known from the adapters alone: what decides whether a merge is
//! examined for overflow before it writes, and which deltas are compared with the originals.

use std::collections::BTreeMap;

use super::rows::row_blocks;
use crate::{
    adapter::AdapterId,
    backend::largest_finite,
    checkpoint::{CheckpointError, Context},
    merge::{
        factors::read_f32,
        plan::{Does, MergeTarget, Product},
        plausible::{can_overflow, needs_originals},
    },
};

/// What is known of one target.
#[derive(Clone, Debug, Default)]
pub(in crate::merge) struct Bound {
    /// By adapter: no delta that it adds to a weight has a larger magnitude.
    pub(in crate::merge) by_source: BTreeMap<AdapterId, f64>,
    /// Whether a finite weight may become infinite or NaN.
    pub(in crate::merge) can_overflow: bool,
}

impl Bound {
    /// Whether the originals have to be measured before all deltas can be called plausible.
    pub(in crate::merge) fn needs_originals(&self) -> bool {
        self.by_source.values().any(|&delta| needs_originals(delta))
    }

    fn raise(&mut self, source: AdapterId, delta: f64) {
        let largest = self.by_source.entry(source).or_default();
        // A NaN stays.
        if !(delta <= *largest || largest.is_nan()) {
            *largest = delta;
        }
    }
}

/// The bound of one target. Reads its terms once. Memory: factors of about a window.
pub(in crate::merge) fn bound_of(ctx: &Context<'_>, target: &MergeTarget<'_>) -> Result<Bound, CheckpointError> {
    let dtype = target.tensor.info.dtype;
    let mut bound = Bound::default();
    // What a weight may become by being replaced or brought to a magnitude.
    let mut largest = 0.0f64;
    for term in &target.terms {
        let source = term.source.id;
        match &term.does {
            Does::LowRank(product) => {
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
            Does::Sparse { adapter, target } => {
                bound.raise(source, MergeTarget::largest_delta(term.source, adapter, target));
            }
            Does::Bias { shard, info, scale } => {
                let delta = largest_of(&read_f32(shard, info, 0..target.n_rows)?);
                bound.raise(source, delta * f64::from(scale.abs()));
            }
            Does::Rows(rows) => {
                let n = rows.info.n_elements();
                let replaced = largest_of(&read_f32(rows.shard, rows.info, 0..n)?);
                largest = largest.max(replaced);
                bound.raise(source, replaced);
            }
            Does::Full { .. } => {}
        }
    }
    let sum: f64 = bound.by_source.values().sum();
    bound.can_overflow = can_overflow(dtype, sum);
    for term in &target.terms {
        let Does::Full { shard, info } = &term.does else { continue };
        for rows in row_blocks(ctx, target.n_rows, target.n_columns) {
            ctx.check()?;
            let elements = rows.start * target.n_columns..rows.end * target.n_columns;
            largest = largest.max(largest_of(&read_f32(shard, info, elements)?));
        }
        bound.raise(term.source.id, largest);
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
