//! What a change finds on the checkpoint: whether `before` is what lies there, whether the adapters of `after` were made for
//! it, and the originals that `after` has to remember.
//!
//! The values may come from the disk, or from rows that a copy has in memory anyway; then the same look also gives what to write there.

use std::{collections::BTreeMap, ops::Range};

use super::{
    KeptOriginals, MergeError,
    change::{Beneath, Change, Origin, Touched, Work, hex, positions, put, touched_by_either},
    compute::{Bound, Prepared, RowsHasher, bound_of, merge_cost, merge_rows},
    findings::{Findings, MAX_EXAMPLES, WrongOriginal},
    ledger::{Kept, KeptHashes, LedgerWriter},
    plan::{Target, record},
    plausible::{can_overflow, needs_originals},
};
use crate::{
    adapter::AdapterId,
    backend::{PatchCounts, gather, largest_magnitude, overflows, pick},
    checkpoint::{
        BaseValues, CheckpointError, Context, Printable, TensorRef, for_each_ordered, gather_cost, gather_rows,
        window_cost,
    },
    tensor::{RowBlock, RowColumns, RowLayout},
};

/// What one block of rows contributes.
#[derive(Default)]
pub(super) struct BlockFindings {
    counts: PatchCounts,
    n_touched: u64,
    n_changed: u64,
    changed: Vec<String>,
    /// Weights that are finite before the change and not after it: how many, and the row and column of the first.
    overflowed: Option<(u64, (u64, u64))>,
    /// The positions and originals of `after`, of a tensor that is worked on at positions.
    kept: Option<(RowColumns, Vec<u8>)>,
    /// Per sparse adapter of `after` on this tensor: originals at its columns.
    anchored: Vec<(AdapterId, Vec<u8>)>,
    /// Of a tensor that is worked on as a whole, hashes of its groups of rows: as found, beneath, and afterwards.
    found: Vec<u8>,
    beneath: Vec<u8>,
    merged: Vec<u8>,
    /// The original rows, where they are kept.
    originals: Vec<u8>,
    /// The largest magnitude of an original, where it is needed.
    largest: f64,
}

/// A touched tensor, ready to be looked at.
pub(super) struct Look<'c> {
    pub(super) touched: &'c Touched<'c>,
    change: &'c Change<'c>,
    /// Of a tensor that is worked on as a whole and stays touched.
    prepared: Option<Prepared<'c>>,
    /// What is known of deltas of adapters that are added.
    bound: Bound,
    keep: Option<KeptOriginals>,
}

