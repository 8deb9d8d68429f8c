//! The inputs of scores: the weights, and their gradients or activations.

use std::ops::Range;

use super::{MaskError, MaskOptions, targets::Selection};
use crate::{
    backend::{ChooseError, ColumnNorms, KeySpace, NotANumber, Score, ScoreKind, ScoredRows, mix},
    checkpoint::{Checkpoint, CheckpointError, Context, Held, Printable, RowScan, RowSpan, TensorRef},
    tensor::{RowBlock, dtype_name, is_float, module_of},
};

/// One target with everything that its scores need.
pub(super) struct Source<'a> {
    pub(super) scan: RowScan<'a>,
    gradients: Option<RowScan<'a>>,
    activations: Option<TensorRef<'a>>,
    score: ScoreKind,
    seed: u64,
    /// The rows that take part, ascending; `None` for all.
    rows: Option<Vec<u32>>,
}

/// Pairs every target with its gradients or activations.
///
/// # Errors
/// Gradients or activations that are stored as codes; a list of all targets for which they are missing or have the
/// wrong shape.
pub(super) fn sources<'a>(options: &MaskOptions<'a>, selection: &Selection<'a>) -> Result<Vec<Source<'a>>, MaskError> {
    for from in [options.gradients, options.activations].into_iter().flatten() {
        let names = selection.targets.iter().map(|scan| scan.tensor.info.name.as_str());
        from.refuse_coded(names.flat_map(|name| [name, module_of(name)]))?;
    }
    let mut sources = Vec::with_capacity(selection.targets.len());
    let mut problems = Vec::new();
    for &scan in &selection.targets {
        let name = &scan.tensor.info.name;
        let gradients = options.gradients.map(|from| gradients_of(from, scan)).transpose();
        let activations = options.activations.map(|from| activations_of(from, scan)).transpose();
        match (gradients, activations) {
            (Ok(gradients), Ok(activations)) => {
                let seed = tensor_seed(options.seed, name);
                let rows = (options.neuron_fraction < 1.0).then(|| fraction_of_rows(options, scan));
                sources.push(Source { scan, gradients, activations, score: options.score, seed, rows });
            }
            (gradients, activations) => problems.extend(
                [gradients.err(), activations.err()]
                    .into_iter()
                    .flatten()
                    .map(|problem| format!("\"{}\": {problem}", Printable(name))),
            ),
        }
    }
    match options.gradients.or(options.activations).filter(|_| !problems.is_empty()) {
        None => Ok(sources),
        Some(from) => {
            let what = "it does not match the base".to_owned();
            Err(CheckpointError::Many { path: from.root().to_owned(), what, problems }.into())
        }
    }
}

fn gradients_of<'a>(from: &'a Checkpoint, scan: RowScan<'a>) -> Result<RowScan<'a>, String> {
    let weights = scan.tensor.info;
    let tensor = from.tensor(&weights.name).ok_or("it has no such tensor")?;
    if tensor.info.shape != weights.shape {
        return Err(format!("shape {:?}, but the base has {:?}", tensor.info.shape, weights.shape));
    }
    if !is_float(tensor.info.dtype) {
        return Err(format!("elements are {}, expected floats", dtype_name(tensor.info.dtype)));
    }
    Ok(RowScan { tensor, layout: scan.layout })
}

fn activations_of<'a>(from: &'a Checkpoint, scan: RowScan<'a>) -> Result<TensorRef<'a>, String> {
    let name = &scan.tensor.info.name;
    let tensor = from.tensor(name).or_else(|| from.tensor(module_of(name))).ok_or("it has no such tensor")?;
    let (d_in, n_stacks) = (scan.layout.d_in, scan.layout.n_stacks);
    if tensor.info.shape != [d_in] && tensor.info.shape != [n_stacks, d_in] {
        return Err(format!("shape {:?}, expected [{d_in}] or [{n_stacks}, {d_in}]", tensor.info.shape));
    }
    if !is_float(tensor.info.dtype) {
        return Err(format!("elements are {}, expected floats", dtype_name(tensor.info.dtype)));
    }
    Ok(tensor)
}

/// A seed per tensor: the first 8 bytes, little-endian, of the BLAKE3 of the seed (8 bytes) and the name.
fn tensor_seed(seed: u64, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
}

/// `round(fraction * rows)` rows, at least one: those with the smallest hash, ties by row.
fn fraction_of_rows(options: &MaskOptions<'_>, scan: RowScan<'_>) -> Vec<u32> {
    let n_rows = scan.layout.n_rows();
    let n = ((options.neuron_fraction * n_rows as f64).round() as usize).max(1);
    // A different stream than that of the scores, which use the seed itself.
    let seed = mix(tensor_seed(options.seed, &scan.tensor.info.name));
    let mut ranked: Vec<(u64, u32)> = (0..n_rows).map(|row| (mix(seed.wrapping_add(row)), row as u32)).collect();
    if n < ranked.len() {
        ranked.select_nth_unstable(n);
        ranked.truncate(n);
    }
    let mut rows: Vec<u32> = ranked.into_iter().map(|(_, row)| row).collect();
    rows.sort_unstable();
    rows
}

