//! Packed adapters: the same adapter in the fewest bytes, still read a run of rows at a time.
//!
//! A packed file is a safetensors file with the document `{"kind": "packed", "version": 1, …}` ([`PackedDocument`]) and three
//! tensors of bytes:
//!
//! ```text
//! header   the adapter's own header, byte for byte: how it is kept (u8: 0 as it is, 1 zstd), its length (u32), then it
//! index    where every block lies, kept the same way; see [`index`]
//! blocks   the codes of all blocks, target after target in ascending order of name; see [`block`]
//! ```
//!
//! A block is a run of rows of one target, about 16,384 positions, coded by itself with an adaptive range coder
//! ([`range_coder`]): columns as sets ([`subset`]), values bit plane by bit plane ([`values`]). Its size is all that a reader
//! must take in to get at a row, and all that a writer must hold.
//!
//! Columns are *told*, or *derived*: where the recipe chooses the same ones again from the base's weights they are left out,
//! and the document has a BLAKE3 of them ([`derive`]). A file with derived columns is read with its base at hand, and
//! the digest proves that the columns are those that were packed.
//!
//! Nothing is lost: header and tensors come back byte for byte, so that the unpacked file is the one that was packed, and
//! the adapter's id, which the document repeats, is the same. Lossy values are another adapter with an id of its own,
//! packed without loss.

mod block;
mod derive;
mod index;
mod lossy;
mod range_coder;
mod subset;
#[cfg(test)]
mod tests;
mod unpack;
mod values;
mod write;

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

pub use lossy::{LossyError, MergedError};
pub use write::{ColumnsChoice, PackOptions, PackReport, ValuesChoice, pack_adapter};

use self::{block::Block, derive::DerivedColumns, index::Index};
use super::{AdapterError, AdapterId};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Context, Header, Shard, TensorInfo},
    mask::{Part, Recipe, TargetEntries, TargetInfo, check_targets, parse_document},
    tensor::RowColumns,
};

/// The kind of a packed adapter's document.
pub(super) const KIND: &str = "packed";
/// What is kept under zstd is at most so many times its bytes: more would let a small file fill the memory.
const MAX_RATIO: u64 = 64;
/// Blocks kept decoded for each thread.
const BLOCKS_PER_THREAD: usize = 2;

/// The document of a packed adapter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PackedDocument {
    kind: String,
    version: u64,
    /// The adapter's id.
    id: String,
    /// Bytes of the adapter when unpacked.
    adapter_bytes: u64,
    columns: ColumnsKind,
    /// BLAKE3 of the columns, as ids have it, target after target; where they are derived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns_digest: Option<String>,
}

/// Whether a packed file tells its columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnsKind {
    /// They are in the file.
    Packed,
    /// The recipe chooses them again from the base.
    Derived,
}

/// An open packed adapter: headers and index in memory, codes on disk.
#[derive(Debug)]
pub(super) struct PackedFile {
    shard: Shard,
    document: PackedDocument,
    id: AdapterId,
    header_json: Vec<u8>,
    header: Header,
    targets: Vec<TargetInfo>,
    index: Index,
    /// Columns chosen again, where that is needed and was done.
    derived: Option<DerivedColumns>,
    /// The last blocks, by target and block.
    recent: Mutex<VecDeque<(BlockKey, Arc<Block>)>>,
}

/// A target, and a block of it.
type BlockKey = (usize, usize);

