//! Creates masks out of core.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Serialize;

use super::{
    Amount, BaseInfo, MaskError, MaskOptions, MaskWriter, Partition, Recipe, Scope, SkippedTensor,
    cut::{Cut, find_cut},
    source::{Source, sources},
    sparse::{POSITION_BYTES, ROW_BYTES},
    targets::{LLAMA_PROJECTIONS, Selection, select_named, select_targets},
};
use crate::{
    backend::{CutRows, KeySpace, cut_rows, gather},
    checkpoint::{
        Checkpoint, CheckpointError, CodedLayout, Context, Existing, Printable, RowScan, RowSpan, RowWindow, TensorRef,
        scan_rows_keeping,
    },
    tensor::{RowBlock, RowColumns, projection_kind},
    weights::{Answers, TargetPattern, WeightMap},
};

/// Bytes per entry while its block is cut at a key: its column, twice, the weight, and whether it is a tie.
const CUT_BYTES: u64 = 20;

/// The selection in one kind of projection.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct MaskKind {
    /// The name of the kind, such as `q_proj`.
    pub kind: String,
    /// Number of tensors.
    pub n_tensors: u64,
    /// Number of rows.
    pub n_rows: u64,
    /// Number of elements.
    pub n_parameters: u64,
    /// Number of chosen entries.
    pub n_chosen: u64,
    /// `n_chosen / n_parameters`.
    pub share: f64,
}

/// The result of creating a mask.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct MaskReport {
    /// The checkpoint's name.
    pub base: String,
    /// Whether this was a dry run: nothing was written.
    pub dry_run: bool,
    /// The score that ranks the weights.
    pub score: String,
    /// The scope in which weights compete.
    pub scope: String,
    /// The partition of the targets that was processed, as in `2/8`, if not all were.
    pub partition: Option<Partition>,
    /// Entries per row, if all rows have the same number (except for shorter rows).
    pub k: Option<u64>,
    /// The selection per kind of projection.
    pub kinds: Vec<MaskKind>,
    /// The selection over all kinds.
    pub total: MaskKind,
    /// Number of elements of all tensors of the model.
    pub n_model_parameters: u64,
    /// `total.n_chosen / n_model_parameters`: the trainable fraction as defined in the paper.
    pub trainable_share: f64,
    /// Targets whose rows are shorter than k, so that each row was chosen completely.
    pub clamped: Vec<String>,
    /// Tensors that match a pattern but cannot be masked.
    pub skipped: Vec<SkippedTensor>,
}

/// Chooses connections of `checkpoint` and writes the mask to `output`, or only reports the result.
///
/// Ranks by score; ties go to the smaller column (in wider scopes: to the smaller tensor name, row, column). The mask
/// is the same for any number of threads and any window size. Row scope reads the targets once. The wider scopes read
/// them twice if the keys of the chosen entries, at 8 bytes each, fit in a quarter of [`Context::max_memory`];
/// otherwise once per 16 bits of a key, plus once. Memory: a few windows per thread, and those keys.
///
/// ```
/// use neuroada_ckpt::{Checkpoint, Context, Existing, MaskFile, MaskOptions, create_mask};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("mask.safetensors");
/// let checkpoint = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// let report = create_mask(&Context::default(), &checkpoint, &MaskOptions::new(2), Some((&path, Existing::Keep)))?;
/// assert_eq!(report.total.n_chosen, 2 * report.total.n_rows);
/// assert_eq!(MaskFile::open(&path)?.targets().len(), 14);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`MaskError`]; nothing was written.
///
/// Source: NeuroAda, <https://arxiv.org/abs/2510.18940>.
pub fn create_mask(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    options: &MaskOptions<'_>,
    output: Option<(&Path, Existing)>,
) -> Result<MaskReport, MaskError> {
    options.check()?;
    let selection = match &options.named {
        Some(names) => select_named(checkpoint, names)?,
        None => {
            let map = WeightMap::new(checkpoint, Answers { axes: options.axes.clone(), ..Answers::default() })?;
            map.check_axes(std::iter::empty()).map_err(MaskError::Usage)?;
            select_targets(&map, &options.targets, &options.transposed)?
        }
    };
    let sources = sources(options, &selection)?;
    let mine = match options.partition {
        Some(partition) => {
            let n_bytes: Vec<u64> = sources.iter().map(|source| source.scan.tensor.info.n_bytes()).collect();
            partition.of(&n_bytes)?
        }
        None => (0..sources.len()).collect(),
    };
    let counts = vec![0; sources.len()];
    let mut job = MaskRun { ctx, options, sources: &sources, mine: &mine, writer: None, counts };
    if let Some((path, existing)) = output {
        job.writer = Some(MaskWriter::create(path, existing)?);
    }
    let k = job.k(checkpoint)?;
    let clamped = job.clamped(k);
    if let (Some(k), Some(first)) = (k, clamped.first()) {
        ctx.observer.note(&format!(
            "warning: k {k} is larger than d_in of {} targets, such as {} with {}: all weights of their rows are chosen",
            clamped.len(),
            Printable(&first.scan.tensor.info.name),
            first.scan.layout.d_in
        ));
    }
    match (options.scope, k) {
        (Scope::Row, Some(k)) => job.choose_per_row(k)?,
        (Scope::Tensor, _) => {
            let n_chosen = job.per_tensor(checkpoint);
            for &target in &mine {
                job.choose_at_cut(&[target], n_chosen[target])?;
            }
        }
        _ => {
            let n = job.n_total(checkpoint);
            job.choose_at_cut(&mine, n)?;
        }
    }
    for other in [Some(checkpoint), options.gradients, options.activations].into_iter().flatten() {
        other.unchanged()?;
    }
    let mut report = job.report(checkpoint, k);
    report.dry_run = output.is_none();
    report.skipped.clone_from(&selection.skipped);
    if let Some(writer) = job.writer {
        writer.finish(ctx, &recipe(options, &selection, k), &BaseInfo::of(checkpoint))?;
    }
    Ok(report)
}

