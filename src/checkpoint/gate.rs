//! The gate for outputs: every file and folder that a command writes is checked here before anything is created.
//!
//! An output is refused if it is, contains or lies inside an input [in use](super::InUse), compared by device and
//! inode along its resolved path; if it lies in a [state folder](super::StateFolder); if its path is a link, device,
//! fifo or socket; and if it exists and must be kept. Parent folders may be links and are resolved first, since
//! `~/models` often is one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    CheckpointError, EntryKind, Existing, FileId, STATE_FOLDER, StateFolder, folder_of,
    in_use::{self, Conflict},
    probe,
    single_file::remembers_merge,
};

/// The kind of an output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutputKind {
    /// A file.
    File,
    /// A checkpoint of one file, with a ledger next to it.
    Checkpoint,
    /// A folder.
    Folder,
}

/// Checks whether an output may be written at `target`; creates nothing. Returns whether it replaces something.
///
/// # Errors
/// [`CheckpointError::NoFolder`] if the folder above it does not exist; [`CheckpointError::OutputExists`] if it exists
/// and must be kept; [`CheckpointError::Refused`] with the reason if the path is not allowed for any other reason.
pub fn check_output(target: &Path, kind: OutputKind, existing: Existing) -> Result<bool, CheckpointError> {
    let refused = |what: String| Err(CheckpointError::Refused { path: target.to_owned(), what });
    let Some(name) = target.file_name() else {
        return refused("not a valid name for an output".to_owned());
    };
    // Without a trailing slash, which would follow a link.
    let found = probe::link_metadata(&folder_of(target).join(name))?;
    let is_replaced = found.is_some();
    let found_kind = found.as_ref().map(|meta| EntryKind::of(meta.file_type()));
    match (found_kind, kind) {
        (Some(EntryKind::Link), _) => return refused("is a symbolic link; an output never replaces one".to_owned()),
        (Some(EntryKind::Special), _) => {
            return refused("is a device, a fifo or a socket; an output never replaces one".to_owned());
        }
        _ => {}
    }
    let folder = resolved_folder(target)?;
    if is_state(&folder.join(name))? {
        return refused("would lie in the state folder that unmerge needs".to_owned());
    }
    refuse_inputs(target, &folder, found.as_ref().map(FileId::of))?;
    match (found_kind, kind) {
        (Some(_), _) if existing == Existing::Keep => Err(CheckpointError::OutputExists { path: target.to_owned() }),
        (Some(EntryKind::Folder), OutputKind::File | OutputKind::Checkpoint) => {
            refused("is a folder; the output is a file".to_owned())
        }
        (Some(EntryKind::File), OutputKind::Folder) => refused("is a file; the output is a folder".to_owned()),
        // Its ledger would no longer match the file.
        (Some(EntryKind::File), OutputKind::File) if remembers_merge(target)? => {
            refused("is a merged checkpoint with a ledger; unmerge it, or choose another name".to_owned())
        }
        _ if probe::metadata(folder_of(target))?.is_none() => {
            Err(CheckpointError::NoFolder { path: folder_of(target).to_owned() })
        }
        _ => Ok(is_replaced),
    }
}

/// Whether a resolved path is a state folder, or lies inside one.
fn is_state(path: &Path) -> Result<bool, CheckpointError> {
    for folder in path.ancestors() {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        // For a single file, the suffix alone proves nothing: the folder may belong to somebody else.
        if name == STATE_FOLDER
            || (folder != path && name.ends_with(STATE_FOLDER) && StateFolder::is_state_folder(folder)?)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Fails if an output at `target`, in the resolved `folder`, would be, contain or lie inside an input.
fn refuse_inputs(target: &Path, folder: &Path, found: Option<FileId>) -> Result<(), CheckpointError> {
    let mut above = Vec::new();
    for folder in folder.ancestors() {
        if let Some(meta) = probe::metadata(folder)? {
            above.push(FileId::of(&meta));
        }
    }
    let Some((conflict, input)) = in_use::conflict(found, &above)? else { return Ok(()) };
    let what = match conflict {
        Conflict::Same => "the output is an input",
        Conflict::Contains => "the output would replace a folder that contains an input",
        Conflict::Inside => "the output would lie inside an input",
    };
    Err(CheckpointError::OutputIsInput { path: target.to_owned(), what, input })
}

/// The folder of `target`, with links resolved as far as it exists.
fn resolved_folder(target: &Path) -> Result<PathBuf, CheckpointError> {
    let mut folder = folder_of(target);
    loop {
        match fs::canonicalize(folder) {
            Ok(real) => return Ok(real),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && folder_of(folder) != folder => {
                folder = folder_of(folder);
            }
            Err(e) => return Err(CheckpointError::io("examine", folder, e)),
        }
    }
}
