//! The registry of inputs that this process is reading.
//!
//! Every open checkpoint, shard and adapter folder is registered here by device and inode for the lifetime of its
//! handle; the [gate](super::gate) compares each output with it. Writers therefore need no list of a command's inputs,
//! and none can be forgotten. Windows enforces the same rule for open files; this covers folders too.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, Metadata},
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{CheckpointError, EntryKind, FileId, probe};

/// Inputs, keyed by order of registration.
static REGISTRY: Mutex<Registry> = Mutex::new(Registry { next: 0, inputs: BTreeMap::new() });

struct Registry {
    next: u64,
    inputs: BTreeMap<u64, Input>,
}

/// One input.
#[derive(Clone, Debug)]
struct Input {
    /// The path given by the user.
    path: PathBuf,
    /// The resolved path, if known.
    real: Option<PathBuf>,
    id: FileId,
    is_folder: bool,
}

/// The registration of one input, which ends on drop.
#[derive(Debug)]
pub struct InUse(u64);

impl InUse {
    /// Registers the file or folder at `path`; for a folder, also the files outside it that its links lead to.
    /// Registers nothing if nothing exists there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if `path` cannot be examined.
    pub fn register(path: &Path) -> Result<Vec<Self>, CheckpointError> {
        let Some(meta) = probe::metadata(path)? else { return Ok(Vec::new()) };
        let mut registered = vec![Self::insert(path, Some(real(path)?), &meta)];
        if is_folder(&meta) {
            for (name, kind) in probe::entries(path)? {
                let entry = path.join(name);
                // No output can replace a target that its link cannot reach, be it a loop or a lack of permission.
                if kind == EntryKind::Link
                    && let Ok(Some(meta)) = probe::metadata(&entry)
                    && let Ok(real) = real(&entry)
                {
                    registered.push(Self::insert(&entry, Some(real), &meta));
                }
            }
        }
        Ok(registered)
    }

    /// Registers a folder alone.
    pub(crate) fn folder(path: &Path, meta: &Metadata) -> Result<Self, CheckpointError> {
        Ok(Self::insert(path, Some(real(path)?), meta))
    }

    /// Registers an open file that was reached through `path`.
    pub(crate) fn file(path: &Path, meta: &Metadata) -> Self {
        // If the path can no longer be resolved, the file is still known by its identity.
        Self::insert(path, fs::canonicalize(path).ok(), meta)
    }

    fn insert(path: &Path, real: Option<PathBuf>, meta: &Metadata) -> Self {
        let input = Input { path: path.to_owned(), real, id: FileId::of(meta), is_folder: is_folder(meta) };
        let mut registry = REGISTRY.lock().expect("no thread panics while holding the lock");
        let key = registry.next;
        registry.next += 1;
        registry.inputs.insert(key, input);
        Self(key)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Ok(mut registry) = REGISTRY.lock() {
            registry.inputs.remove(&self.0);
        }
    }
}

fn is_folder(meta: &Metadata) -> bool {
    EntryKind::of(meta.file_type()) == EntryKind::Folder
}

fn real(path: &Path) -> Result<PathBuf, CheckpointError> {
    fs::canonicalize(path).map_err(|e| CheckpointError::io("examine", path, e))
}

/// How an output conflicts with an input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Conflict {
    /// The output is the input.
    Same,
    /// The output is a folder that contains the input.
    Contains,
    /// The output lies inside the input, a folder.
    Inside,
}

/// The first input that an output conflicts with. `target` is the output if it exists; `above` are the folders on its
/// resolved path, innermost first.
pub(super) fn conflict(
    target: Option<FileId>,
    above: &[FileId],
) -> Result<Option<(Conflict, PathBuf)>, CheckpointError> {
    let inputs: Vec<Input> = {
        let registry = REGISTRY.lock().expect("no thread panics while holding the lock");
        registry.inputs.values().cloned().collect()
    };
    let mut known = HashMap::new();
    for input in inputs {
        if target == Some(input.id) {
            return Ok(Some((Conflict::Same, input.path)));
        }
        if input.is_folder && above.contains(&input.id) {
            return Ok(Some((Conflict::Inside, input.path)));
        }
        let Some(target) = target else { continue };
        for folder in input.real.iter().flat_map(|real| real.ancestors().skip(1)) {
            let id = match known.get(folder) {
                Some(id) => *id,
                None => {
                    // A folder that was removed in the meantime contains nothing.
                    let id = probe::metadata(folder)?.map(|meta| FileId::of(&meta));
                    known.insert(folder.to_owned(), id);
                    id
                }
            };
            if id == Some(target) {
                return Ok(Some((Conflict::Contains, input.path)));
            }
        }
    }
    Ok(None)
}
