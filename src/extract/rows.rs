//! What changed in a run of rows, and the deltas for it.

use super::delta::exact_delta;
use crate::tensor::{Accumulator, Dtype, Float, RowBlock, RowColumns, with_float};

/// What changed in a tensor, or in a run of its rows.
#[derive(Clone, Default)]
pub(super) struct Survey {
    /// Elements whose bits differ.
    pub(super) n_changed: u64,
    /// Of those, elements that get a delta.
    pub(super) n_chosen: u64,
    /// The fewest and the most of them in a row.
    pub(super) per_row: Option<(u64, u64)>,
    /// Changed elements that are not finite on either side.
    pub(super) n_not_finite: u64,
    /// Chosen elements that no delta of the type takes there exactly, by type as they were asked about.
    pub(super) n_inexact: Vec<u64>,
    /// The first element that is not finite, or that no delta of the last type takes there.
    pub(super) first_problem: Option<String>,
    /// The sum of squares of the chosen changes, and of the others.
    pub(super) kept: f64,
    pub(super) lost: f64,
    /// The same row by row, while the survey is that of a run: sums must not depend on how rows are cut into runs.
    pub(super) squares: Vec<(f64, f64)>,
}

impl Survey {
    /// Adds what comes next.
    pub(super) fn add(&mut self, next: Survey) {
        self.n_changed += next.n_changed;
        self.n_chosen += next.n_chosen;
        self.n_not_finite += next.n_not_finite;
        self.n_inexact.resize(next.n_inexact.len(), 0);
        self.n_inexact.iter_mut().zip(&next.n_inexact).for_each(|(n, more)| *n += more);
        self.first_problem = self.first_problem.take().or(next.first_problem);
        self.per_row = match (self.per_row, next.per_row) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (a, b) => a.or(b),
        };
        for (kept, lost) in next.squares {
            self.kept += kept;
            self.lost += lost;
        }
    }

    /// The number of deltas of every row, where all have as many and at least one.
    pub(super) fn uniform_k(&self) -> Option<u64> {
        self.per_row.filter(|(fewest, most)| fewest == most && *most > 0).map(|(k, _)| k)
    }
}

/// How deltas are chosen.
#[derive(Clone, Copy)]
pub(super) struct Choice<'a> {
    /// The most per row; all without.
    pub(super) k: Option<usize>,
    /// The value types asked about, narrower ones first.
    pub(super) types: &'a [Dtype],
}

/// What changed from the rows `a` to the rows `b`, which begin at row `first_row` of their tensor.
pub(super) fn survey(a: RowBlock<'_>, b: RowBlock<'_>, first_row: u64, choice: Choice<'_>) -> Survey {
    with_float!(a.dtype(), T => survey_floats::<T>(a, b, first_row, choice), else unreachable!("targets are floats"))
}

fn survey_floats<T: Float>(a: RowBlock<'_>, b: RowBlock<'_>, first_row: u64, choice: Choice<'_>) -> Survey {
    let mut survey = Survey { n_inexact: vec![0; choice.types.len()], ..Survey::default() };
    let mut changes = Vec::new();
    for row in 0..a.n_rows() {
        let (row_a, row_b) = (a.row(row), b.row(row));
        let n_before = survey.n_chosen;
        if row_a != row_b {
            survey.n_changed += changes_of::<T>(row_a, row_b, &mut changes);
            let n_changes = changes.len();
            changes.retain(|change| change.a.is_finite() && change.b.is_finite());
            if changes.len() < n_changes {
                survey.n_not_finite += (n_changes - changes.len()) as u64;
                let row = first_row + row as u64;
                survey.first_problem.get_or_insert_with(|| format!("the first in row {row}"));
            }
            let lost: f64 = choose(&mut changes, choice.k);
            let kept: f64 = changes.iter().map(Change::square).sum();
            survey.squares.push((kept, lost));
            survey.n_chosen += changes.len() as u64;
            for change in &changes {
                for (i, &dtype) in choice.types.iter().enumerate() {
                    let is_last = i + 1 == choice.types.len();
                    // A narrow type that failed once needs no more asking.
                    if (survey.n_inexact[i] > 0 && !is_last) || exact_delta(change.a, change.b, dtype).is_some() {
                        continue;
                    }
                    survey.n_inexact[i] += 1;
                    if is_last {
                        let (row, column) = (first_row + row as u64, change.column);
                        let (a, b) = (change.a.widen().to_f64(), change.b.widen().to_f64());
                        survey.first_problem.get_or_insert_with(|| {
                            format!("the first in row {row}, column {column}, from {a:e} to {b:e}")
                        });
                    }
                }
            }
        }
        let n = survey.n_chosen - n_before;
        let (fewest, most) = survey.per_row.unwrap_or((n, n));
        survey.per_row = Some((fewest.min(n), most.max(n)));
    }
    survey
}

