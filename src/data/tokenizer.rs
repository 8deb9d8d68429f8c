//! A model's tokenizer, its special tokens and its chat template, as stored next to its weights.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::DataError;
use crate::checkpoint::{CheckpointError, Printable, guarded, probe, read_whole};

/// Maximum size of tokenizer.json; the largest in use has 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Maximum size of configurations and templates: they have a few kilobytes, or a megabyte if a tokenizer_config.json
/// lists its added tokens.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A Hugging Face tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// The tokens that the post-processor adds before a text, such as the begin token, and after it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    eos: Option<u32>,
    stops: Vec<u32>,
    /// `bos_token`, `eos_token` and other special tokens, for templates.
    specials: Vec<(String, String)>,
    chat_template: Option<(PathBuf, String)>,
    /// Number of rows of the model's embedding, if config.json states it.
    n_vocab: Option<u64>,
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint: a folder, or a file in that folder.
    ///
    /// Reads `tokenizer.json` and, if they exist, `tokenizer_config.json` (special tokens, chat template),
    /// `chat_template.jinja`, `generation_config.json` (stop tokens) and `config.json`.
    pub fn open(checkpoint: &Path) -> Result<Self, DataError> {
        let folder = if probe::is_folder(checkpoint)? { checkpoint } else { crate::checkpoint::folder_of(checkpoint) };
        let path = folder.join("tokenizer.json");
        let bad = |what: String| CheckpointError::bad_file(&path, what);
        let bytes = read_whole(&path, MAX_TOKENIZER_BYTES)?;
        if let Some(missing) = undefined_special(&bytes) {
            return Err(
                bad(format!("its post-processor adds \"{}\", which is not defined", Printable(&missing))).into()
            );
        }
        let parsed = guarded(|| parse(&bytes))
            .map_err(|_| bad("not a tokenizer: the tokenizers library fails on it".to_owned()))?;
        let (inner, (prefix, suffix)) = parsed.map_err(bad)?;
        drop(bytes);

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

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Encodes a text, without the tokens that the tokenizer adds around it.
    ///
    /// Special tokens in the text are recognized, as in transformers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.guarded(|inner| inner.encode_fast(text, false))?;
        self.within_vocabulary(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same, with the byte range of each token in the text.
    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), DataError> {
        let encoding = self.guarded(|inner| inner.encode(text, false))?;
        self.within_vocabulary(encoding.get_ids())?;
        let places = encoding.get_offsets().iter().map(|&(begin, end)| begin..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// Decodes token ids, without special tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.guarded(|inner| inner.decode(tokens, true))
    }

    /// Decodes token ids, with special tokens written out.
    pub fn decode_all(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.guarded(|inner| inner.decode(tokens, false))
    }

    /// The tokens added before a text: the begin token, or none.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The tokens that end a response: the end token, or what the tokenizer adds after a text if that is longer.
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

    /// Tokens that end generation, ascending.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// `bos_token`, `eos_token` and other special tokens, for templates.
    pub(super) fn specials(&self) -> &[(String, String)] {
        &self.specials
    }

    /// The path and text of the chat template.
    pub(super) fn chat_template(&self) -> Option<(&Path, &str)> {
        self.chat_template.as_ref().map(|(path, source)| (path.as_path(), source.as_str()))
    }

    fn within_vocabulary(&self, tokens: &[u32]) -> Result<(), DataError> {
        let Some(n_vocab) = self.n_vocab else { return Ok(()) };
        let beyond = tokens.iter().find(|&&token| u64::from(token) >= n_vocab);
        let Some(&token) = beyond else { return Ok(()) };
        let text = self.inner.id_to_token(token).unwrap_or_default();
        let what = format!("token {token} \"{}\" is outside the model's vocab_size of {n_vocab}", Printable(&text));
        Err(CheckpointError::bad_file(&self.path, what).into())
    }

    /// Calls the tokenizers library; any failure is reported as an invalid file.
    fn guarded<T>(&self, work: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<T>) -> Result<T, DataError> {
        let what = match guarded(|| work(&self.inner)) {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => Printable(&error.to_string()).to_string(),
            Err(_) => "the tokenizers library fails on it".to_owned(),
        };
        Err(CheckpointError::bad_file(&self.path, format!("a text cannot be encoded: {what}")).into())
    }
}

/// The tokens that the post-processor adds before and after a text.
type Surroundings = (Vec<u32>, Vec<u32>);

/// A tokenizer that encodes texts without additions, and the additions from its file.
fn parse(bytes: &[u8]) -> Result<(tokenizers::Tokenizer, Surroundings), String> {
    let mut inner: tokenizers::Tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
        .map_err(|e| format!("not a tokenizer: {}", Printable(&e.to_string())))?;
    // Truncation and padding in the file record its last use; they are not properties of the model.
    inner.with_truncation(None).map_err(|e| e.to_string())?;
    inner.with_padding(None);
    let surroundings = surroundings(&inner)?;
    // Texts are encoded without the post-processor, which would also shift offsets.
    inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
    Ok((inner, surroundings))
}

/// A token that a template of the post-processor adds but does not define; the crate would panic on it.
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

/// The tokens that the post-processor adds before and after a text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<Surroundings, String> {
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

/// A whole file; `None` if it does not exist.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, CheckpointError> {
    match read_whole(path, MAX_CONFIG_BYTES) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// A JSON configuration; empty if the file does not exist.
struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    fn read(folder: &Path, name: &str) -> Result<Self, DataError> {
        let path = folder.join(name);
        let Some(bytes) = read_if_there(&path)? else { return Ok(Self { path, fields: Map::new() }) };
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

    /// `NAME_token` fields: a string, or an object with a `content` field.
    fn special_tokens(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
        let of_tokens = self.fields.iter().filter(|(name, _)| name.ends_with("_token"));
        of_tokens.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
    }

    /// `chat_template.jinja`, or the field: a string, or a list of named templates, of which `default` is used.
    fn chat_template(&self, folder: &Path) -> Result<Option<(PathBuf, String)>, DataError> {
        let path = folder.join("chat_template.jinja");
        if let Some(bytes) = read_if_there(&path)? {
            let source = String::from_utf8(bytes).map_err(|e| {
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
