//! Changes to a checkpoint's own files, journaled.
//!
//! The protocol, each step durable before the next:
//!
//! 1. lock; check everything; write the copies of the adapters and `ledger.new`
//! 2. write `txn`: from here on a crash needs recovery
//! 3. patch the shards, sync them
//! 4. rename `ledger.new` to `ledger`: the commit
//! 5. remove `txn`, then what no ledger needs
//!
//! A crash before 2 changed no weight. A crash between 2 and 4 leaves weights of both states; both ledgers and all
//! adapters are on disk, and originals of which the ledgers have hashes alone are in the base, so recovery writes the old state. A crash
//! after 4 leaves the new state, all of it on disk. `ledger.new` goes after `txn`, and durably so: `txn` without it means that somebody
//! else took it away.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    KeptOriginals, MergeError, MergeReport, added,
    card::update_card,
    change::{Change, Touched, Work},
    frame::{Frame, check_room, name_in_index, note_index, settle, unname_in_index},
    journal::Journal,
    ledger::{Ledger, LedgerAdapter, LedgerDocument, LedgerWriter},
    out_of_place::state_bytes,
    patch::patch,
    report::report,
    stack::{Remembered, Stack},
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
pub(super) fn break_links(ctx: &Context<'_>, change: &Change<'_>, allow_overflow: bool) -> Result<bool, MergeError> {
    let touched = change.touched()?;
    let mut shared: Vec<&Shard> = Vec::new();
    for (_, shard) in touched_shards(change.checkpoint, &touched) {
        if probe::entry_kind(shard.path())? == Some(EntryKind::Link) || shard.n_names()? > 1 {
            shared.push(shard);
        }
    }
    if shared.is_empty() {
        return Ok(false);
    }
    check_kept(change, &touched)?;
    change
        .examine(ctx, &touched, &change.bounds_if(ctx, &touched, allow_overflow)?, None)?
        .judge(change, allow_overflow)?;
    let n_bytes = shared.iter().map(|shard| shard.file_bytes()).sum();
    check_free_space(folder_of(shared[0].path()), n_bytes)?;
    ctx.observer.begin("copying shared files", n_bytes);
    shared.iter().try_for_each(|shard| unshare(ctx, shard))?;
    Ok(true)
}

/// Fails where the base that is to have the originals is the checkpoint that is going to change, or shares a file with it.
///
/// # Errors
/// [`MergeError::Refused`].
pub(super) fn refuse_itself(change: &Change<'_>) -> Result<(), MergeError> {
    let Some(base) = change.base else { return Ok(()) };
    let mut own = BTreeSet::new();
    for shard in change.checkpoint.shards() {
        own.insert(shard.identity()?);
    }
    for shard in base.shards() {
        if own.contains(&shard.identity()?) {
            let what =
                "the base shares this file with the checkpoint that is to be changed: its originals would be lost"
                    .to_owned();
            return Err(MergeError::Refused { path: shard.path().to_owned(), what });
        }
    }
    Ok(())
}

/// Fails where a tensor would be overwritten as a whole and its original would be nowhere.
///
/// # Errors
/// [`MergeError::KeepsNothing`] with the bytes that keeping them would take.
pub(super) fn check_kept(change: &Change<'_>, touched: &[Touched<'_>]) -> Result<(), MergeError> {
    if change.base.is_some() {
        return Ok(());
    }
    let is_lost = |touched: &&Touched<'_>| {
        matches!(touched.work, Work::Rows { .. }) && change.keeps(touched) == Some(KeptOriginals::Hashes)
    };
    let lost: u64 = touched.iter().filter(is_lost).map(|touched| touched.tensor.info.n_bytes()).sum();
    match lost {
        0 => Ok(()),
        n_bytes => Err(MergeError::KeepsNothing { path: change.checkpoint.root().to_owned(), n_bytes }),
    }
}

