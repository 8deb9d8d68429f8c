//! The ledger: what a merged checkpoint remembers, so that every merge can be undone.
//!
//! A plain safetensors file. For each touched tensor `T` one of:
//!
//! - `T.originals`, the weight's own type, `[nnz]`: the base's bits at every position that an active adapter touches, rows
//!   ascending, columns ascending within a row; and `T.group_offsets`, U64 `[ceil(rows / 64) + 1]`: where the originals of every 64th
//!   row begin. The positions themselves are those of the active adapters, whose copies lie beside the ledger: a position costs
//!   the ledger the bytes of its weight and no more. So it is where single elements change and no others.
//! - `T.whole`, the tensor: where adapters change it as a whole, and the user allowed the size.
//! - nothing but hashes in the document: undoing reads the base then, and proves that it is the base.
//!
//! `__metadata__["neuroada"]` is the document ([`LedgerDocument`]): kind, version, the active adapters in ascending order of id with their
//! scales, and for each target its type, shape, what is kept of it and what each adapter does to it, resolved to stored tensors.
//! `__metadata__["neuroada.blake3"]` is the BLAKE3 of the document. So every bit of the file is covered: those of whole tensors by
//! hashes that are compared when they are used, all others when the ledger is opened.
//!
//! Version 1 knew sparse adapters alone; a low-rank merge left a record instead ([`LowRankRecord`]). Both are read, and the next
//! change writes version 2.

mod document;
mod edit;
mod low_rank;
mod term;
mod writer;

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

pub use document::{
    Kept, KeptHashes, KeptPositions, LedgerAdapter, LedgerAdded, LedgerDocument, LedgerReplaced, LedgerTarget,
};
pub use edit::TextEdit;
pub use low_rank::{LowRankRecord, RecordedAdapter, RecordedTarget};
pub use term::RecordedTerm;
pub(super) use term::{RecordedBias, RecordedChange, RecordedMagnitude, RecordedMatrix, RecordedProduct, RecordedRows};
pub(super) use writer::LedgerWriter;

use super::MergeError;
use crate::{
    checkpoint::{CheckpointError, Context, Printable, Shard, StateFolder, TensorRef},
    tensor::{Dtype, RowLayout, dtype_name, parse_dtype},
};

/// Rows between two entries of `group_offsets`; blocks of rows begin at multiples of it.
pub(super) const GROUP_ROWS: u64 = 64;

/// An open ledger. What it says is checked; see the module for when its tensors are.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    document: LedgerDocument,
    digest: blake3::Hash,
    /// Its tensors; of an old record the file of originals beside it, where there is one.
    shard: Option<Shard>,
    /// Whether it is an old record, which does not say where low-rank adapters belong.
    is_old_record: bool,
}

impl Ledger {
    /// Opens what a state folder remembers: its ledger, or a record that takes the place of one.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where a bit is not as written.
    pub(super) fn of_state(ctx: &Context<'_>, state: &StateFolder) -> Result<Option<Self>, MergeError> {
        match Self::open(ctx, state, StateFolder::LEDGER)? {
            None => Self::of_old_record(state),
            found => Ok(found),
        }
    }

    /// Opens the record that version 0.1 left of a low-rank merge, where there is one.
    ///
    /// # Errors
    /// As [`Self::of_state`].
    pub(super) fn of_old_record(state: &StateFolder) -> Result<Option<Self>, MergeError> {
        low_rank::open(state)
    }

    /// Opens the ledger `name` and proves all but whole tensors: every checksum, every size; `None` where there is none. Memory: one
    /// buffer.
    ///
    /// # Errors
    /// As [`Self::of_state`].
    pub(super) fn open(ctx: &Context<'_>, state: &StateFolder, name: &str) -> Result<Option<Self>, MergeError> {
        let Some(shard) = Shard::open_own(state.folder(), name)? else { return Ok(None) };
        let path = shard.path().to_owned();
        let bad = |what: String| MergeError::BadLedger { path: path.clone(), what };
        let document = LedgerDocument::parse(shard.header().metadata()).map_err(bad)?;
        let n_tensors = |target: &LedgerTarget| match target.kept {
            Kept::Positions(_) => 2,
            Kept::Whole(_) => 1,
            Kept::Hash(_) => 0,
        };
        let is_kept = |added: &&LedgerAdded| added.replaced.as_ref().is_some_and(|replaced| replaced.whole);
        let n_replaced = document.added.values().filter(is_kept).count();
        if shard.header().tensors().len() != document.targets.values().map(n_tensors).sum::<usize>() + n_replaced {
            return Err(bad("the ledger is damaged: it has tensors that its document does not name".to_owned()));
        }
        let digest = match document.version() {
            // All of the file; later, what covers all of it.
            1 => file_digest(ctx, shard.path(), shard.file())?,
            _ => blake3::hash(&shard.header_json()?),
        };
        let ledger = Self { path: path.clone(), document, digest, shard: Some(shard), is_old_record: false };
        for (name, target) in &ledger.document.targets {
            ledger.check_target(ctx, name, target)?;
        }
        for (name, replaced) in
            ledger.document.added.iter().filter_map(|(name, added)| Some((name, added.replaced.as_ref()?)))
        {
            let is_like = |info: &crate::checkpoint::TensorInfo| {
                dtype_name(info.dtype) == replaced.dtype && info.shape == replaced.shape
            };
            if replaced.whole && !ledger.whole(name).is_some_and(|(_, info)| is_like(info)) {
                return Err(ledger.bad(name, "the ledger is damaged: no whole tensor of the right type and shape"));
            }
        }
        Ok(Some(ledger))
    }

