//! Selects the tensors that take part.

use std::collections::BTreeMap;

use serde::Serialize;

use super::MaskError;
use crate::{
    checkpoint::{Checkpoint, CheckpointError, CodedWeight, Printable, RowScan, TensorRef},
    tensor::{RowLayout, dtype_name, is_float, projection_kind},
    weights::{ALL_LINEAR, Axes, TargetPattern, WeightMap},
};

/// The seven projections of a Llama layer: the default targets.
pub const LLAMA_PROJECTIONS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A way to select tensors.
///
/// - `all-linear`: every matrix or stack of matrices of floats, except embeddings, output heads and norms
/// - anything else: a [`TargetPattern`]
#[derive(Debug)]
enum Pattern {
    AllLinear,
    Of(TargetPattern),
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, MaskError> {
        if text == ALL_LINEAR {
            return Ok(Self::AllLinear);
        }
        text.parse().map(Self::Of).map_err(MaskError::Usage)
    }

    fn matches(&self, map: &WeightMap<'_>, tensor: &TensorRef<'_>) -> bool {
        let name = tensor.info.name.as_str();
        match self {
            Self::AllLinear => {
                map.is_linear(name) && matches!(tensor.info.shape.len(), 2 | 3) && is_float(tensor.info.dtype)
            }
            Self::Of(pattern) => pattern.names(name),
        }
    }

    /// The same for a quantized weight, before its layout is resolved. The name of its codes matches too.
    fn matches_quantized(&self, map: &WeightMap<'_>, weight: &CodedWeight) -> bool {
        match self {
            Self::AllLinear => map.is_linear(&weight.name),
            Self::Of(pattern) => {
                pattern.names(&weight.name)
                    || matches!(pattern, TargetPattern::Name(wanted) if weight.has_codes(wanted))
            }
        }
    }

    /// Whether the pattern is exactly this name, so that it cannot mean anything else.
    fn is_exact(&self, name: &str) -> bool {
        matches!(self, Self::Of(pattern) if pattern.is_exact(name))
    }
}

/// A tensor that matches a pattern but cannot be masked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SkippedTensor {
    /// The tensor's name.
    pub tensor: String,
    /// The reason.
    pub why: String,
}

/// The tensors that take part.
#[derive(Debug, Default)]
pub struct Selection<'a> {
    /// Sorted by name.
    pub targets: Vec<RowScan<'a>>,
    /// Other tensors that match a pattern, and why they cannot be masked.
    pub skipped: Vec<SkippedTensor>,
}

/// Selects the tensors that match `patterns`. The weight map determines the orientation of each; those that match
/// `transposed` are always read as `[d_in, d_out]`.
///
/// Without patterns, selects [`LLAMA_PROJECTIONS`].
///
/// # Errors
/// [`MaskError::NoMatch`] for patterns that select nothing (all seven together, if none was given); a fully named
/// tensor that is not a matrix of floats; [`MaskError::Axes`] for a weight whose orientation is unknown; weights that
/// are stored as codes.
pub fn select_targets<'a>(
    map: &WeightMap<'a>,
    patterns: &[String],
    transposed: &[String],
) -> Result<Selection<'a>, MaskError> {
    select_rows(map, patterns, transposed, TensorRef::rows)
}

/// Selects exactly the tensors of these names, each with whether it is read as `[d_in, d_out]`.
///
/// # Errors
/// A name without a tensor, or a tensor that is not a matrix of floats.
pub(super) fn select_named<'a>(
    checkpoint: &'a Checkpoint,
    names: &BTreeMap<String, bool>,
) -> Result<Selection<'a>, MaskError> {
    let mut selection = Selection::default();
    for (name, &is_transposed) in names {
        let tensor = checkpoint.weight(name)?.ok_or_else(|| MaskError::NoMatch {
            path: checkpoint.root().to_owned(),
            patterns: vec![name.clone()],
            kinds: kinds(checkpoint),
        })?;
        selection.targets.push(rows_of(tensor, is_transposed, TensorRef::rows)?);
    }
    Ok(selection)
}

/// How tensors are read as rows: [`TensorRef::rows`], or [`TensorRef::any_rows`] if vectors may take part.
pub(crate) type Read<'a> = fn(&TensorRef<'a>, bool) -> Result<RowLayout, CheckpointError>;

