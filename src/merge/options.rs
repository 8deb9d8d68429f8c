//! What a merge is asked for.

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
    /// The adapter: a file of this program, or what another tool left.
    pub adapter: PathBuf,
    /// Replaces the scale that the adapter carries; of a low-rank adapter it comes on top of its own scaling.
    pub scale: Option<f64>,
}

/// Where the result goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MergeOutput {
    /// Into the checkpoint itself, journaled.
    InPlace {
        /// Work on checkpoints whose files are links, or that lie in a Hugging Face cache: what else links to them changes too.
        through_links: bool,
    },
    /// A new checkpoint of the same layout; the input is only read.
    New {
        /// Folder, or file where the input is a single file.
        path: PathBuf,
        /// What to do where it exists.
        existing: Existing,
        /// Whether the result remembers how to undo the merge, and its shards' headers name the adapters.
        ledger: bool,
        /// Whether shards that nothing touches are hard-linked instead of copied.
        link: bool,
        /// Whether finished shards stay when the merge is cut short, and are taken over from an earlier one that was.
        resume: bool,
    },
}

/// What the ledger keeps of tensors that a merge changes as a whole. Of the others it always keeps the bytes at the changed positions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum KeptOriginals {
    /// Hashes: undoing needs the base, and proves that it is the base. In place the base must be given then.
    #[default]
    Hashes,
    /// The tensors themselves: as many bytes as they have.
    Whole,
}

/// How the second factor of a stack of experts is to be read; a file does not tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ExpertOrder {
    /// `B` is `[d_out, r, E]`: as PEFT trains and saves it.
    RankFirst,
    /// `B` is `[d_out, E, r]`: as other trainers had it, whose files look the same.
    ExpertFirst,
}

/// What the files leave open, and the user has to say.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterReading {
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
    /// Whether tensors of low-rank adapters that the base has not, or has in another size, are added to a new checkpoint: heads of other
    /// models, embeddings of a larger vocabulary.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub new_tensors: bool,
}

impl AdapterReading {
    /// What the map of weights needs of it.
    pub(super) fn answers(&self) -> Answers {
        Answers { axes: self.axes.clone(), expert_axes: self.expert_axes, renames: self.renames.clone() }
    }
}

/// How to merge, or to take out.
#[derive(Clone, Debug)]
pub struct MergeOptions<'a> {
    /// Where the result goes.
    pub output: MergeOutput,
    /// Check everything, write nothing.
    pub dry_run: bool,
    /// Whether a merge may make finite weights infinite or NaN, which the report counts. Taking adapters out may do it always.
    pub allow_overflow: bool,
    /// Whether a new checkpoint gets the files too that contradict its weights, such as other copies of the old ones and the old model
    /// card.
    pub keep_other_files: bool,
    /// How what the adapters' files leave open is to be read.
    pub reading: AdapterReading,
    /// What is kept of tensors that change as a whole.
    pub keep: KeptOriginals,
    /// The checkpoint that everything was merged into: where the originals are of which hashes alone were kept.
    pub base: Option<PathBuf>,
    /// Who computes where one low-rank product and nothing else is added to weights; the rest is the CPU's.
    pub merger: Merger<'a>,
}

impl MergeOptions<'_> {
    /// Into this output, with nothing else asked for.
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
    /// Into the checkpoint itself.
    pub fn in_place() -> Self {
        Self::to(MergeOutput::InPlace { through_links: false })
    }
}

/// Which adapters to take out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    /// Every active adapter: the base's bytes return.
    All,
    /// These.
    Some(Vec<AdapterId>),
}

/// The scale of an adapter, which must be a number that the arithmetic holds.
pub(super) fn check_scale(input: &MergeInput, scale: f64, is_low_rank: bool) -> Result<f64, MergeError> {
    if scale.is_finite() && (!is_low_rank || (scale as f32).is_finite()) {
        return Ok(scale);
    }
    let path = Printable::path(&input.adapter);
    let what = if is_low_rank { "a number that float32 holds" } else { "a finite number" };
    Err(MergeError::Usage(format!("{path}: scale {scale} is not {what}")))
}
