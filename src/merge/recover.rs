//! After a crash: back to the old state, or on to the new one where the change was committed.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use super::{
    KeptOriginals, MergeError,
    change::{Change, Touched, Work},
    compute::Computer,
    examine::hash_of,
    frame::{Frame, settle, unname_in_index},
    in_place,
    journal::Journal,
    ledger::{Kept, Ledger},
    patch::{lasting_originals, patch},
    stack::{Remembered, Stack},
    state::with_own_ledger,
    verify::open_base,
};
use crate::backend::Merger;
use crate::checkpoint::{Checkpoint, CheckpointError, Context, Layout, Printable, StateFolder, recover_single_file};

/// What recovery did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Recovered {
    /// There was nothing to recover.
    Nothing,
    /// The interrupted change was undone; the checkpoint is as before it.
    RolledBack,
    /// The interrupted change had been committed; its traces were removed.
    Finished,
    /// A folder and files of it had ledgers of their own; what the files' ledgers had merged was taken out.
    OneLedger,
}

/// Finishes or rolls back an interrupted change of a checkpoint.
///
/// What to write follows from the ledgers, and from `base` where the change was made with one and they keep hashes alone, so recovery may
/// itself be interrupted and run again. Where a folder and one of its
/// files were both merged into, each under its own path, two ledgers speak for one file: the adapters that the file's ledger names are taken
/// out, and the checkpoint becomes what the folder's ledger says.
///
/// # Errors
/// [`MergeError::BadLedger`] where journal or ledgers are not what was written, or are missing; [`MergeError::NeedsBase`]; nothing on disk
/// has changed.
pub fn recover(ctx: &Context<'_>, path: &Path, base: Option<&Path>) -> Result<Recovered, MergeError> {
    // The file may be missing, where its first merge was cut short.
    let replaced = recover_single_file(path)?;
    let checkpoint = Checkpoint::open_interrupted(path)?;
    let state = StateFolder::of(&checkpoint)?;
    let mut recovered = match replaced {
        Some(true) => Recovered::Finished,
        Some(false) => Recovered::RolledBack,
        None => Recovered::Nothing,
    };
    if state.is_interrupted()? {
        // Whoever began the change in place had a right to; links do not matter for undoing it.
        let _lock = in_place::begin(&checkpoint, true)?;
        let base = base.map(open_base).transpose()?;
        recovered = recover_locked(ctx, &checkpoint, &state, base.as_ref())?;
    }
    // As it is now: its index may have been written.
    let checkpoint = Checkpoint::open_interrupted(path)?;
    if !state.is_interrupted()?
        && let Some(ledger) = Ledger::open(ctx, &state, StateFolder::LEDGER)?
        && (ledger.document().active.is_empty() || Frame::of(&checkpoint, Some(&ledger)).is_unsettled()?)
    {
        // The change was committed, and what comes after it was cut short.
        let mut lock = in_place::begin(&checkpoint, true)?;
        settle(ctx, &Frame::of(&checkpoint, Some(&ledger)), &state, &mut lock)?;
        let is_empty = ledger.document().active.is_empty();
        drop(ledger);
        if is_empty {
            state.tidy(&[])?;
        }
        if recovered == Recovered::Nothing {
            recovered = Recovered::Finished;
        }
    }
    if checkpoint.layout() != Layout::File {
        for shard in checkpoint.shards() {
            if StateFolder::at(shard.path(), Layout::File)?.is_interrupted()? {
                recovered = recover(ctx, shard.path(), base)?;
            }
        }
        if state.remembers()? && !with_own_ledger(&checkpoint)?.is_empty() {
            recovered = keep_one_ledger(ctx, &checkpoint, &state)?;
        }
    }
    match checkpoint.interrupted()? {
        Some(path) => Err(CheckpointError::Interrupted { path }.into()),
        None => Ok(recovered),
    }
}

/// The same for a caller who holds the lock.
fn recover_locked(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    state: &StateFolder,
    base: Option<&Checkpoint>,
) -> Result<Recovered, MergeError> {
    let journal = Journal::open(state)?;
    let before = Remembered::open(ctx, state)?;
    let digest = before.ledger.as_ref().map(|ledger| ledger.digest().to_hex().to_string());
    if let Some(journal) = &journal
        && digest.as_ref() == Some(&journal.after)
    {
        in_place::finish(state)?;
        let copies: Vec<String> = before.sources.iter().map(super::source::Source::copy_name).collect();
        state.tidy(&copies)?;
        return Ok(Recovered::Finished);
    }
    let bad = |name: &str, what: &str| MergeError::BadLedger { path: state.path().join(name), what: what.to_owned() };
    if journal.as_ref().is_some_and(|journal| digest != journal.before) {
        return Err(bad(StateFolder::TXN, "the journal speaks of another ledger than the one beside it"));
    }
    let after = match (Ledger::open(ctx, state, StateFolder::LEDGER_NEW)?, &journal) {
        (Some(after), _) => Remembered::of_ledger(ctx, state, after)?,
        // The originals of the interrupted change were in it.
        (None, Some(_)) => {
            let what = "is missing: a change was interrupted, and without the originals in it the weights cannot be put back; \
                        nothing was deleted. Restore it from a backup, or the weights from the base";
            return Err(bad(StateFolder::LEDGER_NEW, what));
        }
        (None, None) => return Ok(Recovered::Nothing),
    };
    let is_same = |journal: &Journal| {
        after.ledger.as_ref().is_some_and(|ledger| ledger.digest().to_hex().as_str() == journal.after)
    };
    if !journal.as_ref().is_none_or(is_same) {
        return Err(bad(StateFolder::TXN, "the journal speaks of another new ledger than the one beside it"));
    }
    // Without a journal the weights should be the old ones. Writing those again costs little, and heals what a journal that was
    // taken away would have told of.
    let (before, after) = (Stack::of(&before, checkpoint, base)?, Stack::of(&after, checkpoint, base)?);
    let computer = Computer::new(Merger::cpu());
    let back = Change {
        checkpoint,
        before: &after,
        after: &before,
        base,
        keep: KeptOriginals::default(),
        computer: &computer,
    };
    let touched = back.touched()?;
    prove_wholes(ctx, &back, &touched)?;
    let files = in_place::open_for_writing(ctx, checkpoint, &touched)?;
    patch(ctx, &back, &touched, &files)?;
    unname_in_index(checkpoint, &before, &after)?;
    in_place::finish(state)?;
    state.tidy(&before.copies())?;
    Ok(Recovered::RolledBack)
}

