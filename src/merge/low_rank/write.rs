//! The new checkpoint: shards copied, merged and hashed in one pass.

use std::{collections::BTreeMap, ops::Range, path::Path};

use super::{
    KeptOriginals, LowRankOptions, LowRankReading,
    bounds::{Bound, bounds},
    compute::{Computer, merge_cost, merge_rows, row_blocks},
    norms::column_factors,
    plan::{Plan, Step, Target},
    record::{LowRankRecord, RecordFolder, RecordedTarget, RowsHasher},
    sources::Source,
};
use crate::{
    backend::{Merger, PatchCounts, gather, largest_magnitude, overflows},
    checkpoint::{
        Checkpoint, Context, CopyMode, Layout, OutputKind, Printable, Shard, StateFolder, TensorFileWriter, TensorId,
        check_output, for_each_ordered, rewrite_shard, share_file, window_cost,
    },
    merge::{
        MergeError, MergeInput, MergeReport,
        new_checkpoint::{Destination, NewCheckpoint, RowBlocks, pieces},
        plausible::{Implausible, Overflows},
        report::kind_reports_of,
        verify::open_base,
    },
    tensor::{RowBlock, dtype_name},
    weights::WeightMap,
};

/// Adds adapters to a checkpoint, of which some or all are low-rank, as a new checkpoint.
///
/// Every weight becomes `round(original + sum_1 * s_1 + …)` in ascending order of the adapters' ids (see this folder's
/// `mod.rs`), the same bytes for every number of threads and any memory. Everything about the adapters is checked before the
/// first byte is written, and so is, unless [`LowRankOptions::allow_overflow`] says otherwise, that no finite weight becomes
/// infinite or NaN; a sparse adapter's anchors are judged before the output gets its name.
///
/// `merger` says who computes where one product and nothing else is added to weights; the rest is the CPU's.
///
/// Memory: a few blocks of rows per thread, within `ctx.max_memory`. Disk: the checkpoint's size and copies of the adapters, and, with
/// [`KeptOriginals::All`], the touched tensors' once more.
///
/// # Errors
/// [`MergeError`]; nothing is left at the output.
pub fn merge_low_rank(
    ctx: &Context<'_>,
    base: &Path,
    adapters: &[MergeInput],
    reading: LowRankReading,
    merger: Merger<'_>,
    options: &LowRankOptions,
) -> Result<MergeReport, MergeError> {
    if adapters.is_empty() {
        return Err(MergeError::Usage("no adapter to merge".to_owned()));
    }
    let checkpoint = open_base(base)?;
    let sources = Source::open_all(ctx, adapters, Some(&checkpoint))?;
    let names: Vec<String> = sources.iter().flat_map(Source::parameters).collect();
    let map = WeightMap::new(&checkpoint, reading.answers())?;
    map.check_renames(names.iter().map(String::as_str)).map_err(MergeError::Usage)?;
    map.check_axes(names.iter().map(String::as_str)).map_err(MergeError::Usage)?;
    let plan = Plan::new(&map, &checkpoint, &sources, &reading)?;
    let job = Job {
        copied: &checkpoint,
        originals: &checkpoint,
        sources: &sources,
        plan: &plan,
        computer: Computer::new(&plan, merger),
        bounds: bounds(ctx, &plan)?,
        allow_overflow: options.allow_overflow,
        base: checkpoint.name(),
        reading,
    };
    let mut report = job.run(ctx, options)?;
    report.added = sources.iter().map(|source| source.id.to_string()).collect();
    Ok(report)
}

/// A new checkpoint to write.
pub(super) struct Job<'a> {
    /// Whose shards are copied.
    pub(super) copied: &'a Checkpoint,
    /// Where the originals of the plan's tensors are.
    pub(super) originals: &'a Checkpoint,
    pub(super) sources: &'a [Source],
    pub(super) plan: &'a Plan<'a>,
    pub(super) computer: Computer<'a>,
    /// Of every target; empty ones where nothing is added.
    pub(super) bounds: Vec<Bound>,
    pub(super) allow_overflow: bool,
    /// What the base is called.
    pub(super) base: String,
    pub(super) reading: LowRankReading,
}

