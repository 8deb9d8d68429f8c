//! Ledgers are written in one pass over their targets.

use std::collections::BTreeMap;

use super::{
    GROUP_ROWS, Kept, KeptHashes, KeptPositions, Ledger, LedgerAdapter, LedgerAdded, LedgerDocument, LedgerTarget,
    RecordedTerm, document::CHECKSUM_KEY,
};
use crate::{
    checkpoint::{Context, DOCUMENT_KEY, StateFolder, TensorFileWriter, TensorId, TensorInfo},
    merge::MergeError,
    tensor::{Dtype, RowColumns, dtype_name},
};

/// Writes a ledger in one pass over its targets, each begun, fed in order and ended before the next.
pub(in crate::merge) struct LedgerWriter {
    state: StateFolder,
    name: &'static str,
    writer: TensorFileWriter,
    document: LedgerDocument,
    current: Option<Current>,
}

/// What is fed.
enum Current {
    Positions(Box<Positions>),
    Whole(TensorId),
}

/// Originals at changed positions, so far.
struct Positions {
    transposed: bool,
    originals: (TensorId, blake3::Hasher),
    group_offsets: (TensorId, blake3::Hasher),
    n_rows: u64,
    n_groups: u64,
    nnz: u64,
}

impl LedgerWriter {
    /// Begins the ledger `name` (replaced where it exists) with a document that has no targets yet. The state folder may be made later.
    pub(in crate::merge) fn create(
        state: &StateFolder,
        name: &'static str,
        document: LedgerDocument,
    ) -> Result<Self, MergeError> {
        let writer = TensorFileWriter::create_own(state.folder(), name)?;
        Ok(Self { state: state.clone(), name, writer, document, current: None })
    }

    /// Bytes of tensor data so far.
    pub(in crate::merge) fn n_bytes(&self) -> u64 {
        self.writer.n_bytes()
    }

    /// Begins the originals of a tensor at its changed positions.
    pub(in crate::merge) fn begin_positions(&mut self, info: &TensorInfo, transposed: bool) -> Result<(), MergeError> {
        assert!(self.current.is_none(), "one target at a time");
        let originals = self.writer.add_tensor(format!("{}.originals", info.name), info.dtype);
        let group_offsets = self.writer.add_tensor(format!("{}.group_offsets", info.name), Dtype::U64);
        self.current = Some(Current::Positions(Box::new(Positions {
            transposed,
            originals: (originals, blake3::Hasher::new()),
            group_offsets: (group_offsets, blake3::Hasher::new()),
            n_rows: 0,
            n_groups: 0,
            nnz: 0,
        })));
        self.push_offset()
    }

    /// Appends the originals of the next rows, a multiple of 64 but for the last.
    pub(in crate::merge) fn push_rows(&mut self, touched: &RowColumns, elements: &[u8]) -> Result<(), MergeError> {
        let positions = self.positions();
        assert!(positions.n_rows.is_multiple_of(GROUP_ROWS), "blocks begin where groups of rows begin");
        positions.n_rows += touched.n_rows() as u64;
        positions.originals.1.update(elements);
        let originals = positions.originals.0;
        self.writer.append(originals, elements)?;
        for first in (0..touched.n_rows()).step_by(GROUP_ROWS as usize) {
            let end = touched.n_rows().min(first + GROUP_ROWS as usize);
            let n = (touched.offsets()[end] - touched.offsets()[first]) as u64;
            self.positions().nnz += n;
            self.push_offset()?;
        }
        Ok(())
    }

    /// Appends where the next group of rows begins.
    fn push_offset(&mut self) -> Result<(), MergeError> {
        let positions = self.positions();
        let bytes = positions.nnz.to_le_bytes();
        positions.group_offsets.1.update(&bytes);
        positions.n_groups += 1;
        let id = positions.group_offsets.0;
        Ok(self.writer.append(id, &bytes)?)
    }

    fn positions(&mut self) -> &mut Positions {
        let Some(Current::Positions(positions)) = &mut self.current else { unreachable!("positions were begun") };
        positions
    }

    /// Begins a whole original.
    pub(in crate::merge) fn begin_whole(&mut self, info: &TensorInfo) {
        assert!(self.current.is_none(), "one target at a time");
        self.current = Some(Current::Whole(self.writer.add_tensor(format!("{}.whole", info.name), info.dtype)));
    }

    /// Appends the next bytes of a whole original.
    pub(in crate::merge) fn push_whole(&mut self, bytes: &[u8]) -> Result<(), MergeError> {
        let Some(Current::Whole(id)) = self.current else { unreachable!("a whole tensor was begun") };
        Ok(self.writer.append(id, bytes)?)
    }

    /// Ends a tensor: the one that was begun, or one of which hashes alone are kept. `hashes` are those of a whole tensor.
    pub(in crate::merge) fn end_target(
        &mut self,
        info: &TensorInfo,
        n_columns: u64,
        terms: Vec<RecordedTerm>,
        hashes: Option<KeptHashes>,
    ) {
        let kept = match (self.current.take(), hashes) {
            (Some(Current::Positions(positions)), _) => {
                let Positions { transposed, originals, group_offsets, n_groups, nnz, .. } = *positions;
                self.writer.finish_tensor(originals.0, vec![nnz]);
                self.writer.finish_tensor(group_offsets.0, vec![n_groups]);
                Kept::Positions(KeptPositions {
                    transposed,
                    nnz,
                    originals: originals.1.finalize().to_hex().to_string(),
                    group_offsets: group_offsets.1.finalize().to_hex().to_string(),
                })
            }
            (Some(Current::Whole(id)), Some(hashes)) => {
                self.writer.finish_tensor(id, info.shape.clone());
                Kept::Whole(hashes)
            }
            (None, Some(hashes)) => Kept::Hash(hashes),
            (_, None) => unreachable!("whole tensors have hashes"),
        };
        let (dtype, shape) = (dtype_name(info.dtype), info.shape.clone());
        let target = LedgerTarget { dtype, shape, layout: None, n_columns, kept, terms };
        self.document.targets.insert(info.name.clone(), target);
    }

    /// Begins the original of a tensor that one of another size took the place of; [`Self::push_whole`] appends to it.
    pub(in crate::merge) fn begin_replaced(&mut self, name: &str, info: &TensorInfo) {
        assert!(self.current.is_none(), "one target at a time");
        self.current = Some(Current::Whole(self.writer.add_tensor(format!("{name}.whole"), info.dtype)));
    }

    /// Ends it.
    pub(in crate::merge) fn end_replaced(&mut self, info: &TensorInfo) {
        let Some(Current::Whole(id)) = self.current.take() else { unreachable!("a whole tensor was begun") };
        self.writer.finish_tensor(id, info.shape.clone());
    }

    /// Records a tensor that an adapter brought along.
    pub(in crate::merge) fn add(&mut self, name: String, added: LedgerAdded) {
        self.document.added.insert(name, added);
    }

    /// Lets the ledger of these adapters, whose copies are there, appear, synced, and opens it: what is trusted from here on is what lies on disk.
    pub(in crate::merge) fn finish(
        mut self,
        ctx: &Context<'_>,
        active: Vec<LedgerAdapter>,
    ) -> Result<Ledger, MergeError> {
        self.document.active = active;
        if !self.document.needs_base() {
            // Nothing depends on it, and the same adapters leave the same ledger.
            self.document.base.clear();
        }
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
