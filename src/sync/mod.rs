//! Deltas of whole checkpoints as inference servers fetch them: a folder `weight_v000001/` beside `weight_v000000/`.
//!
//! SGLang and slime read it: each changed tensor under its own name as bytes, zstd-compressed, in ordinary safetensors files; an
//! index whose metadata says which version it makes of which, and how; and in each file's metadata the checksum of the new
//! bytes of every tensor. Two encodings: `xor` of old and new bytes, which must be applied exactly once, and `overwrite`,
//! positions and new bytes, which may be applied again. [`export()`] writes such a folder from two checkpoints,
//! [`apply()`] makes the newer checkpoint from the older one; both out of core.
//!
//! Source: slime, `docs/en/advanced/delta-weight-sync.md` and `slime/utils/disk_delta.py`.

mod apply;
mod checksum;
mod error;
mod export;

use serde::Serialize;

use crate::checkpoint::LeftOut;

pub use apply::apply;
pub use checksum::Checksum;
pub use error::SyncError;
pub use export::{ExportOptions, export};

/// How a tensor's change is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// How many bytes changed, where (32 bits each, ascending), and what they are now.
    Overwrite,
    /// Old and new bytes, one xor the other.
    Xor,
}

impl Encoding {
    /// The word for it in the index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Overwrite => "overwrite",
            Self::Xor => "xor",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::Overwrite, Self::Xor].into_iter().find(|encoding| encoding.name() == name)
    }
}

/// What was exported or applied.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct SyncReport {
    /// The older checkpoint's name.
    pub base: String,
    /// The version that the delta makes.
    pub version: u64,
    /// The version that it changes.
    pub base_version: u64,
    /// `overwrite` or `xor`.
    pub encoding: String,
    /// `xxh3-128`, `blake3` or `adler32`.
    pub checksum: String,
    /// Tensors that changed.
    pub tensors: Vec<SyncedTensor>,
    /// Tensors that are the same in both.
    pub n_same: u64,
    /// Bytes that changed.
    pub n_changed_bytes: u64,
    /// Bytes of all files that were written.
    pub n_bytes: u64,
    /// Files of the base that are not in the new checkpoint, since they would contradict it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

/// One changed tensor.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct SyncedTensor {
    /// Its name.
    pub tensor: String,
    /// Its bytes.
    pub n_bytes: u64,
    /// Of those, bytes that changed.
    pub n_changed: u64,
    /// Bytes of the delta.
    pub n_delta_bytes: u64,
    /// The checksum of the new bytes.
    pub checksum: String,
}

/// What the index says about the delta.
#[derive(Clone, PartialEq, Eq, Debug)]
struct DeltaHeader {
    version: u64,
    base_version: u64,
    encoding: Encoding,
    checksum: Checksum,
}

const COMPRESSION: &str = "zstd";
