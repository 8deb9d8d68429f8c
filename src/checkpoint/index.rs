//! `model.safetensors.index.json`: the map from tensors to shards.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{
    CheckpointError, MERGED_KEY, Printable, Shard, TensorInfo,
    json::{Allowance, Text, malformed, not_a_string, read_whole},
    probe,
};

/// The name of a checkpoint's only shard.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// The file's name in the shards' folder.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The suffix of all index file names.
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// The index of a sharded PEFT adapter, which is not a checkpoint.
pub(crate) const ADAPTER_INDEX_FILE: &str = "adapter_model.safetensors.index.json";

/// The names of a folder's index files, without those of adapters, sorted; only [`INDEX_FILE`] if it exists.
pub(super) fn index_names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    if probe::is_present(&folder.join(INDEX_FILE))? {
        return Ok(vec![INDEX_FILE.to_owned()]);
    }
    let names = probe::entries(folder)?.into_iter().filter_map(|(name, _)| name.into_string().ok());
    let is_index = |name: &String| name.ends_with(INDEX_SUFFIX) && !name.starts_with('.') && name != ADAPTER_INDEX_FILE;
    Ok(names.filter(is_index).collect())
}

/// Opens all shards listed in the index at `index_path`, each inside the folder `root`, and compares them with the
/// index.
///
/// # Errors
/// [`CheckpointError::Many`] lists all missing shards, or all differences between the index and its shards.
pub(crate) fn open_shards(root: &Path, index_path: &Path) -> Result<(Index, Vec<Shard>), CheckpointError> {
    let index = Index::open(index_path)?;
    let many =
        |what: &str, problems| CheckpointError::Many { path: index_path.to_owned(), what: what.to_owned(), problems };
    let bounds = Bounds::of(root)?;
    let (mut paths, mut problems) = (Vec::new(), Vec::new());
    for name in index.shard_names() {
        match bounds.resolve(name.as_ref()) {
            Ok(path) => paths.push(path),
            Err(problem) => problems.push(format!("shard {problem}")),
        }
    }
    if !problems.is_empty() {
        return Err(many("the checkpoint is incomplete", problems));
    }
    let mut shards = Vec::with_capacity(paths.len());
    for path in paths {
        shards.push(Shard::open(&path)?);
    }
    let problems = index.disagreements(&shards);
    if !problems.is_empty() {
        return Err(many("the index and its shards disagree", problems));
    }
    Ok((index, shards))
}

/// Maximum size of an index: six times that of the largest published model.
pub(super) const MAX_INDEX_BYTES: u64 = 100_000_000;
/// Maximum memory for a parsed index.
const MAX_PARSED_BYTES: usize = 170_000_000;
/// Maximum number of shards: ten times as many as the largest published model has.
const MAX_SHARDS: usize = 10_000;
/// The maximum number of problems to report.
const MAX_PROBLEMS: usize = 10_000;

/// A parsed index; shard names are plain file names.
#[derive(Debug)]
pub struct Index {
    /// Tensor names with the index of their shard in `shards`, sorted by name, unique.
    weight_map: Vec<(String, u32)>,
    /// Sorted by name.
    shards: Vec<String>,
    total_size: Option<u64>,
    merged: Option<String>,
}

