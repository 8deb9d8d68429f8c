//! A new checkpoint of the same layout: shards copied, examined and patched in one pass, side files brought along.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    MergeError, MergeReport,
    apply::{judge, report},
    change::{Change, Touched, patch, row_blocks},
    examine::Examination,
    ledger::{GROUP_ROWS, LedgerWriter},
    stack::Stack,
    state::{StateFolder, remove_file},
};
use crate::checkpoint::{
    AtomicDir, Checkpoint, CheckpointError, Context, CopyMode, Existing, Layout, Patcher, Shard, Silent,
    check_free_space, copy_file, folder_of, rewrite_shard, share_file, sync_folder, windows,
};

/// Where a new checkpoint goes, and how.
pub(super) struct Target<'a> {
    pub(super) path: &'a Path,
    pub(super) existing: Existing,
    pub(super) keep_ledger: bool,
    pub(super) link: bool,
    pub(super) resume: bool,
}

/// Writes the checkpoint that `after` makes of `checkpoint`, which `before` describes.
///
/// Shards are copied, examined and patched in one pass, and judged when all were: until then nothing has its name.
pub(super) fn apply(
    ctx: &Context<'_>,
    checkpoint: &Checkpoint,
    before: &Stack,
    after: Stack,
    target: &Target<'_>,
) -> Result<MergeReport, MergeError> {
    refuse_same_place(checkpoint, target.path)?;
    let change = Change { checkpoint, before, after: &after };
    let touched = change.touched()?;
    refuse_wrong_base(ctx, &change, &touched)?;
    let is_file = checkpoint.layout() == Layout::File;
    let output = Output::create(target, is_file, || plan(&change))?;
    check_free_space(folder_of(target.path), checkpoint.n_bytes() + state_bytes(&after, &touched))?;
    let root = output.root();
    let state = StateFolder::at(&root, checkpoint.layout());
    state.create()?;
    let shard_path = |name: String| if is_file { root.clone() } else { root.join(name) };

    let mut writer = LedgerWriter::create(&state.ledger(), &after.entries())?;
    let mut examination = Examination::new(&change, Some(&mut writer));
    ctx.observer.begin("merging", checkpoint.shards().iter().map(Shard::file_bytes).sum());
    let mut patched_later = Vec::new();
    let mut by_shard: Vec<Vec<Touched<'_>>> = vec![Vec::new(); checkpoint.shards().len()];
    touched.iter().for_each(|target| by_shard[target.tensor.shard_index].push(*target));
    for (index, (shard, mut of_shard)) in checkpoint.shards().iter().zip(by_shard).enumerate() {
        of_shard.sort_by_key(|target| target.tensor.info.data.start);
        let path = shard_path(shard.file_name());
        // Shards get their names when they are finished: what has one was finished by an earlier run of the same plan.
        if path.exists() {
            of_shard.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
            continue;
        }
        let part = path.with_extension("part");
        remove_file(&part)?;
        let mode = if target.link && of_shard.is_empty() { CopyMode::Link } else { CopyMode::Auto };
        let later = match share_file(shard.path(), &part, mode)? {
            Some(_) => {
                of_shard.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
                of_shard
            }
            None => rewrite(ctx, &change, shard, &of_shard, &part, &mut examination)?,
        };
        if later.is_empty() {
            give_name(&part, &path)?;
        } else {
            patched_later.push((index, later, part, path));
        }
    }
    let findings = examination.findings();
    if let Err(e) = judge(&change, &findings) {
        output.discard();
        return Err(e);
    }
    let mut report = report(&change, &touched, &findings);
    for active in &after.active {
        active.adapter.write_plain(ctx, &state.adapter(&active.id), Existing::Replace)?;
    }
    writer.finish(ctx)?;
    let after = Stack::open_ledger(ctx, &state, &state.ledger())?;
    for (index, later, part, path) in patched_later {
        let mut files: Vec<Option<Patcher>> = checkpoint.shards().iter().map(|_| None).collect();
        files[index] = Some(Patcher::open(ctx, &part)?);
        patch(ctx, &later, &files, before, &after)?;
        give_name(&part, &path)?;
    }
    for side_file in checkpoint.side_files()? {
        let to = root.join(&side_file);
        fs::create_dir_all(folder_of(&to)).map_err(|e| CheckpointError::io("create", folder_of(&to), e))?;
        remove_file(&to)?;
        copy_file(ctx, &checkpoint.root().join(&side_file), &to, CopyMode::Auto)?;
    }
    checkpoint.unchanged()?;

    report.bytes_written = checkpoint.n_bytes();
    if target.keep_ledger && !after.active.is_empty() {
        report.ledger_bytes = after.ledger.as_ref().map_or(0, super::ledger::Ledger::n_bytes);
        sync_folder(state.path())?;
    } else {
        drop(after);
        fs::remove_dir_all(state.path()).map_err(|e| CheckpointError::io("remove", state.path(), e))?;
    }
    output.commit(&state, target)?;
    Ok(report)
}

