//! Hot loops over rows. Each has a plain reference implementation against which faster ones are tested.
//!
//! Nothing here knows files or checkpoints: the input is [`crate::tensor::RowBlock`]s and columns, the output is
//! values.
//!
//! [`ScoredRows`] maps every weight of a run of rows to an integer key, larger first; the functions below choose by
//! key, with ties going to the lower column. Keys are integers so that every instruction set and thread count agrees.
//! A [`Chooser`] runs the same on an accelerator that is a [`RowChooser`]; a [`Merger`] runs low-rank products on a
//! [`LowRankMerger`]. `patch` holds the merge arithmetic for sparse deltas.

mod accelerator;
mod chooser;
mod finite;
mod keys;
mod low_rank;
mod merger;
mod patch;
mod portable;
mod score;
mod simd;

use crate::tensor::{RowBlock, RowColumns};
pub use accelerator::AcceleratorError;
pub use chooser::{ChooseError, Chooser, ChosenRows, RowChooser};
pub use finite::{largest_finite, largest_magnitude, overflow_margin, overflows};
pub use keys::{Digit, KeySpace};
pub use low_rank::{add_low_rank, merge_sums};
pub use merger::{LowRankMerger, MergedWeights, Merger};
pub use patch::{PatchCounts, ScaledDeltas, merged_values, pick, replace_values, union_columns};
pub(crate) use score::mix;
pub use score::{ColumnNorms, NotANumber, Score, ScoreKind, ScoredRows};
#[cfg(feature = "train")]
pub use simd::matmul::{Mat, MatMut, Threads, matmul};

/// Chooses the `k` entries with the largest keys in each row.
///
/// Returns columns, `[n_rows, min(k, d_in)]`, ascending within a row. Ties go to the lower column, on every backend.
/// Extra memory: `O(d_in)`.
///
/// # Errors
/// [`NotANumber`] names the first row and column with a NaN.
///
/// Source: NeuroAda, <https://arxiv.org/abs/2510.18940>.
pub fn topk_rows(rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, NotANumber> {
    keys::with_key!(rows.space(), K => {
        simd::topk_rows::<K>(rows, k).unwrap_or_else(|| portable::topk_rows::<K>(rows, k))
    })
}

/// The instruction set in use: `avx512`, `avx2`, `neon` or `portable`.
pub fn instruction_set() -> &'static str {
    simd::name()
}

/// Counts the keys with the prefix of `digit` by their next 16 bits, and adds to `counts` (`[Digit::VALUES]`).
///
/// # Errors
/// [`NotANumber`] names the first row and column with a NaN.
pub fn count_keys(rows: &ScoredRows<'_>, digit: Digit, counts: &mut [u32]) -> Result<(), NotANumber> {
    keys::with_key!(rows.space(), K => portable::count_keys::<K>(rows, digit, counts))
}

/// The keys of at least `bound`, row by row.
///
/// # Errors
/// [`NotANumber`] names the first row and column with a NaN.
pub fn keys_from(rows: &ScoredRows<'_>, bound: u64) -> Result<Vec<u64>, NotANumber> {
    keys::with_key!(rows.space(), K => match simd::columns_from::<K>(rows, bound) {
        Some(keyed) => Ok(keyed?.1.into_iter().map(u64::from).collect()),
        None => portable::keys_from::<K>(rows, bound),
    })
}

/// Entries of rows chosen by a cut key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CutRows {
    /// The chosen columns.
    pub columns: RowColumns,
    /// `[nnz]`: whether the entry's key equals the cut.
    pub is_tie: Vec<bool>,
}

/// Chooses all entries whose key is greater than `cut`, and the first `max_ties` of those equal to it, row by row.
///
/// # Errors
/// [`NotANumber`] names the first row and column with a NaN.
pub fn cut_rows(rows: &ScoredRows<'_>, cut: u64, max_ties: u64) -> Result<CutRows, NotANumber> {
    keys::with_key!(rows.space(), K => match simd::columns_from::<K>(rows, cut) {
        Some(keyed) => Ok(without_ties_past(keyed?, cut, max_ties)),
        None => portable::cut_rows::<K>(rows, cut, max_ties),
    })
}

/// Keeps the first `max_ties` of the entries whose key is `cut`.
fn without_ties_past((columns, keys): simd::KeyedColumns, cut: u64, max_ties: u64) -> CutRows {
    let is_tie: Vec<bool> = keys.iter().map(|&key| u64::from(key) == cut).collect();
    if is_tie.iter().filter(|&&is_tie| is_tie).count() as u64 <= max_ties {
        return CutRows { columns, is_tie };
    }
    let mut kept = CutRows::default();
    let mut ties_left = max_ties;
    let mut row_columns = Vec::new();
    for row in 0..columns.n_rows() {
        row_columns.clear();
        for at in columns.row_range(row) {
            if is_tie[at] && ties_left == 0 {
                continue;
            }
            ties_left -= u64::from(is_tie[at]);
            row_columns.push(columns.columns()[at]);
            kept.is_tie.push(is_tie[at]);
        }
        kept.columns.push_row(&row_columns);
    }
    kept
}

/// The elements of `rows` at `columns`, as stored, row by row: `nnz` elements.
///
/// # Panics
/// If the numbers of rows differ, or a column is out of range.
pub fn gather(rows: RowBlock<'_>, columns: &RowColumns) -> Vec<u8> {
    portable::gather(rows, columns)
}
