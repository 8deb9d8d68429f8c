//! Folders that are written atomically: they appear complete or not at all.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    CheckpointError, EntryKind, Existing, FileId, Layout, OutputKind, OwnFolder, STATE_FOLDER, StateFolder,
    atomic_file::temporary_name,
    check_output, folder_of,
    lock::{LockAttempt, try_lock, unlock},
    probe,
    state_folder::is_own_entry,
    sync_folder, write_atomic,
};

/// A folder under a temporary name next to its target; removed if dropped before [`AtomicDir::commit`].
///
/// The temporary name, `.NAME.neuroada-partial`, is the same in every run and locked: the next run removes what a
/// crash left, and two runs cannot share it.
pub struct AtomicDir {
    target: PathBuf,
    existing: Existing,
    partial: Partial,
    /// Whether the contents are kept for a later run if this one fails.
    resumable: bool,
}

impl AtomicDir {
    /// Describes the result of a resumable folder; a later run continues only with an identical plan.
    pub(crate) const PLAN_FILE: &str = ".plan";

    /// Starts a folder that will appear at `target`.
    ///
    /// # Errors
    /// Everything that [`check_output`] refuses; another run that is writing the same output.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        check_output(target, OutputKind::Folder, existing)?;
        let partial = Partial::lock(target, "partial")?;
        partial.clear()?;
        Ok(Self { target: target.to_owned(), existing, partial, resumable: false })
    }

    /// The same, but if this run fails, the contents are kept, and a later run with the same `plan` finds them.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_resumable(target: &Path, existing: Existing, plan: &str) -> Result<Self, CheckpointError> {
        check_output(target, OutputKind::Folder, existing)?;
        let mut partial = Partial::lock(target, "partial")?;
        let found = partial.folder.read(AtomicDir::PLAN_FILE, 1 << 30)?;
        if found.as_deref() != Some(plan.as_bytes()) {
            partial.clear()?;
            write_atomic(&partial.path().join(AtomicDir::PLAN_FILE), Existing::Replace, plan.as_bytes())?;
        }
        partial.stays = true;
        Ok(Self { target: target.to_owned(), existing, partial, resumable: true })
    }

    /// The folder, under its temporary name.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// Removes the folder, resumable or not, because its contents are useless to any run.
    pub fn discard(mut self) {
        self.partial.stays = false;
    }

    /// Creates the new file `name` in the folder.
    /// [`CheckpointError::Io`], also if it exists.
    /// # Errors
    /// [`CheckpointError::Io`], also if it exists.
    pub fn create_file(&self, name: &str) -> Result<File, CheckpointError> {
        super::create_new_file(&self.path().join(name))
    }

    /// Fails if the folder to be replaced contains anything except files that this program wrote and the names
    /// `planned` for the new folder. Called before the work starts; [`Self::commit`] checks again.
    ///
    /// # Errors
    /// [`CheckpointError::ForeignEntries`] lists the other entries.
    /// [`CheckpointError::ForeignEntries`] lists the other entries.
    pub fn check_replaced(&self, planned: &BTreeSet<PathBuf>) -> Result<(), CheckpointError> {
        match probe::is_present(&self.target)? {
            true => refuse_foreign(&self.target, &self.target, planned),
            false => Ok(()),
        }
    }

    /// The files in the folder so far, as relative paths, without hidden entries at its top.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn files(&self) -> Result<BTreeSet<PathBuf>, CheckpointError> {
        let mut files = tree(self.path())?;
        files.retain(|file| !file.to_string_lossy().starts_with('.'));
        Ok(files)
    }

    /// Renames the folder into place, atomically; its files must have been synced by their writers.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`] if the target appeared in the meantime and must be kept;
    /// [`CheckpointError::ForeignEntries`]; [`CheckpointError::Committed`] if the folder is in place and a later step
    /// failed.
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        let is_replaced = check_output(&self.target, OutputKind::Folder, self.existing)?;
        if self.resumable {
            self.partial.folder.remove(AtomicDir::PLAN_FILE)?;
        }
        let names = tree(self.path())?;
        if is_replaced {
            refuse_foreign(&self.target, &self.target, &names)?;
        }
        sync_tree(self.path())?;
        if is_replaced {
            self.exchange()?;
        } else {
            self.rename_into_place()?;
        }
        // Whatever has the temporary name now is removed below.
        self.partial.stays = true;
        sync_folder(folder_of(&self.target)).map_err(|e| e.after_commit(&self.target, "sync the folder of"))?;
        if is_replaced {
            // Files that were added to the old folder in the meantime are kept, with that folder.
            let removed = match refuse_foreign(self.path(), &self.target, &names) {
                Ok(()) => self.partial.folder.remove_all(),
                Err(e) => Err(self.put_aside().err().unwrap_or(e)),
            };
            let what = "remove the replaced folder, now under a temporary name next to";
            removed.map_err(|e| e.after_commit(&self.target, what))?;
        }
        Ok(())
    }

    /// Swaps the new and the old folder atomically; the old one gets the temporary name.
    fn exchange(&self) -> Result<(), CheckpointError> {
        match renameat_with(CWD, self.path(), CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(CheckpointError::io("create", &self.target, e.into())),
        }
        // File systems without exchange: move the old folder aside, and back if the new one cannot be moved in.
        let name = self.target.file_name().expect("outputs have names");
        let aside = self.target.with_file_name(temporary_name(name, "replaced"));
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| CheckpointError::io("create", to, e));
        rename(&self.target, &aside)?;
        if let Err(e) = rename(self.path(), &self.target) {
            rename(&aside, &self.target)?;
            return Err(e);
        }
        rename(&aside, self.path())
            .map_err(|e| e.after_commit(&self.target, "remove the replaced folder, now under another name next to"))
    }

    /// Moves the old folder, to which others have added files, to a name that no run cleans up.
    fn put_aside(&self) -> Result<(), CheckpointError> {
        let name = self.target.file_name().expect("outputs have names");
        let aside = OwnFolder::at(&self.target.with_file_name(temporary_name(name, "replaced")))?;
        match self.partial.folder.move_to(&aside)? {
            true => sync_folder(folder_of(&self.target)),
            false => Ok(()),
        }
    }

    fn rename_into_place(&self) -> Result<(), CheckpointError> {
        match renameat_with(CWD, self.path(), CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => Err(CheckpointError::OutputExists { path: self.target.clone() }),
            // File systems that do not support the flag; renaming a folder never replaces a non-empty folder.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::rename(self.path(), &self.target).map_err(|e| CheckpointError::io("create", &self.target, e))
            }
            renamed => renamed.map_err(|e| CheckpointError::io("create", &self.target, e.into())),
        }
    }
}

