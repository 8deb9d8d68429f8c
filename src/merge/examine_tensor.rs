//! One look at rows of a touched tensor: whether they are what the stack before left there, and what the stack after makes of them.

use std::ops::Range;

use super::{
    KeptOriginals, MergeError,
    change::{Change, Origin, Touched, Work, hex, positions, put, touched_by_either},
    compute::{Bound, Prepared, RowsHasher, merge_cost, merge_rows},
    findings::MAX_EXAMPLES,
    ledger::Kept,
};
use crate::{
    adapter::AdapterId,
    backend::{PatchCounts, gather, largest_magnitude, overflows, pick},
    checkpoint::{CheckpointError, Context, Printable, gather_rows, window_cost},
    tensor::{RowBlock, RowColumns, RowLayout},
};

/// What one block of rows contributes.
#[derive(Default)]
pub(super) struct BlockFindings {
    pub(super) counts: PatchCounts,
    pub(super) n_touched: u64,
    pub(super) n_changed: u64,
    pub(super) changed: Vec<String>,
    /// Weights that are finite before the change and not after it: how many, and the row and column of the first.
    pub(super) overflowed: Option<(u64, (u64, u64))>,
    /// The positions and originals of `after`, of a tensor that is worked on at positions.
    pub(super) kept: Option<(RowColumns, Vec<u8>)>,
    /// Per sparse adapter of `after` on this tensor: originals at its columns.
    pub(super) anchored: Vec<(AdapterId, Vec<u8>)>,
    /// Of a tensor that is worked on as a whole, hashes of its groups of rows: as found, beneath, and afterwards.
    pub(super) found: Vec<u8>,
    pub(super) beneath: Vec<u8>,
    pub(super) merged: Vec<u8>,
    /// The original rows, where they are kept.
    pub(super) originals: Vec<u8>,
    /// The largest magnitude of an original, where it is needed.
    pub(super) largest: f64,
}

/// A touched tensor, ready to be looked at.
pub(super) struct TensorExamination<'c> {
    pub(super) touched: &'c Touched<'c>,
    change: &'c Change<'c>,
    /// Of a tensor that is worked on as a whole and stays touched.
    prepared: Option<Prepared<'c>>,
    /// What is known of deltas of adapters that are added.
    pub(super) bound: Bound,
    pub(super) keep: Option<KeptOriginals>,
}

impl<'c> TensorExamination<'c> {
    /// Reads what has to be known of the whole tensor before any of its rows.
    pub(super) fn new(
        ctx: &Context<'_>,
        change: &'c Change<'c>,
        touched: &'c Touched<'c>,
        bound: Option<&Bound>,
    ) -> Result<Self, MergeError> {
        let prepared = match (touched.work, touched.after) {
            (Work::Rows { .. }, Some(target)) => Some(change.prepare(ctx, touched, target)?),
            _ => None,
        };
        Ok(Self { touched, change, prepared, bound: bound.cloned().unwrap_or_default(), keep: change.keeps(touched) })
    }

    /// The same for what the stack before left at single elements, and no more.
    pub(super) fn before(change: &'c Change<'c>, touched: &'c Touched<'c>) -> Self {
        Self { touched, change, prepared: None, bound: Bound::default(), keep: None }
    }

    /// Compares the elements that the stack before changed in `rows` with what it left there.
    pub(super) fn compare_before(
        &self,
        ctx: &Context<'_>,
        layout: RowLayout,
        rows: &Range<u64>,
    ) -> Result<BlockFindings, MergeError> {
        let mut block = BlockFindings::default();
        let Touched { tensor, .. } = *self.touched;
        if let Some(before) = self.change.before.rows(ctx, self.touched.name(), rows)? {
            let found = gather_rows(ctx, tensor, layout, rows.start, &before.touched)?;
            let recorded = self.change.recorded(ctx, self.touched, layout, rows, &before)?;
            let (expected, _) = before.merged(tensor.info.dtype, &recorded);
            self.compare(rows, &before.touched, &found, &expected, &mut block);
        }
        Ok(block)
    }

