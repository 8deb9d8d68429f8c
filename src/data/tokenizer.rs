//! A model's tokenizer, its special tokens and its chat template, as they lie beside its weights.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::DataError;
use crate::checkpoint::{CheckpointError, Printable, probe, read_whole};

/// The largest tokenizer.json in use has 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Configurations and templates have some kilobytes; a tokenizer_config.json that lists its added tokens a megabyte.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A Hugging Face tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// What the post-processor puts before a text, such as the begin token, and behind it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    eos: Option<u32>,
    stops: Vec<u32>,
    /// `bos_token`, `eos_token` and their kin, as templates know them.
    specials: Vec<(String, String)>,
    chat_template: Option<(PathBuf, String)>,
    /// Rows of the model's embedding, where config.json tells.
    n_vocab: Option<u64>,
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint: a folder, or a file in that folder.
    ///
    /// Reads `tokenizer.json`, and as far as they are there `tokenizer_config.json` (special tokens, chat template),
    /// `chat_template.jinja`, `generation_config.json` (stop tokens) and `config.json`.
    pub fn open(checkpoint: &Path) -> Result<Self, DataError> {
        let folder = if probe::is_folder(checkpoint)? { checkpoint } else { crate::checkpoint::folder_of(checkpoint) };
        let path = folder.join("tokenizer.json");
        let bad = |what: String| CheckpointError::bad_file(&path, what);
        let bytes = read_whole(&path, MAX_TOKENIZER_BYTES)?;
        if let Some(missing) = undefined_special(&bytes) {
            return Err(
                bad(format!("its post-processor adds \"{}\", which it does not define", Printable(&missing))).into()
            );
        }
        let mut inner: tokenizers::Tokenizer = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| bad(format!("not a tokenizer: {}", Printable(&e.to_string()))))?;
        drop(bytes);
        // What a file says of cutting and padding is a memory of its last use, not a property of the model.
        inner.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        inner.with_padding(None);
        let (prefix, suffix) = surroundings(&inner).map_err(bad)?;
        // From here on texts are encoded without it: it would move offsets besides.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);

        let config = Config::read(folder, "config.json")?;
        let generation = Config::read(folder, "generation_config.json")?;
        let own = Config::read(folder, "tokenizer_config.json")?;
        let mut specials = own.special_tokens();
        for name in ["bos_token", "eos_token"] {
            let id = config.ids(&format!("{name}_id")).first().copied();
            if let (None, Some(text)) = (find(&specials, name), id.and_then(|id| inner.id_to_token(id))) {
                specials.push((name.to_owned(), text));
            }
        }
        let eos = match find(&specials, "eos_token") {
            None => None,
            Some(text) => Some(inner.token_to_id(text).ok_or_else(|| {
                bad(format!("the end token \"{}\" of tokenizer_config.json is not in the vocabulary", Printable(text)))
            })?),
        };
        let mut stops = generation.ids("eos_token_id");
        stops.extend(eos);
        if stops.is_empty() {
            stops = config.ids("eos_token_id");
        }
        stops.sort_unstable();
        stops.dedup();
        let chat_template = own.chat_template(folder)?;
        let n_vocab = config.fields.get("vocab_size").and_then(Value::as_u64);
        Ok(Self { inner, path, prefix, suffix, eos, stops, specials, chat_template, n_vocab })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Token ids of a text, without those that the tokenizer puts around it.
    ///
    /// Special tokens that are written out in the text become themselves, as in transformers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| self.unfit(&e))?;
        self.within_vocabulary(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same, and where in the text each token stands, in bytes.
    pub(super) fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), DataError> {
        let encoding = self.inner.encode(text, false).map_err(|e| self.unfit(&e))?;
        self.within_vocabulary(encoding.get_ids())?;
        let places = encoding.get_offsets().iter().map(|&(begin, end)| begin..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, true).map_err(|e| self.unfit(&e))
    }

    /// The text of token ids, special tokens written out.
    pub fn decode_all(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, false).map_err(|e| self.unfit(&e))
    }

    /// What the tokenizer puts before a text: the begin token, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// What ends a response: the end token, and what the tokenizer puts behind a text if that is more.
    pub(super) fn ending(&self) -> &[u32] {
        match (&self.eos, self.suffix.last()) {
            (Some(eos), Some(last)) if last == eos => &self.suffix,
            (Some(eos), _) => std::slice::from_ref(eos),
            (None, _) => &self.suffix,
        }
    }

    /// The end token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Tokens that end a generated text; ascending.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// `bos_token`, `eos_token` and their kin, as templates know them.
    pub(super) fn specials(&self) -> &[(String, String)] {
        &self.specials
    }

    /// The chat template's file and text.
    pub(super) fn chat_template(&self) -> Option<(&Path, &str)> {
        self.chat_template.as_ref().map(|(path, source)| (path.as_path(), source.as_str()))
    }

    fn within_vocabulary(&self, tokens: &[u32]) -> Result<(), DataError> {
        let Some(n_vocab) = self.n_vocab else { return Ok(()) };
        let beyond = tokens.iter().find(|&&token| u64::from(token) >= n_vocab);
        let Some(&token) = beyond else { return Ok(()) };
        let text = self.inner.id_to_token(token).unwrap_or_default();
        let what = format!("token {token} \"{}\" is beyond the model's vocab_size of {n_vocab}", Printable(&text));
        Err(CheckpointError::bad_file(&self.path, what).into())
    }

    fn unfit(&self, error: &tokenizers::Error) -> DataError {
        CheckpointError::bad_file(&self.path, format!("a text cannot be encoded: {}", Printable(&error.to_string())))
            .into()
    }
}

