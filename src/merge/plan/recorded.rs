//! Terms as a ledger records them: which tensors of the adapter's file go where, so that undoing derives nothing again.

use super::{Does, Magnitude, MergeTarget, Product, ReplacedRows, Term};
use crate::{
    checkpoint::{Shard, TensorInfo, TensorRef},
    merge::{
        factors::Matrix,
        ledger::{
            RecordedBias, RecordedChange, RecordedMagnitude, RecordedMatrix, RecordedProduct, RecordedRows,
            RecordedTerm,
        },
        source::Source,
    },
    weights::Columns,
};

/// A term of a target; `adapter` is the index of its source.
pub(in crate::merge) fn record(target: &MergeTarget<'_>, term: &Term<'_>, adapter: usize) -> RecordedTerm {
    let matrix = |matrix: &Matrix<'_>| {
        RecordedMatrix(matrix.info.name.clone(), matrix.start, matrix.row_stride, matrix.column_stride)
    };
    let does = match &term.does {
        Does::Sparse { target, .. } => RecordedChange::Sparse(target.name.clone()),
        Does::Full { info, .. } => RecordedChange::Full(info.name.clone()),
        Does::Rows(rows) => {
            RecordedChange::Rows(RecordedRows { tensor: rows.info.name.clone(), places: rows.places.to_vec() })
        }
        Does::Bias { info, scale, .. } => {
            RecordedChange::Bias(RecordedBias { tensor: info.name.clone(), scale: f64::from(*scale) })
        }
        Does::LowRank(product) => {
            let Columns { first, step, n, .. } = product.columns;
            let magnitude = product.magnitude.as_ref().map(|magnitude| RecordedMagnitude {
                tensor: magnitude.info.name.clone(),
                of_columns: magnitude.of_columns,
                start: magnitude.start,
            });
            RecordedChange::LowRank(RecordedProduct {
                rows: [product.first_row, product.n_rows],
                columns: (product.columns != Columns::all(target.n_columns)).then_some([first, step, n]),
                rank: product.rank,
                scale: f64::from(product.scale),
                u: matrix(&product.u),
                v: matrix(&product.v),
                magnitude,
            })
        }
    };
    RecordedTerm(adapter, does)
}

/// The target of a stored tensor whose terms are recorded; `sources` are the ledger's active adapters.
///
/// # Errors
/// What does not fit: records are checked as files from elsewhere are.
pub(in crate::merge) fn resolve<'a>(
    tensor: TensorRef<'a>,
    n_columns: u64,
    recorded: &[RecordedTerm],
    sources: &'a [Source],
) -> Result<MergeTarget<'a>, String> {
    let n_elements = tensor.info.n_elements();
    if n_columns == 0 || n_elements == 0 || !n_elements.is_multiple_of(n_columns) {
        return Err(format!("shape {:?} has no rows of {n_columns}", tensor.info.shape));
    }
    let mut target = MergeTarget { tensor, n_rows: n_elements / n_columns, n_columns, terms: Vec::new() };
    for RecordedTerm(adapter, does) in recorded {
        let source = sources.get(*adapter).ok_or("it names an adapter that is not there")?;
        let does = resolve_one(&target, does, source)?;
        target.terms.push(Term { source, does });
    }
    if target.terms.is_empty() || !target.terms.is_sorted_by_key(|term| term.source.id) {
        return Err("its adapters are not in ascending order".to_owned());
    }
    Ok(target)
}

