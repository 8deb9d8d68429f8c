//! Reports of merges. Field names are stable. Reports do not depend on threads, time or paths.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    added,
    change::{Change, Touched, Work},
    findings::Findings,
    source::AdapterEntry,
    stack::Stack,
};
use crate::{adapter::AdapterId, backend::PatchCounts, checkpoint::LeftOut, tensor::projection_kind};

/// Deltas on one kind of projection.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct KindReport {
    /// Such as `q_proj`.
    pub kind: String,
    /// Tensors touched.
    pub n_tensors: u64,
    /// Positions touched.
    pub n_touched: u64,
    /// Positions where the deltas are not all zero.
    pub n_nonzero: u64,
    /// Of those, positions whose weight kept its bits because rounding absorbed the delta.
    pub n_absorbed: u64,
    /// `n_absorbed / n_nonzero`, or 0.
    pub absorbed_share: f64,
    /// Positions whose weight changed.
    pub n_changed: u64,
    /// Positions where a finite weight became infinite or NaN.
    pub n_overflowed: u64,
}

/// The result of a merge or unmerge, or of a dry run.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct MergeReport {
    /// The checkpoint's name.
    pub base: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// Ids of the adapters that were added.
    pub added: Vec<String>,
    /// Ids of the adapters that were removed.
    pub removed: Vec<String>,
    /// Adapters in the checkpoint afterwards, by id.
    pub active: Vec<AdapterEntry>,
    /// Per kind of projection, over all active adapters.
    pub kinds: Vec<KindReport>,
    /// All kinds together.
    pub total: KindReport,
    /// Number of tensors of the adapters; all of them match the base.
    pub n_matched: usize,
    /// Shards of the checkpoint.
    pub n_shards: usize,
    /// Of those, shards that were patched.
    pub n_shards_patched: usize,
    /// Tensors of adapters that the base lacks or has in another size, one line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub new_tensors: Vec<String>,
    /// Bytes read from touched tensors while checking.
    pub bytes_checked: u64,
    /// Bytes of the output's files; in place, bytes of the weights written.
    pub bytes_written: u64,
    /// Bytes of the ledger without the copies of adapters; 0 if there is no ledger.
    pub ledger_bytes: u64,
    /// Whether unmerging needs the base, because the ledger keeps only hashes of tensors that changed as a whole.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub needs_base: bool,
    /// Files that contradict the new weights, such as other copies of the old weights. A new checkpoint does not get them; in place they
    /// stay.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// Decisions and warnings: tensors found under other names, tied heads, shards that `resume` could not reuse. Warnings, such as
    /// deltas of implausible size, begin with `warning:`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The report of one kind of projection.
fn kind_report(kind: &str, n_tensors: u64, counts: PatchCounts) -> KindReport {
    let share = if counts.nonzero == 0 { 0.0 } else { counts.absorbed as f64 / counts.nonzero as f64 };
    KindReport {
        kind: kind.to_owned(),
        n_tensors,
        n_touched: counts.touched,
        n_nonzero: counts.nonzero,
        n_absorbed: counts.absorbed,
        absorbed_share: share,
        n_changed: counts.changed,
        n_overflowed: counts.overflowed,
    }
}

/// The reports per kind of projection, and their total.
fn kind_reports(by_tensor: &BTreeMap<String, PatchCounts>) -> (Vec<KindReport>, KindReport) {
    let mut kinds: BTreeMap<&str, (u64, PatchCounts)> = BTreeMap::new();
    let mut total = PatchCounts::default();
    for (name, counts) in by_tensor {
        let (n_tensors, kind) = kinds.entry(projection_kind(name)).or_default();
        *n_tensors += 1;
        kind.add(*counts);
        total.add(*counts);
    }
    let total = kind_report("total", by_tensor.len() as u64, total);
    (kinds.into_iter().map(|(kind, (n, counts))| kind_report(kind, n, counts)).collect(), total)
}

/// The adapters of a stack.
pub(super) fn entries(stack: &Stack<'_>) -> Vec<AdapterEntry> {
    stack.active.iter().zip(stack.n_tensors()).map(|(source, n_tensors)| source.entry(n_tensors)).collect()
}

/// The report of a change, without the fields that only its output knows.
pub(super) fn report(change: &Change<'_>, touched: &[Touched<'_>], findings: &Findings) -> MergeReport {
    let (before, after) = (change.before.ids(), change.after.ids());
    let only = |a: &[AdapterId], b: &[AdapterId]| {
        a.iter().filter(|id| !b.contains(id)).map(AdapterId::to_string).collect::<Vec<_>>()
    };
    let (kinds, total) = kind_reports(&findings.counts);
    let is_written = |target: &&Touched<'_>| !matches!(target.work, Work::Nothing { .. });
    let mut shards: Vec<usize> = touched.iter().filter(is_written).map(|target| target.tensor.shard_index).collect();
    shards.sort_unstable();
    shards.dedup();
    let mut notes = findings.implausible.notes(|index| change.after.active[index].id.short());
    let n_left = touched.len() - touched.iter().filter(is_written).count();
    if n_left > 0 {
        notes.insert(0, format!("{n_left} tensors that other adapters changed stay as they are"));
    }
    MergeReport {
        base: change.checkpoint.name(),
        dry_run: false,
        added: only(&after, &before),
        removed: only(&before, &after),
        active: entries(change.after),
        kinds,
        total,
        n_matched: touched.len(),
        n_shards: change.checkpoint.shards().len(),
        n_shards_patched: shards.len(),
        new_tensors: added::lines(change),
        bytes_checked: touched.iter().map(|target| target.tensor.info.n_bytes()).sum(),
        bytes_written: findings.n_patched_bytes,
        ledger_bytes: 0,
        needs_base: false,
        left_out: Vec::new(),
        notes,
    }
}
