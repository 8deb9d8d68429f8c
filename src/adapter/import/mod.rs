//! From another tool's sparse adapter to one of this program.
//!
//! [`import`] puts the positions and deltas of a [`ForeignAdapter`], which come in any order, into rows, a run at a time; it sums what
//! has one position and writes an adapter that knows its base. The report says for each tensor whether anything was rounded.

mod matched;
mod report;
mod rows;

use std::{collections::BTreeMap, path::Path};

use matched::{Matched, matched};
use rows::{Counts, Run, TargetRows};

pub use report::{ConvertReport, ConvertedTensor};

use super::{Adapter, AdapterError, AdapterNotes, AdapterWriter};
use crate::{
    checkpoint::{BaseValues, Context, Existing},
    foreign::ForeignAdapter,
    mask::{BaseInfo, Recipe},
    tensor::{Dtype, dtype_name},
    weights::WeightMap,
};

/// Writes `foreign` as an adapter for the checkpoint of `map` at `output`.
///
/// The adapter knows its base as every other does: by the values at its positions, which foreign formats do not keep. So the base
/// given here is believed to be the right one; that all positions lie inside its tensors is checked. Entries of one position
/// are summed; the report says for each tensor whether anything was rounded.
///
/// `values` are mostly the base's own; of a base that holds merges they are what the merges left untouched.
///
/// Memory: a run of rows, whatever the order of the entries.
///
/// # Errors
/// [`AdapterError::Unmatched`], a position outside of its tensor, a delta that is not finite; nothing was written.
pub fn import(
    ctx: &Context<'_>,
    foreign: &ForeignAdapter,
    map: &WeightMap<'_>,
    values: &dyn BaseValues,
    notes: &AdapterNotes,
    output: &Path,
    existing: Existing,
) -> Result<ConvertReport, AdapterError> {
    let base = map.checkpoint();
    let matched = matched(foreign, map)?;
    let mut writer = AdapterWriter::create(output, existing, Dtype::F32)?;
    let mut tensors = Vec::new();
    ctx.observer.begin("converting", matched.iter().map(|matched| matched.target.n()).sum());
    for target in &matched {
        tensors.push(write_target(ctx, &mut writer, target, values)?);
    }
    foreign.unchanged()?;
    base.unchanged()?;
    let extra = BTreeMap::from([("converted_from".to_owned(), foreign.format().name().to_owned())]);
    let recipe = Recipe { extra, ..Recipe::custom() };
    writer.finish(ctx, 1.0, &recipe, &BaseInfo::of(base), notes)?;
    let (adapter, id) = Adapter::read_back(ctx, output)?;
    let mut report = ConvertReport::new(foreign.format().name(), "neuroada", tensors);
    report.base = Some(base.name());
    report.id = Some(id.to_string());
    report.n_bytes = adapter.n_bytes();
    Ok(report)
}

fn write_target(
    ctx: &Context<'_>,
    writer: &mut AdapterWriter,
    matched: &Matched<'_>,
    base: &dyn BaseValues,
) -> Result<ConvertedTensor, AdapterError> {
    let Matched { target, tensor, layout, values } = *matched;
    let rows = TargetRows::survey(ctx, matched)?;
    let runs = rows.runs();
    let (mut per_row, mut n_deltas, mut counts) = (None, 0, Counts::default());
    let mut only: Option<Run> = None;
    // Once to know whether all rows have as many columns, which the header says, and once to write.
    for range in &runs {
        let run = rows.load(ctx, range)?;
        n_deltas += run.columns.nnz() as u64;
        counts.add(run.counts);
        for row in 0..run.columns.n_rows() {
            let n = run.columns.row(row).len();
            let (fewest, most) = per_row.unwrap_or((n, n));
            per_row = Some((n.min(fewest), n.max(most)));
        }
        only = (runs.len() == 1).then_some(run);
    }
    let uniform_k = per_row.filter(|(fewest, most)| fewest == most && *most > 0).map(|(k, _)| k as u64);
    writer.store_as(values);
    writer.begin_target(&tensor.info.name, tensor.info.dtype, &tensor.info.shape, false, uniform_k)?;
    for range in &runs {
        let run = match only.take() {
            Some(run) => run,
            None => rows.load(ctx, range)?,
        };
        let base_values = base.gather(ctx, tensor, layout, range.start, &run.columns)?;
        writer.push_rows(&run.columns, &run.values, &base_values)?;
    }
    writer.end_target(None);
    ctx.observer.advance(target.n());
    Ok(ConvertedTensor {
        tensor: tensor.info.name.clone(),
        dtype: dtype_name(target.values.dtype),
        stored_dtype: dtype_name(values),
        applied_dtype: dtype_name(values),
        n_entries: target.n(),
        n_written: n_deltas,
        n_summed: counts.n_summed,
        n_padding: counts.n_dropped,
        n_rounded: counts.n_rounded,
        largest_error: counts.largest_error,
    })
}
