//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{CheckpointError, Printable, Shard};

/// The file's name beside its shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Index files larger than this are refused.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// The index as its JSON has it; shard names are plain file names.
#[derive(Debug)]
pub struct Index {
    /// Tensor name to shard file name.
    weight_map: BTreeMap<String, String>,
    total_size: Option<u64>,
}

impl Index {
    /// Reads and parses the index file at `path`.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |e| CheckpointError::io("read", path, e);
        let n_bytes = fs::metadata(path).map_err(io)?.len();
        if n_bytes > MAX_INDEX_BYTES {
            return Err(CheckpointError::bad_file(
                path,
                format!("has {n_bytes} bytes, at most {MAX_INDEX_BYTES} are accepted"),
            ));
        }
        Self::parse(path, &fs::read(path).map_err(io)?)
    }

    /// Parses the index's JSON; `path` is for messages.
    ///
    /// # Errors
    /// [`CheckpointError::BadFile`], or [`CheckpointError::Many`] listing every shard name that is not a plain file name.
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self, CheckpointError> {
        let raw: RawIndex = serde_json::from_slice(json).map_err(|e| {
            CheckpointError::bad_file(path, format!("the index is malformed: {}", Printable(&e.to_string())))
        })?;
        let total_size = match raw.total_size {
            None => None,
            Some(value) => Some(whole_number(&value).ok_or_else(|| {
                CheckpointError::bad_file(
                    path,
                    format!("metadata.total_size is {}, not a number of bytes", Printable(&value.to_string())),
                )
            })?),
        };
        let mut names: Vec<&String> = raw.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        let escapes: Vec<String> = names
            .into_iter()
            .filter(|name| !is_plain_file_name(name))
            .map(|name| format!("\"{}\"", Printable(name)))
            .collect();
        if !escapes.is_empty() {
            let what = "shards must be plain file names inside the checkpoint's folder, found".to_owned();
            return Err(CheckpointError::Many { path: path.to_owned(), what, problems: escapes });
        }
        if raw.weight_map.is_empty() {
            return Err(CheckpointError::bad_file(path, "weight_map is empty"));
        }
        Ok(Self { weight_map: raw.weight_map, total_size })
    }

    /// The shards, by name.
    pub fn shard_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Everything in which the index and its shards disagree.
    pub(super) fn disagreements(&self, shards: &[Shard]) -> Vec<String> {
        let mut problems = Vec::new();
        let mut seen: BTreeMap<&str, &Shard> = BTreeMap::new();
        let mut total = 0u64;
        for shard in shards {
            for tensor in shard.header().by_name() {
                total = total.saturating_add(tensor.n_bytes());
                let name = Printable(&tensor.name);
                if let Some(first) = seen.insert(&tensor.name, shard) {
                    problems.push(format!(
                        "tensor \"{name}\" is in {} and in {}",
                        Printable(&first.file_name()),
                        Printable(&shard.file_name())
                    ));
                }
                if !self.weight_map.contains_key(&tensor.name) {
                    problems.push(format!(
                        "tensor \"{name}\" is in {} but not in the index",
                        Printable(&shard.file_name())
                    ));
                }
            }
        }
        for (name, shard_name) in &self.weight_map {
            let Some(shard) = shards.iter().find(|shard| shard.file_name() == *shard_name) else { continue };
            if shard.header().tensor(name).is_none() {
                problems.push(format!(
                    "tensor \"{}\" is in the index but not in {}",
                    Printable(name),
                    Printable(shard_name)
                ));
            }
        }
        if let Some(total_size) = self.total_size
            && total_size != total
        {
            problems.push(format!("metadata.total_size is {total_size}, the tensors have {total} bytes"));
        }
        problems
    }
}

fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// An integer, or a float that is one: some writers sum sizes as floats.
fn whole_number(value: &serde_json::Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        (float >= 0.0 && float.fract() == 0.0 && float < 9e15).then_some(float as u64)
    })
}

struct RawIndex {
    weight_map: BTreeMap<String, String>,
    total_size: Option<serde_json::Value>,
}

impl<'de> Deserialize<'de> for RawIndex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IndexVisitor;
        impl<'de> Visitor<'de> for IndexVisitor {
            type Value = RawIndex;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a weight_map")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawIndex, A::Error> {
                let (mut weight_map, mut total_size) = (None, None);
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "weight_map" => {
                            if weight_map.replace(map.next_value::<UniqueMap>()?.0).is_some() {
                                return Err(de::Error::custom("weight_map appears twice"));
                            }
                        }
                        "metadata" => {
                            let metadata: Option<BTreeMap<String, serde_json::Value>> = map.next_value()?;
                            total_size = metadata.and_then(|mut metadata| metadata.remove("total_size"));
                        }
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                let weight_map = weight_map.ok_or_else(|| de::Error::missing_field("weight_map"))?;
                Ok(RawIndex { weight_map, total_size })
            }
        }
        deserializer.deserialize_map(IndexVisitor)
    }
}

/// A map of strings in which no key may appear twice.
struct UniqueMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;
        impl<'de> Visitor<'de> for MapVisitor {
            type Value = UniqueMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("weight_map as an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap, A::Error> {
                let mut unique = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if let Some(first) = unique.insert(key.clone(), value.clone()) {
                        let (key, first, second) = (Printable(&key), Printable(&first), Printable(&value));
                        return Err(de::Error::custom(format_args!(
                            "tensor \"{key}\" is listed twice, in {first} and in {second}"
                        )));
                    }
                }
                Ok(UniqueMap(unique))
            }
        }
        deserializer.deserialize_map(MapVisitor)
    }
}

/// Where a shard named in an index lies, following links no further than the checkpoint itself or the blobs of the
/// Hugging Face cache it is a snapshot of.
///
/// # Errors
/// A line for the list of problems.
pub(super) fn resolve_shard(root: &Path, name: &str) -> Result<PathBuf, String> {
    let path = root.join(name);
    let real = path.canonicalize().map_err(|e| format!("shard {} cannot be opened: {e}", Printable(name)))?;
    let real_root = root.canonicalize().map_err(|e| format!("the folder cannot be opened: {e}"))?;
    let parent = real.parent();
    let blobs = real_root
        .parent()
        .filter(|snapshots| snapshots.file_name().is_some_and(|name| name == "snapshots"))
        .and_then(Path::parent)
        .map(|repository| repository.join("blobs"));
    if parent == Some(&real_root) || (blobs.is_some() && parent == blobs.as_deref()) {
        Ok(path)
    } else {
        Err(format!("shard {} is a link out of the folder, to {}", Printable(name), Printable::path(&real)))
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
