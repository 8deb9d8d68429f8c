//! What a checkpoint with a low-rank merge remembers: `low-rank` in its state folder.
//!
//! Two lines of text: a JSON document and its BLAKE3 in hexadecimal. The document names the merged adapters, copies of which lie
//! beside it (`adapters/ID/` as PEFT leaves them, `adapters/ID.safetensors`), how the files were read, and for each touched tensor the
//! hash of its originals and of what the merge made of them. Where the user allowed their size, `originals.safetensors` holds
//! the originals themselves, under the tensors' own names.
//!
//! A tensor's hash is the BLAKE3 of the BLAKE3s of its rows, 16 at a time: blocks are hashed as they come, on all threads.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    LowRankReading,
    compute::GROUP_ROWS,
    sources::{AnyAdapter, Source},
};
use crate::{
    checkpoint::{AtomicFile, Checkpoint, CheckpointError, Context, EntryKind, OwnFolder, StateFolder, write_own},
    foreign::{PEFT_CONFIG, PEFT_TENSORS},
    merge::{MergeError, MergeInput, checksummed, stack::copy_name, state::state_of},
};

/// Records larger than this are refused: a hundred bytes for each of a million tensors.
const MOST_BYTES: u64 = 256 << 20;
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
    pub reading: LowRankReading,
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
    /// A record of a merge of `sources`.
    pub(super) fn new(base: String, sources: &[Source], reading: LowRankReading, has_originals: bool) -> Self {
        let active = sources.iter().map(|source| RecordedAdapter {
            id: source.id.to_string(),
            scale: source.scale,
            kind: source.kind().to_owned(),
        });
        let (kind, active) = (RecordKind::LowRank, active.collect());
        let version = if reading.is_of_version_1() { 1 } else { NEWEST_VERSION };
        Self { kind, version, base, active, reading, has_originals, targets: BTreeMap::new() }
    }

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

    /// Bytes of all originals.
    pub fn n_original_bytes(&self) -> u64 {
        let bytes = |target: &RecordedTarget| {
            let dtype = crate::tensor::parse_dtype(&target.dtype).map_or(0, |dtype| dtype.bitsize() as u64 / 8);
            target.shape.iter().product::<u64>() * dtype
        };
        self.targets.values().map(bytes).sum()
    }
}

/// Where the record and what belongs to it lie.
#[derive(Clone, Debug)]
pub(in crate::merge) struct RecordFolder(StateFolder);

impl RecordFolder {
    pub(super) fn of(state: &StateFolder) -> Self {
        Self(state.clone())
    }
    pub(super) fn state(&self) -> &StateFolder {
        &self.0
    }
    /// Where the originals lie; they are proven by their hashes.
    ///
    /// # Errors
    /// Something else than a file in their place.
    pub(in crate::merge) fn originals(&self) -> Result<PathBuf, MergeError> {
        self.refuse_other(self.0.folder(), StateFolder::ORIGINALS, EntryKind::File)
    }
    /// Bytes of the originals; none where they are not kept.
    pub(in crate::merge) fn originals_bytes(&self) -> Result<u64, MergeError> {
        let file = self.0.folder().open_file(StateFolder::ORIGINALS)?;
        Ok(file.map_or(0, |(_, meta)| meta.len()))
    }

    /// Writes the record and copies of the adapters, durably.
    pub(super) fn write(
        &self,
        ctx: &Context<'_>,
        record: &LowRankRecord,
        sources: &[Source],
    ) -> Result<(), MergeError> {
        let adapters = self.0.adapters();
        adapters.create()?;
        for source in sources {
            match &source.adapter {
                AnyAdapter::Sparse(sparse) => sparse.write_own(ctx, &adapters, &copy_name(&source.id))?,
                AnyAdapter::Lora(lora) => {
                    let own = adapters.inside(&source.id.to_string());
                    own.create()?;
                    for (from, name) in lora.files().iter().zip([PEFT_CONFIG, PEFT_TENSORS]) {
                        copy_whole(from, &own, name)?;
                    }
                    own.sync()?;
                }
            }
        }
        adapters.sync()?;
        Ok(write_own(self.0.folder(), StateFolder::LOW_RANK, &checksummed::to_bytes(record))?)
    }

