//! What a change finds on the checkpoint: whether `before` is what lies there, whether the adapters of `after` were made for
//! it, and the originals that `after` has to remember.
//!
//! The values may come from the disk, or from rows that a copy has in memory anyway; then the same look also gives what to write there.

use std::{collections::BTreeMap, ops::Range};

use super::{
    KeptOriginals, MergeError,
    change::{Beneath, Change, Origin, Touched, Work},
    compute::{Bound, RowsHasher, bound_of},
    examine_tensor::{BlockFindings, TensorExamination},
    findings::{Findings, MAX_EXAMPLES, WrongOriginal},
    ledger::{Kept, KeptHashes, LedgerWriter},
    plan::{MergeTarget, record},
    plausible::{can_overflow, needs_originals},
};
use crate::{
    adapter::AdapterId,
    backend::{PatchCounts, largest_magnitude, pick},
    checkpoint::{BaseValues, Context, Printable, TensorRef, for_each_ordered, gather_cost, window_cost},
    tensor::RowLayout,
};

impl Change<'_> {
    /// How much the adapters that are added can change each tensor at most, by name; reads them once.
    pub(super) fn bounds(
        &self,
        ctx: &Context<'_>,
        touched: &[Touched<'_>],
    ) -> Result<BTreeMap<String, Bound>, MergeError> {
        let mut bounds = BTreeMap::new();
        let added = |target: &&MergeTarget<'_>| target.terms.iter().any(|term| self.adds(term.source.id));
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
        let sum =
            target.sparse().map(|(source, adapter, sparse)| MergeTarget::largest_delta(source, adapter, sparse)).sum();
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
    /// By tensor, what [`Self::finish`] goes on with.
    later: BTreeMap<String, Later>,
}

/// Per sparse adapter, the originals at its positions, hashed.
type Anchors = BTreeMap<AdapterId, blake3::Hasher>;

/// What was gathered of a tensor that is worked on as a whole.
struct Later {
    anchors: Anchors,
    /// The hash that the base's tensor must have.
    base: Option<String>,
}

/// What is gathered of a tensor.
#[derive(Default)]
struct Current {
    counts: PatchCounts,
    anchors: Anchors,
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
        Self {
            change,
            bounds,
            ledger,
            findings: Findings::default(),
            current: Current::default(),
            later: BTreeMap::new(),
        }
    }

    /// Makes a tensor ready to be looked at.
    pub(super) fn examine(
        &self,
        ctx: &Context<'_>,
        touched: &'a Touched<'a>,
    ) -> Result<TensorExamination<'a>, MergeError> {
        TensorExamination::new(ctx, self.change, touched, self.bounds.get(touched.name()))
    }

    /// Examines a whole tensor on disk.
    pub(super) fn on_disk(&mut self, ctx: &Context<'_>, touched: &Touched<'_>) -> Result<(), MergeError> {
        let of_tensor = TensorExamination::new(ctx, self.change, touched, self.bounds.get(touched.name()))?;
        let own_bytes = |rows: &Range<u64>| match touched.work {
            Work::Positions(_) => gather_cost(ctx),
            _ => 3 * window_cost((rows.end - rows.start) * touched.row_bytes()),
        };
        for_each_ordered(
            ctx,
            self.change.blocks(ctx, touched),
            |rows| of_tensor.block_bytes(ctx, rows) + own_bytes(rows),
            |rows| of_tensor.on_disk(ctx, rows),
            |rows, block| self.push(ctx, &of_tensor, &rows, block),
        )?;
        self.finish(ctx, &[touched])
    }

    /// Takes in the block `rows`; a tensor's first block begins it, its last ends it.
    pub(super) fn push(
        &mut self,
        ctx: &Context<'_>,
        of_tensor: &TensorExamination<'_>,
        rows: &Range<u64>,
        block: BlockFindings,
    ) -> Result<(), MergeError> {
        let touched = of_tensor.touched;
        let info = touched.tensor.info;
        if rows.start == 0 {
            self.begin(of_tensor)?;
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
            self.end(ctx, of_tensor)?;
        }
        Ok(())
    }

    fn begin(&mut self, of_tensor: &TensorExamination<'_>) -> Result<(), MergeError> {
        let touched = of_tensor.touched;
        let deltas = |(&id, &delta): (&AdapterId, &f64)| needs_originals(delta).then_some((id, 0.0));
        let largest = of_tensor.bound.by_source.iter().filter_map(deltas).collect();
        self.current = Current { largest, ..Current::default() };
        let Some(ledger) = self.ledger.as_deref_mut().filter(|_| touched.after.is_some()) else { return Ok(()) };
        match (touched.work, of_tensor.keep) {
            (Work::Positions(layout), _) => ledger.begin_positions(touched.tensor.info, layout.transposed),
            (Work::Rows { .. }, Some(KeptOriginals::Whole)) => {
                ledger.begin_whole(touched.tensor.info);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Compares what was gathered of a tensor with what is known of it, and ends it in the ledger.
    fn end(&mut self, ctx: &Context<'_>, of_tensor: &TensorExamination<'_>) -> Result<(), MergeError> {
        let touched = of_tensor.touched;
        let name = touched.name();
        let (hashes, base) = self.compare_hashes(of_tensor);
        if matches!(touched.work, Work::Nothing { .. }) {
            self.carry_over(ctx, of_tensor)?;
        } else if touched.after.is_some() {
            self.findings.counts.insert(name.to_owned(), self.current.counts);
        }
        for (&id, &original) in &self.current.largest {
            let delta = of_tensor.bound.by_source.get(&id).copied().unwrap_or(0.0);
            let index = self.change.after.active.iter().position(|source| source.id == id);
            self.findings.implausible.compare(index.unwrap_or(0), name, delta, original);
        }
        let anchors = std::mem::take(&mut self.current.anchors);
        match touched.work {
            Work::Rows { .. } => _ = self.later.insert(name.to_owned(), Later { anchors, base }),
            Work::Positions(_) | Work::Nothing { .. } => self.compare_anchors(touched, &anchors),
        }
        let is_gathered_later = matches!(touched.work, Work::Rows { .. })
            && touched.after.is_some_and(|target| target.positions().is_some());
        if !is_gathered_later {
            self.end_target(touched, hashes);
        }
        Ok(())
    }

    /// Ends a tensor in the ledger.
    fn end_target(&mut self, touched: &Touched<'_>, hashes: Option<KeptHashes>) {
        let (Some(ledger), Some(target)) = (self.ledger.as_deref_mut(), touched.after) else { return };
        let active = &self.change.after.active;
        let terms = target.terms.iter().map(|term| {
            let index = active.iter().position(|source| source.id == term.source.id);
            record(target, term, index.expect("its adapter is active"))
        });
        ledger.end_target(touched.tensor.info, target.n_columns, terms.collect(), hashes);
    }

    /// Looks at what could not be looked at while blocks came in, since that takes passes of its own: nobody may begin one inside another.
    pub(super) fn finish(&mut self, ctx: &Context<'_>, touched: &[&Touched<'_>]) -> Result<(), MergeError> {
        for touched in touched {
            let Some(Later { mut anchors, base }) = self.later.remove(touched.name()) else { continue };
            self.compare_before(ctx, touched)?;
            if let Some(base) = base {
                // What will be needed to take it out again, and to roll back.
                let tensor = self.change.in_base(touched.tensor)?;
                if hash_of(ctx, self.change, touched, tensor)? != base {
                    self.findings.wrong_originals.push((touched.name().to_owned(), WrongOriginal::Base));
                }
            }
            let Some(target) = touched.after else { continue };
            match target.positions() {
                // It was changed as a whole, and is not any more: what is kept of it now is gathered from beneath.
                Some(layout) => {
                    self.keep_positions(ctx, touched, layout, &mut anchors)?;
                    self.end_target(touched, None);
                }
                None => self.anchor_transposed(ctx, touched, target, &mut anchors)?,
            }
            self.compare_anchors(touched, &anchors);
        }
        Ok(())
    }

    /// Of a tensor that single elements of were changed in, and that is changed as a whole now: whether they are as they were left.
    fn compare_before(&mut self, ctx: &Context<'_>, touched: &Touched<'_>) -> Result<(), MergeError> {
        let kept = self.change.before.kept(touched.name());
        let (Work::Rows { .. }, Some(Kept::Positions(_)), Some(before)) = (touched.work, kept, touched.before) else {
            return Ok(());
        };
        let layout = before.positions().expect("positions are kept of what has them");
        let as_before = Touched { after: None, work: Work::Positions(layout), ..*touched };
        let of_tensor = TensorExamination::before(self.change, &as_before);
        let (mut n_changed, mut changed) = (0, Vec::new());
        for_each_ordered(
            ctx,
            self.change.blocks(ctx, &as_before),
            |rows| self.change.before.rows_bytes(ctx, touched.name(), rows) + gather_cost(ctx),
            |rows| of_tensor.compare_before(ctx, layout, rows),
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

    /// Compares the hashes of a tensor that was or is changed as a whole; returns those that the ledger keeps, and that which the base must
    /// have.
    fn compare_hashes(&mut self, of_tensor: &TensorExamination<'_>) -> (Option<KeptHashes>, Option<String>) {
        let touched = of_tensor.touched;
        let name = touched.name();
        let (found, base, merged) =
            (self.current.found.finish(), self.current.beneath.finish(), self.current.merged.finish());
        let before = self.change.before.kept(name).and_then(Kept::hashes);
        if let Some(before) = before {
            if found != before.merged {
                self.findings.n_changed_tensors += 1;
                if self.findings.changed.len() < MAX_EXAMPLES {
                    let what = format!("\"{}\": differs from what the merges wrote", Printable(name));
                    self.findings.changed.push(what);
                }
            }
            if matches!(touched.work, Work::Nothing { .. }) {
                return (Some(before.clone()), None);
            }
            if base != before.base {
                let whose = match touched.origin {
                    Origin::Ledger(_) => WrongOriginal::Ledger,
                    _ => WrongOriginal::Base,
                };
                self.findings.wrong_originals.push((name.to_owned(), whose));
            }
        }
        let needs_base = before.is_none()
            && of_tensor.keep == Some(KeptOriginals::Hashes)
            && matches!(touched.origin, Origin::Here)
            && self.change.base.is_some();
        let of_base = needs_base.then(|| base.clone());
        (of_tensor.keep.map(|_| KeptHashes { base, merged }), of_base)
    }

    /// Copies what the ledger keeps of a tensor that stays as it is.
    fn carry_over(&mut self, ctx: &Context<'_>, of_tensor: &TensorExamination<'_>) -> Result<(), MergeError> {
        let touched = of_tensor.touched;
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
    fn keep_positions(
        &mut self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        layout: RowLayout,
        anchors: &mut Anchors,
    ) -> Result<(), MergeError> {
        let change = self.change;
        let at_positions = Touched { before: None, work: Work::Positions(layout), ..*touched };
        let beneath = Beneath { change, touched };
        let mut ledger = self.ledger.as_deref_mut();
        if let Some(ledger) = ledger.as_deref_mut() {
            ledger.begin_positions(touched.tensor.info, layout.transposed)?;
        }
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
    fn anchor_transposed(
        &self,
        ctx: &Context<'_>,
        touched: &Touched<'_>,
        target: &MergeTarget<'_>,
        anchors: &mut Anchors,
    ) -> Result<(), MergeError> {
        let beneath = Beneath { change: self.change, touched };
        for (source, adapter, sparse) in target.sparse().filter(|(.., sparse)| sparse.transposed) {
            let mut hasher = blake3::Hasher::new();
            let as_positions = Touched { work: Work::Positions(sparse.layout), ..*touched };
            for rows in self.change.blocks(ctx, &as_positions) {
                ctx.check()?;
                let columns = adapter.read_rows(ctx, sparse, rows.clone())?.columns;
                hasher.update(&beneath.gather(ctx, touched.tensor, sparse.layout, rows.start, &columns)?);
            }
            anchors.insert(source.id, hasher);
        }
        Ok(())
    }

    fn compare_anchors(&mut self, touched: &Touched<'_>, gathered: &Anchors) {
        let Some(target) = touched.after.filter(|_| !matches!(touched.work, Work::Nothing { .. })) else { return };
        for (source, _, sparse) in target.sparse() {
            let anchors = self.findings.anchors.entry(source.id).or_default();
            let name = touched.name();
            let hash = gathered.get(&source.id).cloned().unwrap_or_default().finalize();
            if hash == sparse.anchor {
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
