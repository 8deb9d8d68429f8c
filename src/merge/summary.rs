//! What a checkpoint's ledger says, read from its header alone.

use serde::Serialize;

use super::{
    MergeError,
    ledger::{ActiveAdapter, LedgerDocument},
    low_rank,
    state::state_of,
};
use crate::checkpoint::{Checkpoint, Shard, StateFolder};

/// The merges that a checkpoint remembers.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LedgerSummary {
    /// Merged adapters, by id.
    pub active: Vec<ActiveAdapter>,
    /// Tensors that they touch.
    pub n_tensors: usize,
    /// Positions that they touch, each remembered once.
    pub n_touched: u64,
    /// Bytes of the ledger, without the adapters' copies.
    pub ledger_bytes: u64,
    /// Whether taking an adapter out needs the base: after a low-rank merge that kept no originals.
    pub needs_base: bool,
    /// Whether a change was interrupted and waits for `recover`.
    pub interrupted: bool,
}

/// The ledger of an open checkpoint, or `None` where it has none. Reads the ledger's header only.
///
/// # Errors
/// [`MergeError::BadLedger`] where the header is not what was written.
pub fn ledger_summary(checkpoint: &Checkpoint) -> Result<Option<LedgerSummary>, MergeError> {
    let state = state_of(checkpoint)?;
    let interrupted = checkpoint.interrupted()?.is_some();
    if let Some((folder, record)) = low_rank::record_of(checkpoint)? {
        let active = record.active.iter().map(|a| ActiveAdapter { id: a.id.clone(), scale: a.scale }).collect();
        let n_elements = |target: &low_rank::RecordedTarget| target.shape.iter().product::<u64>();
        return Ok(Some(LedgerSummary {
            active,
            n_tensors: record.targets.len(),
            n_touched: record.targets.values().map(n_elements).sum(),
            ledger_bytes: folder.originals_bytes()?,
            needs_base: !record.has_originals,
            interrupted,
        }));
    }
    let Some(shard) = Shard::open_own(state.folder(), StateFolder::LEDGER)? else {
        let summary = LedgerSummary {
            active: Vec::new(),
            n_tensors: 0,
            n_touched: 0,
            ledger_bytes: 0,
            needs_base: false,
            interrupted,
        };
        return Ok(interrupted.then_some(summary));
    };
    let document = LedgerDocument::parse(shard.header().metadata())
        .map_err(|what| MergeError::BadLedger { path: shard.path().to_owned(), what })?;
    Ok(Some(LedgerSummary {
        n_tensors: document.targets.len(),
        n_touched: document.nnz(),
        ledger_bytes: shard.file_bytes(),
        needs_base: false,
        active: document.active,
        interrupted,
    }))
}
