//! The folder of a PEFT adapter.

use std::path::{Path, PathBuf};

use super::{PeftConfig, PeftError, unpacked::Unpacked};
use crate::checkpoint::{
    ADAPTER_INDEX_FILE, CheckpointError, Context, InUse, Printable, Shard, TensorInfo, folder_of, open_shards, probe,
};

/// The config's file name.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// The tensors' file name.
pub const PEFT_TENSORS: &str = "adapter_model.safetensors";
/// The tensors' file name where torch pickled them.
const PICKLED_TENSORS: &str = "adapter_model.bin";
/// What LLaVA's trainers leave beside an adapter: other tensors that were trained, in full and pickled.
const NON_LORA_TENSORS: &str = "non_lora_trainables.bin";

/// An open PEFT adapter of any method: config parsed, headers read, tensors on disk.
///
/// Its tensors lie in `adapter_model.safetensors`, in shards with an index, or in `adapter_model.bin`, which is unpacked into a temporary
/// folder; `non_lora_trainables.bin` beside them is part of the adapter.
#[derive(Debug)]
pub struct PeftFolder {
    path: PathBuf,
    config: PeftConfig,
    tensors_path: PathBuf,
    files: Vec<TensorFile>,
    /// Tensors (file, position in its header), sorted by name.
    by_name: Vec<(usize, usize)>,
    /// No output replaces, holds or lies in the folder meanwhile.
    _in_use: Vec<InUse>,
}

/// A file of an adapter's tensors.
#[derive(Debug)]
struct TensorFile {
    /// As the user knows it.
    path: PathBuf,
    shard: Shard,
    unpacked: Option<Unpacked>,
}

impl TensorFile {
    fn plain(shard: Shard) -> Self {
        Self { path: shard.path().to_owned(), shard, unpacked: None }
    }

    fn pickled(ctx: &Context<'_>, path: &Path) -> Result<Self, CheckpointError> {
        let (shard, unpacked) = Unpacked::open(ctx, path)?;
        Ok(Self { path: path.to_owned(), shard, unpacked: Some(unpacked) })
    }
}

/// The folder of the PEFT adapter that `path` is: a folder with a config, or one of the files that PEFT gives an adapter's tensors, with
/// a config beside it. `None` for everything else.
///
/// # Errors
/// A path that cannot be examined.
pub(super) fn peft_folder(path: &Path) -> Result<Option<&Path>, CheckpointError> {
    let folder = if probe::is_folder(path)? {
        path
    } else if [PEFT_TENSORS, ADAPTER_INDEX_FILE, PICKLED_TENSORS]
        .iter()
        .any(|name| path.file_name() == Some(name.as_ref()))
    {
        folder_of(path)
    } else {
        return Ok(None);
    };
    Ok(probe::is_present(&folder.join(PEFT_CONFIG))?.then_some(folder))
}

impl PeftFolder {
    /// Opens the adapter at `path`: its folder, or the file of its tensors.
    ///
    /// Reads headers only; what is pickled is unpacked.
    ///
    /// # Errors
    /// Files that are missing, or are not what they should be; tensors that are there twice.
    pub fn open(ctx: &Context<'_>, path: &Path) -> Result<Self, PeftError> {
        let folder = peft_folder(path)?.unwrap_or(path);
        let config = PeftConfig::open(&folder.join(PEFT_CONFIG))?;
        let tensors_path = if folder == path { tensors_of(folder)? } else { path.to_owned() };
        let mut files = if tensors_path.ends_with(PICKLED_TENSORS) {
            vec![TensorFile::pickled(ctx, &tensors_path)?]
        } else if tensors_path.ends_with(ADAPTER_INDEX_FILE) {
            let (_, shards) = open_shards(folder, &tensors_path)?;
            shards.into_iter().map(TensorFile::plain).collect()
        } else {
            vec![TensorFile::plain(Shard::open(&tensors_path)?)]
        };
        let beside = folder.join(NON_LORA_TENSORS);
        if probe::is_present(&beside)? {
            files.push(TensorFile::pickled(ctx, &beside)?);
        }
        let by_name = by_name(&files)?;
        let in_use = InUse::register(folder)?;
        Ok(Self { path: path.to_owned(), config, tensors_path, files, by_name, _in_use: in_use })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// What the config says.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }
    /// The file of its tensors, or their index.
    pub fn tensors_path(&self) -> &Path {
        &self.tensors_path
    }

    /// All tensors and the files that hold them, by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&Shard, &TensorInfo)> {
        self.by_name.iter().map(|&at| self.at(at))
    }

