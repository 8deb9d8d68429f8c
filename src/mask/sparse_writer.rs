//! Writes the common structure of masks and adapters, in one pass over the rows.

use std::{collections::BTreeMap, path::Path};

use super::{
    document::{TargetEntries, TargetEntry},
    sparse::{MAX_U16, Part, SparseFile, TargetInfo},
};
use crate::{
    checkpoint::{CheckpointError, Context, DOCUMENT_KEY, Existing, TensorFileWriter, TensorId},
    tensor::{Dtype, RowColumns, RowLayout},
};

/// A mask or adapter being written; appears atomically when it is finished.
///
/// Memory: one buffer, and about 300 bytes per target.
pub(crate) struct SparseWriter {
    file: TensorFileWriter,
    path: std::path::PathBuf,
    values: Option<Dtype>,
    open: Option<OpenTarget>,
    entries: Vec<(String, TargetEntry)>,
    bytes: Vec<u8>,
}

struct OpenTarget {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    quantized: Option<String>,
    layout: RowLayout,
    uniform_k: Option<u64>,
    columns: TensorId,
    offsets: Option<(TensorId, Dtype)>,
    values: Option<TensorId>,
    anchor: blake3::Hasher,
    n_rows: u64,
    nnz: u64,
}

impl SparseWriter {
    /// Starts a file at `path`; with a dtype `values`, each target also has `T.values` of that dtype.
    pub fn create(path: &Path, existing: Existing, values: Option<Dtype>) -> Result<Self, CheckpointError> {
        let file = TensorFileWriter::create(path, existing)?;
        let path = path.to_owned();
        Ok(Self { file, path, values, open: None, entries: Vec::new(), bytes: Vec::new() })
    }

    /// Sets the dtype of the values of the targets that follow.
    pub fn store_as(&mut self, values: Dtype) {
        assert!(self.open.is_none(), "one target at a time");
        self.values = Some(values);
    }

    pub fn begin_target(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        transposed: bool,
        uniform_k: Option<u64>,
    ) -> Result<(), CheckpointError> {
        assert!(self.open.is_none(), "one target at a time");
        let bad = |what: String| Err(CheckpointError::bad_tensor(&self.path, name, what));
        let layout = match RowLayout::of(dtype, shape, transposed) {
            Ok(layout) => layout,
            Err(what) => return bad(what),
        };
        if let Some(k) = uniform_k.filter(|&k| k == 0 || k > layout.d_in) {
            return bad(format!("k is {k}, must be from 1 to {}", layout.d_in));
        }
        let columns_dtype = if layout.d_in <= MAX_U16 { Dtype::U16 } else { Dtype::U32 };
        let columns = self.file.add_tensor(Part::Columns.name(name), columns_dtype);
        let offsets = uniform_k.is_none().then(|| {
            // The dtype must be chosen before the last offset is known: by the maximum possible, not the actual
            // number.
            let dtype = if u32::try_from(layout.n_elements()).is_ok() { Dtype::U32 } else { Dtype::U64 };
            (self.file.add_tensor(Part::RowOffsets.name(name), dtype), dtype)
        });
        let values = self.values.map(|dtype| self.file.add_tensor(Part::Values.name(name), dtype));
        self.open = Some(OpenTarget {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            quantized: None,
            layout,
            uniform_k,
            columns,
            offsets,
            values,
            anchor: blake3::Hasher::new(),
            n_rows: 0,
            nnz: 0,
        });
        if offsets.is_some() {
            self.push_offsets(&[0])?;
        }
        Ok(())
    }

    /// Says how the base stores the open target, a quantized weight, before its first rows come.
    pub fn quantized_as(&mut self, layout: Option<&str>) {
        let target = self.open.as_mut().expect("a target is open");
        assert_eq!(target.n_rows, 0, "a layout comes before the rows");
        target.quantized = layout.map(str::to_owned);
    }

    /// Appends rows; `values` is empty for masks.
    pub fn push_rows(
        &mut self,
        columns: &RowColumns,
        values: &[u8],
        base_values: &[u8],
    ) -> Result<(), CheckpointError> {
        let target = self.open.as_mut().expect("a target is open");
        let n_bytes = columns.nnz() * target.dtype.bitsize() / 8;
        assert_eq!(base_values.len(), n_bytes, "one base value per position");
        target.anchor.update(base_values);
        self.push_rows_unanchored(columns, values)
    }

    /// Appends rows of a target whose anchor is already known.
    pub fn push_rows_unanchored(&mut self, columns: &RowColumns, values: &[u8]) -> Result<(), CheckpointError> {
        let target = self.open.as_mut().expect("a target is open");
        let n_bytes = |dtype: Dtype| columns.nnz() * dtype.bitsize() / 8;
        assert_eq!(values.len(), self.values.map_or(0, n_bytes), "one value per position");
        let d_in = target.layout.d_in;
        for row in 0..columns.n_rows() {
            let row = columns.row(row);
            assert!(row.is_sorted_by(|a, b| a < b), "columns ascend within a row");
            assert!(row.last().is_none_or(|&column| u64::from(column) < d_in), "columns are in range");
            assert!(target.uniform_k.is_none_or(|k| k == row.len() as u64), "every row has k columns");
        }
        let before = target.nnz;
        target.n_rows += columns.n_rows() as u64;
        target.nnz += columns.nnz() as u64;
        assert!(target.n_rows <= target.layout.n_rows(), "at most as many rows as the target has");
        self.bytes.clear();
        if d_in <= MAX_U16 {
            put_le(&mut self.bytes, columns.columns(), |column| (column as u16).to_le_bytes());
        } else {
            put_le(&mut self.bytes, columns.columns(), u32::to_le_bytes);
        }
        self.file.append(target.columns, &self.bytes)?;
        if let Some(id) = target.values {
            self.file.append(id, values)?;
        }
        if target.offsets.is_some() {
            let offsets: Vec<u64> = columns.offsets()[1..].iter().map(|&offset| before + offset as u64).collect();
            self.push_offsets(&offsets)?;
        }
        Ok(())
    }

