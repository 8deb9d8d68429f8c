//! Inputs and options of a merge.

use std::path::PathBuf;

use super::MergeError;
use crate::{
    adapter::AdapterId,
    backend::Merger,
    checkpoint::{Existing, Printable},
    weights::{Answers, Axes, KindAxes, Rename},
};

/// An adapter to merge.
#[derive(Clone, PartialEq, Debug)]
pub struct MergeInput {
    /// The adapter: a file of this program, or a file or folder of another tool.
    pub adapter: PathBuf,
    /// Replaces the scale in the adapter. A low-rank adapter is multiplied by it in addition to its own scaling.
    pub scale: Option<f64>,
}

/// The destination of the result.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MergeOutput {
    /// The checkpoint itself, with a journal.
    InPlace {
        /// Whether files that are links, or lie in a Hugging Face cache, may change. Everything else that links to them changes too.
        through_links: bool,
    },
    /// A new checkpoint of the same layout; the input is only read.
    New {
        /// A folder; a file if the input is a single file.
        path: PathBuf,
        /// What to do if it exists.
        existing: Existing,
        /// Whether the result gets a ledger, which unmerging needs, and headers that name the adapters.
        ledger: bool,
        /// Whether unchanged shards are hard-linked instead of copied.
        link: bool,
        /// Whether an interrupted merge keeps its finished shards, and this merge reuses those of an earlier one.
        resume: bool,
    },
}

/// What the ledger keeps of tensors that a merge changes as a whole. Of all other tensors it keeps the bytes at the changed positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum KeptOriginals {
    /// Hashes. Unmerging needs the base, and checks it against the hashes. A merge in place needs the base too.
    #[default]
    Hashes,
    /// The whole tensors.
    Whole,
}

/// The layout of the second factor of a stack of experts, which files do not record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ExpertOrder {
    /// `B` is `[d_out, r, E]`, as PEFT trains and saves it.
    RankFirst,
    /// `B` is `[d_out, E, r]`, as some other trainers save it in files that look the same.
    ExpertFirst,
}

/// Answers to questions that files leave open.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterReading {
    /// The layout of the second factors of experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_order: Option<ExpertOrder>,
    /// The orientation of all stacks of experts that `axes` does not name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_axes: Option<Axes>,
    /// The orientation of kinds of weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub axes: Vec<KindAxes>,
    /// Maps keys of the adapters to names of the checkpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub renames: Vec<Rename>,
    /// Whether an adapter for one of several modules that share a weight, such as embedding and head, may change the others too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tied_head: bool,
    /// Whether tensors of low-rank adapters that the base lacks, or has in another size, are added to a new checkpoint: new heads,
    /// embeddings of a larger vocabulary.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub new_tensors: bool,
}

impl AdapterReading {
    /// The answers that the map of weights needs.
    pub(super) fn answers(&self) -> Answers {
        Answers { axes: self.axes.clone(), expert_axes: self.expert_axes, renames: self.renames.clone() }
    }
}

/// How to merge or unmerge.
#[derive(Clone, Debug)]
pub struct MergeOptions<'a> {
    /// The destination of the result.
    pub output: MergeOutput,
    /// Whether to check everything and write nothing.
    pub dry_run: bool,
    /// Whether a merge may make finite weights infinite or NaN; the report counts them. Unmerging always may.
    pub allow_overflow: bool,
    /// Whether a new checkpoint also gets files that contradict its weights, such as other copies of the old weights and the old
    /// model card.
    pub keep_other_files: bool,
    /// Answers to questions that the adapters' files leave open.
    pub reading: AdapterReading,
    /// What the ledger keeps of tensors that change as a whole.
    pub keep: KeptOriginals,
    /// The original base, which has the originals if the ledger keeps only their hashes.
    pub base: Option<PathBuf>,
    /// The device for weights that change by a single low-rank product; the CPU computes all others.
    pub merger: Merger<'a>,
}

impl MergeOptions<'_> {
    /// Options for this output, with all defaults.
    pub fn to(output: MergeOutput) -> Self {
        Self {
            output,
            dry_run: false,
            allow_overflow: false,
            keep_other_files: false,
            reading: AdapterReading::default(),
            keep: KeptOriginals::default(),
            base: None,
            merger: Merger::cpu(),
        }
    }
    /// A new checkpoint at `path`, which must not exist, with a ledger.
    pub fn new_checkpoint(path: impl Into<PathBuf>) -> Self {
        let (path, existing) = (path.into(), Existing::Keep);
        Self::to(MergeOutput::New { path, existing, ledger: true, link: false, resume: false })
    }
    /// The checkpoint itself.
    pub fn in_place() -> Self {
        Self::to(MergeOutput::InPlace { through_links: false })
    }
}

/// Which adapters to unmerge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    /// All active adapters, which restores the base's bytes.
    All,
    /// These.
    Some(Vec<AdapterId>),
}

/// Checks that the scale of an adapter is finite in the type of the arithmetic.
pub(super) fn check_scale(input: &MergeInput, scale: f64, is_low_rank: bool) -> Result<f64, MergeError> {
    if scale.is_finite() && (!is_low_rank || (scale as f32).is_finite()) {
        return Ok(scale);
    }
    let path = Printable::path(&input.adapter);
    let what = if is_low_rank { "a number that float32 holds" } else { "a finite number" };
    Err(MergeError::Usage(format!("{path}: scale {scale} is not {what}")))
}
