//! What a change finds on the checkpoint: whether `before` is what lies there, whether the adapters of `after` were made for
//! it, and the originals that `after` has to remember.
//!
//! The values may come from the disk, at the touched positions alone, or from rows that a copy has in memory anyway; then the
//! same look also gives what to write there.

use std::{collections::BTreeMap, ops::Range};

use super::{
    MergeError,
    change::{Change, Touched, hex, positions, put, row_blocks, touched_by_either},
    ledger::LedgerWriter,
    plausible::{Implausible, Overflows, needs_originals},
    stack::Active,
};
use crate::{
    backend::{PatchCounts, largest_magnitude, merged_values, overflows, pick},
    checkpoint::{CheckpointError, Context, Printable, for_each_ordered, gather_cost, gather_rows},
    tensor::RowColumns,
};

/// Changed weights that are listed one by one.
const MOST_EXAMPLES: usize = 20;

/// What examining a change found.
#[derive(Default)]
pub(super) struct Findings {
    /// Per tensor that `after` touches, by name.
    pub(super) counts: BTreeMap<String, PatchCounts>,
    /// Positions touched before or after.
    pub(super) n_touched: u64,
    /// Weights that are not what `before` left there.
    pub(super) n_changed: u64,
    /// The first of them.
    pub(super) changed: Vec<String>,
    /// Per adapter of `after`: how many of its tensors' anchors match, and the first that does not.
    pub(super) anchors: Vec<Anchors>,
    /// Weights that are finite before the change and not after it.
    pub(super) overflows: Overflows,
    /// Per adapter of `after` that `before` does not have: deltas of no plausible size.
    pub(super) implausible: Implausible,
}

/// How an adapter's anchors compare with the originals.
#[derive(Clone, Default)]
pub(super) struct Anchors {
    pub(super) n_matching: usize,
    pub(super) first_mismatch: Option<String>,
}

/// What one block of rows contributes.
pub(super) struct BlockFindings {
    counts: PatchCounts,
    n_touched: u64,
    n_changed: u64,
    changed: Vec<String>,
    /// Weights that are finite before the change and not after it: how many, and the row and column of the first.
    overflowed: Option<(u64, (u64, u64))>,
    /// The positions and originals of `after`.
    after: Option<(RowColumns, Vec<u8>)>,
    /// Per adapter of `after` with this target: originals at its columns.
    anchored: Vec<Option<Vec<u8>>>,
}

/// The values of all touched positions of a block of rows, before or after a change.
struct Values {
    positions: RowColumns,
    bytes: Vec<u8>,
}

