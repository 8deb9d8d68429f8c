//! The state folder: `.neuroada/` in a checkpoint's folder, `FILE.neuroada/` next to a single file.
//!
//! ```text
//! ledger                      original bits of every changed position, the active adapters, checksums
//! adapters/ID.safetensors     a copy of every active adapter: the changed positions and the added values
//! low-rank                    the record of a merge that changed whole tensors, instead of a ledger
//! originals.safetensors       the originals for that record, if they are kept
//! card                        the model card that was written, and the one that it replaced
//! files                       the names of the files that this program wrote into the checkpoint's folder
//! ledger.new                  the ledger after the pending change
//! txn                         the pending change: digests of both ledgers
//! replacing                   a single file and its ledger are being replaced
//! ```
//!
//! Upper layers define the contents of the entries. This file covers what everyone who opens a checkpoint must know:
//! whether a change must be recovered.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Checkpoint, CheckpointError, EntryKind, Layout, OwnFolder, folder_of, probe, single_file::is_without_state,
    write_own,
};

/// The folder's name inside a checkpoint's folder, and the suffix after a single file's name.
pub const STATE_FOLDER: &str = ".neuroada";

/// The version of file lists that is written and read.
const LIST_VERSION: u32 = 1;
/// Maximum size of a file list.
const MAX_LIST_BYTES: u64 = 64 << 20;

/// A checkpoint's state folder, which may not exist; never reached through a link.
#[derive(Clone, Debug)]
pub struct StateFolder(OwnFolder);

impl StateFolder {
    /// The original bits of every changed position.
    pub const LEDGER: &str = "ledger";
    /// The ledger after the pending change.
    pub const LEDGER_NEW: &str = "ledger.new";
    /// The journal of the pending change.
    pub const TXN: &str = "txn";
    /// The record of a merge that changed whole tensors.
    pub const LOW_RANK: &str = "low-rank";
    /// The originals for that record.
    pub const ORIGINALS: &str = "originals.safetensors";
    /// The names of the files that this program wrote.
    pub const FILES: &str = "files";
    /// The model card that was written next to the weights.
    pub const CARD: &str = "card";
    /// A single file and its ledger are being replaced.
    pub const REPLACING: &str = "replacing";
    const ADAPTERS: &str = "adapters";