impl<'c> Look<'c> {
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
    fn on_disk(&self, ctx: &Context<'_>, rows: &Range<u64>) -> Result<BlockFindings, MergeError> {
        let Touched { tensor, work, .. } = *self.touched;
        let n_bytes = (rows.end - rows.start) * self.touched.row_bytes();
        let block = match work {
            Work::Positions(layout) => {
                let from_disk = |columns: &RowColumns| gather_rows(ctx, tensor, layout, rows.start, columns);
                self.at_positions(ctx, layout, rows, from_disk)?.0
            }
            Work::Rows { .. } | Work::Nothing { .. } => {
                let start = rows.start * self.touched.row_bytes();
                let window = tensor.window(ctx, start..start + n_bytes)?;
                let mut bytes = window.to_vec();
                tensor.shard.confirm(&window)?;
                self.at_rows(ctx, rows, &mut bytes)?
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
        let is_hashed = matches!(change.before.kept(touched.name()), Some(Kept::Hash(_) | Kept::Whole(_)));
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

impl Change<'_> {
    /// What is kept of a tensor as a whole; none of one of which single elements are kept, or nothing.
    pub(super) fn keeps(&self, touched: &Touched<'_>) -> Option<KeptOriginals> {
        let after = touched.after?;
        match (touched.work, self.before.kept(touched.name())) {
            (Work::Positions(_), _) => None,
            (Work::Rows { .. }, _) if after.positions().is_some() => None,
            (_, Some(Kept::Whole(_))) => Some(KeptOriginals::Whole),
            (_, Some(Kept::Hash(_))) => Some(KeptOriginals::Hashes),
            (_, Some(Kept::Positions(_)) | None) => Some(self.keep),
        }
    }

    /// Whether an adapter is added by the change.
    fn adds(&self, id: AdapterId) -> bool {
        !self.before.active.iter().any(|before| before.id == id)
    }

    /// How much the adapters that are added can change each tensor at most, by name; reads them once.
    pub(super) fn bounds(
        &self,
        ctx: &Context<'_>,
        touched: &[Touched<'_>],
    ) -> Result<BTreeMap<String, Bound>, MergeError> {
        let mut bounds = BTreeMap::new();
        let added = |target: &&Target<'_>| target.terms.iter().any(|term| self.adds(term.source.id));
        for_each_ordered(
            ctx,
            touched.iter().filter_map(|touched| touched.after.filter(added)).collect::<Vec<_>>(),
            |_| 4 * window_cost(ctx.window_bytes()),
            |target| Ok(bound_of(ctx, target)?),
            |target, mut bound| {
                bound.by_source.retain(|&id, _| self.adds(id));
                bounds.insert(target.name().to_owned(), bound);
                Ok::<_, MergeError>(())
            },
        )?;
        Ok(bounds)
    }

    /// Checks every touched element and every anchor, and records the originals of `after` in `ledger`.
    ///
    /// Reads the touched rows of the checkpoint once. Writes nothing but the ledger. Memory: a few blocks per thread.
    pub(super) fn examine(
        &self,
        ctx: &Context<'_>,
        touched: &[Touched<'_>],
        bounds: &BTreeMap<String, Bound>,
        ledger: Option<&mut LedgerWriter>,
    ) -> Result<Findings, MergeError> {
        ctx.observer.begin("checking", touched.iter().map(|t| t.tensor.info.n_bytes()).sum());
        let mut examination = Examination::new(self, bounds, ledger);
        for target in touched {
            examination.on_disk(ctx, target)?;
        }
        Ok(examination.findings)
    }

    /// Whether a sum of deltas may make a finite weight infinite.
    pub(super) fn may_overflow(&self, touched: &Touched<'_>, bounds: &BTreeMap<String, Bound>) -> bool {
        let Some(target) = touched.after else { return false };
        if let Some(bound) = bounds.get(touched.name()) {
            return bound.can_overflow;
        }
        // None is added here; the others were let in.
        let sum = target.sparse().map(|(source, adapter, sparse)| Target::largest_delta(source, adapter, sparse)).sum();
        can_overflow(touched.tensor.info.dtype, sum)
    }
}

/// Gathers what blocks of rows contribute: a tensor's blocks in order, one tensor after the other.
pub(super) struct Examination<'a, 'l> {
    change: &'a Change<'a>,
    bounds: &'a BTreeMap<String, Bound>,
    ledger: Option<&'l mut LedgerWriter>,
    pub(super) findings: Findings,
    current: Current,
}

/// What is gathered of a tensor.
#[derive(Default)]
struct Current {
    counts: PatchCounts,
    anchors: BTreeMap<AdapterId, blake3::Hasher>,
    /// By adapter, the largest original where its deltas are so large that they are compared with it.
    largest: BTreeMap<AdapterId, f64>,
    found: RowsHasher,
    beneath: RowsHasher,
    merged: RowsHasher,
}

impl<'a, 'l> Examination<'a, 'l> {
    pub(super) fn new(
        change: &'a Change<'a>,
        bounds: &'a BTreeMap<String, Bound>,
        ledger: Option<&'l mut LedgerWriter>,
    ) -> Self {
        Self { change, bounds, ledger, findings: Findings::default(), current: Current::default() }
    }

    /// Makes a tensor ready to be looked at.
    pub(super) fn look(&self, ctx: &Context<'_>, touched: &'a Touched<'a>) -> Result<Look<'a>, MergeError> {
        Look::new(ctx, self.change, touched, self.bounds.get(touched.name()))
    }

    /// Examines a whole tensor on disk.
    pub(super) fn on_disk(&mut self, ctx: &Context<'_>, touched: &Touched<'_>) -> Result<(), MergeError> {
        let look = Look::new(ctx, self.change, touched, self.bounds.get(touched.name()))?;
        let own_bytes = |rows: &Range<u64>| match touched.work {
            Work::Positions(_) => gather_cost(ctx),
            _ => 3 * window_cost((rows.end - rows.start) * touched.row_bytes()),
        };
        for_each_ordered(
            ctx,
            self.change.blocks(ctx, touched),
            |rows| look.block_bytes(ctx, rows) + own_bytes(rows),
            |rows| look.on_disk(ctx, rows),
            |rows, block| self.push(ctx, &look, &rows, block),
        )
    }

    /// Takes in the block `rows`; a tensor's first block begins it, its last ends it.
    pub(super) fn push(
        &mut self,
        ctx: &Context<'_>,
        look: &Look<'_>,
        rows: &Range<u64>,
        block: BlockFindings,
    ) -> Result<(), MergeError> {
        let touched = look.touched;
        let info = touched.tensor.info;
        if rows.start == 0 {
            self.begin(look)?;
        }
        let (current, findings) = (&mut self.current, &mut self.findings);
        current.counts.add(block.counts);
        findings.n_touched += block.n_touched;
        if !matches!(touched.work, Work::Nothing { .. }) {
            findings.n_patched_bytes += block.n_touched * info.dtype.bitsize() as u64 / 8;
        }
        findings.n_changed += block.n_changed;
        let room = MAX_EXAMPLES.saturating_sub(findings.changed.len());
        findings.changed.extend(block.changed.into_iter().take(room));
        if let Some((n, first)) = block.overflowed {
            findings.overflows.add(&info.name, n, first);
        }
        for (id, originals) in &block.anchored {
            current.anchors.entry(*id).or_default().update(originals);
            if let (Some(largest), Work::Positions(_)) = (current.largest.get_mut(id), touched.work) {
                *largest = largest.max(largest_magnitude(info.dtype, originals));
            }
        }
        if matches!(touched.work, Work::Rows { .. }) {
            current.largest.values_mut().for_each(|largest| *largest = largest.max(block.largest));
        }
        current.found.push(&block.found);
        current.beneath.push(&block.beneath);
        current.merged.push(&block.merged);
        if let Some(ledger) = self.ledger.as_deref_mut() {
            if let Some((columns, originals)) = &block.kept {
                ledger.push_rows(columns, originals)?;
            }
            if !block.originals.is_empty() {
                ledger.push_whole(&block.originals)?;
            }
        }
        if rows.end == touched.n_rows() {
            self.end(ctx, look)?;
        }
        Ok(())
    }

    fn begin(&mut self, look: &Look<'_>) -> Result<(), MergeError> {
        let touched = look.touched;
        let deltas = |(&id, &delta): (&AdapterId, &f64)| needs_originals(delta).then_some((id, 0.0));
        let largest = look.bound.by_source.iter().filter_map(deltas).collect();
        self.current = Current { largest, ..Current::default() };
        let Some(ledger) = self.ledger.as_deref_mut().filter(|_| touched.after.is_some()) else { return Ok(()) };
        match (touched.work, look.keep) {
            (Work::Positions(layout), _) => ledger.begin_positions(touched.tensor.info, layout.transposed),
            (Work::Rows { .. }, Some(KeptOriginals::Whole)) => {
                ledger.begin_whole(touched.tensor.info);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Compares what was gathered of a tensor with what is known of it, and ends it in the ledger.
    fn end(&mut self, ctx: &Context<'_>, look: &Look<'_>) -> Result<(), MergeError> {
        let touched = look.touched;
        let (info, name) = (touched.tensor.info, touched.name());
        self.compare_before(ctx, look)?;
        let hashes = self.compare_hashes(ctx, look)?;
        let is_there = touched.after.is_some();
        if let (Work::Rows { .. }, Some(target)) = (touched.work, touched.after) {
            match target.positions() {
                // It was changed as a whole, and is not any more: what is kept of it now is gathered from beneath.
                Some(layout) => self.keep_positions(ctx, look, layout)?,
                None => self.anchor_transposed(ctx, look, target)?,
            }
        }
        if matches!(touched.work, Work::Nothing { .. }) {
            self.carry_over(ctx, look)?;
        } else if is_there {
            self.findings.counts.insert(name.to_owned(), self.current.counts);
        }
        self.compare_anchors(look);
        for (&id, &original) in &self.current.largest {
            let delta = look.bound.by_source.get(&id).copied().unwrap_or(0.0);
            let index = self.change.after.active.iter().position(|source| source.id == id);
            self.findings.implausible.compare(index.unwrap_or(0), name, delta, original);
        }
        if let (Some(ledger), Some(target)) = (self.ledger.as_deref_mut(), touched.after) {
            let active = &self.change.after.active;
            let terms = target.terms.iter().map(|term| {
                let index = active.iter().position(|source| source.id == term.source.id);
                record(target, term, index.expect("its adapter is active"))
            });
            ledger.end_target(info, target.n_columns, terms.collect(), hashes);
        }
        Ok(())
    }

    /// Of a tensor that single elements of were changed in, and that is changed as a whole now: whether they are as they were left.
    fn compare_before(&mut self, ctx: &Context<'_>, look: &Look<'_>) -> Result<(), MergeError> {
        let touched = look.touched;
        let kept = self.change.before.kept(touched.name());
        let (Work::Rows { .. }, Some(Kept::Positions(_)), Some(before)) = (touched.work, kept, touched.before) else {
            return Ok(());
        };
        let layout = before.positions().expect("positions are kept of what has them");
        let as_before = Touched { after: None, work: Work::Positions(layout), ..*touched };
        let look =
            Look { touched: &as_before, change: self.change, prepared: None, bound: Bound::default(), keep: None };
        let (mut n_changed, mut changed) = (0, Vec::new());
        for_each_ordered(
            ctx,
            self.change.blocks(ctx, &as_before),
            |rows| self.change.before.rows_bytes(ctx, touched.name(), rows) + gather_cost(ctx),
            |rows| {
                let stack = self.change.before.rows(ctx, touched.name(), rows)?;
                let mut block = BlockFindings::default();
                if let Some(before) = stack {
                    let found = gather_rows(ctx, touched.tensor, layout, rows.start, &before.touched)?;
                    let recorded = self.change.recorded(ctx, &as_before, layout, rows, &before)?;
                    let dtype = touched.tensor.info.dtype;
                    let (expected, _) = before.merged(dtype, &recorded);
                    look.compare(rows, &before.touched, &found, &expected, &mut block);
                }
                Ok(block)
            },
            |_, block| {
                n_changed += block.n_changed;
                changed.extend(block.changed);
                Ok::<_, MergeError>(())
            },
        )?;
        self.findings.n_changed += n_changed;
        let room = MAX_EXAMPLES.saturating_sub(self.findings.changed.len());
        self.findings.changed.extend(changed.into_iter().take(room));
        Ok(())
    }

    /// Compares the hashes of a tensor that was or is changed as a whole; returns those that the ledger keeps.
    fn compare_hashes(&mut self, ctx: &Context<'_>, look: &Look<'_>) -> Result<Option<KeptHashes>, MergeError> {
        let touched = look.touched;
        let name = touched.name();
        let (found, base, merged) =
            (self.current.found.finish(), self.current.beneath.finish(), self.current.merged.finish());
        let before = match self.change.before.kept(name) {
            Some(Kept::Hash(hashes) | Kept::Whole(hashes)) => Some(hashes),
            _ => None,
        };
        if let Some(before) = before {
            if found != before.merged {
                self.findings.n_changed_tensors += 1;
                if self.findings.changed.len() < MAX_EXAMPLES {
                    let what = format!("\"{}\": is not what the merges left there", Printable(name));
                    self.findings.changed.push(what);
                }
            }
            if matches!(touched.work, Work::Nothing { .. }) {
                return Ok(Some(before.clone()));
            }
            if base != before.base {
                let whose = match touched.origin {
                    Origin::Ledger(_) => WrongOriginal::Ledger,
                    _ => WrongOriginal::Base,
                };
                self.findings.wrong_originals.push((name.to_owned(), whose));
            }
        } else if look.keep == Some(KeptOriginals::Hashes)
            && matches!(touched.origin, Origin::Here)
            && self.change.base.is_some()
        {
            // What will be needed to take it out again, and to roll back.
            let tensor = self.change.in_base(touched.tensor)?;
            if hash_of(ctx, self.change, touched, tensor)? != base {
                self.findings.wrong_originals.push((name.to_owned(), WrongOriginal::Base));
            }
        }
        Ok(look.keep.map(|_| KeptHashes { base, merged }))
    }

    /// Copies what the ledger keeps of a tensor that stays as it is.
    fn carry_over(&mut self, ctx: &Context<'_>, look: &Look<'_>) -> Result<(), MergeError> {
        let touched = look.touched;
        let Some(ledger) = self.ledger.as_deref_mut() else { return Ok(()) };
        let (Some((shard, info)), Some(Kept::Whole(hashes))) =
            (self.change.before.whole(touched.name()), self.change.before.kept(touched.name()))
        else {
            return Ok(());
        };
        ledger.begin_whole(touched.tensor.info);
        let mut hasher = RowsHasher::default();
        for rows in self.change.blocks(ctx, touched) {
            ctx.check()?;
            let window = shard.window(ctx, info, rows.start * touched.row_bytes()..rows.end * touched.row_bytes())?;
            hasher.push(&RowsHasher::groups(&window, touched.row_bytes()));
            ledger.push_whole(&window)?;
            shard.confirm(&window)?;
        }
        if hasher.finish() != hashes.base {
            self.findings.wrong_originals.push((touched.name().to_owned(), WrongOriginal::Ledger));
        }
        Ok(())
    }

    /// Gathers what is kept of single elements from beneath a tensor that was changed as a whole, and the anchors with it.
    fn keep_positions(&mut self, ctx: &Context<'_>, look: &Look<'_>, layout: RowLayout) -> Result<(), MergeError> {
        let touched = look.touched;
        let change = self.change;
        let at_positions = Touched { before: None, work: Work::Positions(layout), ..*touched };
        let beneath = Beneath { change, touched };
        let mut ledger = self.ledger.as_deref_mut();
        if let Some(ledger) = ledger.as_deref_mut() {
            ledger.begin_positions(touched.tensor.info, layout.transposed)?;
        }
        let anchors = &mut self.current.anchors;
        anchors.clear();
        for_each_ordered(
            ctx,
            change.blocks(ctx, &at_positions),
            |rows| change.after.rows_bytes(ctx, touched.name(), rows) + gather_cost(ctx),
            |rows| {
                let after = change.after.rows(ctx, touched.name(), rows)?.expect("it is touched");
                let originals = beneath.gather(ctx, touched.tensor, layout, rows.start, &after.touched)?;
                Ok((after, originals))
            },
            |_, (after, originals)| {
                let width = touched.tensor.info.dtype.bitsize() / 8;
                for source in &change.after.active {
                    if let Some(columns) = after.columns_of(source.id) {
                        let own = pick(&after.touched, &originals, width, columns);
                        anchors.entry(source.id).or_default().update(&own);
                    }
                }
                match ledger.as_deref_mut() {
                    Some(ledger) => ledger.push_rows(&after.touched, &originals),
                    None => Ok(()),
                }
            },
        )
    }

    /// Gathers the anchors of sparse adapters whose rows are the tensor's columns.
    fn anchor_transposed(&mut self, ctx: &Context<'_>, look: &Look<'_>, target: &Target<'_>) -> Result<(), MergeError> {
        let beneath = Beneath { change: self.change, touched: look.touched };
        for (source, adapter, sparse) in target.sparse().filter(|(.., sparse)| sparse.transposed) {
            let mut hasher = blake3::Hasher::new();
            let as_positions = Touched { work: Work::Positions(sparse.layout), ..*look.touched };
            for rows in self.change.blocks(ctx, &as_positions) {
                ctx.check()?;
                let columns = adapter.read_rows(ctx, sparse, rows.clone())?.columns;
                hasher.update(&beneath.gather(ctx, look.touched.tensor, sparse.layout, rows.start, &columns)?);
            }
            self.current.anchors.insert(source.id, hasher);
        }
        Ok(())
    }

    fn compare_anchors(&mut self, look: &Look<'_>) {
        let Some(target) = look.touched.after else { return };
        if matches!(look.touched.work, Work::Nothing { .. }) {
            return;
        }
        for (source, _, sparse) in target.sparse() {
            let anchors = self.findings.anchors.entry(source.id).or_default();
            let name = look.touched.name();
            let hasher = self.current.anchors.entry(source.id).or_default();
            if hasher.finalize() == sparse.anchor {
                anchors.n_matching += 1;
            } else if anchors.first_mismatch.as_deref().is_none_or(|first| name < first) {
                anchors.first_mismatch = Some(name.to_owned());
            }
        }
    }
}

/// The hash of a tensor, in the rows of its work.
pub(super) fn hash_of(
    ctx: &Context<'_>,
    change: &Change<'_>,
    touched: &Touched<'_>,
    tensor: TensorRef<'_>,
) -> Result<String, MergeError> {
    let row_bytes = touched.row_bytes();
    let mut hasher = RowsHasher::default();
    for_each_ordered(
        ctx,
        change.blocks(ctx, touched),
        |rows| window_cost((rows.end - rows.start) * row_bytes),
        |rows| {
            let window = tensor.window(ctx, rows.start * row_bytes..rows.end * row_bytes)?;
            let groups = RowsHasher::groups(&window, row_bytes);
            tensor.shard.confirm(&window)?;
            Ok(groups)
        },
        |_, groups| {
            hasher.push(&groups);
            Ok::<_, MergeError>(())
        },
    )?;
    Ok(hasher.finish())
}
