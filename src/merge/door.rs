//! `merge` and `unmerge`: from the adapters asked for to a new set of active adapters.

use std::path::Path;

use super::{
    AdapterReading, MergeError, MergeInput, MergeOptions, MergeOutput, MergeReport, Which,
    added::{self, Texts},
    card::{CARD_NAME, OldCard},
    change::{AllBeneath, Change, Touched},
    compute::Computer,
    frame::Frame,
    in_place,
    ledger::LedgerDocument,
    mark::refuse_merged,
    new_checkpoint::Destination,
    out_of_place,
    plan::{AddedTensors, MergePlan, Targets, plan, same_bytes},
    recover::recover,
    report::report,
    source::Source,
    stack::{Remembered, Stack},
    state::state_of,
    verify::open_base,
};
use crate::{
    adapter::AdapterId,
    checkpoint::{Checkpoint, Context, Layout, OutputKind, Shard, TensorInfo, TensorRef, check_output},
    weights::WeightMap,
};

/// Adds adapters to a checkpoint, of any kind and in any mixture, in one pass whatever their number.
///
/// Every weight becomes `round(original + delta_1 * scale_1 + …)` over all active adapters, in ascending order of id, whatever
/// the order they came in; what low-rank adapters add is their product, computed in float32. Everything is checked before the first byte
/// is written: all tensors of all adapters match, the base's values at the positions of sparse adapters are those they were made from,
/// nothing was changed since the last merge, and, unless [`MergeOptions::allow_overflow`] says otherwise, no finite weight becomes
/// infinite or NaN. Out of place one tensor of each kind in each shard is looked at before anything is copied, and the others on the way.
///
/// Memory: a few blocks of rows per thread, within `ctx.max_memory`. Disk: out of place, the checkpoint's size; the ledger
/// takes the bytes of one weight for each position that sparse adapters touch, with [`super::KeptOriginals::Whole`] the tensors that
/// others touch, plus copies of the adapters.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use neuroada_ckpt::{Context, MergeInput, MergeOptions, Which, merge, unmerge};
/// # let dir = tempfile::tempdir()?;
/// # let out = dir.path().join("merged");
/// let adapter = MergeInput { adapter: "fixtures/tiny-llama-adapter.safetensors".into(), scale: None };
/// let ctx = Context::default();
/// let report = merge(&ctx, "fixtures/tiny-llama".as_ref(), &[adapter], &MergeOptions::new_checkpoint(&out))?;
/// assert_eq!(report.total.n_tensors, 14);
/// let undone = unmerge(&ctx, &out, &Which::All, &MergeOptions::in_place())?;
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
    options: &MergeOptions<'_>,
) -> Result<MergeReport, MergeError> {
    if adapters.is_empty() {
        return Err(MergeError::Usage("no adapter to merge".to_owned()));
    }
    apply(ctx, base, options, &Step::Add(adapters))
}

/// Takes adapters out of a checkpoint, exactly, in any order.
///
/// Nothing is subtracted: every touched weight is computed anew from its original and the adapters that stay. The ledger holds the
/// originals; where it holds hashes alone, [`MergeOptions::base`] says where they are, and they are proven to be the originals. With
/// [`Which::All`] every byte of the base returns and the ledger goes.
///
/// # Errors
/// [`MergeError`]; nothing on disk has changed.
pub fn unmerge(
    ctx: &Context<'_>,
    path: &Path,
    which: &Which,
    options: &MergeOptions<'_>,
) -> Result<MergeReport, MergeError> {
    // What was let in must come out.
    apply(ctx, path, &MergeOptions { allow_overflow: true, ..options.clone() }, &Step::Remove(which))
}

