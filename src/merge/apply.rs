//! `merge` and `unmerge`: from the adapters asked for to a new set of active adapters.

use std::path::{Path, PathBuf};

use super::{
    MergeError, MergeReport,
    change::{Change, Touched},
    examine::Findings,
    in_place, low_rank, new_checkpoint, out_of_place,
    recover::recover,
    report::{entries, kind_reports},
    stack::{Active, Stack},
    state::state_of,
};
use crate::{
    adapter::{Adapter, AdapterError, AdapterId, ColumnsKind},
    checkpoint::{Checkpoint, Context, Existing, Layout, OutputKind, Printable, check_output},
};

/// An adapter to merge.
#[derive(Clone, PartialEq, Debug)]
pub struct MergeInput {
    /// The adapter file.
    pub adapter: PathBuf,
    /// Replaces the scale that the adapter carries.
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
        /// Whether the result remembers how to undo the merge.
        ledger: bool,
        /// Whether shards that no delta touches are hard-linked instead of copied.
        link: bool,
        /// Whether finished shards stay when the merge is cut short, and are taken over from an earlier one that was.
        resume: bool,
    },
}

/// How to merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeOptions {
    /// Where the result goes.
    pub output: MergeOutput,
    /// Check everything, write nothing.
    pub dry_run: bool,
    /// Whether a merge may make finite weights infinite or NaN, which the report counts. Taking adapters out may do it always.
    pub allow_overflow: bool,
}

impl MergeOptions {
    /// A new checkpoint at `path`, which must not exist, with a ledger.
    pub fn new_checkpoint(path: impl Into<PathBuf>) -> Self {
        let output =
            MergeOutput::New { path: path.into(), existing: Existing::Keep, ledger: true, link: false, resume: false };
        Self { output, dry_run: false, allow_overflow: false }
    }
    /// Into the checkpoint itself.
    pub fn in_place() -> Self {
        Self { output: MergeOutput::InPlace { through_links: false }, dry_run: false, allow_overflow: false }
    }
}

/// Adds adapters to a checkpoint, in one pass whatever their number.
///
/// Every weight becomes `round(original + delta_1 * scale_1 + …)` over all active adapters, in ascending order of id, whatever
/// the order they came in. Everything is checked before the first byte is written: all tensors of all adapters match,
/// the base's values at their positions are those they were made from, nothing was changed since the last merge, and, unless
/// [`MergeOptions::allow_overflow`] says otherwise, no finite weight becomes infinite or NaN.
///
/// Memory: a few blocks of rows per thread, within `ctx.max_memory`. Disk: out of place, the checkpoint's size; the ledger
/// takes the bytes of one weight for each touched position, plus copies of the adapters.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use neuroada_ckpt::{checkpoint::Context, merge::{self, MergeInput, MergeOptions}};
/// # let dir = tempfile::tempdir()?;
/// # let out = dir.path().join("merged");
/// let adapter = MergeInput { adapter: "fixtures/tiny-llama-adapter.safetensors".into(), scale: None };
/// let ctx = Context::default();
/// let report = merge::merge(&ctx, "fixtures/tiny-llama".as_ref(), &[adapter], &MergeOptions::new_checkpoint(&out))?;
/// assert_eq!(report.total.n_tensors, 14);
/// let undone = merge::unmerge(&ctx, &out, &merge::Which::All, &MergeOptions::in_place())?;
/// assert!(undone.active.is_empty());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`MergeError`]; nothing on disk has changed.
pub fn merge(
    ctx: &Context<'_>,
    base: &Path,
    adapters: &[MergeInput],
    options: &MergeOptions,
) -> Result<MergeReport, MergeError> {
    if adapters.is_empty() {
        return Err(MergeError::Usage("no adapter to merge".to_owned()));
    }
    let mut added = Vec::new();
    for input in adapters {
        let adapter = open_for(ctx, &input.adapter, base)?;
        let scale = input.scale.unwrap_or(adapter.scale());
        if !scale.is_finite() {
            return Err(MergeError::Usage(format!(
                "{}: scale {scale} is not a finite number",
                Printable::path(&input.adapter)
            )));
        }
        let id = adapter.id(ctx)?;
        if added.iter().any(|other: &Active| other.id == id) {
            let path = Printable::path(&input.adapter);
            return Err(MergeError::Usage(format!("{path}: adapter {} is given twice", id.short())));
        }
        added.push(Active { id, scale, adapter });
    }
    let to_after = |before: &Stack, path: &Path| {
        let mut active = reopen(before);
        for new in &added {
            if active.iter().any(|old| old.id == new.id) {
                return Err(MergeError::AlreadyMerged { path: path.to_owned(), id: new.id });
            }
            active.push(Active { id: new.id, scale: new.scale, adapter: new.adapter.clone() });
        }
        Ok(active)
    };
    apply(ctx, base, options, to_after)
}

