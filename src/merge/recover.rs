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
    state::StateFolder,
};
use crate::checkpoint::{Checkpoint, Context};

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
}

/// Finishes or rolls back an interrupted change of a checkpoint.
///
/// What to write follows from the ledgers alone, so recovery may itself be interrupted and run again.
///
/// # Errors
/// [`MergeError::BadLedger`] where journal or ledgers are not what was written; nothing on disk has changed.
pub fn recover(ctx: &Context<'_>, path: &Path) -> Result<Recovered, MergeError> {
    let checkpoint = Checkpoint::open(path)?;
    let state = StateFolder::of(&checkpoint)?;
    if !state.is_interrupted() {
        return Ok(Recovered::Nothing);
    }
    // Whoever began the change in place had a right to; links do not matter for undoing it.
    let _lock = in_place::begin(&checkpoint, true)?;
    recover_locked(ctx, &checkpoint, &state)
}

/// The same for a caller who holds the lock.
pub(super) fn recover_locked(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    state: &StateFolder,
) -> Result<Recovered, MergeError> {
    let Some(journal) = Journal::open(&state.txn())? else { return Ok(Recovered::Nothing) };
    let ledger = state.ledger();
    let digest = match ledger.symlink_metadata() {
        Ok(_) => Some(file_digest(ctx, &ledger)?.to_hex().to_string()),
        Err(_) => None,
    };
    let before = Stack::open(ctx, state)?;
    if digest.as_ref() == Some(&journal.after) {
        in_place::finish(state)?;
        state.tidy(&before.ids())?;
        return Ok(Recovered::Finished);
    }
    let bad = |what: &str| MergeError::BadLedger { path: state.txn(), what: what.to_owned() };
    if digest != journal.before {
        return Err(bad("the journal speaks of another ledger than the one beside it"));
    }
    if state.ledger_new().symlink_metadata().is_err() {
        // It is removed only after the old weights are back and synced: the journal outlived the roll-back it asked for.
        in_place::finish(state)?;
        state.tidy(&before.ids())?;
        return Ok(Recovered::RolledBack);
    }
    let after = Stack::open_ledger(ctx, state, &state.ledger_new())?;
    match &after.ledger {
        Some(ledger) if ledger.digest().to_hex().as_str() == journal.after => {}
        _ => return Err(bad("the journal speaks of another new ledger than the one beside it")),
    }
    let change = Change { checkpoint, before: &before, after: &after };
    let touched = change.touched()?;
    let files = in_place::open_for_writing(ctx, checkpoint, &touched)?;
    patch(ctx, &touched, &files, &after, &before)?;
    in_place::finish(state)?;
    state.tidy(&before.ids())?;
    Ok(Recovered::RolledBack)
}