impl Change<'_> {
    /// Checks every touched position and every anchor, and records the originals of `after` in `ledger`.
    ///
    /// Reads the touched rows of the checkpoint once. Writes nothing but the ledger. Memory: a few blocks per thread.
    pub(super) fn examine(
        &self,
        ctx: &Context<'_>,
        touched: &[Touched<'_>],
        ledger: Option<&mut LedgerWriter>,
    ) -> Result<Findings, MergeError> {
        ctx.observer.begin("checking", touched.iter().map(|t| t.tensor.info.n_bytes()).sum());
        let mut examination = Examination::new(self, ledger);
        for target in touched {
            examination.examine_on_disk(ctx, target)?;
        }
        Ok(examination.findings())
    }

    /// Bytes of memory that looking at a block of rows takes at most, beside the rows.
    pub(super) fn block_bytes(&self, ctx: &Context<'_>, target: &Touched<'_>, rows: &Range<u64>) -> u64 {
        self.before.rows_bytes(ctx, target.name, rows) + self.after.rows_bytes(ctx, target.name, rows)
    }

    /// Looks at a block of rows on disk.
    fn examine_block(
        &self,
        ctx: &Context<'_>,
        target: &Touched<'_>,
        rows: &Range<u64>,
    ) -> Result<BlockFindings, MergeError> {
        let from_disk = |columns: &RowColumns| gather_rows(ctx, target.tensor, target.layout, rows.start, columns);
        let (block, _) = self.look(ctx, target, rows, from_disk)?;
        ctx.observer.advance((rows.end - rows.start) * target.tensor.info.n_bytes() / target.layout.n_rows());
        Ok(block)
    }

    /// Looks at a block of rows in memory, each in one piece, and makes of them what `after` says.
    pub(super) fn examine_and_patch(
        &self,
        ctx: &Context<'_>,
        target: &Touched<'_>,
        rows: &Range<u64>,
        bytes: &mut [u8],
    ) -> Result<BlockFindings, MergeError> {
        let width = target.tensor.info.dtype.bitsize() / 8;
        let d_in = target.layout.d_in as usize;
        let place = |row: usize, column: u32| (row * d_in + column as usize) * width;
        let in_memory = |columns: &RowColumns| {
            let mut found = Vec::with_capacity(columns.nnz() * width);
            for (row, column, _) in positions(columns) {
                found.extend_from_slice(&bytes[place(row, column)..][..width]);
            }
            Ok(found)
        };
        let (block, after) = self.look(ctx, target, rows, in_memory)?;
        for (row, column, at) in positions(&after.positions) {
            bytes[place(row, column)..][..width].copy_from_slice(&after.bytes[at * width..(at + 1) * width]);
        }
        Ok(block)
    }

    fn look(
        &self,
        ctx: &Context<'_>,
        target: &Touched<'_>,
        rows: &Range<u64>,
        find: impl FnOnce(&RowColumns) -> Result<Vec<u8>, CheckpointError>,
    ) -> Result<(BlockFindings, Values), MergeError> {
        let Touched { name, tensor, .. } = *target;
        let dtype = tensor.info.dtype;
        let width = dtype.bitsize() / 8;
        let before = self.before.rows(ctx, name, rows)?;
        let after = self.after.rows(ctx, name, rows)?;
        let all = touched_by_either(before.as_ref(), after.as_ref());
        let found = find(&all)?;
        let mut block = BlockFindings {
            counts: PatchCounts::default(),
            n_touched: all.nnz() as u64,
            n_changed: 0,
            changed: Vec::new(),
            overflowed: None,
            after: None,
            anchored: Vec::new(),
        };
        let mut values = found.clone();
        if let Some(before) = &before {
            let recorded = self.before.originals(name, rows, &before.touched)?;
            let (expected, _) = merged_values(dtype, &before.layers(), &before.touched, &recorded);
            let found = pick(&all, &found, width, &before.touched);
            for (row, column, at) in positions(&before.touched) {
                let element = at * width..(at + 1) * width;
                if found[element.clone()] != expected[element.clone()] {
                    block.n_changed += 1;
                    if block.changed.len() < MOST_EXAMPLES {
                        let (found, expected) = (hex(&found[element.clone()]), hex(&expected[element]));
                        let row = rows.start + row as u64;
                        block.changed.push(format!(
                            "\"{}\" [{row}, {column}]: bits {found}, the merges left {expected}",
                            Printable(name)
                        ));
                    }
                }
            }
            put(&all, &mut values, width, &before.touched, &recorded);
        }
        if let Some(after) = &after {
            let originals = pick(&all, &values, width, &after.touched);
            let (merged, counts) = merged_values(dtype, &after.layers(), &after.touched, &originals);
            block.counts = counts;
            block.anchored = (0..self.after.active.len())
                .map(|i| {
                    let columns = self.after.columns_of(after, name, i)?;
                    Some(pick(&after.touched, &originals, width, &columns))
                })
                .collect();
            put(&all, &mut values, width, &after.touched, &merged);
            if counts.overflowed > 0 {
                let lost = overflows(dtype, &found, &values);
                let place = |at: usize| (rows.start + all.row_of(at) as u64, u64::from(all.columns()[at]));
                block.overflowed = lost.first().map(|&first| (lost.len() as u64, place(first)));
            }
            block.after = Some((after.touched.clone(), originals));
        }
        Ok((block, Values { positions: all, bytes: values }))
    }
}

/// Gathers what blocks of rows contribute: a tensor's blocks in order, one tensor after the other.
pub(super) struct Examination<'a, 'l> {
    change: &'a Change<'a>,
    ledger: Option<&'l mut LedgerWriter>,
    findings: Findings,
    /// Of the current tensor: what is counted, and per adapter the originals at its positions.
    counts: PatchCounts,
    hashers: Vec<blake3::Hasher>,
    /// Per adapter, the largest original at its positions, where its deltas are so large that they are compared with it.
    largest: Vec<Option<f64>>,
}

