//! Changes to a checkpoint's own files, journaled.
//!
//! The protocol, each step durable before the next:
//!
//! 1. lock; check everything; write `adapters/ID.safetensors` and `ledger.new`
//! 2. write `txn`: from here on a crash needs recovery
//! 3. patch the shards, sync them
//! 4. rename `ledger.new` to `ledger`: the commit
//! 5. remove `txn`, then what no ledger needs
//!
//! A crash before 2 changed no weight. A crash between 2 and 4 leaves weights of both states; both ledgers and all
//! adapters are on disk, so recovery writes the old state. A crash after 4 leaves the new state, all of it on disk. `ledger.new` goes
//! after `txn`, and durably so: `txn` without it means that somebody else took it away.

use super::{
    MergeError, MergeReport,
    apply::{judge_all, report},
    change::{Change, Touched, patch},
    journal::Journal,
    ledger::{Ledger, LedgerWriter},
    stack::{Stack, copy_name},
};
use crate::checkpoint::{
    Checkpoint, CheckpointError, CheckpointLock, Context, EntryKind, Patcher, Shard, Silent, StateFolder,
    check_free_space, folder_of, in_place_hazards, probe, unshare,
};

/// Locks a checkpoint for work in place.
///
/// # Errors
/// Refused where another command holds the lock, or, without `through_links`, where other paths lead to the same bytes.
pub(super) fn begin(checkpoint: &Checkpoint, through_links: bool) -> Result<CheckpointLock, MergeError> {
    let hazards = in_place_hazards(checkpoint)?;
    if !through_links && !hazards.is_empty() {
        return Err(MergeError::Linked { path: checkpoint.root().to_owned(), hazards });
    }
    Ok(CheckpointLock::acquire(checkpoint)?)
}

/// Gives every touched shard that other paths lead to a file of its own, when everything was checked; says whether there was one. The
/// checkpoint must be opened anew then.
pub(super) fn break_links(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    before: &Stack,
    after: &Stack,
    allow_overflow: bool,
) -> Result<bool, MergeError> {
    let change = Change { checkpoint, before, after };
    let touched = change.touched()?;
    let mut shared: Vec<&Shard> = Vec::new();
    for (_, shard) in touched_shards(checkpoint, &touched) {
        if probe::entry_kind(shard.path())? == Some(EntryKind::Link) || shard.n_names()? > 1 {
            shared.push(shard);
        }
    }
    if shared.is_empty() {
        return Ok(false);
    }
    let findings = change.examine(ctx, &touched, None)?;
    judge_all(&change, &findings, allow_overflow)?;
    let n_bytes = shared.iter().map(|shard| shard.file_bytes()).sum();
    check_free_space(folder_of(shared[0].path()), n_bytes)?;
    ctx.observer.begin("copying shared files", n_bytes);
    shared.iter().try_for_each(|shard| unshare(ctx, shard))?;
    Ok(true)
}

/// Changes the checkpoint from `before` to `after`; the caller holds the lock.
pub(super) fn apply(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    state: &StateFolder,
    before: &Stack,
    after: Stack,
    allow_overflow: bool,
) -> Result<MergeReport, MergeError> {
    // A link in their place is refused now: later there would be something to roll back, and no way to.
    state.adapters().open()?;
    let change = Change { checkpoint, before, after: &after };
    let touched = change.touched()?;
    let files = open_for_writing(ctx, checkpoint, &touched)?;
    let mut writer = LedgerWriter::create(state, StateFolder::LEDGER_NEW, &after.entries())?;
    let findings = change.examine(ctx, &touched, Some(&mut writer))?;
    judge_all(&change, &findings, allow_overflow)?;
    checkpoint.unchanged()?;
    let mut report = report(&change, &touched, &findings);

    let new: Vec<_> = after.active.iter().filter(|active| !before.ids().contains(&active.id)).collect();
    let adapter_bytes = new.iter().map(|active| active.adapter.plain_bytes()).sum::<u64>();
    check_free_space(folder_of(state.path()), 2 * writer.n_bytes() + adapter_bytes + (1 << 20))?;
    let prepared = (|| {
        state.create()?;
        for active in &new {
            active.adapter.write_own(ctx, &state.adapters(), &copy_name(&active.id))?;
        }
        state.adapters().sync()?;
        let ledger = writer.finish(ctx)?;
        let digest = ledger.digest();
        let after = Stack::of_ledger(ctx, state, ledger)?;
        Journal::new(before.ledger.as_ref().map(Ledger::digest), digest).write(state)?;
        Ok(after)
    })();
    let after = match prepared {
        Ok(after) => after,
        Err(e) => {
            // No weight was touched, so the journal, where it came to be, goes first.
            let cleared = finish(state).and_then(|()| Ok(state.tidy(&before.copies())?));
            return Err(match (cleared, state.is_interrupted()) {
                (Ok(()), _) | (Err(_), Ok(false)) => e,
                (Err(rollback), _) => {
                    let path = checkpoint.root().to_owned();
                    MergeError::RollbackFailed { path, source: Box::new(e), rollback: Box::new(rollback) }
                }
            });
        }
    };
    report.ledger_bytes = match after.active.is_empty() {
        true => 0,
        false => after.ledger.as_ref().map_or(0, Ledger::n_bytes),
    };
    let patched = still_named(checkpoint, &touched)
        .and_then(|()| patch(ctx, &touched, &files, before, &after))
        .and_then(|()| still_named(checkpoint, &touched))
        .and_then(|()| commit(state));
    match patched {
        Ok(()) => {
            // The change is complete; what could not be removed now, the next change removes.
            let _left_behind = state.tidy(&after.copies());
        }
        Err(e) => return Err(roll_back(ctx, checkpoint, state, &touched, &files, [&after, before], e)),
    }
    Ok(report)
}

