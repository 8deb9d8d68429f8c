//! A checkpoint: its shards, its tensors by name, and the files beside them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    CheckpointError, CodedWeight, Codes, Context, EntryKind, INDEX_FILE, InUse, Printable, Shard, TensorInfo, Window,
    folder_of,
    index::{Bounds, SINGLE_FILE, WrongTotal, index_names, open_shards},
    json::{malformed, read_whole},
    other_format::{OtherFormat, recognize_names},
    probe, state_folder,
};
use crate::tensor::RowLayout;

/// The name of a checkpoint's only shard, and of `config.json` beside it.
const CONFIG_FILE: &str = "config.json";

/// How a checkpoint lies on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One safetensors file, given by its own path.
    File,
    /// A folder with one `model.safetensors`.
    Folder,
    /// A folder with `model.safetensors.index.json`, or one index of another stem.
    Sharded,
}

/// An open checkpoint: headers in memory, data on disk.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    name: String,
    layout: Layout,
    shards: Vec<Shard>,
    /// Tensor (shard, position in its header), sorted by name.
    tensors: Vec<(u32, u32)>,
    config: serde_json::Map<String, serde_json::Value>,
    codes: Codes,
    /// The index file's name, of a sharded checkpoint.
    index_name: Option<String>,
    wrong_total: Option<WrongTotal>,
    /// What the index says was merged.
    merged_in_index: Option<String>,
    /// No output replaces, holds or lies in the folder meanwhile.
    _in_use: Option<InUse>,
}

/// One tensor of an open checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// The file that holds it.
    pub shard: &'a Shard,
    /// Which of [`Checkpoint::shards`] that is.
    pub shard_index: usize,
    /// Name, type, shape and place.
    pub info: &'a TensorInfo,
    codes: &'a Codes,
}

/// The coded weights of a file that has none.
static NO_CODES: Codes = Codes::none();

impl<'a> TensorRef<'a> {
    /// A tensor of plain numbers in a file that is no checkpoint's shard.
    pub fn of_file(shard: &'a Shard, info: &'a TensorInfo) -> Self {
        Self { shard, shard_index: 0, info, codes: &NO_CODES }
    }

    /// The bytes `range` of the tensor, in bytes from its start.
    pub fn window(&self, ctx: &Context<'_>, range: std::ops::Range<u64>) -> Result<Window, CheckpointError> {
        self.shard.window(ctx, self.info, range)
    }

    /// The same, read into memory of the caller's own and proven to be there still.
    ///
    /// # Errors
    /// A failure to read, a file that shrank.
    pub fn read(&self, ctx: &Context<'_>, range: std::ops::Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        let window = self.window(ctx, range)?;
        let bytes = window.to_vec();
        self.shard.confirm(&window)?;
        Ok(bytes)
    }

    /// The tensor as rows of several elements.
    ///
    /// # Errors
    /// [`CheckpointError::BadTensor`] where it is no matrix of floats, or where its rows are too long for 32-bit columns;
    /// [`CheckpointError::Coded`] where it holds codes or scales.
    pub fn rows(&self, transposed: bool) -> Result<RowLayout, CheckpointError> {
        let layout = self.any_rows(transposed)?;
        // Nothing is chosen among one element.
        if self.info.shape.len() == 1 {
            return Err(self.bad(format!("shape {:?} is no matrix and no stack of matrices", self.info.shape)));
        }
        Ok(layout)
    }

    /// The tensor as rows, those of a vector (a bias, a gain) being its elements.
    ///
    /// # Errors
    /// As [`Self::rows`], which refuses vectors.
    pub fn any_rows(&self, transposed: bool) -> Result<RowLayout, CheckpointError> {
        self.numbers()?;
        RowLayout::of(self.info.dtype, &self.info.shape, transposed).map_err(|what| self.bad(what))
    }

    /// The coded weight that this tensor is a part of: codes, scales or the like.
    pub fn coded(&self) -> Option<&'a CodedWeight> {
        self.codes.of_tensor(&self.info.name)
    }

    /// Fails where the tensor's elements are no numbers by themselves.
    ///
    /// # Errors
    /// [`CheckpointError::Coded`].
    pub fn numbers(&self) -> Result<(), CheckpointError> {
        match self.coded() {
            Some(weight) => Err(CheckpointError::coded(self.shard.path(), weight)),
            None => Ok(()),
        }
    }

    fn bad(&self, what: String) -> CheckpointError {
        CheckpointError::bad_tensor(self.shard.path(), &self.info.name, what)
    }
}

