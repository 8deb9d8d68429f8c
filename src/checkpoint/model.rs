//! A checkpoint: its shards, its tensors by name, and its side files.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::{
    CheckpointError, CodedLayout, CodedWeight, Codes, Context, EntryKind, INDEX_FILE, InUse, Printable, Shard,
    TensorInfo, Window, folder_of,
    index::{Bounds, SINGLE_FILE, WrongTotal, index_names, open_shards},
    json::{malformed, read_whole},
    layouts::{NegativeZero, QuantizationConfig, Resolver},
    other_format::{OtherFormat, recognize_names},
    probe, state_folder,
};
use crate::tensor::RowLayout;

/// The name of `config.json` in the folder of the shards.
const CONFIG_FILE: &str = "config.json";

/// The layout of a checkpoint on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// A single safetensors file, given by its own path.
    File,
    /// A folder with one `model.safetensors`.
    Folder,
    /// A folder with `model.safetensors.index.json`, or one index with another stem.
    Sharded,
}

/// An open checkpoint: headers in memory, data on disk.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    name: String,
    layout: Layout,
    shards: Vec<Shard>,
    /// Tensors as (shard, index in its header), sorted by name.
    tensors: Vec<(u32, u32)>,
    config: serde_json::Map<String, serde_json::Value>,
    codes: Codes,
    /// The quantization config; read when a quantized weight is first decoded.
    quantization: OnceLock<QuantizationConfig>,
    /// The name of the index file of a sharded checkpoint.
    index_name: Option<String>,
    wrong_total: Option<WrongTotal>,
    /// The record of in-place merges in the index.
    merged_in_index: Option<String>,
    /// Prevents outputs that replace, contain or lie in the folder.
    _in_use: Option<InUse>,
}

/// One tensor of an open checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// The file that holds it.
    pub shard: &'a Shard,
    /// Its index in [`Checkpoint::shards`].
    pub shard_index: usize,
    /// Name, dtype, shape and data range.
    pub info: &'a TensorInfo,
    codes: &'a Codes,
    /// Of a quantized weight that is read as numbers: how.
    decoded: Option<Decoded<'a>>,
}

/// What decodes a weight.
#[derive(Clone, Copy, Debug)]
struct Decoded<'a> {
    layout: &'a CodedLayout,
    shards: &'a [Shard],
}

/// The codes of a file that has none.
static NO_CODES: Codes = Codes::none();

impl<'a> TensorRef<'a> {
    /// A tensor of plain numbers in a file that is not a shard of a checkpoint.
    pub fn of_file(shard: &'a Shard, info: &'a TensorInfo) -> Self {
        Self { shard, shard_index: 0, info, codes: &NO_CODES, decoded: None }
    }

    /// The bytes `range` of the tensor, relative to its start.
    pub fn window(&self, ctx: &Context<'_>, range: std::ops::Range<u64>) -> Result<Window, CheckpointError> {
        match self.decoded {
            Some(Decoded { layout, shards }) => layout.window(ctx, shards, range, NegativeZero::Positive),
            None => self.shard.window(ctx, self.info, range),
        }
    }

    /// The same as [`Self::window`]; of a quantized weight -0 stays -0, where else it is read as +0.
    ///
    /// # Errors
    /// As [`Self::window`].
    pub fn signed_window(&self, ctx: &Context<'_>, range: std::ops::Range<u64>) -> Result<Window, CheckpointError> {
        match self.decoded {
            Some(Decoded { layout, shards }) => layout.window(ctx, shards, range, NegativeZero::Kept),
            None => self.window(ctx, range),
        }
    }

    /// Columns of one matrix of a stack, row after row, as float32 numbers `[d_out, columns]`; -0 stays -0.
    ///
    /// Memory: the result, or where it is not all columns, a row more.
    ///
    /// # Errors
    /// As [`Self::window`].
    ///
    /// # Panics
    /// Where the weight is not quantized, or has no such columns.
    pub fn signed_columns(
        &self,
        ctx: &Context<'_>,
        stack: u64,
        columns: std::ops::Range<u64>,
    ) -> Result<Window, CheckpointError> {
        assert!(self.decoded.is_some(), "columns of a quantized weight");
        let [.., d_out, d_in] = self.info.shape[..] else { panic!("a quantized weight is a matrix or a stack") };
        assert!(columns.start < columns.end && columns.end <= d_in, "columns lie inside the rows");
        let row = |row: u64| (stack * d_out + row) * d_in;
        if columns == (0..d_in) {
            return self.signed_window(ctx, 4 * row(0)..4 * row(d_out));
        }
        let mut bytes = Vec::with_capacity((d_out * (columns.end - columns.start) * 4) as usize);
        for i in 0..d_out {
            let range = 4 * (row(i) + columns.start)..4 * (row(i) + columns.end);
            bytes.extend_from_slice(&self.signed_window(ctx, range)?);
        }
        Ok(Window::owned(bytes))
    }