impl PackedFile {
    /// Opens a packed file and proves all that its headers and its index can show. `entries` makes the targets of the
    /// adapter's header and says what else the adapter's document holds.
    ///
    /// Reads headers and index only. Memory: those, at most 64 times the bytes they take in the file.
    pub(super) fn open<T>(
        shard: Shard,
        entries: impl FnOnce(&Header) -> Result<(TargetEntries, T), AdapterError>,
    ) -> Result<(Self, T), AdapterError> {
        let path = shard.path().to_owned();
        let document: PackedDocument = parse_document(&shard, KIND)?;
        let bad = |what: String| CheckpointError::bad_file(&path, what);
        let id = document.id.parse().map_err(|_| bad("the id in its document is malformed".to_owned()))?;
        if (document.columns == ColumnsKind::Derived) != document.columns_digest.is_some() {
            return Err(bad("a digest of the columns goes with derived columns, and with no others".to_owned()).into());
        }
        let mut problems: Vec<String> = shard
            .header()
            .tensors()
            .iter()
            .filter(|tensor| !["header", "index", "blocks"].contains(&tensor.name.as_str()))
            .map(|tensor| {
                format!("tensor \"{}\" is none of a packed adapter's", crate::checkpoint::Printable(&tensor.name))
            })
            .collect();
        let mut find = |name: &str| {
            let found = shard.header().tensor(name).filter(|tensor| tensor.dtype == crate::tensor::Dtype::U8);
            if found.is_none() {
                problems.push(format!("tensor \"{name}\" of U8 is missing"));
            }
            found
        };
        let (Some(header), Some(index), Some(blocks)) = (find("header"), find("index"), find("blocks")) else {
            return Err(CheckpointError::Many { path, what: "no packed adapter".to_owned(), problems }.into());
        };
        if !problems.is_empty() {
            return Err(CheckpointError::Many { path, what: "no packed adapter".to_owned(), problems }.into());
        }
        let header_json = read_kept(&shard, header)?;
        let inner = Header::parse(&path, &header_json, document.adapter_bytes)?;
        let (entries, more) = entries(&inner)?;
        let targets = check_targets(&path, &inner, entries, true)?;
        let dtypes: Vec<_> = targets
            .iter()
            .map(|target| inner.tensor(&Part::Values.name(&target.name)).expect("targets have values").dtype)
            .collect();
        let index_bytes = read_kept(&shard, index)?;
        let index = Index::parse(&index_bytes, &targets, &dtypes, blocks.n_bytes())
            .map_err(|what| CheckpointError::bad_tensor(&path, "index", what))?;
        let file = Self {
            shard,
            document,
            id,
            header_json,
            header: inner,
            targets,
            index,
            derived: None,
            recent: Mutex::default(),
        };
        Ok((file, more))
    }

    pub(super) fn shard(&self) -> &Shard {
        &self.shard
    }
    pub(super) fn targets(&self) -> &[TargetInfo] {
        &self.targets
    }
    /// The id that the document repeats.
    pub(super) fn id(&self) -> AdapterId {
        self.id
    }
    pub(super) fn columns_kind(&self) -> ColumnsKind {
        self.document.columns
    }
    /// Bytes of the adapter when unpacked.
    pub(super) fn adapter_bytes(&self) -> u64 {
        self.document.adapter_bytes
    }
    /// The adapter's own header, byte for byte.
    pub(super) fn header_json(&self) -> &[u8] {
        &self.header_json
    }
    /// The same, checked.
    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Chooses derived columns again from the base; nothing where columns are told.
    ///
    /// # Errors
    /// [`AdapterError::WrongBase`] where the base is another.
    pub(super) fn derive(&mut self, ctx: &Context<'_>, recipe: &Recipe, base: &Checkpoint) -> Result<(), AdapterError> {
        if let Some(digest) = &self.document.columns_digest {
            self.derived =
                Some(DerivedColumns::of_packed(ctx, self.shard.path(), recipe, &self.targets, digest, base)?);
        }
        Ok(())
    }

    /// The target's rows in runs that are blocks, or parts of one of at most about `most` positions.
    pub(super) fn row_ranges(&self, target: &TargetInfo, most: u64) -> Vec<Range<u64>> {
        if let Some(k) = target.uniform_k {
            let (step, n_rows) = ((most / k).max(1), target.layout.n_rows());
            return (0..n_rows).step_by(step as usize).map(|row| row..n_rows.min(row + step)).collect();
        }
        let index = &self.index.targets[self.place(target)];
        let mut ranges = Vec::new();
        for block in 0..index.n_blocks() {
            let (rows, shape) = (index.rows(block), index.shape(target, block));
            let n_parts = shape.n_positions.div_ceil(most.max(1)).clamp(1, rows.end - rows.start);
            let step = (rows.end - rows.start).div_ceil(n_parts);
            ranges.extend((rows.start..rows.end).step_by(step as usize).map(|row| row..rows.end.min(row + step)));
        }
        if ranges.is_empty() {
            ranges.push(0..0);
        }
        ranges
    }

    /// The most positions that `rows` have: those of all blocks that hold some of them.
    pub(super) fn n_positions(&self, target: &TargetInfo, rows: &Range<u64>) -> u64 {
        let index = &self.index.targets[self.place(target)];
        if rows.is_empty() {
            return 0;
        }
        let (first, last) = (index.block_of(rows.start), index.block_of(rows.end - 1));
        let in_blocks = (first..=last).map(|block| index.shape(target, block).n_positions).sum();
        target.max_positions(rows.end - rows.start).min(in_blocks)
    }

