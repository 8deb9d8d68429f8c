//! The JSON document in `__metadata__["neuroada"]` that marks a safetensors file as a mask or an adapter.
//!
//! ```json
//! {"kind": "mask", "version": 1, "recipe": {...}, "base": {"name": "...", "model_type": "..."},
//!  "targets": {"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [64, 32], "anchor": "<64 hex digits>"}}}
//! ```
//!
//! A target may also have `"blake3"` (of the whole tensor) and `"transposed": true`. From version 2 on, a target that is a quantized
//! weight has a `"layout"`, such as `"fp8-block"`, and the dtype F32 of its decoded numbers. Unknown fields are refused, because
//! this version would silently drop them. The size of documents is limited before they are parsed.

use std::{collections::BTreeMap, fmt, path::Path};

use super::{MaskError, Partition};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, DOCUMENT_KEY, Header, Printable, Shard},
    tensor::{Dtype, dtype_name, parse_dtype},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, SeqAccess, Visitor},
};

/// The newest format version that is read. Version 1 is written unless a target has a layout.
const FORMAT_VERSION: u64 = 2;
/// Maximum size of a document: twice that of an adapter with every expert of the largest published model.
const MAX_DOCUMENT_BYTES: usize = 32 << 20;
/// Maximum number of dimensions of a shape.
const MAX_RANK: usize = 8;

/// How the columns were chosen: everything needed to repeat the selection.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The score that ranks the weights, such as `magnitude`; `custom` if the columns come from elsewhere.
    pub score: String,
    /// Columns per row, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k: Option<u64>,
    /// The fraction of the targets' elements to choose, 0 to 1, if given instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<f64>,
    /// The scope in which weights compete: `row`, `tensor` or `global`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// The seed of random choices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Patterns that select the targets.
    #[serde(default)]
    pub targets: Vec<String>,
    /// Patterns that select the targets stored as `[d_in, d_out]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transposed: Vec<String>,
    /// The fraction of rows that take part, 0 to 1, if not all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neuron_fraction: Option<f64>,
    /// The partition of the targets in this file, if it is part of a mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<Partition>,
    /// Names of the other files that the scores were computed from, by their role, such as `gradients`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, String>,
}

impl Recipe {
    /// The recipe of columns that were chosen elsewhere.
    pub fn custom() -> Self {
        Self { score: "custom".to_owned(), ..Self::default() }
    }
}

/// The base's name, for display; whether a base is the right one depends on its content.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseInfo {
    /// The name of its folder or file.
    pub name: String,
    /// `model_type` of its `config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
}

impl BaseInfo {
    /// The name of `checkpoint`.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        Self { name: checkpoint.name(), model_type: checkpoint.model_type().map(str::to_owned) }
    }
}

impl fmt::Display for BaseInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", Printable(&self.name))?;
        match &self.model_type {
            Some(model_type) => write!(f, " ({})", Printable(model_type)),
            None => Ok(()),
        }
    }
}

/// The entry of one target in the document.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TargetEntry {
    #[serde(serialize_with = "write_dtype", deserialize_with = "read_dtype")]
    pub dtype: Dtype,
    #[serde(deserialize_with = "read_shape")]
    pub shape: Vec<u64>,
    #[serde(serialize_with = "write_hash", deserialize_with = "read_hash")]
    pub anchor: blake3::Hash,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_hash")]
    pub blake3: Option<blake3::Hash>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
}

/// All targets, sorted by name, unique.
#[derive(Clone, Debug, Default)]
pub(crate) struct TargetEntries(pub Vec<(String, TargetEntry)>);

impl TargetEntries {
    /// The oldest format version that can say all of this.
    pub fn version(&self) -> u64 {
        if self.0.iter().any(|(_, entry)| entry.layout.is_some()) { 2 } else { 1 }
    }
}

impl Serialize for TargetEntries {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, entry)| (name, entry)))
    }
}

impl<'de> Deserialize<'de> for TargetEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TargetsVisitor)
    }
}

struct TargetsVisitor;

impl<'de> Visitor<'de> for TargetsVisitor {
    type Value = TargetEntries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`targets` as an object of tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TargetEntries, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let entry = map
                .next_value()
                .map_err(|e| de::Error::custom(format_args!("target \"{}\": {e}", Printable(&name))))?;
            entries.push((name, entry));
        }
        entries.sort_by(|a: &(String, TargetEntry), b| a.0.cmp(&b.0));
        match entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(de::Error::custom(format_args!("target \"{}\" is listed twice", Printable(&pair[0].0)))),
            None => Ok(TargetEntries(entries)),
        }
    }
}

fn write_dtype<S: serde::Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&dtype_name(*dtype))
}

fn read_dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    let name = String::deserialize(deserializer)?;
    parse_dtype(&name).ok_or_else(|| de::Error::custom(format_args!("unknown dtype \"{}\"", Printable(&name))))
}

fn read_shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("shape as a list of sizes")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(size) = seq.next_element()? {
                if shape.len() == MAX_RANK {
                    return Err(de::Error::custom(format_args!("shape has more than {MAX_RANK} sizes")));
                }
                shape.push(size);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Shape)
}

fn write_hash<S: serde::Serializer>(hash: &blake3::Hash, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(hash.to_hex().as_str())
}