/// Patterns that match exactly the targets stored as `[d_in, d_out]`: the given ones, then kinds, and full names if a
/// kind is stored both ways.
fn transposed_patterns(options: &MaskOptions<'_>, selection: &Selection<'_>) -> Vec<String> {
    let given: Vec<TargetPattern> = options.transposed.iter().filter_map(|text| text.parse().ok()).collect();
    let (transposed, others): (Vec<_>, Vec<_>) = selection.targets.iter().partition(|scan| scan.layout.transposed);
    let name = |scan: &RowScan<'_>| scan.tensor.info.name.clone();
    let plain: BTreeSet<String> = others.into_iter().map(|scan| projection_kind(&name(scan)).to_owned()).collect();
    let mut found = BTreeSet::new();
    for name in transposed.into_iter().map(name).filter(|name| !given.iter().any(|pattern| pattern.names(name))) {
        let kind = projection_kind(&name);
        found.insert(if plain.contains(kind) { name } else { kind.to_owned() });
    }
    options.transposed.iter().cloned().chain(found).collect()
}

/// Everything needed to repeat the selection.
fn recipe(options: &MaskOptions<'_>, selection: &Selection<'_>, k: Option<u64>) -> Recipe {
    let patterns = match &options.targets[..] {
        [] => LLAMA_PROJECTIONS.map(str::to_owned).into(),
        given => given.to_vec(),
    };
    let budget = match options.amount {
        Amount::K(_) => None,
        Amount::Share(share) => Some(share),
        Amount::Count(count) => Some(count as f64),
    };
    let is_random = options.score == crate::backend::ScoreKind::Random || options.neuron_fraction < 1.0;
    let extra = [("gradients", options.gradients), ("activations", options.activations)];
    Recipe {
        score: options.score.name().to_owned(),
        k,
        budget,
        scope: options.scope.name().to_owned(),
        seed: is_random.then_some(options.seed),
        targets: patterns,
        transposed: transposed_patterns(options, selection),
        neuron_fraction: (options.neuron_fraction < 1.0).then_some(options.neuron_fraction),
        partition: options.partition,
        extra: extra.into_iter().filter_map(|(what, from)| Some((what.to_owned(), from?.name()))).collect(),
    }
}

/// A mask being created.
struct MaskRun<'a> {
    ctx: &'a Context<'a>,
    options: &'a MaskOptions<'a>,
    sources: &'a [Source<'a>],
    /// Indices of the targets in this partition, ascending.
    mine: &'a [usize],
    writer: Option<MaskWriter>,
    /// Number of chosen entries per target.
    counts: Vec<u64>,
}