/// As [`select_targets`], with a function that reads tensors as rows.
pub(crate) fn select_rows<'a>(
    map: &WeightMap<'a>,
    patterns: &[String],
    transposed: &[String],
    read: Read<'a>,
) -> Result<Selection<'a>, MaskError> {
    let checkpoint = map.checkpoint();
    let defaults: Vec<String> = LLAMA_PROJECTIONS.map(str::to_owned).into();
    let given = if patterns.is_empty() { &defaults } else { patterns };
    let parsed = given.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let parsed_transposed = transposed.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let mut n_selected = vec![0usize; parsed.len()];
    let mut n_transposed = vec![0usize; parsed_transposed.len()];
    let mut selection = Selection::default();
    // Scales, zero points and similar tensors are not weights.
    let plain = checkpoint.tensors().filter(|tensor| tensor.coded().is_none());
    let mut tensors: Vec<TensorRef<'a>> =
        plain.filter(|tensor| parsed.iter().any(|pattern| pattern.matches(map, tensor))).collect();
    for weight in checkpoint.codes().weights() {
        if parsed.iter().any(|pattern| pattern.matches_quantized(map, weight)) {
            tensors.push(checkpoint.decoded(weight)?);
        }
    }
    tensors.sort_unstable_by(|a, b| a.info.name.cmp(&b.info.name));
    for tensor in tensors {
        let is_declared =
            tensor.layout().is_none() && parsed_transposed.iter().any(|pattern| pattern.matches(map, &tensor));
        let is_matrix = tensor.info.shape.len() > 1 && is_float(tensor.info.dtype);
        if is_declared && map.is_told_out_in(&tensor.info.name) {
            let name = Printable(&tensor.info.name);
            return Err(MaskError::Usage(format!("\"{name}\": --transposed and --axes contradict each other")));
        }
        let is_transposed = is_declared || (is_matrix && is_stored_transposed(map, tensor)?);
        match rows_of(tensor, is_transposed, read) {
            Ok(scan) => selection.targets.push(scan),
            Err(error) if parsed.iter().any(|pattern| pattern.is_exact(&tensor.info.name)) => return Err(error),
            Err(MaskError::Checkpoint(CheckpointError::BadTensor { what, .. })) => {
                selection.skipped.push(SkippedTensor { tensor: tensor.info.name.clone(), why: what });
                continue;
            }
            Err(error) => return Err(error),
        }
        let weight = tensor.layout().and_then(|_| checkpoint.codes().of_weight(&tensor.info.name));
        let count = |patterns: &[Pattern], counts: &mut [usize]| {
            for (pattern, n) in patterns.iter().zip(counts) {
                let matches = match weight {
                    Some(weight) => pattern.matches_quantized(map, weight),
                    None => pattern.matches(map, &tensor),
                };
                *n += usize::from(matches);
            }
        };
        count(&parsed, &mut n_selected);
        count(&parsed_transposed, &mut n_transposed);
    }
    let idle = |texts: &[String], counts: &[usize]| -> Vec<String> {
        texts.iter().zip(counts).filter(|(_, n)| **n == 0).map(|(text, _)| text.clone()).collect()
    };
    let mut unmatched = idle(given, &n_selected);
    if patterns.is_empty() && !selection.targets.is_empty() {
        unmatched.clear();
    }
    unmatched.extend(idle(transposed, &n_transposed));
    if unmatched.is_empty() {
        return Ok(selection);
    }
    Err(MaskError::NoMatch { path: checkpoint.root().to_owned(), patterns: unmatched, kinds: kinds(checkpoint) })
}

/// Whether a weight is stored as `[d_in, d_out]`.
fn is_stored_transposed(map: &WeightMap<'_>, tensor: TensorRef<'_>) -> Result<bool, MaskError> {
    // A layout decodes to `[.., d_out, d_in]`.
    if tensor.layout().is_some() {
        return Ok(false);
    }
    match map.axes(tensor) {
        Ok((axes, _)) => Ok(axes == Axes::InOut),
        Err(kind) => {
            let (path, tensor) = (tensor.shard.path().to_owned(), tensor.info.name.clone());
            Err(MaskError::Axes { path, tensor, kind })
        }
    }
}

fn rows_of<'a>(tensor: TensorRef<'a>, transposed: bool, read: Read<'a>) -> Result<RowScan<'a>, MaskError> {
    let layout = read(&tensor, transposed)?;
    Ok(RowScan { tensor, layout })
}

