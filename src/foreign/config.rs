//! `adapter_config.json`: an object whose keys come once, and what its values may be.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::{Format, PeftError};
use crate::checkpoint::{CheckpointError, Printable, malformed, read_whole};

/// Configs larger than this are refused: a hundred times the largest published one.
const MAX_BYTES: u64 = 1 << 20;

/// The method of an adapter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeftType {
    /// Low-rank factors, with or without magnitudes (DoRA).
    Lora,
    /// Rows of embeddings that replace those of the base.
    TrainableTokens,
    /// A sparse method, which [`ForeignAdapter`](super::ForeignAdapter) opens: SHiRA, Super-Tuning or SpIEL.
    Sparse(Format),
    /// Another method, as the config spells it.
    Other(String),
}

impl PeftType {
    fn of(text: &str) -> Self {
        match text {
            "LORA" => Self::Lora,
            "TRAINABLE_TOKENS" => Self::TrainableTokens,
            "SHIRA" => Self::Sparse(Format::Shira),
            "SUPERTUNING" => Self::Sparse(Format::SuperTuning),
            "SFT" => Self::Sparse(Format::Spiel),
            other => Self::Other(other.to_owned()),
        }
    }

    /// As configs spell it.
    pub fn name(&self) -> &str {
        match self {
            Self::Lora => "LORA",
            Self::TrainableTokens => "TRAINABLE_TOKENS",
            Self::Sparse(Format::Shira) => "SHIRA",
            Self::Sparse(Format::SuperTuning) => "SUPERTUNING",
            Self::Sparse(_) => "SFT",
            Self::Other(name) => name,
        }
    }
}

/// An open `adapter_config.json`. A key that is absent, and one that is `null`, mean the same.
#[derive(Clone, PartialEq, Debug)]
pub struct PeftConfig {
    path: PathBuf,
    peft_type: PeftType,
    keys: Map<String, Value>,
}

impl PeftConfig {
    /// Reads and parses the config at `path`.
    ///
    /// # Errors
    /// A file that is no JSON object, a key that comes twice, or no `peft_type`.
    pub fn open(path: &Path) -> Result<Self, PeftError> {
        Self::parse(path, &read_whole(path, MAX_BYTES)?)
    }

    /// Parses the config's JSON; `path` is for messages.
    ///
    /// # Errors
    /// As [`PeftConfig::open`].
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self, PeftError> {
        let bad = |what: String| CheckpointError::bad_file(path, what);
        let Keys(mut keys) = serde_json::from_slice(json)
            .map_err(|e| bad(format!("the config is malformed: {}", malformed(json, 0, &e))))?;
        keys.retain(|_, value| !value.is_null());
        let Some(peft_type) = keys.get("peft_type") else {
            return Err(bad("has no `peft_type`: not the config of a PEFT adapter".to_owned()).into());
        };
        let peft_type = peft_type.as_str().map(PeftType::of);
        let peft_type = peft_type.ok_or_else(|| PeftError::config(path, "peft_type", "a string is expected"))?;
        Ok(Self { path: path.to_owned(), peft_type, keys })
    }

    /// Where the config lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The method.
    pub fn peft_type(&self) -> &PeftType {
        &self.peft_type
    }
    /// All keys that are not `null`, in the file's order.
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// Fails where the method is another than `expected`.
    ///
    /// # Errors
    /// [`PeftError::Unsupported`] naming both.
    pub fn expect_type(&self, expected: &PeftType) -> Result<(), PeftError> {
        if self.peft_type == *expected {
            return Ok(());
        }
        let (found, expected) = (Printable(self.peft_type.name()), expected.name());
        Err(PeftError::unsupported(&self.path, format!("peft_type is {found}, {expected} is needed here")))
    }

    /// Fails where a key outside of `known` says something; keys that begin with `neuroada_` are ours.
    ///
    /// What is false, empty or zero-length says nothing: newer versions write all their options into every config.
    ///
    /// # Errors
    /// [`PeftError::Config`] naming the key.
    pub fn refuse_unknown(&self, known: &[&str]) -> Result<(), PeftError> {
        let says_something = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            Value::Bool(true) | Value::Number(_) => true,
        };
        let unknown = |key: &str| !known.contains(&key) && !key.starts_with("neuroada_");
        match self.keys.iter().find(|(key, value)| unknown(key) && says_something(value)) {
            None => Ok(()),
            Some((key, _)) => Err(self.bad(key, "this key is not known here, and what it changes neither")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// Another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, PeftError> {
        let Some(value) = self.keys.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(key, "a string is expected"))
    }