/// What is asked for.
enum Step<'a> {
    Add(&'a [MergeInput]),
    Remove(&'a Which),
}

impl Step<'_> {
    /// The adapters that go.
    fn removed(&self, remembered: &Remembered, path: &Path) -> Result<Vec<AdapterId>, MergeError> {
        let Self::Remove(which) = self else { return Ok(Vec::new()) };
        let refused = |what: String| MergeError::Refused { path: path.to_owned(), what };
        if remembered.sources.is_empty() {
            return Err(refused("nothing to take out: it has no ledger".to_owned()));
        }
        let Which::Some(ids) = which else { return Ok(remembered.sources.iter().map(|source| source.id).collect()) };
        let absent = |id: &&AdapterId| !remembered.sources.iter().any(|source| source.id == **id);
        match ids.iter().find(absent) {
            Some(id) => Err(refused(format!("adapter {} is not merged into it", id.short()))),
            None => Ok(ids.clone()),
        }
    }

    /// The adapters that come.
    fn added(
        &self,
        ctx: &Context<'_>,
        remembered: &Remembered,
        beneath: &Change<'_>,
        map: &WeightMap<'_>,
    ) -> Result<Vec<Source>, MergeError> {
        let Self::Add(inputs) = self else { return Ok(Vec::new()) };
        let added = Source::open_all(ctx, inputs, map, &AllBeneath(beneath))?;
        let is_there = |new: &&Source| remembered.sources.iter().any(|old| old.id == new.id);
        match added.iter().find(is_there) {
            Some(new) => Err(MergeError::AlreadyMerged { path: map.checkpoint().root().to_owned(), id: new.id }),
            None => Ok(added),
        }
    }
}

fn apply(
    ctx: &Context<'_>,
    path: &Path,
    options: &MergeOptions<'_>,
    step: &Step<'_>,
) -> Result<MergeReport, MergeError> {
    let in_place = match &options.output {
        MergeOutput::InPlace { through_links } if !options.dry_run => Some(*through_links),
        _ => None,
    };
    let checkpoint = match in_place {
        Some(_) => Checkpoint::open_interrupted(path)?,
        None => Checkpoint::open(path)?,
    };
    let mut lock = None;
    if let Some(through_links) = in_place {
        // Refused where the change itself would be; seen under the lock, another command may have been cut short meanwhile.
        let held = in_place::begin(&checkpoint, through_links)?;
        if checkpoint.interrupted()?.is_some() {
            drop((held, checkpoint));
            recover(ctx, path, options.base.as_deref())?;
            let mut report = apply(ctx, path, options, step)?;
            report.notes.insert(0, "an interrupted change was recovered first".to_owned());
            return Ok(report);
        }
        lock = Some(held);
    }
    let state = state_of(&checkpoint)?;
    let base = options.base.as_deref().map(open_base).transpose()?;
    let remembered = Remembered::open(ctx, &state)?;
    let removed = step.removed(&remembered, path)?;
    let before = Stack::of(&remembered, &checkpoint, base.as_ref())?;
    let computer = Computer::new(options.merger);
    let beneath = Change {
        checkpoint: &checkpoint,
        before: &before,
        after: &before,
        base: base.as_ref(),
        keep: options.keep,
        computer: &computer,
    };
    // Only what is new is placed.
    let map = match step {
        Step::Add(_) => Some(WeightMap::new(&checkpoint, options.reading.answers())?),
        Step::Remove(_) => None,
    };
    let mut added = Vec::new();
    let mut new = MergePlan { targets: Targets::new(), added: AddedTensors::new(), notes: Vec::new() };
    if let Some(map) = &map {
        added = step.added(ctx, &remembered, &beneath, map)?;
        let frame = Frame::of(&checkpoint, remembered.ledger.as_ref());
        refuse_merged(&checkpoint, |file| frame.is_own(file), &added)?;
        new = places(ctx, &added, &beneath, map, &options.reading)?;
    }
    let after = before.changed(&checkpoint, &removed, added.iter(), (new.targets, new.added))?;
    let change = Change { after: &after, ..beneath };
    // Seen before the work: nothing may fail when it is done.
    let mut left_out = Vec::new();
    let is_new = matches!(options.output, MergeOutput::New { .. });
    let is_listed = !is_new || (options.dry_run && !options.keep_other_files);
    if is_listed && checkpoint.layout() != Layout::File {
        left_out = checkpoint.side_files_left_out()?;
        let is_own_card = OldCard::of(&checkpoint, &state)?.is_own;
        // That one is brought up to date.
        left_out.retain(|file| !is_own_card || file.path != CARD_NAME);
    }
    let mut report = match &options.output {
        _ if options.dry_run => dry_run(ctx, &change, options)?,
        MergeOutput::InPlace { through_links } => {
            if *through_links && in_place::break_links(ctx, &change, options.allow_overflow)? {
                // What is open are the files that others see.
                drop((before, after, lock));
                return apply(ctx, path, options, step);
            }
            in_place::refuse_itself(&change)?;
            let lock = lock.as_mut().expect("work in place holds the lock");
            in_place::apply(ctx, &change, (&state, lock), document(&change), options.allow_overflow)?
        }
        MergeOutput::New { path: output, existing, ledger, link, resume } => {
            let (existing, keep_ledger, link, resume) = (*existing, *ledger, *link, *resume);
            let target = Destination {
                path: output,
                existing,
                keep_ledger,
                link,
                resume,
                keep_other_files: options.keep_other_files,
            };
            let asked = format!("{:?} {:?}\n", options.keep, options.reading);
            let document = document(&change);
            out_of_place::apply(ctx, &change, document, &target, options.allow_overflow, &asked)?
        }
    };
    if is_listed {
        report.left_out = left_out;
    }
    let of_sources = added.iter().flat_map(|source| source.notes.iter().cloned());
    report.notes.splice(0..0, checkpoint.notes().into_iter().chain(of_sources).chain(new.notes));
    Ok(report)
}

