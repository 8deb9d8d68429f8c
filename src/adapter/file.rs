//! Adapter files: deltas on chosen columns.

use std::{ops::Range, path::Path};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::{
    AdapterError, AdapterId,
    id::{IdHasher, RowHasher},
};
use crate::{
    checkpoint::{CheckpointError, Context, Existing, Shard},
    mask::{
        BaseInfo, FORMAT_VERSION, Part, Recipe, SparseFile, SparseWriter, TargetEntries, TargetInfo, parse_document,
    },
    tensor::{Dtype, RowColumns},
};

/// The kind of an adapter's document.
const KIND: &str = "adapter";
/// Positions and rows that are read in one piece when all are read.
const RUN: u64 = 1 << 18;

/// What people want to know of an adapter; not part of its id.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct AdapterNotes {
    /// Under what terms it may be used, as an SPDX expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    /// What it was trained for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Who trained it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// How it was trained, free in form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterDocument {
    kind: String,
    version: u64,
    scale: f64,
    recipe: Recipe,
    base: BaseInfo,
    targets: TargetEntries,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    license: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    author: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    training: Option<serde_json::Value>,
}

/// The deltas of a run of rows.
#[derive(Clone, PartialEq, Debug)]
pub struct DeltaRows {
    /// Chosen columns, row by row.
    pub columns: RowColumns,
    /// `[columns.nnz()]` deltas, widened exactly.
    pub values: Vec<f32>,
}

/// An open adapter: header in memory, columns and values on disk.
#[derive(Debug)]
pub struct Adapter {
    file: SparseFile,
    scale: f64,
    recipe: Recipe,
    base: BaseInfo,
    notes: AdapterNotes,
}

impl Adapter {
    /// Opens an adapter file and proves all that its header can show. Reads the header only.
    ///
    /// # Errors
    /// What the file is instead, or a list of all that does not fit together.
    pub fn open(path: &Path) -> Result<Self, AdapterError> {
        let shard = Shard::open(path)?;
        let document: AdapterDocument = parse_document(&shard, KIND)?;
        let AdapterDocument { scale, recipe, base, targets, license, description, author, training, .. } = document;
        if !scale.is_finite() {
            return Err(CheckpointError::bad_file(path, format!("scale {scale} is not a finite number")).into());
        }
        let notes = AdapterNotes { license, description, author, training };
        Ok(Self { file: SparseFile::check(shard, targets, true)?, scale, recipe, base, notes })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.shard().path()
    }
    /// The open file, for its header and for noticing changes.
    pub fn shard(&self) -> &Shard {
        self.file.shard()
    }
    /// Bytes of the file.
    pub fn n_bytes(&self) -> u64 {
        self.file.shard().file_bytes()
    }
    /// What every delta is multiplied by, unless a merge says otherwise.
    pub fn scale(&self) -> f64 {
        self.scale
    }
    /// How the columns were chosen.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }
    /// What the base is called.
    pub fn base(&self) -> &BaseInfo {
        &self.base
    }
    /// What people want to know of it.
    pub fn notes(&self) -> &AdapterNotes {
        &self.notes
    }
    /// All targets, by name.
    pub fn targets(&self) -> &[TargetInfo] {
        self.file.targets()
    }
    /// The target of this name.
    pub fn target(&self, name: &str) -> Option<&TargetInfo> {
        self.file.target(name)
    }
    /// Deltas in all.
    pub fn nnz(&self) -> u64 {
        self.targets().iter().map(|target| target.nnz).sum()
    }
    /// The type that a target's values are stored in: F32, BF16 or F16.
    pub fn values_dtype(&self, target: &TargetInfo) -> Dtype {
        self.file.tensor(target, Part::Values).dtype
    }

    /// Cuts a target's rows into runs of at most about `most` positions and rows, for reading one run at a time.
    ///
    /// # Errors
    /// Row offsets that do not ascend from 0 to the number of columns.
    pub fn row_ranges(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        most: u64,
    ) -> Result<Vec<Range<u64>>, AdapterError> {
        Ok(self.file.row_ranges(ctx, target, most)?)
    }