    /// Columns of `rows` and the values as the adapter stores them.
    ///
    /// # Errors
    /// [`AdapterError::NeedsBase`], or a code that is no encoder's.
    pub(super) fn read_stored(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        rows: Range<u64>,
    ) -> Result<(RowColumns, Vec<u8>), AdapterError> {
        assert!(rows.start <= rows.end && rows.end <= target.layout.n_rows(), "the target has these rows");
        let place = self.place(target);
        let index = &self.index.targets[place];
        let mut columns = RowColumns::with_capacity((rows.end - rows.start) as usize, 0);
        let mut stored = Vec::new();
        let mut row = rows.start;
        while row < rows.end {
            ctx.check()?;
            let at = index.block_of(row);
            let of_block = index.rows(at);
            let block = self.block(ctx, target, place, at)?;
            let end = of_block.end.min(rows.end);
            let width = index.kind.width();
            for row in row - of_block.start..end - of_block.start {
                columns.push_row(block.columns.row(row as usize));
            }
            let positions = block.columns.offsets()[(row - of_block.start) as usize] * width
                ..block.columns.offsets()[(end - of_block.start) as usize] * width;
            stored.extend_from_slice(&block.stored[positions]);
            row = end;
        }
        Ok((columns, stored))
    }

    fn place(&self, target: &TargetInfo) -> usize {
        self.targets.binary_search_by(|other| other.name.cmp(&target.name)).expect("the target is this file's")
    }

    /// A block, decoded now or not long ago.
    fn block(
        &self,
        ctx: &Context<'_>,
        target: &TargetInfo,
        place: usize,
        at: usize,
    ) -> Result<Arc<Block>, AdapterError> {
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, block)) = recent().iter().find(|(key, _)| *key == (place, at)) {
            return Ok(Arc::clone(block));
        }
        let index = &self.index.targets[place];
        let known = match (self.document.columns, &self.derived) {
            (ColumnsKind::Packed, _) => None,
            (ColumnsKind::Derived, Some(derived)) => Some(derived.read(ctx, &target.name, index.rows(at))?),
            (ColumnsKind::Derived, None) => {
                return Err(AdapterError::NeedsBase { path: self.shard.path().to_owned() });
            }
        };
        let codes = self.shard.header().tensor("blocks").expect("it was found when opened");
        let range = index.bytes(at);
        let mut code = vec![0; (range.end - range.start) as usize];
        self.shard.read_at(&mut code, self.shard.file_range(codes).start + range.start)?;
        let shape = index.shape(target, at);
        let block = block::decode(shape, &code, known, &self.index.odds[&index.kind]).map_err(|what| {
            let rows = index.rows(at);
            let what = format!("rows {} to {}: {what}", rows.start, rows.end);
            CheckpointError::bad_tensor(self.shard.path(), &target.name, what)
        })?;
        let block = Arc::new(block);
        let mut recent = recent();
        recent.push_front(((place, at), Arc::clone(&block)));
        recent.truncate(BLOCKS_PER_THREAD * rayon::current_num_threads() + 1);
        Ok(block)
    }
}

/// Bytes as a packed file keeps them: under zstd where that is shorter and not suspiciously so.
fn keep(bytes: &[u8]) -> Vec<u8> {
    // The highest level takes about a second for each MB, of which tens of thousands of targets make many.
    let level = if bytes.len() <= 1 << 20 { 19 } else { 6 };
    let length = u32::try_from(bytes.len()).expect("headers and indices are short").to_le_bytes();
    let zstd = zstd::bulk::compress(bytes, level)
        .ok()
        .filter(|zstd| zstd.len() < bytes.len() && bytes.len() as u64 <= MAX_RATIO * zstd.len() as u64);
    match zstd {
        Some(zstd) => [&[1][..], &length, &zstd].concat(),
        None => [&[0][..], &length, bytes].concat(),
    }
}

/// Bytes that [`keep`] kept.
fn read_kept(shard: &Shard, tensor: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
    let bad = |what: String| CheckpointError::bad_tensor(shard.path(), &tensor.name, what);
    let mut kept = vec![0; tensor.n_bytes() as usize];
    shard.read_at(&mut kept, shard.file_range(tensor).start)?;
    let [how, a, b, c, d, rest @ ..] = &kept[..] else {
        return Err(bad(format!("has {} bytes, at least 5 are needed", kept.len())));
    };
    let length = u64::from(u32::from_le_bytes([*a, *b, *c, *d]));
    match how {
        0 if rest.len() as u64 == length => Ok(rest.to_vec()),
        0 => Err(bad(format!("claims {length} bytes, has {}", rest.len()))),
        1 if length > MAX_RATIO * rest.len() as u64 => Err(bad(format!(
            "claims {length} bytes in {} of zstd, at most {MAX_RATIO} times as many are accepted",
            rest.len()
        ))),
        1 => match zstd::bulk::decompress(rest, length as usize) {
            Ok(bytes) if bytes.len() as u64 == length => Ok(bytes),
            Ok(bytes) => Err(bad(format!("claims {length} bytes, zstd has {}", bytes.len()))),
            Err(e) => Err(bad(format!("its zstd is damaged: {e}"))),
        },
        how => Err(bad(format!("is kept in the unknown way {how}"))),
    }
}
