//! The texts around the weights that a change brings up to date: headers of shards, and the index.
//!
//! Out of place a shard's new header is written with its data. In place weights are patched and headers stay, so what they say is brought
//! up to date when the change is committed ([`settle`]): a shard that names an adapter which is not there any more is copied with
//! another header, and the copy takes its place; the index names the adapters that no header names. Each file changes in one step, and
//! what to write follows from the ledger and the files as they are, so it may be interrupted and done again.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{
    MergeError,
    ledger::{Ledger, LedgerDocument},
    mark::{Mark, MarkedAdapter, MarkedText, marked},
    source::Source,
    stack::Stack,
};
use crate::{
    adapter::AdapterId,
    checkpoint::{
        Checkpoint, CheckpointError, CheckpointLock, Context, EntryKind, Index, MERGED_KEY, OwnFolder, Printable,
        Shard, StateFolder, check_free_space, folder_of, probe, read_whole, rename_into_place, rewrite_shard,
        string_at, windows, write_own,
    },
};

/// Larger indexes are refused when they are opened.
pub(super) const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The texts of a checkpoint as its ledger knows them.
pub(super) struct Frame<'a> {
    checkpoint: &'a Checkpoint,
    ledger: Option<&'a LedgerDocument>,
    /// Whether what the headers say is taken for the merge in question, though no ledger remembers it.
    all_own: bool,
}

impl<'a> Frame<'a> {
    pub(super) fn of(checkpoint: &'a Checkpoint, ledger: Option<&'a Ledger>) -> Self {
        Self { checkpoint, ledger: ledger.map(Ledger::document), all_own: false }
    }

    /// The texts of a checkpoint whose ledger is gone, or that never had one.
    pub(super) fn without_ledger(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, ledger: None, all_own: true }
    }

    /// Whether the value in a shard's header, or in the index, is that of a merge that the ledger remembers.
    pub(super) fn is_own(&self, file: &str) -> bool {
        self.all_own
            || self.ledger.is_some_and(|ledger| match &ledger.marked[..] {
                // A single file may have been renamed.
                [_] if self.checkpoint.shards().len() == 1 && self.checkpoint.index_name().is_none() => true,
                marked => marked.iter().any(|name| name == file),
            })
    }

    /// The value in a shard's header, where the ledger remembers its merge.
    pub(super) fn own_mark(&self, shard: &Shard) -> Result<Option<Mark>, MergeError> {
        match shard.header().metadata().get(MERGED_KEY) {
            Some(value) if self.is_own(&shard.file_name()) => Ok(Some(parsed(shard, value)?)),
            _ => Ok(None),
        }
    }

    /// A shard's header as it was before anything was merged, and whether that is certain.
    pub(super) fn original_header(&self, shard: &Shard) -> Result<(String, bool), MergeError> {
        let (text, is_certain) = self.unmarked_header(shard)?;
        let edit = self.ledger.and_then(|ledger| self.of_shard(&ledger.headers, &shard.file_name()));
        Ok(match edit.map(|edit| edit.undo(&text)) {
            None => (text, is_certain),
            Some(Some(original)) => (original, is_certain),
            Some(None) => (text, false),
        })
    }

    /// What a ledger says of a shard; a single file may have been renamed.
    fn of_shard<'m, V>(&self, by_name: &'m BTreeMap<String, V>, name: &str) -> Option<&'m V> {
        match self.checkpoint.shards().len() {
            1 => by_name.values().next(),
            _ => by_name.get(name),
        }
    }

    /// A shard's header without the names of adapters, and whether it is certainly what it was without them.
    fn unmarked_header(&self, shard: &Shard) -> Result<(String, bool), MergeError> {
        let json = shard.header_json()?;
        let text = String::from_utf8(json).expect("a header that was parsed is UTF-8");
        let Some(mark) = self.own_mark(shard)? else { return Ok((text, true)) };
        Ok(match mark.original(&text, MarkedText::Header) {
            Some(original) => (original, true),
            None => (text, false),
        })
    }

    /// The header that a shard has where `adapters` changed tensors of it.
    pub(super) fn header_naming(&self, shard: &Shard, adapters: Vec<MarkedAdapter>) -> Result<String, MergeError> {
        marked_header(shard, &self.unmarked_header(shard)?.0, adapters)
    }

    /// The header that a shard ought to have after a change in place: without adapters that are not `active`; none where it has it.
    fn settled_header(&self, shard: &Shard, active: &BTreeSet<String>) -> Result<Option<String>, MergeError> {
        let Some(mark) = self.own_mark(shard)? else { return Ok(None) };
        let left: Vec<MarkedAdapter> = mark.adapters().iter().filter(|one| active.contains(&one.id)).cloned().collect();
        if left.len() == mark.adapters().len() || !self.unmarked_header(shard)?.1 {
            return Ok(None);
        }
        self.header_naming(shard, left).map(Some)
    }
}

