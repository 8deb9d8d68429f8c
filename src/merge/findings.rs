//! What looking at a checkpoint found, and what may be done about it.

use std::collections::BTreeMap;

use super::{
    MergeError,
    change::Change,
    plausible::{Implausible, Overflows},
};
use crate::{adapter::AdapterId, backend::PatchCounts, checkpoint::Printable};

/// Changed weights that are listed one by one.
pub(super) const MAX_EXAMPLES: usize = 20;

/// What examining a change found.
#[derive(Default)]
pub(super) struct Findings {
    /// Per tensor that `after` touches, by name; without those that stay as they are.
    pub(super) counts: BTreeMap<String, PatchCounts>,
    /// Elements touched before or after.
    pub(super) n_touched: u64,
    /// Bytes that writing the change in place writes.
    pub(super) n_patched_bytes: u64,
    /// Single elements that are not what `before` left there.
    pub(super) n_changed: u64,
    /// Whole tensors that are not what `before` left there.
    pub(super) n_changed_tensors: u64,
    /// The first of both.
    pub(super) changed: Vec<String>,
    /// Tensors whose originals are not those that were merged into, and whose they are.
    pub(super) wrong_originals: Vec<(String, WrongOriginal)>,
    /// Per adapter of `after`: how many of its targets' anchors match, and the first that does not.
    pub(super) anchors: BTreeMap<AdapterId, Anchors>,
    /// Weights that are finite before the change and not after it.
    pub(super) overflows: Overflows,
    /// Per adapter of `after` that `before` does not have: deltas of no plausible size.
    pub(super) implausible: Implausible,
}

/// Whose originals are wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WrongOriginal {
    Ledger,
    Base,
}

/// How an adapter's anchors compare with the originals.
#[derive(Clone, Default)]
pub(super) struct Anchors {
    pub(super) n_matching: usize,
    pub(super) first_mismatch: Option<String>,
}

impl Findings {
    /// Fails where what was found forbids the change, or, unless that is allowed, where finite weights would become infinite.
    ///
    /// # Errors
    /// Those of [`Self::judge_inputs`], and [`MergeError::Overflow`].
    pub(super) fn judge(&self, change: &Change<'_>, allow_overflow: bool) -> Result<(), MergeError> {
        self.judge_inputs(change)?;
        match allow_overflow {
            true => Ok(()),
            false => self.overflows.refuse(change.checkpoint.root()),
        }
    }

    /// Fails where what was found says that the adapters, the checkpoint, its ledger or its base are not what they should be.
    ///
    /// # Errors
    /// [`MergeError::Tampered`], [`MergeError::WrongBase`], [`MergeError::BadLedger`] or [`MergeError::Refused`].
    pub(super) fn judge_inputs(&self, change: &Change<'_>) -> Result<(), MergeError> {
        if let Some((tensor, whose)) = self.wrong_originals.first() {
            let tensor = Printable(tensor);
            return Err(match (whose, change.base, change.before.ledger) {
                (WrongOriginal::Base, Some(base), _) => MergeError::Refused {
                    path: base.root().to_owned(),
                    what: format!("\"{tensor}\": its values differ from those of the merge's base"),
                },
                (_, _, Some(ledger)) => MergeError::BadLedger {
                    path: ledger.path().to_owned(),
                    what: format!(
                        "tensor \"{tensor}\": the ledger is damaged: the whole tensor does not match its checksum"
                    ),
                },
                _ => unreachable!("originals are in a base or in a ledger"),
            });
        }
        if self.n_changed + self.n_changed_tensors > 0 {
            return Err(MergeError::Tampered {
                path: change.checkpoint.root().to_owned(),
                n_changed: self.n_changed,
                n_tensors: self.n_changed_tensors,
                examples: self.changed.clone(),
            });
        }
        for source in &change.after.active {
            let Some(anchors) = self.anchors.get(&source.id) else { continue };
            let (Some(tensor), Some(adapter)) = (&anchors.first_mismatch, source.sparse()) else { continue };
            let n_targets = adapter.targets().len();
            let made_from = Printable(&adapter.base().name).to_string();
            let hint = match anchors.n_matching {
                0 => "",
                _ => ": was it half merged, or trained on since?",
            };
            let what = format!(
                "it was made from {made_from}, this is {}; {} of {n_targets} tensors have its values at its positions{hint}",
                Printable(&change.checkpoint.name()),
                anchors.n_matching,
            );
            return Err(MergeError::WrongBase { adapter: adapter.path().to_owned(), tensor: tensor.clone(), what });
        }
        Ok(())
    }
}