    /// The state folder of an open checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if its parent folder cannot be opened.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        Self::at(checkpoint.root(), checkpoint.layout())
    }

    /// The state folder of a checkpoint that is, or will be, at `root`.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn at(root: &Path, layout: Layout) -> Result<Self, CheckpointError> {
        let path = if layout == Layout::File { beside_file(root) } else { root.join(STATE_FOLDER) };
        Ok(Self(OwnFolder::at(&path)?))
    }

    /// Whether the folder at `path` is a state folder in use: it records a merge, or a change is pending.
    pub(super) fn is_state_folder(path: &Path) -> Result<bool, CheckpointError> {
        if !probe::is_present(path)? {
            return Ok(false);
        }
        let state = Self(OwnFolder::at(path)?);
        Ok(state.remembers()? || state.is_interrupted()?)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
    /// The folder itself.
    pub fn folder(&self) -> &OwnFolder {
        &self.0
    }
    /// The folder with the copies of the active adapters.
    pub fn adapters(&self) -> OwnFolder {
        self.0.inside(Self::ADAPTERS)
    }

    /// Whether an interrupted change is pending.
    ///
    /// # Errors
    /// A folder that cannot be examined, since the answer is then unknown.
    pub fn is_interrupted(&self) -> Result<bool, CheckpointError> {
        Ok(self.0.has(Self::TXN)? || self.0.has(Self::LEDGER_NEW)? || self.0.has(Self::REPLACING)?)
    }

    /// Whether it records a merge.
    ///
    /// # Errors
    /// As [`Self::is_interrupted`].
    pub fn remembers(&self) -> Result<bool, CheckpointError> {
        Ok(self.0.has(Self::LEDGER)? || self.0.has(Self::LOW_RANK)?)
    }

    /// Creates the folder and its `adapters`, durably.
    ///
    /// # Errors
    /// A link on the path; a failure to create.
    pub fn create(&self) -> Result<(), CheckpointError> {
        self.adapters().create()
    }

    /// Removes what no ledger needs: entries of `adapters` that are not in `kept`, an unfinished ledger and, if
    /// nothing is kept, the folder itself, as far as it is this program's.
    ///
    /// # Errors
    /// A failure to remove.
    /// A failure to remove.
    pub fn tidy(&self, kept: &[String]) -> Result<(), CheckpointError> {
        self.0.remove(Self::LEDGER_NEW)?;
        self.remove_leftovers(&self.0)?;
        let adapters = self.adapters();
        for (name, kind) in adapters.entries()? {
            let name = name.to_string_lossy();
            let is_kept = kept.iter().any(|kept| *kept == name);
            match kind {
                EntryKind::File if !is_kept && is_own_copy(&name) => adapters.remove(&name)?,
                EntryKind::Folder if !is_kept && is_id(&name) => remove_copy(&adapters.inside(&name))?,
                _ => {}
            }
        }
        if self.0.has(Self::LEDGER)? {
            // The entries that the ledger replaced.
            self.0.remove(Self::LOW_RANK)?;
            self.0.remove(Self::ORIGINALS)?;
        }
        self.remove_leftovers(&adapters)?;
        if kept.is_empty() && self.0.open()?.is_some() {
            for name in [Self::LOW_RANK, Self::ORIGINALS, Self::CARD, Self::LEDGER, Self::FILES] {
                self.0.remove(name)?;
            }
            let _somebody_s_own = adapters.remove_if_empty()?;
            let _somebody_s_own = self.0.remove_if_empty()?;
            self.0.sync_above()?;
        }
        Ok(())
    }

    /// Removes temporary files of killed runs.
    fn remove_leftovers(&self, folder: &OwnFolder) -> Result<(), CheckpointError> {
        for (name, kind) in folder.entries()? {
            let name = name.to_string_lossy();
            if kind == EntryKind::File && is_temporary(&name) {
                folder.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Writes the list of the files that this program wrote, with their lengths; relative to the checkpoint's folder.
    ///
    /// # Errors
    /// A failure to examine a file, or to write.
    pub fn write_list(&self, files: &BTreeSet<PathBuf>) -> Result<(), CheckpointError> {
        let mut names = BTreeMap::new();
        for file in files {
            let meta = probe::link_metadata(&folder_of(self.path()).join(file))?;
            names.insert(file.to_string_lossy().into_owned(), meta.map_or(0, |meta| meta.len()));
        }
        let mut json =
            serde_json::to_vec(&FileList { version: LIST_VERSION, files: names }).expect("strings serialize");
        json.push(b'\n');
        write_own(&self.0, Self::FILES, &json)
    }

    /// The files that this program wrote, with their lengths at that time; empty if there is no list. A file whose
    /// length has changed belongs to the user.
    ///
    /// # Errors
    /// A list that cannot be read.
    pub fn list(&self) -> Result<BTreeMap<PathBuf, u64>, CheckpointError> {
        let Some(json) = self.0.read(Self::FILES, MAX_LIST_BYTES)? else { return Ok(BTreeMap::new()) };
        let list: FileList = serde_json::from_slice(&json)
            .map_err(|e| CheckpointError::bad_file(&self.path().join(Self::FILES), format!("malformed: {e}")))?;
        if list.version != LIST_VERSION {
            let what = format!("has version {}, this program reads version {LIST_VERSION}", list.version);
            return Err(CheckpointError::bad_file(&self.path().join(Self::FILES), what));
        }
        Ok(list.files.into_iter().map(|(name, n_bytes)| (PathBuf::from(name), n_bytes)).collect())
    }
}

/// Removes an adapter copy that is a folder, as far as it is this program's.
fn remove_copy(copy: &OwnFolder) -> Result<(), CheckpointError> {
    for (name, kind) in copy.entries()? {
        let name = name.to_string_lossy();
        if kind == EntryKind::File && (COPIED.contains(&&*name) || is_temporary(&name)) {
            copy.remove(&name)?;
        }
    }
    let _somebody_s_own = copy.remove_if_empty()?;
    Ok(())
}

/// The files of an adapter copy that is a folder.
const COPIED: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The contents of the file list.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileList {
    version: u32,
    files: BTreeMap<String, u64>,
}

/// Whether this program creates an entry of this name; `path` is relative to the state folder.
pub(super) fn is_own_entry(path: &Path) -> bool {
    let names: Vec<String> = path.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    match &names[..] {
        [name] => {
            let known = [
                StateFolder::LEDGER,
                StateFolder::LEDGER_NEW,
                StateFolder::TXN,
                StateFolder::LOW_RANK,
                StateFolder::ORIGINALS,
                StateFolder::FILES,
                StateFolder::REPLACING,
                StateFolder::CARD,
            ];
            known.contains(&&**name) || is_temporary(name)
        }
        [adapters, name] => adapters == StateFolder::ADAPTERS && (is_own_copy(name) || is_temporary(name)),
        [adapters, id, name] => {
            adapters == StateFolder::ADAPTERS && is_id(id) && (COPIED.contains(&&**name) || is_temporary(name))
        }
        _ => false,
    }
}

/// Whether a name in `adapters` is that of a copy.
fn is_own_copy(name: &str) -> bool {
    is_id(name.strip_suffix(".safetensors").unwrap_or(name))
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a name is that of a temporary file, of this version or an earlier one.
fn is_temporary(name: &str) -> bool {
    name.starts_with('.')
        && (name.ends_with(".neuroada-tmp") || (name.starts_with(".neuroada-") && name.ends_with(".tmp")))
}

/// The location of a single file's ledger.
fn beside_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(STATE_FOLDER);
    file.with_file_name(name)
}

/// The checkpoint that must be recovered before `checkpoint` can be used: itself, the folder that its file belongs to,
/// or one of its files.
///
/// # Errors
/// A state folder that cannot be examined.
pub(super) fn interrupted(checkpoint: &Checkpoint) -> Result<Option<PathBuf>, CheckpointError> {
    let root = checkpoint.root();
    if StateFolder::of(checkpoint)?.is_interrupted()? {
        return Ok(Some(root.to_owned()));
    }
    if checkpoint.layout() == Layout::File {
        if is_without_state(root)? {
            return Ok(Some(root.to_owned()));
        }
        let whole = folder_of(root);
        if StateFolder::at(whole, Layout::Folder)?.is_interrupted()? {
            return Ok(Some(whole.to_owned()));
        }
    } else {
        let states: BTreeSet<OsString> = probe::entries(root)?.into_iter().map(|(name, _)| name).collect();
        for shard in checkpoint.shards() {
            let state = beside_file(shard.path());
            let exists = state.file_name().is_some_and(|name| states.contains(name));
            if exists && StateFolder::at(shard.path(), Layout::File)?.is_interrupted()? {
                return Ok(Some(shard.path().to_owned()));
            }
        }
    }
    // A link to a file of another checkpoint shares that file's weights.
    for shard in checkpoint.shards() {
        if probe::entry_kind(shard.path())? != Some(EntryKind::Link) {
            continue;
        }
        let real = std::fs::canonicalize(shard.path()).map_err(|e| CheckpointError::io("open", shard.path(), e))?;
        if StateFolder::at(&real, Layout::File)?.is_interrupted()? {
            return Ok(Some(real));
        }
        let whole = folder_of(&real);
        if StateFolder::at(whole, Layout::Folder)?.is_interrupted()? {
            return Ok(Some(whole.to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_this_program_makes_are_its_own() {
        let id = "a".repeat(64);
        for own in ["ledger", "txn", ".ledger.neuroada-tmp", ".neuroada-x1.tmp", &format!("adapters/{id}.safetensors")]
        {
            assert!(is_own_entry(Path::new(own)), "{own}");
        }
        assert!(is_own_entry(&Path::new("adapters").join(&id).join("adapter_config.json")));
        for other in ["thesis.tex", "adapters/thesis.tex", "adapters/x.safetensors", "ledger/x", "adapters"] {
            assert!(!is_own_entry(Path::new(other)), "{other}");
        }
    }
}