/// Makes the new ledger the ledger, then forgets that a change was under way.
fn commit(state: &StateFolder) -> Result<(), MergeError> {
    state.folder().rename(StateFolder::LEDGER_NEW, StateFolder::LEDGER)?;
    state.folder().sync()?;
    state.folder().remove(StateFolder::TXN)?;
    // Should the journal come back after a power loss, recovery finds that nothing is left to do.
    let _not_yet_durable = state.folder().sync();
    Ok(())
}

/// Removes the journal of a change that did not happen, or was undone, durably: what it needed may go after it.
pub(super) fn finish(state: &StateFolder) -> Result<(), MergeError> {
    if state.folder().has(StateFolder::TXN)? {
        state.folder().remove(StateFolder::TXN)?;
        state.folder().sync()?;
    }
    Ok(())
}

/// Undoes a change that failed with `error` while the shards were being patched.
fn roll_back(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    state: &StateFolder,
    touched: &[Touched<'_>],
    files: &[Option<Patcher>],
    [after, before]: [&Stack; 2],
    error: MergeError,
) -> MergeError {
    let path = checkpoint.root().to_owned();
    // After a failed sync nobody knows which pages reached the disk: recovery writes all of them anew, in a new process.
    let failed_sync = matches!(&error, MergeError::Checkpoint(CheckpointError::Io { what: "sync", .. }));
    // Past the commit there is nothing to roll back; where it cannot be told, recovery finds out.
    let may_be_committed = !matches!(state.folder().has(StateFolder::LEDGER_NEW), Ok(true));
    if failed_sync || may_be_committed {
        let rollback = Box::new(CheckpointError::Interrupted { path: path.clone() }.into());
        return MergeError::RollbackFailed { path, source: Box::new(error), rollback };
    }
    let ctx = Context { observer: &Silent, ..*ctx };
    let rolled_back = patch(&ctx, touched, files, after, before)
        .and_then(|()| finish(state))
        .and_then(|()| Ok(state.tidy(&before.copies())?));
    match rolled_back {
        Ok(()) => error,
        Err(rollback) => MergeError::RollbackFailed { path, source: Box::new(error), rollback: Box::new(rollback) },
    }
}

/// The touched shards, open for reading and writing: the files that were examined.
pub(super) fn open_for_writing(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    touched: &[Touched<'_>],
) -> Result<Vec<Option<Patcher>>, MergeError> {
    let mut files: Vec<Option<Patcher>> = checkpoint.shards().iter().map(|_| None).collect();
    for (index, shard) in touched_shards(checkpoint, touched) {
        files[index] = Some(Patcher::of(ctx, shard)?);
    }
    Ok(files)
}

/// Fails where a touched shard's name leads to another file by now: that one would stay as it is.
fn still_named(checkpoint: &Checkpoint, touched: &[Touched<'_>]) -> Result<(), MergeError> {
    Ok(touched_shards(checkpoint, touched).try_for_each(|(_, shard)| shard.still_named())?)
}

/// The shards that hold a touched tensor, and which of the checkpoint's they are.
fn touched_shards<'c>(
    checkpoint: &'c Checkpoint,
    touched: &[Touched<'_>],
) -> impl Iterator<Item = (usize, &'c Shard)> + use<'c> {
    let mut is_touched = vec![false; checkpoint.shards().len()];
    for target in touched {
        is_touched[target.tensor.shard_index] = true;
    }
    checkpoint.shards().iter().enumerate().filter(move |(index, _)| is_touched[*index])
}
