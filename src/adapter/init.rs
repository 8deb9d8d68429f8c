//! Starting an adapter from a mask, for people who train elsewhere.

use std::path::Path;

use serde::Serialize;

use super::{AdapterError, AdapterNotes, AdapterWriter};
use crate::{
    checkpoint::{
        Checkpoint, CheckpointError, CodedLayout, Context, Existing, Printable, Shard, TensorInfo, TensorRef,
        gather_rows,
    },
    mask::{BaseInfo, MaskFile, TargetInfo},
    tensor::{Dtype, RowColumns, dtype_name, is_float, widened},
};

/// Positions and rows that are taken in one piece.
const RUN: u64 = 1 << 18;

/// How to start an adapter.
#[derive(Clone, Debug)]
pub struct InitOptions<'a> {
    /// A safetensors file with `T.values` for each target `T`, of any float type and of the mask's shape; zeros without it.
    pub values: Option<&'a Path>,
    /// The type that values are stored in: F32, BF16 or F16.
    pub dtype: Dtype,
    /// What every delta is multiplied by.
    pub scale: f64,
    /// What people want to know of it.
    pub notes: AdapterNotes,
}

impl Default for InitOptions<'_> {
    fn default() -> Self {
        Self { values: None, dtype: Dtype::F32, scale: 1.0, notes: AdapterNotes::default() }
    }
}

/// What was started.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct InitReport {
    /// The base's name.
    pub base: String,
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// Targets.
    pub n_tensors: usize,
    /// Deltas.
    pub n_deltas: u64,
    /// Of those, deltas that are not zero.
    pub n_nonzero: u64,
    /// The type that values are stored in.
    pub dtype: String,
    /// Bytes of the file.
    pub n_bytes: u64,
}

/// Writes the adapter that `mask` asks for at `output`: one delta for each chosen entry of `base`.
///
/// The base must be the one the mask was made from: every target's type and shape, and the values at its positions.
/// Memory: a run of rows.
///
/// # Errors
/// [`AdapterError::WrongBase`]; a list of all targets that the base or the values do not have as the mask needs them; a value
/// that is not finite or does not fit the type, naming its place. Nothing was written.
pub fn init_adapter(
    ctx: &Context<'_>,
    base: &Checkpoint,
    mask: &MaskFile,
    options: &InitOptions<'_>,
    output: &Path,
    existing: Existing,
) -> Result<InitReport, AdapterError> {
    if !options.scale.is_finite() {
        return Err(CheckpointError::bad_file(output, format!("scale {} is not a finite number", options.scale)).into());
    }
    let values = options.values.map(Shard::open).transpose()?;
    let tensors = match_base(base, mask)?;
    if let Some(values) = &values {
        match_values(values, mask)?;
    }
    let mut writer = AdapterWriter::create(output, existing, options.dtype)?;
    let mut n_nonzero = 0;
    ctx.observer.begin("starting", mask.nnz());
    for (target, &tensor) in mask.targets().iter().zip(&tensors) {
        writer.begin_target(&target.name, target.dtype, &target.shape, target.transposed, target.uniform_k)?;
        writer.quantized_as(target.quantized.as_deref());
        let mut first = 0;
        for range in mask.row_ranges(ctx, target, RUN)? {
            ctx.check()?;
            let columns = mask.read_columns(ctx, target, range.clone())?;
            let base_values = gather_rows(ctx, tensor, target.layout, range.start, &columns)?;
            let deltas = match &values {
                None => vec![0.0; columns.nnz()],
                Some(values) => read_values(ctx, values, target, first, range.start, &columns, options.dtype)?,
            };
            n_nonzero += deltas.iter().filter(|&&delta| delta != 0.0).count() as u64;
            writer.push_rows(&columns, &deltas, &base_values)?;
            first += columns.nnz() as u64;
            ctx.observer.advance(columns.nnz() as u64);
        }
        let (_, anchor) = writer.end_target(target.blake3);
        if anchor != target.anchor {
            return Err(AdapterError::other_base("the mask", mask.path(), &target.name, mask.base(), base));
        }
    }
    base.unchanged()?;
    writer.finish(ctx, options.scale, mask.recipe(), &BaseInfo::of(base), &options.notes)?;
    let (adapter, id) = super::Adapter::read_back(ctx, output)?;
    Ok(InitReport {
        base: base.name(),
        id: id.to_string(),
        n_tensors: adapter.targets().len(),
        n_deltas: adapter.nnz(),
        n_nonzero,
        dtype: dtype_name(options.dtype),
        n_bytes: adapter.n_bytes(),
    })
}