/// What a block of rows contributes.
struct BlockResult {
    counts: PatchCounts,
    base: Vec<u8>,
    merged: Vec<u8>,
    /// Per sparse step of the target: the originals at its columns.
    anchored: Vec<Vec<u8>>,
    originals: Vec<u8>,
    /// The largest magnitude of an original, where it is needed.
    largest: f64,
    /// Finite weights that became infinite or NaN: how many, and the row and column of the first.
    overflowed: Option<(u64, (u64, u64))>,
}

/// A block of rows of one of the plan's targets, or bytes that stay as they are.
type Piece = Option<(usize, Range<u64>)>;

impl Job<'_> {
    /// Writes the checkpoint, or, on a dry run, computes all that would be written.
    pub(super) fn run(&self, ctx: &Context<'_>, options: &LowRankOptions) -> Result<MergeReport, MergeError> {
        let is_file = self.copied.layout() == Layout::File;
        let kind = if is_file { OutputKind::Checkpoint } else { OutputKind::Folder };
        check_output(&options.output, kind, options.existing)?;
        let factors = column_factors(ctx, self.originals, self.plan)?;
        let mut gathering = Gathering::new(self);
        if options.dry_run {
            self.examine(ctx, &factors, |_| true, &mut gathering)?;
            gathering.judge()?;
            self.unchanged()?;
            let n_originals = if options.keep == KeptOriginals::All { self.touched_bytes() } else { 0 };
            return Ok(MergeReport { dry_run: true, ..self.report(&gathering, n_originals) });
        }
        if !self.allow_overflow && self.bounds.iter().any(|bound| bound.can_overflow) {
            let mut gathering = Gathering::new(self);
            self.examine(ctx, &factors, |target| self.bounds[target].can_overflow, &mut gathering)?;
            gathering.judge()?;
        }
        let target = Destination {
            path: &options.output,
            existing: options.existing,
            keep_ledger: options.keep != KeptOriginals::Nothing,
            link: options.link,
            resume: false,
        };
        let output = NewCheckpoint::begin(self.copied, &target, String::new, self.state_bytes(options.keep))?;
        let folder = RecordFolder::of(output.state());
        let state = folder.state();
        if options.keep != KeptOriginals::Nothing {
            state.create()?;
        }
        if options.keep == KeptOriginals::All {
            gathering.originals = Some(TensorFileWriter::create_own(state.folder(), StateFolder::ORIGINALS)?);
        }
        ctx.observer.begin("merging", self.copied.shards().iter().map(Shard::file_bytes).sum());
        for (shard, mut of_shard) in self.copied.shards().iter().zip(self.targets_by_shard()) {
            of_shard.sort_by_key(|&target| self.plan.targets[target].tensor.info.data.start);
            let path = output.shard_path(shard);
            self.write_shard(ctx, (shard, &of_shard), &path, options.link, &factors, &mut gathering)?;
        }
        gathering.judge()?;
        let n_originals = match gathering.originals.take() {
            None => 0,
            Some(writer) => {
                writer.finish(ctx, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
                folder.originals_bytes()?
            }
        };
        output.copy_side_files(ctx)?;
        self.unchanged()?;
        let is_kept = options.keep != KeptOriginals::Nothing && !self.sources.is_empty();
        if is_kept {
            let has_originals = options.keep == KeptOriginals::All;
            let mut record = LowRankRecord::new(self.base.clone(), self.sources, self.reading.clone(), has_originals);
            record.targets = std::mem::take(&mut gathering.recorded);
            folder.write(ctx, &record, self.sources)?;
        }
        output.finish_state(is_kept)?;
        output.commit()?;
        Ok(self.report(&gathering, n_originals))
    }

    /// Computes and hashes touched tensors, those that `is_wanted` by index, without writing.
    fn examine(
        &self,
        ctx: &Context<'_>,
        factors: &[Option<Vec<f32>>],
        is_wanted: impl Fn(usize) -> bool,
        gathering: &mut Gathering<'_>,
    ) -> Result<(), MergeError> {
        let wanted = || self.plan.targets.iter().enumerate().filter(|(index, _)| is_wanted(*index));
        ctx.observer.begin("checking", wanted().map(|(_, target)| target.tensor.info.n_bytes()).sum());
        for (index, target) in wanted() {
            for_each_ordered(
                ctx,
                row_blocks(ctx, target.n_rows, target.n_columns),
                |rows| 2 * window_cost((rows.end - rows.start) * target.row_bytes()) + merge_cost(ctx, target, rows),
                |rows| {
                    let mut bytes = self.original_rows(ctx, target, rows)?;
                    ctx.observer.advance(bytes.len() as u64);
                    self.merge_block(ctx, (index, rows), factors[index].as_deref(), &mut bytes, false)
                },
                |rows, block| gathering.push(index, &rows, block),
            )?;
        }
        Ok(())
    }

    fn write_shard(
        &self,
        ctx: &Context<'_>,
        (shard, of_shard): (&Shard, &[usize]),
        path: &Path,
        link: bool,
        factors: &[Option<Vec<f32>>],
        gathering: &mut Gathering<'_>,
    ) -> Result<(), MergeError> {
        if of_shard.is_empty() {
            let mode = if link { CopyMode::Link } else { CopyMode::Auto };
            if share_file(shard.path(), path, mode)?.is_some() {
                ctx.observer.advance(shard.file_bytes());
                return Ok(());
            }
        }
        let keeps = gathering.originals.is_some();
        let own = self.originals.root() == self.copied.root();
        let row_blocks_of = |index: &usize| {
            let target = &self.plan.targets[*index];
            let info = shard.header().tensor(target.name()).expect("the shard has its targets");
            let rows = row_blocks(ctx, target.n_rows, target.n_columns);
            RowBlocks { tensor: shard.file_range(info), row_bytes: target.row_bytes(), rows }
        };
        rewrite_shard(
            ctx,
            shard,
            path,
            pieces(ctx, shard, of_shard.iter().map(row_blocks_of))
                .map(|(range, rows)| (range, rows.map(|(number, rows)| (of_shard[number], rows)))),
            |piece: &Piece| {
                let Some((index, rows)) = piece else { return 0 };
                let target = &self.plan.targets[*index];
                // Originals from elsewhere, in a window and copied; originals that are kept.
                let n_copies = if own { 0 } else { 2 } + u64::from(keeps);
                merge_cost(ctx, target, rows) + n_copies * window_cost((rows.end - rows.start) * target.row_bytes())
            },
            |piece: &Piece, bytes| {
                let Some((index, rows)) = piece else { return Ok(None) };
                let target = &self.plan.targets[*index];
                if !own {
                    bytes.copy_from_slice(&self.original_rows(ctx, target, rows)?);
                }
                self.merge_block(ctx, (*index, rows), factors[*index].as_deref(), bytes, keeps).map(Some)
            },
            |piece, block| match (piece, block) {
                (Some((index, rows)), Some(block)) => gathering.push(index, &rows, block),
                _ => Ok(()),
            },
        )
    }

    /// For each of the copied checkpoint's shards, the targets in it.
    fn targets_by_shard(&self) -> Vec<Vec<usize>> {
        let mut by_shard = vec![Vec::new(); self.copied.shards().len()];
        for (index, target) in self.plan.targets.iter().enumerate() {
            let tensor = self.copied.tensor(target.name()).expect("the plan was made for these tensors");
            by_shard[tensor.shard_index].push(index);
        }
        by_shard
    }

    fn original_rows(&self, ctx: &Context<'_>, target: &Target<'_>, rows: &Range<u64>) -> Result<Vec<u8>, MergeError> {
        let tensor = self.originals.tensor(target.name()).expect("the originals have the plan's tensors");
        let window = tensor.window(ctx, rows.start * target.row_bytes()..rows.end * target.row_bytes())?;
        let bytes = window.to_vec();
        tensor.shard.confirm(&window)?;
        Ok(bytes)
    }

    /// Merges a block in memory.
    fn merge_block(
        &self,
        ctx: &Context<'_>,
        (index, rows): (usize, &Range<u64>),
        factors: Option<&[f32]>,
        bytes: &mut [u8],
        keeps: bool,
    ) -> Result<BlockResult, MergeError> {
        let target = &self.plan.targets[index];
        let dtype = target.tensor.info.dtype;
        let base = RowsHasher::groups(bytes, target.row_bytes());
        let mut anchored = Vec::new();
        for step in &target.steps {
            if let Step::Sparse { adapter, target: info, .. } = step {
                let columns = adapter.read_rows(ctx, info, rows.clone())?.columns;
                let n_rows = (rows.end - rows.start) as usize;
                let block = RowBlock::new(bytes, dtype, n_rows, target.n_columns as usize);
                anchored.push(gather(block, &columns));
            }
        }
        let originals = if keeps { bytes.to_vec() } else { Vec::new() };
        let largest = if self.bounds[index].needs_originals() { largest_magnitude(dtype, bytes) } else { 0.0 };
        let counts = merge_rows(ctx, &self.computer, target, factors, rows, bytes)?;
        let mut overflowed = None;
        if counts.overflowed > 0 {
            let lost = overflows(dtype, &self.original_rows(ctx, target, rows)?, bytes);
            let place = |at: usize| (rows.start + at as u64 / target.n_columns, at as u64 % target.n_columns);
            overflowed = lost.first().map(|&first| (lost.len() as u64, place(first)));
        }
        let merged = RowsHasher::groups(bytes, target.row_bytes());
        Ok(BlockResult { counts, base, merged, anchored, originals, largest, overflowed })
    }

    fn touched_bytes(&self) -> u64 {
        self.plan.targets.iter().map(|target| target.tensor.info.n_bytes()).sum()
    }

    fn state_bytes(&self, keep: KeptOriginals) -> u64 {
        let adapters: u64 = self.sources.iter().map(Source::n_bytes).sum();
        match keep {
            KeptOriginals::Nothing => 0,
            KeptOriginals::Hashes => adapters,
            KeptOriginals::All => adapters + self.touched_bytes() + (1 << 20),
        }
    }

    fn unchanged(&self) -> Result<(), MergeError> {
        self.sources.iter().try_for_each(Source::unchanged)?;
        self.originals.unchanged()?;
        Ok(self.copied.unchanged()?)
    }

    fn report(&self, gathering: &Gathering<'_>, ledger_bytes: u64) -> MergeReport {
        let (kinds, total) = kind_reports_of(&gathering.counts);
        let n_shards = self.targets_by_shard().iter().filter(|targets| !targets.is_empty()).count();
        let id = |source: usize| self.sources[source].id.short();
        let entry = |(source, &n_tensors): (&Source, &usize)| source.entry(n_tensors);
        MergeReport {
            base: self.base.clone(),
            dry_run: false,
            added: Vec::new(),
            removed: Vec::new(),
            active: self.sources.iter().zip(&self.plan.n_tensors).map(entry).collect(),
            kinds,
            total,
            n_matched: if self.sources.is_empty() { 0 } else { self.plan.targets.len() },
            n_shards: self.copied.shards().len(),
            n_shards_patched: n_shards,
            bytes_checked: self.touched_bytes(),
            bytes_written: self.copied.n_bytes(),
            ledger_bytes,
            notes: self
                .copied
                .notes()
                .into_iter()
                .chain(self.plan.notes.iter().cloned())
                .chain(gathering.implausible.notes(id))
                .collect(),
        }
    }
}

