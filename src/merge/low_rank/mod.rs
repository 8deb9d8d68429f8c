//! Merges of which some adapter is low-rank: every element of its targets changes, so a merge is a new checkpoint.
//!
//! [`plan`] brings the adapters together with the checkpoint: for each touched tensor, what is added to which of its rows, in
//! ascending order of the adapters' ids. [`compute`] makes the merged rows of a block from the originals, reading
//! [`factors`] as far as the block needs them; [`bounds`] says before that whether a weight could overflow. [`write`] copies shards and computes on the way; [`record`] is what the result
//! remembers: hashes of the originals and of the merged tensors, and, where the user allows their size, the originals.
//! Taking an adapter out is computing again from the originals with the others, as everywhere ([`undo`]); [`verify`] computes
//! again and compares.
//!
//! The formula, per element: `value = round(original + sum_1 * s_1 + sum_2 * s_2 + …)` in float32 (float64 for float64 weights),
//! where `sum_k` is the product of the factors as [`crate::backend::add_low_rank`] sums it, and `s_k` the adapter's scaling times
//! the scale of the merge, rounded once to float32. With magnitudes (DoRA): `value = round((m / norm) * (original + sum * s))`,
//! where `norm` is that of the row of `original + sum * s`, its squares summed in float64. A tensor that the adapter holds in full
//! stands in for the original.
//!
//! On a GPU, the same bytes: where one product and nothing else is added to bf16, f16 or f32 weights ([`crate::backend::Merger`]). What
//! adds more to a weight (several adapters, sparse deltas, biases), magnitudes and tensors in full are the CPU's work.

mod bounds;
mod compute;
mod factors;
mod norms;
mod plan;
mod planner;
mod record;
mod sources;
mod tied;
mod undo;
mod verify;
mod write;

use std::path::PathBuf;

pub use record::{LowRankRecord, RecordedAdapter, RecordedTarget};
pub use undo::undo_low_rank;
pub use verify::verify_low_rank;
pub use write::merge_low_rank;

pub(super) use record::record_of;
pub use sources::{adapter_id, is_low_rank};

use super::MergeError;
use crate::{
    checkpoint::{Checkpoint, Existing},
    weights::{Answers, Axes, KindAxes, Rename},
};

/// Whether a checkpoint remembers a low-rank merge.
///
/// # Errors
/// A checkpoint or a record that cannot be read.
pub fn holds_low_rank(path: &std::path::Path) -> Result<bool, MergeError> {
    Ok(record_of(&Checkpoint::open_interrupted(path)?)?.is_some())
}

/// How the second factor of a stack of experts is to be read; a file does not tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExpertOrder {
    /// `B` is `[d_out, r, E]`: as PEFT trains and saves it.
    RankFirst,
    /// `B` is `[d_out, E, r]`: as other trainers had it, whose files look the same.
    ExpertFirst,
}

/// What the files leave open, and the user has to say.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowRankReading {
    /// How second factors of experts are read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_order: Option<ExpertOrder>,
    /// Which way round all stacks of experts are stored, where `axes` does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_axes: Option<Axes>,
    /// Which way round kinds of weights are stored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub axes: Vec<KindAxes>,
    /// What keys of the adapters are called in the checkpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub renames: Vec<Rename>,
    /// Whether an adapter of some of the modules that share one weight may change the others too: embedding and head.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tied_head: bool,
}

impl LowRankReading {
    /// What the map of weights needs of it.
    pub(super) fn answers(&self) -> Answers {
        Answers { axes: self.axes.clone(), expert_axes: self.expert_axes, renames: self.renames.clone() }
    }
    /// Whether it says nothing that records of version 1 cannot.
    pub(super) fn is_of_version_1(&self) -> bool {
        self.axes.is_empty() && self.renames.is_empty()
    }
}

/// What a merged checkpoint keeps for undoing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeptOriginals {
    /// Nothing; it does not even know that it was merged.
    Nothing,
    /// Hashes of them: undoing needs the base, and proves that it is the base.
    Hashes,
    /// All of them: as many bytes as the touched tensors have.
    All,
}

/// How to merge, or to undo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LowRankOptions {
    /// Folder, or file where the input is a single file.
    pub output: PathBuf,
    /// What to do where it exists.
    pub existing: Existing,
    /// What the result keeps for undoing.
    pub keep: KeptOriginals,
    /// Whether shards that nothing touches are hard-linked instead of copied.
    pub link: bool,
    /// Check everything, write nothing.
    pub dry_run: bool,
    /// Whether a merge may make finite weights infinite or NaN, which the report counts. Taking adapters out may do it always.
    pub allow_overflow: bool,
}

impl LowRankOptions {
    /// A new checkpoint at `output`, which must not exist, that keeps hashes.
    pub fn new(output: impl Into<PathBuf>) -> Self {
        let (existing, keep) = (Existing::Keep, KeptOriginals::Hashes);
        Self { output: output.into(), existing, keep, link: false, dry_run: false, allow_overflow: false }
    }
}
