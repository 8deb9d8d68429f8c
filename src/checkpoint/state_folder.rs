//! The folder that remembers: `.neuroada/` in a checkpoint's folder, `FILE.neuroada/` beside a single file.
//!
//! ```text
//! ledger                      original bits of every touched position, the active adapters, checksums
//! adapters/ID.safetensors     a copy of every active adapter: where the touched positions are, and what was added
//! low-rank                    instead of a ledger: the record of a merge that changed whole tensors
//! originals.safetensors       beside that record: the originals, where they are kept
//! card                        the model card that was written beside the weights, and the one whose place it took
//! files                       the names of the files that this program wrote into the checkpoint's folder
//! ledger.new                  the ledger after the change under way
//! txn                         the change under way: digests of both ledgers
//! replacing                   a single file and its ledger are being replaced
//! ```
//!
//! What the entries say is known above this floor. Here lies what everybody who opens a checkpoint must know: whether a change
//! waits for recovery.

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

/// The folder's name inside a checkpoint's folder, and its suffix behind a single file's name.
pub const STATE_FOLDER: &str = ".neuroada";

/// The version of lists of file names that is written and read.
const LIST_VERSION: u32 = 1;
/// Lists of file names larger than this are refused.
const MAX_LIST_BYTES: u64 = 64 << 20;

/// A checkpoint's state folder, which may not exist; never reached through a link.
#[derive(Clone, Debug)]
pub struct StateFolder(OwnFolder);

impl StateFolder {
    /// The original bits of every touched position.
    pub const LEDGER: &str = "ledger";
    /// The ledger after the change under way.
    pub const LEDGER_NEW: &str = "ledger.new";
    /// The journal of the change under way.
    pub const TXN: &str = "txn";
    /// The record of a merge that changed whole tensors.
    pub const LOW_RANK: &str = "low-rank";
    /// The originals beside that record.
    pub const ORIGINALS: &str = "originals.safetensors";
    /// The names of the files that this program wrote.
    pub const FILES: &str = "files";
    /// The model card that was written beside the weights.
    pub const CARD: &str = "card";
    /// A single file and its ledger are being replaced.
    pub const REPLACING: &str = "replacing";
    const ADAPTERS: &str = "adapters";

    /// The state folder of an open checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] where the folder that it would lie in cannot be opened.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        Self::at(checkpoint.root(), checkpoint.layout())
    }

    /// The state folder of a checkpoint that lies, or will lie, at `root`.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn at(root: &Path, layout: Layout) -> Result<Self, CheckpointError> {
        let path = if layout == Layout::File { beside_file(root) } else { root.join(STATE_FOLDER) };
        Ok(Self(OwnFolder::at(&path)?))
    }

    /// Whether the folder at `path` is one, and in use: it remembers a merge, or a change waits in it.
    pub(super) fn is_state_folder(path: &Path) -> Result<bool, CheckpointError> {
        if !probe::is_present(path)? {
            return Ok(false);
        }
        let state = Self(OwnFolder::at(path)?);
        Ok(state.remembers()? || state.is_interrupted()?)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
    /// The folder itself.
    pub fn folder(&self) -> &OwnFolder {
        &self.0
    }
    /// The folder of the active adapters' copies.
    pub fn adapters(&self) -> OwnFolder {
        self.0.inside(Self::ADAPTERS)
    }

    /// Whether an interrupted change waits here.
    ///
    /// # Errors
    /// A folder that cannot be examined: nobody knows then.
    pub fn is_interrupted(&self) -> Result<bool, CheckpointError> {
        Ok(self.0.has(Self::TXN)? || self.0.has(Self::LEDGER_NEW)? || self.0.has(Self::REPLACING)?)
    }

    /// Whether it remembers a merge.
    ///
    /// # Errors
    /// As [`Self::is_interrupted`].
    pub fn remembers(&self) -> Result<bool, CheckpointError> {
        Ok(self.0.has(Self::LEDGER)? || self.0.has(Self::LOW_RANK)?)
    }

    /// Creates the folder and its `adapters`, durably.
    ///
    /// # Errors
    /// A link in the way, or a failure to create.
    pub fn create(&self) -> Result<(), CheckpointError> {
        self.adapters().create()
    }

    /// Removes what no ledger needs: entries of `adapters` that are not `kept`, an unfinished ledger, and, where nothing is kept, the
    /// folder itself, so far as it is this program's.
    ///
    /// # Errors
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
            // What the ledger took the place of.
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

    /// Removes temporary files that a killed run left.
    fn remove_leftovers(&self, folder: &OwnFolder) -> Result<(), CheckpointError> {
        for (name, kind) in folder.entries()? {
            let name = name.to_string_lossy();
            if kind == EntryKind::File && is_temporary(&name) {
                folder.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Writes the list of the files that this program wrote, with their lengths; paths from the checkpoint's folder.
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
            serde_json::to_vec(&FileList { version: LIST_VERSION, files: names }).expect("strings serialise");
        json.push(b'\n');
        write_own(&self.0, Self::FILES, &json)
    }

    /// The files that this program wrote, and their lengths then; empty where there is no list. A file of another length is somebody
    /// else's by now.
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

/// Removes a copy of an adapter that is a folder, so far as it is this program's.
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

/// The files of a copy that is a folder.
const COPIED: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What the list of files says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileList {
    version: u32,
    files: BTreeMap<String, u64>,
}

/// Whether an entry of a state folder is one that this program makes; `path` from the state folder.
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

/// Whether a name is that of a file which is being written, by this version or one before.
fn is_temporary(name: &str) -> bool {
    name.starts_with('.')
        && (name.ends_with(".neuroada-tmp") || (name.starts_with(".neuroada-") && name.ends_with(".tmp")))
}

/// Where the ledger of a single file lies.
fn beside_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(STATE_FOLDER);
    file.with_file_name(name)
}

/// The checkpoint that has to be recovered before `checkpoint` can be used: itself, the folder that its file belongs to, or one of
/// its files.
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
    // A link to a file of another checkpoint shows that one's weights.
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
