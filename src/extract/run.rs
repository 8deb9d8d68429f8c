//! Two passes over a base and its tuned copy: what changed, then the deltas.

use std::{collections::BTreeMap, path::Path};

use super::{
    ExtractError, ExtractReport, ExtractedTensor, LeftOut, UnfitReason,
    pairs::{TensorPair, pairs},
    report::Totals,
    rows::{Choice, Entries, Survey, entries, survey},
};
use crate::{
    adapter::{Adapter, AdapterNotes, AdapterWriter},
    backend::{ScaledDeltas, merged_values},
    checkpoint::{Checkpoint, CheckpointError, CodedLayout, Context, Existing, Printable, for_each_ordered},
    mask::{BaseInfo, POSITION_BYTES, Recipe},
    tensor::{Dtype, dtype_name, projection_kind},
    weights::KindAxes,
};

/// The types that deltas are stored in, in the order in which they are tried.
const VALUE_TYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// How to extract.
#[derive(Clone, Debug)]
pub struct ExtractOptions {
    /// The most deltas per row, largest changes first; without it the adapter is exact.
    pub k: Option<u64>,
    /// The type that deltas are stored in: F32, BF16 or F16; without it, for each tensor, the first of BF16, F16 and F32 that
    /// is exact (F32 where none is).
    pub dtype: Option<Dtype>,
    /// The largest share of a matrix's elements that may get a delta, 0 to 1.
    pub max_density: f64,
    /// Patterns of tensors that take part; all that can where empty.
    pub targets: Vec<String>,
    /// Patterns of tensors stored as `[d_in, d_out]`.
    pub transposed: Vec<String>,
    /// Which way round kinds of weights are stored, where neither shapes nor the model's type tell.
    pub axes: Vec<KindAxes>,
    /// What people want to know of the adapter.
    pub notes: AdapterNotes,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        Self {
            k: None,
            dtype: None,
            max_density: 0.25,
            targets: Vec::new(),
            transposed: Vec::new(),
            axes: Vec::new(),
            notes: AdapterNotes::default(),
        }
    }
}

/// Writes what turns `base` into `tuned` as an adapter at `output`, or only says what it would hold.
///
/// Without [`ExtractOptions::k`] the result is exact: for each element whose bits differ there is a delta with
/// `round(original + delta) == tuned`, so that merging the adapter gives `tuned` byte for byte. Every merged value is computed
/// and compared before the adapter appears. What no delta can do is refused with a list of tensors: elements that are NaN or infinite,
/// a change so much larger than its result that the sum rounds past it, tensors that are neither matrices nor vectors, matrices of
/// which more than [`ExtractOptions::max_density`] changed. With a `k` the adapter has the `k` largest changes of each row of the
/// matrices (ties to the lower column).
///
/// Reads both checkpoints once, and what changed once more. Memory: a few windows per thread.
///
/// ```
/// use neuroada_ckpt::{Checkpoint, Context, Existing, ExtractOptions, MergeInput, MergeOptions, extract, merge};
/// # let dir = tempfile::tempdir()?;
/// # let (tuned, again, path) = (dir.path().join("tuned"), dir.path().join("again"), dir.path().join("delta.safetensors"));
/// let (ctx, base) = (Context::default(), "fixtures/tiny-llama".as_ref());
/// let shipped = MergeInput { adapter: "fixtures/tiny-llama-adapter.safetensors".into(), scale: None };
/// merge(&ctx, base, &[shipped], &MergeOptions::new_checkpoint(&tuned))?;
///
/// let (from, to) = (Checkpoint::open(base)?, Checkpoint::open(&tuned)?);
/// let report = extract(&ctx, &from, &to, &ExtractOptions::default(), Some((&path, Existing::Keep)))?;
/// assert!(report.exact && report.total.n_deltas == 2255);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ExtractError`]; nothing was written.
pub fn extract(
    ctx: &Context<'_>,
    base: &Checkpoint,
    tuned: &Checkpoint,
    options: &ExtractOptions,
    output: Option<(&Path, Existing)>,
) -> Result<ExtractReport, ExtractError> {
    check(options)?;
    let mut job = Extraction { ctx, base, tuned, options, pairs: pairs(base, tuned, options)?, surveys: Vec::new() };
    let writer = output.map(|(path, existing)| AdapterWriter::create(path, existing, Dtype::F32)).transpose()?;
    job.survey()?;
    job.judge()?;
    if let Some(writer) = writer {
        job.write(writer)?;
    }
    let mut report = job.report();
    if let Some((path, _)) = output {
        let (adapter, id) = Adapter::read_back(ctx, path)?;
        report.id = Some(id.to_string());
        report.n_bytes = Some(adapter.n_bytes());
    }
    report.dry_run = output.is_none();
    Ok(report)
}

