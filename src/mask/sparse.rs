//! The common structure of masks and adapters: a tensor of columns per target, and row offsets if rows differ in
//! length.
//!
//! If every row has `k` columns: `T.columns` `[rows, k]`. Otherwise: `T.columns` `[nnz]` and `T.row_offsets`
//! `[rows + 1]`, from 0 to `nnz` (CSR). Columns are U16 or U32; U16 only up to `d_in` = 65,536. A target that is a
//! vector, such as a bias, has rows of one element: if all of it takes part, its columns are `[rows, 1]`, all 0.
//! [`SparseFile::check`] validates everything in the headers; rows are validated when they are read.

use std::{collections::BTreeSet, ops::Range, path::Path};

use super::document::{TargetEntries, TargetEntry};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, CodedLayout, Context, Header, Printable, Shard, TensorInfo, TensorRef},
    tensor::{Dtype, RowColumns, RowLayout, dtype_name},
};

/// Maximum row length whose columns fit in 16 bits.
pub(crate) const MAX_U16: u64 = 1 << 16;

/// Maximum bytes of memory per chosen position while rows of one mask or adapter are processed: its column, its value
/// as stored and widened, the weight before and after, and copies in flight.
pub(crate) const POSITION_BYTES: u64 = 64;
/// The same per row: its entries in a few offset lists.
pub(crate) const ROW_BYTES: u64 = 64;

/// A target of a mask or adapter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TargetInfo {
    /// The tensor's name in the base.
    pub name: String,
    /// The base's dtype.
    pub dtype: Dtype,
    /// The base's shape, as stored.
    pub shape: Vec<u64>,
    /// The layout of a quantized weight, such as `fp8-block`; `dtype` and `shape` are then those of the decoded weight.
    pub quantized: Option<String>,
    /// Whether the base stores each matrix as `[d_in, d_out]`.
    pub transposed: bool,
    /// The base's row layout.
    pub layout: RowLayout,
    /// BLAKE3 of the base's bytes, as stored, at the chosen positions, in ascending order of rows and of columns
    /// within a row. For a quantized weight, the bytes of the decoded float32 numbers, -0 as +0.
    pub anchor: blake3::Hash,
    /// BLAKE3 of all of the base's bytes, if recorded; for a quantized weight, codes before scales.
    pub blake3: Option<blake3::Hash>,
    /// Total number of chosen positions.
    pub nnz: u64,
    /// The number of columns per row, if the file stores them as `[rows, k]`.
    pub uniform_k: Option<u64>,
}

impl TargetInfo {
    /// The weight of `base` with the target's name, dtype, shape and layout.
    ///
    /// # Errors
    /// A quantized weight that cannot be decoded, or a read failure.
    pub fn find_in<'b>(&self, base: &'b Checkpoint) -> Result<Option<TensorRef<'b>>, CheckpointError> {
        Ok(base.weight(&self.name)?.filter(|tensor| {
            let layout = tensor.layout().map(CodedLayout::name);
            (tensor.info.dtype, &tensor.info.shape, layout) == (self.dtype, &self.shape, self.quantized.as_deref())
        }))
    }

    /// Maximum number of positions in `n_rows` of its rows, judging by the header.
    pub(crate) fn max_positions(&self, n_rows: u64) -> u64 {
        n_rows.saturating_mul(self.uniform_k.unwrap_or(self.layout.d_in)).min(self.nnz)
    }
}

/// The tensors that a target may have, by suffix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    Columns,
    RowOffsets,
    Values,
}

impl Part {
    /// The name of this tensor of `target`.
    pub fn name(self, target: &str) -> String {
        let suffix = match self {
            Self::Columns => "columns",
            Self::RowOffsets => "row_offsets",
            Self::Values => "values",
        };
        format!("{target}.{suffix}")
    }
}

/// An open mask or adapter with a validated header.
#[derive(Debug)]
pub(crate) struct SparseFile {
    shard: Shard,
    /// Sorted by name.
    targets: Vec<TargetInfo>,
}

impl SparseFile {
    /// Checks that tensors and document describe the same targets, and that all shapes and dtypes match.
    ///
    /// # Errors
    /// All problems, one line per tensor.
    pub fn check(shard: Shard, entries: TargetEntries, with_values: bool) -> Result<Self, CheckpointError> {
        let targets = check_targets(shard.path(), shard.header(), entries, with_values)?;
        Ok(Self { shard, targets })
    }

