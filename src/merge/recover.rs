//! After a crash: back to the old state, or on to the new one where the change was committed.

use std::path::Path;

use serde::Serialize;

use super::{
    MergeError,
    change::{Change, patch},
    in_place,
    journal::Journal,
    ledger::file_digest,
    stack::Stack,
    state::with_own_ledger,
};
use crate::checkpoint::{Checkpoint, CheckpointError, Context, Layout, StateFolder, recover_single_file};

/// What recovery did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
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
/// What to write follows from the ledgers alone, so recovery may itself be interrupted and run again. Where a folder and one of its
/// files were both merged into, each under its own path, two ledgers speak for one file: the adapters that the file's ledger names are taken
/// out, and the checkpoint becomes what the folder's ledger says.
///
/// # Errors
/// [`MergeError::BadLedger`] where journal or ledgers are not what was written, or are missing; nothing on disk has changed.
pub fn recover(ctx: &Context<'_>, path: &Path) -> Result<Recovered, MergeError> {
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
        recovered = recover_locked(ctx, &checkpoint, &state)?;
    }
    if checkpoint.layout() != Layout::File {
        for shard in checkpoint.shards() {
            if StateFolder::at(shard.path(), Layout::File)?.is_interrupted()? {
                recovered = recover(ctx, shard.path())?;
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
pub(super) fn recover_locked(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    state: &StateFolder,
) -> Result<Recovered, MergeError> {
    let journal = Journal::open(state)?;
    let ledger = state.folder().open_file(StateFolder::LEDGER)?;
    let digest = match &ledger {
        Some((file, _)) => {
            let path = state.path().join(StateFolder::LEDGER);
            Some(file_digest(ctx, &path, file)?.to_hex().to_string())
        }
        None => None,
    };
    let before = Stack::open(ctx, state)?;
    if let Some(journal) = &journal
        && digest.as_ref() == Some(&journal.after)
    {
        in_place::finish(state)?;
        state.tidy(&before.copies())?;
        return Ok(Recovered::Finished);
    }
    let bad = |name: &str, what: &str| MergeError::BadLedger { path: state.path().join(name), what: what.to_owned() };
    if journal.as_ref().is_some_and(|journal| digest != journal.before) {
        return Err(bad(StateFolder::TXN, "the journal speaks of another ledger than the one beside it"));
    }
    let after = match (Stack::open_ledger(ctx, state, StateFolder::LEDGER_NEW)?, &journal) {
        (Some(after), _) => after,
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
    let change = Change { checkpoint, before: &before, after: &after };
    let touched = change.touched()?;
    let files = in_place::open_for_writing(ctx, checkpoint, &touched)?;
    patch(ctx, &touched, &files, &after, &before)?;
    in_place::finish(state)?;
    state.tidy(&before.copies())?;
    Ok(Recovered::RolledBack)
}

/// Takes out what files of the checkpoint were merged with under their own paths, and writes what the folder's ledger says.
///
/// Both ledgers hold the base's bits: each adapter's anchor proves them for the positions it touches. May be interrupted and run
/// again, since the files' ledgers go last.
fn keep_one_ledger(ctx: &Context<'_>, checkpoint: &Checkpoint, state: &StateFolder) -> Result<Recovered, MergeError> {
    let _lock = in_place::begin(checkpoint, true)?;
    if state.folder().has(StateFolder::LOW_RANK)? {
        let what = "a low-rank merge and ledgers of single files speak for it; merge again from the base".to_owned();
        return Err(MergeError::Refused { path: checkpoint.root().to_owned(), what });
    }
    let whole = Stack::open(ctx, state)?;
    prove_originals(ctx, checkpoint, &whole)?;
    let mut files = Vec::new();
    for name in with_own_ledger(checkpoint)? {
        let file = Checkpoint::open_interrupted(&checkpoint.root().join(&name))?;
        let own = StateFolder::of(&file)?;
        let stack = Stack::open(ctx, &own)?;
        prove_originals(ctx, &file, &stack)?;
        files.push((file, own, stack));
    }
    let nothing = Stack::default();
    for (file, _, stack) in &files {
        write(ctx, file, stack, &nothing)?;
    }
    write(ctx, checkpoint, &whole, &whole)?;
    for (_, own, _) in &files {
        own.tidy(&[])?;
    }
    Ok(Recovered::OneLedger)
}

/// Fails where the originals of a ledger are not what its adapters were made from: then they are not the base's.
fn prove_originals(ctx: &Context<'_>, checkpoint: &Checkpoint, stack: &Stack) -> Result<(), MergeError> {
    let change = Change { checkpoint, before: stack, after: stack };
    let findings = change.examine(ctx, &change.touched()?, None)?;
    match findings.anchors.iter().find_map(|anchors| anchors.first_mismatch.clone()) {
        None => Ok(()),
        Some(tensor) => {
            let tensor = crate::checkpoint::Printable(&tensor).to_string();
            let what = format!(
                "\"{tensor}\": the originals in its ledger are not the base's: two ledgers cannot be told apart; restore the \
                 weights from the base"
            );
            Err(MergeError::Refused { path: checkpoint.root().to_owned(), what })
        }
    }
}

fn write(ctx: &Context<'_>, checkpoint: &Checkpoint, before: &Stack, after: &Stack) -> Result<(), MergeError> {
    let change = Change { checkpoint, before, after };
    let touched = change.touched()?;
    let files = in_place::open_for_writing(ctx, checkpoint, &touched)?;
    patch(ctx, &touched, &files, before, after)
}