/// Copies a shard, patching and examining on the way the tensors whose rows lie in one piece; returns the others, examined.
fn rewrite<'a>(
    ctx: &Context<'_>,
    change: &Change<'_>,
    shard: &Shard,
    of_shard: &[Touched<'a>],
    part: &Path,
    examination: &mut Examination<'_, '_>,
) -> Result<Vec<Touched<'a>>, MergeError> {
    // Blocks of very long rows would not fit into memory whole.
    let is_long = |target: &Touched<'_>| ctx.pass_bytes() / 8 < GROUP_ROWS * row_bytes(target);
    let (later, at_once): (Vec<_>, Vec<_>) =
        of_shard.iter().partition(|target| target.layout.transposed || is_long(target));
    rewrite_shard(
        ctx,
        shard,
        part,
        pieces(ctx, change, shard, &at_once),
        |rows| rows.as_ref().map_or(0, |(target, rows)| change.block_bytes(ctx, target, rows)),
        |rows, bytes| match rows {
            Some((target, rows)) => change.examine_and_patch(ctx, target, rows, bytes).map(Some),
            None => Ok(None),
        },
        |rows, block| match (rows, block) {
            (Some((target, rows)), Some(block)) => examination.push(target, &rows, block),
            _ => Ok(()),
        },
    )?;
    later.iter().try_for_each(|target| examination.examine_on_disk(ctx, target))?;
    Ok(later)
}

fn row_bytes(target: &Touched<'_>) -> u64 {
    target.tensor.info.n_bytes() / target.layout.n_rows()
}

/// A shard's bytes in order: blocks of rows of `targets`, which ascend, and windows of all that lies between.
fn pieces<'t>(
    ctx: &'t Context<'_>,
    change: &'t Change<'_>,
    shard: &'t Shard,
    targets: &'t [Touched<'t>],
) -> impl Iterator<Item = (Range<u64>, Option<(&'t Touched<'t>, Range<u64>)>)> + Send + 't {
    let ends = targets.iter().map(|target| shard.file_range(target.tensor.info).end);
    let starts = std::iter::once(0).chain(ends);
    let upto = targets.iter().map(Some).chain([None]);
    starts.zip(upto).flat_map(move |(start, target)| {
        let tensor = target.map_or(shard.file_bytes()..shard.file_bytes(), |t| shard.file_range(t.tensor.info));
        let between = windows(ctx, start..tensor.start).map(|range| (range, None));
        let blocks = target.into_iter().flat_map(move |target| {
            let row_bytes = row_bytes(target);
            row_blocks(ctx, target, &[change.before, change.after]).map(move |rows| {
                let place = tensor.start + rows.start * row_bytes..tensor.start + rows.end * row_bytes;
                (place, Some((target, rows)))
            })
        });
        between.chain(blocks)
    })
}