/// A temporary folder next to an output for intermediate files; removed on drop.
///
/// Its name, `.NAME.neuroada-work`, is the same in every run and locked: the next run on the same output removes what
/// a killed run left.
pub struct WorkFolder(Partial);

impl WorkFolder {
    /// Creates the work folder of the output at `target`.
    ///
    /// # Errors
    /// Another run on the same output; the folder cannot be created.
    pub fn beside(target: &Path) -> Result<Self, CheckpointError> {
        let folder = Partial::lock(target, "work")?;
        folder.clear()?;
        Ok(Self(folder))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// The locked temporary folder of an output; removed on drop, unless it is kept.
pub(super) struct Partial {
    pub(super) folder: OwnFolder,
    pub(super) stays: bool,
    lock: File,
}

impl Partial {
    /// Locks the temporary folder of an output and creates it if necessary; the contents that a previous run left are
    /// kept.
    pub(super) fn lock(target: &Path, suffix: &str) -> Result<Self, CheckpointError> {
        let Some(name) = target.file_name() else {
            let what = "not a valid name for an output".to_owned();
            return Err(CheckpointError::Refused { path: target.to_owned(), what });
        };
        let folder = OwnFolder::at(&target.with_file_name(temporary_name(name, suffix)))?;
        let refused = |what: &str| CheckpointError::Refused { path: target.to_owned(), what: what.to_owned() };
        loop {
            let is_new = folder.open()?.is_none();
            folder.create()?;
            let Some(lock) = folder.open()?.map(File::from) else { continue };
            match try_lock(&lock) {
                LockAttempt::Locked => {}
                LockAttempt::Held => return Err(refused("another run is writing it")),
                // Without locks, only a folder that we created is certainly ours.
                LockAttempt::Unsupported if is_new => {}
                LockAttempt::Unsupported => {
                    let path = super::Printable::path(folder.path());
                    return Err(refused(&format!(
                        "{path} exists, and this file system has no locks to tell whether a run is still writing it; remove it"
                    )));
                }
                LockAttempt::Failed(e) => return Err(CheckpointError::io("lock", folder.path(), e)),
            }
            // Between opening and locking, the previous owner may have finished or given up.
            let opened = lock.metadata().map_err(|e| CheckpointError::io("examine", folder.path(), e))?;
            let found = probe::link_metadata(folder.path())?;
            if found.is_some_and(|found| FileId::of(&found) == FileId::of(&opened)) {
                return Ok(Self { folder, stays: false, lock });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes everything inside.
    pub(super) fn clear(&self) -> Result<(), CheckpointError> {
        for (name, kind) in self.folder.entries()? {
            let name = name.to_string_lossy();
            match kind {
                EntryKind::Folder => self.folder.inside(&name).remove_all()?,
                _ => self.folder.remove(&name)?,
            }
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.stays {
            // A failure here cannot be handled; the next run removes the leftovers.
            let _left_behind = self.folder.remove_all();
        }
        unlock(&self.lock);
    }
}

/// Fails if the folder `old` contains anything except files that this program wrote and the entries of `new`; `display_path`
/// is its path in messages.
fn refuse_foreign(old: &Path, display_path: &Path, new: &BTreeSet<PathBuf>) -> Result<(), CheckpointError> {
    let known = StateFolder::at(old, Layout::Folder)?.list()?;
    // A file that was modified since, or has a listed name by coincidence, belongs to the user.
    let mut unchanged = BTreeSet::new();
    for (path, n_bytes) in known {
        if probe::link_metadata(&old.join(&path))?.is_some_and(|meta| meta.len() == n_bytes) {
            unchanged.insert(path);
        }
    }
    let is_known = |path: &Path| {
        new.contains(path)
            || unchanged.contains(path)
            || path.strip_prefix(STATE_FOLDER).is_ok_and(is_own_entry)
            || (path == Path::new(AtomicDir::PLAN_FILE))
    };
    let foreign: BTreeSet<String> = tree(old)?
        .into_iter()
        .filter(|path| !is_known(path))
        .map(|path| {
            // For a folder that is foreign as a whole, its name suffices.
            let top = path.iter().next().map(PathBuf::from).unwrap_or_default();
            let is_shared = top == path || new.iter().chain(&unchanged).any(|other| other.starts_with(&top));
            let shown = if is_shared || top == Path::new(STATE_FOLDER) { path } else { top.join("") };
            super::Printable::path(&shown)
        })
        .collect();
    if foreign.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::ForeignEntries { path: display_path.to_owned(), entries: foreign.into_iter().collect() })
}

/// Everything in a folder, empty folders included, as relative paths. Links are not followed.
fn tree(folder: &Path) -> Result<BTreeSet<PathBuf>, CheckpointError> {
    let mut found = BTreeSet::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let entries = probe::entries(&folder.join(&below))?;
        // The state folder may be empty, which means nothing.
        if entries.is_empty() && below != Path::new("") && !below.starts_with(STATE_FOLDER) {
            found.insert(below.clone());
        }
        for (name, kind) in entries {
            let path = below.join(name);
            match kind {
                EntryKind::Folder => waiting.push(path),
                _ => _ = found.insert(path),
            }
        }
    }
    Ok(found)
}

/// Syncs a folder and all folders inside it.
fn sync_tree(folder: &Path) -> Result<(), CheckpointError> {
    for (name, kind) in probe::entries(folder)? {
        if kind == EntryKind::Folder {
            sync_tree(&folder.join(name))?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_folder_appears_at_commit_and_leaves_nothing_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let output = AtomicDir::create(&target, Existing::Keep).unwrap();
        fs::write(output.path().join("model.safetensors"), b"x").unwrap();
        assert!(!target.exists());
        let second = AtomicDir::create(&target, Existing::Keep).err().unwrap().to_string();
        assert!(second.ends_with("another run is writing it"), "{second}");
        output.commit().unwrap();
        assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), b"x");
        assert!(matches!(AtomicDir::create(&target, Existing::Keep), Err(CheckpointError::OutputExists { .. })));
        drop(AtomicDir::create(&target, Existing::Replace).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn files_of_others_are_listed_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir_all(target.join("checkpoint-500")).unwrap();
        for file in ["model.safetensors", "thesis.tex", "checkpoint-500/optimizer.pt", "checkpoint-500/x"] {
            fs::write(target.join(file), b"old").unwrap();
        }
        fs::create_dir_all(dir.path().join(".out.neuroada-partial/a")).unwrap();
        let write = || {
            let output = AtomicDir::create(&target, Existing::Replace).unwrap();
            assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
            fs::write(output.path().join("model.safetensors"), b"new").unwrap();
            output
        };
        let output = write();
        let early = output.check_replaced(&BTreeSet::from(["model.safetensors".into()])).unwrap_err();
        let error = output.commit().unwrap_err();
        assert_eq!(error.to_string(), early.to_string());
        assert!(error.to_string().ends_with(":\n  checkpoint-500/\n  thesis.tex"), "{error}");
        assert_eq!(fs::read(target.join("thesis.tex")).unwrap(), b"old");

        // With these files listed as written by this program, all of them are replaced.
        let state = StateFolder::at(&target, Layout::Folder).unwrap();
        state.create().unwrap();
        let files = ["thesis.tex", "checkpoint-500/optimizer.pt", "checkpoint-500/x"];
        state.write_list(&files.iter().map(PathBuf::from).collect()).unwrap();
        write().commit().unwrap();
        assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), b"new");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_in_the_place_of_the_temporary_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("thesis.tex"), b"x").unwrap();
        symlink(&victim, dir.path().join(".out.neuroada-partial")).unwrap();
        let error = AtomicDir::create(&dir.path().join("out"), Existing::Keep).err().unwrap();
        assert!(error.to_string().contains("is a link"), "{error}");
        assert!(victim.join("thesis.tex").exists());
    }
}