impl Frame<'_> {
    /// What is wrong with the headers of a checkpoint that holds the adapters of `stack`.
    pub(super) fn problems(&self, stack: &Stack<'_>) -> Result<Vec<String>, MergeError> {
        let (shards, mut problems) = (self.checkpoint.shards(), Vec::new());
        for (shard, merged) in shards.iter().zip(by_shard(stack, shards.len())) {
            let Some(mark) = self.own_mark(shard)? else { continue };
            let name = shard.file_name();
            let name = Printable(&name);
            if let Some(other) = mark.adapters().iter().find(|one| merged.iter().all(|other| other.id != one.id)) {
                let id = Printable(other.id.get(..12).unwrap_or(&other.id)).to_string();
                problems.push(format!("{name}: its header names adapter {id}, which changes nothing in it"));
            } else if !self.original_header(shard)?.1 {
                problems.push(format!("{name}: its header was changed since the merge"));
            }
        }
        Ok(problems)
    }

    /// Whether a header names an adapter that is not there any more: a change was committed, and its end was cut short.
    pub(super) fn is_unsettled(&self) -> Result<bool, MergeError> {
        let Some(ledger) = self.ledger else { return Ok(false) };
        let active: BTreeSet<String> = ledger.active.iter().map(|adapter| adapter.id.clone()).collect();
        for shard in self.checkpoint.shards() {
            if self.settled_header(shard, &active)?.is_some() {
                return Ok(true);
            }
        }
        let is_own = self.checkpoint.index_name().is_some_and(|name| self.is_own(name));
        let mark = index_mark(self.checkpoint)?.filter(|_| is_own);
        Ok(mark.is_some_and(|mark| mark.adapters().iter().any(|adapter| !active.contains(&adapter.id))))
    }
}

/// The header `text` with the names of `adapters`.
///
/// # Errors
/// A header that no value can be put into.
pub(super) fn marked_header(shard: &Shard, text: &str, adapters: Vec<MarkedAdapter>) -> Result<String, MergeError> {
    let text = marked(text, MarkedText::Header, adapters);
    Ok(text.map_err(|e| CheckpointError::bad_file(shard.path(), e.to_string()))?)
}

fn parsed(shard: &Shard, value: &str) -> Result<Mark, MergeError> {
    Ok(Mark::parse(value).map_err(|what| CheckpointError::bad_file(shard.path(), what))?)
}

/// The adapters of a stack that change tensors of each shard, in ascending order of id.
pub(super) fn by_shard(stack: &Stack<'_>, n_shards: usize) -> Vec<Vec<MarkedAdapter>> {
    let mut ids: Vec<BTreeMap<AdapterId, MarkedAdapter>> = vec![BTreeMap::new(); n_shards];
    for target in stack.targets.values() {
        for term in &target.terms {
            ids[target.tensor.shard_index].insert(term.source.id, MarkedAdapter::of(term.source));
        }
    }
    for added in stack.added.values() {
        ids[added.shard_index].insert(added.source.id, MarkedAdapter::of(added.source));
    }
    ids.into_iter().map(|adapters| adapters.into_values().collect()).collect()
}

