//! Selects the trainable parts of a loaded model: the entries that a mask chose, and whole biases.
//!
//! A bias is trained as a matrix `[d_out, 1]`, which is also how an adapter stores it; every entry is trainable.
//! State, optimizer and rounding work as for the deltas of weights.

use std::path::Path;

use super::{
    TrainError,
    device::{Deltas, Device},
    model::{Model, Part},
};
use crate::{
    adapter::AdapterError,
    checkpoint::{Checkpoint, Context, Printable, TensorRef, gather_rows},
    mask::{MaskFile, TargetInfo},
    tensor::{Dtype, RowColumns, RowLayout, dtype_name, module_of},
};

/// The biases in `base` of the projections that `mask` chose, found by name. Reads headers only.
///
/// # Errors
/// [`TrainError::Usage`] if there are none.
pub fn biases<'b>(base: &'b Checkpoint, mask: &MaskFile) -> Result<Vec<TensorRef<'b>>, TrainError> {
    let names = mask.targets().iter().map(|target| bias_of(&target.name));
    let found: Vec<_> = names.filter_map(|name| base.tensor(&name)).collect();
    if found.is_empty() {
        let what = "the chosen projections have no biases, and an adapter can only add to existing tensors";
        return Err(TrainError::Usage(format!("{}: {what}", Printable::path(base.root()))));
    }
    Ok(found)
}

/// The name of the bias that belongs to a weight.
pub(super) fn bias_of(weight: &str) -> String {
    format!("{}.bias", module_of(weight))
}

/// The columns of a bias: one per row.
pub(super) fn bias_columns(n_rows: usize) -> RowColumns {
    RowColumns::uniform(vec![0; n_rows], 1)
}

/// Which tensors of a model a file may target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Targets {
    Weights,
    WeightsAndBiases,
}

impl<D: Device> Model<D> {
    /// Makes the entries that `mask` chose trainable, initialized to zero.
    ///
    /// # Errors
    /// [`AdapterError::WrongBase`] if the mask was made from other weights; otherwise a list of all targets that
    /// cannot be trained.
    pub fn attach(
        &mut self,
        ctx: &Context<'_>,
        device: &D,
        base: &Checkpoint,
        mask: &MaskFile,
    ) -> Result<(), TrainError> {
        self.check_targets(base, mask.path(), mask.targets(), Targets::Weights)?;
        for linear in self.linears_mut() {
            let mut entries = Entries::new(linear.dtype);
            for part in &mut linear.parts {
                part.entries = match mask.target(&part.name) {
                    None => entries.skip(part),
                    Some(target) => {
                        let columns = mask.read_columns(ctx, target, 0..target.layout.n_rows())?;
                        let stored = verified_originals(ctx, base, target, &columns)?.ok_or_else(|| {
                            AdapterError::other_base("the mask", mask.path(), &target.name, mask.base(), base)
                        })?;
                        entries.push(part, &columns, stored)
                    }
                };
            }
            linear.deltas = entries.trainable(device)?;
        }
        Ok(base.unchanged()?)
    }

    /// Also makes the biases of the projections that `mask` chose trainable, where they exist, initialized to zero.
    ///
    /// # Errors
    /// The errors of [`biases`]; fused biases that have different dtypes.
    pub fn attach_biases(
        &mut self,
        ctx: &Context<'_>,
        device: &D,
        base: &Checkpoint,
        mask: &MaskFile,
    ) -> Result<(), TrainError> {
        biases(base, mask)?;
        for linear in self.linears_mut() {
            let mut entries = Entries::of_biases(base, &linear.bias_parts)?;
            for (part, weight) in linear.bias_parts.iter_mut().zip(&linear.parts) {
                part.entries = match base.tensor(&part.name).filter(|_| mask.target(&weight.name).is_some()) {
                    None => entries.skip(part),
                    Some(tensor) => {
                        let columns = bias_columns(part.rows.len());
                        entries.push(part, &columns, gather_rows(ctx, tensor, bias_layout(tensor), 0, &columns)?)
                    }
                };
            }
            linear.bias_deltas = entries.trainable(device)?;
        }
        Ok(base.unchanged()?)
    }

