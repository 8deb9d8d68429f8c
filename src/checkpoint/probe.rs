//! Queries about paths. Only this file asks the file system whether something exists.
//!
//! Absent means `ENOENT` and nothing else: a path that cannot be examined (no permission, a failing disk, a stale
//! network handle) is an error, never "absent". `tests/floor_plan` keeps `exists()` and similar calls out of all other
//! files.

use std::{
    ffi::OsString,
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::CheckpointError;

/// The kind of a folder entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link, whatever its target.
    Link,
    /// A device, a fifo or a socket.
    Special,
}

impl EntryKind {
    pub(super) fn of(kind: fs::FileType) -> Self {
        if kind.is_symlink() {
            Self::Link
        } else if kind.is_dir() {
            Self::Folder
        } else if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || kind.is_socket() {
            Self::Special
        } else {
            Self::File
        }
    }
}

/// The identity of a file: device number and inode number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of a file with this metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino() }
    }

    /// Whether `statat` found the file with this identity.
    #[allow(clippy::unnecessary_cast, reason = "the types differ between systems")]
    pub(super) fn is(&self, found: &rustix::fs::Stat) -> bool {
        (self.device, self.inode) == (found.st_dev as u64, found.st_ino as u64)
    }
}

/// The metadata of `path`, following links; `None` if it is absent.
///
/// # Errors
/// [`CheckpointError::Io`] for every failure except `ENOENT`.
pub fn metadata(path: &Path) -> Result<Option<Metadata>, CheckpointError> {
    present_or_error(path, fs::metadata(path))
}

/// The metadata of `path`, following links; it must exist.
///
/// # Errors
/// [`CheckpointError::Io`], also if it is absent.
pub fn existing(path: &Path) -> Result<Metadata, CheckpointError> {
    fs::metadata(path).map_err(|e| CheckpointError::io("open", path, e))
}

/// The size of the file at `path` in bytes, following links.
///
/// # Errors
/// As [`existing`].
pub fn n_bytes(path: &Path) -> Result<u64, CheckpointError> {
    Ok(existing(path)?.len())
}

/// The metadata of `path` itself, without following a link; `None` if it is absent.
///
/// # Errors
/// As [`metadata`].
pub fn link_metadata(path: &Path) -> Result<Option<Metadata>, CheckpointError> {
    present_or_error(path, fs::symlink_metadata(path))
}

fn present_or_error<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>, CheckpointError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(CheckpointError::io("examine", path, e)),
    }
}

/// Whether an entry of this name exists, even as a dangling link.
///
/// # Errors
/// As [`metadata`].
pub fn is_present(path: &Path) -> Result<bool, CheckpointError> {
    Ok(link_metadata(path)?.is_some())
}

/// Whether `path` is a folder, following links.
///
/// # Errors
/// As [`metadata`].
pub fn is_folder(path: &Path) -> Result<bool, CheckpointError> {
    Ok(metadata(path)?.is_some_and(|meta| meta.is_dir()))
}

/// Whether `path` is a regular file, following links.
///
/// # Errors
/// As [`metadata`].
pub fn is_file(path: &Path) -> Result<bool, CheckpointError> {
    Ok(metadata(path)?.is_some_and(|meta| meta.is_file()))
}

/// The kind of the entry at `path`, without following a link; `None` if it is absent.
///
/// # Errors
/// As [`metadata`].
pub fn entry_kind(path: &Path) -> Result<Option<EntryKind>, CheckpointError> {
    Ok(link_metadata(path)?.map(|meta| EntryKind::of(meta.file_type())))
}

/// The names and kinds of a folder's entries, sorted.
///
/// # Errors
/// [`CheckpointError::Io`] if the folder or any of its entries cannot be read.
pub fn entries(folder: &Path) -> Result<Vec<(OsString, EntryKind)>, CheckpointError> {
    let io = |e| CheckpointError::io("list", folder, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        found.push((entry.file_name(), EntryKind::of(entry.file_type().map_err(io)?)));
    }
    found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// The only safetensors file of a folder, ignoring hidden files; `None` if there is none or more than one.
///
/// # Errors
/// As [`entries`].
pub fn only_tensor_file(folder: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let mut found = None;
    for (name, _) in entries(folder)? {
        let path = folder.join(&name);
        let is_hidden = name.as_encoded_bytes().starts_with(b".");
        if !is_hidden && path.extension().is_some_and(|end| end == "safetensors") && found.replace(path).is_some() {
            return Ok(None);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_enoent_means_absent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        assert!(!is_present(&dir.path().join("missing")).unwrap());
        assert!(is_present(&dir.path().join("dangling")).unwrap());
        assert!(metadata(&dir.path().join("dangling")).unwrap().is_none());
        // ENOTDIR is an error, not an answer.
        let error = is_present(&file.join("below")).unwrap_err();
        assert!(error.to_string().contains("cannot examine"), "{error}");
        let kinds: Vec<EntryKind> = entries(dir.path()).unwrap().into_iter().map(|(_, kind)| kind).collect();
        assert_eq!(kinds, [EntryKind::Link, EntryKind::File]);
    }
}