    /// Yes or no; absent is no.
    ///
    /// # Errors
    /// Another type.
    pub fn flag(&self, key: &str) -> Result<bool, PeftError> {
        let Some(value) = self.keys.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.bad(key, "true or false is expected"))
    }

    /// A whole number above zero.
    ///
    /// # Errors
    /// Anything else.
    pub fn positive(&self, key: &str) -> Result<Option<u64>, PeftError> {
        let Some(value) = self.keys.get(key) else { return Ok(None) };
        let found = value.as_u64().filter(|&number| number > 0);
        found
            .map(Some)
            .ok_or_else(|| self.bad(key, &format!("a whole number above 0 is expected, found {}", short(value))))
    }

    /// A finite number.
    ///
    /// # Errors
    /// Another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>, PeftError> {
        let Some(value) = self.keys.get(key) else { return Ok(None) };
        let found = value.as_f64().filter(|number| number.is_finite());
        found.map(Some).ok_or_else(|| self.bad(key, &format!("a finite number is expected, found {}", short(value))))
    }

    /// A list of strings, or one string; absent is none.
    ///
    /// # Errors
    /// Another type.
    pub fn words(&self, key: &str) -> Result<Vec<&str>, PeftError> {
        match self.keys.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(list)) => {
                let words: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
                words.ok_or_else(|| self.bad(key, "a list of strings is expected"))
            }
            Some(_) => Err(self.bad(key, "a list of strings is expected")),
        }
    }

    /// An object's entries, in the file's order; absent is none.
    ///
    /// # Errors
    /// Another type.
    pub fn entries(&self, key: &str) -> Result<Vec<(&str, &Value)>, PeftError> {
        let Some(value) = self.keys.get(key) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| self.bad(key, "an object is expected"))?;
        Ok(map.iter().map(|(key, value)| (key.as_str(), value)).collect())
    }

    /// An error about a key.
    pub(super) fn bad(&self, key: &str, what: &str) -> PeftError {
        PeftError::config(&self.path, key, what)
    }
}

/// A value in few characters.
pub(super) fn short(value: &Value) -> String {
    Printable(&value.to_string()).to_string()
}

/// The keys of an object, each once.
struct Keys(Map<String, Value>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeysVisitor;
        impl<'de> Visitor<'de> for KeysVisitor {
            type Value = Keys;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Map::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if keys.contains_key(&key) {
                        return Err(de::Error::custom(format_args!("the key \"{}\" comes twice", Printable(&key))));
                    }
                    keys.insert(key, value);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(KeysVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<PeftConfig, String> {
        PeftConfig::parse("adapter_config.json".as_ref(), json.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_config_is_an_object_with_a_type() {
        assert_eq!(parse(r#"{"peft_type":"LORA","r":null}"#).unwrap().peft_type(), &PeftType::Lora);
        assert_eq!(parse(r#"{"peft_type":"LOHA"}"#).unwrap().peft_type(), &PeftType::Other("LOHA".to_owned()));
        for (json, said) in [
            ("[]", "an object"),
            ("{}", "no `peft_type`"),
            (r#"{"peft_type":1}"#, "a string is expected"),
            (r#"{"peft_type":"LORA","r":1,"r":2}"#, "the key \"r\" comes twice"),
            (r#"{"peft_type":"LORA""#, "malformed"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(said), "{json}: {error}");
        }
    }

    #[test]
    fn unknown_keys_are_tolerated_where_they_say_nothing() {
        let known = ["peft_type", "r"];
        let config = parse(r#"{"peft_type":"LORA","a":null,"b":false,"c":[],"d":{},"neuroada_x":1}"#).unwrap();
        config.refuse_unknown(&known).unwrap();
        let config = parse(r#"{"peft_type":"LORA","use_new_trick":true}"#).unwrap();
        let said = config.refuse_unknown(&known).unwrap_err().to_string();
        assert!(said.contains("`use_new_trick`"), "{said}");
    }

    #[test]
    fn values_have_their_types() {
        let config = parse(r#"{"peft_type":"LORA","r":0,"s":1.5,"t":["a",1],"u":"x"}"#).unwrap();
        assert!(config.positive("r").is_err() && config.positive("s").is_err());
        assert_eq!(config.number("s").unwrap(), Some(1.5));
        assert!(config.words("t").is_err() && config.flag("u").is_err() && config.entries("u").is_err());
        assert_eq!(config.words("u").unwrap(), ["x"]);
        assert_eq!(config.positive("missing").unwrap(), None);
    }
}