/// Finds the places of new adapters; `beneath` is a change of nothing, which knows the originals.
fn places<'a>(
    ctx: &Context<'_>,
    added: &'a [Source],
    beneath: &Change<'_>,
    map: &WeightMap<'a>,
    reading: &AdapterReading,
) -> Result<MergePlan<'a>, MergeError> {
    let names: Vec<String> = added.iter().flat_map(Source::parameters).collect();
    map.check_renames(names.iter().map(String::as_str)).map_err(MergeError::Usage)?;
    map.check_axes(names.iter().map(String::as_str)).map_err(MergeError::Usage)?;
    let is_original = |tensor: TensorRef<'a>, (shard, info): (&Shard, &TensorInfo)| {
        if !tensor.info.is_like(info) {
            return Ok(false);
        }
        let Some(touched) = beneath.touched_named(&tensor.info.name)? else {
            return same_bytes((tensor.shard, tensor.info), (shard, info));
        };
        beneath.needs_original(&touched)?;
        for rows in beneath.blocks(ctx, &touched) {
            ctx.check()?;
            let original = beneath.original_rows(ctx, &touched, &rows)?;
            let mut other = vec![0; original.len()];
            shard.read_at(&mut other, shard.file_range(info).start + rows.start * touched.row_bytes())?;
            if original != other {
                return Ok(false);
            }
        }
        Ok(true)
    };
    plan(map, added.iter(), reading, &is_original)
}

/// The document of the ledger after a change, without adapters and targets.
fn document(change: &Change<'_>) -> LedgerDocument {
    let remembered = change.before.ledger.map(|ledger| ledger.document().base.as_str()).unwrap_or_default();
    let base = match (remembered, change.base) {
        ("", Some(base)) => base.name(),
        ("", None) => change.checkpoint.name(),
        (remembered, _) => remembered.to_owned(),
    };
    LedgerDocument::new(base, Vec::new(), AdapterReading::default())
}

/// Checks everything and says what would be written.
fn dry_run(ctx: &Context<'_>, change: &Change<'_>, options: &MergeOptions<'_>) -> Result<MergeReport, MergeError> {
    let checkpoint = change.checkpoint;
    if let MergeOutput::New { path, existing, .. } = &options.output {
        let kind = if checkpoint.layout() == Layout::File { OutputKind::Checkpoint } else { OutputKind::Folder };
        check_output(path, kind, *existing)?;
    }
    let touched: Vec<Touched<'_>> = change.touched()?;
    if let MergeOutput::InPlace { .. } = options.output {
        in_place::check_kept(change, &touched)?;
        added::refuse_in_place(change)?;
    }
    added::check(ctx, change)?;
    let bounds = change.bounds_if(ctx, &touched, options.allow_overflow)?;
    let findings = change.examine(ctx, &touched, &bounds, None)?;
    findings.judge(change, options.allow_overflow)?;
    change.unchanged()?;
    let mut report = report(change, &touched, &findings);
    report.dry_run = true;
    report.notes.extend(Texts::of(change)?.notes);
    if let MergeOutput::New { ledger, .. } = options.output {
        report.bytes_written = out_of_place::new_bytes(change, ledger)?;
    }
    let is_kept = !matches!(options.output, MergeOutput::New { ledger: false, .. });
    if is_kept && !change.after.active.is_empty() {
        report.ledger_bytes = change.kept_bytes(&touched);
        report.needs_base = change.needs_base(&touched);
    }
    Ok(report)
}