/// Fails before anything is written where the smallest tensor shows that the base is another.
fn refuse_wrong_base(ctx: &Context<'_>, change: &Change<'_>, touched: &[Touched<'_>]) -> Result<(), MergeError> {
    let Some(smallest) = touched.iter().min_by_key(|target| target.tensor.info.n_bytes()) else { return Ok(()) };
    let quiet = Context { observer: &Silent, ..*ctx };
    match judge(change, &change.examine(&quiet, std::slice::from_ref(smallest), None)?) {
        Ok(()) => Ok(()),
        // Told with all that is wrong.
        Err(_) => judge(change, &change.examine(ctx, touched, None)?),
    }
}

/// Bytes that the ledger and the adapters beside it take at most, while the ledger is being written.
fn state_bytes(after: &Stack, touched: &[Touched<'_>]) -> u64 {
    let adapters: u64 = after.active.iter().map(|active| active.adapter.plain_bytes()).sum();
    let originals = |target: &Touched<'_>| {
        after.nnz(target.name) * target.tensor.info.dtype.bitsize() as u64 / 8 + target.layout.n_rows() / 4
    };
    adapters + 2 * touched.iter().map(originals).sum::<u64>()
}

/// Lets a finished shard appear.
fn give_name(part: &Path, path: &Path) -> Result<(), MergeError> {
    fs::rename(part, path).map_err(|e| CheckpointError::io("create", path, e))?;
    Ok(sync_folder(folder_of(path))?)
}

/// The output under its temporary name; gone when dropped before [`Output::commit`].
pub(super) enum Output {
    /// A checkpoint's folder.
    Folder(AtomicDir),
    /// A single file and its ledger, in a temporary folder beside their place.
    File(tempfile::TempDir),
}

impl Output {
    /// `plan` says what the output will be, for a later run to compare.
    pub(super) fn create(
        target: &Target<'_>,
        is_file: bool,
        plan: impl FnOnce() -> String,
    ) -> Result<Self, MergeError> {
        if !is_file {
            return Ok(Self::Folder(match target.resume {
                true => AtomicDir::create_resumable(target.path, target.existing, &plan())?,
                false => AtomicDir::create(target.path, target.existing)?,
            }));
        }
        match target.path.symlink_metadata() {
            Ok(meta) if target.existing == Existing::Keep || !meta.is_file() => {
                return Err(CheckpointError::OutputExists { path: target.path.to_owned() }.into());
            }
            _ => {}
        }
        let folder = tempfile::Builder::new().prefix(".neuroada-").tempdir_in(folder_of(target.path));
        Ok(Self::File(folder.map_err(|e| CheckpointError::io("create", target.path, e))?))
    }

    /// What becomes the checkpoint.
    pub(super) fn root(&self) -> PathBuf {
        match self {
            Self::Folder(output) => output.path().to_owned(),
            Self::File(folder) => folder.path().join("model.safetensors"),
        }
    }

    /// Removes what was written, for good.
    fn discard(self) {
        if let Self::Folder(output) = self {
            output.discard();
        }
    }

    /// Lets the output appear.
    pub(super) fn commit(self, state: &StateFolder, target: &Target<'_>) -> Result<(), MergeError> {
        match self {
            Self::Folder(output) => Ok(output.commit()?),
            Self::File(folder) => commit_file(&folder.path().join("model.safetensors"), state, target),
        }
    }
}

/// Lets a single file and its ledger appear, the ledger first: a file without its ledger could not be undone.
fn commit_file(file: &Path, state: &StateFolder, target: &Target<'_>) -> Result<(), MergeError> {
    let final_state = StateFolder::at(target.path, Layout::File);
    let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| CheckpointError::io("create", to, e));
    if final_state.path().exists() {
        if target.existing == Existing::Keep {
            return Err(CheckpointError::OutputExists { path: final_state.path().to_owned() }.into());
        }
        fs::remove_dir_all(final_state.path()).map_err(|e| CheckpointError::io("remove", final_state.path(), e))?;
    }
    if state.path().exists() {
        rename(state.path(), final_state.path())?;
    }
    rename(file, target.path)?;
    Ok(sync_folder(folder_of(target.path))?)
}

/// Everything that the output's bytes depend on: the input's files as they are, and the adapters before and after.
fn plan(change: &Change<'_>) -> String {
    let mut plan = String::new();
    for shard in change.checkpoint.shards() {
        plan += &format!("shard {:?}: {}\n", shard.file_name(), shard.stamp());
    }
    for (when, stack) in [("before", change.before), ("after", change.after)] {
        for (id, scale) in stack.entries() {
            plan += &format!("{when} {id} {:016x}\n", scale.to_bits());
        }
    }
    plan
}

/// The output must not be the input under another name, nor inside it.
pub(super) fn refuse_same_place(checkpoint: &Checkpoint, output: &Path) -> Result<(), MergeError> {
    let input = checkpoint.root().canonicalize().map_err(|e| CheckpointError::io("open", checkpoint.root(), e))?;
    // What does not exist yet is judged by the folder it will lie in.
    let real = output.canonicalize().or_else(|_| folder_of(output).canonicalize());
    let real = real.map_err(|e| CheckpointError::io("open", folder_of(output), e))?;
    let refused = |what: &str| Err(MergeError::Refused { path: output.to_owned(), what: what.to_owned() });
    if same_file(&real, &input) {
        if output.exists() {
            return refused("the output is the input; merge in place instead");
        }
        return refused("the output would lie inside the input");
    }
    if checkpoint.layout() != Layout::File && real.starts_with(&input) {
        return refused("the output would lie inside the input");
    }
    if checkpoint.shards().iter().any(|shard| same_file(shard.path(), &real)) {
        return refused("the output is one of the input's files");
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