/// Fails where the disk has no room for the shards that [`settle`] copies when only the adapters `active` are left.
///
/// # Errors
/// [`CheckpointError::NoSpace`].
pub(super) fn check_room(frame: &Frame<'_>, state: &StateFolder, active: &[AdapterId]) -> Result<(), MergeError> {
    let active = active.iter().map(AdapterId::to_string).collect();
    let mut most = 0;
    for shard in frame.checkpoint.shards() {
        if frame.settled_header(shard, &active)?.is_some() {
            most = most.max(shard.file_bytes());
        }
    }
    Ok(check_free_space(folder_of(state.path()), most)?)
}

/// Brings headers and index up to date with the ledger, whose change is committed. `lock` is that of the checkpoint, and grows by the files
/// that take the place of others.
///
/// # Errors
/// A failure to read or write; the weights are right, and doing it again goes on.
pub(super) fn settle(
    ctx: &Context<'_>,
    frame: &Frame<'_>,
    state: &StateFolder,
    lock: &mut CheckpointLock,
) -> Result<(), MergeError> {
    let Some(ledger) = frame.ledger else { return Ok(()) };
    let active: BTreeSet<String> = ledger.active.iter().map(|adapter| adapter.id.clone()).collect();
    let mut named = BTreeSet::new();
    for shard in frame.checkpoint.shards() {
        if let Some(header) = frame.settled_header(shard, &active)? {
            replace_header(ctx, shard, &header, state, lock)?;
        }
        if let Some(mark) = frame.own_mark(shard)? {
            named.extend(mark.adapters().iter().map(|adapter| adapter.id.clone()).filter(|id| active.contains(id)));
        }
    }
    let unnamed = ledger.active.iter().filter(|adapter| !named.contains(&adapter.id));
    settle_index(frame, unnamed.map(|adapter| MarkedAdapter { id: adapter.id.clone(), scale: adapter.scale }).collect())
}

/// Puts a copy with another header in a shard's place.
fn replace_header(
    ctx: &Context<'_>,
    shard: &Shard,
    header: &str,
    state: &StateFolder,
    lock: &mut CheckpointLock,
) -> Result<(), MergeError> {
    let name = format!(".{}{TEMPORARY}", blake3::hash(shard.file_name().as_bytes()).to_hex());
    // What an earlier run left.
    state.folder().remove(&name)?;
    let part = state.folder().path().join(&name);
    // Patched since it was examined.
    let source = Shard::open(shard.path())?;
    let data = source.header().data_start()..source.file_bytes();
    ctx.observer.begin("restoring headers", shard.file_bytes());
    rewrite_shard(
        ctx,
        &source,
        (&part, header.as_bytes()),
        windows(ctx, data).map(|range| (range, ())),
        |()| 0,
        |(), _| Ok::<_, MergeError>(()),
        |(), ()| Ok(()),
    )?;
    shard.still_named()?;
    lock.extend(&part)?;
    Ok(rename_into_place(&part, shard.path())?)
}

/// What the names of temporary files end with, which the state folder removes.
const TEMPORARY: &str = ".neuroada-tmp";

/// Lets the index name `adapters` and no others that the ledger knows.
fn settle_index(frame: &Frame<'_>, adapters: Vec<MarkedAdapter>) -> Result<(), MergeError> {
    let Some(name) = own_index(frame.checkpoint)? else { return Ok(()) };
    match frame.is_own(name) {
        true => write_index(frame.checkpoint, name, true, adapters),
        false => Ok(()),
    }
}

/// The name of the index that work in place writes; none where there is none, or where its name leads to somebody else's file.
fn own_index(checkpoint: &Checkpoint) -> Result<Option<&str>, MergeError> {
    let Some(name) = checkpoint.index_name() else { return Ok(None) };
    let is_file = probe::entry_kind(&checkpoint.root().join(name))? == Some(EntryKind::File);
    Ok(is_file.then_some(name))
}

/// Adds the index to the files that name adapters, where work in place is going to write it.
///
/// # Errors
/// A path that cannot be examined.
pub(super) fn note_index(checkpoint: &Checkpoint, marked: &mut Vec<String>) -> Result<(), MergeError> {
    let name = own_index(checkpoint)?.map(str::to_owned);
    marked.extend(name.filter(|name| !marked.contains(name)));
    Ok(())
}

