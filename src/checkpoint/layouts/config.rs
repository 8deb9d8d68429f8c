//! What configs say about quantization, as far as shapes and types do not say it themselves.

use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::{CheckpointError, model::read_config};

/// The quantization config of a checkpoint: `quantization_config` in `config.json`, or a file of its own beside it.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct QuantizationConfig(Map<String, Value>);

impl QuantizationConfig {
    /// That of the checkpoint in `folder`, whose `config.json` is `config`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(in crate::checkpoint) fn read(folder: &Path, config: &Map<String, Value>) -> Result<Self, CheckpointError> {
        let of_text = config.get("text_config").and_then(|text| text.get("quantization_config"));
        let mut found = [config.get("quantization_config"), of_text].into_iter().flatten().filter_map(Value::as_object);
        if let Some(object) = found.next() {
            return Ok(Self(object.clone()));
        }
        let gptq = read_config(&folder.join("quantize_config.json"))?;
        if !gptq.is_empty() {
            return Ok(Self(gptq));
        }
        let model_opt = read_config(&folder.join("hf_quant_config.json"))?;
        Ok(Self(model_opt.get("quantization").and_then(Value::as_object).cloned().unwrap_or_default()))
    }

    /// `quant_method`, empty where there is none.
    pub(super) fn method(&self) -> &str {
        self.text("quant_method").unwrap_or_default()
    }

    /// The string of this key.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.as_str()
    }

    /// The count of this key.
    pub(super) fn count(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    /// `[rows, columns]` of a block of FP8, where the config names it.
    pub(super) fn block(&self) -> Option<[u64; 2]> {
        let own = self.0.get("weight_block_size").and_then(pair);
        own.or_else(|| self.groups().find_map(|weights| pair(weights.get("block_structure")?)))
    }

    /// The bit widths that the groups of a compressed-tensors config name.
    pub(super) fn bit_widths(&self) -> Vec<u64> {
        self.groups().filter_map(|weights| weights.get("num_bits")?.as_u64()).collect()
    }

    /// The sizes of groups of columns that they name.
    pub(super) fn group_sizes(&self) -> Vec<u64> {
        self.groups().filter_map(|weights| weights.get("group_size")?.as_u64()).collect()
    }

    /// `weights` of each of the config's groups.
    fn groups(&self) -> impl Iterator<Item = &Map<String, Value>> {
        let groups = self.0.get("config_groups").and_then(Value::as_object);
        groups.into_iter().flat_map(Map::values).filter_map(|group| group.get("weights")?.as_object())
    }
}

fn pair(value: &Value) -> Option<[u64; 2]> {
    let [rows, columns] = value.as_array()?.as_slice() else { return None };
    Some([rows.as_u64()?, columns.as_u64()?])
}
