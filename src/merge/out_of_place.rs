//! A new checkpoint of the same layout: shards copied, the touched ones patched, side files brought along.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{
    MergeError, MergeReport,
    apply::{judge, report},
    change::{Change, Touched, patch},
    in_place::copy_adapter,
    ledger::LedgerWriter,
    stack::Stack,
    state::{StateFolder, remove_file},
};
use crate::checkpoint::{
    AtomicDir, Checkpoint, CheckpointError, Context, CopyMode, Existing, Layout, check_free_space, copy_file,
    folder_of, sync_folder,
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
    let is_file = checkpoint.layout() == Layout::File;
    let output = Output::create(target, is_file, || plan(&change))?;
    let root = output.root();
    let state = StateFolder::at(&root, checkpoint.layout());
    state.create()?;
    let mut writer = LedgerWriter::create(&state.ledger(), &after.entries())?;
    let findings = change.examine(ctx, &touched, Some(&mut writer))?;
    judge(&change, &findings)?;
    let mut report = report(&change, &touched, &findings);
    let adapter_bytes = after.active.iter().map(|active| active.adapter.n_bytes()).sum::<u64>();
    check_free_space(folder_of(target.path), checkpoint.n_bytes() + 2 * writer.n_bytes() + adapter_bytes)?;

    for active in &after.active {
        copy_adapter(active.adapter.path(), &state.adapter(&active.id))?;
    }
    writer.finish(ctx)?;
    let after = Stack::open_ledger(ctx, &state, &state.ledger())?;
    let shard_path = |name: String| if is_file { root.clone() } else { root.join(name) };
    for (index, shard) in checkpoint.shards().iter().enumerate() {
        let path = shard_path(shard.file_name());
        // Shards get their names when they are finished: what has one was finished by an earlier run of the same plan.
        if path.exists() {
            continue;
        }
        let of_shard: Vec<Touched<'_>> =
            touched.iter().filter(|target| target.tensor.shard_index == index).copied().collect();
        let part = path.with_extension("part");
        remove_file(&part)?;
        ctx.observer.begin("copying", shard.file_bytes());
        let mode = if target.link && of_shard.is_empty() { CopyMode::Link } else { CopyMode::Auto };
        copy_file(ctx, shard.path(), &part, mode)?;
        if !of_shard.is_empty() {
            let file = File::options().read(true).write(true).open(&part);
            let file = file.map_err(|e| CheckpointError::io("open for writing", &part, e))?;
            let mut files: Vec<Option<File>> = checkpoint.shards().iter().map(|_| None).collect();
            files[index] = Some(file);
            patch(ctx, &of_shard, &files, before, &after)?;
        }
        fs::rename(&part, &path).map_err(|e| CheckpointError::io("create", &path, e))?;
        sync_folder(folder_of(&path))?;
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

/// The output under its temporary name; gone when dropped before [`Output::commit`].
enum Output {
    /// A checkpoint's folder.
    Folder(AtomicDir),
    /// A single file and its ledger, in a temporary folder beside their place.
    File(tempfile::TempDir),
}

impl Output {
    /// `plan` says what the output will be, for a later run to compare.
    fn create(target: &Target<'_>, is_file: bool, plan: impl FnOnce() -> String) -> Result<Self, MergeError> {
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
    fn root(&self) -> PathBuf {
        match self {
            Self::Folder(output) => output.path().to_owned(),
            Self::File(folder) => folder.path().join("model.safetensors"),
        }
    }

    /// Lets the output appear.
    fn commit(self, state: &StateFolder, target: &Target<'_>) -> Result<(), MergeError> {
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
fn refuse_same_place(checkpoint: &Checkpoint, output: &Path) -> Result<(), MergeError> {
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