    /// Bytes of memory that looking at a block of rows takes at most, beside the rows themselves.
    pub(super) fn block_bytes(&self, ctx: &Context<'_>, rows: &Range<u64>) -> u64 {
        let (change, name) = (self.change, self.touched.name());
        let n_bytes = (rows.end - rows.start) * self.touched.row_bytes();
        match self.touched.work {
            Work::Positions(_) => change.before.rows_bytes(ctx, name, rows) + change.after.rows_bytes(ctx, name, rows),
            Work::Nothing { .. } => window_cost(n_bytes),
            Work::Rows { .. } => {
                let compute = self.touched.after.map_or(0, |target| merge_cost(ctx, target, rows));
                let is_elsewhere = !matches!(self.touched.origin, Origin::Here);
                let n_copies = 2 * u64::from(is_elsewhere)
                    + u64::from(self.keep == Some(KeptOriginals::Whole))
                    + u64::from(self.touched.before.is_some());
                change.before.rows_bytes(ctx, name, rows) + compute + n_copies * window_cost(n_bytes)
            }
        }
    }

    /// Looks at a block of rows on disk.
    pub(super) fn on_disk(&self, ctx: &Context<'_>, rows: &Range<u64>) -> Result<BlockFindings, MergeError> {
        let Touched { tensor, work, .. } = *self.touched;
        let n_bytes = (rows.end - rows.start) * self.touched.row_bytes();
        let block = match work {
            Work::Positions(layout) => {
                let from_disk = |columns: &RowColumns| gather_rows(ctx, tensor, layout, rows.start, columns);
                self.at_positions(ctx, layout, rows, from_disk)?.0
            }
            Work::Rows { .. } | Work::Nothing { .. } => {
                let start = rows.start * self.touched.row_bytes();
                self.at_rows(ctx, rows, &mut tensor.read(ctx, start..start + n_bytes)?)?
            }
        };
        ctx.observer.advance(n_bytes);
        Ok(block)
    }

    /// Looks at a block of rows in memory, and makes of them what `after` says. Positions must lie in rows of one piece.
    pub(super) fn in_memory(
        &self,
        ctx: &Context<'_>,
        rows: &Range<u64>,
        bytes: &mut [u8],
    ) -> Result<BlockFindings, MergeError> {
        let Work::Positions(layout) = self.touched.work else { return self.at_rows(ctx, rows, bytes) };
        let width = self.touched.tensor.info.dtype.bitsize() / 8;
        let place = |row: usize, column: u32| (row * layout.d_in as usize + column as usize) * width;
        let in_memory = |columns: &RowColumns| {
            let mut found = Vec::with_capacity(columns.nnz() * width);
            for (row, column, _) in positions(columns) {
                found.extend_from_slice(&bytes[place(row, column)..][..width]);
            }
            Ok(found)
        };
        let (block, touched, after) = self.at_positions(ctx, layout, rows, in_memory)?;
        for (row, column, at) in positions(&touched) {
            bytes[place(row, column)..][..width].copy_from_slice(&after[at * width..(at + 1) * width]);
        }
        Ok(block)
    }

    /// Looks at the touched positions of a block of rows; also returns them and their values after the change.
    fn at_positions(
        &self,
        ctx: &Context<'_>,
        layout: RowLayout,
        rows: &Range<u64>,
        find: impl FnOnce(&RowColumns) -> Result<Vec<u8>, CheckpointError>,
    ) -> Result<(BlockFindings, RowColumns, Vec<u8>), MergeError> {
        let (change, name) = (self.change, self.touched.name());
        let dtype = self.touched.tensor.info.dtype;
        let width = dtype.bitsize() / 8;
        let before = change.before.rows(ctx, name, rows)?;
        let after = change.after.rows(ctx, name, rows)?;
        let all = touched_by_either(before.as_ref(), after.as_ref());
        let found = find(&all)?;
        let mut block = BlockFindings { n_touched: all.nnz() as u64, ..BlockFindings::default() };
        let mut values = found.clone();
        if let Some(before) = &before {
            let recorded = change.recorded(ctx, self.touched, layout, rows, before)?;
            let (expected, _) = before.merged(dtype, &recorded);
            self.compare(rows, &before.touched, &pick(&all, &found, width, &before.touched), &expected, &mut block);
            put(&all, &mut values, width, &before.touched, &recorded);
        }
        if let Some(after) = after {
            let originals = pick(&all, &values, width, &after.touched);
            let (merged, counts) = after.merged(dtype, &originals);
            block.counts = counts;
            for source in &change.after.active {
                if let Some(columns) = after.columns_of(source.id) {
                    block.anchored.push((source.id, pick(&after.touched, &originals, width, columns)));
                }
            }
            put(&all, &mut values, width, &after.touched, &merged);
            if counts.overflowed > 0 {
                let lost = overflows(dtype, &found, &values);
                let place = |at: usize| (rows.start + all.row_of(at) as u64, u64::from(all.columns()[at]));
                block.overflowed = lost.first().map(|&first| (lost.len() as u64, place(first)));
            }
            block.kept = Some((after.touched, originals));
        }
        Ok((block, all, values))
    }