    fn push_offsets(&mut self, offsets: &[u64]) -> Result<(), CheckpointError> {
        let target = self.open.as_ref().expect("a target is open");
        let (id, dtype) = target.offsets.expect("rows differ in count");
        self.bytes.clear();
        match dtype {
            Dtype::U32 => self.bytes.extend(offsets.iter().flat_map(|&offset| (offset as u32).to_le_bytes())),
            _ => self.bytes.extend(offsets.iter().flat_map(|offset| offset.to_le_bytes())),
        }
        self.file.append(id, &self.bytes)
    }

    /// Ends the open target; returns its number of positions and its anchor.
    pub fn end_target(&mut self, whole: Option<blake3::Hash>) -> (u64, blake3::Hash) {
        let anchor = self.open.as_ref().expect("a target is open").anchor.finalize();
        self.end_target_anchored(anchor, whole)
    }

    /// Ends the open target, whose anchor is already known.
    pub fn end_target_anchored(&mut self, anchor: blake3::Hash, whole: Option<blake3::Hash>) -> (u64, blake3::Hash) {
        let target = self.open.take().expect("a target is open");
        let OpenTarget { name, dtype, shape, quantized, layout, nnz, .. } = target;
        assert_eq!(target.n_rows, layout.n_rows(), "all rows of \"{name}\" were written");
        let listed = match target.uniform_k {
            Some(k) => vec![layout.n_rows(), k],
            None => vec![nnz],
        };
        self.file.finish_tensor(target.columns, listed.clone());
        if let Some((id, _)) = target.offsets {
            self.file.finish_tensor(id, vec![layout.n_rows() + 1]);
        }
        if let Some(id) = target.values {
            self.file.finish_tensor(id, listed);
        }
        let entry =
            TargetEntry { dtype, shape, anchor, blake3: whole, transposed: layout.transposed, layout: quantized };
        self.entries.push((name, entry));
        (nnz, anchor)
    }

    /// Copies a target of another file with the same dtype of values, unchanged.
    pub fn copy_target(
        &mut self,
        ctx: &Context<'_>,
        from: &SparseFile,
        target: &TargetInfo,
    ) -> Result<(), CheckpointError> {
        assert!(self.open.is_none(), "one target at a time");
        let header = from.shard().header();
        for part in [Part::Columns, Part::RowOffsets, Part::Values] {
            let Some(info) = header.tensor(&part.name(&target.name)) else { continue };
            let id = self.file.add_tensor(info.name.clone(), info.dtype);
            for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
                ctx.check()?;
                let window = from.shard().window(ctx, info, start..info.n_bytes().min(start + ctx.window_bytes()))?;
                self.file.append(id, &window)?;
                from.shard().confirm(&window)?;
                ctx.observer.advance(window.len() as u64);
            }
            self.file.finish_tensor(id, info.shape.clone());
        }
        let TargetInfo { name, dtype, shape, quantized: layout, transposed, anchor, blake3, .. } = target.clone();
        self.entries.push((name, TargetEntry { dtype, shape, anchor, blake3, transposed, layout }));
        Ok(())
    }

    /// Builds the document from the targets' entries with `document`, writes it and commits the file.
    ///
    /// # Errors
    /// A failure to write; a file without targets; two targets of the same name.
    pub fn finish(
        self,
        ctx: &Context<'_>,
        document: impl FnOnce(TargetEntries) -> serde_json::Result<String>,
    ) -> Result<(), CheckpointError> {
        let Self { file, path, open, mut entries, .. } = self;
        assert!(open.is_none(), "the last target is ended");
        if entries.is_empty() {
            return Err(CheckpointError::bad_file(&path, "it would have no targets"));
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        let json = document(TargetEntries(entries))
            .map_err(|e| CheckpointError::bad_file(&path, format!("its document cannot be written: {e}")))?;
        file.finish(ctx, &BTreeMap::from([(DOCUMENT_KEY.to_owned(), json)]))
    }
}

/// Appends the little-endian bytes of each number.
fn put_le<const BYTES: usize>(bytes: &mut Vec<u8>, numbers: &[u32], le: impl Fn(u32) -> [u8; BYTES]) {
    let start = bytes.len();
    bytes.resize(start + numbers.len() * BYTES, 0);
    for (bytes, &number) in bytes[start..].as_chunks_mut().0.iter_mut().zip(numbers) {
        *bytes = le(number);
    }
}
