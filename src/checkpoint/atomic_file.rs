//! Files that are written atomically: they appear complete or not at all.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, openat, renameat, renameat_with, statat, unlinkat},
    io::Errno,
};

use super::{
    CheckpointError, EntryKind, OutputKind, check_output, folder_of,
    lock::{LockAttempt, try_lock, unlock},
    own_folder::OwnFolder,
};

/// What to do if the output exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Existing {
    /// Keep it and fail.
    #[default]
    Keep,
    /// Replace it, atomically.
    Replace,
}

/// A file under a temporary name in the target's folder; removed if dropped before [`AtomicFile::commit`].
///
/// The temporary name, `.NAME.neuroada-tmp`, is the same in every run and locked. The next run on the same output
/// reuses what a killed run left, and two runs cannot share it. The folder is opened once; no link below it is
/// followed.
pub struct AtomicFile {
    target: PathBuf,
    existing: Existing,
    folder: OwnedFd,
    name: OsString,
    temp: OsString,
    file: File,
    /// Whether a link of this name may be replaced.
    replaces_link: bool,
    /// Whether this is the program's own state: part of a larger operation, never its last step.
    is_own: bool,
    committed: bool,
}

impl AtomicFile {
    /// Starts a file that will appear at `target`.
    ///
    /// # Errors
    /// Everything that [`check_output`] refuses; another run that is writing the same output.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, CheckpointError> {
        check_output(target, OutputKind::File, existing)?;
        let folder = folder_of(target);
        let opened = File::open(folder).map_err(|e| CheckpointError::io("open", folder, e))?;
        Self::create_at(target, opened.into(), existing)
    }

    /// Starts a file of this program's own state; it replaces an existing file of that name.
    pub(crate) fn create_own(folder: &OwnFolder, name: &str) -> Result<Self, CheckpointError> {
        let target = folder.path().join(name);
        let opened = folder.open_existing()?;
        match folder.kind_of(name)? {
            None | Some(EntryKind::File) => {
                let mut output = Self::create_at(&target, opened, Existing::Replace)?;
                output.is_own = true;
                Ok(output)
            }
            Some(_) => Err(folder.refuse_entry(name)),
        }
    }

    /// Starts a copy of the shard at `target` that will replace the link or shared file there.
    pub(super) fn create_unshared(target: &Path) -> Result<Self, CheckpointError> {
        let folder = folder_of(target);
        let opened = File::open(folder).map_err(|e| CheckpointError::io("open", folder, e))?;
        let mut output = Self::create_at(target, opened.into(), Existing::Replace)?;
        output.replaces_link = true;
        Ok(output)
    }

    fn create_at(target: &Path, folder: OwnedFd, existing: Existing) -> Result<Self, CheckpointError> {
        let name = target.file_name().expect("outputs have names").to_owned();
        let temp = temporary_name(&name, "tmp");
        let io = |e: Errno| CheckpointError::io("create", target, e.into());
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        loop {
            // The umask removes bits as usual.
            let mode = Mode::from_raw_mode(0o666);
            let (file, is_new) = match openat(&folder, &temp, flags | OFlags::CREATE | OFlags::EXCL, mode) {
                Err(Errno::EXIST) => match openat(&folder, &temp, flags, Mode::empty()) {
                    // The previous owner has just finished.
                    Err(Errno::NOENT) => continue,
                    Err(Errno::LOOP) => return Err(refused(target, &temp, "is a symbolic link")),
                    Err(Errno::ISDIR) => return Err(refused(target, &temp, "is a folder")),
                    opened => (File::from(opened.map_err(io)?), false),
                },
                created => (File::from(created.map_err(io)?), true),
            };
            let meta = file.metadata().map_err(|e| CheckpointError::io("create", target, e))?;
            if EntryKind::of(meta.file_type()) != EntryKind::File {
                return Err(refused(target, &temp, "is not a regular file"));
            }
            match try_lock(&file) {
                LockAttempt::Locked => {}
                LockAttempt::Held => return Err(refused(target, &temp, "is being written by another run")),
                // Without locks, only a file that we created is certainly ours.
                LockAttempt::Unsupported if is_new => {}
                LockAttempt::Unsupported => {
                    let what = "exists, and this file system has no locks to tell whether a run is still writing it; remove it";
                    return Err(refused(target, &temp, what));
                }
                LockAttempt::Failed(e) => return Err(CheckpointError::io("lock", target, e)),
            }
            // Between opening and locking, the previous owner may have finished or given up.
            match statat(&folder, &temp, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if super::FileId::of(&meta).is(&found) => {}
                Ok(_) | Err(Errno::NOENT) => continue,
                Err(e) => return Err(io(e)),
            }
            if !is_new && meta.nlink() > 1 {
                // The file has another name, so it belongs to somebody else: remove this name and leave the file
                // alone.
                match unlinkat(&folder, &temp, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(e) => return Err(io(e)),
                }
            }
            let output = Self {
                target: target.to_owned(),
                existing,
                folder,
                name,
                temp,
                file,
                replaces_link: false,
                is_own: false,
                committed: false,
            };
            output.file.set_len(0).map_err(|e| CheckpointError::io("create", target, e))?;
            return Ok(output);
        }
    }

    /// The open file, still under its temporary name.
    pub fn file(&self) -> &File {
        &self.file
    }
    /// The path at which the file will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs the file, renames it into place atomically, and syncs the folder.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`] if the target appeared in the meantime and must be kept;
    /// [`CheckpointError::Committed`] if the file is in place but its folder could not be synced.
    pub fn commit(mut self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(|e| CheckpointError::io("sync", &self.target, e))?;
        self.rename_into_place()?;
        self.committed = true;
        let synced = rustix::fs::fsync(&self.folder);
        synced.map_err(|e| match self.is_own {
            true => CheckpointError::io("sync", &self.target, e.into()),
            false => CheckpointError::committed(&self.target, "sync the folder of", e.into()),
        })
    }

    /// Commits the file with `bytes` as its whole content.
    fn commit_bytes(self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file.write_all_at(bytes, 0).map_err(|e| CheckpointError::io("write", &self.target, e))?;
        self.commit()
    }

    fn may_replace(&self, found: FileType) -> bool {
        found == FileType::RegularFile || (self.replaces_link && found == FileType::Symlink)
    }

    fn rename_into_place(&self) -> Result<(), CheckpointError> {
        let (folder, temp, name) = (&self.folder, &self.temp, &self.name);
        let io = |e: Errno| match e {
            Errno::EXIST => CheckpointError::OutputExists { path: self.target.clone() },
            e => CheckpointError::io("create", &self.target, e.into()),
        };
        if self.existing == Existing::Replace {
            return match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => renameat(folder, temp, folder, name).map_err(io),
                Ok(found) if self.may_replace(FileType::from_raw_mode(found.st_mode)) => {
                    renameat(folder, temp, folder, name).map_err(io)
                }
                Ok(_) => Err(CheckpointError::Refused {
                    path: self.target.clone(),
                    what: "is no longer a regular file".to_owned(),
                }),
                Err(e) => Err(io(e)),
            };
        }
        match renameat_with(folder, temp, folder, name, RenameFlags::NOREPLACE) {
            // File systems that do not support the flag.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(folder, temp, folder, name, AtFlags::empty()).map_err(io)?;
                // It also has another name; under this one it would be a leftover, which the next run removes.
                let _leftover = unlinkat(folder, temp, AtFlags::empty());
                Ok(())
            }
            renamed => renamed.map_err(io),
        }
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // A failure here cannot be handled; the next run on this output reuses the leftover.
            let _left_behind = unlinkat(&self.folder, &self.temp, AtFlags::empty());
        }
        unlock(&self.file);
    }
}

