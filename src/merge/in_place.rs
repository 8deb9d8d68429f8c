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
//! adapters are on disk, so recovery writes the old state. A crash after 4 leaves the new state, all of it on disk.

use std::{fs, path::Path};

use super::{
    MergeError, MergeReport,
    apply::{judge_all, report},
    change::{Change, Touched, patch},
    journal::Journal,
    ledger::LedgerWriter,
    stack::Stack,
    state::{StateFolder, remove_file},
};
use crate::checkpoint::{
    Checkpoint, CheckpointError, CheckpointLock, Context, Existing, Patcher, Silent, check_free_space,
    in_place_hazards, sync_folder,
};

/// Locks a checkpoint for work in place.
///
/// # Errors
/// Refused where another command holds the lock, or, without `through_links`, where other paths lead to the same bytes.
pub(super) fn begin(checkpoint: &Checkpoint, through_links: bool) -> Result<CheckpointLock, MergeError> {
    let hazards = in_place_hazards(checkpoint);
    if !through_links && !hazards.is_empty() {
        return Err(MergeError::Linked { path: checkpoint.root().to_owned(), hazards });
    }
    Ok(CheckpointLock::acquire(checkpoint)?)
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
    let change = Change { checkpoint, before, after: &after };
    let touched = change.touched()?;
    let files = open_for_writing(ctx, checkpoint, &touched)?;
    let mut writer = LedgerWriter::create(&state.ledger_new(), &after.entries())?;
    let findings = change.examine(ctx, &touched, Some(&mut writer))?;
    judge_all(&change, &findings, allow_overflow)?;
    checkpoint.unchanged()?;
    let mut report = report(&change, &touched, &findings);

    let new: Vec<_> = after.active.iter().filter(|active| !before.ids().contains(&active.id)).collect();
    let adapter_bytes = new.iter().map(|active| active.adapter.plain_bytes()).sum::<u64>();
    check_free_space(checkpoint_folder(state), 2 * writer.n_bytes() + adapter_bytes + (1 << 20))?;
    state.create()?;
    let prepared = (|| {
        for active in &new {
            active.adapter.write_plain(ctx, &state.adapter(&active.id), Existing::Replace)?;
        }
        sync_folder(&state.adapters())?;
        writer.finish(ctx)?;
        // Opened anew, so that what is trusted from here on is what lies on disk.
        Stack::open_ledger(ctx, state, &state.ledger_new())
    })();
    let after = match prepared {
        Ok(after) => after,
        Err(e) => {
            state.tidy(&before.ids())?;
            return Err(e);
        }
    };
    let ledger = after.ledger.as_ref().expect("it was just written");
    report.ledger_bytes = if after.active.is_empty() { 0 } else { ledger.n_bytes() };
    Journal::new(before.ledger.as_ref().map(super::ledger::Ledger::digest), ledger.digest()).write(&state.txn())?;
    let patched = patch(ctx, &touched, &files, before, &after).and_then(|()| commit(state));
    match patched {
        Ok(()) => {
            // The change is complete; what could not be removed now, the next change removes.
            let _left_behind = state.tidy(&after.ids());
        }
        Err(e) => return Err(roll_back(ctx, checkpoint, state, &touched, &files, [&after, before], e)),
    }
    Ok(report)
}

/// Makes the new ledger the ledger, then forgets that a change was under way.
fn commit(state: &StateFolder) -> Result<(), MergeError> {
    let (new, ledger) = (state.ledger_new(), state.ledger());
    fs::rename(&new, &ledger).map_err(|e| CheckpointError::io("rename", &new, e))?;
    sync_folder(state.path())?;
    finish(state)
}

/// Removes the journal of a change whose weights are all in place.
pub(super) fn finish(state: &StateFolder) -> Result<(), MergeError> {
    remove_file(&state.txn())?;
    // Should the journal come back after a power loss, recovery finds once more that nothing is left to do.
    let _not_yet_durable = sync_folder(state.path());
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
    // Past the commit there is nothing to roll back.
    let committed = !state.ledger_new().exists();
    if failed_sync || committed {
        let rollback = Box::new(MergeError::Interrupted { path: path.clone() });
        return MergeError::RollbackFailed { path, source: Box::new(error), rollback };
    }
    let ctx = Context { observer: &Silent, ..*ctx };
    let rolled_back = patch(&ctx, touched, files, after, before)
        .and_then(|()| finish(state))
        .and_then(|()| state.tidy(&before.ids()));
    match rolled_back {
        Ok(()) => error,
        Err(rollback) => MergeError::RollbackFailed { path, source: Box::new(error), rollback: Box::new(rollback) },
    }
}

/// The touched shards, open for reading and writing.
pub(super) fn open_for_writing(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    touched: &[Touched<'_>],
) -> Result<Vec<Option<Patcher>>, MergeError> {
    let open = |(index, shard): (usize, &crate::checkpoint::Shard)| {
        if !touched.iter().any(|target| target.tensor.shard_index == index) {
            return Ok(None);
        }
        Ok(Some(Patcher::open(ctx, shard.path())?))
    };
    checkpoint.shards().iter().enumerate().map(open).collect()
}

fn checkpoint_folder(state: &StateFolder) -> &Path {
    crate::checkpoint::folder_of(state.path())
}
