//! Quantized weights: scaled 8-bit floats, packed integers and 4-bit floats.
//!
//! Codes are not values: a weight is its codes times scales, and the scales are stored in other tensors. Code that
//! needs numbers must never read codes or scales as values. This file classifies tensors by names, dtypes and
//! `config.json` alone. The layouts:
//!
//! | layout | codes | scales and other parts |
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
//! 8-bit floats without any scale are plain numbers if the config declares no quantization.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    iter,
    path::Path,
    sync::OnceLock,
};

use serde_json::{Map, Value};

use super::{
    CheckpointError, CodedLayout, Index, Layout, Shard, TensorInfo, TensorRef, folder_of, index::index_names,
    model::config_beside,
};
use crate::tensor::Dtype;

/// How the name of a stored tensor is derived from the name of its weight.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// A suffix appended to the weight's name.
    WeightSuffix(&'static str),
    /// A suffix appended to the module's name, for weights called `M.weight`.
    ModuleSuffix(&'static str),
}
use Part::{ModuleSuffix, WeightSuffix};

/// All parts that a weight may have; the first [`N_CODE_PARTS`] are codes.
const PARTS: [Part; 37] = [
    WeightSuffix(""),
    ModuleSuffix(".weight_packed"),
    ModuleSuffix(".qweight"),
    ModuleSuffix(TORCHAO_CODES),
    WeightSuffix("_blocks"),
    WeightSuffix("_scale"),
    WeightSuffix("_scale_inv"),
    WeightSuffix("_scale_2"),
    WeightSuffix("_scales"),
    WeightSuffix("_zero_point"),
    WeightSuffix("_shape"),
    WeightSuffix("_g_idx"),
    WeightSuffix("_global_scale"),
    WeightSuffix("_format"),
    WeightSuffix(".absmax"),
    WeightSuffix(".quant_map"),
    WeightSuffix(".nested_absmax"),
    WeightSuffix(".nested_quant_map"),
    WeightSuffix(".quant_state.bitsandbytes__nf4"),
    WeightSuffix(".quant_state.bitsandbytes__fp4"),
    ModuleSuffix(".SCB"),
    ModuleSuffix(".weight_format"),
    ModuleSuffix(".input_scale"),
    ModuleSuffix(".input_global_scale"),
    ModuleSuffix(".activation_scale"),
    ModuleSuffix(".pre_quant_scale"),
    ModuleSuffix(".scale_weight"),
    ModuleSuffix(".scale_input"),
    ModuleSuffix(".qscale_weight"),
    ModuleSuffix(".qscale_act"),
    ModuleSuffix(".qzeros"),
    ModuleSuffix(".scales"),
    ModuleSuffix(".g_idx"),
    ModuleSuffix("._weight_scale"),
    ModuleSuffix("._weight_zero_point"),
    ModuleSuffix(".comfy_quant"),
    // Used by DeepSeek-V4; in other models this is an ordinary parameter.
    ModuleSuffix(OWN_SCALE),
];
/// The number of parts that are codes.
const N_CODE_PARTS: usize = 5;
/// The codes of torchao.
const TORCHAO_CODES: &str = "._weight_qdata";
/// A suffix that marks scales only if there are codes next to it.
const OWN_SCALE: &str = ".scale";
/// Marks a ComfyUI file, whose 8-bit floats have scales.
const COMFYUI_MARKER: &str = "scaled_fp8";

impl Part {
    /// The stored name of this part of `weight`, if it can have one.
    pub(super) fn of(self, weight: &str) -> Option<String> {
        match self {
            Self::WeightSuffix(suffix) => Some(format!("{weight}{suffix}")),
            Self::ModuleSuffix(suffix) => Some(format!("{}{suffix}", weight.strip_suffix(".weight")?)),
        }
    }

    /// The weight whose part a tensor of this name would be.
    fn weight_of(self, tensor: &str) -> Option<Cow<'_, str>> {
        match self {
            Self::WeightSuffix(suffix) => tensor.strip_suffix(suffix).map(Cow::Borrowed),
            Self::ModuleSuffix(suffix) => {
                tensor.strip_suffix(suffix).map(|module| Cow::Owned(format!("{module}.weight")))
            }
        }
    }
}