impl Checkpoint {
    /// Opens a checkpoint: a safetensors file, a folder with `model.safetensors`, or one with
    /// `model.safetensors.index.json` or exactly one index of another stem. Reads headers only.
    ///
    /// ```
    /// use neuroada_ckpt::Checkpoint;
    /// let checkpoint = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
    /// assert_eq!(checkpoint.model_type(), Some("llama"));
    /// assert!(checkpoint.tensor("model.norm.weight").is_some());
    /// # Ok::<(), neuroada_ckpt::CheckpointError>(())
    /// ```
    ///
    /// # Errors
    /// [`CheckpointError::Interrupted`] where a change in place was cut short: its weights may be a mixture of two states.
    /// [`CheckpointError::Many`] lists everything in which an index and its shards disagree.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Self::open_interrupted(path)?;
        match checkpoint.interrupted()? {
            Some(path) => Err(CheckpointError::Interrupted { path }),
            None => Ok(checkpoint),
        }
    }

    /// The same for those who recover a checkpoint, or tell what it is: one that waits for recovery is opened too.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_interrupted(path: &Path) -> Result<Self, CheckpointError> {
        if EntryKind::of(probe::existing(path)?.file_type()) != EntryKind::Folder {
            return Self::assemble(path, Layout::File, vec![Shard::open(path)?]);
        }
        let (single, index) = (path.join(SINGLE_FILE), path.join(INDEX_FILE));
        // A link that leads nowhere is there too, and is told as such.
        match (probe::is_present(&single)?, probe::is_present(&index)?) {
            (true, true) => Err(CheckpointError::bad_file(
                path,
                format!("has both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale"),
            )),
            (true, false) => {
                let resolved = Bounds::of(path)?.resolve(SINGLE_FILE.as_ref());
                resolved.map_err(|problem| CheckpointError::bad_file(path, problem))?;
                Self::assemble(path, Layout::Folder, vec![Shard::open(&single)?])
            }
            (false, true) => Self::open_sharded(path, &index),
            // Other libraries give the index another stem: `diffusion_pytorch_model.safetensors.index.json`.
            (false, false) => match &index_names(path)?[..] {
                [] => Err(no_checkpoint(path)?),
                [index] => Self::open_sharded(path, &path.join(index)),
                several => {
                    let names = several.iter().map(|name| Printable(name).to_string()).collect::<Vec<_>>().join(", ");
                    Err(CheckpointError::bad_file(path, format!("has several indexes, one is needed: {names}")))
                }
            },
        }
    }

    fn open_sharded(root: &Path, index_path: &Path) -> Result<Self, CheckpointError> {
        let (index, shards) = open_shards(root, index_path)?;
        let wrong_total = index.wrong_total(&shards);
        let index_name = index_path.file_name().map(|name| name.to_string_lossy().into_owned());
        let merged_in_index = index.merged().map(str::to_owned);
        Ok(Self { wrong_total, index_name, merged_in_index, ..Self::assemble(root, Layout::Sharded, shards)? })
    }

    fn assemble(root: &Path, layout: Layout, shards: Vec<Shard>) -> Result<Self, CheckpointError> {
        let mut tensors: Vec<(u32, u32)> = Vec::new();
        for (s, shard) in shards.iter().enumerate() {
            tensors.extend((0..shard.header().tensors().len()).map(|t| (s as u32, t as u32)));
        }
        let name = |&(s, t): &(u32, u32)| shards[s as usize].header().tensors()[t as usize].name.as_str();
        tensors.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        let config = match layout {
            Layout::File => serde_json::Map::new(),
            _ => read_config(&root.join(CONFIG_FILE))?,
        };
        let in_use = match layout {
            // Its shard is registered by itself.
            Layout::File => None,
            _ => Some(InUse::folder(root, &probe::existing(root)?)?),
        };
        let codes = Codes::of(root, layout, &shards, &config)?;
        let real = fs::canonicalize(root).map_err(|e| CheckpointError::io("open", root, e))?;
        let name = if layout == Layout::File { real.file_stem() } else { real.file_name() };
        let name = name.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Self {
            root: root.to_owned(),
            name,
            layout,
            shards,
            tensors,
            config,
            codes,
            index_name: None,
            wrong_total: None,
            merged_in_index: None,
            _in_use: in_use,
        })
    }

    /// The checkpoint that waits for recovery, where there is one: this one, the folder that its file belongs to, or one of its files.
    ///
    /// # Errors
    /// A state folder that cannot be examined: nobody knows then.
    pub fn interrupted(&self) -> Result<Option<PathBuf>, CheckpointError> {
        state_folder::interrupted(self)
    }

    /// The path that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// How it lies on disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }
    /// Its files, by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> {
        self.tensors.iter().map(|&at| self.at(at))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let found = self.tensors.binary_search_by(|&at| self.at(at).info.name.as_str().cmp(name)).ok()?;
        Some(self.at(self.tensors[found]))
    }

    /// The tensor at this place among all, in the order of [`Self::tensors`].
    pub(crate) fn tensor_at(&self, at: usize) -> Option<TensorRef<'_>> {
        Some(self.at(*self.tensors.get(at)?))
    }

    fn at(&self, (s, t): (u32, u32)) -> TensorRef<'_> {
        let shard = &self.shards[s as usize];
        TensorRef { shard, shard_index: s as usize, info: &shard.header().tensors()[t as usize], codes: &self.codes }
    }

    /// The tensor of this name, to be used as numbers.
    ///
    /// # Errors
    /// Words for a list of problems: there is none, or the weight is stored as codes.
    pub fn numbers(&self, name: &str) -> Result<TensorRef<'_>, String> {
        match (self.codes.find(name), self.tensor(name)) {
            (Some(weight), _) => Err(weight.refusal()),
            (None, Some(tensor)) => Ok(tensor),
            (None, None) => Err("the base has no such tensor".to_owned()),
        }
    }

    /// Fails where any weight is stored as codes: for those who need all of them as numbers.
    ///
    /// # Errors
    /// [`CheckpointError::Coded`] names the first, and how many there are.
    pub fn refuse_codes(&self) -> Result<(), CheckpointError> {
        CheckpointError::coded_weights(&self.root, self.codes.weights().iter())
    }

    /// Fails where any of these names stands for a weight that is stored as codes, or for a stored tensor of one.
    ///
    /// # Errors
    /// [`CheckpointError::Coded`] names the first, and how many there are.
    pub fn refuse_coded<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), CheckpointError> {
        CheckpointError::coded_weights(&self.root, names.filter_map(|name| self.codes.find(name)))
    }

    /// The weights that are stored as codes.
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// Elements of all tensors: the parameters of the model as it is stored.
    pub fn n_parameters(&self) -> u64 {
        self.tensors().map(|tensor| tensor.info.n_elements()).sum()
    }
    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::file_bytes).sum()
    }

    /// The name of the folder or file, for people; never a whole path.
    pub fn name(&self) -> String {
        self.name.clone()
    }
    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> Option<&str> {
        self.config.get("model_type")?.as_str()
    }
    /// `config.json`, empty where there is none.
    pub fn config(&self) -> &serde_json::Map<String, serde_json::Value> {
        &self.config
    }

    /// What is odd about it and does no harm, in words.
    pub fn notes(&self) -> Vec<String> {
        let wrong = self.wrong_total.map(|wrong| {
            let WrongTotal { said, found } = wrong;
            let index = self.index_name().unwrap_or(INDEX_FILE);
            format!("{}: metadata.total_size is {said}, the tensors have {found} bytes", Printable(index))
        });
        wrong.into_iter().collect()
    }

    /// The name of its index file, where it is sharded.
    pub fn index_name(&self) -> Option<&str> {
        self.index_name.as_deref()
    }

    /// What its index says was merged in place, under [`MERGED_KEY`](super::MERGED_KEY).
    pub(crate) fn merged_in_index(&self) -> Option<&str> {
        self.merged_in_index.as_deref()
    }

    /// What is wrong with its index, and does no harm.
    pub(super) fn wrong_total(&self) -> Option<WrongTotal> {
        self.wrong_total
    }

    /// Fails where a file changed since it was opened.
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        self.shards.iter().try_for_each(Shard::unchanged)
    }
}