/// What cannot be asked for.
fn check(options: &ExtractOptions) -> Result<(), ExtractError> {
    let usage = |what: String| Err(ExtractError::Usage(what));
    if options.k == Some(0) {
        return usage("k is 0: nothing would be extracted".to_owned());
    }
    if !(options.max_density > 0.0 && options.max_density <= 1.0) {
        return usage(format!("the highest density is {}, it must be above 0 and at most 1", options.max_density));
    }
    if let Some(dtype) = options.dtype.filter(|dtype| !VALUE_TYPES.contains(dtype)) {
        return usage(format!("deltas are stored as BF16, F16 or F32, not as {}", dtype_name(dtype)));
    }
    Ok(())
}

struct Extraction<'a> {
    ctx: &'a Context<'a>,
    base: &'a Checkpoint,
    tuned: &'a Checkpoint,
    options: &'a ExtractOptions,
    pairs: Vec<TensorPair<'a>>,
    /// By pair. Of tensors that take no part, `n_changed` counts runs of bytes.
    surveys: Vec<Survey>,
}

impl Extraction<'_> {
    /// The value types that are asked about.
    fn types(&self) -> &[Dtype] {
        self.options.dtype.as_ref().map_or(&VALUE_TYPES, std::slice::from_ref)
    }

    fn k(&self) -> Option<usize> {
        self.options.k.map(|k| usize::try_from(k).unwrap_or(usize::MAX))
    }

    /// The first pass: what changed, and in which types it can be told.
    fn survey(&mut self) -> Result<(), ExtractError> {
        let (ctx, pairs) = (self.ctx, &self.pairs);
        let choice = Choice { k: self.k(), types: self.types() };
        let mut surveys = vec![Survey::default(); pairs.len()];
        ctx.observer.begin("comparing", pairs.iter().map(|pair| pair.base.info.n_bytes()).sum());
        let runs =
            pairs.iter().enumerate().flat_map(|(i, pair)| pair.runs(ctx.window_bytes()).map(move |run| (i, run)));
        for_each_ordered(
            ctx,
            runs,
            |(i, run)| pairs[*i].read_bytes(run),
            |(i, run)| {
                let pair = &pairs[*i];
                let found = match &pair.rows {
                    Ok((a, b)) => {
                        ctx.observer.advance((run.end - run.start) * a.row_bytes());
                        let (a, b) = (a.read(ctx, run.clone())?, b.read(ctx, run.clone())?);
                        survey(a.block(), b.block(), run.start, choice)
                    }
                    Err(_) => {
                        ctx.observer.advance(run.end - run.start);
                        let n_changed = u64::from(!pair.is_same(ctx, run.clone())?);
                        Survey { n_changed, ..Survey::default() }
                    }
                };
                Ok::<_, ExtractError>(found)
            },
            |(i, _), found| {
                surveys[i].add(found);
                Ok(())
            },
        )?;
        self.base.unchanged()?;
        self.tuned.unchanged()?;
        self.surveys = surveys;
        Ok(())
    }

    /// Refuses what an adapter cannot hold, all of it at once.
    fn judge(&self) -> Result<(), ExtractError> {
        let (tuned, base) = (self.tuned.root().to_owned(), self.base.name());
        let (mut problems, mut reasons) = (Vec::new(), Vec::new());
        for (pair, survey) in self.changed() {
            if let Some((reason, what)) = self.problem(pair, survey) {
                problems.push(format!("\"{}\": {what}", Printable(pair.name())));
                reasons.push(reason);
            }
        }
        if !problems.is_empty() {
            return Err(ExtractError::Unfit { tuned, base, problems, reasons });
        }
        if self.targets().all(|(_, survey)| survey.n_chosen == 0) {
            let is_whole = self.changed().next().is_none();
            let what = if is_whole { "every tensor is" } else { "all that takes part is" };
            return Err(ExtractError::Same { tuned, base, what });
        }
        Ok(())
    }

    /// Why the adapter cannot hold what changed in a tensor.
    fn problem(&self, pair: &TensorPair<'_>, survey: &Survey) -> Option<(UnfitReason, String)> {
        let is_exact = self.options.k.is_none();
        let why = match &pair.rows {
            // What was asked to be left out, or cannot be part of a chosen few, is told in the report.
            Err(_) if pair.is_unwanted || !is_exact => return None,
            Err(why) => return Some((UnfitReason::NoFloats, format!("changed, and {why}"))),
            Ok(_) => survey.first_problem.as_deref().unwrap_or_default(),
        };
        let n_elements = pair.base.info.n_elements();
        if survey.n_not_finite > 0 {
            let what = format!("{} changed elements are NaN or infinite, {why}", survey.n_not_finite);
            return Some((UnfitReason::NotFinite, what));
        }
        let density = survey.n_chosen as f64 / n_elements as f64;
        let is_vector = pair.base.info.shape.len() == 1;
        if density > self.options.max_density && !is_vector {
            let (percent, most) = (density * 100.0, self.options.max_density * 100.0);
            let what = format!("{percent:.3} % of {n_elements} elements would get a delta, at most {most:.3} % may");
            return Some((UnfitReason::TooDense(density), what));
        }
        let n_inexact = survey.n_inexact.last().copied().unwrap_or_default();
        if is_exact && n_inexact > 0 {
            let dtype = dtype_name(*self.types().last().expect("some type is asked about"));
            let what = format!("no {dtype} delta gives {n_inexact} of its elements exactly, {why}");
            return Some((UnfitReason::Inexact, what));
        }
        None
    }

    /// Pairs whose bytes differ.
    fn changed(&self) -> impl Iterator<Item = (&TensorPair<'_>, &Survey)> {
        self.pairs.iter().zip(&self.surveys).filter(|(_, survey)| survey.n_changed > 0)
    }

    /// Changed pairs that take part.
    fn targets(&self) -> impl Iterator<Item = (&TensorPair<'_>, &Survey)> {
        self.changed().filter(|(pair, _)| pair.rows.is_ok())
    }

    /// The type of a tensor's deltas: the first that is exact, else the last.
    fn values_dtype(&self, survey: &Survey) -> Dtype {
        let types = self.types();
        let exact = types.iter().zip(&survey.n_inexact).find(|(_, n_inexact)| **n_inexact == 0);
        exact.map_or(types[types.len() - 1], |(dtype, _)| *dtype)
    }

    /// Chosen elements that the chosen type does not give exactly.
    fn n_inexact(&self, survey: &Survey) -> u64 {
        survey.n_inexact.iter().copied().find(|n| *n == 0).or(survey.n_inexact.last().copied()).unwrap_or_default()
    }

    /// The second pass: the deltas of what changed.
    fn write(&self, mut writer: AdapterWriter) -> Result<(), ExtractError> {
        let ctx = self.ctx;
        ctx.observer.begin("extracting", self.targets().map(|(pair, _)| pair.base.info.n_bytes()).sum());
        for (pair, survey) in self.targets().filter(|(_, survey)| survey.n_chosen > 0) {
            let Ok((a, b)) = &pair.rows else { unreachable!("targets have rows") };
            let (info, dtype) = (pair.base.info, self.values_dtype(survey));
            writer.store_as(dtype);
            writer.begin_target(&info.name, info.dtype, &info.shape, a.layout.transposed, survey.uniform_k())?;
            writer.quantized_as(pair.base.layout().map(CodedLayout::name));
            // What is made of a run may take 16 bytes for each element.
            let n_bytes = ctx.window_bytes() / 16 * (info.dtype.bitsize() as u64 / 8);
            for_each_ordered(
                ctx,
                pair.runs(n_bytes),
                |run| pair.read_bytes(run) + (run.end - run.start) * a.layout.d_in * POSITION_BYTES,
                |run| {
                    let (a, b) = (a.read(ctx, run.clone())?, b.read(ctx, run.clone())?);
                    ctx.observer.advance(a.block().bytes().len() as u64);
                    let entries = entries(a.block(), b.block(), self.k(), dtype);
                    if self.options.k.is_none() {
                        self.prove(pair, &entries)?;
                    }
                    Ok::<_, ExtractError>(entries)
                },
                |_, Entries { columns, values, originals, .. }| Ok(writer.push_rows(&columns, &values, &originals)?),
            )?;
            writer.end_target(None);
        }
        self.base.unchanged()?;
        self.tuned.unchanged()?;
        let recipe = Recipe {
            score: "extracted".to_owned(),
            k: self.options.k,
            scope: if self.options.k.is_some() { "row".to_owned() } else { String::new() },
            targets: self.options.targets.clone(),
            transposed: self.options.transposed.clone(),
            extra: BTreeMap::from([("tuned".to_owned(), self.tuned.name())]),
            ..Recipe::default()
        };
        Ok(writer.finish(ctx, 1.0, &recipe, &BaseInfo::of(self.base), &self.options.notes)?)
    }

    /// Merges the deltas and compares with the tuned bits.
    fn prove(&self, pair: &TensorPair<'_>, entries: &Entries) -> Result<(), ExtractError> {
        let Entries { columns, values, originals, tuned } = entries;
        let layer = ScaledDeltas { columns, values, scale: 1.0 };
        let (merged, _) = merged_values(pair.base.info.dtype, &[layer], columns, originals);
        if merged == *tuned {
            return Ok(());
        }
        // The first pass found a delta for each: these are not the bytes it saw.
        let what = format!("tensor \"{}\" changed while it was read", Printable(pair.name()));
        Err(CheckpointError::Changed { path: self.tuned.root().to_owned(), what }.into())
    }

    fn report(&self) -> ExtractReport {
        let mut by_kind: BTreeMap<&str, Totals> = BTreeMap::new();
        let mut total = Totals::default();
        let mut tensors = Vec::new();
        for (pair, survey) in self.targets() {
            let info = pair.base.info;
            by_kind.entry(projection_kind(pair.name())).or_default().add(info.n_elements(), survey);
            total.add(info.n_elements(), survey);
            tensors.push(ExtractedTensor {
                tensor: info.name.clone(),
                dtype: dtype_name(info.dtype),
                values_dtype: dtype_name(self.values_dtype(survey)),
                n_elements: info.n_elements(),
                n_changed: survey.n_changed,
                n_deltas: survey.n_chosen,
                norm: (survey.kept + survey.lost).sqrt(),
                norm_lost: survey.lost.sqrt(),
            });
        }
        let left_out: Vec<LeftOut> = self
            .changed()
            .filter_map(|(pair, _)| {
                let why = pair.rows.as_ref().err()?.clone();
                Some(LeftOut { tensor: pair.name().to_owned(), why })
            })
            .collect();
        let n_inexact = self.targets().map(|(_, survey)| self.n_inexact(survey)).sum();
        let total = total.named("total");
        ExtractReport {
            base: self.base.name(),
            tuned: self.tuned.name(),
            dry_run: true,
            exact: left_out.is_empty() && n_inexact == 0 && total.n_deltas == total.n_changed,
            id: None,
            k: self.options.k,
            kinds: by_kind.iter().map(|(kind, totals)| totals.named(kind)).collect(),
            total,
            tensors,
            left_out,
            n_same: (self.pairs.len() - self.changed().count()) as u64,
            n_inexact,
            n_bytes: None,
        }
    }
}