impl MaskRun<'_> {
    /// Entries per row, as given or as derived from a budget in row scope.
    fn k(&self, checkpoint: &Checkpoint) -> Result<Option<u64>, MaskError> {
        let budget = match self.options.amount {
            Amount::K(k) => return Ok(Some(k)),
            Amount::Share(share) => (share * checkpoint.n_parameters() as f64) as u64,
            Amount::Count(count) => count,
        };
        if self.options.scope != Scope::Row {
            return Ok(None);
        }
        let n_rows: u64 = self.sources.iter().map(Source::n_rows).sum();
        match budget / n_rows {
            0 => Err(MaskError::Usage(format!(
                "a budget of {budget} entries is less than one per row for {n_rows} rows; use a wider scope"
            ))),
            k => Ok(Some(k)),
        }
    }

    /// Number of entries to choose over all targets.
    fn n_total(&self, checkpoint: &Checkpoint) -> u64 {
        let elements = |source: &Source<'_>| source.n_rows() * source.scan.layout.d_in;
        let most: u64 = self.sources.iter().map(elements).sum();
        let wanted = match self.options.amount {
            Amount::K(k) => self.sources.iter().map(|source| k.min(source.scan.layout.d_in) * source.n_rows()).sum(),
            Amount::Share(share) => (share * checkpoint.n_parameters() as f64) as u64,
            Amount::Count(count) => count,
        };
        wanted.min(most)
    }

    /// Number of entries to choose per target: k per row, or the budget divided in proportion to size, with the
    /// largest remainders rounded up.
    fn per_tensor(&self, checkpoint: &Checkpoint) -> Vec<u64> {
        if let Amount::K(k) = self.options.amount {
            return self.sources.iter().map(|source| k.min(source.scan.layout.d_in) * source.n_rows()).collect();
        }
        let sizes: Vec<u64> = self.sources.iter().map(|source| source.n_rows() * source.scan.layout.d_in).collect();
        apportion(self.n_total(checkpoint), &sizes)
    }

    /// Chooses the `k` best entries of each row.
    fn choose_per_row(&mut self, k: u64) -> Result<(), MaskError> {
        if self.writer.is_none() {
            for &target in self.mine {
                let source = &self.sources[target];
                self.counts[target] = source.n_rows() * k.min(source.scan.layout.d_in);
            }
            return Ok(());
        }
        let (ctx, sources, mine) = (self.ctx, self.sources, self.mine);
        let scans: Vec<RowScan<'_>> = mine.iter().map(|&target| sources[target].scan).collect();
        let chooser = self.options.chooser;
        let mut progress = Progress::default();
        let held = |target: usize| {
            let source = &sources[mine[target]];
            source.held(ROW_BYTES + k.min(source.scan.layout.d_in) * POSITION_BYTES / 2)
        };
        scan_rows_keeping(
            ctx,
            "choosing",
            &scans,
            held,
            self.options.hash,
            |span, block| {
                let source = &sources[mine[span.target]];
                let k = k.min(source.scan.layout.d_in) as usize;
                let mut rows = BlockColumns::new(span.n_rows, 0);
                source.for_each_run(ctx, source.key_space(), span, block, |run, scored| {
                    let columns = chooser.topk_rows(scored, k)?;
                    if run.len() == span.n_rows {
                        rows.columns = RowColumns::uniform(columns, k);
                    } else {
                        rows.skip_to(run.start);
                        columns.chunks_exact(k).for_each(|columns| rows.columns.push_row(columns));
                    }
                    Ok(())
                })?;
                Ok(Chosen::new(rows.finish(span.n_rows), block))
            },
            |span, chosen, window| {
                let target = mine[span.target];
                let source = &sources[target];
                let uniform = source.has_all_rows().then_some(k.min(source.scan.layout.d_in));
                self.push(&mut progress, target, span, (chosen, window), uniform)
            },
        )
    }

    /// Chooses the `n` best entries among all rows of `targets`.
    fn choose_at_cut(&mut self, targets: &[usize], n: u64) -> Result<(), MaskError> {
        let (ctx, sources) = (self.ctx, self.sources);
        let space = targets.iter().map(|&target| sources[target].key_space()).reduce(KeySpace::common);
        let space = space.expect("there is a target");
        let scans: Vec<RowScan<'_>> = targets.iter().map(|&target| sources[target].scan).collect();
        let competing: Vec<&Source<'_>> = targets.iter().map(|&target| &sources[target]).collect();
        let Cut { key, mut n_ties } = find_cut(ctx, &competing, space, n)?;
        let max_ties = n_ties;
        let mut progress = Progress::default();
        let held = |target: usize| {
            let source = &sources[targets[target]];
            // The chosen entries may all be close together.
            source.held(ROW_BYTES + n.min(source.scan.layout.d_in) * CUT_BYTES)
        };
        scan_rows_keeping(
            ctx,
            "choosing",
            &scans,
            held,
            self.options.hash,
            |span, block| {
                let source = &sources[targets[span.target]];
                let mut rows = BlockColumns::new(span.n_rows, 1);
                let mut is_tie = Vec::new();
                source.for_each_run(ctx, space, span, block, |run, scored| {
                    rows.skip_to(run.start);
                    let CutRows { columns, is_tie: ties } = cut_rows(scored, key, max_ties)?;
                    (0..columns.n_rows()).for_each(|row| rows.columns.push_row(columns.row(row)));
                    is_tie.extend(ties);
                    Ok(())
                })?;
                Ok((Chosen::new(rows.finish(span.n_rows), block), is_tie))
            },
            |span, (chosen, is_tie), window| {
                // Ties go to the first entries in order; the blocks did not know how many were left.
                let chosen = chosen.without_ties_past(&mut n_ties, &is_tie);
                self.push(&mut progress, targets[span.target], span, (chosen, window), None)
            },
        )
    }

    /// Passes a block's rows to the writer, target by target; `window` is set if whole tensors are hashed.
    fn push(
        &mut self,
        progress: &mut Progress,
        target: usize,
        span: RowSpan,
        (chosen, window): (Chosen, Option<&RowWindow>),
        uniform_k: Option<u64>,
    ) -> Result<(), MaskError> {
        let RowScan { tensor, layout } = self.sources[target].scan;
        self.counts[target] += chosen.columns.nnz() as u64;
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if span.first_row == 0 {
            let info = tensor.info;
            writer.begin_target(&info.name, info.dtype, &info.shape, layout.transposed, uniform_k)?;
            writer.quantized_as(tensor.layout().map(CodedLayout::name));
            *progress = Progress::default();
        }
        writer.push_rows(&chosen.columns, &chosen.base_values)?;
        let is_as_stored = !layout.transposed && tensor.layout().is_none();
        if let Some(window) = window.filter(|_| is_as_stored) {
            progress.whole.update(window.block().bytes());
        }
        if span.first_row + span.n_rows as u64 == layout.n_rows() {
            let whole = match (self.options.hash, is_as_stored) {
                (false, _) => None,
                (true, true) => Some(progress.whole.finalize()),
                // The rows arrived in another form or order than they are stored.
                (true, false) => Some(whole_tensor(self.ctx, tensor)?),
            };
            writer.end_target(whole);
        }
        Ok(())
    }

    /// The targets whose rows are shorter than `k`, in row scope.
    fn clamped(&self, k: Option<u64>) -> Vec<&Source<'_>> {
        let per_row = k.filter(|_| self.options.scope == Scope::Row);
        let is_clamped = |source: &&Source<'_>| per_row.is_some_and(|k| k > source.scan.layout.d_in);
        self.mine.iter().map(|&target| &self.sources[target]).filter(is_clamped).collect()
    }

    fn report(&self, checkpoint: &Checkpoint, k: Option<u64>) -> MaskReport {
        let mut kinds: BTreeMap<&str, MaskKind> = BTreeMap::new();
        let mut total = empty_kind("total");
        for &target in self.mine {
            let (source, n_chosen) = (&self.sources[target], self.counts[target]);
            let RowScan { tensor, layout } = source.scan;
            let kind = projection_kind(&tensor.info.name);
            for kind in [kinds.entry(kind).or_insert_with(|| empty_kind(kind)), &mut total] {
                kind.n_tensors += 1;
                kind.n_rows += layout.n_rows();
                kind.n_parameters += layout.n_elements();
                kind.n_chosen += n_chosen;
                kind.share = kind.n_chosen as f64 / kind.n_parameters as f64;
            }
        }
        let per_row = k.filter(|_| self.options.scope == Scope::Row);
        let n_model_parameters = checkpoint.n_parameters();
        MaskReport {
            base: checkpoint.name(),
            dry_run: false,
            score: self.options.score.name().to_owned(),
            scope: self.options.scope.name().to_owned(),
            partition: self.options.partition,
            k: per_row,
            kinds: kinds.into_values().collect(),
            trainable_share: total.n_chosen as f64 / n_model_parameters as f64,
            total,
            n_model_parameters,
            clamped: self.clamped(k).into_iter().map(|source| source.scan.tensor.info.name.clone()).collect(),
            skipped: Vec::new(),
        }
    }
}