impl Index {
    /// Reads and parses the index file at `path`.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::parse(path, &read_whole(path, MAX_INDEX_BYTES)?)
    }

    /// Parses the index's JSON; `path` is for messages.
    ///
    /// # Errors
    /// [`CheckpointError::BadFile`], or [`CheckpointError::Many`] listing every shard name that is not a plain file name.
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self, CheckpointError> {
        let bad = |what: String| CheckpointError::bad_file(path, what);
        let raw =
            RawIndex::parse(json).map_err(|e| bad(format!("the index is malformed: {}", malformed(json, 0, &e))))?;
        let WeightMap { mut tensors, shards } = raw.weight_map;
        // Renumber the shards from order of appearance to order of name.
        let mut names: Vec<&str> = vec![""; shards.len()];
        for (name, &id) in &shards {
            names[id as usize] = name;
        }
        let escapes: Vec<String> = shards
            .keys()
            .filter(|name| !is_plain_file_name(name))
            .map(|name| format!("\"{}\"", Printable(name)))
            .collect();
        if !escapes.is_empty() {
            let what = "shards must be plain file names inside the checkpoint's folder, found".to_owned();
            return Err(CheckpointError::Many { path: path.to_owned(), what, problems: escapes });
        }
        tensors.sort_unstable();
        for pair in tensors.windows(2) {
            let [(first, a), (second, b)] = pair else { unreachable!("a window of two") };
            if first == second {
                let (a, b) = (Printable(names[*a as usize]), Printable(names[*b as usize]));
                return Err(bad(format!("tensor \"{}\" is listed twice, in {a} and in {b}", Printable(first))));
            }
        }
        if tensors.is_empty() {
            return Err(bad("weight_map is empty".to_owned()));
        }
        let mut sorted = vec![0; shards.len()];
        for (position, &id) in shards.values().enumerate() {
            sorted[id as usize] = position as u32;
        }
        for (_, shard) in &mut tensors {
            *shard = sorted[*shard as usize];
        }
        Ok(Self {
            weight_map: tensors,
            shards: shards.into_keys().collect(),
            total_size: raw.metadata.total_size,
            merged: raw.metadata.merged,
        })
    }

    /// The shards, sorted by name.
    pub fn shard_names(&self) -> Vec<&str> {
        self.shards.iter().map(String::as_str).collect()
    }

    /// The tensors with the index of their shard in [`Index::shard_names`], sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, usize)> {
        self.weight_map.iter().map(|(name, shard)| (name.as_str(), *shard as usize))
    }

    /// Whether the model has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.weight_map.binary_search_by(|(tensor, _)| tensor.as_str().cmp(name)).is_ok()
    }

    /// The record of in-place merges in its metadata, under [`MERGED_KEY`](super::MERGED_KEY).
    pub fn merged(&self) -> Option<&str> {
        self.merged.as_deref()
    }

    /// All differences between the index and its shards; `shards` are in the order of [`Index::shard_names`].
    pub(super) fn disagreements(&self, shards: &[Shard]) -> Vec<String> {
        let mut problems = Vec::new();
        let file_name = |shard: usize| Printable(&self.shards[shard]).to_string();
        let listed = |name: &str| self.weight_map.binary_search_by(|(listed, _)| listed.as_str().cmp(name)).is_ok();
        let mut stored: Vec<(&str, usize)> = Vec::new();
        for (position, shard) in shards.iter().enumerate() {
            for tensor in shard.header().by_name() {
                stored.push((&tensor.name, position));
            }
        }
        stored.sort_unstable();
        let twice = stored.windows(2).filter(|pair| pair[0].0 == pair[1].0).map(|pair| {
            let (first, second) = (file_name(pair[0].1), file_name(pair[1].1));
            format!("tensor \"{}\" is in {first} and in {second}", Printable(pair[0].0))
        });
        let unlisted = stored.iter().filter(|(name, _)| !listed(name)).map(|&(name, shard)| {
            format!("tensor \"{}\" is in {} but not in the index", Printable(name), file_name(shard))
        });
        let missing = self.tensors().filter(|(name, shard)| shards[*shard].header().tensor(name).is_none()).map(
            |(name, shard)| format!("tensor \"{}\" is in the index but not in {}", Printable(name), file_name(shard)),
        );
        problems.extend(twice.chain(unlisted).chain(missing).take(MAX_PROBLEMS));
        if problems.len() == MAX_PROBLEMS {
            problems.push("the search stopped here".to_owned());
        }
        problems
    }

    /// `metadata.total_size` and the actual bytes of the tensors, if they differ. Loaders ignore it.
    pub(super) fn wrong_total(&self, shards: &[Shard]) -> Option<WrongTotal> {
        let tensors = shards.iter().flat_map(|shard| shard.header().tensors());
        let found = tensors.map(TensorInfo::n_bytes).fold(0, u64::saturating_add);
        let recorded = self.total_size.filter(|&recorded| recorded != found)?;
        Some(WrongTotal { recorded, found })
    }
}