/// `config.json` beside a file, empty where there is none.
pub(crate) fn config_beside(file: &Path) -> Result<serde_json::Map<String, serde_json::Value>, CheckpointError> {
    read_config(&folder_of(file).join(CONFIG_FILE))
}

/// Reads `config.json`, or nothing where there is none.
pub(super) fn read_config(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>, CheckpointError> {
    const MAX_BYTES: u64 = 16 << 20;
    // A parsed value takes some fifty times the memory of the shortest JSON for it.
    const MAX_VALUES: usize = 1_000_000;
    // A link that leads nowhere is there, and is told as such.
    if !probe::is_present(path)? {
        return Ok(serde_json::Map::new());
    }
    let json = read_whole(path, MAX_BYTES)?;
    let bad = |what: String| CheckpointError::bad_file(path, what);
    let n_values = json.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if n_values > MAX_VALUES {
        return Err(bad(format!("has about {n_values} values, at most {MAX_VALUES} are accepted")));
    }
    serde_json::from_slice(&json).map_err(|e| bad(format!("the JSON is malformed: {}", malformed(&json, 0, &e))))
}

/// What a folder without a safetensors checkpoint is; `None` for nothing known.
///
/// # Errors
/// A folder that cannot be listed.
pub fn recognize_folder(folder: &Path) -> Result<Option<OtherFormat>, CheckpointError> {
    let entries = probe::entries(folder)?;
    let names: Vec<&str> = entries.iter().filter_map(|(name, _)| name.to_str()).collect();
    Ok(recognize_names(folder, &names, hub_snapshot(folder)?))
}

/// The snapshot of the main branch of a repository in the Hugging Face cache, `models--ORG--NAME`; `None` where there is none.
///
/// # Errors
/// A path that cannot be examined.
pub fn hub_snapshot(repository: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    const MAX_REF_BYTES: u64 = 256;
    let reference = repository.join("refs/main");
    if !probe::is_file(&reference)? {
        return Ok(None);
    }
    let commit = read_whole(&reference, MAX_REF_BYTES)?;
    let commit = String::from_utf8_lossy(&commit).trim().to_owned();
    let is_hash = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    let snapshot = repository.join("snapshots").join(&commit);
    Ok((is_hash && probe::is_folder(&snapshot)?).then_some(snapshot))
}

/// The error for a folder without a checkpoint.
fn no_checkpoint(folder: &Path) -> Result<CheckpointError, CheckpointError> {
    Ok(match recognize_folder(folder)? {
        Some(format) => CheckpointError::other_format(folder, format, "a safetensors checkpoint"),
        None => CheckpointError::bad_file(
            folder,
            format!("has neither {SINGLE_FILE} nor {INDEX_FILE}{}", contents(folder)?),
        ),
    })
}

/// What lies in a folder, in a few words: `; it is empty`.
fn contents(folder: &Path) -> Result<String, CheckpointError> {
    const MAX_NAMES: usize = 3;
    let names: Vec<String> = probe::entries(folder)?
        .iter()
        .map(|(name, _)| Printable(&name.to_string_lossy()).to_string())
        .filter(|name| !name.starts_with('.'))
        .collect();
    Ok(match names.len() {
        0 => "; it is empty".to_owned(),
        n if n > MAX_NAMES => format!("; it has {} and {} more", names[..MAX_NAMES].join(", "), n - MAX_NAMES),
        _ => format!("; it has {}", names.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_of_the_hub_cache_is_that_of_main() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--a--b");
        let snapshot = repository.join("snapshots/0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        assert_eq!(recognize_folder(&repository).unwrap(), None);
        fs::create_dir(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "0123abcd\n").unwrap();
        assert_eq!(recognize_folder(&repository).unwrap(), Some(OtherFormat::HubCache(snapshot)));
        fs::write(repository.join("refs/main"), "../..").unwrap();
        assert_eq!(hub_snapshot(&repository).unwrap(), None);
    }
}
