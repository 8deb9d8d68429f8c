//! Weights that are stored as codes: scaled 8-bit floats, packed integers and 4-bit floats.
//!
//! Codes are not values: a weight is its codes times scales that lie in other tensors. Nobody who needs numbers may take codes, or
//! scales, for them; which tensors are which is told here, from names, types and `config.json` alone. What lies where:
//!
//! | layout | codes | beside them |
//! | --- | --- | --- |
//! | FP8 (DeepSeek, Qwen, ModelOpt, compressed-tensors, ComfyUI, Mistral) | `X` F8 | `X_scale_inv`, `X_scale`, `M.scale`, `M.scale_weight`, `M.qscale_weight` |
//! | packed (compressed-tensors) | `M.weight_packed` | `M.weight_scale`, `M.weight_zero_point`, `M.weight_shape`, ... |
//! | INT8 (compressed-tensors) | `M.weight` I8 | `M.weight_scale` |
//! | NVFP4, INT4 (ModelOpt) | `M.weight` U8 | `M.weight_scale`, `M.weight_scale_2` |
//! | FP4 experts (DeepSeek-V4) | `M.weight` I8 | `M.scale` |
//! | MXFP4 (gpt-oss) | `X_blocks` U8 | `X_scales` |
//! | GPTQ, AWQ | `M.qweight` | `M.qzeros`, `M.scales`, `M.g_idx` |
//! | bitsandbytes | `M.weight` U8, I8 | `M.weight.absmax`, `M.weight.quant_map`, ..., `M.SCB` |
//! | torchao | `M._weight_qdata` | `M._weight_scale`, `M._weight_zero_point` |
//!
//! 8-bit floats without any scale, in a model whose config knows of no quantization, are plain numbers.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    iter,
    path::Path,
    sync::OnceLock,
};

use serde_json::{Map, Value};

use super::{CheckpointError, Index, Layout, Shard, TensorInfo, TensorRef, folder_of, model::read_config, probe};
use crate::tensor::Dtype;

/// What beside a module's weight belongs to its codes; behind the module's name and a dot.
const OF_MODULE: [&str; 23] = [
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "weight_format",
    "input_scale",
    "input_global_scale",
    "activation_scale",
    "pre_quant_scale",
    "scale_weight",
    "scale_input",
    "qscale_weight",
    "qscale_act",
    "qzeros",
    "scales",
    "g_idx",
    "SCB",
    "_weight_scale",
    "_weight_zero_point",
    "comfy_quant",
];
/// The same behind the name of a parameter itself.
const OF_PARAMETER: [&str; 7] =
    ["_scale_inv", "_scale", "_scale_2", "_scales", "_zero_point", "_shape", "_global_scale"];
/// Names that codes are stored under, behind the module's name and a dot.
const CODES_OF_MODULE: [&str; 4] = ["weight", "weight_packed", "qweight", "_weight_qdata"];
/// The same of torchao, for codes of every type.
const TORCHAO_CODES: &str = "._weight_qdata";
/// Marks a file of ComfyUI, whose 8-bit floats have scales.
const COMFYUI_MARKER: &str = "scaled_fp8";
/// What bitsandbytes puts behind a weight's name.
const OF_BITSANDBYTES: [&str; 6] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// A weight that is stored as codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CodedWeight {
    /// Its name as the model knows it: `M.weight`, never `M.weight_packed`.
    pub name: String,
    /// How its codes are to be read, for people.
    pub layout: String,
    /// The stored tensors behind it: codes first, then scales and the like, sorted.
    pub tensors: Vec<String>,
}

impl CodedWeight {
    /// Why it cannot be used, as words for a list of problems.
    pub fn refusal(&self) -> String {
        let layout = &self.layout;
        format!("it is stored as {layout}; codes are not numbers; use the 16-bit checkpoint that it was made from")
    }
}

/// The coded weights of a checkpoint; none of a plain one.
#[derive(Debug, Default)]
pub struct Codes {
    /// By name.
    weights: Vec<CodedWeight>,
    /// Of every stored tensor that is codes, scales or the like: the weight that it belongs to.
    by_tensor: HashMap<String, usize>,
    /// The weights in the order of their names read backwards; made when a name is first looked up by its end.
    by_end: OnceLock<Vec<usize>>,
}

