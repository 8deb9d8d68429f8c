//! Adapter files: deltas on chosen columns.

use std::{
    collections::BTreeMap,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, OnceLock},
};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::{
    AdapterError, AdapterId, ColumnsKind,
    id::{IdHasher, RowHasher},
    packed::{self, PackedFile},
};
use crate::{
    checkpoint::{
        AtomicFile, Checkpoint, CheckpointError, Context, Existing, Header, OwnFolder, Shard, TensorInfo,
        check_free_space, folder_of, probe,
    },
    foreign::PEFT_CONFIG,
    mask::{
        BaseInfo, FileKind, POSITION_BYTES, Part, ROW_BYTES, Recipe, SparseFile, TargetEntries, TargetInfo,
        parse_document, parse_header,
    },
    tensor::{Dtype, RowColumns},
};

/// The kind of an adapter's document.
pub(super) const KIND: &str = "adapter";
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
pub(super) struct AdapterDocument {
    pub(super) kind: String,
    pub(super) version: u64,
    pub(super) scale: f64,
    pub(super) recipe: Recipe,
    pub(super) base: BaseInfo,
    pub(super) targets: TargetEntries,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) license: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) author: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) training: Option<serde_json::Value>,
}

/// The deltas of a run of rows.
#[derive(Clone, PartialEq, Debug)]
pub struct DeltaRows {
    /// Chosen columns, row by row.
    pub columns: RowColumns,
    /// `[columns.nnz()]` deltas, widened exactly.
    pub values: Vec<f32>,
}

/// An open adapter, plain or packed: header in memory, columns and values on disk. A clone is the same open file.
#[derive(Clone, Debug)]
pub struct Adapter {
    store: Arc<Store>,
    scale: f64,
    recipe: Recipe,
    base: BaseInfo,
    notes: AdapterNotes,
    /// Per target, the largest magnitude of its deltas, once they were all read.
    largest: OnceLock<Arc<[f32]>>,
}

/// Where columns and values lie.
#[derive(Debug)]
enum Store {
    Plain(SparseFile),
    Packed(Box<PackedFile>),
}

impl Adapter {
    /// Opens an adapter file, or the folder of exactly one, and proves all that its header can show. Reads the header only.
    ///
    /// A packed adapter whose columns are derived from its base is opened all the same, and says all but its deltas:
    /// [`Self::open_with_base`] gives those too.
    ///
    /// # Errors
    /// What the file is instead, or a list of all that does not fit together.
    pub fn open(path: &Path) -> Result<Self, AdapterError> {
        // What a download leaves: the folder of one adapter, with a README.
        let only = if probe::is_folder(path)? && !probe::is_present(&path.join(PEFT_CONFIG))? {
            probe::only_tensor_file(path)?
        } else {
            None
        };
        Self::of_shard(Shard::open(only.as_deref().unwrap_or(path))?)
    }

    /// Opens a copy in this program's own state; `None` where it does not exist.
    ///
    /// # Errors
    /// As [`Self::open`], and a link.
    pub(crate) fn open_own(folder: &OwnFolder, name: &str) -> Result<Option<Self>, AdapterError> {
        Shard::open_own(folder, name)?.map(Self::of_shard).transpose()
    }

    /// Opens the adapter that was just written at `path`, and computes its id: what it says of itself is what lies on disk.
    ///
    /// # Errors
    /// [`CheckpointError::Committed`]: the adapter is there.
    pub(crate) fn read_back(ctx: &Context<'_>, path: &Path) -> Result<(Self, AdapterId), AdapterError> {
        let read = Self::open(path).and_then(|adapter| adapter.id(ctx).map(|id| (adapter, id)));
        read.map_err(|e| e.after_commit(path))
    }

    fn of_shard(shard: Shard) -> Result<Self, AdapterError> {
        let path = shard.path().to_owned();
        let path = path.as_path();
        if FileKind::of(&shard)? == FileKind::Document(packed::KIND.to_owned()) {
            let (file, parts) = PackedFile::open(shard, |header| Ok(Parts::of(parse_header(path, header, KIND)?)))?;
            return Self::new(path, Store::Packed(Box::new(file)), parts);
        }
        let (targets, parts) = Parts::of(parse_document(&shard, KIND)?);
        Self::new(path, Store::Plain(SparseFile::check(shard, targets, true)?), parts)
    }

    /// The same, with the base at hand: where columns are derived from it they are chosen again, in as many passes over it as
    /// that takes, and kept in a temporary folder. Of other adapters `base` is not looked at.
    ///
    /// # Errors
    /// Besides those of [`Self::open`]: [`AdapterError::WrongBase`], or columns that are not those that were packed.
    pub fn open_with_base(ctx: &Context<'_>, path: &Path, base: &Checkpoint) -> Result<Self, AdapterError> {
        let mut adapter = Self::open(path)?;
        let recipe = adapter.recipe.clone();
        if let Some(Store::Packed(file)) = Arc::get_mut(&mut adapter.store) {
            file.derive(ctx, &recipe, base)?;
        }
        Ok(adapter)
    }