/// The weights that a tensor of this name may be a part of, with the part's index in [`PARTS`].
fn owners(tensor: &str) -> impl Iterator<Item = (usize, Cow<'_, str>)> {
    PARTS.iter().enumerate().filter_map(|(at, part)| Some((at, part.weight_of(tensor)?)))
}

/// A weight that is stored as codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CodedWeight {
    /// Its name in the model: `M.weight`, never `M.weight_packed`.
    pub name: String,
    /// The layout of its codes, as a human-readable name.
    pub layout: Cow<'static, str>,
    /// One bit for each of [`PARTS`]: whether it is stored. Compact because checkpoints have hundreds of thousands of
    /// weights.
    parts: u64,
}

impl CodedWeight {
    /// The stored tensors of the weight: codes first, if they are in this file, then scales and other parts, sorted.
    pub fn tensors(&self) -> Vec<String> {
        let (forms, others) = PARTS.split_at(N_CODE_PARTS);
        let named = |first: usize, parts: &[Part]| {
            let stored = parts.iter().enumerate().filter(|(at, _)| self.has_part(first + at));
            let mut names: Vec<String> = stored.filter_map(|(_, part)| part.of(&self.name)).collect();
            names.sort_unstable();
            names
        };
        [named(0, forms), named(N_CODE_PARTS, others)].concat()
    }

    /// Whether the stored tensor of this name holds its codes.
    pub fn has_codes(&self, tensor: &str) -> bool {
        owners(tensor).any(|(at, name)| at < N_CODE_PARTS && name == self.name && self.has_part(at))
    }

    fn has_part(&self, at: usize) -> bool {
        self.parts >> at & 1 == 1
    }

    /// Why it cannot be used, as text for a list of problems.
    pub fn refusal(&self) -> String {
        let layout = &self.layout;
        format!("it is stored as {layout}; codes are not numbers, and nothing can be added to them yet")
    }
}

/// The quantized weights of a checkpoint; empty for a plain one.
#[derive(Debug, Default)]
pub struct Codes {
    /// Sorted by name.
    weights: Vec<CodedWeight>,
    /// Indices of the weights, sorted by reversed name; built at the first lookup by suffix.
    by_suffix: OnceLock<Vec<usize>>,
    /// The layout of each weight; resolved on first use.
    layouts: Vec<OnceLock<Box<CodedLayout>>>,
}

/// The tensor names and dtypes from which quantized weights are recognized.
struct Names<'a> {
    infos: Vec<&'a TensorInfo>,
    stored: HashMap<&'a str, Dtype>,
    /// The index of the whole model, if one shard was opened by itself.
    index: Option<Index>,
    /// `quant_method` of the config; empty if there is a `quantization_config` without one.
    method: Option<String>,
    /// Whether ComfyUI's marker is present: 8-bit floats then have scales.
    has_marker: bool,
}

impl Codes {
    /// The codes of a plain file: none.
    pub(super) const fn none() -> Self {
        Self { weights: Vec::new(), by_suffix: OnceLock::new(), layouts: Vec::new() }
    }