    fn bad(&self, name: &str, what: &str) -> MergeError {
        MergeError::BadLedger { path: self.path.clone(), what: format!("tensor \"{}\": {what}", Printable(name)) }
    }

    fn check_target(&self, ctx: &Context<'_>, name: &str, target: &LedgerTarget) -> Result<(), MergeError> {
        let dtype = parse_dtype(&target.dtype).ok_or_else(|| self.bad(name, "unknown dtype"))?;
        if let Some(layout) = target.layout.as_ref().filter(|layout| *layout != "plain") {
            let what = format!("its layout is \"{}\", which a newer program wrote", Printable(layout));
            return Err(self.bad(name, &what));
        }
        let damaged =
            |suffix: &str| self.bad(name, &format!("the ledger is damaged: no {suffix} of the right type and shape"));
        let positions = match &target.kept {
            Kept::Hash(_) => return Ok(()),
            Kept::Whole(_) => {
                let is_whole = |(_, info): &(&Shard, &crate::checkpoint::TensorInfo)| {
                    info.dtype == dtype && info.shape == target.shape
                };
                return self.whole(name).filter(is_whole).map(|_| ()).ok_or_else(|| damaged("whole tensor"));
            }
            Kept::Positions(positions) => positions,
        };
        let layout =
            RowLayout::new(&target.shape, positions.transposed).ok_or_else(|| self.bad(name, "not a matrix"))?;
        let n_groups = layout.n_rows().div_ceil(GROUP_ROWS);
        let shard = self.shard.as_ref().expect("a ledger with positions is a file");
        for (suffix, dtype, shape, digest) in [
            ("originals", dtype, positions.nnz, &positions.originals),
            ("group_offsets", Dtype::U64, n_groups + 1, &positions.group_offsets),
        ] {
            let found = shard.header().tensor(&format!("{name}.{suffix}"));
            let info = found.filter(|info| info.dtype == dtype && info.shape == [shape]);
            let info = info.ok_or_else(|| damaged(suffix))?;
            let mut hasher = blake3::Hasher::new();
            for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
                ctx.check()?;
                let end = info.n_bytes().min(start + ctx.window_bytes());
                hasher.update(&shard.window(ctx, info, start..end)?);
            }
            if hasher.finalize().to_hex().as_str() != digest {
                let what = format!("the ledger is damaged: {suffix} do not match their checksum");
                return Err(self.bad(name, &what));
            }
        }
        Ok(())
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
    /// What the ledger says.
    pub(super) fn document(&self) -> &LedgerDocument {
        &self.document
    }
    /// What is kept of a tensor.
    pub(super) fn kept(&self, name: &str) -> Option<&Kept> {
        Some(&self.document.targets.get(name)?.kept)
    }
    /// Whether low-rank adapters' places have to be found again.
    pub(super) fn is_old_record(&self) -> bool {
        self.is_old_record
    }
    /// Bytes of the file.
    pub(super) fn n_bytes(&self) -> u64 {
        self.shard.as_ref().map_or(0, Shard::file_bytes)
    }
    /// What a journal calls it.
    pub(super) fn digest(&self) -> blake3::Hash {
        self.digest
    }

    /// The original of a tensor that is kept whole; not proven yet.
    pub(super) fn whole(&self, name: &str) -> Option<(&Shard, &crate::checkpoint::TensorInfo)> {
        let shard = self.shard.as_ref()?;
        let stored = match self.is_old_record {
            true => name.to_owned(),
            false => format!("{name}.whole"),
        };
        Some((shard, shard.header().tensor(&stored)?))
    }

    /// The originals of `n` touched positions of `rows`, which begin at a multiple of 64 (or end the tensor).
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where the ledger has another number of them.
    pub(super) fn originals(&self, name: &str, rows: Range<u64>, n: usize) -> Result<Vec<u8>, MergeError> {
        assert!(rows.start.is_multiple_of(GROUP_ROWS), "blocks begin where groups of rows begin");
        let shard = self.shard.as_ref().expect("a ledger with positions is a file");
        let header = shard.header();
        let offsets = header.tensor(&format!("{name}.group_offsets")).expect("checked when opened");
        let originals = header.tensor(&format!("{name}.originals")).expect("checked when opened");
        let offset = |group: u64| -> Result<u64, MergeError> {
            let mut bytes = [0; 8];
            shard.read_at(&mut bytes, shard.file_range(offsets).start + group * 8)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let (begin, end) = (offset(rows.start / GROUP_ROWS)?, offset(rows.end.div_ceil(GROUP_ROWS))?);
        if end.checked_sub(begin) != Some(n as u64) || end > originals.shape[0] {
            let what = format!(
                "rows {}..{} have {n} touched positions, the ledger has originals {begin}..{end} for them",
                rows.start, rows.end
            );
            return Err(self.bad(name, &what));
        }
        let width = originals.dtype.bitsize() as u64 / 8;
        // Read, not mapped: what is missing is an error here and now.
        let mut bytes = vec![0; (n as u64 * width) as usize];
        shard.read_at(&mut bytes, shard.file_range(originals).start + begin * width)?;
        Ok(bytes)
    }

    /// Fails where a stored tensor is not one that the ledger can be about.
    pub(super) fn check_stored(&self, tensor: TensorRef<'_>) -> Result<(), String> {
        let Some(target) = self.document.targets.get(&tensor.info.name) else { return Ok(()) };
        let (dtype, shape) = (dtype_name(tensor.info.dtype), &tensor.info.shape);
        match target.dtype == dtype && target.shape == *shape {
            true => Ok(()),
            false => Err(format!(
                "the ledger is about {:?} {}, the checkpoint has {shape:?} {dtype}",
                target.shape, target.dtype
            )),
        }
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
