//! The ledger: what a merged checkpoint remembers, so that every merge can be undone.
//!
//! A plain safetensors file. For each touched tensor `T`:
//!
//! - `T.originals`, the weight's own type, `[nnz]`: the base's bits at every position that an active adapter touches, rows
//!   ascending, columns ascending within a row. The positions themselves are those of the active adapters, whose copies
//!   lie beside the ledger: a position costs the ledger the bytes of its weight and no more.
//! - `T.group_offsets`, U64 `[ceil(rows / 64) + 1]`: where the originals of every 64th row begin.
//!
//! `__metadata__["neuroada"]` is the document: kind, version, the active adapters in ascending order of id with their scales,
//! and for each target its type, shape and the BLAKE3 of both tensors. `__metadata__["neuroada.blake3"]` is the BLAKE3 of the
//! document. So every bit of the file is covered, and a ledger that opens is the one that was written.

use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

use serde::{Deserialize, Serialize};

use super::MergeError;
use crate::{
    adapter::AdapterId,
    checkpoint::{CheckpointError, Context, DOCUMENT_KEY, Shard, StateFolder, TensorFileWriter, TensorId},
    tensor::{Dtype, RowColumns, RowLayout, dtype_name, parse_dtype},
};

/// Rows between two entries of `group_offsets`; blocks of rows begin at multiples of it.
pub(super) const GROUP_ROWS: u64 = 64;

const CHECKSUM_KEY: &str = "neuroada.blake3";

/// The ledger's JSON document.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerDocument {
    kind: LedgerKind,
    version: u32,
    /// Merged adapters, by id.
    pub active: Vec<ActiveAdapter>,
    /// Touched tensors.
    pub targets: BTreeMap<String, LedgerTarget>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LedgerKind {
    Ledger,
}

/// One merged adapter.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActiveAdapter {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it was merged with.
    pub scale: f64,
}

/// One touched tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerTarget {
    /// The weight's type.
    pub dtype: String,
    /// The weight's shape as stored.
    pub shape: Vec<u64>,
    /// Whether rows are stored columns.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    /// Touched positions.
    pub nnz: u64,
    /// BLAKE3 of `T.originals`.
    originals: String,
    /// BLAKE3 of `T.group_offsets`.
    group_offsets: String,
}

impl LedgerDocument {
    /// Parses the document of a ledger's header and checks it against its checksum.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(metadata: &BTreeMap<String, String>) -> Result<Self, String> {
        let text = metadata.get(DOCUMENT_KEY).ok_or("not a ledger: it has no `neuroada` document")?;
        if metadata.get(CHECKSUM_KEY) != Some(&Self::checksum(text)) {
            return Err("the ledger is damaged: its document does not match its checksum".to_owned());
        }
        if metadata.len() != 2 {
            return Err("the ledger is damaged: it has metadata that no ledger has".to_owned());
        }
        let document: Self =
            serde_json::from_str(text).map_err(|e| format!("the ledger's document is malformed: {e}"))?;
        match document.version {
            1 => Ok(document),
            version => Err(format!("the ledger has version {version}, this program reads version 1")),
        }
    }

    /// What stands beside a document: its BLAKE3, 64 hexadecimal digits.
    pub fn checksum(text: &str) -> String {
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// Touched positions of all tensors.
    pub fn nnz(&self) -> u64 {
        self.targets.values().map(|target| target.nnz).sum()
    }
}

/// An open ledger, every bit of it checked.
#[derive(Debug)]
pub(super) struct Ledger {
    shard: Shard,
    document: LedgerDocument,
    digest: blake3::Hash,
}

impl Ledger {
    /// Opens the ledger `name` and proves it whole: every checksum, every size; `None` where there is none. Reads the file twice;
    /// memory: one buffer.
    pub(super) fn open(ctx: &Context<'_>, state: &StateFolder, name: &str) -> Result<Option<Self>, MergeError> {
        let Some(shard) = Shard::open_own(state.folder(), name)? else { return Ok(None) };
        let path = shard.path().to_owned();
        let bad = |what: String| MergeError::BadLedger { path: path.clone(), what };
        let document = LedgerDocument::parse(shard.header().metadata()).map_err(bad)?;
        if shard.header().tensors().len() != 2 * document.targets.len() {
            return Err(bad("the ledger is damaged: it has tensors that its document does not name".to_owned()));
        }
        let ledger = Self { digest: file_digest(ctx, shard.path(), shard.file())?, shard, document };
        for (name, target) in &ledger.document.targets {
            ledger.check_target(ctx, name, target)?;
        }
        Ok(Some(ledger))
    }