    /// The quantized weights among the tensors of `shards`; `config` is `config.json`.
    ///
    /// # Errors
    /// The index or config next to a single shard cannot be read.
    pub(super) fn of(
        root: &Path,
        layout: Layout,
        shards: &[Shard],
        config: &Map<String, Value>,
    ) -> Result<Self, CheckpointError> {
        let is_file = layout == Layout::File;
        let infos: Vec<&TensorInfo> = shards.iter().flat_map(|shard| shard.header().tensors()).collect();
        // Codes and scales may be in different shards.
        let takes_part = |info: &&TensorInfo| may_be_codes(info.dtype) || (is_file && may_be_scales(&info.name));
        if !infos.iter().any(takes_part) {
            return Ok(Self::default());
        }
        let (mut method, mut index) = (method_of(config), None);
        if is_file {
            method = method_of(&config_beside(root)?);
            if let [name] = &index_names(folder_of(root))?[..] {
                index = Some(Index::open(&folder_of(root).join(name))?);
            }
        }
        let has_marker = infos.iter().any(|info| is_comfyui_marker(&info.name));
        let stored = infos.iter().map(|info| (info.name.as_str(), info.dtype)).collect();
        Ok(Names { infos, stored, index, method, has_marker }.codes())
    }

    /// All of them, sorted by name.
    pub fn weights(&self) -> &[CodedWeight] {
        &self.weights
    }

    /// The weight that a stored tensor belongs to, be it codes or scales.
    pub fn of_tensor(&self, tensor: &str) -> Option<&CodedWeight> {
        if self.weights.is_empty() {
            return None;
        }
        owners(tensor).find_map(|(at, name)| self.of_weight(&name).filter(|weight| weight.has_part(at)))
    }

    /// The quantized weight of this name.
    pub fn of_weight(&self, name: &str) -> Option<&CodedWeight> {
        let at = self.weights.binary_search_by(|weight| weight.name.as_str().cmp(name)).ok()?;
        Some(&self.weights[at])
    }

    /// The layout of `weight`, one of these; `resolve` determines it on first use.
    ///
    /// # Errors
    /// Those of `resolve`.
    pub(super) fn layout_or(
        &self,
        weight: &CodedWeight,
        resolve: impl FnOnce() -> Result<CodedLayout, CheckpointError>,
    ) -> Result<&CodedLayout, CheckpointError> {
        let at =
            self.weights.binary_search_by(|other| other.name.cmp(&weight.name)).expect("a weight of this checkpoint");
        let slot = &self.layouts[at];
        if slot.get().is_none() {
            // Another thread may have been faster, with the same result.
            let _same = slot.set(Box::new(resolve()?));
        }
        Ok(slot.get().expect("it was just set"))
    }

    /// The quantized weight whose name ends with `name`, or is a suffix of it: adapters and checkpoints use different
    /// name prefixes.
    pub fn find_by_suffix(&self, name: &str) -> Option<&CodedWeight> {
        let mut ends = iter::successors(Some(name), |name| Some(name.split_once('.')?.1));
        ends.find_map(|end| self.of_weight(end)).or_else(|| self.find_longer(&format!(".{name}")))
    }

    /// The quantized weight that an adapter's `name` refers to: that of the tensor `found` for it, or else the match
    /// by suffix.
    pub fn find_for(&self, name: &str, found: Option<TensorRef<'_>>) -> Option<&CodedWeight> {
        match found {
            Some(tensor) => self.of_tensor(&tensor.info.name),
            None => self.find_by_suffix(name),
        }
    }

    /// The first weight whose name ends with `end`.
    fn find_longer(&self, end: &str) -> Option<&CodedWeight> {
        let backwards = |at: &usize| self.weights[*at].name.bytes().rev();
        let by_suffix = self.by_suffix.get_or_init(|| {
            let mut order: Vec<usize> = (0..self.weights.len()).collect();
            order.sort_by(|a, b| backwards(a).cmp(backwards(b)));
            order
        });
        let first = by_suffix.partition_point(|at| backwards(at).lt(end.bytes().rev()));
        by_suffix.get(first).map(|&at| &self.weights[at]).filter(|weight| weight.name.ends_with(end))
    }

    /// The quantized weight of this name, which may be the weight's own or that of one of its stored tensors.
    pub fn find(&self, name: &str) -> Option<&CodedWeight> {
        self.of_weight(name).or_else(|| self.of_tensor(name))
    }
}