    /// Checks that the targets of a mask or an adapter, read from `path`, are projections of this model or their
    /// biases.
    pub(super) fn check_targets(
        &self,
        base: &Checkpoint,
        path: &Path,
        targets: &[TargetInfo],
        allowed: Targets,
    ) -> Result<(), TrainError> {
        let mut problems = Vec::new();
        for target in targets {
            let name = Printable(&target.name);
            let is_of = |parts: &[Part]| parts.iter().any(|part| part.name == target.name);
            let is_weight = self.linears().any(|linear| is_of(&linear.parts));
            let is_bias = self.linears().any(|linear| is_of(&linear.bias_parts));
            let why = match base.tensor(&target.name) {
                None => "the base has no such tensor".to_owned(),
                Some(_) if is_bias && allowed == Targets::Weights => {
                    "biases are trained as a whole, not through a mask".to_owned()
                }
                Some(_) if !is_weight && !is_bias => "only projections inside layers can be trained".to_owned(),
                Some(_) if target.transposed => "only weights stored as [d_out, d_in] can be trained".to_owned(),
                Some(found) if (found.info.dtype, &found.info.shape) != (target.dtype, &target.shape) => format!(
                    "it was made for {} {:?}, the base has {} {:?}",
                    dtype_name(target.dtype),
                    target.shape,
                    dtype_name(found.info.dtype),
                    found.info.shape
                ),
                Some(_) => continue,
            };
            problems.push(format!("\"{name}\": {why}"));
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(TrainError::Tensors { path: path.to_owned(), what: "these targets cannot be trained", problems })
    }
}

/// The row layout of a bias.
pub(super) fn bias_layout(bias: TensorRef<'_>) -> RowLayout {
    RowLayout::new(&bias.info.shape, false).expect("the shapes of biases were checked")
}

/// The base's elements at all columns of a target, or `None` if they differ from those the target's file was made
/// from.
pub(super) fn verified_originals(
    ctx: &Context<'_>,
    base: &Checkpoint,
    target: &TargetInfo,
    columns: &RowColumns,
) -> Result<Option<Vec<u8>>, TrainError> {
    let tensor = base.tensor(&target.name).expect("targets were checked");
    let stored = gather_rows(ctx, tensor, target.layout, 0, columns)?;
    Ok((blake3::hash(&stored) == target.anchor).then_some(stored))
}

/// Entries of the parts of a matrix; the parts are stacked by rows.
pub(super) struct Entries {
    dtype: Dtype,
    offsets: Vec<u32>,
    columns: Vec<u32>,
    originals: Vec<u8>,
}

impl Entries {
    /// Entries without any rows yet, for a matrix of this dtype.
    pub(super) fn new(dtype: Dtype) -> Self {
        Self { dtype, offsets: vec![0], columns: Vec::new(), originals: Vec::new() }
    }

    /// Entries without any rows yet, for biases that are stacked by rows.
    ///
    /// # Errors
    /// The biases have different dtypes.
    pub(super) fn of_biases(base: &Checkpoint, parts: &[Part]) -> Result<Self, TrainError> {
        let mut found = parts.iter().filter_map(|part| base.tensor(&part.name));
        let Some(first) = found.next() else { return Ok(Self::new(Dtype::F32)) };
        if let Some(other) = found.find(|other| other.info.dtype != first.info.dtype) {
            let [one, two] = [first, other].map(|bias| (Printable(&bias.info.name), dtype_name(bias.info.dtype)));
            let what =
                format!("\"{}\" is {}, \"{}\" is {}: fused biases must have the same type", one.0, one.1, two.0, two.1);
            return Err(TrainError::Usage(what));
        }
        Ok(Self::new(first.info.dtype))
    }

    /// Appends the rows of a part that has no entries.
    pub(super) fn skip(&mut self, part: &Part) -> std::ops::Range<usize> {
        let at = self.columns.len();
        self.offsets.resize(self.offsets.len() + part.rows.len(), at as u32);
        at..at
    }

    /// Appends the rows of a part with the base's elements at its columns; returns the range of its entries.
    pub(super) fn push(&mut self, part: &Part, columns: &RowColumns, stored: Vec<u8>) -> std::ops::Range<usize> {
        assert_eq!(columns.n_rows(), part.rows.len(), "shapes were checked");
        let first = self.columns.len();
        self.offsets.extend(columns.offsets()[1..].iter().map(|&end| (first + end) as u32));
        self.columns.extend_from_slice(columns.columns());
        self.originals.extend(stored);
        first..self.columns.len()
    }

    fn trainable<D: Device>(self, device: &D) -> Result<Option<Deltas<D>>, TrainError> {
        let n_state = self.columns.len();
        self.upload(device, n_state)
    }

    /// Copies the entries to the device and allocates a gradient and the optimizer's moments for `n_state` of them;
    /// `None` if there are no entries.
    ///
    /// # Errors
    /// Errors of the device; too many entries.
    pub(super) fn upload<D: Device>(self, device: &D, n_state: usize) -> Result<Option<Deltas<D>>, TrainError> {
        let nnz = self.columns.len();
        if nnz == 0 {
            return Ok(None);
        }
        if u32::try_from(nnz).is_err() {
            return Err(TrainError::Usage(format!("{nnz} entries of one matrix, at most 2^32 are supported")));
        }
        let mut originals = device.weight(self.dtype, 1, nnz)?;
        device.write_rows(&mut originals, 0, &self.originals)?;
        Ok(Some(Deltas {
            nnz,
            offsets: device.ids(&self.offsets)?,
            columns: device.ids(&self.columns)?,
            originals,
            theta: device.zeros(nnz)?,
            grad: device.zeros(n_state)?,
            mean: device.zeros(n_state)?,
            variance: device.zeros(n_state)?,
        }))
    }
}
