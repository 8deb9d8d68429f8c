//! Adapters from arrays, for programs that trained elsewhere.

use std::path::Path;

use ndarray::ArrayView2;

use super::{AdapterError, AdapterNotes, AdapterWriter};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, CodedLayout, Context, Existing, gather_rows},
    mask::{BaseInfo, Recipe},
    tensor::{Dtype, RowColumns},
};

/// Builds an adapter for a base, target after target, from arrays of columns and values.
///
/// ```
/// use ndarray::array;
/// use neuroada_ckpt::{Adapter, AdapterBuilder, Checkpoint, Context, Dtype, Existing};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("adapter.safetensors");
/// let ctx = Context::default();
/// let base = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// let name = "model.layers.0.self_attn.k_proj.weight";
/// let n_rows = base.tensor(name).unwrap().info.shape[0] as usize;
/// // One delta of 0.5 in column 3 of every row.
/// let columns = ndarray::Array2::from_elem((n_rows, 1), 3);
/// let values = ndarray::Array2::from_elem((n_rows, 1), 0.5);
/// let mut builder = AdapterBuilder::create(&base, &path, Existing::Keep, Dtype::BF16)?;
/// builder.push(&ctx, name, columns.view(), values.view())?;
/// builder.finish(&ctx, 1.0)?;
/// assert_eq!(Adapter::open(&path)?.nnz(), n_rows as u64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct AdapterBuilder<'a> {
    base: &'a Checkpoint,
    writer: AdapterWriter,
}

impl<'a> AdapterBuilder<'a> {
    /// Begins an adapter for `base` that will appear at `path`, its values stored as F32, BF16 or F16.
    ///
    /// # Errors
    /// A file that exists and must be kept.
    pub fn create(base: &'a Checkpoint, path: &Path, existing: Existing, values: Dtype) -> Result<Self, AdapterError> {
        Ok(Self { base, writer: AdapterWriter::create(path, existing, values)? })
    }

    /// Adds a target: `columns` and `values` are `[n_rows, k]`, the columns ascending within a row; each value is what will be
    /// added to the base's weight at its column. The base's values at the positions are read, so that the adapter knows its base.
    ///
    /// # Errors
    /// A tensor that the base has not, or not with so many rows; columns that do not ascend or lie outside of the row; values
    /// that are not finite or do not fit the type.
    pub fn push(
        &mut self,
        ctx: &Context<'_>,
        name: &str,
        columns: ArrayView2<'_, u32>,
        values: ArrayView2<'_, f32>,
    ) -> Result<(), AdapterError> {
        let bad = |what: String| CheckpointError::bad_tensor(self.base.root(), name, what);
        let tensor = self.base.weight(name)?.ok_or_else(|| bad("the base has no such tensor".to_owned()))?;
        let layout = tensor.rows(false)?;
        let k = columns.ncols() as u64;
        if columns.dim() != values.dim() || columns.nrows() as u64 != layout.n_rows() || k == 0 || k > layout.d_in {
            let (found, other, n_rows, d_in) = (columns.dim(), values.dim(), layout.n_rows(), layout.d_in);
            return Err(
                bad(format!("columns are {found:?} and values {other:?}, [{n_rows}, 1 to {d_in}] is needed")).into()
            );
        }
        let mut rows = RowColumns::with_capacity(columns.nrows(), columns.len());
        for (row, columns) in columns.rows().into_iter().enumerate() {
            let columns = columns.to_vec();
            let ascend = columns.is_sorted_by(|a, b| a < b);
            if !ascend || columns.last().is_some_and(|&column| u64::from(column) >= layout.d_in) {
                return Err(
                    bad(format!("row {row}: columns must ascend below {}, found {columns:?}", layout.d_in)).into()
                );
            }
            rows.push_row(&columns);
        }
        let values: Vec<f32> = values.iter().copied().collect();
        let base_values = gather_rows(ctx, tensor, layout, 0, &rows)?;
        self.writer.begin_target(name, tensor.info.dtype, &tensor.info.shape, false, Some(k))?;
        self.writer.quantized_as(tensor.layout().map(CodedLayout::name));
        self.writer.push_rows(&rows, &values, &base_values)?;
        self.writer.end_target(None);
        Ok(())
    }

    /// Lets the adapter appear.
    ///
    /// # Errors
    /// A failure to write, no targets, one target twice.
    pub fn finish(self, ctx: &Context<'_>, scale: f64) -> Result<(), AdapterError> {
        let base = BaseInfo::of(self.base);
        self.writer.finish(ctx, scale, &Recipe::custom(), &base, &AdapterNotes::default())
    }
}