fn read_hash<'de, D: Deserializer<'de>>(deserializer: D) -> Result<blake3::Hash, D::Error> {
    let hex = String::deserialize(deserializer)?;
    blake3::Hash::from_hex(&hex).map_err(|_| {
        de::Error::custom(format_args!(
            "anchor and blake3 are 64 hexadecimal digits each, found \"{}\"",
            Printable(&hex)
        ))
    })
}

mod optional_hash {
    pub fn serialize<S: serde::Serializer>(hash: &Option<blake3::Hash>, serializer: S) -> Result<S::Ok, S::Error> {
        match hash {
            Some(hash) => super::write_hash(hash, serializer),
            None => serializer.serialize_none(),
        }
    }
    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<blake3::Hash>, D::Error> {
        super::read_hash(deserializer).map(Some)
    }
}

/// A mask's document.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MaskDocument {
    pub kind: String,
    pub version: u64,
    pub recipe: Recipe,
    pub base: BaseInfo,
    pub targets: TargetEntries,
}

/// The kind of a safetensors file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// It has a document of this kind, usually `mask` or `adapter`.
    Document(String),
    /// It has no document: a checkpoint's shard, or another tool's adapter.
    Plain,
}

impl FileKind {
    /// Reads the kind of the file; checks nothing else.
    ///
    /// # Errors
    /// The document is too large, malformed, or without a kind.
    pub fn of(shard: &Shard) -> Result<Self, CheckpointError> {
        match shard.header().metadata().get(DOCUMENT_KEY) {
            None => Ok(Self::Plain),
            Some(json) => Ok(Self::Document(parse::<Head>(shard.path(), json)?.kind)),
        }
    }
}

/// The fields that documents of every version have.
#[derive(Deserialize)]
struct Head {
    kind: String,
    version: u64,
}

/// Parses the document of a file of the kind `expected`, such as `mask`.
///
/// # Errors
/// [`MaskError::WrongKind`] states what the file is instead; [`MaskError::NewerVersion`] if a newer program wrote it.
pub(crate) fn parse_document<'a, T: Deserialize<'a>>(shard: &'a Shard, expected: &'static str) -> Result<T, MaskError> {
    parse_header(shard.path(), shard.header(), expected)
}

/// The same for a file of which only the header is available.
pub(crate) fn parse_header<'a, T: Deserialize<'a>>(
    path: &Path,
    header: &'a Header,
    expected: &'static str,
) -> Result<T, MaskError> {
    let article = |kind: &str| match kind {
        "mask" | "ledger" => format!("a {kind}"),
        "adapter" => "an adapter".to_owned(),
        "packed" => "a packed adapter".to_owned(),
        _ => format!("a file of the unknown kind \"{}\"", Printable(kind)),
    };
    let wrong = |found: String| MaskError::WrongKind {
        path: path.to_owned(),
        found,
        expected: if expected == "mask" { "a mask" } else { "an adapter" },
    };
    let Some(json) = header.metadata().get(DOCUMENT_KEY) else {
        return Err(wrong(plain_file(header)));
    };
    let head: Head = parse(path, json)?;
    if head.kind != expected {
        return Err(wrong(article(&head.kind)));
    }
    match head.version {
        1..=FORMAT_VERSION => Ok(parse(path, json)?),
        0 => Err(malformed(path, &"version 0 does not exist").into()),
        version => Err(MaskError::NewerVersion { path: path.to_owned(), version, known: FORMAT_VERSION }),
    }
}

fn parse<'a, T: Deserialize<'a>>(path: &Path, json: &'a str) -> Result<T, CheckpointError> {
    if json.len() > MAX_DOCUMENT_BYTES {
        let what = format_args!("{} bytes, at most {MAX_DOCUMENT_BYTES} are accepted", json.len());
        return Err(malformed(path, &what));
    }
    serde_json::from_str(json).map_err(|e| malformed(path, &Printable(&e.to_string())))
}

fn malformed(path: &Path, what: &dyn fmt::Display) -> CheckpointError {
    CheckpointError::bad_file(path, format!("the `{DOCUMENT_KEY}` document in its metadata is malformed: {what}"))
}

/// Prefixes of names in LoRA files of diffusers: the components of a pipeline.
const DIFFUSERS: [&str; 4] =
    ["unet.", "text_encoder", "transformer.transformer_blocks.", "transformer.single_transformer_"];

/// Describes a safetensors file without a document.
fn plain_file(header: &Header) -> String {
    let has = |part: &str| header.tensors().iter().any(|tensor| tensor.name.contains(part));
    let begins = |starts: &[&str]| {
        header.tensors().iter().any(|tensor| starts.iter().any(|start| tensor.name.starts_with(start)))
    };
    let is_low_rank = [".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".lora_A"].into_iter().any(has);
    if is_low_rank && begins(&["lora_"]) {
        // Underscores replace dots, so the names do not identify the modules.
        "a LoRA file of kohya's sd-scripts, which is not supported"
    } else if is_low_rank && (!has(".lora_A") || begins(&DIFFUSERS)) {
        "a LoRA file of diffusers, which is not supported"
    } else if is_low_rank {
        "a PEFT LoRA adapter"
    } else if has(".shira_") {
        "a PEFT SHiRA adapter"
    } else if has(".supertuning_") {
        "a PEFT Super-Tuning adapter"
    } else {
        "a plain checkpoint file"
    }
    .to_owned()
}
