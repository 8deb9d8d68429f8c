//! A new checkpoint on its way: under a temporary name until it is whole, its shards cut into blocks that change and bytes that do not.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    MergeError,
    card::CARD_NAME,
    frame::{MAX_INDEX_BYTES, original_index},
};
use crate::checkpoint::{
    AtomicDir, Checkpoint, Context, Existing, Layout, LeftOut, OwnFolder, STATE_FOLDER, Shard, SingleFile, StateFolder,
    check_free_space, copy_side_files, folder_of, read_whole, windows, write_own,
};

/// Where a new checkpoint goes, and how.
pub(super) struct Destination<'a> {
    pub(super) path: &'a Path,
    pub(super) existing: Existing,
    pub(super) keep_ledger: bool,
    pub(super) link: bool,
    pub(super) resume: bool,
    /// Whether files beside the shards come along that contradict the new weights, such as other copies of the old ones.
    pub(super) keep_other_files: bool,
}

/// A checkpoint under its temporary name, of the layout of the one that it is made from; gone when dropped before
/// [`NewCheckpoint::commit`].
pub(super) struct NewCheckpoint<'a> {
    from: &'a Checkpoint,
    output: Output,
    root: PathBuf,
    state: StateFolder,
    keep_other_files: bool,
}

enum Output {
    /// A checkpoint's folder.
    Folder(AtomicDir),
    /// A single file and its ledger.
    File(SingleFile),
}

impl<'a> NewCheckpoint<'a> {
    /// Begins the checkpoint that is made of `from`, when it is known that `state_bytes` more than its size are free. `plan` says what the
    /// output will be, for a later run to compare.
    ///
    /// # Errors
    /// An output that exists, or that is or holds what this program did not write; too little space.
    pub(super) fn begin(
        from: &'a Checkpoint,
        destination: &Destination<'_>,
        plan: impl FnOnce() -> String,
        state_bytes: u64,
    ) -> Result<Self, MergeError> {
        let Destination { path, existing, .. } = *destination;
        let output = match (from.layout(), destination.resume) {
            (Layout::File, _) => Output::File(SingleFile::create(path, existing)?),
            (_, true) => Output::Folder(AtomicDir::create_resumable(path, existing, &plan())?),
            (_, false) => Output::Folder(AtomicDir::create(path, existing)?),
        };
        check_free_space(folder_of(path), from.n_bytes() + state_bytes)?;
        let root = match &output {
            Output::Folder(output) => {
                check_replaced(output, from, destination)?;
                output.path().to_owned()
            }
            Output::File(output) => output.root(),
        };
        let state = StateFolder::at(&root, from.layout())?;
        Ok(Self { from, output, root, state, keep_other_files: destination.keep_other_files })
    }

    /// What becomes the checkpoint.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }
    /// What it remembers of the merge.
    pub(super) fn state(&self) -> &StateFolder {
        &self.state
    }
    /// Where a shard goes.
    pub(super) fn shard_path(&self, shard: &Shard) -> PathBuf {
        match self.output {
            Output::Folder(_) => self.root.join(shard.file_name()),
            Output::File(_) => self.root.clone(),
        }
    }

    /// Brings along what the folder holds beside its shards, but for files that contradict the new weights, which are returned.
    pub(super) fn copy_side_files(&self, ctx: &Context<'_>) -> Result<Vec<LeftOut>, MergeError> {
        Ok(copy_side_files(ctx, self.from, &self.root, self.keep_other_files)?)
    }

    /// Lets the index be what it was before merges in place, which the shards' headers name from now on.
    pub(super) fn restore_index(&self) -> Result<(), MergeError> {
        let (Some(name), Some(_)) = (self.from.index_name(), self.from.merged_in_index()) else { return Ok(()) };
        let path = self.root.join(name);
        let text = String::from_utf8_lossy(&read_whole(&path, MAX_INDEX_BYTES)?).into_owned();
        let original = original_index(&path, &text)?;
        Ok(write_own(&OwnFolder::at(&self.root)?, name, original.as_bytes())?)
    }

    /// Completes the state with the list of this program's files, which a later `--force` replaces and no others, or removes it.
    pub(super) fn finish_state(&self, is_kept: bool) -> Result<(), MergeError> {
        if !is_kept {
            return Ok(self.state.folder().remove_all()?);
        }
        if let Output::Folder(output) = &self.output {
            self.state.write_list(&output.files()?)?;
        }
        Ok(self.state.folder().sync()?)
    }

    /// Removes what was written, for good.
    pub(super) fn discard(self) {
        if let Output::Folder(output) = self.output {
            output.discard();
        }
    }

    /// Lets the checkpoint appear.
    pub(super) fn commit(self) -> Result<(), MergeError> {
        match self.output {
            Output::Folder(output) => Ok(output.commit()?),
            Output::File(output) => Ok(output.commit()?),
        }
    }
}

/// Fails before the work where the folder to be replaced holds what is not this program's, and will not be in the copy of `from` either.
fn check_replaced(output: &AtomicDir, from: &Checkpoint, destination: &Destination<'_>) -> Result<(), MergeError> {
    let side_files = from.sorted_side_files(destination.keep_other_files)?;
    let mut planned: BTreeSet<PathBuf> = side_files.kept.into_iter().collect();
    planned.extend(from.shards().iter().map(|shard| PathBuf::from(shard.file_name())));
    if !destination.keep_other_files {
        planned.insert(PathBuf::from(CARD_NAME));
    }
    if destination.keep_ledger {
        planned.insert(Path::new(STATE_FOLDER).join(StateFolder::FILES));
    }
    Ok(output.check_replaced(&planned)?)
}

/// A tensor of a shard that is computed block by block.
pub(super) struct RowBlocks<R> {
    /// Where it lies in the file.
    pub(super) tensor: Range<u64>,
    pub(super) row_bytes: u64,
    /// Runs of rows, which ascend.
    pub(super) rows: R,
}

/// The tensor data of a shard in order: blocks of its targets, which ascend, each with the target's number and its rows, and windows of all that
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
    targets.map(Some).chain([None]).enumerate().scan(shard.header().data_start(), cut).flatten()
}