    /// Lists elements that are not what `before` left there.
    fn compare(
        &self,
        rows: &Range<u64>,
        columns: &RowColumns,
        found: &[u8],
        expected: &[u8],
        block: &mut BlockFindings,
    ) {
        if found == expected {
            return;
        }
        let width = self.touched.tensor.info.dtype.bitsize() / 8;
        for (row, column, at) in positions(columns) {
            let element = at * width..(at + 1) * width;
            if found[element.clone()] == expected[element.clone()] {
                continue;
            }
            block.n_changed += 1;
            if block.changed.len() < MAX_EXAMPLES {
                let (found, expected) = (hex(&found[element.clone()]), hex(&expected[element]));
                let (row, name) = (rows.start + row as u64, Printable(self.touched.name()));
                let what = format!("\"{name}\" [{row}, {column}]: bits {found}, the merges left {expected}");
                block.changed.push(what);
            }
        }
    }

    /// Looks at whole rows, and makes of them what `after` says.
    fn at_rows(&self, ctx: &Context<'_>, rows: &Range<u64>, bytes: &mut [u8]) -> Result<BlockFindings, MergeError> {
        let (touched, change) = (self.touched, self.change);
        let (dtype, row_bytes) = (touched.tensor.info.dtype, touched.row_bytes());
        let width = dtype.bitsize() / 8;
        let mut block = BlockFindings { n_touched: (bytes.len() / width) as u64, ..BlockFindings::default() };
        let is_hashed = change.before.kept(touched.name()).and_then(Kept::hashes).is_some();
        if is_hashed {
            block.found = RowsHasher::groups(bytes, row_bytes);
        }
        if matches!(touched.work, Work::Nothing { .. }) {
            return Ok(block);
        }
        // Without earlier merges what was found is the original, which can be read again.
        let found = touched.before.map(|_| bytes.to_vec());
        match touched.origin {
            Origin::Here => change.lay_under(ctx, touched, rows, bytes)?,
            Origin::Ledger(_) | Origin::Base(_) => {
                bytes.copy_from_slice(&change.original_rows(ctx, touched, rows)?);
            }
        }
        block.beneath = RowsHasher::groups(bytes, row_bytes);
        let Some((target, prepared)) = touched.after.zip(self.prepared.as_ref()) else { return Ok(block) };
        for (source, adapter, sparse) in target.sparse().filter(|(.., sparse)| !sparse.transposed) {
            let columns = adapter.read_rows(ctx, sparse, rows.clone())?.columns;
            let n_rows = (rows.end - rows.start) as usize;
            let rows = RowBlock::new(bytes, dtype, n_rows, target.n_columns as usize);
            block.anchored.push((source.id, gather(rows, &columns)));
        }
        if self.keep == Some(KeptOriginals::Whole) {
            block.originals = bytes.to_vec();
        }
        if self.bound.needs_originals() {
            block.largest = largest_magnitude(dtype, bytes);
        }
        block.counts = merge_rows(ctx, change.computer, prepared, rows, bytes)?;
        if block.counts.overflowed > 0 {
            let found = found.map_or_else(|| change.original_rows(ctx, touched, rows), Ok)?;
            let lost = overflows(dtype, &found, bytes);
            let place = |at: usize| (rows.start + at as u64 / target.n_columns, at as u64 % target.n_columns);
            block.overflowed = lost.first().map(|&first| (lost.len() as u64, place(first)));
        }
        block.merged = RowsHasher::groups(bytes, row_bytes);
        Ok(block)
    }
}