    /// The tensor of this name, and the file that holds it.
    pub fn tensor(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let found = self.by_name.binary_search_by(|&at| self.at(at).1.name.as_str().cmp(name)).ok()?;
        Some(self.at(self.by_name[found]))
    }

    fn at(&self, (file, position): (usize, usize)) -> (&Shard, &TensorInfo) {
        let shard = &self.files[file].shard;
        (shard, &shard.header().tensors()[position])
    }

    /// An error about a tensor, which names the file as the user knows it.
    pub(super) fn bad_tensor(&self, shard: &Shard, info: &TensorInfo, what: impl Into<String>) -> CheckpointError {
        let file = self.files.iter().find(|file| std::ptr::eq(&raw const file.shard, shard));
        CheckpointError::bad_tensor(file.map_or(shard.path(), |file| &file.path), &info.name, what)
    }

    /// The one file of all tensors, where that is how they lie on disk.
    pub(super) fn single_file(&self) -> Option<&Shard> {
        match &self.files[..] {
            [TensorFile { shard, unpacked: None, .. }] => Some(shard),
            _ => None,
        }
    }

    /// Bytes of all tensors and headers.
    pub fn n_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.shard.file_bytes()).sum()
    }

    /// Fails where a file changed since it was opened.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`].
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        for file in &self.files {
            file.shard.unchanged()?;
            file.unpacked.as_ref().map_or(Ok(()), Unpacked::unchanged)?;
        }
        Ok(())
    }
}

/// What holds the tensors of the adapter in `folder`.
fn tensors_of(folder: &Path) -> Result<PathBuf, CheckpointError> {
    let [single, index, pickled] = [PEFT_TENSORS, ADAPTER_INDEX_FILE, PICKLED_TENSORS].map(|name| folder.join(name));
    match (probe::is_present(&single)?, probe::is_present(&index)?) {
        (true, true) => {
            let what = format!("has both {PEFT_TENSORS} and {ADAPTER_INDEX_FILE}; remove the one that is stale");
            Err(CheckpointError::bad_file(folder, what))
        }
        (false, true) => Ok(index),
        // PEFT does not look at the pickle either where both are there.
        (false, false) if probe::is_present(&pickled)? => Ok(pickled),
        _ => Ok(single),
    }
}

/// The tensors of all files, by name, each once.
fn by_name(files: &[TensorFile]) -> Result<Vec<(usize, usize)>, CheckpointError> {
    let headers = files.iter().map(|file| file.shard.header().tensors().len());
    let mut tensors: Vec<_> = headers.enumerate().flat_map(|(file, n)| (0..n).map(move |at| (file, at))).collect();
    let name = |&(file, at): &(usize, usize)| files[file].shard.header().tensors()[at].name.as_str();
    tensors.sort_unstable_by(|a, b| name(a).cmp(name(b)));
    match tensors.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
        None => Ok(tensors),
        Some(pair) => {
            let [a, b] = [pair[0], pair[1]].map(|(file, _)| Printable::path(&files[file].path).to_string());
            Err(CheckpointError::bad_tensor(&files[pair[0].0].path, name(&pair[0]), format!("is in {a} and in {b}")))
        }
    }
}
