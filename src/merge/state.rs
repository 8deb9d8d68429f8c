//! Which state folder speaks for a checkpoint, and who may change it.

use super::MergeError;
use crate::checkpoint::{Checkpoint, Layout, StateFolder, folder_of};

/// The state folder of an open checkpoint.
///
/// # Errors
/// [`MergeError::Refused`] where part of the checkpoint is also merged under another path: two ledgers for one file
/// would each undo the other's work.
pub(super) fn state_of(checkpoint: &Checkpoint) -> Result<StateFolder, MergeError> {
    let root = checkpoint.root();
    let refused = |what: String| Err(MergeError::Refused { path: root.to_owned(), what });
    let own = StateFolder::of(checkpoint)?;
    if checkpoint.layout() == Layout::File {
        let whole = folder_of(root);
        if StateFolder::at(whole, Layout::Folder)?.remembers()? {
            let both = if own.remembers()? {
                "; this file has one of its own besides: `recover` on the folder helps"
            } else {
                ""
            };
            let whole = whole.display();
            return refused(format!(
                "belongs to a checkpoint with a ledger; give the folder `{whole}` instead of its file{both}"
            ));
        }
    } else if let Some(file) = with_own_ledger(checkpoint)?.first() {
        let both = if own.remembers()? { "; `recover` takes that one's adapters out again" } else { "" };
        return refused(format!("its file {file} has a ledger of its own{both}"));
    }
    Ok(own)
}

/// The shards of a folder that were merged into by themselves.
pub(super) fn with_own_ledger(checkpoint: &Checkpoint) -> Result<Vec<String>, MergeError> {
    let mut found = Vec::new();
    for shard in checkpoint.shards() {
        if StateFolder::at(shard.path(), Layout::File)?.remembers()? {
            found.push(shard.file_name());
        }
    }
    Ok(found)
}
