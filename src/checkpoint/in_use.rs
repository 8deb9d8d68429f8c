//! What this process is reading.
//!
//! Every checkpoint, shard and adapter folder that is open is registered here as long as its handle lives, by device and inode;
//! the [gate](super::gate) holds each output against it. A writer therefore needs no list of a command's inputs, and none can be
//! forgotten. It is the rule that Windows enforces for open files, for folders too.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, Metadata},
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{CheckpointError, EntryKind, FileId, probe};

/// Inputs by their order of registration.
static REGISTRY: Mutex<Registry> = Mutex::new(Registry { next: 0, inputs: BTreeMap::new() });

struct Registry {
    next: u64,
    inputs: BTreeMap<u64, Input>,
}

/// One input.
#[derive(Clone, Debug)]
struct Input {
    /// As the user named it.
    path: PathBuf,
    /// Where that leads, where it is known.
    real: Option<PathBuf>,
    id: FileId,
    is_folder: bool,
}

/// The registration of one input; dropping it ends the registration.
#[derive(Debug)]
pub struct InUse(u64);

impl InUse {
    /// Registers the file or folder that `path` leads to, and, for a folder, the files outside of it that its links lead to. Nothing is
    /// registered where nothing is there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] where `path` cannot be examined.
    pub fn register(path: &Path) -> Result<Vec<Self>, CheckpointError> {
        let Some(meta) = probe::metadata(path)? else { return Ok(Vec::new()) };
        let mut registered = vec![Self::insert(path, Some(real(path)?), &meta)];
        if is_folder(&meta) {
            for (name, kind) in probe::entries(path)? {
                let entry = path.join(name);
                // What cannot be reached through a link, because it leads to itself or is closed to us, no output can replace.
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

    /// Registers a folder by itself.
    pub(crate) fn folder(path: &Path, meta: &Metadata) -> Result<Self, CheckpointError> {
        Ok(Self::insert(path, Some(real(path)?), meta))
    }

    /// Registers an open file, which `path` led to.
    pub(crate) fn file(path: &Path, meta: &Metadata) -> Self {
        // Where the path cannot be resolved any more, the file is still known by its identity.
        Self::insert(path, fs::canonicalize(path).ok(), meta)
    }

    fn insert(path: &Path, real: Option<PathBuf>, meta: &Metadata) -> Self {
        let input = Input { path: path.to_owned(), real, id: FileId::of(meta), is_folder: is_folder(meta) };
        let mut registry = REGISTRY.lock().expect("no thread panics holding the lock");
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
    /// It is the input.
    Is,
    /// It is a folder above the input.
    Holds,
    /// It lies in the input, a folder.
    LiesIn,
}

/// The first input that an output conflicts with. `target` is the output where it exists, `above` are the folders on its resolved
/// path, innermost first.
pub(super) fn conflict(
    target: Option<FileId>,
    above: &[FileId],
) -> Result<Option<(Conflict, PathBuf)>, CheckpointError> {
    let inputs: Vec<Input> = {
        let registry = REGISTRY.lock().expect("no thread panics holding the lock");
        registry.inputs.values().cloned().collect()
    };
    let mut known = HashMap::new();
    for input in inputs {
        if target == Some(input.id) {
            return Ok(Some((Conflict::Is, input.path)));
        }
        if input.is_folder && above.contains(&input.id) {
            return Ok(Some((Conflict::LiesIn, input.path)));
        }
        let Some(target) = target else { continue };
        for folder in input.real.iter().flat_map(|real| real.ancestors().skip(1)) {
            let id = match known.get(folder) {
                Some(id) => *id,
                None => {
                    // A folder that was removed meanwhile holds nothing.
                    let id = probe::metadata(folder)?.map(|meta| FileId::of(&meta));
                    known.insert(folder.to_owned(), id);
                    id
                }
            };
            if id == Some(target) {
                return Ok(Some((Conflict::Holds, input.path)));
            }
        }
    }
    Ok(None)
}