fn refused(target: &Path, temp: &OsStr, what: &str) -> CheckpointError {
    let what = format!("its temporary name {} {what}", super::Printable(&temp.to_string_lossy()));
    CheckpointError::Refused { path: target.to_owned(), what }
}

/// The temporary name for an output called `name`, short enough for every file system.
pub(super) fn temporary_name(name: &OsStr, suffix: &str) -> OsString {
    const MAX_BYTES: usize = 200;
    let mut temp = OsString::from(".");
    if name.len() <= MAX_BYTES {
        temp.push(name);
    } else {
        temp.push(&*blake3::hash(name.as_bytes()).to_hex());
    }
    temp.push(format!(".neuroada-{suffix}"));
    temp
}

/// Whether a folder of this name is an output being written.
pub(super) fn is_temporary_folder(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with('.') && (name.ends_with(".neuroada-partial") || name.ends_with(".neuroada-work"))
}

/// Writes `bytes` to a file atomically.
///
/// # Errors
/// As [`AtomicFile::create`] and [`AtomicFile::commit`].
pub fn write_atomic(target: &Path, existing: Existing, bytes: &[u8]) -> Result<(), CheckpointError> {
    AtomicFile::create(target, existing)?.commit_bytes(bytes)
}

/// Writes `bytes` to a file of this program's own state, replacing an existing file of that name.
///
/// # Errors
/// As [`AtomicFile::create_own`] and [`AtomicFile::commit`].
pub(crate) fn write_own(folder: &OwnFolder, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    AtomicFile::create_own(folder, name)?.commit_bytes(bytes)
}

