//! Two adapters, or two masks: where they overlap and how they agree.

use std::ops::Range;

use serde::Serialize;

use super::{
    DiffError,
    norms::{PIECE, Sums},
};
use crate::{
    adapter::{Adapter, DeltaRows},
    checkpoint::{Context, for_each_ordered},
    mask::{MaskFile, ROW_BYTES, TargetInfo},
    tensor::RowColumns,
};

/// Where two sets of positions overlap, and how their deltas agree there.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct Overlap {
    /// Positions that only A has.
    pub n_only_a: u64,
    /// Positions that only B has.
    pub n_only_b: u64,
    /// Positions that both have.
    pub n_shared: u64,
    /// `n_shared` over all positions of either; 1 where there are none.
    pub jaccard: f64,
    /// Shared positions whose deltas have opposite signs.
    pub n_sign_conflicts: u64,
    /// Shared positions whose deltas, times their scales, differ.
    pub n_values_differ: u64,
    /// The cosine over all positions of either, a missing delta being zero; none for masks, or where one is all zero.
    pub cosine: Option<f64>,
    /// L2 norm of A's deltas times its scale.
    pub norm_a: f64,
    /// L2 norm of B's deltas times its scale.
    pub norm_b: f64,
    /// The largest difference between two deltas, a missing one being zero.
    pub largest_difference: f64,
}

/// One tensor of either side.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct AdapterTensorDiff {
    /// The tensor's name.
    pub tensor: String,
    /// `both`, `only_a`, `only_b`, or `unlike` where the two were made for different types, shapes or values of the base.
    pub status: &'static str,
    /// The overlap; of a tensor that only one side has, that side's positions and norm.
    pub overlap: Overlap,
}

/// What differs between two adapters or two masks.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct AdapterDiff {
    /// Whether both would do the same to the same base.
    pub equal: bool,
    /// Per tensor, by name.
    pub tensors: Vec<AdapterTensorDiff>,
    /// All tensors together.
    pub total: Overlap,
}

/// Compares two adapters, position by position. Memory: a few runs of rows per thread.
///
/// # Errors
/// [`DiffError`]; adapters that differ are a report.
pub fn diff_adapters(ctx: &Context<'_>, a: &Adapter, b: &Adapter) -> Result<AdapterDiff, DiffError> {
    let side = |adapter: &'_ Adapter, target: &TargetInfo, rows: Range<u64>| -> Result<DeltaRows, DiffError> {
        Ok(adapter.read_rows(ctx, target, rows)?)
    };
    compare(
        ctx,
        Side {
            targets: a.targets(),
            scale: a.scale(),
            read: &|target, rows| side(a, target, rows),
            bytes: &|target, rows| a.rows_bytes(ctx, target, rows),
        },
        Side {
            targets: b.targets(),
            scale: b.scale(),
            read: &|target, rows| side(b, target, rows),
            bytes: &|target, rows| b.rows_bytes(ctx, target, rows),
        },
        true,
    )
}

/// Compares the positions of two masks. Memory: a few runs of rows per thread.
///
/// # Errors
/// [`DiffError`]; masks that differ are a report.
pub fn diff_masks(ctx: &Context<'_>, a: &MaskFile, b: &MaskFile) -> Result<AdapterDiff, DiffError> {
    let side = |mask: &'_ MaskFile, target: &TargetInfo, rows: Range<u64>| -> Result<DeltaRows, DiffError> {
        let columns = mask.read_columns(ctx, target, rows)?;
        Ok(DeltaRows { values: vec![0.0; columns.nnz()], columns })
    };
    compare(
        ctx,
        Side {
            targets: a.targets(),
            scale: 1.0,
            read: &|target, rows| side(a, target, rows),
            bytes: &|target, rows| a.rows_bytes(ctx, target, rows),
        },
        Side {
            targets: b.targets(),
            scale: 1.0,
            read: &|target, rows| side(b, target, rows),
            bytes: &|target, rows| b.rows_bytes(ctx, target, rows),
        },
        false,
    )
}

type ReadRows<'a> = &'a (dyn Fn(&TargetInfo, Range<u64>) -> Result<DeltaRows, DiffError> + Sync);

/// One of the two.
struct Side<'a> {
    /// By name.
    targets: &'a [TargetInfo],
    scale: f64,
    /// Reads rows.
    read: ReadRows<'a>,
    /// Bytes of memory that rows take.
    bytes: &'a (dyn Fn(&TargetInfo, &Range<u64>) -> u64 + Sync),
}

impl Side<'_> {
    fn target(&self, name: &str) -> Option<&TargetInfo> {
        let found = self.targets.binary_search_by(|target| target.name.as_str().cmp(name)).ok()?;
        Some(&self.targets[found])
    }
}