    pub fn shard(&self) -> &Shard {
        &self.shard
    }
    pub fn targets(&self) -> &[TargetInfo] {
        &self.targets
    }
    pub fn target(&self, name: &str) -> Option<&TargetInfo> {
        let found = self.targets.binary_search_by(|target| target.name.as_str().cmp(name)).ok()?;
        Some(&self.targets[found])
    }

    /// One of a target's tensors.
    ///
    /// # Panics
    /// If the target is not in this file.
    pub fn tensor(&self, target: &TargetInfo, part: Part) -> &TensorInfo {
        self.shard.header().tensor(&part.name(&target.name)).expect("the target is in this file")
    }

    /// The error for an invalid tensor of this file.
    pub fn bad(&self, target: &TargetInfo, part: Part, what: impl Into<String>) -> CheckpointError {
        CheckpointError::bad_tensor(self.shard.path(), &part.name(&target.name), what)
    }

    /// Splits a target's rows into runs of at most about `max_len` positions and rows.
    pub fn row_ranges(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        max_len: u64,
    ) -> Result<Vec<Range<u64>>, CheckpointError> {
        let n_rows = target.layout.n_rows();
        if let Some(k) = target.uniform_k {
            let step = (max_len / k).max(1);
            return Ok((0..n_rows).step_by(step as usize).map(|row| row..n_rows.min(row + step)).collect());
        }
        let mut ranges = Vec::new();
        let (mut start, mut start_offset) = (0, 0);
        let step = (ctx.window_bytes() / 8).max(1);
        for first in (0..n_rows).step_by(step as usize) {
            let offsets = self.read_offsets(ctx, target, first..n_rows.min(first + step))?;
            for (row, pair) in (first..).zip(offsets.windows(2)) {
                if row > start && (pair[1] - start_offset > max_len || row - start >= max_len) {
                    ranges.push(start..row);
                    (start, start_offset) = (row, pair[0]);
                }
            }
        }
        ranges.push(start..n_rows);
        Ok(ranges)
    }

    /// Number of positions before `row`.
    pub fn first_position(&self, ctx: &Context<'_>, target: &TargetInfo, row: u64) -> Result<u64, CheckpointError> {
        match target.uniform_k {
            Some(k) => Ok(row * k),
            None => Ok(self.read_offsets(ctx, target, row..row)?[0]),
        }
    }

    /// Number of positions in `rows`; the maximum possible number if it cannot be read, an error that is reported when
    /// the rows are read.
    pub fn n_positions(&self, ctx: &Context<'_>, target: &TargetInfo, rows: &Range<u64>) -> u64 {
        let max_len = target.max_positions(rows.end - rows.start);
        if target.uniform_k.is_some() {
            return max_len;
        }
        let before = |row| self.first_position(ctx, target, row);
        match (before(rows.start), before(rows.end)) {
            (Ok(start), Ok(end)) => end.checked_sub(start).map_or(max_len, |n| n.min(max_len)),
            _ => max_len,
        }
    }

