//! `txn`: the record of the change under way.
//!
//! Two lines of text ([`checksummed`]): the digests of the ledger before and after the change, and a checksum. Its presence says that the weights may be those of either ledger, or a mixture.

use serde::{Deserialize, Serialize};

use super::MergeError;
use crate::checkpoint::{StateFolder, checksummed, write_own};

/// Journals larger than this are refused.
const MAX_BYTES: u64 = 4096;

/// A change under way, from one ledger to another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    kind: JournalKind,
    version: u32,
    /// BLAKE3 of `ledger` before the change, or none where nothing was merged.
    pub before: Option<String>,
    /// BLAKE3 of `ledger.new`, which becomes `ledger`.
    pub after: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum JournalKind {
    Txn,
}

impl Journal {
    /// A change between ledgers of these digests.
    pub fn new(before: Option<blake3::Hash>, after: blake3::Hash) -> Self {
        let hex = |hash: blake3::Hash| hash.to_hex().to_string();
        Self { kind: JournalKind::Txn, version: 1, before: before.map(hex), after: hex(after) }
    }

    /// The journal in a state folder, or `None` where there is none.
    ///
    /// # Errors
    /// [`MergeError::BadLedger`] where a bit of it is not as written.
    pub fn open(state: &StateFolder) -> Result<Option<Self>, MergeError> {
        let Some(bytes) = state.folder().read(StateFolder::TXN, MAX_BYTES)? else { return Ok(None) };
        let path = state.path().join(StateFolder::TXN);
        Self::parse(&bytes).map(Some).map_err(|what| MergeError::BadLedger { path, what })
    }

    /// Parses the two lines.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document = checksummed::document_of(bytes).ok_or("the journal is damaged: its checksum does not match")?;
        let journal: Self = serde_json::from_str(document).map_err(|e| format!("the journal is malformed: {e}"))?;
        match journal.version {
            1 => Ok(journal),
            version => Err(format!("the journal has version {version}, this program reads version 1")),
        }
    }

    /// Writes the journal, durably: from here on a crash needs recovery.
    pub fn write(&self, state: &StateFolder) -> Result<(), MergeError> {
        Ok(write_own(state.folder(), StateFolder::TXN, &checksummed::to_bytes(self))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_journal_is_found() {
        let journal = Journal::new(Some(blake3::hash(b"a")), blake3::hash(b"b"));
        let bytes = checksummed::to_bytes(&journal);
        assert_eq!(Journal::parse(&bytes).unwrap(), journal);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Journal::parse(&flipped).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Journal::parse(&bytes[..len]).is_err(), "cut at {len}");
        }
    }
}