    /// Reads the deltas of `rows` of a target, proven to be finite and on ascending columns inside the row.
    ///
    /// Memory: about 10 bytes per position and 16 per row, and one window.
    ///
    /// # Errors
    /// A column or value that may not be, naming the row.
    ///
    /// # Panics
    /// Where the target is not this adapter's or has no such rows.
    pub fn read_rows(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<DeltaRows, AdapterError> {
        let (columns, stored) = self.read_stored(ctx, target, rows.clone())?;
        let values = self.widen_finite(target, rows.start, &columns, &stored)?;
        Ok(DeltaRows { columns, values })
    }

    /// Widens stored values, proven to be finite.
    fn widen_finite(
        &self,
        target: &TargetInfo,
        first_row: u64,
        columns: &RowColumns,
        stored: &[u8],
    ) -> Result<Vec<f32>, AdapterError> {
        let values = widen(self.values_dtype(target), stored);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let row = first_row + columns.row_of(at) as u64;
            let what = format!("row {row}, column {}: the delta is {}", columns.columns()[at], values[at]);
            return Err(self.file.bad(target, Part::Values, what).into());
        }
        Ok(values)
    }

    /// Columns and values of `rows`, the values as stored.
    fn read_stored(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<(RowColumns, Vec<u8>), AdapterError> {
        let first = self.file.first_position(ctx, target, rows.start)?;
        let columns = self.file.read_columns(ctx, target, rows)?;
        let tensor = self.file.tensor(target, Part::Values);
        let mut values = Vec::with_capacity(columns.nnz() * tensor.dtype.bitsize() / 8);
        let range = first..first + columns.nnz() as u64;
        self.file.for_each_window(ctx, tensor, range, |bytes| values.extend_from_slice(bytes))?;
        Ok((columns, values))
    }

    /// Computes the adapter's id, reading and proving all of it. Memory: a run of rows.
    ///
    /// # Errors
    /// A column or value that may not be, naming tensor and row.
    pub fn id(&self, ctx: &Context<'_>) -> Result<AdapterId, AdapterError> {
        let mut hasher = IdHasher::new(self.scale);
        for target in self.targets() {
            let mut rows = RowHasher::default();
            for range in self.row_ranges(ctx, target, RUN)? {
                let (columns, stored) = self.read_stored(ctx, target, range.clone())?;
                self.widen_finite(target, range.start, &columns, &stored)?;
                rows.rows(&columns, &stored);
            }
            hasher.target(target, self.values_dtype(target), &rows);
        }
        Ok(hasher.finish())
    }
}

/// Widens stored values to f32; exact.
pub(super) fn widen(dtype: Dtype, stored: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => stored.chunks_exact(4).map(|le| f32::from_le_bytes([le[0], le[1], le[2], le[3]])).collect(),
        Dtype::BF16 => stored.chunks_exact(2).map(|le| bf16::from_le_bytes([le[0], le[1]]).to_f32()).collect(),
        Dtype::F16 => stored.chunks_exact(2).map(|le| f16::from_le_bytes([le[0], le[1]]).to_f32()).collect(),
        other => unreachable!("values are F32, BF16 or F16, not {other:?}"),
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

    /// Appends rows to the open target: one value per column, rounded to the adapter's type, and the base's bytes at the
    /// columns, in the same order.
    ///
    /// # Errors
    /// A value that is not finite, or not when rounded, naming the row.
    ///
    /// # Panics
    /// Where a row does not fit the target, or lengths disagree.
    pub fn push_rows(&mut self, columns: &RowColumns, values: &[f32], base_values: &[u8]) -> Result<(), AdapterError> {
        assert_eq!(values.len(), columns.nnz(), "one value per column");
        let stored = narrow(self.values, values).map_err(|at| {
            let (row, column) = (self.n_rows + columns.row_of(at) as u64, columns.columns()[at]);
            let dtype = crate::tensor::dtype_name(self.values);
            let what = format!("row {row}, column {column}: the delta {} does not fit {dtype}", values[at]);
            CheckpointError::bad_tensor(&self.path, &self.target, what)
        })?;
        self.n_rows += columns.n_rows() as u64;
        Ok(self.file.push_rows(columns, &stored, base_values)?)
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
            let (kind, version) = (KIND.to_owned(), FORMAT_VERSION);
            let document =
                AdapterDocument { kind, version, scale, recipe, base, targets, license, description, author, training };
            serde_json::to_string(&document)
        })?)
    }
}
