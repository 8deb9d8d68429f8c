//! From several adapters to one.

use std::path::Path;

use serde::Serialize;

use super::{
    CombineError, Method,
    input::CombineInput,
    method::Dice,
    survey::{CombinedTarget, InputReport, PairReport, Survey, for_each_position, members_bytes, read_members},
    trim::Cut,
};
use crate::{
    adapter::{Adapter, AdapterId, AdapterNotes, AdapterWriter},
    checkpoint::{Checkpoint, Context, Existing, for_each_ordered, gather_rows},
    mask::{BaseInfo, Recipe},
    tensor::{Dtype, RowColumns},
};

/// The most adapters that are combined at once.
const MAX_INPUTS: usize = 64;

/// How to combine.
#[derive(Clone, Debug)]
pub struct CombineOptions<'a> {
    /// What becomes of the deltas at a position.
    pub method: Method,
    /// The base of all adapters; needed where they change different weights.
    pub base: Option<&'a Checkpoint>,
    /// The type that deltas are stored in: F32, BF16 or F16.
    pub dtype: Dtype,
    /// What people want to know of the result.
    pub notes: AdapterNotes,
}

/// What was combined.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct CombineReport {
    /// The base's name.
    pub base: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// `linear`, `ties`, `dare`, `dare-ties` or `priority`.
    pub method: &'static str,
    /// The share of deltas that each adapter keeps, where not all are.
    pub density: Option<f64>,
    /// The seed of what is random.
    pub seed: Option<u64>,
    /// The adapters, in the order given.
    pub inputs: Vec<InputReport>,
    /// Every two of them.
    pub pairs: Vec<PairReport>,
    /// Positions that more than one adapter has.
    pub n_shared: u64,
    /// Of those, positions where signs disagree.
    pub n_sign_conflicts: u64,
    /// Tensors of the result.
    pub n_tensors: usize,
    /// Deltas of the result: positions that any adapter has.
    pub n_deltas: u64,
    /// Of those, deltas that are not zero.
    pub n_nonzero: u64,
    /// L2 norm of the result.
    pub norm: f64,
    /// The result's id; none in a dry run.
    pub id: Option<String>,
    /// Bytes of the file; none in a dry run.
    pub n_bytes: Option<u64>,
}

/// Combines adapters of one base into one at `output`, or only reports what it would hold.
///
/// The result has every position that any adapter has, and scale 1: weights and scales are in its deltas. Deltas are summed in
/// float64, in the adapters' order, and rounded once. Reads the adapters twice, for TIES five times. Memory: a few runs of
/// rows per thread.
///
/// ```
/// use neuroada_ckpt::{Adapter, AdapterNotes, Context, Dtype, Existing};
/// use neuroada_ckpt::{CombineInput, CombineOptions, Method, combine};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("combined.safetensors");
/// let a = Adapter::open("fixtures/tiny-llama-adapter.safetensors".as_ref())?;
/// let inputs = [CombineInput { adapter: a.clone(), weight: 0.5 }, CombineInput { adapter: a, weight: 0.25 }];
/// let options = CombineOptions { method: Method::Linear, base: None, dtype: Dtype::F32, notes: AdapterNotes::default() };
/// let report = combine(&Context::default(), &inputs, &options, Some((&path, Existing::Keep)))?;
/// assert_eq!(report.pairs[0].n_sign_conflicts, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`CombineError`]; nothing was written.
pub fn combine(
    ctx: &Context<'_>,
    inputs: &[CombineInput],
    options: &CombineOptions<'_>,
    output: Option<(&Path, Existing)>,
) -> Result<CombineReport, CombineError> {
    check(inputs, options)?;
    let writer = output.map(|(path, existing)| AdapterWriter::create(path, existing, options.dtype)).transpose()?;
    let ids = inputs.iter().map(|input| input.adapter.id(ctx)).collect::<Result<Vec<AdapterId>, _>>()?;
    let survey = Survey::of(ctx, inputs, options.base)?;
    let cuts = match options.method {
        Method::Ties { density } => Some(Cut::of(ctx, inputs, &survey.targets, density)?),
        _ => None,
    };
    let mut job = Combination { ctx, inputs, ids: &ids, options, cuts, writer, done: Totals::new(inputs.len()) };
    ctx.observer.begin("combining", inputs.iter().map(|input| input.adapter.nnz()).sum());
    for (i, target) in survey.targets.iter().enumerate() {
        job.combine_target(i, target)?;
    }
    for input in inputs {
        input.adapter.shard().unchanged().map_err(CombineError::Checkpoint)?;
    }
    let first = &inputs[0].adapter;
    let base_info = options.base.map_or_else(|| first.base().clone(), BaseInfo::of);
    let Combination { writer, done, .. } = job;
    let (mut id, mut n_bytes) = (None, None);
    if let (Some(writer), Some((path, _))) = (writer, output) {
        writer.finish(ctx, 1.0, &Recipe::custom(), &base_info, &options.notes)?;
        let (combined, new_id) = Adapter::read_back(ctx, path)?;
        (id, n_bytes) = (Some(new_id.to_string()), Some(combined.n_bytes()));
    }
    let input_report = |(i, input): (usize, &CombineInput)| InputReport {
        name: input.adapter.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
        id: ids[i].to_string(),
        scale: input.adapter.scale(),
        weight: input.weight,
        n_deltas: input.adapter.nnz(),
        n_kept: done.n_kept[i],
        norm: survey.squares[i].sqrt(),
    };
    Ok(CombineReport {
        base: base_info.name,
        dry_run: output.is_none(),
        method: options.method.name(),
        density: options.method.density(),
        seed: options.method.seed(),
        inputs: inputs.iter().enumerate().map(input_report).collect(),
        pairs: survey.pairs,
        n_shared: survey.n_contested,
        n_sign_conflicts: survey.n_conflicts,
        n_tensors: survey.targets.len(),
        n_deltas: survey.n_positions,
        n_nonzero: done.n_nonzero,
        norm: done.squares.sqrt(),
        id,
        n_bytes,
    })
}

