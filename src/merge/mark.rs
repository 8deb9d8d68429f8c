//! What a checkpoint says of its merges without its ledger: a value in the `__metadata__` of shards, or in the index's `metadata`.
//!
//! `neuroada.merged` is one JSON document: the merged adapters, and the length and BLAKE3 of the text that it was put into, so that
//! taking it out again restores every byte. Out of place each shard names the adapters that changed tensors of it. In place shards keep
//! their headers, and the index names the adapters; a single file changed in place has its ledger alone.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{MergeError, source::Source};
use crate::{
    adapter::AdapterId,
    checkpoint::{Checkpoint, CheckpointError, MERGED_KEY, string_at, with_string, without_string},
};

/// The version that is written and read.
const VERSION: u32 = 1;

/// Which object of a text holds the value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MarkedText {
    /// A shard's header.
    Header,
    /// The index of a sharded checkpoint.
    Index,
}

impl MarkedText {
    fn object(self) -> &'static str {
        match self {
            Self::Header => "__metadata__",
            Self::Index => "metadata",
        }
    }
    /// Texts grow by multiples of this: data that follows keeps its place within pages, so that it can be written past the page cache.
    fn step(self) -> usize {
        match self {
            Self::Header => 4096,
            Self::Index => 1,
        }
    }
}

/// The value: adapters that were merged, and what the text was without it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark {
    version: u32,
    /// In ascending order of id.
    adapters: Vec<MarkedAdapter>,
    /// Bytes of the text without the value.
    n_bytes: u64,
    /// BLAKE3 of the text without the value.
    blake3: String,
    /// The value that this one took the place of: that of a merge whose ledger is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<String>,
}

/// An adapter that was merged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MarkedAdapter {
    /// 64 hexadecimal digits.
    pub(super) id: String,
    pub(super) scale: f64,
}

impl MarkedAdapter {
    pub(super) fn of(source: &Source) -> Self {
        Self { id: source.id.to_string(), scale: source.scale }
    }
}

impl Mark {
    /// Parses a value.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(value: &str) -> Result<Self, String> {
        let mark: Self =
            serde_json::from_str(value).map_err(|e| format!("metadata key \"{MERGED_KEY}\" is malformed: {e}"))?;
        match mark.version {
            VERSION => Ok(mark),
            version => Err(format!("metadata key \"{MERGED_KEY}\" has version {version}, which a newer program wrote")),
        }
    }

    /// The adapters of this value, in ascending order of id.
    pub(super) fn adapters(&self) -> &[MarkedAdapter] {
        &self.adapters
    }

    /// The adapters of this value and of those that it took the place of.
    pub(super) fn all_adapters(&self) -> Vec<MarkedAdapter> {
        let mut all = self.adapters.clone();
        all.extend(self.earlier());
        all
    }

    /// The adapters of the values that this one took the place of.
    fn earlier(&self) -> Vec<MarkedAdapter> {
        let before = self.before.as_deref().map(Self::parse);
        before.and_then(Result::ok).map_or_else(Vec::new, |before| before.all_adapters())
    }

    /// The text that `text` was before it was marked; none where it was changed since.
    pub(super) fn original(&self, text: &str, kind: MarkedText) -> Option<String> {
        let object = kind.object();
        let candidates = match &self.before {
            Some(before) => with_string(text, object, MERGED_KEY, before).into_iter().collect(),
            None => without_string(text, object, MERGED_KEY),
        };
        candidates.into_iter().find_map(|mut candidate| {
            let n_bytes = usize::try_from(self.n_bytes).ok().filter(|&n| n <= candidate.len())?;
            let is_padding = candidate.as_bytes()[n_bytes..].iter().all(|&byte| byte == b' ');
            candidate.truncate(n_bytes);
            let is_same = blake3::hash(candidate.as_bytes()).to_hex().as_str() == self.blake3;
            (is_padding && is_same).then_some(candidate)
        })
    }
}