fn empty_kind(kind: &str) -> MaskKind {
    MaskKind { kind: kind.to_owned(), n_tensors: 0, n_rows: 0, n_parameters: 0, n_chosen: 0, share: 0.0 }
}

/// State of the target being written.
#[derive(Default)]
struct Progress {
    /// The hash of its bytes so far.
    whole: blake3::Hasher,
}

/// The columns of a block; rows that do not take part stay empty.
struct BlockColumns {
    columns: RowColumns,
}

impl BlockColumns {
    fn new(n_rows: usize, k: usize) -> Self {
        Self { columns: RowColumns::with_capacity(n_rows, n_rows * k) }
    }
    fn skip_to(&mut self, row: usize) {
        while self.columns.n_rows() < row {
            self.columns.push_row(&[]);
        }
    }
    fn finish(mut self, n_rows: usize) -> RowColumns {
        self.skip_to(n_rows);
        self.columns
    }
}

/// The chosen columns of a block, and the base's bytes there.
struct Chosen {
    columns: RowColumns,
    base_values: Vec<u8>,
}

impl Chosen {
    fn new(columns: RowColumns, block: RowBlock<'_>) -> Self {
        let base_values = gather(block, &columns);
        Self { columns, base_values }
    }

    /// Keeps the first `n_ties` of the entries marked as ties, and decreases the count.
    fn without_ties_past(self, n_ties: &mut u64, is_tie: &[bool]) -> Self {
        let n = is_tie.iter().filter(|&&is_tie| is_tie).count() as u64;
        if n <= *n_ties {
            *n_ties -= n;
            return self;
        }
        let width = self.base_values.len() / self.columns.nnz().max(1);
        let mut kept = Self { columns: RowColumns::with_capacity(self.columns.n_rows(), 0), base_values: Vec::new() };
        let mut row_columns = Vec::new();
        for row in 0..self.columns.n_rows() {
            row_columns.clear();
            for at in self.columns.row_range(row) {
                if is_tie[at] {
                    if *n_ties == 0 {
                        continue;
                    }
                    *n_ties -= 1;
                }
                row_columns.push(self.columns.columns()[at]);
                kept.base_values.extend_from_slice(&self.base_values[at * width..(at + 1) * width]);
            }
            kept.columns.push_row(&row_columns);
        }
        kept
    }
}

