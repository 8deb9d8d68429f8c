//! What a checkpoint's ledger says, read from its header alone.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    MergeError,
    ledger::{Ledger, LedgerDocument},
    mark::Mark,
    state::state_of,
};
use crate::checkpoint::{Checkpoint, MERGED_KEY, Shard, StateFolder};

/// One merged adapter.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct ActiveAdapter {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it was merged with.
    pub scale: f64,
    /// `sparse` or `lora`.
    pub kind: String,
}

/// The merges that a checkpoint remembers.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct LedgerSummary {
    /// Merged adapters, by id.
    pub active: Vec<ActiveAdapter>,
    /// Tensors that they touch.
    pub n_tensors: usize,
    /// Elements that they touch.
    pub n_touched: u64,
    /// Bytes of the ledger, without the adapters' copies.
    pub ledger_bytes: u64,
    /// Whether taking an adapter out needs the base: hashes alone were kept of tensors that changed as a whole.
    pub needs_base: bool,
    /// Whether a change was interrupted and waits for `recover`.
    pub interrupted: bool,
}

/// An adapter that a checkpoint's files name, though no ledger remembers it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct NamedAdapter {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it was merged with.
    pub scale: f64,
}

/// The adapters that the headers of shards or the index name, by id: what is known of merges where the ledger is gone.
pub fn named_adapters(checkpoint: &Checkpoint) -> Vec<NamedAdapter> {
    let headers = checkpoint.shards().iter().filter_map(|shard| shard.header().metadata().get(MERGED_KEY));
    let values = headers.map(String::as_str).chain(checkpoint.merged_in_index());
    // What is malformed names nothing.
    let marks = values.filter_map(|value| Mark::parse(value).ok());
    let by_id: BTreeMap<String, f64> =
        marks.flat_map(|mark| mark.all_adapters()).map(|adapter| (adapter.id, adapter.scale)).collect();
    by_id.into_iter().map(|(id, scale)| NamedAdapter { id, scale }).collect()
}

/// The ledger of an open checkpoint, or `None` where it has none. Reads the ledger's header only.
///
/// # Errors
/// [`MergeError::BadLedger`] where the header is not what was written.
pub fn ledger_summary(checkpoint: &Checkpoint) -> Result<Option<LedgerSummary>, MergeError> {
    let state = state_of(checkpoint)?;
    let interrupted = checkpoint.interrupted()?.is_some();
    let of = |document: &LedgerDocument, ledger_bytes| LedgerSummary {
        active: document
            .active
            .iter()
            .map(|active| ActiveAdapter { id: active.id.clone(), scale: active.scale, kind: active.kind.clone() })
            .collect(),
        n_tensors: document.targets.len(),
        n_touched: document.n_touched(),
        ledger_bytes,
        needs_base: document.needs_base(),
        interrupted,
    };
    if let Some(shard) = Shard::open_own(state.folder(), StateFolder::LEDGER)? {
        let document = LedgerDocument::parse(shard.header().metadata())
            .map_err(|what| MergeError::BadLedger { path: shard.path().to_owned(), what })?;
        return Ok(Some(of(&document, shard.file_bytes())));
    }
    if let Some(record) = Ledger::of_old_record(&state)? {
        return Ok(Some(of(record.document(), record.n_bytes())));
    }
    let nothing = LedgerSummary {
        active: Vec::new(),
        n_tensors: 0,
        n_touched: 0,
        ledger_bytes: 0,
        needs_base: false,
        interrupted,
    };
    Ok(interrupted.then_some(nothing))
}