/// What blocks contribute, one tensor after the other, each in order.
pub(super) struct Gathering<'a> {
    plan: &'a Plan<'a>,
    bounds: &'a [Bound],
    /// Where finite weights may not become infinite: the checkpoint.
    keeps_finite: Option<&'a Path>,
    sources: &'a [Source],
    base_name: String,
    /// What goes to the file of originals, where there is one.
    originals: Option<TensorFileWriter>,
    counts: BTreeMap<String, PatchCounts>,
    recorded: BTreeMap<String, RecordedTarget>,
    /// Sparse targets whose base values are others than they were made from: source and tensor.
    mismatches: Vec<(usize, String)>,
    overflows: Overflows,
    implausible: Implausible,
    // Of the current tensor.
    current: PatchCounts,
    base: RowsHasher,
    merged: RowsHasher,
    anchors: Vec<blake3::Hasher>,
    original_id: Option<TensorId>,
    largest: f64,
}

impl<'a> Gathering<'a> {
    fn new(job: &'a Job<'_>) -> Self {
        Self {
            plan: job.plan,
            bounds: &job.bounds,
            keeps_finite: (!job.allow_overflow).then(|| job.copied.root()),
            sources: job.sources,
            base_name: job.copied.name(),
            originals: None,
            counts: BTreeMap::new(),
            recorded: BTreeMap::new(),
            mismatches: Vec::new(),
            overflows: Overflows::default(),
            implausible: Implausible::default(),
            current: PatchCounts::default(),
            base: RowsHasher::default(),
            merged: RowsHasher::default(),
            anchors: Vec::new(),
            original_id: None,
            largest: 0.0,
        }
    }