/// An index's `metadata.total_size` that does not match the tensors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WrongTotal {
    pub(super) recorded: u64,
    pub(super) found: u64,
}

impl WrongTotal {
    /// The index's JSON with the correct number.
    pub(super) fn corrected(self, json: &[u8]) -> serde_json::Result<Vec<u8>> {
        let mut index: serde_json::Value = serde_json::from_slice(json)?;
        index["metadata"]["total_size"] = self.found.into();
        let mut json = serde_json::to_vec_pretty(&index)?;
        json.push(b'\n');
        Ok(json)
    }
}

fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// The JSON has this structure; names may still repeat or point elsewhere.
struct RawIndex {
    weight_map: WeightMap,
    metadata: Metadata,
}

/// The fields of `metadata` that are read.
#[derive(Default)]
struct Metadata {
    total_size: Option<u64>,
    merged: Option<String>,
}

impl RawIndex {
    /// Parses the JSON and rejects trailing data.
    fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let raw = deserializer.deserialize_map(IndexVisitor(&Allowance::new(MAX_PARSED_BYTES)))?;
        deserializer.end()?;
        Ok(raw)
    }
}

struct IndexVisitor<'a>(&'a Allowance);

impl<'de> Visitor<'de> for IndexVisitor<'_> {
    type Value = RawIndex;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawIndex, A::Error> {
        let (mut weight_map, mut metadata) = (None, Metadata::default());
        while let Some(key) = map.next_key_seed(Text(self.0, "a key"))? {
            match key.as_str() {
                "weight_map" => {
                    if weight_map.replace(map.next_value_seed(WeightMapSeed(self.0))?).is_some() {
                        return Err(de::Error::custom("weight_map appears twice"));
                    }
                }
                "metadata" => metadata = map.next_value_seed(MetadataSeed(self.0))?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let weight_map = weight_map.ok_or_else(|| de::Error::missing_field("weight_map"))?;
        Ok(RawIndex { weight_map, metadata })
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<RawIndex, E> {
        Err(not_a_string(text, &self))
    }
}

/// `metadata`; may be absent or null.
struct MetadataSeed<'a>(&'a Allowance);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = Metadata;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Metadata, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = Metadata;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("metadata as an object")
    }
    fn visit_unit<E: de::Error>(self) -> Result<Metadata, E> {
        Ok(Metadata::default())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut metadata = Metadata::default();
        while let Some(key) = map.next_key_seed(Text(self.0, "a key"))? {
            match key.as_str() {
                "total_size" => metadata.total_size = Some(map.next_value_seed(TotalSizeVisitor)?),
                MERGED_KEY => metadata.merged = Some(map.next_value_seed(Text(self.0, "a string"))?),
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(metadata)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Metadata, E> {
        Err(not_a_string(text, &self))
    }
}

/// An integer, or a float with an integral value: some writers sum sizes as floats.
struct TotalSizeVisitor;

impl<'de> DeserializeSeed<'de> for TotalSizeVisitor {
    type Value = u64;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for TotalSizeVisitor {
    type Value = u64;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("metadata.total_size as a number of bytes")
    }
    fn visit_u64<E: de::Error>(self, size: u64) -> Result<u64, E> {
        Ok(size)
    }
    fn visit_f64<E: de::Error>(self, size: f64) -> Result<u64, E> {
        if size >= 0.0 && size.fract() == 0.0 && size < 9e15 {
            return Ok(size as u64);
        }
        Err(E::invalid_value(de::Unexpected::Float(size), &self))
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
        Err(not_a_string(text, &self))
    }
}

/// `weight_map`, with each shard name stored once.
#[derive(Default)]
struct WeightMap {
    /// Names in order of appearance, with the numbers of their shards.
    tensors: Vec<(String, u32)>,
    /// Numbered in order of appearance.
    shards: BTreeMap<String, u32>,
}

struct WeightMapSeed<'a>(&'a Allowance);

impl<'de> DeserializeSeed<'de> for WeightMapSeed<'_> {
    type Value = WeightMap;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<WeightMap, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMapSeed<'_> {
    type Value = WeightMap;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("weight_map as an object of strings")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut found = WeightMap::default();
        while let Some(name) = map.next_key_seed(Text(self.0, "a tensor's name"))? {
            self.0.take(size_of::<(String, u32)>())?;
            let shard = map.next_value_seed(ShardSeed { shards: &mut found.shards, allowance: self.0 })?;
            found.tensors.push((name, shard));
        }
        Ok(found)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<WeightMap, E> {
        Err(not_a_string(text, &self))
    }
}

