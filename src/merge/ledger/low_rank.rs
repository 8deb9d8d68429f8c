//! The record of a low-rank merge as version 0.1 left it: `low-rank` in the state folder. Read, and not written any more.
//!
//! Two lines of text: a JSON document and its BLAKE3 in hexadecimal. The document names the merged adapters, copies of which lie
//! beside it (`adapters/ID/` as PEFT leaves them, `adapters/ID.safetensors`), how the files were read, and for each touched tensor the
//! hash of its originals and of what the merge made of them. Where the user allowed their size, `originals.safetensors` holds
//! the originals themselves, under the tensors' own names. Where the adapters belong it does not say: that is found again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Kept, KeptHashes, Ledger, LedgerAdapter, LedgerDocument, LedgerTarget};
use crate::{
    checkpoint::{Shard, StateFolder, checksummed},
    merge::{AdapterReading, MergeError},
};

/// Records larger than this are refused: a hundred bytes for each of a million tensors.
const MAX_BYTES: u64 = 256 << 20;
/// Version 2 also says which way round weights were read, and what keys were renamed to.
const NEWEST_VERSION: u32 = 2;

/// The record's document.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRankRecord {
    kind: RecordKind,
    version: u32,
    /// What the base was called.
    pub base: String,
    /// Merged adapters, by id.
    pub active: Vec<RecordedAdapter>,
    /// How what the files leave open was read.
    pub reading: AdapterReading,
    /// Whether the originals lie beside the record.
    pub has_originals: bool,
    /// Touched tensors.
    pub targets: BTreeMap<String, RecordedTarget>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum RecordKind {
    #[serde(rename = "low-rank")]
    LowRank,
}

/// A merged adapter.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedAdapter {
    /// Its id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it was merged with.
    pub scale: f64,
    /// `lora` or `sparse`.
    pub kind: String,
}

/// A touched tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedTarget {
    /// Its type.
    pub dtype: String,
    /// Its shape as stored.
    pub shape: Vec<u64>,
    /// The last dimension, or what the adapters read as rows.
    pub n_columns: u64,
    /// Hash of the base's values.
    pub base: String,
    /// Hash of the merged ones.
    pub merged: String,
}

impl LowRankRecord {
    /// Parses the two lines.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document = checksummed::document_of(bytes)
            .ok_or("the record of a low-rank merge is damaged: its checksum does not match")?;
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |e: serde_json::Error| format!("the record is malformed: {e}");
        match serde_json::from_str(document).map_err(malformed)? {
            Version { version: 1..=NEWEST_VERSION } => serde_json::from_str(document).map_err(malformed),
            Version { version } => {
                Err(format!("the record has version {version}, this program reads versions up to {NEWEST_VERSION}"))
            }
        }
    }
}

/// Opens the record in a state folder, as a ledger.
///
/// # Errors
/// [`MergeError::BadLedger`] where the record is not what was written.
pub(super) fn open(state: &StateFolder) -> Result<Option<Ledger>, MergeError> {
    let Some(bytes) = state.folder().read(StateFolder::LOW_RANK, MAX_BYTES)? else { return Ok(None) };
    let path = state.path().join(StateFolder::LOW_RANK);
    let bad = |what: String| MergeError::BadLedger { path: path.clone(), what };
    let record = LowRankRecord::parse(&bytes).map_err(bad)?;
    let shard = Shard::open_own(state.folder(), StateFolder::ORIGINALS)?;
    if record.has_originals && shard.is_none() {
        return Err(bad(format!("{} is missing", StateFolder::ORIGINALS)));
    }
    let shard = shard.filter(|_| record.has_originals);
    let document = record.into_document();
    let ledger = Ledger { path: path.clone(), document, digest: blake3::hash(&bytes), shard, is_old_record: true };
    for (name, target) in &ledger.document.targets {
        if let Kept::Whole(_) = target.kept {
            let found = ledger.whole(name).filter(|(_, info)| {
                crate::tensor::dtype_name(info.dtype) == target.dtype && info.shape == target.shape
            });
            found.ok_or_else(|| ledger.bad(name, "no original of the right type and shape lies beside the record"))?;
        }
    }
    Ok(Some(ledger))
}

impl LowRankRecord {
    fn into_document(self) -> LedgerDocument {
        let active = self.active.into_iter().map(|active| LedgerAdapter {
            id: active.id,
            scale: active.scale,
            kind: active.kind,
            base: String::new(),
            n_deltas: 0,
            digest: None,
        });
        let mut document = LedgerDocument::new(self.base, active.collect(), self.reading);
        let target = |target: RecordedTarget| {
            let hashes = KeptHashes { base: target.base, merged: target.merged };
            let kept = if self.has_originals { Kept::Whole(hashes) } else { Kept::Hash(hashes) };
            let RecordedTarget { dtype, shape, n_columns, .. } = target;
            LedgerTarget { dtype, shape, layout: None, n_columns, kept, terms: Vec::new() }
        };
        document.targets = self.targets.into_iter().map(|(name, recorded)| (name, target(recorded))).collect();
        document
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_record_is_found() {
        let target = RecordedTarget {
            dtype: "BF16".to_owned(),
            shape: vec![2, 3],
            n_columns: 3,
            base: "0".to_owned(),
            merged: "1".to_owned(),
        };
        let record = LowRankRecord {
            kind: RecordKind::LowRank,
            version: 1,
            base: "b".to_owned(),
            active: Vec::new(),
            reading: AdapterReading::default(),
            has_originals: false,
            targets: BTreeMap::from([("w".to_owned(), target)]),
        };
        let bytes = checksummed::to_bytes(&record);
        assert_eq!(LowRankRecord::parse(&bytes).unwrap(), record);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(LowRankRecord::parse(&flipped).is_err(), "bit {bit}");
        }
    }
}