fn resolve_one<'a>(
    target: &MergeTarget<'a>,
    recorded: &RecordedChange,
    source: &'a Source,
) -> Result<Does<'a>, String> {
    let (shape, dtype) = (&target.tensor.info.shape, target.tensor.info.dtype);
    let of_adapter = |name: &str, n: u64| -> Result<(&'a Shard, &'a TensorInfo), String> {
        let found = source.kept_shard().and_then(|shard| Some((shard, shard.header().tensor(name)?)));
        let (shard, info) = found.ok_or_else(|| format!("its adapter has no tensor {name:?}"))?;
        let is_float =
            matches!(info.dtype, crate::tensor::Dtype::F32 | crate::tensor::Dtype::BF16 | crate::tensor::Dtype::F16);
        match is_float && info.n_elements() >= n {
            true => Ok((shard, info)),
            false => Err(format!("its adapter's tensor {name:?} is {:?} {:?}", info.dtype, info.shape)),
        }
    };
    Ok(match recorded {
        RecordedChange::Sparse(name) => {
            let adapter = source.sparse().ok_or("its adapter is not sparse")?;
            let sparse = adapter.target(name).ok_or_else(|| format!("its adapter has no target {name:?}"))?;
            if sparse.shape != *shape || sparse.dtype != dtype {
                return Err("the ledger and its adapters disagree".to_owned());
            }
            Does::Sparse { adapter, target: sparse }
        }
        RecordedChange::Full(name) => {
            let (shard, info) = of_adapter(name, target.tensor.info.n_elements())?;
            Does::Full { shard, info }
        }
        RecordedChange::Rows(RecordedRows { tensor, places }) => {
            let n = places.len() as u64;
            let (shard, info) = of_adapter(tensor, n.saturating_mul(target.n_columns))?;
            let fits = places.iter().all(|&(row, of_tensor)| row < target.n_rows && of_tensor < n);
            if !fits
                || places.is_empty()
                || !places.is_sorted_by(|a, b| a.0 < b.0)
                || info.n_elements() != n * target.n_columns
            {
                return Err("replaced rows lie outside of the tensor".to_owned());
            }
            Does::Rows(ReplacedRows { shard, info, places: places.as_slice().into() })
        }
        RecordedChange::Bias(RecordedBias { tensor, scale }) => {
            let (shard, info) = of_adapter(tensor, target.n_rows)?;
            Does::Bias { shard, info, scale: *scale as f32 }
        }
        RecordedChange::LowRank(product) => {
            let [first_row, n_rows] = product.rows;
            let all = Columns::all(target.n_columns);
            let columns =
                product.columns.map_or(all, |[first, step, n]| Columns { first, step, n, of: target.n_columns });
            let last_row = first_row.checked_add(n_rows).filter(|&end| n_rows > 0 && end <= target.n_rows);
            let last_column = columns
                .n
                .checked_sub(1)
                .and_then(|last| last.checked_mul(columns.step)?.checked_add(columns.first))
                .filter(|&last| last < target.n_columns && columns.step > 0);
            if last_row.is_none() || last_column.is_none() || product.rank == 0 {
                return Err("a product lies outside of the tensor".to_owned());
            }
            let matrix = |recorded: &RecordedMatrix, n_rows: u64, n_columns: u64| {
                let RecordedMatrix(name, start, row_stride, column_stride) = recorded;
                let last = (n_rows - 1).checked_mul(*row_stride);
                let last = last.and_then(|at| at.checked_add((n_columns - 1).checked_mul(*column_stride)?));
                let n =
                    last.and_then(|at| at.checked_add(*start)?.checked_add(1)).ok_or("a factor overflows 64 bits")?;
                let (shard, info) = of_adapter(name, n)?;
                let (row_stride, column_stride) = (*row_stride, *column_stride);
                Ok::<_, String>(Matrix { shard, info, start: *start, row_stride, column_stride })
            };
            let magnitude = match &product.magnitude {
                None => None,
                Some(RecordedMagnitude { tensor, of_columns, start }) => {
                    let n = if *of_columns { target.n_columns } else { n_rows };
                    let (shard, info) =
                        of_adapter(tensor, start.checked_add(n).ok_or("a magnitude overflows 64 bits")?)?;
                    Some(Magnitude { shard, info, of_columns: *of_columns, start: *start })
                }
            };
            Does::LowRank(Product {
                first_row,
                n_rows,
                columns,
                u: matrix(&product.u, n_rows, product.rank)?,
                v: matrix(&product.v, product.rank, columns.n)?,
                rank: product.rank,
                scale: product.scale as f32,
                magnitude,
            })
        }
    })
}