/// The names and types that codes are told by.
struct Names<'a> {
    stored: BTreeMap<&'a str, Dtype>,
    /// Names of other shards of the same model, where one shard is opened by itself.
    elsewhere: HashSet<String>,
    /// `quant_method` of the config, or an empty string where it has a `quantization_config` without one.
    method: Option<String>,
}

impl Codes {
    /// The coded weights among the tensors of `shards`; `config` is `config.json`.
    ///
    /// # Errors
    /// A single shard's index or config that cannot be read.
    pub(super) fn of(
        root: &Path,
        layout: Layout,
        shards: &[Shard],
        config: &Map<String, Value>,
    ) -> Result<Self, CheckpointError> {
        let is_file = layout == Layout::File;
        let infos = || shards.iter().flat_map(|shard| shard.header().tensors());
        // The codes of one shard's scales may lie in another, and the other way round.
        let takes_part = |info: &TensorInfo| may_be_codes(info.dtype) || (is_file && may_be_scales(&info.name));
        if !infos().any(takes_part) {
            return Ok(Self::default());
        }
        let stored = infos().map(|info| (info.name.as_str(), info.dtype)).collect();
        let mut names = Names { stored, elsewhere: HashSet::new(), method: method_of(config) };
        if is_file {
            let folder = folder_of(root);
            names.method = method_of(&read_config(&folder.join("config.json"))?);
            let index = folder.join(super::INDEX_FILE);
            if probe::is_present(&index)? {
                names.elsewhere = Index::open(&index)?.tensors().map(|(name, _)| name.to_owned()).collect();
            }
        }
        Ok(names.codes())
    }

    /// All of them, by name.
    pub fn weights(&self) -> &[CodedWeight] {
        &self.weights
    }

    /// The weight that a stored tensor, codes or scales, belongs to.
    pub fn of_tensor(&self, tensor: &str) -> Option<&CodedWeight> {
        self.by_tensor.get(tensor).map(|&at| &self.weights[at])
    }

    /// The coded weight of this name.
    pub fn of_weight(&self, name: &str) -> Option<&CodedWeight> {
        let at = self.weights.binary_search_by(|weight| weight.name.as_str().cmp(name)).ok()?;
        Some(&self.weights[at])
    }

    /// The coded weight whose name ends with `name`, or the other way round: adapters and checkpoints begin names differently.
    pub fn find_by_end(&self, name: &str) -> Option<&CodedWeight> {
        let mut ends = iter::successors(Some(name), |name| Some(name.split_once('.')?.1));
        ends.find_map(|end| self.of_weight(end)).or_else(|| self.find_longer(&format!(".{name}")))
    }

    /// The coded weight that an adapter's `name` stands for: that of the tensor `found` for it, or where none was, by its end.
    pub fn find_for(&self, name: &str, found: Option<TensorRef<'_>>) -> Option<&CodedWeight> {
        match found {
            Some(tensor) => self.of_tensor(&tensor.info.name),
            None => self.find_by_end(name),
        }
    }

    /// The first weight whose name ends with `end`.
    fn find_longer(&self, end: &str) -> Option<&CodedWeight> {
        let backwards = |at: &usize| self.weights[*at].name.bytes().rev();
        let by_end = self.by_end.get_or_init(|| {
            let mut order: Vec<usize> = (0..self.weights.len()).collect();
            order.sort_by(|a, b| backwards(a).cmp(backwards(b)));
            order
        });
        let first = by_end.partition_point(|at| backwards(at).lt(end.bytes().rev()));
        by_end.get(first).map(|&at| &self.weights[at]).filter(|weight| weight.name.ends_with(end))
    }

    /// The coded weight that a name stands for, be it the weight's or a stored tensor's.
    pub fn find(&self, name: &str) -> Option<&CodedWeight> {
        self.of_weight(name).or_else(|| self.of_tensor(name))
    }
}

/// Whether tensors of this type can be codes.
fn may_be_codes(dtype: Dtype) -> bool {
    !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::BOOL | Dtype::C64)
}

fn is_f8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ)
}

/// Whether a tensor of this name can be the scales, or the like, of codes in another file.
fn may_be_scales(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let of_module = OF_MODULE.contains(&last) || last == "scale";
    of_module || OF_PARAMETER.iter().chain(&OF_BITSANDBYTES).any(|suffix| name.ends_with(suffix))
}