/// A token that a template of the post-processor adds and does not define; the crate would panic over it.
fn undefined_special(tokenizer: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Part {
        post_processor: Value,
    }
    let Part { post_processor } = serde_json::from_slice(tokenizer).ok()?;
    let in_sequence = post_processor.get("processors").and_then(Value::as_array);
    let templates = in_sequence.into_iter().flatten().chain([&post_processor]);
    templates.flat_map(undefined_specials).next()
}

fn undefined_specials(template: &Value) -> Vec<String> {
    let Some(defined) = template.get("special_tokens").and_then(Value::as_object) else { return Vec::new() };
    let pieces = ["single", "pair"].into_iter().filter_map(|name| template.get(name)?.as_array()).flatten();
    let added = pieces.filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str());
    added.filter(|id| !defined.contains_key(*id)).map(str::to_owned).collect()
}

/// What the post-processor puts before and behind a text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let ids = |with: bool| {
        let encoding = inner.encode_fast("a", with).map_err(|e| Printable(&e.to_string()).to_string())?;
        Ok::<_, String>(encoding.get_ids().to_vec())
    };
    let (bare, whole) = (ids(false)?, ids(true)?);
    let at = (0..=whole.len().saturating_sub(bare.len())).find(|&at| whole[at..].starts_with(&bare));
    let at = at.ok_or("its post-processor changes the tokens of a text")?;
    Ok((whole[..at].to_vec(), whole[at + bare.len()..].to_vec()))
}

fn find<'a>(specials: &'a [(String, String)], name: &str) -> Option<&'a str> {
    specials.iter().find(|(known, _)| known == name).map(|(_, text)| text.as_str())
}

/// A JSON configuration; empty where there is no such file.
struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    fn read(folder: &Path, name: &str) -> Result<Self, DataError> {
        let path = folder.join(name);
        if !probe::is_present(&path)? {
            return Ok(Self { path, fields: Map::new() });
        }
        let bytes = read_whole(&path, MAX_CONFIG_BYTES)?;
        let fields = serde_json::from_slice(&bytes).map_err(|e| {
            CheckpointError::bad_file(&path, format!("not a JSON object: {}", Printable(&e.to_string())))
        })?;
        Ok(Self { path, fields })
    }

    /// One token id, or a list of them.
    fn ids(&self, name: &str) -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.fields.get(name) {
            Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
            Some(value) => id(value).into_iter().collect(),
            None => Vec::new(),
        }
    }

    /// `NAME_token` fields: a text, or an object that holds it as `content`.
    fn special_tokens(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
        let of_tokens = self.fields.iter().filter(|(name, _)| name.ends_with("_token"));
        of_tokens.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
    }

    /// `chat_template.jinja`, or the field: a text, or a list of named ones, of which `default` counts.
    fn chat_template(&self, folder: &Path) -> Result<Option<(PathBuf, String)>, DataError> {
        let path = folder.join("chat_template.jinja");
        if probe::is_present(&path)? {
            let source = String::from_utf8(read_whole(&path, MAX_CONFIG_BYTES)?).map_err(|e| {
                CheckpointError::bad_file(&path, format!("not UTF-8, at byte {}", e.utf8_error().valid_up_to()))
            })?;
            return Ok(Some((path, source)));
        }
        let named = |list: &Vec<Value>| {
            let default = list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))?;
            default.get("template")?.as_str().map(str::to_owned)
        };
        let source = match self.fields.get("chat_template") {
            Some(Value::String(source)) => Some(source.clone()),
            Some(Value::Array(list)) => named(list),
            _ => None,
        };
        Ok(source.map(|source| (self.path.clone(), source)))
    }
}
