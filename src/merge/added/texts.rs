//! What `config.json` and the index say of added tensors.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{
    checkpoint::{Checkpoint, CheckpointError, Layout, OwnFolder, Printable, probe, read_whole, write_own},
    merge::{
        MergeError,
        change::Change,
        frame::{Frame, original_index},
        ledger::{LedgerDocument, TextEdit},
        plan::{Added, AddedTensors, same_added},
    },
};

const CONFIG: &str = "config.json";
/// Larger files are refused when a checkpoint is opened.
const MAX_BYTES: u64 = 100_000_000;

/// How classes of models that predict tokens end, the longest first.
const CLASS_ENDS: [&str; 5] = ["ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "LMHeadModel", "Model"];

/// Texts beside the shards that a change edits.
#[derive(Default)]
pub(in crate::merge) struct Texts {
    /// By file name, what they become.
    new: BTreeMap<String, String>,
    /// By file name, how to take that back.
    edits: BTreeMap<String, TextEdit>,
    /// What was done, in words.
    pub(in crate::merge) notes: Vec<String>,
}

impl Texts {
    /// The texts of a change.
    ///
    /// # Errors
    /// A file that cannot be read or is not JSON.
    pub(in crate::merge) fn of(change: &Change<'_>) -> Result<Self, MergeError> {
        let remembered = change.before.ledger.map(|ledger| &ledger.document().files);
        let mut texts = Self { edits: remembered.cloned().unwrap_or_default(), ..Self::default() };
        if same_added(&change.before.added, &change.after.added) || change.checkpoint.layout() == Layout::File {
            return Ok(texts);
        }
        let index = change.checkpoint.index_name();
        for name in [Some(CONFIG), index].into_iter().flatten() {
            let path = change.checkpoint.root().join(name);
            if !probe::is_present(&path)? {
                continue;
            }
            let bad = |what: String| MergeError::from(CheckpointError::bad_file(&path, what));
            let text = String::from_utf8(read_whole(&path, MAX_BYTES)?).map_err(|e| bad(e.to_string()))?;
            let is_own = Frame::of(change.checkpoint, change.before.ledger).is_own(name);
            let text = if is_own { original_index(&path, &text)? } else { text };
            let original = match texts.edits.remove(name) {
                None => text.clone(),
                Some(edit) => edit.undo(&text).unwrap_or_else(|| {
                    texts.notes.push(format!("{}: changed since the merge, so it stays as it is", Printable(name)));
                    text.clone()
                }),
            };
            let new = match name {
                CONFIG => texts.edited_config(&original, change.checkpoint, &change.after.added),
                _ => edited_index(&original, change),
            };
            let new = new.map_err(|e| bad(e.to_string()))?;
            if new != original {
                texts.edits.insert(name.to_owned(), TextEdit::between(&original, &new));
            }
            texts.new.insert(name.to_owned(), new);
        }
        Ok(texts)
    }

    /// Lets a ledger remember the edits.
    pub(in crate::merge) fn record(&self, document: &mut LedgerDocument) {
        document.files = self.edits.clone();
    }

    /// Writes the texts into a new checkpoint's folder.
    pub(in crate::merge) fn write(&self, root: &OwnFolder) -> Result<(), MergeError> {
        Ok(self.new.iter().try_for_each(|(name, text)| write_own(root, name, text.as_bytes()))?)
    }

    /// `config.json` of a model that has the added tensors.
    fn edited_config(
        &mut self,
        original: &str,
        checkpoint: &Checkpoint,
        added: &AddedTensors<'_>,
    ) -> serde_json::Result<String> {
        let mut config: Map<String, Value> = serde_json::from_str(original)?;
        let before = config.clone();
        for (name, added) in added {
            match &added.replaces {
                Some((_, old)) => self.tell_vocabulary(&mut config, (name, added), old),
                None => self.tell_head(&mut config, name, added),
            }
        }
        if config == before {
            return Ok(original.to_owned());
        }
        debug_assert!(checkpoint.layout() != Layout::File, "a single file has no config");
        let mut text = serde_json::to_string_pretty(&config)?;
        text.push('\n');
        Ok(text)
    }

    /// The vocabulary's size, where the tensor's rows are the vocabulary: at the top, or in the part that is the language model.
    fn tell_vocabulary(&mut self, config: &mut Map<String, Value>, (name, added): (&str, &Added<'_>), old: &[u64]) {
        let (Some(&old), Some(&new)) = (old.first(), added.shape().first()) else { return };
        let of_text = ["text_config", "llm_config", "language_config"];
        let nested = of_text.iter().find(|key| config.get(**key).is_some_and(|part| part.get("vocab_size").is_some()));
        let part = match nested {
            Some(key) => config.get_mut(*key).and_then(Value::as_object_mut),
            None => Some(config),
        };
        let size = part.and_then(|part| part.get_mut("vocab_size"));
        match size {
            Some(size) if *size == json!(old) => {
                *size = json!(new);
                self.note(format!("config.json: vocab_size is {new}, it was {old}"));
            }
            Some(size) if *size == json!(new) => {}
            _ => self.note(format!("config.json does not say the size of {}: look whether it has to", Printable(name))),
        }
    }

    /// The class of the model and its labels, where the adapter's task says them.
    fn tell_head(&mut self, config: &mut Map<String, Value>, name: &str, added: &Added<'_>) {
        let ending = match added.task.as_deref() {
            Some("SEQ_CLS") => "ForSequenceClassification",
            Some("TOKEN_CLS") => "ForTokenClassification",
            Some("QUESTION_ANS") => "ForQuestionAnswering",
            _ => {
                let name = Printable(name);
                return self.note(format!(
                    "config.json: nothing says which class of model has {name}; set `architectures` there"
                ));
            }
        };
        let class = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let stem = class.and_then(|class| CLASS_ENDS.iter().find_map(|end| class.strip_suffix(end)));
        match (class, stem) {
            (Some(class), _) if class.ends_with(ending) => {}
            (_, Some(stem)) => {
                let new = format!("{stem}{ending}");
                self.note(format!("config.json: architectures is [\"{}\"]", Printable(&new)));
                config.insert("architectures".to_owned(), json!([new]));
            }
            _ => self.note(format!("config.json does not name the model's class; it needs one that ends in {ending}")),
        }
        let n_labels = match added.shape() {
            &[n, _] if ending != "ForQuestionAnswering" => n,
            _ => return,
        };
        let said = config.get("id2label").and_then(Value::as_object).map(|labels| labels.len() as u64);
        if said != Some(n_labels) {
            let label = |i: u64| format!("LABEL_{i}");
            let names: Map<String, Value> = (0..n_labels).map(|i| (i.to_string(), json!(label(i)))).collect();
            let ids: Map<String, Value> = (0..n_labels).map(|i| (label(i), json!(i))).collect();
            config.insert("id2label".to_owned(), names.into());
            config.insert("label2id".to_owned(), ids.into());
            self.note(format!("config.json: {n_labels} labels, LABEL_0 and so on"));
        }
    }

    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// The index of a checkpoint that has the added tensors.
fn edited_index(original: &str, change: &Change<'_>) -> serde_json::Result<String> {
    let added = &change.after.added;
    if added.is_empty() {
        return Ok(original.to_owned());
    }
    let mut index: Value = serde_json::from_str(original)?;
    let mut grown: i128 = 0;
    for (name, added) in added {
        let shard = change.checkpoint.shards()[added.shard_index].file_name();
        index["weight_map"][name.as_str()] = shard.into();
        let replaced = added
            .replaces
            .as_ref()
            .map_or(0, |(dtype, shape)| shape.iter().product::<u64>() * dtype.bitsize() as u64 / 8);
        grown += i128::from(added.n_bytes()) - i128::from(replaced);
    }
    if let Some(size) = index["metadata"].get("total_size").and_then(Value::as_u64) {
        index["metadata"]["total_size"] = json!(u64::try_from(i128::from(size) + grown).unwrap_or(size));
    }
    let mut text = serde_json::to_string_pretty(&index)?;
    text.push('\n');
    Ok(text)
}