/// Copies the file `source` into this program's own state, replacing an existing file of that name.
///
/// # Errors
/// As [`AtomicFile::create_own`] and [`AtomicFile::commit`], and a failure to read.
pub(crate) fn copy_own(source: &Path, folder: &OwnFolder, name: &str) -> Result<(), CheckpointError> {
    let mut from = File::open(source).map_err(|e| CheckpointError::io("read", source, e))?;
    let output = AtomicFile::create_own(folder, name)?;
    std::io::copy(&mut from, &mut output.file()).map_err(|e| CheckpointError::io("copy", output.target(), e))?;
    output.commit()
}

/// Syncs a folder, so that renames in it survive a power loss.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn sync_folder(folder: &Path) -> Result<(), CheckpointError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| CheckpointError::io("sync", folder, e))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn leftovers_of_a_killed_run_are_reused_and_links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::write(dir.path().join(".out.neuroada-tmp"), b"a longer leftover").unwrap();
        write_atomic(&target, Existing::Keep, b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

        fs::write(dir.path().join("victim"), b"precious").unwrap();
        fs::hard_link(dir.path().join("victim"), dir.path().join(".out.neuroada-tmp")).unwrap();
        write_atomic(&target, Existing::Replace, b"new").unwrap();
        assert_eq!(fs::read(dir.path().join("victim")).unwrap(), b"precious");
        symlink("victim", dir.path().join(".out.neuroada-tmp")).unwrap();
        let error = write_atomic(&target, Existing::Replace, b"newer").unwrap_err();
        assert!(error.to_string().contains("is a symbolic link"), "{error}");
        assert_eq!(fs::read(dir.path().join("victim")).unwrap(), b"precious");
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn two_runs_never_share_a_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let first = AtomicFile::create(&target, Existing::Keep).unwrap();
        let error = AtomicFile::create(&target, Existing::Keep).err().unwrap();
        assert!(error.to_string().contains("being written by another run"), "{error}");
        first.commit().unwrap();
        assert!(matches!(AtomicFile::create(&target, Existing::Keep), Err(CheckpointError::OutputExists { .. })));
    }

    #[test]
    fn long_names_have_temporary_names_too() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("x".repeat(255));
        write_atomic(&target, Existing::Keep, b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }
}
