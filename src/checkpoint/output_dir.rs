//! Folders that appear whole or not at all.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::{CheckpointError, Existing, INDEX_FILE, folder_of, lock::unlock, sync_folder, write_atomic};

/// A folder under a temporary name beside the place where it will appear; gone when dropped before [`AtomicDir::commit`].
///
/// The temporary name is the same in every run, `.NAME.neuroada-partial`, and locked: what a crash left behind is
/// removed by the next run, and two runs cannot share it.
pub struct AtomicDir {
    target: PathBuf,
    existing: Existing,
    temp: PathBuf,
    /// Held as long as the folder has its temporary name.
    lock: File,
    committed: bool,
    /// Whether what is in it stays for a later run when this one gives up.
    resumable: bool,
}

/// What a resumable folder is to become; a later run goes on with it only where this is the same.
const PLAN_FILE: &str = ".plan";
/// A folder that has one of these is a checkpoint's or an adapter's, and may be replaced where the user says so.
const KNOWN_FILES: [&str; 4] = ["model.safetensors", INDEX_FILE, "adapter_config.json", "positions.npy"];

impl AtomicDir {
    /// Begins a folder that will appear at `target`.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`] where it exists and must be kept; [`CheckpointError::Refused`] where it exists and is no
    /// checkpoint, or another run is writing it.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        let output = Self::lock(target, existing)?;
        clear(&output.temp)?;
        Ok(output)
    }

    /// The same, but what is in the folder when this run gives up stays, and a later run with the same `plan` finds it there.
    pub fn create_resumable(target: &Path, existing: Existing, plan: &str) -> Result<Self, CheckpointError> {
        let mut output = Self::lock(target, existing)?;
        let plan_file = output.temp.join(PLAN_FILE);
        if !fs::read_to_string(&plan_file).is_ok_and(|found| found == plan) {
            clear(&output.temp)?;
            write_atomic(&plan_file, Existing::Replace, plan.as_bytes())?;
        }
        output.resumable = true;
        Ok(output)
    }

    fn lock(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        check_target(target, existing)?;
        let name = target.file_name().ok_or_else(|| CheckpointError::Refused {
            path: target.to_owned(),
            what: "not a name that a folder can get".to_owned(),
        })?;
        let temp = target.with_file_name(format!(".{}.neuroada-partial", name.to_string_lossy()));
        let io = |e| CheckpointError::io("create", &temp, e);
        loop {
            match fs::create_dir(&temp) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                created => created.map_err(io)?,
            }
            let lock = File::open(&temp).map_err(io)?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                let what = "another run is writing it".to_owned();
                return Err(CheckpointError::Refused { path: target.to_owned(), what });
            }
            // Between opening and locking, its owner may have finished or given up.
            if !is_same(&lock, &temp) {
                continue;
            }
            let target = target.to_owned();
            return Ok(Self { target, existing, temp, lock, committed: false, resumable: false });
        }
    }

    /// The folder under its temporary name.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Removes the folder, resumable or not: what is in it is of no use to any run.
    pub fn discard(mut self) {
        self.resumable = false;
    }

    /// Lets the folder appear, in one step; its files were synced by whoever wrote them.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`] where the target came to exist meanwhile and must be kept.
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        check_target(&self.target, self.existing)?;
        if self.resumable {
            let plan = self.temp.join(PLAN_FILE);
            fs::remove_file(&plan).map_err(|e| CheckpointError::io("remove", &plan, e))?;
        }
        sync_tree(&self.temp)?;
        let io = |e: rustix::io::Errno| CheckpointError::io("create", &self.target, e.into());
        let exists = self.target.symlink_metadata().is_ok();
        if exists {
            // In one step the new one has the name and the old one the temporary name, to be removed with it.
            renameat_with(CWD, &self.temp, CWD, &self.target, RenameFlags::EXCHANGE).map_err(io)?;
            sync_folder(folder_of(&self.target))?;
            return remove_tree(&self.temp).inspect(|()| self.committed = true);
        }
        match renameat_with(CWD, &self.temp, CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(rustix::io::Errno::EXIST) => return Err(CheckpointError::OutputExists { path: self.target.clone() }),
            // File systems without the flag; renaming a folder never replaces a folder with something in it.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                fs::rename(&self.temp, &self.target).map_err(|e| CheckpointError::io("create", &self.target, e))?;
            }
            renamed => renamed.map_err(io)?,
        }
        self.committed = true;
        sync_folder(folder_of(&self.target))
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed && !self.resumable {
            // Nothing to be done about a failure here; the next run removes what is left.
            let _left_behind = remove_tree(&self.temp);
        }
        unlock(&self.lock);
    }
}

/// Whether `target` may be made, or replaced.
fn check_target(target: &Path, existing: Existing) -> Result<(), CheckpointError> {
    let Ok(meta) = target.symlink_metadata() else { return Ok(()) };
    if existing == Existing::Keep {
        return Err(CheckpointError::OutputExists { path: target.to_owned() });
    }
    let is_known = KNOWN_FILES.iter().any(|name| target.join(name).exists());
    let is_empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if meta.is_dir() && (is_known || is_empty()) {
        return Ok(());
    }
    let what = "exists and is the folder of no checkpoint and no adapter; it will not be replaced".to_owned();
    Err(CheckpointError::Refused { path: target.to_owned(), what })
}

fn is_same(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (open.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Removes everything inside a folder.
fn clear(folder: &Path) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("remove", folder, e);
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_dir() {
            remove_tree(&entry.path())?;
        } else {
            fs::remove_file(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}

fn remove_tree(folder: &Path) -> Result<(), CheckpointError> {
    fs::remove_dir_all(folder).map_err(|e| CheckpointError::io("remove", folder, e))
}

/// Syncs a folder and every folder inside it.
fn sync_tree(folder: &Path) -> Result<(), CheckpointError> {
    let io = |e| CheckpointError::io("list", folder, e);
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
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
    fn only_checkpoints_are_replaced_and_leftovers_are_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("thesis.tex"), b"x").unwrap();
        assert!(matches!(AtomicDir::create(&target, Existing::Replace), Err(CheckpointError::Refused { .. })));
        fs::write(target.join("model.safetensors"), b"old").unwrap();
        fs::create_dir_all(dir.path().join(".out.neuroada-partial/a")).unwrap();
        let output = AtomicDir::create(&target, Existing::Replace).unwrap();
        assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
        fs::write(output.path().join("model.safetensors"), b"new").unwrap();
        output.commit().unwrap();
        assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), b"new");
        assert!(!target.join("thesis.tex").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
