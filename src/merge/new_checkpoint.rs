//! A new checkpoint on its way: under a temporary name until it is whole, its shards cut into blocks that change and bytes that do not.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};

use super::MergeError;
use crate::checkpoint::{
    AtomicDir, Checkpoint, Context, Existing, STATE_FOLDER, Shard, SingleFile, StateFolder, windows,
};

/// Where a new checkpoint goes, and how.
pub(super) struct Destination<'a> {
    pub(super) path: &'a Path,
    pub(super) existing: Existing,
    pub(super) keep_ledger: bool,
    pub(super) link: bool,
    pub(super) resume: bool,
}

/// The output under its temporary name; gone when dropped before [`Output::commit`].
pub(super) enum Output {
    /// A checkpoint's folder.
    Folder(AtomicDir),
    /// A single file and its ledger.
    File(SingleFile),
}

impl Output {
    /// `plan` says what the output will be, for a later run to compare.
    pub(super) fn create(
        target: &Destination<'_>,
        is_file: bool,
        plan: impl FnOnce() -> String,
    ) -> Result<Self, MergeError> {
        Ok(match (is_file, target.resume) {
            (true, _) => Self::File(SingleFile::create(target.path, target.existing)?),
            (false, true) => Self::Folder(AtomicDir::create_resumable(target.path, target.existing, &plan())?),
            (false, false) => Self::Folder(AtomicDir::create(target.path, target.existing)?),
        })
    }

    /// Fails before the work where the folder to be replaced holds what is not this program's, and will not be in the copy of
    /// `checkpoint` either.
    pub(super) fn check_replaced(&self, checkpoint: &Checkpoint, has_ledger: bool) -> Result<(), MergeError> {
        let Self::Folder(output) = self else { return Ok(()) };
        let mut planned: BTreeSet<PathBuf> = checkpoint.side_files()?.into_iter().collect();
        planned.extend(checkpoint.shards().iter().map(|shard| PathBuf::from(shard.file_name())));
        if has_ledger {
            planned.insert(Path::new(STATE_FOLDER).join(StateFolder::FILES));
        }
        Ok(output.check_replaced(&planned)?)
    }

    /// What becomes the checkpoint.
    pub(super) fn root(&self) -> PathBuf {
        match self {
            Self::Folder(output) => output.path().to_owned(),
            Self::File(output) => output.root(),
        }
    }

    /// Writes the list of this program's files into the state folder: a later `--force` replaces those and no others.
    pub(super) fn write_list(&self, state: &StateFolder) -> Result<(), MergeError> {
        match self {
            Self::Folder(output) => Ok(state.write_list(&output.files()?)?),
            Self::File(_) => Ok(()),
        }
    }

    /// Removes what was written, for good.
    pub(super) fn discard(self) {
        if let Self::Folder(output) = self {
            output.discard();
        }
    }

    /// Lets the output appear.
    pub(super) fn commit(self) -> Result<(), MergeError> {
        match self {
            Self::Folder(output) => Ok(output.commit()?),
            Self::File(output) => Ok(output.commit()?),
        }
    }
}

/// A tensor of a shard that is computed block by block.
pub(super) struct RowBlocks<R> {
    /// Where it lies in the file.
    pub(super) tensor: Range<u64>,
    pub(super) row_bytes: u64,
    /// Runs of rows, which ascend.
    pub(super) rows: R,
}

/// A shard's bytes in order: blocks of its targets, which ascend, each with the target's number and its rows, and windows of all that
/// lies between.
pub(super) fn pieces<'t, R>(
    ctx: &'t Context<'_>,
    shard: &Shard,
    targets: impl Iterator<Item = RowBlocks<R>> + Send + 't,
) -> impl Iterator<Item = (Range<u64>, Option<(usize, Range<u64>)>)> + Send + 't
where
    R: Iterator<Item = Range<u64>> + Send + 't,
{
    let end = shard.file_bytes();
    let cut = move |start: &mut u64, (number, target): (usize, Option<RowBlocks<R>>)| {
        let tensor = target.as_ref().map_or(end..end, |target| target.tensor.clone());
        let between = windows(ctx, *start..tensor.start).map(|range| (range, None));
        *start = tensor.end;
        let blocks = target.into_iter().flat_map(move |RowBlocks { tensor, row_bytes, rows }| {
            let at = move |row: u64| tensor.start + row * row_bytes;
            rows.map(move |rows| (at(rows.start)..at(rows.end), Some((number, rows))))
        });
        Some(between.chain(blocks))
    };
    targets.map(Some).chain([None]).enumerate().scan(0, cut).flatten()
}