/// One line per kind of tensor in the checkpoint.
fn kinds(checkpoint: &Checkpoint) -> Vec<String> {
    let mut kinds: BTreeMap<(&str, String), u64> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let what = format!("{} {:?}", dtype_name(tensor.info.dtype), tensor.info.shape);
        *kinds.entry((projection_kind(&tensor.info.name), what)).or_default() += 1;
    }
    kinds
        .into_iter()
        .map(|((kind, what), n)| format!("{}: {n} tensor{} of {what}", Printable(kind), if n == 1 { "" } else { "s" }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{Context, Existing, TensorFileWriter},
        tensor::Dtype,
        weights::Answers,
    };

    fn checkpoint(tensors: &[(&str, Dtype, &[u64])]) -> (tempfile::TempDir, Checkpoint) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let mut writer = TensorFileWriter::create(&path, Existing::Keep).unwrap();
        for (name, dtype, shape) in tensors {
            let id = writer.add_tensor((*name).to_owned(), *dtype);
            let n_bytes = shape.iter().product::<u64>() as usize * dtype.bitsize() / 8;
            writer.append(id, &vec![0; n_bytes]).unwrap();
            writer.finish_tensor(id, shape.to_vec());
        }
        writer.finish(&Context::default(), &BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        (folder, checkpoint)
    }

    fn names(selection: &Selection<'_>) -> Vec<String> {
        selection.targets.iter().map(|scan| scan.tensor.info.name.clone()).collect()
    }

    fn select(checkpoint: &Checkpoint, patterns: &[&str]) -> Result<Vec<String>, String> {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let map = WeightMap::new(checkpoint, Answers::default()).unwrap();
        select_targets(&map, &patterns, &[]).map(|selection| names(&selection)).map_err(|e| e.to_string())
    }

    #[test]
    fn patterns_are_names_module_suffixes_globs_and_all_linear() {
        let (_folder, found) = checkpoint(&[
            ("lm_head.weight", Dtype::BF16, &[4, 2]),
            ("model.embed_tokens.weight", Dtype::BF16, &[4, 2]),
            ("model.layers.0.input_layernorm.weight", Dtype::BF16, &[2]),
            ("model.layers.0.mlp.experts.down_proj", Dtype::BF16, &[3, 2, 2]),
            ("model.layers.0.mlp.experts.gate_up_proj", Dtype::BF16, &[3, 4, 2]),
            ("model.layers.0.self_attn.q_proj.bias", Dtype::BF16, &[2]),
            ("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[2, 2]),
            ("model.layers.1.self_attn.xq_proj.weight", Dtype::BF16, &[2, 2]),
        ]);
        let q = "model.layers.0.self_attn.q_proj.weight".to_owned();
        let down = "model.layers.0.mlp.experts.down_proj".to_owned();
        assert_eq!(select(&found, &[]), Ok(vec![down, q.clone()]));
        assert_eq!(select(&found, &["q_proj"]), Ok(vec![q.clone()]));
        assert_eq!(select(&found, &[&q]), Ok(vec![q.clone()]));
        assert_eq!(select(&found, &["self_attn.q_proj", "lm_head"]).unwrap().len(), 2);
        assert_eq!(select(&found, &["model.layers.*.weight"]).unwrap().len(), 2, "the norm is skipped");
        assert_eq!(select(&found, &["all-linear"]).unwrap().len(), 4);
        let error = select(&found, &["q_proj", "v_proj"]).unwrap_err();
        assert!(error.contains("\"v_proj\"") && error.contains("gate_up_proj: 1 tensor of BF16 [3, 4, 2]"), "{error}");
        let error = select(&found, &["model.layers.0.input_layernorm.weight"]).unwrap_err();
        assert!(error.contains("shape [2] is neither a matrix"), "{error}");
        assert!(select(&found, &["a[b"]).unwrap_err().contains("pattern \"a[b\""));
    }

    #[test]
    fn scaled_8_bit_floats_are_decoded_and_unknown_layouts_are_refused() {
        let (_folder, found) = checkpoint(&[
            ("a.q_proj.weight", Dtype::F8_E4M3, &[2, 2]),
            ("a.q_proj.weight_scale_inv", Dtype::F32, &[1, 1]),
        ]);
        assert_eq!(select(&found, &[]), Ok(vec!["a.q_proj.weight".to_owned()]));
        let (_folder, found) = checkpoint(&[
            ("a.q_proj.weight", Dtype::F8_E4M3, &[2, 2]),
            ("a.q_proj.weight_scale_inv", Dtype::F32, &[3, 1]),
        ]);
        let error = select(&found, &[]).unwrap_err();
        assert!(error.contains("stored as FP8 with scales in \"a.q_proj.weight_scale_inv\""), "{error}");
    }
}