/// Lets the index name what a change in place adds, before the first weight is patched: at no moment is an adapter merged and not named.
///
/// # Errors
/// A failure to read or write.
pub(super) fn name_in_index(checkpoint: &Checkpoint, before: &Stack<'_>, after: &Stack<'_>) -> Result<(), MergeError> {
    let Some(name) = own_index(checkpoint)?.filter(|_| added(before, after).next().is_some()) else { return Ok(()) };
    let is_own = Frame::of(checkpoint, before.ledger).is_own(name);
    let mut adapters: Vec<MarkedAdapter> = match index_mark(checkpoint)?.filter(|_| is_own) {
        Some(mark) => mark.adapters().to_vec(),
        None => Vec::new(),
    };
    adapters.extend(added(before, after).map(MarkedAdapter::of));
    adapters.sort_by(|a, b| a.id.cmp(&b.id));
    adapters.dedup_by(|a, b| a.id == b.id);
    write_index(checkpoint, name, is_own, adapters)
}

/// Takes out of the index what a change named there that did not happen.
///
/// # Errors
/// A failure to read or write.
pub(super) fn unname_in_index(
    checkpoint: &Checkpoint,
    before: &Stack<'_>,
    after: &Stack<'_>,
) -> Result<(), MergeError> {
    let Some(name) = own_index(checkpoint)? else { return Ok(()) };
    let path = checkpoint.root().join(name);
    let new: BTreeSet<String> = added(before, after).map(|source| source.id.to_string()).collect();
    // As it is now: it was opened before it was written.
    let Some(value) = Index::open(&path)?.merged().map(str::to_owned) else { return Ok(()) };
    let mark = Mark::parse(&value).map_err(|what| CheckpointError::bad_file(&path, what))?;
    if mark.adapters().iter().all(|adapter| !new.contains(&adapter.id)) {
        return Ok(());
    }
    let left = mark.adapters().iter().filter(|adapter| !new.contains(&adapter.id)).cloned().collect();
    write_index(checkpoint, name, true, left)
}

/// The adapters that a change adds.
fn added<'s, 'a>(before: &'s Stack<'a>, after: &'s Stack<'a>) -> impl Iterator<Item = &'a Source> + use<'s, 'a> {
    let is_there = |id| before.active.iter().any(|source| source.id == id);
    after.active.iter().copied().filter(move |source| !is_there(source.id))
}

fn index_mark(checkpoint: &Checkpoint) -> Result<Option<Mark>, MergeError> {
    let mark = checkpoint.merged_in_index().map(Mark::parse).transpose();
    Ok(mark.map_err(|what| CheckpointError::bad_file(checkpoint.root(), what))?)
}

/// Writes the index `name` with the names of `adapters`, in place of those that it has where these are the ledger's own.
fn write_index(
    checkpoint: &Checkpoint,
    name: &str,
    is_own: bool,
    adapters: Vec<MarkedAdapter>,
) -> Result<(), MergeError> {
    let path = checkpoint.root().join(name);
    let bytes = read_whole(&path, MAX_INDEX_BYTES)?;
    let bad = |what: String| CheckpointError::bad_file(&path, what);
    let text = String::from_utf8(bytes).map_err(|e| bad(e.to_string()))?;
    let original = if is_own { original_index(&path, &text)? } else { text.clone() };
    let new = marked(&original, MarkedText::Index, adapters).map_err(|e| bad(e.to_string()))?;
    if new != text {
        write_own(&OwnFolder::at(checkpoint.root())?, name, new.as_bytes())?;
    }
    Ok(())
}

/// The index at `path` as it was before it was marked, or as it is where it was changed since.
///
/// # Errors
/// A value that is malformed.
pub(super) fn original_index(path: &Path, text: &str) -> Result<String, MergeError> {
    let bad = |what: String| MergeError::from(CheckpointError::bad_file(path, what));
    let value = string_at(text, "metadata", MERGED_KEY).map_err(|e| bad(e.to_string()))?;
    let Some(value) = value else { return Ok(text.to_owned()) };
    let mark = Mark::parse(&value).map_err(bad)?;
    Ok(mark.original(text, MarkedText::Index).unwrap_or_else(|| text.to_owned()))
}
