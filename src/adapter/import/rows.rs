//! Entries in any order, put into rows a run at a time: however many there are, a bounded number is in memory.

use std::ops::Range;

use super::matched::Matched;
use crate::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, Context},
    foreign::{ForeignTarget, Positions},
    tensor::{RowColumns, round_to},
};

/// Entries that are read in one piece.
const PIECE: u64 = 1 << 16;
/// Rows between two counts.
const GROUP: u64 = 64;
/// Bytes of memory for an entry on its way.
const ENTRY_BYTES: u64 = 64;
/// Entries of one group of rows that are always accepted.
const MIN_GROUP: u64 = 1 << 22;

/// A target's entries, counted and proven to lie inside the tensor.
pub(super) struct TargetRows<'a> {
    matched: &'a Matched<'a>,
    /// Entries before each group of rows; one more than groups.
    before: Vec<u64>,
    /// Whether the entries come in the order of their positions.
    is_sorted: bool,
    /// Entries that fit in memory.
    most: u64,
}

/// A run of rows, each column once.
#[derive(Default)]
pub(super) struct Run {
    pub(super) columns: RowColumns,
    /// As they will be stored, widened.
    pub(super) values: Vec<f32>,
    pub(super) counts: Counts,
}

/// What became of entries.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Counts {
    /// Entries that were added to another one of the same position.
    pub(super) n_summed: u64,
    /// Padding that was dropped.
    pub(super) n_dropped: u64,
    /// Deltas that had to be rounded, and the largest difference it made.
    pub(super) n_rounded: u64,
    pub(super) largest_error: f64,
}

impl Counts {
    pub(super) fn add(&mut self, other: Self) {
        self.n_summed += other.n_summed;
        self.n_dropped += other.n_dropped;
        self.n_rounded += other.n_rounded;
        self.largest_error = self.largest_error.max(other.largest_error);
    }
}

impl<'a> TargetRows<'a> {
    /// Reads all positions once.
    ///
    /// Memory: a piece, and 8 bytes for every 64 rows.
    ///
    /// # Errors
    /// A position outside of the tensor, naming it.
    pub(super) fn survey(ctx: &Context<'_>, matched: &'a Matched<'a>) -> Result<Self, AdapterError> {
        let layout = matched.layout;
        let mut counts = vec![0u64; layout.n_rows().div_ceil(GROUP) as usize];
        let (mut is_sorted, mut last) = (true, 0);
        for range in pieces(matched.target.n()) {
            ctx.check()?;
            for flat in flat_positions(matched, range)? {
                is_sorted &= flat >= last;
                last = flat;
                counts[(flat / layout.d_in / GROUP) as usize] += 1;
            }
        }
        let mut before = Vec::with_capacity(counts.len() + 1);
        before.push(0);
        for n in &counts {
            before.push(before[before.len() - 1] + n);
        }
        let most = (ctx.max_memory / 4 / ENTRY_BYTES).max(PIECE);
        let fullest = counts.iter().max().copied().unwrap_or(0);
        if fullest > most.max(MIN_GROUP) {
            let what =
                format!("{fullest} entries on {GROUP} rows of {} columns are more than fit in memory", layout.d_in);
            return Err(
                CheckpointError::bad_tensor(matched.target.values.input.path(), &matched.target.name, what).into()
            );
        }
        Ok(Self { matched, before, is_sorted, most })
    }

    /// Runs of rows whose entries fit in memory.
    pub(super) fn runs(&self) -> Vec<Range<u64>> {
        let n_rows = self.matched.layout.n_rows();
        let mut runs = Vec::new();
        let mut first = 0;
        for group in 1..self.before.len() {
            let is_last = group + 1 == self.before.len();
            if is_last || self.before[group + 1] - self.before[first] > self.most {
                runs.push(first as u64 * GROUP..n_rows.min(group as u64 * GROUP));
                first = group;
            }
        }
        runs
    }