    fn check_target(&self, ctx: &Context<'_>, name: &str, target: &LedgerTarget) -> Result<(), MergeError> {
        let bad = |what: &str| {
            let name = crate::checkpoint::Printable(name);
            MergeError::BadLedger { path: self.shard.path().to_owned(), what: format!("tensor \"{name}\": {what}") }
        };
        let dtype = parse_dtype(&target.dtype).ok_or_else(|| bad("unknown dtype"))?;
        let layout = RowLayout::new(&target.shape, target.transposed).ok_or_else(|| bad("not a matrix"))?;
        let n_groups = layout.n_rows().div_ceil(GROUP_ROWS);
        for (suffix, dtype, shape, digest) in [
            ("originals", dtype, target.nnz, &target.originals),
            ("group_offsets", Dtype::U64, n_groups + 1, &target.group_offsets),
        ] {
            let found = self.shard.header().tensor(&format!("{name}.{suffix}"));
            let info = found.filter(|info| info.dtype == dtype && info.shape == [shape]);
            let info =
                info.ok_or_else(|| bad(&format!("the ledger is damaged: no {suffix} of the right type and shape")))?;
            let mut hasher = blake3::Hasher::new();
            for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
                ctx.check()?;
                let end = info.n_bytes().min(start + ctx.window_bytes());
                hasher.update(&self.shard.window(ctx, info, start..end)?);
            }
            if hasher.finalize().to_hex().as_str() != digest {
                return Err(bad(&format!("the ledger is damaged: {suffix} do not match their checksum")));
            }
        }
        Ok(())
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        self.shard.path()
    }
    /// What the ledger says.
    pub(super) fn document(&self) -> &LedgerDocument {
        &self.document
    }
    /// Bytes of the file.
    pub(super) fn n_bytes(&self) -> u64 {
        self.shard.file_bytes()
    }
    /// BLAKE3 of the file.
    pub(super) fn digest(&self) -> blake3::Hash {
        self.digest
    }

    /// The originals of `n` touched positions of `rows`, which begin at a multiple of 64 (or end the tensor).
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where the ledger has another number of them.
    pub(super) fn originals(&self, name: &str, rows: Range<u64>, n: usize) -> Result<Vec<u8>, MergeError> {
        assert!(rows.start.is_multiple_of(GROUP_ROWS), "blocks begin where groups of rows begin");
        let header = self.shard.header();
        let offsets = header.tensor(&format!("{name}.group_offsets")).expect("checked when opened");
        let originals = header.tensor(&format!("{name}.originals")).expect("checked when opened");
        let offset = |group: u64| -> Result<u64, MergeError> {
            let mut bytes = [0; 8];
            self.shard.read_at(&mut bytes, self.shard.file_range(offsets).start + group * 8)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let (begin, end) = (offset(rows.start / GROUP_ROWS)?, offset(rows.end.div_ceil(GROUP_ROWS))?);
        if end.checked_sub(begin) != Some(n as u64) || end > originals.shape[0] {
            let name = crate::checkpoint::Printable(name);
            let what = format!(
                "tensor \"{name}\": rows {}..{} have {n} touched positions, the ledger has originals {begin}..{end} for them",
                rows.start, rows.end
            );
            return Err(MergeError::BadLedger { path: self.shard.path().to_owned(), what });
        }
        let width = originals.dtype.bitsize() as u64 / 8;
        // Read, not mapped: what is missing is an error here and now.
        let mut bytes = vec![0; (n as u64 * width) as usize];
        self.shard.read_at(&mut bytes, self.shard.file_range(originals).start + begin * width)?;
        Ok(bytes)
    }
}

/// BLAKE3 of an open file; `path` is for messages. Memory: one buffer.
pub(super) fn file_digest(ctx: &Context<'_>, path: &Path, file: &File) -> Result<blake3::Hash, MergeError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        ctx.check()?;
        match file.read_at(&mut buffer, at) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(CheckpointError::io("read", path, e).into()),
        }
    }
}

/// Writes a ledger in one pass over its targets.
pub(super) struct LedgerWriter {
    state: StateFolder,
    name: &'static str,
    writer: TensorFileWriter,
    document: LedgerDocument,
    current: Option<Current>,
}