fn check(inputs: &[CombineInput], options: &CombineOptions<'_>) -> Result<(), CombineError> {
    let usage = |what: String| Err(CombineError::Usage(what));
    if inputs.is_empty() || inputs.len() > MAX_INPUTS {
        return usage(format!("1 to {MAX_INPUTS} adapters can be combined, there are {}", inputs.len()));
    }
    if let Some(input) = inputs.iter().find(|input| !input.weight.is_finite()) {
        return usage(format!("weight {} is not a finite number", input.weight));
    }
    match options.method.density() {
        Some(density) if !(density > 0.0 && density <= 1.0) => {
            usage(format!("density {density}: a share above 0 and at most 1 is needed"))
        }
        _ => Ok(()),
    }
}

struct Combination<'a> {
    ctx: &'a Context<'a>,
    inputs: &'a [CombineInput],
    ids: &'a [AdapterId],
    options: &'a CombineOptions<'a>,
    /// Of TIES.
    cuts: Option<Vec<Cut>>,
    writer: Option<AdapterWriter>,
    done: Totals,
}

/// Counts and sums of what was combined.
#[derive(Clone, Default)]
struct Totals {
    n_kept: Vec<u64>,
    n_nonzero: u64,
    squares: f64,
}

impl Totals {
    fn new(n: usize) -> Self {
        Self { n_kept: vec![0; n], ..Self::default() }
    }
}

/// The result in a piece of rows.
struct Piece {
    columns: RowColumns,
    values: Vec<f32>,
    base_values: Vec<u8>,
    done: Totals,
}

