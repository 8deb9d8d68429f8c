//! What a ledger says: its JSON document.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{RecordedTerm, TextEdit};
use crate::{checkpoint::DOCUMENT_KEY, merge::AdapterReading, tensor::RowLayout};

/// Beside a document: its BLAKE3.
pub(super) const CHECKSUM_KEY: &str = "neuroada.blake3";

/// The version that is written.
pub(super) const VERSION: u32 = 2;

/// The ledger's JSON document, of any version that is read, as the newest has it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerDocument {
    kind: LedgerKind,
    version: u32,
    /// What the checkpoint was called before anything was merged into it, where undoing needs it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub base: String,
    /// Merged adapters, by id.
    pub active: Vec<LedgerAdapter>,
    /// How what the adapters left open was read, in records that do not say where they belong.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reading: AdapterReading,
    /// Files that name adapters: shards whose headers a merge out of place wrote, the index that one in place wrote.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub marked: Vec<String>,
    /// Headers of shards that adapters brought tensors into, by the shard's name: how to take that back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, TextEdit>,
    /// Files beside the shards that were edited, by name: how to take that back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, TextEdit>,
    /// Tensors that adapters brought along, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub added: BTreeMap<String, LedgerAdded>,
    /// Touched tensors.
    pub targets: BTreeMap<String, LedgerTarget>,
}

/// A tensor that an adapter brought along: one that the base has not, or has in another size.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerAdded {
    /// Which of the active adapters.
    pub adapter: usize,
    /// The adapter's tensor.
    pub tensor: String,
    /// Its type in the checkpoint.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// PEFT's `task_type` of its adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// The base's tensor that it took the place of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced: Option<LedgerReplaced>,
}

/// A tensor of the base that one of another size took the place of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerReplaced {
    /// Its type.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// BLAKE3 of its bytes.
    pub blake3: String,
    /// Whether the ledger keeps it, as `T.whole`; else undoing reads the base.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub whole: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LedgerKind {
    Ledger,
}

/// One merged adapter, a copy of which lies beside the ledger.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerAdapter {
    /// The adapter's id, 64 hexadecimal digits.
    pub id: String,
    /// The scale it was merged with.
    pub scale: f64,
    /// `sparse`: the copy is `adapters/ID.safetensors`. `lora`: the folder `adapters/ID`.
    pub kind: String,
    /// The base that it says it was made from.
    pub base: String,
    /// Deltas it holds, or parameters.
    pub n_deltas: u64,
    /// BLAKE3 of the copy's tensor file, by which a low-rank one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// One touched tensor: what lies beneath, and what adapters do to it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerTarget {
    /// The weight's type.
    pub dtype: String,
    /// The weight's shape as stored.
    pub shape: Vec<u64>,
    /// How stored tensors hold the weight; `plain` where absent, and no other is known to this program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// Elements of a row, as the terms count rows.
    pub n_columns: u64,
    /// What is kept of the original.
    pub kept: Kept,
    /// In ascending order of the adapters' ids. Empty in records that do not say it.
    pub terms: Vec<RecordedTerm>,
}

/// What is kept of an original.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kept {
    /// The bytes at the changed positions: `T.originals` and `T.group_offsets`.
    Positions(KeptPositions),
    /// A hash: undoing reads the base.
    Hash(KeptHashes),
    /// The tensor: `T.whole`.
    Whole(KeptHashes),
}

impl Kept {
    /// The hashes, where the tensor is changed as a whole.
    pub(in crate::merge) fn hashes(&self) -> Option<&KeptHashes> {
        match self {
            Self::Hash(hashes) | Self::Whole(hashes) => Some(hashes),
            Self::Positions(_) => None,
        }
    }
}

/// Originals at changed positions.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptPositions {
    /// Whether rows are stored columns.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    /// How many.
    pub nnz: u64,
    /// BLAKE3 of `T.originals`.
    pub(super) originals: String,
    /// BLAKE3 of `T.group_offsets`.
    pub(super) group_offsets: String,
}

