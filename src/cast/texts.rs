//! What lies beside the shards: `config.json` without its quantization, and the index.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{CastError, CastReport, plan::Plan};
use crate::{
    checkpoint::{
        Checkpoint, CheckpointError, INDEX_FILE, OwnFolder, Printable, probe, read_whole, remove_file, write_own,
    },
    tensor::Dtype,
};

const CONFIG: &str = "config.json";
/// Larger files are refused when a checkpoint is opened.
const MAX_BYTES: u64 = 100_000_000;
/// Keys of `config.json` that describe quantized weights.
const QUANTIZATION: [&str; 2] = ["quantization_config", "compression_config"];
/// Files that do so.
const QUANTIZATION_FILES: [&str; 3] = ["hf_quant_config.json", "quantize_config.json", "quant_config.json"];

/// Makes the texts in `root`, copies of the old checkpoint's, fit the new shards.
pub(super) fn write(base: &Checkpoint, plan: &Plan<'_>, root: &Path, report: &mut CastReport) -> Result<(), CastError> {
    let folder = OwnFolder::at(root)?;
    if let Some(name) = base.index_name() {
        remove_file(&root.join(name))?;
    }
    if plan.shards.len() > 1 {
        let index = serde_json::to_string_pretty(&index(plan)).expect("strings and numbers serialise");
        write_own(&folder, INDEX_FILE, format!("{index}\n").as_bytes())?;
    }
    let Some(dtype) = plan.options.dtype else { return Ok(()) };
    if !base.codes().weights().is_empty() {
        for name in QUANTIZATION_FILES {
            if probe::is_present(&root.join(name))? {
                remove_file(&root.join(name))?;
                report.notes.push(format!("{name} is left out: it describes quantized weights"));
            }
        }
    }
    let path = root.join(CONFIG);
    if !probe::is_present(&path)? {
        return Ok(());
    }
    let bad = |e: serde_json::Error| {
        CheckpointError::bad_file(&base.root().join(CONFIG), Printable(&e.to_string()).to_string())
    };
    let text = read_whole(&path, MAX_BYTES)?;
    let mut config: Map<String, Value> = serde_json::from_slice(&text).map_err(bad)?;
    let before = config.clone();
    edit(&mut config, dtype, base);
    if let Some(part) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        edit(part, dtype, base);
    }
    if config != before {
        let text = serde_json::to_string_pretty(&config).expect("what was parsed serialises");
        write_own(&folder, CONFIG, format!("{text}\n").as_bytes())?;
    }
    Ok(())
}

/// Takes the quantization out, and tells the type where the config tells one.
fn edit(config: &mut Map<String, Value>, dtype: Dtype, base: &Checkpoint) {
    if !base.codes().weights().is_empty() {
        for key in QUANTIZATION {
            config.shift_remove(key);
        }
    }
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = config.get_mut(key).filter(|value| value.is_string()) {
            *value = json!(match dtype {
                Dtype::BF16 => "bfloat16",
                Dtype::F16 => "float16",
                _ => "float32",
            });
        }
    }
}

fn index(plan: &Plan<'_>) -> Value {
    let shards = plan.shards.iter().flat_map(|shard| shard.tensors.keys().map(|name| (*name, &shard.name)));
    let mut weight_map: Vec<(&str, &String)> = shards.collect();
    weight_map.sort_unstable();
    let weight_map: Map<String, Value> =
        weight_map.into_iter().map(|(name, shard)| (name.to_owned(), json!(shard))).collect();
    json!({ "metadata": { "total_size": plan.n_data_bytes() }, "weight_map": weight_map })
}
