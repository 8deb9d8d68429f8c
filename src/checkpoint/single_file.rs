//! A checkpoint of one file with its ledger; both are replaced together.
//!
//! Two names cannot change in one step, so the change is marked. First the new state folder, which contains the mark
//! `replacing`, is exchanged for the old one. Then the new file is renamed into place; this is the commit. Then the
//! mark is removed. While the mark exists, opening the file reports that recovery is needed. Whether the new file
//! still has its temporary name tells which of the two states it is.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    CheckpointError, EntryKind, Existing, Layout, OutputKind, OwnFolder, StateFolder, atomic_file::temporary_name,
    check_output, folder_of, output_dir::Partial, probe, state_folder::is_own_entry, sync_folder, write_own,
};

/// The new file's name in its temporary folder.
const FILE: &str = "model.safetensors";
/// The old state folder's name there, on file systems that cannot exchange two folders.
const ASIDE: &str = "aside";

/// A file and its state folder under temporary names; removed if dropped before [`SingleFile::commit`].
pub struct SingleFile {
    target: PathBuf,
    existing: Existing,
    partial: Partial,
    /// The state folder of the target.
    state: StateFolder,
}

impl SingleFile {
    /// Starts a checkpoint that will appear at `target`.
    ///
    /// # Errors
    /// Everything that [`check_output`] refuses; a state folder with files of others; another run that is writing the
    /// same output.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        let is_replaced = check_output(target, OutputKind::Checkpoint, existing)?;
        let mut partial = Partial::lock(target, "partial")?;
        let state = StateFolder::at(target, Layout::File)?;
        let is_marked = state.folder().has(StateFolder::REPLACING)? || stepped_aside(&partial.folder)?;
        if is_marked && is_replaced {
            // Recovery needs the contents of the temporary folder.
            partial.stays = true;
            return Err(CheckpointError::Interrupted { path: target.to_owned() });
        }
        let foreign = foreign_entries(state.folder(), Path::new(""))?;
        if !foreign.is_empty() {
            return Err(CheckpointError::ForeignEntries { path: state.path().to_owned(), entries: foreign });
        }
        if is_marked {
            // Leftovers of a run that was interrupted before the file had its name.
            state.folder().remove_all()?;
        }
        partial.clear()?;
        if existing == Existing::Keep && state.folder().open()?.is_some() {
            return Err(CheckpointError::OutputExists { path: state.path().to_owned() });
        }
        Ok(Self { target: target.to_owned(), existing, partial, state })
    }

    /// The file under its temporary name; its state folder is next to it.
    pub fn root(&self) -> PathBuf {
        self.partial.path().join(FILE)
    }

    /// Moves file and state folder into place.
    ///
    /// # Errors
    /// As [`super::AtomicDir::commit`].
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        check_output(&self.target, OutputKind::Checkpoint, self.existing)?;
        let new = StateFolder::at(&self.root(), Layout::File)?;
        let (has_new, has_old) = (new.folder().open()?.is_some(), self.state.folder().open()?.is_some());
        if !has_new && !has_old {
            self.rename_into_place()?;
            self.partial.stays = false;
            let synced = sync_folder(folder_of(&self.target));
            return synced.map_err(|e| e.after_commit(&self.target, "sync the folder of"));
        }
        new.folder().create()?;
        write_mark(&new, &self.root())?;
        // From here on, recovery needs the contents of the temporary folder.
        self.partial.stays = true;
        let interrupted = || CheckpointError::Interrupted { path: self.target.clone() };
        if let Err(e) = self.exchange(&new, has_old).and_then(|()| self.rename_into_place()) {
            self.undo_exchange().map_err(|_| interrupted())?;
            self.partial.stays = false;
            return Err(e);
        }
        // The mark may be removed only when the new name is durable.
        sync_folder(folder_of(&self.target)).map_err(|_| interrupted())?;
        let finished = finish(&self.state, has_new);
        if finished.is_err() && self.state.is_interrupted().unwrap_or(true) {
            return Err(interrupted());
        }
        self.partial.stays = false;
        finished.map_err(|e| e.after_commit(&self.target, "finish the replacement of"))
    }

    /// Restores the old state folder after the new one has replaced it.
    fn undo_exchange(&self) -> Result<(), CheckpointError> {
        match self.state.folder().has(StateFolder::REPLACING)? || stepped_aside(&self.partial.folder)? {
            true => roll_back(&self.partial, &self.state),
            false => Ok(()),
        }
    }

    fn exchange(&self, new: &StateFolder, has_old: bool) -> Result<(), CheckpointError> {
        let (new, old) = (new.folder(), self.state.folder());
        let done = if has_old { new.exchange(old)? } else { new.move_to(old)? };
        if !done && has_old {
            // File systems without exchange: move the old one aside first.
            let aside = self.partial.path().join(ASIDE);
            fs::rename(old.path(), &aside).map_err(|e| CheckpointError::io("rename", old.path(), e))?;
        }
        if !done {
            fs::rename(new.path(), old.path()).map_err(|e| CheckpointError::io("create", old.path(), e))?;
        }
        if !done && has_old {
            let aside = self.partial.path().join(ASIDE);
            fs::rename(&aside, new.path()).map_err(|e| CheckpointError::io("rename", &aside, e))?;
        }
        sync_folder(folder_of(&self.target))
    }

    fn rename_into_place(&self) -> Result<(), CheckpointError> {
        let io = |e: Errno| CheckpointError::io("create", &self.target, e.into());
        let from = self.root();
        if self.existing == Existing::Replace {
            check_output(&self.target, OutputKind::Checkpoint, self.existing)?;
            return fs::rename(&from, &self.target).map_err(|e| CheckpointError::io("create", &self.target, e));
        }
        match renameat_with(CWD, &from, CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => Err(CheckpointError::OutputExists { path: self.target.clone() }),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(&from, &self.target).map_err(|e| CheckpointError::io("create", &self.target, e))?;
                fs::remove_file(&from).map_err(|e| CheckpointError::io("remove", &from, e))
            }
            renamed => renamed.map_err(io),
        }
    }
}