    /// Takes in a block; a tensor's first block begins it, its last ends it.
    fn push(&mut self, index: usize, rows: &Range<u64>, block: BlockResult) -> Result<(), MergeError> {
        let target = &self.plan.targets[index];
        let info = target.tensor.info;
        if rows.start == 0 {
            self.current = PatchCounts::default();
            self.largest = 0.0;
            self.anchors = vec![blake3::Hasher::new(); block.anchored.len()];
            self.original_id = self.originals.as_mut().map(|writer| writer.add_tensor(info.name.clone(), info.dtype));
        }
        self.current.add(block.counts);
        self.largest = self.largest.max(block.largest);
        if let Some((n, first)) = block.overflowed {
            self.overflows.add(&info.name, n, first);
        }
        self.base.push(&block.base);
        self.merged.push(&block.merged);
        for (hasher, originals) in self.anchors.iter_mut().zip(&block.anchored) {
            hasher.update(originals);
        }
        if let (Some(writer), Some(id)) = (&mut self.originals, self.original_id) {
            writer.append(id, &block.originals)?;
        }
        if rows.end < target.n_rows {
            return Ok(());
        }
        if let (Some(writer), Some(id)) = (&mut self.originals, self.original_id) {
            writer.finish_tensor(id, info.shape.clone());
        }
        let sparse = target.steps.iter().filter_map(|step| match step {
            Step::Sparse { target, source, .. } => Some((target, *source)),
            _ => None,
        });
        for ((sparse, source), hasher) in sparse.zip(&self.anchors) {
            if hasher.finalize() != sparse.anchor {
                self.mismatches.push((source, info.name.clone()));
            }
        }
        for (&source, &delta) in &self.bounds[index].by_source {
            self.implausible.compare(source, &info.name, delta, self.largest);
        }
        let recorded = RecordedTarget {
            dtype: dtype_name(info.dtype),
            shape: info.shape.clone(),
            n_columns: target.n_columns,
            base: self.base.finish(),
            merged: self.merged.finish(),
        };
        self.recorded.insert(info.name.clone(), recorded);
        self.counts.insert(info.name.clone(), self.current);
        Ok(())
    }

    /// Fails where a sparse adapter was made for other values, or where finite weights became infinite and may not.
    fn judge(&mut self) -> Result<(), MergeError> {
        self.mismatches.sort();
        let Some((source, tensor)) = self.mismatches.first() else {
            return self.keeps_finite.map_or(Ok(()), |checkpoint| self.overflows.refuse(checkpoint));
        };
        let what = format!("this is {}; its values at the adapter's positions are others", Printable(&self.base_name));
        Err(MergeError::WrongBase { adapter: self.sources[*source].path().to_owned(), tensor: tensor.clone(), what })
    }
}