/// `original` with a value that names `adapters`; `original` itself where there are none.
///
/// # Errors
/// A text that no value can be put into.
pub(super) fn marked(original: &str, kind: MarkedText, adapters: Vec<MarkedAdapter>) -> serde_json::Result<String> {
    if adapters.is_empty() {
        return Ok(original.to_owned());
    }
    let mark = Mark {
        version: VERSION,
        adapters,
        n_bytes: original.len() as u64,
        blake3: blake3::hash(original.as_bytes()).to_hex().to_string(),
        before: string_at(original, kind.object(), MERGED_KEY)?,
    };
    let mut text = with_string(original, kind.object(), MERGED_KEY, &serde_json::to_string(&mark)?)?;
    let longer = text.len().saturating_sub(original.len()).next_multiple_of(kind.step());
    // The same length modulo the step, with spaces, which headers end with anyway.
    text.extend(std::iter::repeat_n(' ', (original.len() + longer).saturating_sub(text.len())));
    Ok(text)
}

/// Fails where the checkpoint's files say that one of these adapters was merged, though no ledger remembers it; `own` says of a file
/// whether its value is the ledger's.
///
/// # Errors
/// [`MergeError::MergedBefore`]; a value that is malformed.
pub(super) fn refuse_merged(
    checkpoint: &Checkpoint,
    own: impl Fn(&str) -> bool,
    added: &[Source],
) -> Result<(), MergeError> {
    let shards = checkpoint.shards().iter().filter_map(|shard| {
        let value = shard.header().metadata().get(MERGED_KEY)?;
        Some((shard.path().to_owned(), value.as_str(), own(&shard.file_name())))
    });
    let index = checkpoint.merged_in_index().map(|value| {
        let name = checkpoint.index_name().unwrap_or_default();
        (checkpoint.root().join(name), value, own(name))
    });
    for (path, value, is_own) in shards.chain(index) {
        let mark = Mark::parse(value).map_err(|what| CheckpointError::bad_file(&path, what))?;
        let merged = if is_own { mark.earlier() } else { mark.all_adapters() };
        for adapter in merged {
            let id = AdapterId::from_str(&adapter.id)
                .map_err(|_| CheckpointError::bad_file(&path, format!("metadata key \"{MERGED_KEY}\" is malformed")))?;
            if added.iter().any(|source| source.id == id) {
                return Err(MergeError::MergedBefore { path, id });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(digit: &str, scale: f64) -> MarkedAdapter {
        MarkedAdapter { id: digit.repeat(64), scale }
    }

    #[test]
    fn a_mark_is_taken_out_without_a_trace() {
        for (kind, text) in [
            (MarkedText::Header, "{}"),
            (
                MarkedText::Header,
                r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}   "#,
            ),
            (MarkedText::Header, r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"__metadata__":{}}"#),
            (MarkedText::Index, "{\n  \"metadata\": {\n    \"total_size\": 3\n  },\n  \"weight_map\": {}\n}\n"),
            (MarkedText::Index, "{\"weight_map\": {}, \"metadata\": null}"),
        ] {
            let once = marked(text, kind, vec![adapter("a", 0.1)]).unwrap();
            let mark = Mark::parse(&string_at(&once, kind.object(), MERGED_KEY).unwrap().unwrap()).unwrap();
            assert_eq!(mark.original(&once, kind).as_deref(), Some(text));
            assert_eq!((once.len() - text.len()) % kind.step(), 0);
            // Once more, over a value that nobody remembers.
            let twice = marked(&once, kind, vec![adapter("b", 1.0)]).unwrap();
            let mark = Mark::parse(&string_at(&twice, kind.object(), MERGED_KEY).unwrap().unwrap()).unwrap();
            assert_eq!(mark.original(&twice, kind).as_deref(), Some(&*once));
            assert_eq!(mark.all_adapters(), [adapter("b", 1.0), adapter("a", 0.1)]);
            // A text that was changed since is nobody's.
            assert_eq!(mark.original(&twice.replace('{', "{ "), kind), None);
        }
    }

    #[test]
    fn a_text_without_adapters_stays() {
        assert_eq!(marked("{ }", MarkedText::Index, Vec::new()).unwrap(), "{ }");
    }
}