/// The base's tensors, by target.
fn match_base<'a>(base: &'a Checkpoint, mask: &MaskFile) -> Result<Vec<TensorRef<'a>>, AdapterError> {
    let mut problems = Vec::new();
    let mut tensors = Vec::new();
    for target in mask.targets() {
        let name = Printable(&target.name);
        match (target.find_in(base)?, base.weight(&target.name)?) {
            (Some(tensor), _) => tensors.push(tensor),
            (None, None) => problems.push(format!("\"{name}\": the base has no such tensor")),
            (None, Some(tensor)) => {
                let stored = |dtype, layout: Option<&str>| layout.map_or_else(|| dtype_name(dtype), str::to_owned);
                let made_for = stored(target.dtype, target.quantized.as_deref());
                let found = stored(tensor.info.dtype, tensor.layout().map(CodedLayout::name));
                let (shape, found_shape) = (&target.shape, &tensor.info.shape);
                problems.push(format!(
                    "\"{name}\": the mask was made for {made_for} {shape:?}, the base has {found} {found_shape:?}"
                ));
            }
        }
    }
    if problems.is_empty() {
        return Ok(tensors);
    }
    let what = format!("does not fit the base {}", Printable(&base.name()));
    Err(CheckpointError::Many { path: mask.path().to_owned(), what, problems }.into())
}

/// The name of a target's values.
fn values_name(target: &TargetInfo) -> String {
    format!("{}.values", target.name)
}

/// Every target must have values of its shape, and every tensor must be some target's values.
fn match_values(values: &Shard, mask: &MaskFile) -> Result<(), AdapterError> {
    let mut problems = Vec::new();
    for target in mask.targets() {
        let name = values_name(target);
        let needed = match target.uniform_k {
            Some(k) => vec![target.layout.n_rows(), k],
            None => vec![target.nnz],
        };
        match values.header().tensor(&name) {
            None => problems.push(format!("\"{}\" is missing", Printable(&name))),
            Some(info) if info.shape != needed => {
                problems.push(format!("\"{}\": shape {:?}, the mask has {needed:?}", Printable(&name), info.shape));
            }
            Some(info) if !is_float(info.dtype) => {
                problems.push(format!(
                    "\"{}\": elements are {}, floats are needed",
                    Printable(&name),
                    dtype_name(info.dtype)
                ));
            }
            Some(_) => {}
        }
    }
    for tensor in values.header().by_name() {
        let is_columns = tensor.name.ends_with(".columns") || tensor.name.ends_with(".row_offsets");
        let target = tensor.name.strip_suffix(".values").and_then(|name| mask.target(name));
        if target.is_none() && !is_columns {
            problems.push(format!("\"{}\" belongs to no target of the mask", Printable(&tensor.name)));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let what = "the values do not fit the mask".to_owned();
    Err(CheckpointError::Many { path: values.path().to_owned(), what, problems }.into())
}

/// The values of a run of rows, which begin at position `first`, as the adapter will store them.
fn read_values(
    ctx: &Context<'_>,
    values: &Shard,
    target: &TargetInfo,
    first: u64,
    first_row: u64,
    columns: &RowColumns,
    dtype: Dtype,
) -> Result<Vec<f32>, AdapterError> {
    let name = values_name(target);
    let info: &TensorInfo = values.header().tensor(&name).expect("matched before");
    let width = info.dtype.bitsize() as u64 / 8;
    let bytes = values.window(ctx, info, first * width..(first + columns.nnz() as u64) * width)?;
    let deltas = widened(info.dtype, &bytes);
    // An f64 beyond f32 is infinite here; what overflows the stored type is found when it is rounded.
    match deltas.iter().position(|delta| !delta.is_finite()) {
        None => Ok(deltas),
        Some(at) => {
            let (row, column) = (first_row + columns.row_of(at) as u64, columns.columns()[at]);
            let what = format!("row {row}, column {column}: {} does not fit {}", deltas[at], dtype_name(dtype));
            Err(CheckpointError::bad_tensor(values.path(), &name, what).into())
        }
    }
}