/// Chosen changes of a run of rows, ready to be written.
pub(super) struct Entries {
    pub(super) columns: RowColumns,
    /// Deltas, exact ones where there are.
    pub(super) values: Vec<f32>,
    /// The base's elements at the columns.
    pub(super) originals: Vec<u8>,
    /// The tuned elements at the columns.
    pub(super) tuned: Vec<u8>,
}

/// The deltas of type `dtype` from the rows `a` to the rows `b`.
pub(super) fn entries(a: RowBlock<'_>, b: RowBlock<'_>, k: Option<usize>, dtype: Dtype) -> Entries {
    with_float!(a.dtype(), T => entries_of::<T>(a, b, k, dtype), else unreachable!("targets are floats"))
}

fn entries_of<T: Float>(a: RowBlock<'_>, b: RowBlock<'_>, k: Option<usize>, dtype: Dtype) -> Entries {
    let columns = RowColumns::with_capacity(a.n_rows(), 0);
    let mut entries = Entries { columns, values: Vec::new(), originals: Vec::new(), tuned: Vec::new() };
    let (mut changes, mut columns) = (Vec::new(), Vec::new());
    for row in 0..a.n_rows() {
        let (row_a, row_b) = (a.row(row), b.row(row));
        changes.clear();
        if row_a != row_b {
            changes_of::<T>(row_a, row_b, &mut changes);
            choose(&mut changes, k);
        }
        columns.clear();
        for change in &changes {
            columns.push(change.column);
            let at = change.column as usize * T::BYTES;
            entries.originals.extend_from_slice(&row_a[at..at + T::BYTES]);
            entries.tuned.extend_from_slice(&row_b[at..at + T::BYTES]);
            let exact = exact_delta(change.a, change.b, dtype);
            entries.values.push(exact.unwrap_or(change.difference() as f32));
        }
        entries.columns.push_row(&columns);
    }
    entries
}

/// An element whose bits differ.
struct Change<T> {
    column: u32,
    a: T,
    b: T,
}

impl<T: Float> Change<T> {
    fn difference(&self) -> f64 {
        self.b.widen().to_f64() - self.a.widen().to_f64()
    }
    fn square(&self) -> f64 {
        self.difference() * self.difference()
    }
}

/// Finds the elements whose bits differ; returns how many.
fn changes_of<T: Float>(a: &[u8], b: &[u8], changes: &mut Vec<Change<T>>) -> u64 {
    changes.clear();
    for (column, (a, b)) in a.chunks_exact(T::BYTES).zip(b.chunks_exact(T::BYTES)).enumerate() {
        if a != b {
            changes.push(Change { column: column as u32, a: T::from_le(a), b: T::from_le(b) });
        }
    }
    changes.len() as u64
}

/// Keeps the `k` largest changes, equal ones settled in favour of the lower column; returns the sum of squares of the rest.
///
/// A zero that only changed its sign is no change to rank: it is dropped.
fn choose<T: Float>(changes: &mut Vec<Change<T>>, k: Option<usize>) -> f64 {
    let Some(k) = k else { return 0.0 };
    changes.retain(|change| change.difference() != 0.0);
    if changes.len() <= k {
        return 0.0;
    }
    changes.sort_by(|x, y| y.difference().abs().total_cmp(&x.difference().abs()).then(x.column.cmp(&y.column)));
    let lost = changes[k..].iter().map(Change::square).sum();
    changes.truncate(k);
    changes.sort_by_key(|change| change.column);
    lost
}