    /// The entries of a run of rows, sorted, those of one position summed in their order, rounded as they will be stored.
    ///
    /// # Errors
    /// A delta that is not finite, or not when it is rounded.
    pub(super) fn load(&self, ctx: &Context<'_>, rows: &Range<u64>) -> Result<Run, AdapterError> {
        let target = self.matched.target;
        let d_in = self.matched.layout.d_in;
        let wanted = rows.start * d_in..rows.end * d_in;
        let from = |group: u64| self.before[group as usize];
        let listed = match self.is_sorted {
            true => from(rows.start / GROUP)..from(rows.end.div_ceil(GROUP)),
            false => 0..target.n(),
        };
        let mut entries: Vec<(u64, f64)> = Vec::new();
        let mut values = Vec::new();
        for range in pieces(listed.end - listed.start) {
            ctx.check()?;
            let range = listed.start + range.start..listed.start + range.end;
            values.clear();
            target.values.deltas(range.clone(), &mut values)?;
            let positions = flat_positions(self.matched, range)?;
            entries.extend(positions.into_iter().zip(values.iter().copied()).filter(|(flat, _)| wanted.contains(flat)));
        }
        if !self.is_sorted {
            // Stable: what is summed is summed in the order of the file.
            entries.sort_by_key(|(flat, _)| *flat);
        }
        self.assemble(rows, &entries)
    }

    fn assemble(&self, rows: &Range<u64>, entries: &[(u64, f64)]) -> Result<Run, AdapterError> {
        let Matched { target, layout, values: stored, .. } = self.matched;
        let mut run = Run::default();
        let mut columns = Vec::new();
        let mut rest = entries;
        for row in rows.clone() {
            columns.clear();
            while let Some(&(flat, _)) = rest.first().filter(|(flat, _)| flat / layout.d_in == row) {
                let n = rest.iter().take_while(|(other, _)| *other == flat).count();
                let (same, others) = rest.split_at(n);
                rest = others;
                let column = (flat % layout.d_in) as u32;
                let sum = sum(same);
                if target.has_padding && is_padding(sum) {
                    run.counts.n_dropped += n as u64;
                    continue;
                }
                let padding = if target.has_padding { same.iter().filter(|(_, x)| is_padding(*x)).count() } else { 0 };
                run.counts.n_dropped += padding as u64;
                run.counts.n_summed += (n - padding).saturating_sub(1) as u64;
                let value = round_to(*stored, sum);
                if !value.is_finite() {
                    let dtype = crate::tensor::dtype_name(*stored);
                    let what = format!("row {row}, column {column}: the delta {sum:e} does not fit {dtype}");
                    return Err(CheckpointError::bad_tensor(target.values.input.path(), &target.name, what).into());
                }
                if f64::from(value) != sum {
                    run.counts.n_rounded += 1;
                    run.counts.largest_error = run.counts.largest_error.max((f64::from(value) - sum).abs());
                }
                columns.push(column);
                run.values.push(value);
            }
            run.columns.push_row(&columns);
        }
        debug_assert!(rest.is_empty(), "every entry lies in one of the rows");
        Ok(run)
    }
}

/// Whether an entry is there only to make up a number: adding -0 changes no weight.
fn is_padding(x: f64) -> bool {
    x == 0.0 && x.is_sign_negative()
}

/// The sum of the deltas of one position, rounded after each addition as torch does it in float32; one alone stays as it is.
fn sum(entries: &[(u64, f64)]) -> f64 {
    let (_, first) = entries[0];
    entries[1..].iter().fold(first, |sum, (_, x)| f64::from(sum as f32 + *x as f32))
}

fn pieces(n: u64) -> impl Iterator<Item = Range<u64>> {
    (0..n).step_by(PIECE as usize).map(move |start| start..n.min(start + PIECE))
}

/// Positions as row times width plus column, each inside the tensor.
fn flat_positions(matched: &Matched<'_>, range: Range<u64>) -> Result<Vec<u64>, AdapterError> {
    let ForeignTarget { name, positions, values, .. } = matched.target;
    let (n_rows, d_in) = (matched.layout.n_rows(), matched.layout.d_in);
    let outside = |i: usize, what: String| {
        let what = format!("entry {}: {what}, the tensor has {n_rows} rows of {d_in}", range.start + i as u64);
        CheckpointError::bad_tensor(values.input.path(), name, what)
    };
    let mut flat = Vec::with_capacity((range.end - range.start) as usize);
    match positions {
        Positions::Flat(all) => {
            all.positions(range.clone(), &mut flat)?;
            if let Some(i) = flat.iter().position(|&at| at >= n_rows * d_in) {
                return Err(outside(i, format!("position {}", flat[i])).into());
            }
        }
        Positions::Pairs(rows, columns) => {
            let mut of_columns = Vec::with_capacity(flat.capacity());
            rows.positions(range.clone(), &mut flat)?;
            columns.positions(range.clone(), &mut of_columns)?;
            for (i, (at, &column)) in flat.iter_mut().zip(&of_columns).enumerate() {
                if *at >= n_rows || column >= d_in {
                    return Err(outside(i, format!("row {at}, column {column}")).into());
                }
                *at = *at * d_in + column;
            }
        }
    }
    Ok(flat)
}