    /// The recorded adapters, as inputs of a merge. What is opened by these paths is proven by its id.
    ///
    /// # Errors
    /// An id that is none: it becomes part of a path. Links.
    pub(super) fn inputs(&self, record: &LowRankRecord) -> Result<Vec<MergeInput>, MergeError> {
        let adapters = self.0.adapters();
        let input = |active: &RecordedAdapter| {
            blake3::Hash::from_hex(&active.id).map_err(|_| self.bad("an adapter's id is malformed"))?;
            let (name, kind) = match active.kind.as_str() {
                "lora" => (active.id.clone(), EntryKind::Folder),
                _ => (copy_name(&active.id), EntryKind::File),
            };
            let adapter = self.refuse_other(&adapters, &name, kind)?;
            Ok(MergeInput { adapter, scale: Some(active.scale) })
        };
        record.active.iter().map(input).collect()
    }

    /// The path of the entry `name`, which must be of this kind, or absent.
    fn refuse_other(&self, folder: &OwnFolder, name: &str, kind: EntryKind) -> Result<PathBuf, MergeError> {
        match folder.kind_of(name)? {
            Some(found) if found != kind => Err(folder.refuse_entry(name).into()),
            _ => Ok(folder.path().join(name)),
        }
    }

    pub(super) fn bad(&self, what: impl Into<String>) -> MergeError {
        MergeError::BadLedger { path: self.0.path().join(StateFolder::LOW_RANK), what: what.into() }
    }
}

/// Copies a file whole or not at all.
fn copy_whole(source: &Path, folder: &OwnFolder, name: &str) -> Result<(), MergeError> {
    let mut from = std::fs::File::open(source).map_err(|e| CheckpointError::io("read", source, e))?;
    let output = AtomicFile::create_own(folder, name)?;
    std::io::copy(&mut from, &mut output.file()).map_err(|e| CheckpointError::io("copy", output.target(), e))?;
    Ok(output.commit()?)
}

/// The record of a checkpoint that holds a low-rank merge, or `None`.
///
/// # Errors
/// [`MergeError::BadLedger`] where the record is not what was written.
pub(in crate::merge) fn record_of(
    checkpoint: &Checkpoint,
) -> Result<Option<(RecordFolder, LowRankRecord)>, MergeError> {
    let folder = RecordFolder::of(&state_of(checkpoint)?);
    let Some(bytes) = folder.0.folder().read(StateFolder::LOW_RANK, MOST_BYTES)? else { return Ok(None) };
    let record = LowRankRecord::parse(&bytes).map_err(|what| folder.bad(what))?;
    Ok(Some((folder, record)))
}

/// Hashes a tensor's rows as they come, in order.
#[derive(Default)]
pub(super) struct RowsHasher(blake3::Hasher);

impl RowsHasher {
    /// The hashes of a block's groups of rows; blocks begin at multiples of [`GROUP_ROWS`].
    pub(super) fn groups(bytes: &[u8], row_bytes: u64) -> Vec<u8> {
        let group = (row_bytes * GROUP_ROWS) as usize;
        bytes.chunks(group).flat_map(|rows| *blake3::hash(rows).as_bytes()).collect()
    }
    pub(super) fn push(&mut self, groups: &[u8]) {
        self.0.update(groups);
    }
    pub(super) fn finish(&mut self) -> String {
        let hash = self.0.finalize().to_hex().to_string();
        self.0.reset();
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_record_is_found() {
        let mut record = LowRankRecord::new("b".to_owned(), &[], LowRankReading::default(), false);
        let target = RecordedTarget {
            dtype: "BF16".to_owned(),
            shape: vec![2, 3],
            n_columns: 3,
            base: "0".to_owned(),
            merged: "1".to_owned(),
        };
        record.targets.insert("w".to_owned(), target);
        let bytes = checksummed::to_bytes(&record);
        assert_eq!(LowRankRecord::parse(&bytes).unwrap(), record);
        assert_eq!(record.n_original_bytes(), 12);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(LowRankRecord::parse(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_hash_does_not_depend_on_blocks() {
        let bytes: Vec<u8> = (0..50 * 4u32).map(|i| i as u8).collect();
        let hash = |cuts: &[usize]| {
            let mut hasher = RowsHasher::default();
            for cut in cuts.windows(2) {
                hasher.push(&RowsHasher::groups(&bytes[cut[0] * 4..cut[1] * 4], 4));
            }
            hasher.finish()
        };
        assert_eq!(hash(&[0, 50]), hash(&[0, 16, 48, 50]));
    }
}