/// Marks a state folder as being moved into place, with the stamp of the new file.
fn write_mark(state: &StateFolder, file: &Path) -> Result<(), CheckpointError> {
    write_own(state.folder(), StateFolder::REPLACING, stamp(&probe::existing(file)?).as_bytes())
}

/// Distinguishes the new file from the old one, wherever both are moved.
fn stamp(meta: &fs::Metadata) -> String {
    format!("{} bytes, modified {}.{:09}\n", meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// Fails if the file is not the one that the mark describes.
fn prove_mark(state: &StateFolder, target: &Path) -> Result<(), CheckpointError> {
    let mark = state.folder().read(StateFolder::REPLACING, 4096)?;
    if mark.as_deref() == Some(stamp(&probe::existing(target)?).as_bytes()) {
        return Ok(());
    }
    let what = "a replacement of the file was interrupted, and the temporary folder that held the rest of it is gone: whether this \
                is the ledger of the file is not known. Nothing was deleted; merge again from the base";
    Err(CheckpointError::bad_file(&state.path().join(StateFolder::REPLACING), what))
}

/// Removes the mark, and also the state folder if the new file has none.
fn finish(state: &StateFolder, is_kept: bool) -> Result<(), CheckpointError> {
    match is_kept {
        true => {
            state.folder().remove(StateFolder::REPLACING)?;
            state.folder().sync()
        }
        false => {
            state.folder().remove_all()?;
            state.folder().sync_above()
        }
    }
}

/// Whether the old state folder was moved aside, into the temporary folder of a replacement.
fn stepped_aside(partial: &OwnFolder) -> Result<bool, CheckpointError> {
    Ok(partial.inside(ASIDE).open()?.is_some())
}

/// The temporary folder of the single file at `target`.
fn temporary_folder(target: &Path) -> Result<OwnFolder, CheckpointError> {
    OwnFolder::at(&target.with_file_name(temporary_name(target.file_name().unwrap_or_default(), "partial")))
}

/// Whether a replacement of the single file at `target` must be recovered although its state folder does not show it.
pub(super) fn is_without_state(target: &Path) -> Result<bool, CheckpointError> {
    stepped_aside(&temporary_folder(target)?)
}

/// Restores the old state folder.
fn roll_back(partial: &Partial, state: &StateFolder) -> Result<(), CheckpointError> {
    let old = StateFolder::at(&partial.path().join(FILE), Layout::File)?;
    if stepped_aside(&partial.folder)? {
        state.folder().remove_all()?;
        let aside = partial.path().join(ASIDE);
        fs::rename(&aside, state.path()).map_err(|e| CheckpointError::io("rename", &aside, e))?;
    } else if old.folder().open()?.is_none() {
        state.folder().remove_all()?;
    } else if !old.folder().exchange(state.folder())? {
        state.folder().remove_all()?;
        fs::rename(old.path(), state.path()).map_err(|e| CheckpointError::io("rename", old.path(), e))?;
    }
    state.folder().sync_above()
}

/// Finishes or rolls back the replacement of the single file at `target`. Returns `None` if none was interrupted,
/// otherwise whether it was finished.
///
/// # Errors
/// Another run that is writing it; a failed rename, after which recovery can be repeated. [`CheckpointError::BadFile`]
/// if the temporary folder was removed and the file is not the new one.
pub fn recover_single_file(target: &Path) -> Result<Option<bool>, CheckpointError> {
    let state = StateFolder::at(target, Layout::File)?;
    let temporary = temporary_folder(target)?;
    if !state.folder().has(StateFolder::REPLACING)? && !stepped_aside(&temporary)? {
        return Ok(None);
    }
    if temporary.open()?.is_none() {
        prove_mark(&state, target)?;
    }
    let mut partial = Partial::lock(target, "partial")?;
    partial.stays = true;
    let is_pending = partial.folder.has(FILE)?;
    if is_pending {
        roll_back(&partial, &state)?;
    } else {
        let is_kept = state.remembers()?;
        finish(&state, is_kept)?;
    }
    partial.stays = false;
    Ok(Some(!is_pending))
}

/// Entries of a state folder that do not belong to this program.
fn foreign_entries(folder: &OwnFolder, below: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut foreign = Vec::new();
    for (name, kind) in folder.entries()? {
        let path = below.join(&name);
        match kind {
            EntryKind::Folder => foreign.extend(foreign_entries(&folder.inside(&name.to_string_lossy()), &path)?),
            EntryKind::File if is_own_entry(&path) => {}
            _ => foreign.push(super::Printable::path(&path)),
        }
    }
    Ok(foreign)
}

/// Whether the single file at `path` has a ledger of a merge.
pub(super) fn remembers_merge(path: &Path) -> Result<bool, CheckpointError> {
    let state = StateFolder::at(path, Layout::File)?;
    Ok(probe::is_present(state.path())? && state.remembers()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(output: &SingleFile, text: &str) {
        fs::write(output.root(), text).unwrap();
        let state = StateFolder::at(&output.root(), Layout::File).unwrap();
        state.create().unwrap();
        fs::write(state.path().join("ledger"), format!("of {text}")).unwrap();
    }

    fn found(target: &Path) -> (String, String) {
        let state = StateFolder::at(target, Layout::File).unwrap();
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        (read(target), read(&state.path().join("ledger")))
    }

    #[test]
    fn a_file_and_its_ledger_are_replaced_together() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.safetensors");
        for text in ["one", "two"] {
            let existing = if text == "one" { Existing::Keep } else { Existing::Replace };
            let output = SingleFile::create(&target, existing).unwrap();
            write(&output, text);
            output.commit().unwrap();
            assert_eq!(found(&target), (text.to_owned(), format!("of {text}")));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
        assert!(matches!(SingleFile::create(&target, Existing::Keep), Err(CheckpointError::OutputExists { .. })));
        let output = SingleFile::create(&target, Existing::Replace).unwrap();
        fs::write(output.root(), "three").unwrap();
        output.commit().unwrap();
        assert_eq!(found(&target), ("three".to_owned(), String::new()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_interrupted_replacement_is_recovered_to_old_or_new() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.safetensors");
        let output = SingleFile::create(&target, Existing::Keep).unwrap();
        write(&output, "old");
        output.commit().unwrap();
        for is_named in [false, true] {
            let mut output = SingleFile::create(&target, Existing::Replace).unwrap();
            write(&output, "new");
            let new = StateFolder::at(&output.root(), Layout::File).unwrap();
            write_mark(&new, &output.root()).unwrap();
            output.exchange(&new, true).unwrap();
            if is_named {
                output.rename_into_place().unwrap();
            }
            // Interrupted here.
            output.partial.stays = true;
            drop(output);
            assert!(StateFolder::at(&target, Layout::File).unwrap().is_interrupted().unwrap());
            // The next run must not remove anything.
            let error = SingleFile::create(&target, Existing::Replace).err().unwrap();
            assert!(matches!(error, CheckpointError::Interrupted { .. }), "{error}");
            assert_eq!(recover_single_file(&target).unwrap(), Some(is_named));
            let text = if is_named { "new" } else { "old" };
            assert_eq!(found(&target), (text.to_owned(), format!("of {text}")));
            assert_eq!(recover_single_file(&target).unwrap(), None);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_state_folder_that_was_moved_aside_is_restored() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.safetensors");
        let output = SingleFile::create(&target, Existing::Keep).unwrap();
        write(&output, "old");
        output.commit().unwrap();
        // On file systems that cannot exchange: interrupted with the old one aside, and with the new one in its place.
        for is_placed in [false, true] {
            let mut output = SingleFile::create(&target, Existing::Replace).unwrap();
            write(&output, "new");
            let new = StateFolder::at(&output.root(), Layout::File).unwrap();
            write_mark(&new, &output.root()).unwrap();
            fs::rename(output.state.path(), output.partial.path().join(ASIDE)).unwrap();
            if is_placed {
                fs::rename(new.path(), output.state.path()).unwrap();
            }
            output.partial.stays = true;
            drop(output);
            assert!(is_without_state(&target).unwrap());
            let error = SingleFile::create(&target, Existing::Replace).err().unwrap();
            assert!(matches!(error, CheckpointError::Interrupted { .. }), "{error}");
            assert_eq!(recover_single_file(&target).unwrap(), Some(false));
            assert_eq!(found(&target), ("old".to_owned(), "of old".to_owned()));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn without_the_temporary_folder_the_file_itself_must_be_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.safetensors");
        fs::write(&target, "new").unwrap();
        let state = StateFolder::at(&target, Layout::File).unwrap();
        state.create().unwrap();
        fs::write(state.path().join("ledger"), "of new").unwrap();
        write_mark(&state, &target).unwrap();
        fs::write(&target, "another").unwrap();
        let error = recover_single_file(&target).unwrap_err();
        assert!(error.to_string().contains("is gone"), "{error}");
        assert!(state.is_interrupted().unwrap() && fs::read_dir(dir.path()).unwrap().count() == 2);
        write_mark(&state, &target).unwrap();
        assert_eq!(recover_single_file(&target).unwrap(), Some(true));
        assert_eq!(found(&target), ("another".to_owned(), "of new".to_owned()));
    }

    #[test]
    fn files_of_others_in_a_state_folder_stay() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.safetensors");
        fs::create_dir(dir.path().join("m.safetensors.neuroada")).unwrap();
        fs::write(dir.path().join("m.safetensors.neuroada/thesis.tex"), "x").unwrap();
        let error = SingleFile::create(&target, Existing::Replace).err().unwrap().to_string();
        assert!(error.ends_with(":\n  thesis.tex"), "{error}");
    }
}
