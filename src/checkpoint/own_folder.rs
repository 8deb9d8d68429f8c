//! The program's own folders, opened through descriptors and never through a link.
//!
//! Whatever is patched, replaced and deleted in a state folder must belong to this program. Each folder on the path is
//! opened with `O_NOFOLLOW` from its parent, starting at a folder that the user named. A link on the path is refused,
//! and none can be inserted between check and open.

use std::{
    ffi::OsString,
    fs::{File, Metadata},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, mkdirat, openat, renameat, renameat_with, statat, unlinkat,
    },
    io::Errno,
};

use super::{CheckpointError, EntryKind, folder_of};

/// A folder of this program's own; it may not exist.
#[derive(Clone, Debug)]
pub struct OwnFolder {
    /// For messages, and for reading data that is verified by its content.
    path: PathBuf,
    /// The folder that the user named.
    above: Arc<OwnedFd>,
    /// The path components below it.
    names: Vec<OsString>,
}

impl OwnFolder {
    /// The folder at `path`, whose parent may be reached through links.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the parent cannot be opened.
    pub fn at(path: &Path) -> Result<Self, CheckpointError> {
        let parent = folder_of(path);
        let above = File::open(parent).map_err(|e| CheckpointError::io("open", parent, e))?;
        let name = path.file_name().expect("own folders have names").to_owned();
        Ok(Self { path: path.to_owned(), above: Arc::new(above.into()), names: vec![name] })
    }

    /// The folder `name` inside this one.
    pub fn inside(&self, name: &str) -> Self {
        let mut names = self.names.clone();
        names.push(name.into());
        Self { path: self.path.join(name), above: Arc::clone(&self.above), names }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of the folder; `None` if it does not exist.
    ///
    /// # Errors
    /// [`CheckpointError::Refused`] if it, or a folder on the path to it, is a link or not a folder.
    pub fn open(&self) -> Result<Option<OwnedFd>, CheckpointError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut folder: Option<OwnedFd> = None;
        for name in &self.names {
            let opened = match &folder {
                None => openat(&*self.above, name, flags, Mode::empty()),
                Some(above) => openat(above, name, flags, Mode::empty()),
            };
            folder = match opened {
                Ok(opened) => Some(opened),
                Err(Errno::NOENT) => return Ok(None),
                // With O_DIRECTORY, Linux returns ENOTDIR for links too.
                Err(Errno::LOOP | Errno::NOTDIR) => return Err(self.refuse("is a link, or not a folder")),
                Err(e) => return Err(self.io("open", e)),
            };
        }
        Ok(folder)
    }

    /// A descriptor of the folder, which must exist.
    ///
    /// # Errors
    /// As [`Self::open`]; the folder does not exist.
    pub fn open_existing(&self) -> Result<OwnedFd, CheckpointError> {
        self.open()?.ok_or_else(|| self.io("open", Errno::NOENT))
    }

