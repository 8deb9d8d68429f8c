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

/// How the name of a stored tensor follows from that of the weight it is a part of.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// The weight's own name, and this behind it.
    Behind(&'static str),
    /// The module's name, where the weight is `M.weight`, and this behind it.
    Beside(&'static str),
}
use Part::{Behind, Beside};

/// All parts that a weight may have; the first [`N_FORMS`] are codes.
const PARTS: [Part; 37] = [
    Behind(""),
    Beside(".weight_packed"),
    Beside(".qweight"),
    Beside(TORCHAO_CODES),
    Behind("_blocks"),
    Behind("_scale"),
    Behind("_scale_inv"),
    Behind("_scale_2"),
    Behind("_scales"),
    Behind("_zero_point"),
    Behind("_shape"),
    Behind("_g_idx"),
    Behind("_global_scale"),
    Behind("_format"),
    Behind(".absmax"),
    Behind(".quant_map"),
    Behind(".nested_absmax"),
    Behind(".nested_quant_map"),
    Behind(".quant_state.bitsandbytes__nf4"),
    Behind(".quant_state.bitsandbytes__fp4"),
    Beside(".SCB"),
    Beside(".weight_format"),
    Beside(".input_scale"),
    Beside(".input_global_scale"),
    Beside(".activation_scale"),
    Beside(".pre_quant_scale"),
    Beside(".scale_weight"),
    Beside(".scale_input"),
    Beside(".qscale_weight"),
    Beside(".qscale_act"),
    Beside(".qzeros"),
    Beside(".scales"),
    Beside(".g_idx"),
    Beside("._weight_scale"),
    Beside("._weight_zero_point"),
    Beside(".comfy_quant"),
    // DeepSeek-V4's; elsewhere a parameter of its own.
    Beside(OWN_SCALE),
];
/// Parts that are codes.
const N_FORMS: usize = 5;
/// The codes of torchao.
const TORCHAO_CODES: &str = "._weight_qdata";
/// What is a scale beside codes only.
const OWN_SCALE: &str = ".scale";
/// Marks a file of ComfyUI, whose 8-bit floats have scales.
const COMFYUI_MARKER: &str = "scaled_fp8";

impl Part {
    /// The stored name of this part of a weight, where it can have one.
    pub(super) fn of(self, weight: &str) -> Option<String> {
        match self {
            Self::Behind(suffix) => Some(format!("{weight}{suffix}")),
            Self::Beside(suffix) => Some(format!("{}{suffix}", weight.strip_suffix(".weight")?)),
        }
    }

    /// The weight that a stored tensor of this name would be this part of.
    fn weight_of(self, tensor: &str) -> Option<Cow<'_, str>> {
        match self {
            Self::Behind(suffix) => tensor.strip_suffix(suffix).map(Cow::Borrowed),
            Self::Beside(suffix) => tensor.strip_suffix(suffix).map(|module| Cow::Owned(format!("{module}.weight"))),
        }
    }
}

/// The weights that a stored tensor of this name may be a part of, with the part's place in [`PARTS`].
fn owners(tensor: &str) -> impl Iterator<Item = (usize, Cow<'_, str>)> {
    PARTS.iter().enumerate().filter_map(|(at, part)| Some((at, part.weight_of(tensor)?)))
}

/// A weight that is stored as codes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CodedWeight {
    /// Its name as the model knows it: `M.weight`, never `M.weight_packed`.
    pub name: String,
    /// How its codes are to be read, for people.
    pub layout: Cow<'static, str>,
    /// One bit for each of [`PARTS`]: whether it is stored. Checkpoints have hundreds of thousands of weights.
    parts: u64,
}

impl CodedWeight {
    /// The stored tensors behind it: codes first, where they are here, then scales and the like, sorted.
    pub fn tensors(&self) -> Vec<String> {
        let (forms, others) = PARTS.split_at(N_FORMS);
        let named = |first: usize, parts: &[Part]| {
            let stored = parts.iter().enumerate().filter(|(at, _)| self.has_part(first + at));
            let mut names: Vec<String> = stored.filter_map(|(_, part)| part.of(&self.name)).collect();
            names.sort_unstable();
            names
        };
        [named(0, forms), named(N_FORMS, others)].concat()
    }

    /// Whether the stored tensor of this name holds its codes.
    pub fn has_codes(&self, tensor: &str) -> bool {
        owners(tensor).any(|(at, name)| at < N_FORMS && name == self.name && self.has_part(at))
    }

    fn has_part(&self, at: usize) -> bool {
        self.parts >> at & 1 == 1
    }

    /// Why it cannot be used, as words for a list of problems.
    pub fn refusal(&self) -> String {
        let layout = &self.layout;
        format!("it is stored as {layout}; codes are not numbers, and nothing can be added to them yet")
    }
}

/// The coded weights of a checkpoint; none of a plain one.
#[derive(Debug, Default)]
pub struct Codes {
    /// By name.
    weights: Vec<CodedWeight>,
    /// The weights in the order of their names read backwards; made when a name is first looked up by its end.
    by_end: OnceLock<Vec<usize>>,
    /// By weight, how it is decoded; resolved when it is first asked for.
    layouts: Vec<OnceLock<Box<CodedLayout>>>,
}