/// Fails where an original that whole tensors are written from is not what was merged into.
fn prove_wholes(ctx: &Context<'_>, change: &Change<'_>, touched: &[Touched<'_>]) -> Result<(), MergeError> {
    for touched in touched.iter().filter(|touched| matches!(touched.work, Work::Rows { .. })) {
        let name = touched.name();
        let kept = [change.after, change.before].into_iter().find_map(|stack| stack.kept(name)?.hashes());
        let original = lasting_originals(change, touched)?;
        if let Some(hashes) = kept
            && hash_of(ctx, change, touched, original)? != hashes.base
        {
            let tensor = Printable(name).to_string();
            let what = format!("\"{tensor}\": not the original that was merged into");
            return Err(MergeError::Refused { path: original.shard.path().to_owned(), what });
        }
    }
    Ok(())
}

/// Takes out what files of the checkpoint were merged with under their own paths, and writes what the folder's ledger says.
///
/// Both ledgers hold the base's bits: each adapter's anchor proves them for the positions it touches. May be interrupted and run
/// again, since the files' ledgers go last.
fn keep_one_ledger(ctx: &Context<'_>, checkpoint: &Checkpoint, state: &StateFolder) -> Result<Recovered, MergeError> {
    let _lock = in_place::begin(checkpoint, true)?;
    let whole = Remembered::open(ctx, state)?;
    let mut files = Vec::new();
    for name in with_own_ledger(checkpoint)? {
        let file = Checkpoint::open_interrupted(&checkpoint.root().join(&name))?;
        let own = StateFolder::of(&file)?;
        let remembered = Remembered::open(ctx, &own)?;
        files.push((file, own, remembered));
    }
    let any_whole = |remembered: &Remembered| {
        let kept = remembered.ledger.iter().flat_map(|ledger| ledger.document().targets.values());
        kept.into_iter().any(|target| !matches!(target.kept, Kept::Positions(_)))
    };
    if any_whole(&whole) || files.iter().any(|(.., remembered)| any_whole(remembered)) {
        let what = "ledgers of single files speak for it beside its own, and some of them are of whole tensors; merge again from the \
                    base"
            .to_owned();
        return Err(MergeError::Refused { path: checkpoint.root().to_owned(), what });
    }
    let whole = Stack::of(&whole, checkpoint, None)?;
    prove_originals(ctx, checkpoint, &whole)?;
    for (file, _, remembered) in &files {
        prove_originals(ctx, file, &Stack::of(remembered, file, None)?)?;
    }
    let nothing = Stack::default();
    for (file, _, remembered) in &files {
        write(ctx, file, &Stack::of(remembered, file, None)?, &nothing)?;
    }
    write(ctx, checkpoint, &whole, &whole)?;
    for (_, own, _) in &files {
        own.tidy(&[])?;
    }
    Ok(Recovered::OneLedger)
}

/// Fails where the originals of a ledger are not what its adapters were made from: then they are not the base's.
fn prove_originals(ctx: &Context<'_>, checkpoint: &Checkpoint, stack: &Stack<'_>) -> Result<(), MergeError> {
    let computer = Computer::new(Merger::cpu());
    let change = still(checkpoint, stack, stack, &computer);
    let findings = change.examine(ctx, &change.touched()?, &BTreeMap::new(), None)?;
    match findings.anchors.values().find_map(|anchors| anchors.first_mismatch.clone()) {
        None => Ok(()),
        Some(tensor) => {
            let tensor = Printable(&tensor).to_string();
            let what = format!(
                "\"{tensor}\": the originals in its ledger are not the base's: two ledgers cannot be told apart; restore the \
                 weights from the base"
            );
            Err(MergeError::Refused { path: checkpoint.root().to_owned(), what })
        }
    }
}

fn still<'a>(
    checkpoint: &'a Checkpoint,
    before: &'a Stack<'a>,
    after: &'a Stack<'a>,
    computer: &'a Computer<'a>,
) -> Change<'a> {
    Change { checkpoint, before, after, base: None, keep: KeptOriginals::default(), computer }
}

fn write(ctx: &Context<'_>, checkpoint: &Checkpoint, before: &Stack<'_>, after: &Stack<'_>) -> Result<(), MergeError> {
    let computer = Computer::new(Merger::cpu());
    let change = still(checkpoint, before, after, &computer);
    let touched = change.touched()?;
    let files = in_place::open_for_writing(ctx, checkpoint, &touched)?;
    patch(ctx, &change, &touched, &files)
}