fn compare(ctx: &Context<'_>, a: Side<'_>, b: Side<'_>, with_values: bool) -> Result<AdapterDiff, DiffError> {
    let mut names: Vec<&str> = a.targets.iter().chain(b.targets).map(|target| target.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    ctx.observer.begin("comparing", a.targets.iter().chain(b.targets).map(|target| target.nnz).sum());
    let mut diff = AdapterDiff { equal: true, tensors: Vec::new(), total: Overlap::default() };
    let mut all = Sums::default();
    for name in names {
        let (in_a, in_b) = (a.target(name), b.target(name));
        let status = match (in_a, in_b) {
            (Some(a), Some(b)) if is_alike(a, b) => "both",
            (Some(_), Some(_)) => "unlike",
            (Some(_), None) => "only_a",
            _ => "only_b",
        };
        let (mut overlap, mut sums) = (Overlap::default(), Sums::default());
        let parts: [(Option<&TargetInfo>, Option<&TargetInfo>); 2] = match status {
            // Positions in tensors of different shapes cannot be compared: each side is counted for itself.
            "unlike" if in_a.map(|t| t.layout) != in_b.map(|t| t.layout) => [(in_a, None), (None, in_b)],
            _ => [(in_a, in_b), (None, None)],
        };
        for (in_a, in_b) in parts {
            let Some(layout) = in_a.or(in_b).map(|target| target.layout) else { continue };
            let nnz = in_a.into_iter().chain(in_b).map(|target| target.nnz).sum::<u64>().max(1);
            // A fixed number of rows, whatever the threads and windows are.
            let step = (layout.n_rows().saturating_mul(PIECE as u64) / nnz).clamp(1, PIECE as u64);
            let runs = (0..layout.n_rows()).step_by(step as usize).map(|row| row..layout.n_rows().min(row + step));
            for_each_ordered(
                ctx,
                runs,
                |rows| {
                    let bytes = |side: &Side<'_>, of: Option<&TargetInfo>| of.map_or(0, |of| (side.bytes)(of, rows));
                    bytes(&a, in_a) + bytes(&b, in_b) + (rows.end - rows.start) * ROW_BYTES
                },
                |rows| {
                    let read = |side: &Side<'_>, target: Option<&TargetInfo>| match target {
                        Some(target) => (side.read)(target, rows.clone()),
                        None => Ok(empty_rows((rows.end - rows.start) as usize)),
                    };
                    let (rows_a, rows_b) = (read(&a, in_a)?, read(&b, in_b)?);
                    ctx.observer.advance((rows_a.columns.nnz() + rows_b.columns.nnz()) as u64);
                    Ok::<_, DiffError>(compare_rows(&rows_a, a.scale, &rows_b, b.scale))
                },
                |_, (of_run, sums_of_run)| {
                    overlap.count(&of_run);
                    sums.add(&sums_of_run);
                    Ok(())
                },
            )?;
        }
        overlap.measure(&sums, with_values);
        diff.equal &= status == "both" && overlap.n_only_a + overlap.n_only_b + overlap.n_values_differ == 0;
        diff.total.count(&overlap);
        all.add(&sums);
        diff.tensors.push(AdapterTensorDiff { tensor: name.to_owned(), status, overlap });
    }
    diff.total.measure(&all, with_values);
    Ok(diff)
}

/// Whether two targets are about the same tensor of the same base, as far as they overlap.
fn is_alike(a: &TargetInfo, b: &TargetInfo) -> bool {
    let whole = |target: &TargetInfo| target.blake3;
    (a.dtype, &a.shape, a.transposed) == (b.dtype, &b.shape, b.transposed)
        && (whole(a).is_none() || whole(b).is_none() || whole(a) == whole(b))
}

fn empty_rows(n_rows: usize) -> DeltaRows {
    let mut columns = RowColumns::with_capacity(n_rows, 0);
    (0..n_rows).for_each(|_| columns.push_row(&[]));
    DeltaRows { columns, values: Vec::new() }
}

fn compare_rows(a: &DeltaRows, scale_a: f64, b: &DeltaRows, scale_b: f64) -> (Overlap, Sums) {
    let (mut overlap, mut sums) = (Overlap::default(), Sums::default());
    for row in 0..a.columns.n_rows() {
        let (mut i, mut j) = (a.columns.row_range(row), b.columns.row_range(row));
        loop {
            let column =
                |rows: &DeltaRows, at: &Range<usize>| (!at.is_empty()).then(|| rows.columns.columns()[at.start]);
            let (in_a, in_b) = (column(a, &i), column(b, &j));
            let Some(first) = in_a.into_iter().chain(in_b).min() else { break };
            let take = |rows: &DeltaRows, at: &mut Range<usize>, scale: f64, found: Option<u32>| {
                (found == Some(first)).then(|| {
                    at.start += 1;
                    f64::from(rows.values[at.start - 1]) * scale
                })
            };
            let (value_a, value_b) = (take(a, &mut i, scale_a, in_a), take(b, &mut j, scale_b, in_b));
            match (value_a, value_b) {
                (Some(a), Some(b)) => {
                    overlap.n_shared += 1;
                    overlap.n_sign_conflicts += u64::from(a * b < 0.0);
                    overlap.n_values_differ += u64::from(a != b);
                }
                (Some(_), None) => overlap.n_only_a += 1,
                _ => overlap.n_only_b += 1,
            }
            sums.pair(value_a.unwrap_or(0.0), value_b.unwrap_or(0.0));
        }
    }
    (overlap, sums)
}

impl Overlap {
    /// Adds the counts of other rows.
    fn count(&mut self, other: &Self) {
        self.n_only_a += other.n_only_a;
        self.n_only_b += other.n_only_b;
        self.n_shared += other.n_shared;
        self.n_sign_conflicts += other.n_sign_conflicts;
        self.n_values_differ += other.n_values_differ;
    }

    /// Sets what follows from counts and sums.
    fn measure(&mut self, sums: &Sums, with_values: bool) {
        let all = self.n_only_a + self.n_only_b + self.n_shared;
        self.jaccard = if all == 0 { 1.0 } else { self.n_shared as f64 / all as f64 };
        if with_values {
            (self.norm_a, self.norm_b) = (sums.aa.sqrt(), sums.bb.sqrt());
            (self.cosine, self.largest_difference) = (sums.cosine(), sums.largest);
        }
    }
}