/// Which adapters to take out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    /// Every active adapter: the base's bytes return.
    All,
    /// These.
    Some(Vec<AdapterId>),
}

/// Takes adapters out of a checkpoint, exactly, in any order.
///
/// Nothing is subtracted: the ledger holds the original bits, and every touched weight is computed anew from them and the
/// adapters that stay. With [`Which::All`] every byte of the base returns and the ledger goes.
///
/// # Errors
/// [`MergeError`]; nothing on disk has changed.
pub fn unmerge(
    ctx: &Context<'_>,
    path: &Path,
    which: &Which,
    options: &MergeOptions,
) -> Result<MergeReport, MergeError> {
    let to_after = |before: &Stack, path: &Path| {
        let refused = |what: String| MergeError::Refused { path: path.to_owned(), what };
        if before.active.is_empty() {
            return Err(refused("nothing to take out: it has no ledger".to_owned()));
        }
        let mut active = reopen(before);
        match which {
            Which::All => active.clear(),
            Which::Some(ids) => {
                for id in ids {
                    let at = active.iter().position(|active| active.id == *id);
                    let at = at.ok_or_else(|| refused(format!("adapter {} is not merged into it", id.short())))?;
                    active.remove(at);
                }
            }
        }
        Ok(active)
    };
    // What was let in must come out.
    apply(ctx, path, &MergeOptions { allow_overflow: true, ..options.clone() }, to_after)
}

/// The active adapters of a stack once more.
fn reopen(stack: &Stack) -> Vec<Active> {
    let again = |active: &Active| Active { id: active.id, scale: active.scale, adapter: active.adapter.clone() };
    stack.active.iter().map(again).collect()
}

/// Opens an adapter for the checkpoint at `base`, which a packed adapter may derive its columns from.
fn open_for(ctx: &Context<'_>, path: &Path, base: &Path) -> Result<Adapter, MergeError> {
    let adapter = Adapter::open(path)?;
    if adapter.packed_columns() != Some(ColumnsKind::Derived) {
        return Ok(adapter);
    }
    let checkpoint = Checkpoint::open(base)?;
    match Adapter::open_with_base(ctx, path, &checkpoint) {
        Err(AdapterError::WrongBase { .. }) if state_of(&checkpoint)?.remembers()? => {
            let what = "its columns are derived from its base, and this checkpoint holds merges already: unpack it first, \
                        with --base";
            Err(MergeError::Refused { path: path.to_owned(), what: what.to_owned() })
        }
        opened => Ok(opened?),
    }
}

fn apply(
    ctx: &Context<'_>,
    path: &Path,
    options: &MergeOptions,
    to_after: impl Fn(&Stack, &Path) -> Result<Vec<Active>, MergeError>,
) -> Result<MergeReport, MergeError> {
    let in_place = match &options.output {
        MergeOutput::InPlace { through_links } if !options.dry_run => Some(*through_links),
        _ => None,
    };
    let checkpoint = match in_place {
        Some(_) => Checkpoint::open_interrupted(path)?,
        None => Checkpoint::open(path)?,
    };
    if let Some(through_links) = in_place
        && checkpoint.interrupted()?.is_some()
    {
        // Refused where the change itself would be.
        drop(in_place::begin(&checkpoint, through_links)?);
        drop(checkpoint);
        recover(ctx, path)?;
        let mut report = apply(ctx, path, options, to_after)?;
        report.notes.insert(0, "an interrupted change was recovered first".to_owned());
        return Ok(report);
    }
    let state = state_of(&checkpoint)?;
    if low_rank::record_of(&checkpoint)?.is_some() {
        return Err(MergeError::HoldsLowRank { path: path.to_owned() });
    }
    let open_stacks = || {
        let before = Stack::open(ctx, &state)?;
        let mut active = to_after(&before, path)?;
        active.sort_by_key(|active| active.id);
        let after = Stack { active, ledger: None };
        after.targets().map_err(|what| MergeError::Refused { path: path.to_owned(), what })?;
        Ok::<_, MergeError>((before, after))
    };
    match &options.output {
        MergeOutput::InPlace { through_links } if !options.dry_run => {
            let lock = in_place::begin(&checkpoint, *through_links)?;
            // Seen under the lock: another command may have been cut short meanwhile.
            if checkpoint.interrupted()?.is_some() {
                drop(lock);
                return apply(ctx, path, options, to_after);
            }
            let (before, after) = open_stacks()?;
            if *through_links && in_place::break_links(ctx, &checkpoint, &before, &after, options.allow_overflow)? {
                // What is open are the files that others see.
                drop((lock, before, after, checkpoint));
                return apply(ctx, path, options, to_after);
            }
            in_place::apply(ctx, &checkpoint, &state, &before, after, options.allow_overflow)
        }
        MergeOutput::New { path: output, existing, ledger, link, resume } if !options.dry_run => {
            let (before, after) = open_stacks()?;
            let (existing, keep_ledger, link, resume) = (*existing, *ledger, *link, *resume);
            let target = new_checkpoint::Destination { path: output, existing, keep_ledger, link, resume };
            out_of_place::apply(ctx, &checkpoint, &before, after, &target, options.allow_overflow)
        }
        _ => {
            let (before, after) = open_stacks()?;
            dry_run(ctx, &checkpoint, &before, &after, options)
        }
    }
}