    /// How the weight is stored, where it is quantized and read as numbers.
    pub fn layout(&self) -> Option<&'a CodedLayout> {
        self.decoded.map(|decoded| decoded.layout)
    }

    /// The stored tensors behind it: itself, or the codes and scales of a quantized weight.
    pub fn stored(&self) -> impl Iterator<Item = (&'a Shard, &'a TensorInfo)> + use<'a> {
        let own = self.decoded.is_none().then_some((self.shard, self.info));
        own.into_iter().chain(self.decoded.into_iter().flat_map(|it| it.layout.stored(it.shards)))
    }

    /// Bytes of the stored tensors.
    pub fn stored_bytes(&self) -> u64 {
        self.decoded.map_or(self.info.n_bytes(), |it| it.layout.stored_bytes(it.shards))
    }

    /// The same, read into owned memory and checked to be intact.
    ///
    /// # Errors
    /// A failure to read; a file that shrank.
    pub fn read(&self, ctx: &Context<'_>, range: std::ops::Range<u64>) -> Result<Vec<u8>, CheckpointError> {
        let window = self.window(ctx, range)?;
        let bytes = window.to_vec();
        self.shard.confirm(&window)?;
        Ok(bytes)
    }

    /// The tensor as rows of at least two elements.
    ///
    /// # Errors
    /// [`CheckpointError::BadTensor`] if it is not a matrix of floats, or if its rows are too long for 32-bit columns;
    /// [`CheckpointError::Coded`] if it holds codes or scales.
    pub fn rows(&self, transposed: bool) -> Result<RowLayout, CheckpointError> {
        let layout = self.any_rows(transposed)?;
        // A row of one element offers no choice.
        if self.info.shape.len() == 1 {
            return Err(self.bad(format!("shape {:?} is neither a matrix nor a stack of matrices", self.info.shape)));
        }
        Ok(layout)
    }

    /// The tensor as rows; the rows of a vector (a bias, a gain) are its elements.
    ///
    /// # Errors
    /// As [`Self::rows`], except that vectors are accepted.
    pub fn any_rows(&self, transposed: bool) -> Result<RowLayout, CheckpointError> {
        self.numbers()?;
        RowLayout::of(self.info.dtype, &self.info.shape, transposed).map_err(|what| self.bad(what))
    }

    /// The quantized weight that this tensor is a part of, as codes, scales or another part.
    pub fn coded(&self) -> Option<&'a CodedWeight> {
        if self.decoded.is_some() {
            return None;
        }
        self.codes.of_tensor(&self.info.name)
    }

    /// Fails if the tensor's elements are not plain numbers.
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
    /// Opens a checkpoint: a safetensors file, a folder with `model.safetensors`, or a folder with
    /// `model.safetensors.index.json` or exactly one index with another stem. Reads headers only.
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
    /// [`CheckpointError::Interrupted`] if a change in place was interrupted: the weights may be a mixture of two
    /// states. [`CheckpointError::Many`] lists all differences between an index and its shards.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Self::open_interrupted(path)?;
        match checkpoint.interrupted()? {
            Some(path) => Err(CheckpointError::Interrupted { path }),
            None => Ok(checkpoint),
        }
    }

    /// The same for recovery and inspection: also opens a checkpoint with an interrupted change.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_interrupted(path: &Path) -> Result<Self, CheckpointError> {
        if EntryKind::of(probe::existing(path)?.file_type()) != EntryKind::Folder {
            return Self::assemble(path, Layout::File, vec![Shard::open(path)?]);
        }
        let (single, index) = (path.join(SINGLE_FILE), path.join(INDEX_FILE));
        // A dangling link is present too, and is reported as such.
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
            // Other libraries use another stem: `diffusion_pytorch_model.safetensors.index.json`.
            (false, false) => match &index_names(path)?[..] {
                [] => Err(no_checkpoint(path)?),
                [index] => Self::open_sharded(path, &path.join(index)),
                several => {
                    let names = several.iter().map(|name| Printable(name).to_string()).collect::<Vec<_>>().join(", ");
                    Err(CheckpointError::bad_file(path, format!("has several indexes, expected one: {names}")))
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
            // The only shard registers itself.
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
            quantization: OnceLock::new(),
            index_name: None,
            wrong_total: None,
            merged_in_index: None,
            _in_use: in_use,
        })
    }

    /// The checkpoint that must be recovered first, if any: this one, the folder that its file belongs to, or one of
    /// its files.
    ///
    /// # Errors
    /// A state folder that cannot be examined, since the answer is then unknown.
    pub fn interrupted(&self) -> Result<Option<PathBuf>, CheckpointError> {
        state_folder::interrupted(self)
    }

    /// The path that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Its layout on disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }
    /// Its files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorRef<'_>> {
        self.tensors.iter().map(|&at| self.at(at))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        Some(self.at(self.place(name)?))
    }

    /// Shard and position in its header of the tensor of this name.
    fn place(&self, name: &str) -> Option<(u32, u32)> {
        let found = self.tensors.binary_search_by(|&at| self.at(at).info.name.as_str().cmp(name)).ok()?;
        Some(self.tensors[found])
    }

    /// The tensor at this index in the order of [`Self::tensors`].
    pub(crate) fn tensor_at(&self, at: usize) -> Option<TensorRef<'_>> {
        Some(self.at(*self.tensors.get(at)?))
    }

    fn at(&self, (s, t): (u32, u32)) -> TensorRef<'_> {
        let shard = &self.shards[s as usize];
        TensorRef {
            shard,
            shard_index: s as usize,
            info: &shard.header().tensors()[t as usize],
            codes: &self.codes,
            decoded: None,
        }
    }

    /// The tensor of this name, if its elements are plain numbers.
    ///
    /// # Errors
    /// A message for a list of problems: there is no such tensor, or the weight is stored as codes.
    pub fn numbers(&self, name: &str) -> Result<TensorRef<'_>, String> {
        match (self.codes.find(name), self.tensor(name)) {
            (Some(weight), _) => Err(weight.refusal()),
            (None, Some(tensor)) => Ok(tensor),
            (None, None) => Err("the base has no such tensor".to_owned()),
        }
    }

    /// Fails if any weight is stored as codes, for callers that need every weight as numbers.
    ///
    /// # Errors
    /// [`CheckpointError::Coded`] names the first such weight and their number.
    pub fn refuse_codes(&self) -> Result<(), CheckpointError> {
        CheckpointError::coded_weights(&self.root, self.codes.weights().iter())
    }

    /// Fails if any of these names refers to a quantized weight, or to a stored tensor of one.
    ///
    /// # Errors
    /// [`CheckpointError::Coded`] names the first such weight and their number.
    pub fn refuse_coded<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), CheckpointError> {
        CheckpointError::coded_weights(&self.root, names.filter_map(|name| self.codes.find(name)))
    }

    /// A quantized weight as a tensor of float32 numbers `[.., d_out, d_in]`, which are decoded as they are read. Resolves its layout
    /// the first time, from headers and config.
    ///
    /// # Errors
    /// [`CheckpointError::Layout`] where its stored tensors do not fit one another or their layout is not known; a failure to read.
    pub fn decoded(&self, weight: &CodedWeight) -> Result<TensorRef<'_>, CheckpointError> {
        let layout = self.codes.layout_or(weight, || {
            let resolver = Resolver {
                shards: &self.shards,
                find: &|name| self.place(name),
                config: self.quantization()?,
                root: &self.root,
            };
            resolver.resolve(weight)
        })?;
        let (shard_index, shard) = layout.first_shard(&self.shards);
        let decoded = Some(Decoded { layout, shards: &self.shards });
        Ok(TensorRef { shard, shard_index, info: layout.info(), codes: &self.codes, decoded })
    }

    /// The weight of this name as numbers: a plain tensor, or a quantized weight, decoded as it is read. `None` where there is no such
    /// weight; scales and the like are none.
    ///
    /// # Errors
    /// As [`Self::decoded`].
    pub fn weight(&self, name: &str) -> Result<Option<TensorRef<'_>>, CheckpointError> {
        match self.codes.of_weight(name) {
            Some(weight) => self.decoded(weight).map(Some),
            None => Ok(self.tensor(name).filter(|tensor| tensor.coded().is_none())),
        }
    }

    /// All weights, by name: plain tensors, and quantized weights as [`Self::decoded`] has them; of those that cannot be decoded, the stored
    /// tensors.
    ///
    /// # Errors
    /// A failure to read what decoding needs.
    pub fn weights(&self) -> Result<Vec<TensorRef<'_>>, CheckpointError> {
        let mut weights: Vec<_> = self.tensors().filter(|tensor| tensor.coded().is_none()).collect();
        for weight in self.codes.weights() {
            match self.decoded(weight) {
                Ok(tensor) => weights.push(tensor),
                Err(CheckpointError::Layout { .. }) => {
                    weights.extend(weight.tensors().iter().filter_map(|name| self.tensor(name)));
                }
                Err(other) => return Err(other),
            }
        }
        weights.sort_unstable_by(|a, b| a.info.name.cmp(&b.info.name));
        Ok(weights)
    }

    fn quantization(&self) -> Result<&QuantizationConfig, CheckpointError> {
        if self.quantization.get().is_none() {
            let is_file = self.layout == Layout::File;
            let folder = if is_file { folder_of(&self.root) } else { &self.root };
            let config = if is_file { config_beside(&self.root)? } else { self.config.clone() };
            let _same = self.quantization.set(QuantizationConfig::read(folder, &config)?);
        }
        Ok(self.quantization.get().expect("it was just set"))
    }

    /// The weights that are stored as codes.
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// Number of parameters of the model: elements of plain tensors and of decoded quantized weights. A quantized weight
    /// that cannot be decoded counts with its stored elements.
    pub fn n_parameters(&self) -> u64 {
        let plain = self.tensors().filter(|tensor| tensor.coded().is_none()).map(|tensor| tensor.info.n_elements());
        let quantized = self.codes.weights().iter().map(|weight| match self.decoded(weight) {
            Ok(tensor) => tensor.info.n_elements(),
            Err(_) => {
                let stored = weight.tensors().into_iter().filter_map(|name| self.tensor(&name));
                stored.map(|tensor| tensor.info.n_elements()).next().unwrap_or(0)
            }
        });
        plain.chain(quantized).sum()
    }
    /// Size of all files in bytes.
    pub fn n_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::file_bytes).sum()
    }

    /// The name of the folder or file for display; never a whole path.
    pub fn name(&self) -> String {
        self.name.clone()
    }
    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> Option<&str> {
        self.config.get("model_type")?.as_str()
    }
    /// The contents of `config.json`; empty if there is none.
    pub fn config(&self) -> &serde_json::Map<String, serde_json::Value> {
        &self.config
    }

    /// Harmless irregularities, as text.
    pub fn notes(&self) -> Vec<String> {
        let wrong = self.wrong_total.map(|wrong| {
            let WrongTotal { recorded, found } = wrong;
            let index = self.index_name().unwrap_or(INDEX_FILE);
            format!("{}: metadata.total_size is {recorded}, the tensors have {found} bytes", Printable(index))
        });
        wrong.into_iter().collect()
    }

    /// The name of its index file, if it is sharded.
    pub fn index_name(&self) -> Option<&str> {
        self.index_name.as_deref()
    }

    /// The record of in-place merges in its index, under [`MERGED_KEY`](super::MERGED_KEY).
    pub(crate) fn merged_in_index(&self) -> Option<&str> {
        self.merged_in_index.as_deref()
    }

    /// The wrong total size in its index, which does no harm.
    pub(super) fn wrong_total(&self) -> Option<WrongTotal> {
        self.wrong_total
    }

    /// Fails if a file changed since it was opened.
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        self.shards.iter().try_for_each(Shard::unchanged)
    }
}

/// The `config.json` in the folder of a file; empty if there is none.
pub(crate) fn config_beside(file: &Path) -> Result<serde_json::Map<String, serde_json::Value>, CheckpointError> {
    read_config(&folder_of(file).join(CONFIG_FILE))
}

/// Reads `config.json`; empty if there is none.
pub(super) fn read_config(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>, CheckpointError> {
    const MAX_BYTES: u64 = 16 << 20;
    // A parsed value takes about fifty times the memory of its shortest JSON.
    const MAX_VALUES: usize = 1_000_000;
    // A dangling link is present, and is reported as such.
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