    fn new(path: &Path, store: Store, parts: Parts) -> Result<Self, AdapterError> {
        let Parts { scale, recipe, base, notes } = parts;
        if !scale.is_finite() {
            return Err(CheckpointError::bad_file(path, format!("scale {scale} is not a finite number")).into());
        }
        Ok(Self { store: Arc::new(store), scale, recipe, base, notes, largest: OnceLock::new() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.shard().path()
    }
    /// The open file, for its header and for noticing changes.
    pub fn shard(&self) -> &Shard {
        match &*self.store {
            Store::Plain(file) => file.shard(),
            Store::Packed(file) => file.shard(),
        }
    }
    /// Bytes of the file.
    pub fn n_bytes(&self) -> u64 {
        self.shard().file_bytes()
    }
    /// Bytes of the adapter as a plain file.
    pub fn plain_bytes(&self) -> u64 {
        match &*self.store {
            Store::Plain(file) => file.shard().file_bytes(),
            Store::Packed(file) => file.adapter_bytes(),
        }
    }
    /// Of a packed adapter, whether it has its columns or derives them from its base; none of a plain one.
    pub fn packed_columns(&self) -> Option<ColumnsKind> {
        match &*self.store {
            Store::Plain(_) => None,
            Store::Packed(file) => Some(file.columns_kind()),
        }
    }
    /// The id that a packed adapter says it has; [`Self::id`] proves it.
    pub fn claimed_id(&self) -> Option<AdapterId> {
        match &*self.store {
            Store::Plain(_) => None,
            Store::Packed(file) => Some(file.id()),
        }
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
        match &*self.store {
            Store::Plain(file) => file.targets(),
            Store::Packed(file) => file.targets(),
        }
    }
    /// The target of this name.
    pub fn target(&self, name: &str) -> Option<&TargetInfo> {
        let found = self.targets().binary_search_by(|target| target.name.as_str().cmp(name)).ok()?;
        Some(&self.targets()[found])
    }
    /// Deltas in all.
    pub fn nnz(&self) -> u64 {
        self.targets().iter().map(|target| target.nnz).sum()
    }
    /// The type that a target's values are stored in: F32, BF16 or F16.
    pub fn values_dtype(&self, target: &TargetInfo) -> Dtype {
        self.tensor(target, Part::Values).expect("targets have values").dtype
    }
    /// One of a target's tensors, as a plain file has it.
    pub(super) fn tensor(&self, target: &TargetInfo, part: Part) -> Option<&TensorInfo> {
        self.header().tensor(&part.name(&target.name))
    }
    /// The metadata of a plain file.
    pub(super) fn metadata(&self) -> &BTreeMap<String, String> {
        self.header().metadata()
    }
    /// The header of a plain file, byte for byte.
    pub(super) fn header_json(&self) -> Result<Vec<u8>, AdapterError> {
        match &*self.store {
            Store::Plain(file) => Ok(file.shard().header_json()?),
            Store::Packed(file) => Ok(file.header_json().to_vec()),
        }
    }
    fn header(&self) -> &Header {
        match &*self.store {
            Store::Plain(file) => file.shard().header(),
            Store::Packed(file) => file.header(),
        }
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
        match &*self.store {
            Store::Plain(file) => Ok(file.row_ranges(ctx, target, most)?),
            Store::Packed(file) => Ok(file.row_ranges(target, most)),
        }
    }

    /// Bytes of memory that `rows` of a target take at most while they are worked on.
    pub(crate) fn rows_bytes(&self, ctx: &Context<'_>, target: &TargetInfo, rows: &Range<u64>) -> u64 {
        let n_positions = match &*self.store {
            Store::Plain(file) => file.n_positions(ctx, target, rows),
            Store::Packed(file) => file.n_positions(target, rows),
        };
        n_positions * POSITION_BYTES + (rows.end - rows.start) * ROW_BYTES
    }

    /// Reads the deltas of `rows` of a target, proven to be finite and on ascending columns inside the row.
    ///
    /// Memory: about 10 bytes per position and 16 per row, and one window; of a packed adapter, besides, a few blocks of about
    /// 16,384 positions for each thread.
    ///
    /// # Errors
    /// A column or value that may not be, naming the row; [`AdapterError::NeedsBase`].
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
    pub(super) fn widen_finite(
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
            return Err(CheckpointError::bad_tensor(self.path(), &Part::Values.name(&target.name), what).into());
        }
        Ok(values)
    }

    /// Columns and values of `rows`, the values as stored.
    pub(super) fn read_stored(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<(RowColumns, Vec<u8>), AdapterError> {
        let file = match &*self.store {
            Store::Plain(file) => file,
            Store::Packed(file) => return file.read_stored(ctx, target, rows),
        };
        let first = file.first_position(ctx, target, rows.start)?;
        let columns = file.read_columns(ctx, target, rows)?;
        let tensor = file.tensor(target, Part::Values);
        let mut values = Vec::with_capacity(columns.nnz() * tensor.dtype.bitsize() / 8);
        let range = first..first + columns.nnz() as u64;
        file.for_each_window(ctx, tensor, range, |bytes| values.extend_from_slice(bytes))?;
        Ok((columns, values))
    }

    /// The largest magnitude among a target's deltas, unscaled; none until [`Self::id`] has read them.
    ///
    /// # Panics
    /// Where the target is not this adapter's.
    pub fn largest_delta(&self, target: &TargetInfo) -> Option<f32> {
        let at = self.targets().binary_search_by(|own| own.name.cmp(&target.name));
        Some(self.largest.get()?[at.expect("the target is this adapter's")])
    }

    /// Computes the adapter's id, reading and proving all of it. Memory: a run of rows.
    ///
    /// # Errors
    /// A column or value that may not be, naming tensor and row.
    pub fn id(&self, ctx: &Context<'_>) -> Result<AdapterId, AdapterError> {
        let mut hasher = IdHasher::new(self.scale, self.targets());
        let mut largest = Vec::with_capacity(self.targets().len());
        for target in self.targets() {
            let mut rows = RowHasher::default();
            let mut largest_of_target = 0.0f32;
            for range in self.row_ranges(ctx, target, RUN)? {
                let (columns, stored) = self.read_stored(ctx, target, range.clone())?;
                let values = self.widen_finite(target, range.start, &columns, &stored)?;
                largest_of_target = values.iter().fold(largest_of_target, |largest, value| largest.max(value.abs()));
                rows.rows(&columns, &stored);
            }
            hasher.target(target, self.values_dtype(target), &rows);
            largest.push(largest_of_target);
        }
        let id = hasher.finish();
        self.expect_id(id)?;
        self.largest.get_or_init(|| largest.into());
        Ok(id)
    }

    /// Fails where a packed adapter says that it has another id than this, the one it has.
    pub(super) fn expect_id(&self, id: AdapterId) -> Result<(), AdapterError> {
        match self.claimed_id().filter(|&claimed| claimed != id) {
            None => Ok(()),
            Some(claimed) => {
                let what = format!("damaged: it says that it is adapter {}, it holds {}", claimed.short(), id.short());
                Err(CheckpointError::bad_file(self.path(), what).into())
            }
        }
    }

    /// Writes the adapter as a plain file: of a plain one a copy, of a packed one the very bytes that were packed.
    ///
    /// Memory: a block or a window. A packed adapter is not proven on the way; [`Self::id`] does that.
    ///
    /// # Errors
    /// A failure to read or write, [`AdapterError::NeedsBase`], a file that exists and must be kept.
    pub fn write_plain(&self, ctx: &Context<'_>, output: &Path, existing: Existing) -> Result<(), AdapterError> {
        check_free_space(folder_of(output), self.plain_bytes())?;
        self.write_to(ctx, AtomicFile::create(output, existing)?)
    }

    /// The same as a copy in this program's own state.
    ///
    /// # Errors
    /// As [`Self::write_plain`], and a link in the way.
    pub(crate) fn write_own(&self, ctx: &Context<'_>, folder: &OwnFolder, name: &str) -> Result<(), AdapterError> {
        self.write_to(ctx, AtomicFile::create_own(folder, name)?)
    }

    fn write_to(&self, ctx: &Context<'_>, copy: AtomicFile) -> Result<(), AdapterError> {
        match &*self.store {
            Store::Packed(file) => file.unpack(ctx, copy),
            Store::Plain(file) => {
                let (shard, mut buffer, mut at) = (file.shard(), vec![0; 1 << 20], 0);
                while at < shard.file_bytes() {
                    ctx.check()?;
                    let n = (shard.file_bytes() - at).min(buffer.len() as u64) as usize;
                    shard.read_at(&mut buffer[..n], at)?;
                    let written = copy.file().write_all_at(&buffer[..n], at);
                    written.map_err(|e| CheckpointError::io("write", copy.target(), e))?;
                    at += n as u64;
                }
                shard.unchanged()?;
                Ok(copy.commit()?)
            }
        }
    }
}

/// What a document says beside its targets.
struct Parts {
    scale: f64,
    recipe: Recipe,
    base: BaseInfo,
    notes: AdapterNotes,
}

impl Parts {
    fn of(document: AdapterDocument) -> (TargetEntries, Self) {
        let AdapterDocument { scale, recipe, base, targets, license, description, author, training, .. } = document;
        let notes = AdapterNotes { license, description, author, training };
        (targets, Self { scale, recipe, base, notes })
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