struct Current {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    transposed: bool,
    originals: (TensorId, blake3::Hasher),
    group_offsets: (TensorId, blake3::Hasher),
    n_rows: u64,
    n_groups: u64,
    nnz: u64,
}

impl LedgerWriter {
    /// Begins the ledger `name` (replaced where it exists) for these adapters. The state folder may be made later.
    pub(super) fn create(
        state: &StateFolder,
        name: &'static str,
        active: &[(AdapterId, f64)],
    ) -> Result<Self, MergeError> {
        let active = active.iter().map(|(id, scale)| ActiveAdapter { id: id.to_string(), scale: *scale }).collect();
        Ok(Self {
            state: state.clone(),
            name,
            writer: TensorFileWriter::create_own(state.folder(), name)?,
            document: LedgerDocument { kind: LedgerKind::Ledger, version: 1, active, targets: BTreeMap::new() },
            current: None,
        })
    }

    /// Bytes of tensor data so far.
    pub(super) fn n_bytes(&self) -> u64 {
        self.writer.n_bytes()
    }

    /// Begins the originals of a tensor.
    pub(super) fn begin_target(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        transposed: bool,
    ) -> Result<(), MergeError> {
        assert!(self.current.is_none(), "one target at a time");
        let originals = self.writer.add_tensor(format!("{name}.originals"), dtype);
        let group_offsets = self.writer.add_tensor(format!("{name}.group_offsets"), Dtype::U64);
        let mut current = Current {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            transposed,
            originals: (originals, blake3::Hasher::new()),
            group_offsets: (group_offsets, blake3::Hasher::new()),
            n_rows: 0,
            n_groups: 0,
            nnz: 0,
        };
        push_offset(&mut self.writer, &mut current)?;
        self.current = Some(current);
        Ok(())
    }

    /// Appends the originals of the next rows, a multiple of 64 but for the last.
    pub(super) fn push_rows(&mut self, touched: &RowColumns, originals: &[u8]) -> Result<(), MergeError> {
        let current = self.current.as_mut().expect("a target was begun");
        assert!(current.n_rows.is_multiple_of(GROUP_ROWS), "blocks begin where groups of rows begin");
        current.originals.1.update(originals);
        self.writer.append(current.originals.0, originals)?;
        for first in (0..touched.n_rows()).step_by(GROUP_ROWS as usize) {
            let end = touched.n_rows().min(first + GROUP_ROWS as usize);
            current.nnz += (touched.offsets()[end] - touched.offsets()[first]) as u64;
            push_offset(&mut self.writer, current)?;
        }
        current.n_rows += touched.n_rows() as u64;
        Ok(())
    }

    /// Ends the tensor whose rows were all pushed.
    pub(super) fn end_target(&mut self) {
        let current = self.current.take().expect("a target was begun");
        self.writer.finish_tensor(current.originals.0, vec![current.nnz]);
        self.writer.finish_tensor(current.group_offsets.0, vec![current.n_groups]);
        let target = LedgerTarget {
            dtype: dtype_name(current.dtype),
            shape: current.shape,
            transposed: current.transposed,
            nnz: current.nnz,
            originals: current.originals.1.finalize().to_hex().to_string(),
            group_offsets: current.group_offsets.1.finalize().to_hex().to_string(),
        };
        self.document.targets.insert(current.name, target);
    }

    /// Lets the ledger appear, synced, and opens it: what is trusted from here on is what lies on disk.
    pub(super) fn finish(self, ctx: &Context<'_>) -> Result<Ledger, MergeError> {
        let document = serde_json::to_string(&self.document).expect("strings and numbers serialise");
        let checksum = LedgerDocument::checksum(&document);
        let metadata = BTreeMap::from([(DOCUMENT_KEY.to_owned(), document), (CHECKSUM_KEY.to_owned(), checksum)]);
        self.writer.finish(ctx, &metadata)?;
        Ledger::open(ctx, &self.state, self.name)?.ok_or_else(|| MergeError::BadLedger {
            path: self.state.path().join(self.name),
            what: "it was written and is not there any more".to_owned(),
        })
    }
}

/// Appends where the next group of rows begins.
fn push_offset(writer: &mut TensorFileWriter, current: &mut Current) -> Result<(), MergeError> {
    let bytes = current.nnz.to_le_bytes();
    current.group_offsets.1.update(&bytes);
    current.n_groups += 1;
    Ok(writer.append(current.group_offsets.0, &bytes)?)
}