impl Source<'_> {
    /// Number of rows that take part.
    pub(super) fn n_rows(&self) -> u64 {
        self.rows.as_ref().map_or(self.scan.layout.n_rows(), |rows| rows.len() as u64)
    }
    /// Whether all rows take part.
    pub(super) fn has_all_rows(&self) -> bool {
        self.rows.is_none()
    }

    /// Memory held while rows are scored, given the caller's `row_bytes` per row.
    pub(super) fn held(&self, row_bytes: u64) -> Held {
        let norms = self.activations.map_or(0, |tensor| tensor.info.n_bytes() + 8 * tensor.info.n_elements());
        Held { span: norms, row: row_bytes + self.gradients.map_or(0, |scan| scan.read_bytes()) }
    }

    /// The key space of this target.
    pub(super) fn key_space(&self) -> KeySpace {
        let gradients = self.gradients.map(|scan| scan.tensor.info.dtype);
        self.score.key_space(self.scan.tensor.info.dtype, gradients)
    }

    /// The runs of rows of a span that take part, relative to the span's first row.
    fn runs(&self, span: RowSpan) -> Vec<Range<usize>> {
        let Some(rows) = &self.rows else { return std::iter::once(0..span.n_rows).collect() };
        let end = span.first_row + span.n_rows as u64;
        let (from, to) = (
            rows.partition_point(|&row| u64::from(row) < span.first_row),
            rows.partition_point(|&row| u64::from(row) < end),
        );
        let mut runs: Vec<Range<usize>> = Vec::new();
        for &row in &rows[from..to] {
            let row = (u64::from(row) - span.first_row) as usize;
            match runs.last_mut() {
                Some(run) if run.end == row => run.end += 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }

    /// Calls `visit` with every run of participating rows of a block, and with its scores.
    ///
    /// # Errors
    /// [`MaskError::NotANumber`], or a failure to read gradients or activations.
    pub(super) fn for_each_run(
        &self,
        ctx: &Context<'_>,
        space: KeySpace,
        span: RowSpan,
        block: RowBlock<'_>,
        mut visit: impl FnMut(Range<usize>, &ScoredRows<'_>) -> Result<(), ChooseError>,
    ) -> Result<(), MaskError> {
        let end = span.first_row + span.n_rows as u64;
        let gradients = self.gradients.map(|scan| scan.read(ctx, span.first_row..end)).transpose()?;
        let norms = self.activations.map(|tensor| self.read_norms(ctx, tensor)).transpose()?;
        for run in self.runs(span) {
            let first_row = span.first_row + run.start as u64;
            let mut of_run = |block: RowBlock<'_>| -> Result<(), ChooseError> {
                let gradients = gradients.as_ref().map(|window| slice(window.block(), &run));
                let score = match (self.score, gradients) {
                    (ScoreKind::Magnitude, _) => Score::Magnitude,
                    (ScoreKind::Smallest, _) => Score::Smallest,
                    (ScoreKind::Random, _) => Score::Random { seed: self.seed, first_row },
                    (ScoreKind::Gradient, Some(g)) => Score::Gradient(g),
                    (ScoreKind::Snip, Some(g)) => Score::Snip(g),
                    (ScoreKind::Fisher, Some(g)) => Score::Fisher(g),
                    (ScoreKind::Wanda, _) => {
                        let norms = norms.as_deref().expect("wanda has activations");
                        let is_shared = norms.len() as u64 == self.scan.layout.d_in;
                        let d_out = if is_shared { self.scan.layout.n_rows() } else { self.scan.layout.d_out };
                        Score::Wanda(ColumnNorms { norms, first_row, d_out })
                    }
                    (_, None) => unreachable!("gradient scores have gradients"),
                };
                visit(run.clone(), &ScoredRows::new(block, score).in_space(space))
            };
            of_run(slice(block, &run)).map_err(|error| match error {
                ChooseError::NotANumber(found) => self.not_a_number(first_row, found),
                ChooseError::Accelerator(error) => MaskError::Gpu(error),
            })?;
        }
        Ok(())
    }

    fn not_a_number(&self, first_row: u64, found: NotANumber) -> MaskError {
        let tensor = match (found.what, &self.gradients) {
            ("gradient", Some(gradients)) => gradients.tensor,
            _ => self.scan.tensor,
        };
        MaskError::NotANumber {
            path: tensor.shard.path().to_owned(),
            tensor: tensor.info.name.clone(),
            row: first_row + found.row as u64,
            column: found.column as u64,
            what: found.what,
        }
    }

    /// The norms of all columns, widened; checked to be finite and not negative.
    fn read_norms(&self, ctx: &Context<'_>, tensor: TensorRef<'_>) -> Result<Vec<f64>, MaskError> {
        let bytes = tensor.window(ctx, 0..tensor.info.n_bytes())?;
        let norms: Vec<f64> = crate::tensor::with_float!(tensor.info.dtype, T => {
            use crate::tensor::{Accumulator, Float};
            bytes.chunks_exact(T::BYTES).map(|le| T::from_le(le).widen().to_f64()).collect()
        }, else unreachable!("activations are floats"));
        if let Some(at) = norms.iter().position(|norm| !norm.is_finite() || *norm < 0.0) {
            let what = format!("norm {at} is {}, expected a finite number of at least 0", norms[at]);
            return Err(CheckpointError::bad_tensor(tensor.shard.path(), &tensor.info.name, what).into());
        }
        Ok(norms)
    }
}

/// A run of rows of a block.
fn slice<'a>(block: RowBlock<'a>, rows: &Range<usize>) -> RowBlock<'a> {
    let row_bytes = block.bytes().len() / block.n_rows().max(1);
    let bytes = &block.bytes()[rows.start * row_bytes..rows.end * row_bytes];
    RowBlock::new(bytes, block.dtype(), rows.len(), block.d_in())
}