/// Tensor names and types, by which quantized weights are recognised.
struct Names<'a> {
    infos: Vec<&'a TensorInfo>,
    stored: HashMap<&'a str, Dtype>,
    /// Of the whole model, where one shard is opened by itself.
    index: Option<Index>,
    /// `quant_method` of the config, or an empty string where it has a `quantization_config` without one.
    method: Option<String>,
    /// Whether ComfyUI's marker says that 8-bit floats have scales.
    has_marker: bool,
}

impl Codes {
    /// Those of plain tensors.
    pub(super) const fn none() -> Self {
        Self { weights: Vec::new(), by_end: OnceLock::new(), layouts: Vec::new() }
    }

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
        let infos: Vec<&TensorInfo> = shards.iter().flat_map(|shard| shard.header().tensors()).collect();
        // The codes of one shard's scales may lie in another, and the other way round.
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

    /// All of them, by name.
    pub fn weights(&self) -> &[CodedWeight] {
        &self.weights
    }

    /// The weight that a stored tensor, codes or scales, belongs to.
    pub fn of_tensor(&self, tensor: &str) -> Option<&CodedWeight> {
        if self.weights.is_empty() {
            return None;
        }
        owners(tensor).find_map(|(at, name)| self.of_weight(&name).filter(|weight| weight.has_part(at)))
    }

    /// The coded weight of this name.
    pub fn of_weight(&self, name: &str) -> Option<&CodedWeight> {
        let at = self.weights.binary_search_by(|weight| weight.name.as_str().cmp(name)).ok()?;
        Some(&self.weights[at])
    }

    /// How `weight`, one of these, is decoded; `resolve` finds it out the first time.
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
            // Another thread may have been faster; both found the same.
            let _same = slot.set(Box::new(resolve()?));
        }
        Ok(slot.get().expect("it was just set"))
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
    owners(name).any(|(at, _)| at >= N_FORMS)
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
    /// Whether a tensor of this name is stored, here or in another shard of the model.
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
        // Packed forms first: their scales may be 8-bit floats themselves.
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
            for (at, name) in owners(&info.name).filter(|(at, _)| *at >= N_FORMS) {
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
        Codes { weights: found.into_values().collect(), by_end: OnceLock::new(), layouts }
    }

    /// The weight in another file of the model that these scales belong to.
    fn weight_elsewhere<'n>(&self, tensor: &'n str) -> Option<(usize, Cow<'n, str>)> {
        self.index.as_ref()?;
        let is_coded = |(at, name): &(usize, Cow<'_, str>)| {
            let forms = PARTS[..N_FORMS].iter().filter_map(|form| form.of(name));
            // Other names can be those of parameters; a model that says it is quantized has none of these.
            let is_certain = match PARTS[*at] {
                Behind(suffix) => suffix.starts_with('.') || name.ends_with(".weight"),
                Beside(suffix) => suffix != OWN_SCALE,
            };
            *at >= N_FORMS
                && (is_certain || self.method.is_some())
                && forms.into_iter().any(|it| self.is_elsewhere(&it))
        };
        owners(tensor).find(is_coded)
    }

    /// The form, weight and layout of a tensor of packed codes.
    fn packed<'n>(&self, tensor: &'n str, dtype: Dtype) -> Option<(usize, Cow<'n, str>, &'static str)> {
        let method = self.method.as_deref().unwrap_or_default();
        owners(tensor).take_while(|(at, _)| *at < N_FORMS).find_map(|(at, name)| {
            let has = |part: Part| part.of(&name).is_some_and(|part| self.has(&part));
            let layout = match PARTS[at] {
                Beside(TORCHAO_CODES) => "torchao codes",
                _ if is_f8(dtype) => return None,
                Beside(".qweight") => match method {
                    "gptq" => "GPTQ integers",
                    "awq" => "AWQ integers",
                    _ => "GPTQ or AWQ integers",
                },
                Beside(_) => match dtype {
                    Dtype::U8 if has(Behind("_global_scale")) => "NVFP4 (compressed-tensors)",
                    Dtype::U8 => "MXFP4 or MXFP6 (compressed-tensors)",
                    _ => "packed integers (compressed-tensors)",
                },
                Behind("_blocks") if has(Behind("_scales")) => "MXFP4 (gpt-oss)",
                Behind("") if name.ends_with(".weight") => self.packed_weight(dtype, has)?,
                Behind(_) => return None,
            };
            Some((at, name, layout))
        })
    }

    /// The layout of a weight of codes that is stored under its own name.
    fn packed_weight(&self, dtype: Dtype, has: impl Fn(Part) -> bool) -> Option<&'static str> {
        let is_int8 = dtype == Dtype::I8;
        Some(if has(Behind(".absmax")) || has(Behind(".quant_map")) {
            let is_fp4 = has(Behind(".quant_state.bitsandbytes__fp4"));
            if is_fp4 { "bitsandbytes FP4" } else { "bitsandbytes NF4" }
        } else if has(Beside(".SCB")) {
            "bitsandbytes int8"
        } else if has(Behind("_scale_2")) {
            "NVFP4 (ModelOpt)"
        } else if has(Behind("_scale_inv")) && is_int8 {
            "INT8 blocks"
        } else if has(Behind("_scale")) {
            if is_int8 { "INT8 (compressed-tensors)" } else { "packed 4-bit codes (ModelOpt)" }
        } else if has(Beside(OWN_SCALE)) {
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
            Behind("_scale_inv"),
            Behind("_scale"),
            Beside(OWN_SCALE),
            Beside(".scale_weight"),
            Beside(".qscale_weight"),
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