impl<'a, 'l> Examination<'a, 'l> {
    pub(super) fn new(change: &'a Change<'a>, ledger: Option<&'l mut LedgerWriter>) -> Self {
        let n = change.after.active.len();
        let findings = Findings { anchors: vec![Anchors::default(); n], ..Findings::default() };
        let hashers = vec![blake3::Hasher::new(); n];
        Self { change, ledger, findings, counts: PatchCounts::default(), hashers, largest: vec![None; n] }
    }

    /// Examines a whole tensor at its touched positions.
    pub(super) fn examine_on_disk(&mut self, ctx: &Context<'_>, target: &Touched<'_>) -> Result<(), MergeError> {
        let change = self.change;
        for_each_ordered(
            ctx,
            row_blocks(ctx, target, &[change.before, change.after]),
            |rows| change.block_bytes(ctx, target, rows) + gather_cost(ctx),
            |rows| change.examine_block(ctx, target, rows),
            |rows, block| self.push(target, &rows, block),
        )
    }

    /// Takes in the block `rows`; a tensor's first block begins it, its last ends it.
    pub(super) fn push(
        &mut self,
        target: &Touched<'_>,
        rows: &Range<u64>,
        block: BlockFindings,
    ) -> Result<(), MergeError> {
        let in_after = self.change.after.active.iter().any(|active| active.adapter.target(target.name).is_some());
        let mut ledger = self.ledger.as_deref_mut().filter(|_| in_after);
        if rows.start == 0 {
            self.counts = PatchCounts::default();
            self.hashers.fill(blake3::Hasher::new());
            let change = self.change;
            self.largest = change.after.active.iter().map(|active| to_compare(change, active, target.name)).collect();
            if let Some(ledger) = ledger.as_deref_mut() {
                let info = target.tensor.info;
                ledger.begin_target(target.name, info.dtype, &info.shape, target.layout.transposed)?;
            }
        }
        self.counts.add(block.counts);
        self.findings.n_touched += block.n_touched;
        self.findings.n_changed += block.n_changed;
        let room = MOST_EXAMPLES.saturating_sub(self.findings.changed.len());
        self.findings.changed.extend(block.changed.into_iter().take(room));
        if let Some((n, first)) = block.overflowed {
            self.findings.overflows.add(target.name, n, first);
        }
        for ((hasher, largest), originals) in self.hashers.iter_mut().zip(&mut self.largest).zip(&block.anchored) {
            let originals = originals.as_deref().unwrap_or_default();
            hasher.update(originals);
            if let Some(largest) = largest {
                *largest = largest.max(largest_magnitude(target.tensor.info.dtype, originals));
            }
        }
        if let (Some(ledger), Some((columns, originals))) = (ledger.as_deref_mut(), &block.after) {
            ledger.push_rows(columns, originals)?;
        }
        if rows.end == target.layout.n_rows() {
            if let Some(ledger) = ledger {
                ledger.end_target();
            }
            if in_after {
                self.findings.counts.insert(target.name.to_owned(), self.counts);
            }
            self.compare_anchors(target.name);
            self.compare_sizes(target.name);
        }
        Ok(())
    }

    fn compare_anchors(&mut self, name: &str) {
        let actives = self.change.after.active.iter();
        for ((active, hasher), anchors) in actives.zip(&self.hashers).zip(&mut self.findings.anchors) {
            let Some(info) = active.adapter.target(name) else { continue };
            if hasher.finalize() == info.anchor {
                anchors.n_matching += 1;
            } else if anchors.first_mismatch.as_deref().is_none_or(|first| name < first) {
                anchors.first_mismatch = Some(name.to_owned());
            }
        }
    }

    fn compare_sizes(&mut self, name: &str) {
        for (index, (active, original)) in self.change.after.active.iter().zip(&self.largest).enumerate() {
            if let (Some(delta), Some(original)) = (active.largest_delta(name), original) {
                self.findings.implausible.compare(index, name, delta, *original);
            }
        }
    }

    /// What was found in all tensors.
    pub(super) fn findings(self) -> Findings {
        self.findings
    }
}

/// Zero, to be raised, where an adapter that is added has deltas on the tensor `name` that have to be compared with the originals.
fn to_compare(change: &Change<'_>, active: &Active, name: &str) -> Option<f64> {
    let is_added = !change.before.active.iter().any(|before| before.id == active.id);
    (is_added && needs_originals(active.largest_delta(name)?)).then_some(0.0)
}