/// Checks everything and says what would be written.
fn dry_run(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    before: &Stack,
    after: &Stack,
    options: &MergeOptions,
) -> Result<MergeReport, MergeError> {
    if let MergeOutput::New { path, existing, .. } = &options.output {
        let kind = if checkpoint.layout() == Layout::File { OutputKind::Checkpoint } else { OutputKind::Folder };
        check_output(path, kind, *existing)?;
    }
    let change = Change { checkpoint, before, after };
    let touched = change.touched()?;
    let findings = change.examine(ctx, &touched, None)?;
    judge_all(&change, &findings, options.allow_overflow)?;
    checkpoint.unchanged()?;
    let mut report = report(&change, &touched, &findings);
    report.dry_run = true;
    if let MergeOutput::New { .. } = options.output {
        report.bytes_written = checkpoint.n_bytes();
    }
    Ok(report)
}

/// Fails where what was found forbids the change, or, unless that is allowed, where finite weights would become infinite.
///
/// # Errors
/// Those of [`judge`], and [`MergeError::Overflow`].
pub(super) fn judge_all(change: &Change<'_>, findings: &Findings, allow_overflow: bool) -> Result<(), MergeError> {
    judge(change, findings)?;
    match allow_overflow {
        true => Ok(()),
        false => findings.overflows.refuse(change.checkpoint.root()),
    }
}

/// Fails where what was found says that the adapters or the checkpoint are not what they should be.
///
/// # Errors
/// [`MergeError::Tampered`] or [`MergeError::WrongBase`].
pub(super) fn judge(change: &Change<'_>, findings: &Findings) -> Result<(), MergeError> {
    if findings.n_changed > 0 {
        return Err(MergeError::Tampered {
            path: change.checkpoint.root().to_owned(),
            n_changed: findings.n_changed,
            examples: findings.changed.clone(),
        });
    }
    for (active, anchors) in change.after.active.iter().zip(&findings.anchors) {
        if let Some(tensor) = &anchors.first_mismatch {
            let n_targets = active.adapter.targets().len();
            let made_from = Printable(&active.adapter.base().name).to_string();
            let hint = match anchors.n_matching {
                0 => "",
                _ => ": was it half merged, or trained on since?",
            };
            let what = format!(
                "it was made from {made_from}, this is {}; {} of {n_targets} tensors have its values at its positions{hint}",
                Printable(&change.checkpoint.name()),
                anchors.n_matching,
            );
            return Err(MergeError::WrongBase {
                adapter: active.adapter.path().to_owned(),
                tensor: tensor.clone(),
                what,
            });
        }
    }
    Ok(())
}

/// The report of a change, but for what its output alone knows.
pub(super) fn report(change: &Change<'_>, touched: &[Touched<'_>], findings: &Findings) -> MergeReport {
    let ids = |stack: &Stack| stack.ids();
    let (before, after) = (ids(change.before), ids(change.after));
    let only = |a: &[AdapterId], b: &[AdapterId]| {
        a.iter().filter(|id| !b.contains(id)).map(AdapterId::to_string).collect::<Vec<_>>()
    };
    let (kinds, total) = kind_reports(findings);
    let mut shards: Vec<usize> = touched.iter().map(|target| target.tensor.shard_index).collect();
    shards.sort_unstable();
    shards.dedup();
    let width = |target: &Touched<'_>| target.tensor.info.dtype.bitsize() as u64 / 8;
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
        bytes_checked: touched.iter().map(|target| target.tensor.info.n_bytes()).sum(),
        bytes_written: findings.n_touched * touched.iter().map(width).max().unwrap_or(0),
        ledger_bytes: 0,
        notes: {
            let implausible = findings.implausible.notes(|index| change.after.active[index].id.short());
            change.checkpoint.notes().into_iter().chain(implausible).collect()
        },
    }
}
