//! The folder that remembers: `.neuroada/` beside a checkpoint, `FILE.neuroada/` beside a single file.
//!
//! ```text
//! ledger                      original bits of every touched position, the active adapters, checksums
//! adapters/ID.safetensors     a copy of every active adapter: where the touched positions are, and what was added
//! ledger.new                  the ledger after the change under way
//! txn                         the change under way: digests of both ledgers
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::MergeError;
use crate::{
    adapter::AdapterId,
    checkpoint::{Checkpoint, CheckpointError, Layout, folder_of, sync_folder},
};

/// The folder's name inside a checkpoint's folder, and its suffix behind a single file's name.
pub const STATE_FOLDER: &str = ".neuroada";

/// Paths inside a checkpoint's state folder, which may not exist.
#[derive(Clone, Debug)]
pub(super) struct StateFolder(PathBuf);

impl StateFolder {
    /// The state folder of an open checkpoint.
    ///
    /// # Errors
    /// [`MergeError::Refused`] where part of the checkpoint is also merged under another path: two ledgers for one file
    /// would each undo the other's work.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self, MergeError> {
        let root = checkpoint.root();
        let refused = |what: String| Err(MergeError::Refused { path: root.to_owned(), what });
        if checkpoint.layout() == Layout::File {
            let folder = folder_of(root).join(STATE_FOLDER);
            if ["ledger", "txn", "low-rank"].iter().any(|name| folder.join(name).exists()) {
                let whole = folder_of(root).display();
                return refused(format!(
                    "belongs to a checkpoint with a ledger; give the folder `{whole}` instead of its file"
                ));
            }
        } else {
            for shard in checkpoint.shards() {
                let own = beside_file(shard.path());
                if own.exists() {
                    return refused(format!("its file {} has a ledger of its own", shard.file_name()));
                }
            }
        }
        Ok(Self::at(root, checkpoint.layout()))
    }

    /// The state folder of a checkpoint that will lie at `root`.
    pub(super) fn at(root: &Path, layout: Layout) -> Self {
        Self(if layout == Layout::File { beside_file(root) } else { root.join(STATE_FOLDER) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
    pub(super) fn ledger(&self) -> PathBuf {
        self.0.join("ledger")
    }
    pub(super) fn ledger_new(&self) -> PathBuf {
        self.0.join("ledger.new")
    }
    pub(super) fn txn(&self) -> PathBuf {
        self.0.join("txn")
    }
    pub(super) fn adapters(&self) -> PathBuf {
        self.0.join("adapters")
    }
    pub(super) fn adapter(&self, id: &AdapterId) -> PathBuf {
        self.adapters().join(format!("{id}.safetensors"))
    }

    /// Whether an interrupted change waits here.
    pub(super) fn is_interrupted(&self) -> bool {
        self.txn().symlink_metadata().is_ok()
    }

    /// Creates the folder and its `adapters`, durably.
    pub(super) fn create(&self) -> Result<(), MergeError> {
        let adapters = self.adapters();
        fs::create_dir_all(&adapters).map_err(|e| CheckpointError::io("create", &adapters, e))?;
        sync_folder(&self.0)?;
        sync_folder(folder_of(&self.0))?;
        Ok(())
    }

    /// Removes what no ledger needs: copies of adapters that are not among `active`, an unfinished ledger, and, where no
    /// adapter is active, the folder itself.
    pub(super) fn tidy(&self, active: &[AdapterId]) -> Result<(), MergeError> {
        remove_file(&self.ledger_new())?;
        let kept: Vec<PathBuf> = active.iter().map(|id| self.adapter(id)).collect();
        let adapters = self.adapters();
        let entries = match fs::read_dir(&adapters) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            found => Some(found.map_err(|e| CheckpointError::io("list", &adapters, e))?),
        };
        for entry in entries.into_iter().flatten() {
            let path = entry.map_err(|e| CheckpointError::io("list", &adapters, e))?.path();
            if !kept.contains(&path) {
                remove_file(&path)?;
            }
        }
        if active.is_empty() && self.0.exists() {
            remove_file(&self.ledger())?;
            for folder in [&adapters, &self.0] {
                match fs::remove_dir(folder) {
                    Ok(()) => {}
                    // Somebody's own files stay.
                    Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
                    Err(e) => return Err(CheckpointError::io("remove", folder, e).into()),
                }
            }
            sync_folder(folder_of(&self.0))?;
        }
        Ok(())
    }
}

/// Where the ledger of a single file lies.
fn beside_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(STATE_FOLDER);
    file.with_file_name(name)
}

/// Removes a file; it may be gone already.
pub(super) fn remove_file(path: &Path) -> Result<(), MergeError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(CheckpointError::io("remove", path, e).into()),
        _ => Ok(()),
    }
}