/// Parses a shard's name into its number.
struct ShardSeed<'a> {
    shards: &'a mut BTreeMap<String, u32>,
    allowance: &'a Allowance,
}

impl<'de> DeserializeSeed<'de> for ShardSeed<'_> {
    type Value = u32;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u32, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for ShardSeed<'_> {
    type Value = u32;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a shard as a string")
    }
    fn visit_str<E: de::Error>(self, name: &str) -> Result<u32, E> {
        if let Some(&number) = self.shards.get(name) {
            return Ok(number);
        }
        if self.shards.len() == MAX_SHARDS {
            return Err(E::custom(format_args!("more than {MAX_SHARDS} shards")));
        }
        self.allowance.take_text(name)?;
        let number = self.shards.len() as u32;
        self.shards.insert(name.to_owned(), number);
        Ok(number)
    }
}

/// Where the files of a checkpoint's folder may be: links may lead only into the folder itself or, for a snapshot in
/// the Hugging Face cache, into the cache's blobs.
pub(super) struct Bounds {
    root: PathBuf,
    real_root: PathBuf,
    blobs: Option<PathBuf>,
}

impl Bounds {
    /// The bounds of the folder `root`.
    pub fn of(root: &Path) -> Result<Self, CheckpointError> {
        let real_root = root.canonicalize().map_err(|e| CheckpointError::io("open", root, e))?;
        let blobs = real_root
            .parent()
            .filter(|snapshots| snapshots.file_name().is_some_and(|name| name == "snapshots"))
            .and_then(Path::parent)
            .map(|repository| repository.join("blobs"));
        Ok(Self { root: root.to_owned(), real_root, blobs })
    }

    /// The resolved path of a file in the folder.
    ///
    /// # Errors
    /// A message for a list of problems.
    pub fn resolve(&self, name: &Path) -> Result<PathBuf, String> {
        let path = self.root.join(name);
        let shown = Printable::path(name);
        let real = path.canonicalize().map_err(|e| format!("{shown} cannot be opened: {e}"))?;
        if real.starts_with(&self.real_root) || (self.blobs.is_some() && real.parent() == self.blobs.as_deref()) {
            Ok(path)
        } else {
            Err(format!("{shown} is a link that leads out of the folder, to {}", Printable::path(&real)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Index, String> {
        Index::parse(Path::new("i"), json.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn shards_are_plain_file_names() {
        let index = parse(r#"{"metadata":{"total_size":1.0e3},"weight_map":{"b":"2","a":"1","c":"1"}}"#).unwrap();
        assert_eq!(index.shard_names(), ["1", "2"]);
        assert_eq!(index.tensors().collect::<Vec<_>>(), [("a", 0), ("b", 1), ("c", 0)]);
        assert_eq!(index.total_size, Some(1000));
        for name in ["../x", "/etc/passwd", "a/../../x", "a\\u0000b", "..", "", "a/b"] {
            let error = parse(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#)).unwrap_err();
            assert!(error.contains("plain file names"), "{error}");
        }
    }

    #[test]
    fn a_tensor_listed_twice_is_rejected() {
        let error = parse(r#"{"weight_map":{"a":"1","a":"2"}}"#).unwrap_err();
        assert!(error.contains("tensor \"a\" is listed twice, in 1 and in 2"), "{error}");
    }
}
