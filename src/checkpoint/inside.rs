//! Files and folders inside an output that is still under its temporary name, and files next to an output that belong
//! to it.
//!
//! The gate has approved the output, and its temporary folder belongs to this run alone: every file and folder that is
//! created, renamed or removed here is this program's own. A link in the last path component is never followed.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::fs::OFlags;

use super::{CheckpointError, folder_of, sync_folder};

const NO_FOLLOW: i32 = OFlags::NOFOLLOW.bits() as i32;

/// Creates the new file `path`, open for reading and writing.
///
/// # Errors
/// [`CheckpointError::Io`], also if it exists.
pub fn create_new_file(path: &Path) -> Result<File, CheckpointError> {
    let created = File::options().read(true).write(true).create_new(true).open(path);
    created.map_err(|e| CheckpointError::io("create", path, e))
}

/// Opens the existing file `path` for reading and writing.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn open_to_change(path: &Path) -> Result<File, CheckpointError> {
    let opened = File::options().read(true).write(true).custom_flags(NO_FOLLOW).open(path);
    opened.map_err(|e| CheckpointError::io("open", path, e))
}

/// Opens the existing file `path` to append to it.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn append_to_file(path: &Path) -> Result<File, CheckpointError> {
    let opened = File::options().append(true).custom_flags(NO_FOLLOW).open(path);
    opened.map_err(|e| CheckpointError::io("open", path, e))
}

/// Creates the folder `path` and its parents, if they do not exist.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn create_folders(path: &Path) -> Result<(), CheckpointError> {
    fs::create_dir_all(path).map_err(|e| CheckpointError::io("create", path, e))
}

/// Renames the finished file `part` to `path`, durably.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn rename_into_place(part: &Path, path: &Path) -> Result<(), CheckpointError> {
    fs::rename(part, path).map_err(|e| CheckpointError::io("create", path, e))?;
    sync_folder(folder_of(path))
}

/// Removes the file `path`; it may already be gone.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn remove_file(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CheckpointError::io("remove", path, e)),
        _ => Ok(()),
    }
}