    /// Creates the folder and its parents below the named folder, durably, if they do not exist.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn create(&self) -> Result<(), CheckpointError> {
        for n in 1..=self.names.len() {
            let above = Self { names: self.names[..n - 1].to_vec(), ..self.clone() };
            let above = if n == 1 { None } else { Some(above.open_existing()?) };
            let above = above.as_ref().unwrap_or(&self.above);
            match mkdirat(above, &self.names[n - 1], Mode::from_raw_mode(0o777)) {
                Ok(()) => rustix::fs::fsync(above).map_err(|e| self.io("sync", e))?,
                Err(Errno::EXIST) => {}
                Err(e) => return Err(self.io("create", e)),
            }
        }
        self.open_existing().map(|_| ())
    }

    /// The kind of the entry `name`; `None` if the entry or the folder does not exist.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn kind_of(&self, name: &str) -> Result<Option<EntryKind>, CheckpointError> {
        let Some(folder) = self.open()? else { return Ok(None) };
        match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(kind(FileType::from_raw_mode(found.st_mode)))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(CheckpointError::io("examine", &self.path.join(name), e.into())),
        }
    }

    /// Whether the entry `name` exists.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn has(&self, name: &str) -> Result<bool, CheckpointError> {
        Ok(self.kind_of(name)?.is_some())
    }

    /// Opens the regular file `name` for reading; `None` if it does not exist.
    ///
    /// # Errors
    /// [`CheckpointError::Refused`] if it is a link or not a regular file.
    pub fn open_file(&self, name: &str) -> Result<Option<(File, Metadata)>, CheckpointError> {
        let Some(folder) = self.open()? else { return Ok(None) };
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&folder, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(self.refuse_entry(name)),
            Err(e) => return Err(CheckpointError::io("open", &path, e.into())),
        };
        let meta = file.metadata().map_err(|e| CheckpointError::io("open", &path, e))?;
        if EntryKind::of(meta.file_type()) != EntryKind::File {
            return Err(self.refuse_entry(name));
        }
        Ok(Some((file, meta)))
    }

    /// Reads the whole file `name` of at most `max_bytes` bytes; `None` if it does not exist.
    ///
    /// # Errors
    /// As [`Self::open_file`]; a file that is too long.
    pub fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some((file, meta)) = self.open_file(name)? else { return Ok(None) };
        super::json::read_open(&self.path.join(name), file, meta.len(), max_bytes).map(Some)
    }

    /// Renames the entry `from` to `to`, replacing an existing entry.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn rename(&self, from: &str, to: &str) -> Result<(), CheckpointError> {
        let folder = self.open_existing()?;
        renameat(&folder, from, &folder, to).map_err(|e| CheckpointError::io("rename", &self.path.join(from), e.into()))
    }

    /// Removes the file `name`; it may already be gone.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn remove(&self, name: &str) -> Result<(), CheckpointError> {
        let Some(folder) = self.open()? else { return Ok(()) };
        match unlinkat(&folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(CheckpointError::io("remove", &self.path.join(name), e.into())),
        }
    }

    /// The names and kinds of the folder's entries, sorted; empty if the folder does not exist.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn entries(&self) -> Result<Vec<(OsString, EntryKind)>, CheckpointError> {
        let Some(folder) = self.open()? else { return Ok(Vec::new()) };
        let io = |e: Errno| self.io("list", e);
        let mut found = Vec::new();
        for entry in Dir::read_from(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = OsString::from_vec(entry.file_name().to_bytes().to_vec());
            if name == "." || name == ".." {
                continue;
            }
            let of = statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
            found.push((name, kind(FileType::from_raw_mode(of.st_mode))));
        }
        found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Removes the folder if it is empty; returns whether it is gone.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn remove_if_empty(&self) -> Result<bool, CheckpointError> {
        let Some((above, name)) = self.open_above()? else { return Ok(true) };
        match unlinkat(&above, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            // Files of the user are kept.
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(e) => Err(self.io("remove", e)),
        }
    }

    /// Removes the folder with all contents; links in it are removed, not followed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn remove_all(&self) -> Result<(), CheckpointError> {
        for (name, kind) in self.entries()? {
            let name = name.to_string_lossy();
            match kind {
                EntryKind::Folder => self.inside(&name).remove_all()?,
                _ => self.remove(&name)?,
            }
        }
        self.remove_if_empty().map(|_| ())
    }

    /// Exchanges this folder and `other` atomically; `false` if the file system does not support it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn exchange(&self, other: &Self) -> Result<bool, CheckpointError> {
        self.rename_to(other, RenameFlags::EXCHANGE)
    }

    /// Moves this folder to `other`, which must not exist; `false` if the file system cannot check that.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn move_to(&self, other: &Self) -> Result<bool, CheckpointError> {
        self.rename_to(other, RenameFlags::NOREPLACE)
    }

    fn rename_to(&self, other: &Self, flags: RenameFlags) -> Result<bool, CheckpointError> {
        let (Some((from, name)), Some((to, other_name))) = (self.open_above()?, other.open_above()?) else {
            return Err(self.io("rename", Errno::NOENT));
        };
        match renameat_with(&from, name, &to, other_name, flags) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
            Err(e) => Err(other.io("rename", e)),
        }
    }

    /// Syncs the folder, so that changes in it survive a power loss.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn sync(&self) -> Result<(), CheckpointError> {
        rustix::fs::fsync(&self.open_existing()?).map_err(|e| self.io("sync", e))
    }

    /// Syncs the parent, so that this folder's creation or removal survives a power loss.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn sync_above(&self) -> Result<(), CheckpointError> {
        let Some((above, _)) = self.open_above()? else { return Ok(()) };
        rustix::fs::fsync(&above).map_err(|e| self.io("sync", e))
    }

    fn open_above(&self) -> Result<Option<(OwnedFd, &OsString)>, CheckpointError> {
        let (name, above) = self.names.split_last().expect("own folders have names");
        if above.is_empty() {
            let above = self.above.try_clone().map_err(|e| CheckpointError::io("open", &self.path, e))?;
            return Ok(Some((above, name)));
        }
        let above = Self { names: above.to_vec(), ..self.clone() };
        Ok(above.open()?.map(|above| (above, name)))
    }

    /// The error for an entry that this program cannot have created.
    pub(crate) fn refuse_entry(&self, name: &str) -> CheckpointError {
        let what = "is a link, or not a regular file, which this program never creates as state".to_owned();
        CheckpointError::Refused { path: self.path.join(name), what }
    }

    fn refuse(&self, what: &str) -> CheckpointError {
        let what = format!("{what}; this program never follows one to its state");
        CheckpointError::Refused { path: self.path.clone(), what }
    }

    fn io(&self, what: &'static str, e: Errno) -> CheckpointError {
        CheckpointError::io(what, &self.path, io::Error::from(e))
    }
}

fn kind(of: FileType) -> EntryKind {
    match of {
        FileType::Symlink => EntryKind::Link,
        FileType::Directory => EntryKind::Folder,
        FileType::RegularFile => EntryKind::File,
        _ => EntryKind::Special,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn no_link_is_followed_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("thesis.tex"), b"x").unwrap();
        let state = OwnFolder::at(&dir.path().join(".state")).unwrap();
        assert!(state.open().unwrap().is_none() && state.entries().unwrap().is_empty());
        let adapters = state.inside("adapters");
        adapters.create().unwrap();
        symlink(&victim, adapters.path().join("x")).unwrap();
        assert!(adapters.inside("x").entries().unwrap_err().to_string().contains("never follows one to its state"));
        state.remove_all().unwrap();
        assert!(!state.path().exists());
        symlink(&victim, state.path()).unwrap();
        for refused in [state.create(), state.remove("thesis.tex"), state.remove_all(), adapters.create()] {
            assert!(refused.unwrap_err().to_string().contains("is a link"));
        }
        assert!(victim.join("thesis.tex").exists());
    }

    #[test]
    fn folders_are_exchanged_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| OwnFolder::at(&dir.path().join(name)).unwrap();
        let (a, b) = (folder("a"), folder("b"));
        a.create().unwrap();
        b.create().unwrap();
        fs::write(a.path().join("of-a"), b"").unwrap();
        if a.exchange(&b).unwrap() {
            assert!(b.has("of-a").unwrap() && !a.has("of-a").unwrap());
        }
    }
}