    /// Reads the columns of `rows` and checks that they ascend within each row and are in range.
    ///
    /// Memory: 4 bytes per position, 16 per row, and one window.
    ///
    /// # Panics
    /// If the target is not in this file or has no such rows.
    pub fn read_columns(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<RowColumns, CheckpointError> {
        assert!(rows.start <= rows.end && rows.end <= target.layout.n_rows(), "the target has these rows");
        let offsets = match target.uniform_k {
            Some(k) => (rows.start..=rows.end).map(|row| row * k).collect(),
            None => self.read_offsets(ctx, target, rows.clone())?,
        };
        let (first, last) = (offsets[0], offsets[offsets.len() - 1]);
        let tensor = self.tensor(target, Part::Columns);
        let mut columns = Vec::with_capacity((last - first) as usize);
        self.for_each_window(ctx, tensor, first..last, |bytes| match tensor.dtype {
            Dtype::U16 => {
                columns.extend(bytes.chunks_exact(2).map(|le| u32::from(u16::from_le_bytes([le[0], le[1]]))));
            }
            _ => columns.extend(bytes.chunks_exact(4).map(|le| u32::from_le_bytes([le[0], le[1], le[2], le[3]]))),
        })?;
        let mut checked = RowColumns::with_capacity(offsets.len() - 1, columns.len());
        for (row, pair) in (rows.start..).zip(offsets.windows(2)) {
            let columns = &columns[(pair[0] - first) as usize..(pair[1] - first) as usize];
            self.check_row(target, row, columns)?;
            checked.push_row(columns);
        }
        Ok(checked)
    }

    fn check_row(&self, target: &TargetInfo, row: u64, columns: &[u32]) -> Result<(), CheckpointError> {
        let d_in = target.layout.d_in;
        let what = if let Some(pair) = columns.windows(2).find(|pair| pair[0] >= pair[1]) {
            match pair[0] == pair[1] {
                true => format!("row {row} has column {} twice", pair[0]),
                false => format!("row {row}: columns must ascend, found {} after {}", pair[1], pair[0]),
            }
        } else if let Some(&column) = columns.last().filter(|&&column| u64::from(column) >= d_in) {
            format!("row {row}: column {column} is outside a row of length {d_in}")
        } else {
            return Ok(());
        };
        Err(self.bad(target, Part::Columns, what))
    }

    /// The offsets of `rows` and of the next row, checked to ascend from 0 to the number of columns.
    fn read_offsets(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<Vec<u64>, CheckpointError> {
        let tensor = self.tensor(target, Part::RowOffsets);
        let mut offsets = Vec::with_capacity((rows.end - rows.start + 1) as usize);
        let wide = tensor.dtype == Dtype::U64;
        self.for_each_window(ctx, tensor, rows.start..rows.end + 1, |bytes| {
            if wide {
                offsets.extend(bytes.chunks_exact(8).map(|le| u64::from_le_bytes(le.try_into().expect("eight bytes"))));
            } else {
                let wider = |le: &[u8]| u64::from(u32::from_le_bytes(le.try_into().expect("four bytes")));
                offsets.extend(bytes.chunks_exact(4).map(wider));
            }
        })?;
        let bad = |what: String| Err(self.bad(target, Part::RowOffsets, what));
        if rows.start == 0 && offsets[0] != 0 {
            return bad(format!("row_offsets must start at 0, found {}", offsets[0]));
        }
        let (last, nnz) = (offsets[offsets.len() - 1], target.nnz);
        if last > nnz {
            return bad(format!("row_offsets reach {last}, but there are {nnz} columns"));
        }
        if rows.end == target.layout.n_rows() && last != nnz {
            return bad(format!("row_offsets end at {last}, but there are {nnz} columns"));
        }
        for (row, pair) in (rows.start..).zip(offsets.windows(2)) {
            if pair[0] > pair[1] {
                return bad(format!("row {row} would end at {} before it begins at {}", pair[1], pair[0]));
            }
            if pair[1] - pair[0] > target.layout.d_in {
                let found = pair[1] - pair[0];
                return bad(format!("row {row} has {found} columns, at most {} are possible", target.layout.d_in));
            }
        }
        Ok(offsets)
    }

    /// Passes the elements `range` of a tensor to `sink`, in order, in windows of whole elements.
    pub fn for_each_window(
        &self,
        ctx: &Context<'_>,
        tensor: &TensorInfo,
        range: Range<u64>,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<(), CheckpointError> {
        /// Ranges up to this size are read into a buffer, because mapping them costs more.
        const SMALL: u64 = 64 << 10;
        let element_bytes = tensor.dtype.bitsize() as u64 / 8;
        let step = ctx.window_bytes() / 8 * 8;
        let (mut at, end) = (range.start * element_bytes, range.end * element_bytes);
        while at < end {
            ctx.check()?;
            let n = step.min(end - at);
            if n <= SMALL {
                let mut bytes = vec![0; n as usize];
                self.shard.read_at(&mut bytes, self.shard.file_range(tensor).start + at)?;
                sink(&bytes);
            } else {
                let window = self.shard.window(ctx, tensor, at..at + n)?;
                sink(&window);
                self.shard.confirm(&window)?;
            }
            at += n;
        }
        Ok(())
    }
}

/// The targets that a header and a document describe.
///
/// # Errors
/// All problems, one line per tensor.
pub(crate) fn check_targets(
    path: &Path,
    header: &Header,
    entries: TargetEntries,
    with_values: bool,
) -> Result<Vec<TargetInfo>, CheckpointError> {
    if entries.0.is_empty() {
        return Err(CheckpointError::bad_file(path, "the `neuroada` document lists no targets"));
    }
    let mut problems = Vec::new();
    let mut known = BTreeSet::new();
    let mut targets = Vec::with_capacity(entries.0.len());
    for (name, entry) in entries.0 {
        known.insert(Part::Columns.name(&name));
        known.insert(Part::RowOffsets.name(&name));
        if with_values {
            known.insert(Part::Values.name(&name));
        }
        match check_target(header, name, entry, with_values) {
            Ok(target) => targets.push(target),
            Err(problem) => problems.push(problem),
        }
    }
    for tensor in header.by_name() {
        if !known.contains(&tensor.name) {
            problems.push((tensor.name.clone(), "does not belong to a target of the `neuroada` document".to_owned()));
        }
    }
    match problems.len() {
        0 => Ok(targets),
        1 => Err(CheckpointError::bad_tensor(path, &problems[0].0, &*problems[0].1)),
        n => Err(CheckpointError::Many {
            path: path.to_owned(),
            what: format!("{n} problems"),
            problems: problems
                .into_iter()
                .map(|(tensor, what)| format!("tensor \"{}\": {what}", Printable(&tensor)))
                .collect(),
        }),
    }
}

/// Validates one target by the headers; an error names the tensor and the problem.
fn check_target(
    header: &Header,
    name: String,
    entry: TargetEntry,
    with_values: bool,
) -> Result<TargetInfo, (String, String)> {
    let TargetEntry { dtype, shape, anchor, blake3, transposed, layout: quantized } = entry;
    let layout = match RowLayout::of(dtype, &shape, transposed) {
        Ok(layout) => layout,
        Err(what) => return Err((name, format!("as a target: {what}"))),
    };
    let find = |part: Part| header.tensor(&part.name(&name));
    let columns = find(Part::Columns).ok_or_else(|| (name.clone(), "the target has no `columns`".to_owned()))?;
    let bad = |part: Part, what: String| Err((part.name(&name), what));
    match columns.dtype {
        Dtype::U16 if layout.d_in <= MAX_U16 => {}
        Dtype::U16 => return bad(Part::Columns, format!("rows of {} need U32, found U16", layout.d_in)),
        Dtype::U32 => {}
        other => return bad(Part::Columns, format!("elements must be U16 or U32, found {}", dtype_name(other))),
    }
    let n_rows = layout.n_rows();
    let uniform_k = match (find(Part::RowOffsets), &columns.shape[..]) {
        (None, &[rows, k]) => {
            if rows != n_rows {
                return bad(Part::Columns, format!("{rows} rows, but the target {shape:?} has {n_rows}"));
            }
            if k == 0 || k > layout.d_in {
                return bad(Part::Columns, format!("k is {k}, must be from 1 to {}", layout.d_in));
            }
            Some(k)
        }
        (Some(offsets), &[_nnz]) => {
            if !matches!(offsets.dtype, Dtype::U32 | Dtype::U64) {
                let found = dtype_name(offsets.dtype);
                return bad(Part::RowOffsets, format!("elements must be U32 or U64, found {found}"));
            }
            if offsets.shape.len() != 1 || offsets.shape[0].checked_sub(1) != Some(n_rows) {
                let needed = n_rows.saturating_add(1);
                return bad(Part::RowOffsets, format!("expected shape [{needed}], found {:?}", offsets.shape));
            }
            None
        }
        (None, found) => {
            let what = format!("expected shape [{n_rows}, k] without row_offsets, found {found:?}");
            return bad(Part::Columns, what);
        }
        (Some(_), found) => {
            return bad(Part::Columns, format!("expected one dimension with row_offsets, found {found:?}"));
        }
    };
    if with_values {
        let Some(values) = find(Part::Values) else {
            return Err((name, "the target has no `values`".to_owned()));
        };
        if !matches!(values.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            let found = dtype_name(values.dtype);
            return bad(Part::Values, format!("elements must be F32, BF16 or F16, found {found}"));
        }
        if values.shape != columns.shape {
            let what = format!("shape {:?}, but the columns have {:?}", values.shape, columns.shape);
            return bad(Part::Values, what);
        }
    }
    let nnz = columns.n_elements();
    Ok(TargetInfo { name, dtype, shape, quantized, transposed, layout, anchor, blake3, nnz, uniform_k })
}