/// Changes the checkpoint itself; the caller holds the lock. `document` is that of the new ledger, without targets.
pub(super) fn apply(
    ctx: &Context<'_>,
    change: &Change<'_>,
    (state, lock): (&StateFolder, &mut CheckpointLock),
    mut document: LedgerDocument,
    allow_overflow: bool,
) -> Result<MergeReport, MergeError> {
    // A link in their place is refused now: later there would be something to roll back, and no way to.
    state.adapters().open()?;
    let (checkpoint, before) = (change.checkpoint, change.before);
    let touched = change.touched()?;
    check_kept(change, &touched)?;
    added::refuse_in_place(change)?;
    check_room(&Frame::of(checkpoint, before.ledger), state, &change.after.ids())?;
    // In place headers stay.
    if let Some(ledger) = before.ledger.map(Ledger::document) {
        document.marked = ledger.marked.clone();
        document.headers = ledger.headers.clone();
        document.files = ledger.files.clone();
    }
    note_index(checkpoint, &mut document.marked)?;
    let files = open_for_writing(ctx, checkpoint, &touched)?;
    let bounds = change.bounds_if(ctx, &touched, allow_overflow)?;
    check_free_space(folder_of(state.path()), state_bytes(change, &touched))?;
    let mut writer = LedgerWriter::create(state, StateFolder::LEDGER_NEW, document)?;
    let findings = change.examine(ctx, &touched, &bounds, Some(&mut writer))?;
    findings.judge(change, allow_overflow)?;
    added::record(ctx, change, &mut writer)?;
    change.unchanged()?;
    let mut report = report(change, &touched, &findings);

    let new: Vec<_> = change.after.active.iter().filter(|source| !before.ids().contains(&source.id)).collect();
    let adapter_bytes = new.iter().map(|source| source.copy_bytes()).sum::<u64>();
    check_free_space(folder_of(state.path()), writer.n_bytes() + adapter_bytes + (1 << 20))?;
    let prepared = (|| {
        state.create()?;
        for source in &new {
            source.write_copy(ctx, state)?;
        }
        state.adapters().sync()?;
        let ledger = writer.finish(ctx, change.record(ctx, state)?)?;
        let digest = ledger.digest();
        let after = Remembered::of_ledger(ctx, state, ledger)?;
        Journal::new(before.ledger.map(Ledger::digest), digest).write(state)?;
        Ok(after)
    })();
    let remembered = match prepared {
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
    if !change.after.active.is_empty() {
        let ledger = remembered.ledger.as_ref();
        report.ledger_bytes = ledger.map_or(0, Ledger::n_bytes);
        report.needs_base = ledger.is_some_and(|ledger| ledger.document().needs_base());
    }
    let after = match Stack::of(&remembered, checkpoint, change.base) {
        Ok(after) => after,
        // What was written cannot be read: nothing was patched.
        Err(e) => {
            let nothing = Change { after: before, ..*change };
            return Err(roll_back(ctx, &nothing, state, &[], &files, e));
        }
    };
    // As they are recorded.
    let change = Change { after: &after, ..*change };
    let touched = change.touched()?;
    let patched = still_named(checkpoint, &touched)
        .and_then(|()| name_in_index(checkpoint, before, &after))
        .and_then(|()| patch(ctx, &change, &touched, &files))
        .and_then(|()| still_named(checkpoint, &touched))
        .and_then(|()| commit(state));
    match patched {
        Ok(()) => {
            // The change is complete; what could not be brought up to date or removed now, the next change does.
            let _old_card = update_card(&change, state, !report.needs_base);
            match settle(ctx, &Frame::of(checkpoint, after.ledger), state, lock) {
                Ok(()) => _ = state.tidy(&after.copies()),
                // The ledger knows what is left to do, and stays, even where it names no adapter any more.
                Err(e) => {
                    let (root, source) = (checkpoint.root(), std::io::Error::other(format!("{e}; `recover` goes on")));
                    return Err(
                        CheckpointError::committed(root, "bring headers and index up to date in", source).into()
                    );
                }
            }
        }
        Err(e) => return Err(roll_back(ctx, &change, state, &touched, &files, e)),
    }
    Ok(report)
}

impl Change<'_> {
    /// The bounds of a change that may not let weights overflow, or where deltas are compared with originals.
    pub(super) fn bounds_if(
        &self,
        ctx: &Context<'_>,
        touched: &[Touched<'_>],
        allow_overflow: bool,
    ) -> Result<BTreeMap<String, super::compute::Bound>, MergeError> {
        let is_less = self.after.active.len() < self.before.active.len();
        // What is taken out was let in.
        if allow_overflow && is_less { Ok(BTreeMap::new()) } else { self.bounds(ctx, touched) }
    }

    /// What the ledger has to know of the adapters after the change, copies of which are in its folder.
    pub(super) fn record(&self, ctx: &Context<'_>, state: &StateFolder) -> Result<Vec<LedgerAdapter>, MergeError> {
        self.after.active.iter().map(|source| source.record(ctx, state)).collect()
    }

    /// The same change backwards.
    fn backwards(&self) -> Self {
        Self { before: self.after, after: self.before, ..*self }
    }

    /// Fails where a file that was read changed meanwhile.
    pub(super) fn unchanged(&self) -> Result<(), MergeError> {
        self.after.active.iter().try_for_each(|source| source.unchanged())?;
        if let Some(base) = self.base {
            base.unchanged()?;
        }
        Ok(self.checkpoint.unchanged()?)
    }
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
    change: &Change<'_>,
    state: &StateFolder,
    touched: &[Touched<'_>],
    files: &[Option<Patcher>],
    error: MergeError,
) -> MergeError {
    let path = change.checkpoint.root().to_owned();
    // After a failed sync nobody knows which pages reached the disk: recovery writes all of them anew, in a new process.
    let failed_sync = matches!(&error, MergeError::Checkpoint(CheckpointError::Io { what: "sync", .. }));
    // Past the commit there is nothing to roll back; where it cannot be told, recovery finds out.
    let may_be_committed = !matches!(state.folder().has(StateFolder::LEDGER_NEW), Ok(true));
    if failed_sync || may_be_committed {
        let rollback = Box::new(CheckpointError::Interrupted { path: path.clone() }.into());
        return MergeError::RollbackFailed { path, source: Box::new(error), rollback };
    }
    let ctx = Context { observer: &Silent, ..*ctx };
    let back = change.backwards();
    let touched: Vec<Touched<'_>> = touched.iter().map(Touched::backwards).collect();
    let rolled_back = patch(&ctx, &back, &touched, files)
        .and_then(|()| unname_in_index(change.checkpoint, change.before, change.after))
        .and_then(|()| finish(state))
        .and_then(|()| Ok(state.tidy(&change.before.copies())?));
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
    for target in touched.iter().filter(|target| !matches!(target.work, Work::Nothing { .. })) {
        is_touched[target.tensor.shard_index] = true;
    }
    checkpoint.shards().iter().enumerate().filter(move |(index, _)| is_touched[*index])
}
