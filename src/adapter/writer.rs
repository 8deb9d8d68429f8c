//! Adapter files as they are written.

use std::path::Path;

use half::{bf16, f16};

use super::{
    AdapterError, AdapterNotes,
    file::{AdapterDocument, KIND},
};
use crate::{
    checkpoint::{CheckpointError, Context, Existing},
    mask::{BaseInfo, Recipe, SparseWriter},
    tensor::{Dtype, RowColumns},
};

/// Writes an adapter file in one pass over the rows.
///
/// Targets may come in any order, the rows of each in theirs. The file appears whole, at [`AdapterWriter::finish`], or
/// not at all. The same content gives the same bytes, however the rows were cut into runs.
///
/// Memory: a buffer, and about 300 bytes per target.
pub struct AdapterWriter {
    file: SparseWriter,
    path: std::path::PathBuf,
    values: Dtype,
    target: String,
    n_rows: u64,
}

impl AdapterWriter {
    /// Begins an adapter that will appear at `path`, its values stored as `values`.
    ///
    /// # Errors
    /// A file that exists and must be kept.
    ///
    /// # Panics
    /// Where `values` is not F32, BF16 or F16.
    pub fn create(path: &Path, existing: Existing, values: Dtype) -> Result<Self, AdapterError> {
        assert!(matches!(values, Dtype::F32 | Dtype::BF16 | Dtype::F16), "values are F32, BF16 or F16");
        let file = SparseWriter::create(path, existing, Some(values))?;
        Ok(Self { file, path: path.to_owned(), values, target: String::new(), n_rows: 0 })
    }

    /// Stores the values of the targets that begin from here on as `values`: F32, BF16 or F16.
    ///
    /// # Panics
    /// Where `values` is another type, or a target is open.
    pub fn store_as(&mut self, values: Dtype) {
        assert!(matches!(values, Dtype::F32 | Dtype::BF16 | Dtype::F16), "values are F32, BF16 or F16");
        self.values = values;
        self.file.store_as(values);
    }

    /// Begins a target: the base's tensor `name`, its type and shape as stored. With `uniform_k` every row has that many
    /// columns; without, rows may differ.
    ///
    /// # Errors
    /// A type or shape that has no rows of floats, or a `k` that does not fit.
    ///
    /// # Panics
    /// Where the target before was not ended.
    pub fn begin_target(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        transposed: bool,
        uniform_k: Option<u64>,
    ) -> Result<(), AdapterError> {
        name.clone_into(&mut self.target);
        self.n_rows = 0;
        Ok(self.file.begin_target(name, dtype, shape, transposed, uniform_k)?)
    }

    /// Says how the base stores the open target, a quantized weight, before its first rows come: by its layout's name, such as
    /// `fp8-block`. Type and shape are then those of what it is decoded to.
    ///
    /// # Panics
    /// Where no target is open, or rows came.
    pub fn quantized_as(&mut self, layout: Option<&str>) {
        self.file.quantized_as(layout);
    }

    /// Appends rows to the open target: one value per column, rounded to the adapter's type, and the base's bytes at the
    /// columns, in the same order.
    ///
    /// # Errors
    /// A value that is not finite, or not when rounded, naming the row.
    ///
    /// # Panics
    /// Where a row does not fit the target, or lengths disagree.
    pub fn push_rows(&mut self, columns: &RowColumns, values: &[f32], base_values: &[u8]) -> Result<(), AdapterError> {
        let stored = self.narrow(columns, values)?;
        self.n_rows += columns.n_rows() as u64;
        Ok(self.file.push_rows(columns, &stored, base_values)?)
    }

    fn narrow(&self, columns: &RowColumns, values: &[f32]) -> Result<Vec<u8>, CheckpointError> {
        assert_eq!(values.len(), columns.nnz(), "one value per column");
        narrow(self.values, values).map_err(|at| {
            let (row, column) = (self.n_rows + columns.row_of(at) as u64, columns.columns()[at]);
            let dtype = crate::tensor::dtype_name(self.values);
            let what = format!("row {row}, column {column}: the delta {} does not fit {dtype}", values[at]);
            CheckpointError::bad_tensor(&self.path, &self.target, what)
        })
    }

    /// The same without the base's bytes, for [`Self::end_target_anchored`].
    ///
    /// # Errors
    /// As [`Self::push_rows`].
    ///
    /// # Panics
    /// As [`Self::push_rows`].
    pub fn push_rows_unanchored(&mut self, columns: &RowColumns, values: &[f32]) -> Result<(), AdapterError> {
        let stored = self.narrow(columns, values)?;
        self.n_rows += columns.n_rows() as u64;
        Ok(self.file.push_rows_unanchored(columns, &stored)?)
    }

    /// Ends the open target, whose anchor is known: BLAKE3 over the base's bytes at its positions.
    ///
    /// # Panics
    /// Where not all rows came.
    pub fn end_target_anchored(&mut self, anchor: blake3::Hash, whole: Option<blake3::Hash>) -> (u64, blake3::Hash) {
        self.file.end_target_anchored(anchor, whole)
    }

    /// Ends the open target; `whole` is the BLAKE3 of all of the base's bytes, where it was asked for. Returns the number
    /// of deltas and the anchor.
    ///
    /// # Panics
    /// Where not all rows came.
    pub fn end_target(&mut self, whole: Option<blake3::Hash>) -> (u64, blake3::Hash) {
        self.file.end_target(whole)
    }

    /// Writes the document and lets the file appear.
    ///
    /// # Errors
    /// A failure to write, an adapter without targets, two targets of one name, output that came to exist meanwhile.
    ///
    /// # Panics
    /// Where the last target was not ended, or `scale` is not finite.
    pub fn finish(
        self,
        ctx: &Context<'_>,
        scale: f64,
        recipe: &Recipe,
        base: &BaseInfo,
        notes: &AdapterNotes,
    ) -> Result<(), AdapterError> {
        assert!(scale.is_finite(), "a scale is a finite number");
        let (recipe, base) = (recipe.clone(), base.clone());
        let AdapterNotes { license, description, author, training } = notes.clone();
        Ok(self.file.finish(ctx, |targets| {
            let (kind, version) = (KIND.to_owned(), targets.version());
            let document =
                AdapterDocument { kind, version, scale, recipe, base, targets, license, description, author, training };
            serde_json::to_string(&document)
        })?)
    }
}

/// Rounds values to the type they are stored in, nearest even.
///
/// # Errors
/// The index of the first value that is not finite, before or after rounding.
pub(super) fn narrow(dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, usize> {
    let mut stored = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    for (i, &value) in values.iter().enumerate() {
        let is_finite = match dtype {
            Dtype::F32 => {
                stored.extend(value.to_le_bytes());
                value.is_finite()
            }
            Dtype::BF16 => {
                let value = bf16::from_f32(value);
                stored.extend(value.to_le_bytes());
                value.is_finite()
            }
            Dtype::F16 => {
                let value = f16::from_f32(value);
                stored.extend(value.to_le_bytes());
                value.is_finite()
            }
            other => unreachable!("values are F32, BF16 or F16, not {other:?}"),
        };
        if !is_finite {
            return Err(i);
        }
    }
    Ok(stored)
}