fn is_comfyui_marker(name: &str) -> bool {
    name.rsplit('.').next() == Some(COMFYUI_MARKER)
}

/// `quant_method` of a config; of multimodal models it may be that of the text model.
fn method_of(config: &Map<String, Value>) -> Option<String> {
    let of_text = config.get("text_config").and_then(|text| text.get("quantization_config"));
    let quantization = [config.get("quantization_config"), of_text].into_iter().flatten().find(|it| !it.is_null())?;
    let method = quantization.get("quant_method");
    Some(method.and_then(Value::as_str).unwrap_or_default().to_owned())
}

impl Names<'_> {
    fn has(&self, name: &str) -> bool {
        self.stored.contains_key(name) || self.elsewhere.contains(name)
    }

    fn codes(&self) -> Codes {
        let mut found: BTreeMap<String, CodedWeight> = BTreeMap::new();
        let mut taken: HashSet<String> = HashSet::new();
        // Packed forms first: their scales may be 8-bit floats themselves.
        let may_be_packed =
            |tensor: &str, dtype| may_be_codes(dtype) && (!is_f8(dtype) || tensor.ends_with(TORCHAO_CODES));
        for (&tensor, &dtype) in self.stored.iter().filter(|(tensor, dtype)| may_be_packed(tensor, **dtype)) {
            if let Some((name, layout)) = self.packed(tensor, dtype) {
                self.add(&mut found, &mut taken, tensor, name, layout);
            }
        }
        for (&tensor, _) in self.stored.iter().filter(|(_, dtype)| is_f8(**dtype)) {
            if !is_comfyui_marker(tensor)
                && !taken.contains(tensor)
                && let Some(layout) = self.scaled_f8(tensor)
            {
                self.add(&mut found, &mut taken, tensor, tensor.to_owned(), layout);
            }
        }
        if !self.elsewhere.is_empty() {
            self.add_lone_scales(&mut found, &taken);
        }
        let weights: Vec<CodedWeight> = found.into_values().collect();
        let tensors = |(at, weight): (usize, &CodedWeight)| {
            weight.tensors.iter().map(move |tensor| (tensor.clone(), at)).collect::<Vec<_>>()
        };
        let by_tensor = weights.iter().enumerate().flat_map(tensors).collect();
        Codes { weights, by_tensor, by_end: OnceLock::new() }
    }

    /// Adds the weights whose scales are here, and whose codes lie in another file of the model.
    fn add_lone_scales(&self, found: &mut BTreeMap<String, CodedWeight>, taken: &HashSet<String>) {
        let lone = self.stored.keys().filter(|tensor| !taken.contains(**tensor));
        for (tensor, name) in lone.filter_map(|tensor| Some((tensor, self.weight_elsewhere(tensor)?))) {
            let layout = "codes in another file of the model".to_owned();
            let new = || CodedWeight { name: name.clone(), layout, tensors: Vec::new() };
            found.entry(name.clone()).or_insert_with(new).tensors.push((*tensor).to_owned());
        }
    }

    /// The weight in another file that these scales belong to.
    fn weight_elsewhere(&self, tensor: &str) -> Option<String> {
        let is_elsewhere = |name: &str| self.elsewhere.contains(name) && !self.stored.contains_key(name);
        // A scale by its name alone may be a parameter; a model that says it is quantized has none of these.
        let is_quantized = self.method.is_some();
        if let Some((module, last)) = tensor.rsplit_once('.')
            && (OF_MODULE.contains(&last) || (last == "scale" && is_quantized))
            && CODES_OF_MODULE.iter().any(|codes| is_elsewhere(&format!("{module}.{codes}")))
        {
            return Some(format!("{module}.weight"));
        }
        if let Some(weight) = OF_BITSANDBYTES.iter().find_map(|suffix| tensor.strip_suffix(suffix)) {
            return is_elsewhere(weight).then(|| weight.to_owned());
        }
        let parameter = OF_PARAMETER.iter().find_map(|suffix| tensor.strip_suffix(suffix))?;
        let is_coded = is_elsewhere(parameter) || is_elsewhere(&format!("{parameter}_blocks"));
        (is_quantized && is_coded).then(|| parameter.to_owned())
    }

    fn add(
        &self,
        found: &mut BTreeMap<String, CodedWeight>,
        taken: &mut HashSet<String>,
        codes: &str,
        name: String,
        layout: String,
    ) {
        let module = name.strip_suffix(".weight");
        let beside = OF_MODULE.iter().filter_map(|suffix| Some(format!("{}.{suffix}", module?)));
        let behind = OF_PARAMETER.iter().chain(&OF_BITSANDBYTES).map(|suffix| format!("{name}{suffix}"));
        // DeepSeek-V4's; elsewhere `M.scale` is a parameter of its own.
        let own_scale = module.map(|module| format!("{module}.scale"));
        let mut parts: Vec<String> =
            beside.chain(behind).chain(own_scale).filter(|part| self.stored.contains_key(part.as_str())).collect();
        parts.sort_unstable();
        parts.dedup();
        let mut tensors = vec![codes.to_owned()];
        tensors.extend(parts);
        taken.extend(tensors.iter().cloned());
        found.insert(name.clone(), CodedWeight { name, layout, tensors });
    }

    /// The weight and layout of a tensor of packed codes.
    fn packed(&self, tensor: &str, dtype: Dtype) -> Option<(String, String)> {
        let method = self.method.as_deref().unwrap_or_default();
        if let Some(module) = tensor.strip_suffix(".qweight") {
            let layout = match method {
                "gptq" => "GPTQ integers",
                "awq" => "AWQ integers",
                _ => "GPTQ or AWQ integers",
            };
            return Some((format!("{module}.weight"), layout.to_owned()));
        }
        if let Some(module) = tensor.strip_suffix(".weight_packed") {
            let has = |suffix: &str| self.has(&format!("{module}.{suffix}"));
            let layout = match dtype {
                Dtype::U8 if has("weight_global_scale") => "NVFP4 (compressed-tensors)",
                Dtype::U8 => "MXFP4 or MXFP6 (compressed-tensors)",
                _ => "packed integers (compressed-tensors)",
            };
            return Some((format!("{module}.weight"), layout.to_owned()));
        }
        if let Some(module) = tensor.strip_suffix(TORCHAO_CODES) {
            return Some((format!("{module}.weight"), "torchao codes".to_owned()));
        }
        if let Some(parameter) = tensor.strip_suffix("_blocks")
            && self.has(&format!("{parameter}_scales"))
        {
            return Some((parameter.to_owned(), "MXFP4 (gpt-oss)".to_owned()));
        }
        let module = tensor.strip_suffix(".weight")?;
        let beside = |suffix: &str| self.has(&format!("{module}.{suffix}"));
        let behind = |suffix: &str| self.has(&format!("{tensor}{suffix}"));
        let layout = if behind(".absmax") || behind(".quant_map") {
            if behind(".quant_state.bitsandbytes__fp4") { "bitsandbytes FP4" } else { "bitsandbytes NF4" }
        } else if beside("SCB") {
            "bitsandbytes int8"
        } else if beside("weight_scale_2") {
            "NVFP4 (ModelOpt)"
        } else if beside("weight_scale_inv") && dtype == Dtype::I8 {
            "INT8 blocks"
        } else if beside("weight_scale") && dtype == Dtype::I8 {
            "INT8 (compressed-tensors)"
        } else if beside("weight_scale") {
            "packed 4-bit codes (ModelOpt)"
        } else if beside("scale") {
            "packed FP4 (DeepSeek-V4)"
        } else if self.method.is_some() {
            "packed codes"
        } else {
            return None;
        };
        Some((tensor.to_owned(), layout.to_owned()))
    }

    /// The layout of 8-bit floats that have scales somewhere.
    fn scaled_f8(&self, tensor: &str) -> Option<String> {
        let behind = ["_scale_inv", "_scale"].map(|suffix| format!("{tensor}{suffix}"));
        let module = tensor.strip_suffix(".weight");
        let beside = ["scale", "scale_weight", "qscale_weight"]
            .iter()
            .filter_map(|suffix| Some(format!("{}.{suffix}", module?)));
        if let Some(scale) = behind.into_iter().chain(beside).find(|scale| self.has(scale)) {
            return Some(format!("FP8 with scales in \"{scale}\""));
        }
        // ComfyUI marks files whose weights have scales.
        if self.stored.keys().any(|name| is_comfyui_marker(name)) {
            return Some(format!("FP8 (a \"{COMFYUI_MARKER}\" file)"));
        }
        self.method.as_ref().map(|_| "FP8 (config.json has a quantization_config)".to_owned())
    }
}