/// Whether tensors of this dtype can be codes.
fn may_be_codes(dtype: Dtype) -> bool {
    !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::BOOL | Dtype::C64)
}

fn is_f8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ)
}

/// Whether a tensor of this name can be scales, or another part, of codes in another file.
fn may_be_scales(name: &str) -> bool {
    owners(name).any(|(at, _)| at >= N_CODE_PARTS)
}

fn is_comfyui_marker(name: &str) -> bool {
    name.rsplit('.').next() == Some(COMFYUI_MARKER)
}

/// `quant_method` of a config; multimodal models may have it in the text model's config.
fn method_of(config: &Map<String, Value>) -> Option<String> {
    let of_text = config.get("text_config").and_then(|text| text.get("quantization_config"));
    let quantization = [config.get("quantization_config"), of_text].into_iter().flatten().find(|it| !it.is_null())?;
    let method = quantization.get("quant_method");
    Some(method.and_then(Value::as_str).unwrap_or_default().to_owned())
}

type Found = BTreeMap<String, CodedWeight>;

fn add_part(found: &mut Found, name: Cow<'_, str>, layout: Cow<'static, str>, at: usize) {
    match found.get_mut(&*name) {
        Some(weight) => weight.parts |= 1 << at,
        None => {
            let name = name.into_owned();
            found.insert(name.clone(), CodedWeight { name, layout, parts: 1 << at });
        }
    }
}

