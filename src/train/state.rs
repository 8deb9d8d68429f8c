//! The saved state of an interrupted run: a safetensors file that is written atomically.
//!
//! For each target `T` it holds `T.theta`, `T.mean` and `T.variance`, F32 `[nnz]`, and `T.best` if there has been a
//! best evaluation. A JSON document in the metadata holds the progress. The order of the data follows from seed and
//! epoch, so two numbers give the position in it.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{TrainError, device::Device, model::Model};
use crate::{
    checkpoint::{CheckpointError, Context, Existing, Printable, Shard, TensorFileWriter},
    tensor::Dtype,
};

const DOCUMENT_KEY: &str = "neuroada_training";
const VERSION: u64 = 1;
/// Maximum length of the document.
const MAX_BYTES: usize = 1 << 20;

/// The progress of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch of the next batch, from 0.
    pub epoch: u64,
    /// The next batch of that epoch, from 0.
    pub batch: u64,
    /// Tokens processed.
    pub n_tokens: u64,
    /// The evaluation loss before training.
    pub first_eval: Option<f64>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub n_worse: u64,
}

/// The best evaluation.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps done.
    pub step: u64,
    /// The mean loss.
    pub loss: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u64,
    progress: Progress,
    /// The recipe: everything that determines the result.
    recipe: Value,
}

/// The deltas of the best evaluation, for every trained tensor, in the model's order.
pub(super) type BestDeltas = Vec<Vec<f32>>;

/// Writes the state.
pub(super) fn save<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &Model<D>,
    progress: &Progress,
    recipe: &Value,
    best: Option<&BestDeltas>,
    path: &Path,
) -> Result<(), TrainError> {
    let mut file = TensorFileWriter::create(path, Existing::Replace)?;
    for (i, (parts, deltas)) in model.trained().enumerate() {
        let read = |values: &D::F32| device.read(values, deltas.nnz);
        let mut tensors =
            vec![("theta", read(&deltas.theta)?), ("mean", read(&deltas.mean)?), ("variance", read(&deltas.variance)?)];
        tensors.extend(best.map(|best| ("best", best[i].clone())));
        for (what, values) in tensors {
            for part in parts.iter().filter(|part| !part.entries.is_empty()) {
                let id = file.add_tensor(format!("{}.{what}", part.name), Dtype::F32);
                let bytes: Vec<u8> = values[part.entries.clone()].iter().flat_map(|x| x.to_le_bytes()).collect();
                file.append(id, &bytes)?;
                file.finish_tensor(id, vec![part.entries.len() as u64]);
            }
        }
    }
    let document = Document { version: VERSION, progress: progress.clone(), recipe: recipe.clone() };
    let json = serde_json::to_string(&document).expect("numbers and strings are JSON");
    Ok(file.finish(ctx, &BTreeMap::from([(DOCUMENT_KEY.to_owned(), json)]))?)
}

/// Reads a state into the model; returns the progress and the best deltas.
///
/// # Errors
/// The file is not a state, or belongs to a run with another recipe; each difference is listed.
pub(super) fn load<D: Device>(
    ctx: &Context<'_>,
    device: &D,
    model: &mut Model<D>,
    recipe: &Value,
    path: &Path,
) -> Result<(Progress, Option<BestDeltas>), TrainError> {
    let file = Shard::open(path)?;
    let bad = |what: String| CheckpointError::bad_file(path, what);
    let json =
        file.header().metadata().get(DOCUMENT_KEY).ok_or_else(|| bad("this is not a training state".to_owned()))?;
    if json.len() > MAX_BYTES {
        return Err(bad("its training document is too long".to_owned()).into());
    }
    let document: Document =
        serde_json::from_str(json).map_err(|e| bad(format!("its training document is malformed: {e}")))?;
    if document.version > VERSION {
        let found = document.version;
        return Err(bad(format!("its format is version {found}, at most {VERSION} is supported")).into());
    }
    let differences = differences("", &document.recipe, recipe);
    if !differences.is_empty() {
        return Err(TrainError::OtherRun { path: path.to_owned(), what: differences.join("; ") });
    }
    let has_best = document.progress.best.is_some();
    let mut best = BestDeltas::new();
    for (parts, deltas) in model.trained_mut() {
        let read = |what: &str| -> Result<Vec<f32>, TrainError> {
            let mut values = vec![0.0; deltas.nnz];
            for part in parts.iter().filter(|part| !part.entries.is_empty()) {
                let name = format!("{}.{what}", part.name);
                let info = file
                    .header()
                    .tensor(&name)
                    .filter(|info| info.dtype == Dtype::F32 && info.shape == [part.entries.len() as u64]);
                let info = info.ok_or_else(|| {
                    let what = format!("expected F32 [{}]", part.entries.len());
                    CheckpointError::bad_tensor(path, &name, what)
                })?;
                let bytes = file.window(ctx, info, 0..info.n_bytes())?;
                for (value, le) in values[part.entries.clone()].iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([le[0], le[1], le[2], le[3]]);
                }
            }
            Ok(values)
        };
        device.write(&read("theta")?, &mut deltas.theta)?;
        device.write(&read("mean")?, &mut deltas.mean)?;
        device.write(&read("variance")?, &mut deltas.variance)?;
        if has_best {
            best.push(read("best")?);
        }
    }
    Ok((document.progress, has_best.then_some(best)))
}

/// The differences of two recipes as text: `options.seed was 1, is 2`.
fn differences(at: &str, was: &Value, is: &Value) -> Vec<String> {
    if was == is {
        return Vec::new();
    }
    let (Value::Object(was_fields), Value::Object(is_fields)) = (was, is) else {
        return vec![format!(
            "{} was {}, is {}",
            Printable(at),
            Printable(&was.to_string()),
            Printable(&is.to_string())
        )];
    };
    let mut names: Vec<&String> = was_fields.keys().chain(is_fields.keys()).collect();
    names.sort();
    names.dedup();
    let within = |name: &str| if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
    let of = |fields: &serde_json::Map<String, Value>, name: &str| fields.get(name).cloned().unwrap_or(Value::Null);
    names.into_iter().flat_map(|name| differences(&within(name), &of(was_fields, name), &of(is_fields, name))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_of_recipes_are_listed_by_field() {
        let was = json!({"data": {"blake3": "a"}, "options": {"seed": 1, "epochs": 3}});
        let is = json!({"data": {"blake3": "a"}, "options": {"seed": 2, "epochs": 3, "clip": 1.0}});
        assert_eq!(differences("", &was, &is), ["options.clip was null, is 1.0", "options.seed was 1, is 2"]);
        assert!(differences("", &was, &was).is_empty());
    }
}