impl Combination<'_> {
    fn combine_target(&mut self, place: usize, target: &CombinedTarget<'_>) -> Result<(), CombineError> {
        let info = target.info;
        let member = |i: usize| self.inputs[i].adapter.target(&info.name).expect("a member has the target");
        let uniform_k = member(target.members[0]).uniform_k.filter(|_| target.is_alike);
        if let Some(writer) = &mut self.writer {
            writer.begin_target(&info.name, info.dtype, &info.shape, info.transposed, uniform_k)?;
            writer.quantized_as(info.quantized.as_deref());
        }
        let (ctx, inputs, ids, options, cuts) = (self.ctx, self.inputs, self.ids, self.options, &self.cuts);
        let pieces: Vec<_> = target.pieces.iter().cloned().enumerate().collect();
        let (writer, done) = (&mut self.writer, &mut self.done);
        for_each_ordered(
            ctx,
            pieces,
            |(_, rows)| members_bytes(ctx, inputs, target, rows),
            |(piece, rows)| {
                let mut parts = read_members(ctx, inputs, target, rows)?;
                if let Some(cuts) = cuts {
                    for (part, &i) in parts.iter_mut().zip(&target.members) {
                        cuts[i].trim(place, *piece, &mut part.values);
                    }
                }
                let dice: Vec<Option<Dice>> = target
                    .members
                    .iter()
                    .map(|&i| match options.method {
                        Method::Dare { density, seed } | Method::DareTies { density, seed } => {
                            Some(Dice::new(seed, &ids[i].to_string(), &info.name, density))
                        }
                        _ => None,
                    })
                    .collect();
                let mut of_piece = combine_rows(inputs, target, &parts, options.method, &dice, rows.start);
                if let Some(tensor) = options.base.map(|base| info.find_in(base)).transpose()?.flatten() {
                    of_piece.base_values = gather_rows(ctx, tensor, info.layout, rows.start, &of_piece.columns)?;
                }
                ctx.observer.advance(parts.iter().map(|part| part.values.len() as u64).sum());
                Ok::<_, CombineError>(of_piece)
            },
            |_, piece: Piece| {
                done.n_kept.iter_mut().zip(&piece.done.n_kept).for_each(|(mine, theirs)| *mine += theirs);
                done.n_nonzero += piece.done.n_nonzero;
                done.squares += piece.done.squares;
                match writer {
                    None => Ok(()),
                    Some(writer) if options.base.is_some() => {
                        Ok(writer.push_rows(&piece.columns, &piece.values, &piece.base_values)?)
                    }
                    Some(writer) => Ok(writer.push_rows_unanchored(&piece.columns, &piece.values)?),
                }
            },
        )?;
        // All members have the same positions here, and so the same anchor, or there is a base.
        let anchor = self.inputs[target.members[0]].adapter.target(&info.name).expect("a member has it").anchor;
        if let Some(writer) = &mut self.writer {
            match options.base {
                Some(_) => writer.end_target(target.whole),
                None => writer.end_target_anchored(anchor, target.whole),
            };
        }
        Ok(())
    }
}

/// Combines a run of rows; `first_row` is the first of them.
fn combine_rows(
    inputs: &[CombineInput],
    target: &CombinedTarget<'_>,
    parts: &[crate::adapter::DeltaRows],
    method: Method,
    dice: &[Option<Dice>],
    first_row: u64,
) -> Piece {
    let n_rows = parts.first().map_or(0, |part| part.columns.n_rows());
    let mut piece = Piece {
        columns: RowColumns::with_capacity(n_rows, parts.iter().map(|part| part.values.len()).max().unwrap_or(0)),
        values: Vec::new(),
        base_values: Vec::new(),
        done: Totals::new(inputs.len()),
    };
    let (mut row_columns, mut row) = (Vec::new(), 0);
    let mut deltas = Vec::with_capacity(parts.len());
    for_each_position(parts, |at_row, column, here| {
        while row < at_row {
            piece.columns.push_row(&row_columns);
            row_columns.clear();
            row += 1;
        }
        row_columns.push(column);
        deltas.clear();
        for &(part, at) in here {
            let input = &inputs[target.members[part]];
            let mut delta = f64::from(parts[part].values[at]) * input.adapter.scale();
            if let (Some(dice), Some(density)) = (dice[part], method.density()) {
                delta = if dice.keep(first_row + at_row as u64, column) { delta / density } else { 0.0 };
            }
            piece.done.n_kept[target.members[part]] += u64::from(delta != 0.0);
            deltas.push((input.weight, delta));
        }
        let value = method.combine(&deltas) as f32;
        piece.done.n_nonzero += u64::from(value != 0.0);
        piece.done.squares += f64::from(value) * f64::from(value);
        piece.values.push(value);
    });
    while row < n_rows {
        piece.columns.push_row(&row_columns);
        row_columns.clear();
        row += 1;
    }
    piece
}