impl Names<'_> {
    /// Whether a tensor of this name is stored in this shard or another shard of the model.
    fn has(&self, name: &str) -> bool {
        self.stored.contains_key(name) || self.index.as_ref().is_some_and(|index| index.contains(name))
    }

    /// Whether a tensor of this name is stored in another shard of the model.
    fn is_elsewhere(&self, name: &str) -> bool {
        !self.stored.contains_key(name) && self.has(name)
    }

    fn codes(&self) -> Codes {
        let mut found = Found::new();
        let infos = || self.infos.iter().filter(|info| may_be_codes(info.dtype));
        // Packed codes first: their scales may be 8-bit floats themselves.
        for info in infos() {
            if let Some((at, name, layout)) = self.packed(&info.name, info.dtype) {
                add_part(&mut found, name, Cow::Borrowed(layout), at);
            }
        }
        let is_part = |found: &Found, name: &str| owners(name).any(|(_, weight)| found.contains_key(&*weight));
        for info in infos().filter(|info| is_f8(info.dtype) && !is_comfyui_marker(&info.name)) {
            if !is_part(&found, &info.name)
                && let Some(layout) = self.scaled_f8(&info.name)
            {
                add_part(&mut found, Cow::Borrowed(&info.name), layout, 0);
            }
        }
        for info in self.infos.iter().filter(|info| may_be_scales(&info.name)) {
            let mut is_lone = true;
            for (at, name) in owners(&info.name).filter(|(at, _)| *at >= N_CODE_PARTS) {
                if let Some(weight) = found.get_mut(&*name) {
                    weight.parts |= 1 << at;
                    is_lone = false;
                }
            }
            if is_lone && let Some((at, name)) = self.weight_elsewhere(&info.name) {
                add_part(&mut found, name, Cow::Borrowed("codes in another file of the model"), at);
            }
        }
        let layouts = found.iter().map(|_| OnceLock::new()).collect();
        Codes { weights: found.into_values().collect(), by_suffix: OnceLock::new(), layouts }
    }

    /// The weight in another file of the model that these scales belong to.
    fn weight_elsewhere<'n>(&self, tensor: &'n str) -> Option<(usize, Cow<'n, str>)> {
        self.index.as_ref()?;
        let is_coded = |(at, name): &(usize, Cow<'_, str>)| {
            let forms = PARTS[..N_CODE_PARTS].iter().filter_map(|form| form.of(name));
            // Other names may be ordinary parameters; a model that declares quantization has no such parameters.
            let is_certain = match PARTS[*at] {
                WeightSuffix(suffix) => suffix.starts_with('.') || name.ends_with(".weight"),
                ModuleSuffix(suffix) => suffix != OWN_SCALE,
            };
            *at >= N_CODE_PARTS
                && (is_certain || self.method.is_some())
                && forms.into_iter().any(|it| self.is_elsewhere(&it))
        };
        owners(tensor).find(is_coded)
    }

    /// The part, weight and layout of a tensor of packed codes.
    fn packed<'n>(&self, tensor: &'n str, dtype: Dtype) -> Option<(usize, Cow<'n, str>, &'static str)> {
        let method = self.method.as_deref().unwrap_or_default();
        owners(tensor).take_while(|(at, _)| *at < N_CODE_PARTS).find_map(|(at, name)| {
            let has = |part: Part| part.of(&name).is_some_and(|part| self.has(&part));
            let layout = match PARTS[at] {
                ModuleSuffix(TORCHAO_CODES) => "torchao codes",
                _ if is_f8(dtype) => return None,
                ModuleSuffix(".qweight") => match method {
                    "gptq" => "GPTQ integers",
                    "awq" => "AWQ integers",
                    _ => "GPTQ or AWQ integers",
                },
                ModuleSuffix(_) => match dtype {
                    Dtype::U8 if has(WeightSuffix("_global_scale")) => "NVFP4 (compressed-tensors)",
                    Dtype::U8 => "MXFP4 or MXFP6 (compressed-tensors)",
                    _ => "packed integers (compressed-tensors)",
                },
                WeightSuffix("_blocks") if has(WeightSuffix("_scales")) => "MXFP4 (gpt-oss)",
                WeightSuffix("") if name.ends_with(".weight") => self.packed_weight(dtype, has)?,
                WeightSuffix(_) => return None,
            };
            Some((at, name, layout))
        })
    }

    /// The layout of codes that are stored under the weight's own name.
    fn packed_weight(&self, dtype: Dtype, has: impl Fn(Part) -> bool) -> Option<&'static str> {
        let is_int8 = dtype == Dtype::I8;
        Some(if has(WeightSuffix(".absmax")) || has(WeightSuffix(".quant_map")) {
            let is_fp4 = has(WeightSuffix(".quant_state.bitsandbytes__fp4"));
            if is_fp4 { "bitsandbytes FP4" } else { "bitsandbytes NF4" }
        } else if has(ModuleSuffix(".SCB")) {
            "bitsandbytes int8"
        } else if has(WeightSuffix("_scale_2")) {
            "NVFP4 (ModelOpt)"
        } else if has(WeightSuffix("_scale_inv")) && is_int8 {
            "INT8 blocks"
        } else if has(WeightSuffix("_scale")) {
            if is_int8 { "INT8 (compressed-tensors)" } else { "packed 4-bit codes (ModelOpt)" }
        } else if has(ModuleSuffix(OWN_SCALE)) {
            "packed FP4 (DeepSeek-V4)"
        } else if self.method.is_some() {
            "packed codes"
        } else {
            return None;
        })
    }

    /// The layout of 8-bit floats that have scales somewhere.
    fn scaled_f8(&self, tensor: &str) -> Option<Cow<'static, str>> {
        let scales = [
            WeightSuffix("_scale_inv"),
            WeightSuffix("_scale"),
            ModuleSuffix(OWN_SCALE),
            ModuleSuffix(".scale_weight"),
            ModuleSuffix(".qscale_weight"),
        ];
        if let Some(scale) = scales.iter().filter_map(|scale| scale.of(tensor)).find(|scale| self.has(scale)) {
            return Some(format!("FP8 with scales in \"{scale}\"").into());
        }
        if self.has_marker {
            return Some(format!("FP8 (a \"{COMFYUI_MARKER}\" file)").into());
        }
        self.method.as_ref().map(|_| "FP8 (config.json has a quantization_config)".into())
    }
}
