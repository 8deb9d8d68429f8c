//! Parses a header's JSON, strictly and with counted memory, before its numbers are validated.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    ops::Range,
};

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{
    MAX_TENSORS, Printable, TensorInfo,
    json::{Allowance, Text, not_a_string},
};
use crate::tensor::Dtype;

/// Maximum number of dimensions of a tensor, the same as in PyTorch.
const MAX_RANK: usize = 64;
/// Maximum memory for a parsed header: together with the largest JSON, less than three times that JSON.
const MAX_PARSED_BYTES: usize = 170_000_000;

/// The JSON has this structure; nothing else is validated.
pub(super) struct RawHeader {
    pub metadata: Option<BTreeMap<String, String>>,
    pub tensors: Vec<TensorInfo>,
}

impl RawHeader {
    /// Parses the JSON and rejects trailing data.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let raw = deserializer.deserialize_map(HeaderVisitor(&Allowance::new(MAX_PARSED_BYTES)))?;
        deserializer.end()?;
        Ok(raw)
    }
}

struct HeaderVisitor<'a>(&'a Allowance);

impl<'de> Visitor<'de> for HeaderVisitor<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let allowance = self.0;
        let mut raw = RawHeader { metadata: None, tensors: Vec::new() };
        while let Some(name) = map.next_key_seed(Text(allowance, "a tensor's name"))? {
            if name == "__metadata__" {
                if raw.metadata.is_some() {
                    return Err(de::Error::custom("`__metadata__` appears twice"));
                }
                raw.metadata = Some(map.next_value_seed(MetadataSeed(allowance))?);
            } else {
                if raw.tensors.len() == MAX_TENSORS {
                    return Err(de::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
                }
                allowance.take(size_of::<TensorInfo>())?;
                raw.tensors.push(map.next_value_seed(TensorSeed { name, allowance })?);
            }
        }
        Ok(raw)
    }
}

/// `__metadata__`: an object of strings with unique keys.
struct MetadataSeed<'a>(&'a Allowance);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__` as an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some(key) = map.next_key_seed(Text(self.0, "a metadata key"))? {
            // The nodes of the tree are about half full.
            self.0.take(2 * size_of::<(String, String)>())?;
            match metadata.entry(key) {
                Entry::Occupied(first) => {
                    let key = Printable(first.key());
                    return Err(de::Error::custom(format_args!("metadata key \"{key}\" appears twice")));
                }
                Entry::Vacant(place) => {
                    place.insert(map.next_value_seed(Text(self.0, "a string as the value of a metadata key"))?);
                }
            }
        }
        Ok(metadata)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Err(not_a_string(text, &self))
    }
}

/// The entry of one tensor: exactly `dtype`, `shape` and `data_offsets`.
struct TensorSeed<'a> {
    name: String,
    allowance: &'a Allowance,
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = TensorInfo;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<TensorInfo, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = TensorInfo;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor \"{}\" as an object of dtype, shape and data_offsets", Printable(&self.name))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TensorInfo, A::Error> {
        let Self { name, allowance } = self;
        let (mut dtype, mut shape, mut data) = (None, None, None);
        while let Some(field) = map.next_key_seed(Named(&name, FieldVisitor))? {
            let is_first = match field {
                Field::Dtype => dtype.replace(map.next_value_seed(Named(&name, DtypeVisitor))?).is_none(),
                Field::Shape => {
                    let found = map.next_value_seed(Named(&name, SizesVisitor::<MAX_RANK>("shape")))?;
                    allowance.take_block(size_of_val(&found[..]))?;
                    shape.replace(found).is_none()
                }
                Field::DataOffsets => {
                    let sizes = map.next_value_seed(Named(&name, SizesVisitor::<2>("data_offsets")))?;
                    let [begin, end] = sizes[..] else {
                        return Err(in_tensor(&name, "data_offsets are two numbers"));
                    };
                    data.replace(Range { start: begin, end }).is_none()
                }
            };
            if !is_first {
                return Err(in_tensor(&name, format_args!("has two `{}`", field.name())));
            }
        }
        let missing = |field: Field| in_tensor(&name, format_args!("has no `{}`", field.name()));
        Ok(TensorInfo {
            dtype: dtype.ok_or_else(|| missing(Field::Dtype))?,
            shape: shape.ok_or_else(|| missing(Field::Shape))?,
            data: data.ok_or_else(|| missing(Field::DataOffsets))?,
            name,
        })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<TensorInfo, E> {
        Err(not_a_string(text, &self))
    }
}

/// The fields of an entry.
#[derive(Clone, Copy)]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Dtype => "dtype",
            Self::Shape => "shape",
            Self::DataOffsets => "data_offsets",
        }
    }
}

struct FieldVisitor;

impl Visitor<'_> for FieldVisitor {
    type Value = Field;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("dtype, shape or data_offsets")
    }
    fn visit_str<E: de::Error>(self, key: &str) -> Result<Field, E> {
        match key {
            "dtype" => Ok(Field::Dtype),
            "shape" => Ok(Field::Shape),
            "data_offsets" => Ok(Field::DataOffsets),
            _ => Err(E::custom(format_args!("has the unknown field `{}`", Printable(key)))),
        }
    }
}

/// A visitor whose errors name the tensor.
struct Named<'a, V>(&'a str, V);

impl<'de, V: Visitor<'de>> DeserializeSeed<'de> for Named<'_, V> {
    type Value = V::Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        deserializer.deserialize_any(self.1).map_err(|e| in_tensor(self.0, e))
    }
}

fn in_tensor<E: de::Error>(name: &str, what: impl fmt::Display) -> E {
    E::custom(format_args!("tensor \"{}\": {what}", Printable(name)))
}

struct DtypeVisitor;

impl Visitor<'_> for DtypeVisitor {
    type Value = Dtype;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a dtype such as \"BF16\"")
    }
    fn visit_str<E: de::Error>(self, name: &str) -> Result<Dtype, E> {
        let known = if name.len() <= 16 { crate::tensor::parse_dtype(name) } else { None };
        known.ok_or_else(|| E::custom(format_args!("unknown dtype \"{}\"", Printable(name))))
    }
}

/// A list of at most `MAX` sizes; `what` names it in errors.
#[derive(Clone, Copy)]
struct SizesVisitor<const MAX: usize>(&'static str);

impl<'de, const MAX: usize> Visitor<'de> for SizesVisitor<MAX> {
    type Value = Vec<u64>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as a list of sizes", self.0)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let (mut sizes, mut n) = ([0; MAX], 0);
        while let Some(size) = seq.next_element_seed(SizeSeed(self.0))? {
            let place = sizes
                .get_mut(n)
                .ok_or_else(|| de::Error::custom(format_args!("{} has more than {MAX} numbers", self.0)))?;
            *place = size;
            n += 1;
        }
        // Allocate exactly what is needed: there may be a million of them.
        Ok(sizes[..n].to_vec())
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<u64>, E> {
        Err(not_a_string(text, &self))
    }
}

struct SizeSeed(&'static str);

impl<'de> DeserializeSeed<'de> for SizeSeed {
    type Value = u64;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_u64(self)
    }
}

impl Visitor<'_> for SizeSeed {
    type Value = u64;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a size in {}, 0 to 2^64 - 1", self.0)
    }
    fn visit_u64<E: de::Error>(self, size: u64) -> Result<u64, E> {
        Ok(size)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
        Err(not_a_string(text, &self))
    }
}