/// Hashes of a whole tensor, each the BLAKE3 of the BLAKE3s of its rows, 16 at a time.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptHashes {
    /// Of the original.
    pub base: String,
    /// Of what the merges made of it.
    pub merged: String,
}

fn is_default(reading: &AdapterReading) -> bool {
    *reading == AdapterReading::default()
}

/// Documents of version 1: sparse adapters alone.
mod version_1 {
    use super::{BTreeMap, Deserialize, LedgerKind};

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Document {
        #[serde(rename = "kind")]
        pub(super) _kind: LedgerKind,
        #[serde(rename = "version")]
        pub(super) _version: u32,
        pub(super) active: Vec<Active>,
        pub(super) targets: BTreeMap<String, Target>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Active {
        pub(super) id: String,
        pub(super) scale: f64,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Target {
        pub(super) dtype: String,
        pub(super) shape: Vec<u64>,
        #[serde(default)]
        pub(super) transposed: bool,
        pub(super) nnz: u64,
        pub(super) originals: String,
        pub(super) group_offsets: String,
    }
}

impl LedgerDocument {
    /// A document without targets.
    pub(in crate::merge) fn new(base: String, active: Vec<LedgerAdapter>, reading: AdapterReading) -> Self {
        Self {
            kind: LedgerKind::Ledger,
            version: VERSION,
            base,
            active,
            reading,
            marked: Vec::new(),
            headers: BTreeMap::new(),
            files: BTreeMap::new(),
            added: BTreeMap::new(),
            targets: BTreeMap::new(),
        }
    }

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
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |e: serde_json::Error| format!("the ledger's document is malformed: {e}");
        match serde_json::from_str(text).map_err(malformed)? {
            Version { version: 1 } => Ok(serde_json::from_str::<version_1::Document>(text).map_err(malformed)?.into()),
            Version { version: VERSION } => serde_json::from_str(text).map_err(malformed),
            Version { version } => Err(format!(
                "the ledger has version {version}, which a newer program wrote; this one reads versions up to {VERSION}"
            )),
        }
    }

    /// What stands beside a document: its BLAKE3, 64 hexadecimal digits.
    pub fn checksum(text: &str) -> String {
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// The version that it was written in.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Touched elements of all tensors.
    pub fn n_touched(&self) -> u64 {
        let touched = |target: &LedgerTarget| match &target.kept {
            Kept::Positions(positions) => positions.nnz,
            Kept::Hash(_) | Kept::Whole(_) => target.shape.iter().fold(1u64, |n, &size| n.saturating_mul(size)),
        };
        self.targets.values().map(touched).fold(0, u64::saturating_add)
    }

    /// Whether taking some adapter out needs the base.
    pub fn needs_base(&self) -> bool {
        let is_hash = |replaced: &LedgerReplaced| !replaced.whole;
        self.targets.values().any(|target| matches!(target.kept, Kept::Hash(_)))
            || self.added.values().any(|added| added.replaced.as_ref().is_some_and(is_hash))
    }
}

impl From<version_1::Document> for LedgerDocument {
    fn from(old: version_1::Document) -> Self {
        let active = old.active.into_iter().map(|active| LedgerAdapter {
            id: active.id,
            scale: active.scale,
            kind: "sparse".to_owned(),
            base: String::new(),
            n_deltas: 0,
            digest: None,
        });
        let target = |target: version_1::Target| {
            let layout = RowLayout::new(&target.shape, target.transposed);
            let n_columns = match (layout, &target.shape[..]) {
                (Some(_), [_, .., last]) => *last,
                (Some(_), _) => 1,
                // Found out when the ledger is opened.
                (None, _) => 0,
            };
            let version_1::Target { transposed, nnz, originals, group_offsets, .. } = target;
            LedgerTarget {
                dtype: target.dtype,
                shape: target.shape,
                layout: None,
                n_columns,
                kept: Kept::Positions(KeptPositions { transposed, nnz, originals, group_offsets }),
                terms: Vec::new(),
            }
        };
        let targets = old.targets.into_iter().map(|(name, old)| (name, target(old))).collect();
        let new = Self::new(String::new(), active.collect(), AdapterReading::default());
        Self { version: 1, targets, ..new }
    }
}