/// Divides `n` in proportion to `sizes`: rounded down, with the largest remainders rounded up (ties: the first).
fn apportion(n: u64, sizes: &[u64]) -> Vec<u64> {
    let total: u128 = sizes.iter().map(|&size| u128::from(size)).sum();
    let exact = |size: u64| u128::from(n) * u128::from(size);
    let mut shares: Vec<u64> = sizes.iter().map(|&size| (exact(size) / total) as u64).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(exact(sizes[i]) % total), i));
    let left = n - shares.iter().sum::<u64>();
    for &i in order.iter().take(left as usize) {
        shares[i] += 1;
    }
    shares
}

/// The BLAKE3 hash of all stored bytes of a weight; for a quantized weight, codes before scales.
fn whole_tensor(ctx: &Context<'_>, tensor: TensorRef<'_>) -> Result<blake3::Hash, CheckpointError> {
    let mut hasher = blake3::Hasher::new();
    for (shard, info) in tensor.stored() {
        for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
            ctx.check()?;
            let window = shard.window(ctx, info, start..info.n_bytes().min(start + ctx.window_bytes()))?;
            hasher.update(&window);
            shard.confirm(&window)?;
        }
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_divided_by_largest_remainder() {
        assert_eq!(apportion(10, &[1, 1, 1]), [4, 3, 3]);
        assert_eq!(apportion(7, &[100, 10, 1]), [6, 1, 0]);
        assert_eq!(apportion(0, &[5, 5]), [0, 0]);
        assert_eq!(apportion(u64::MAX / 2, &[u64::MAX / 2, 1]).iter().sum::<u64>(), u64::MAX / 2);
    }
}
