//! A LoRA adapter: which low-rank product goes to which module.

use std::{collections::BTreeMap, path::Path};

use super::{LoraConfig, PEFT_CONFIG, PEFT_TENSORS, PeftError, PeftFolder, PeftName, ReplacedRows, base_name};
use crate::{
    checkpoint::{CheckpointError, Context, OwnFolder, Printable, Shard, TensorFileWriter, TensorInfo, copy_own},
    tensor::{Dtype, dtype_name, projection_kind},
};

/// The part of names that marks LoRA's tensors.
const PART_PREFIX: &str = "lora_";
/// How two parameters of one module are nested, innermost first: in the order in which the models declare them.
const NESTING: [&str; 2] = ["gate_up_proj", "down_proj"];

/// How the factors of a module are laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoraShape {
    /// `A` is `[r, d_in]`, `B` is `[d_out, r]`; of convolutions `d_in` counts the kernel too.
    Linear {
        /// Rows of `B`.
        d_out: u64,
        /// Row length of `A`.
        d_in: u64,
    },
    /// `A` is `[r, vocabulary]`, `B` is `[d_out, r]`; the weight is `[vocabulary, d_out]`.
    Embedding {
        /// Rows of the weight.
        vocabulary: u64,
        /// Row length of the weight.
        d_out: u64,
    },
    /// A stack of experts, targeted as a parameter: `A` is `[E * r, d_in]`, `B` is `[d_out, r * E]`.
    Experts {
        /// `E`.
        n_experts: u64,
        /// Rows of `B`.
        d_out: u64,
        /// Row length of `A`.
        d_in: u64,
    },
}

/// A module that gets a low-rank product.
#[derive(Clone, PartialEq, Debug)]
pub struct LoraModule {
    /// The module as the model names it.
    pub module: String,
    /// Its parameter: `weight`, unless targeted by its own name.
    pub parameter: String,
    /// How the factors are laid out.
    pub shape: LoraShape,
    /// The rank.
    pub rank: u64,
    /// What the product is multiplied by.
    pub scaling: f64,
    /// The adapter's tensors, by their names in the file.
    pub a: String,
    /// The second factor.
    pub b: String,
    /// The second factor's bias, `[d_out]`.
    pub bias: Option<String>,
    /// Magnitudes (DoRA), `[d_out]`.
    pub magnitude: Option<String>,
}

impl LoraModule {
    /// `MODULE.PARAMETER`.
    pub fn target(&self) -> String {
        format!("{}.{}", self.module, self.parameter)
    }
}

/// A tensor that an adapter holds in full. Of one that it holds twice both are here.
#[derive(Clone, PartialEq, Debug)]
pub struct FullTensor {
    /// The parameter as the model names it.
    pub name: String,
    /// Its name in the file.
    pub tensor: String,
}

/// An open LoRA adapter: header in memory, factors on disk.
#[derive(Debug)]
pub struct LoraAdapter {
    folder: PeftFolder,
    config: LoraConfig,
    modules: Vec<LoraModule>,
    full: Vec<FullTensor>,
    rows: Vec<ReplacedRows>,
}

impl LoraAdapter {
    /// Opens the adapter at `path`, in any form that [`PeftFolder`] knows: every tensor has a role, every shape fits the config. Reads the
    /// headers only.
    ///
    /// # Errors
    /// Files that are not what they should be, with a list of all that does not fit; variants that are not implemented.
    pub fn open(ctx: &Context<'_>, path: &Path) -> Result<Self, PeftError> {
        let folder = PeftFolder::open(ctx, path)?;
        let config = LoraConfig::of(folder.config())?;
        let mut found = Found::default();
        for (_, info) in folder.tensors() {
            found.add(&config, info);
        }
        let modules = found.modules(&config);
        if !found.problems.is_empty() {
            let what = format!("{} of its tensors are not what a LoRA adapter has", found.problems.len());
            let path = folder.tensors_path().to_owned();
            return Err(CheckpointError::Many { path, what, problems: found.problems }.into());
        }
        let (path, has_rows) = (folder.tensors_path(), !found.rows.is_empty());
        if !config.token_indices.is_empty() && !has_rows {
            let what = "the config names rows that were trained (trainable tokens), and the file has none";
            return Err(CheckpointError::bad_file(path, what).into());
        }
        if modules.is_empty() && found.full.is_empty() && !has_rows {
            return Err(CheckpointError::bad_file(path, "has no tensors: nothing to merge").into());
        }
        let of_name = |(name, tensors): (String, Vec<String>)| {
            tensors.into_iter().map(move |tensor| FullTensor { name: name.clone(), tensor })
        };
        let full = found.full.into_iter().flat_map(of_name).collect();
        found.rows.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { folder, config, modules, full, rows: found.rows })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
    /// What the config says.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }
    /// Modules with low-rank products, by module and parameter.
    pub fn modules(&self) -> &[LoraModule] {
        &self.modules
    }
    /// Tensors it holds in full, by name.
    pub fn full(&self) -> &[FullTensor] {
        &self.full
    }

    /// Rows that replace those of the base, by name of the weight.
    pub fn rows(&self) -> &[ReplacedRows] {
        &self.rows
    }

    /// The tensor of this name, and the file that holds it.
    ///
    /// # Panics
    /// Where the adapter has none.
    pub fn tensor(&self, name: &str) -> (&Shard, &TensorInfo) {
        self.folder.tensor(name).expect("names come from the headers")
    }

    /// Parameters in all.
    pub fn n_parameters(&self) -> u64 {
        self.folder.tensors().map(|(_, info)| info.n_elements()).fold(0, u64::saturating_add)
    }
    /// Bytes that a copy takes, the config not counted.
    pub fn n_bytes(&self) -> u64 {
        self.folder.n_bytes()
    }

    /// Fails where a file changed since it was opened.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`].
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        self.folder.unchanged()
    }

    /// Writes all that a merge depends on into `own`: `adapter_config.json`, and one `adapter_model.safetensors` whatever the form that was
    /// opened. Opened again, the copy has the same id. An adapter that has this form already is copied byte for byte.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn write_copy(&self, ctx: &Context<'_>, own: &OwnFolder) -> Result<(), CheckpointError> {
        copy_own(self.folder.config().path(), own, PEFT_CONFIG)?;
        if let Some(shard) = self.folder.single_file() {
            return copy_own(shard.path(), own, PEFT_TENSORS);
        }
        let mut writer = TensorFileWriter::create_own(own, PEFT_TENSORS)?;
        for (shard, info) in self.folder.tensors() {
            let id = writer.add_tensor(info.name.clone(), info.dtype);
            for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
                ctx.check()?;
                let window = shard.window(ctx, info, start..info.n_bytes().min(start + ctx.window_bytes()))?;
                writer.append(id, &window)?;
                shard.confirm(&window)?;
            }
            writer.finish_tensor(id, info.shape.clone());
        }
        self.unchanged()?;
        writer.finish(ctx, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))
    }

    /// The BLAKE3 of all that a merge depends on, reading and proving all of it: every number is finite.
    ///
    /// Hashed, all integers little-endian: a domain; for each module, in order, its name, parameter, shape, rank, scaling, and type
    /// and BLAKE3 of each of its tensors; for each full tensor its name, type, shape and BLAKE3; for each weight with replaced rows
    /// the same and the rows; `fan_in_fan_out`. The name of
    /// the base, the training options and the order of the files count nothing. Memory: a window.
    ///
    /// # Errors
    /// A number that is not finite, naming the tensor and the place.
    pub fn id(&self, ctx: &Context<'_>) -> Result<blake3::Hash, PeftError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"neuroada-ckpt LoRA id v1\n").update(&[u8::from(self.config.fan_in_fan_out)]);
        let text = |hasher: &mut blake3::Hasher, text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        for module in &self.modules {
            text(&mut hasher, &module.module);
            text(&mut hasher, &module.parameter);
            text(&mut hasher, &format!("{:?}", module.shape));
            hasher.update(&module.rank.to_le_bytes()).update(&module.scaling.to_le_bytes());
            for tensor in [Some(&module.a), Some(&module.b), module.bias.as_ref(), module.magnitude.as_ref()] {
                let Some(tensor) = tensor else {
                    hasher.update(&[0]);
                    continue;
                };
                hasher.update(&[1]);
                text(&mut hasher, &dtype_name(self.tensor(tensor).1.dtype));
                hasher.update(self.digest(ctx, self.tensor(tensor))?.as_bytes());
            }
        }
        for full in &self.full {
            let (shard, info) = self.tensor(&full.tensor);
            text(&mut hasher, &full.name);
            text(&mut hasher, &dtype_name(info.dtype));
            text(&mut hasher, &format!("{:?}", info.shape));
            hasher.update(self.digest(ctx, (shard, info))?.as_bytes());
        }
        for replaced in &self.rows {
            let (shard, info) = self.tensor(&replaced.tensor);
            text(&mut hasher, "replaced rows");
            text(&mut hasher, &replaced.name);
            text(&mut hasher, &dtype_name(info.dtype));
            text(&mut hasher, &format!("{:?}", info.shape));
            replaced.rows.iter().for_each(|row| {
                hasher.update(&row.to_le_bytes());
            });
            hasher.update(self.digest(ctx, (shard, info))?.as_bytes());
        }
        self.unchanged()?;
        Ok(hasher.finalize())
    }

    /// The BLAKE3 of a tensor whose numbers are all finite.
    fn digest(&self, ctx: &Context<'_>, (shard, info): (&Shard, &TensorInfo)) -> Result<blake3::Hash, PeftError> {
        let mut hasher = blake3::Hasher::new();
        let width = info.dtype.bitsize() as u64 / 8;
        for start in (0..info.n_bytes()).step_by(ctx.window_bytes() as usize) {
            ctx.check()?;
            let end = info.n_bytes().min(start + ctx.window_bytes());
            let window = shard.window(ctx, info, start..end)?;
            if let Some(at) = first_not_finite(info.dtype, &window) {
                let what = format!("element {} is not a finite number", start / width + at as u64);
                return Err(self.folder.bad_tensor(shard, info, what).into());
            }
            hasher.update(&window);
            shard.confirm(&window)?;
        }
        Ok(hasher.finalize())
    }
}

fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    use crate::tensor::Float;
    crate::tensor::with_float!(dtype, T => {
        bytes.chunks_exact(T::BYTES).position(|element| !T::from_le(element).is_finite())
    }, else unreachable!("factors are floats"))
}

/// The tensors of a file, sorted by what they are.
#[derive(Default)]
struct Found {
    /// By module and nesting depth, the parts by name.
    parts: BTreeMap<(String, usize), BTreeMap<String, TensorInfo>>,
    /// By the parameter's name; PEFT may save one of a module in `modules_to_save` under two names.
    full: BTreeMap<String, Vec<String>>,
    rows: Vec<ReplacedRows>,
    problems: Vec<String>,
}

/// The types that factors may have.
fn is_factor_type(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16)
}

impl Found {
    fn add(&mut self, config: &LoraConfig, info: &TensorInfo) {
        if !is_factor_type(info.dtype) {
            return self.problem(info, format!("elements are {}; F32, BF16 or F16 are needed", dtype_name(info.dtype)));
        }
        if info.shape.contains(&0) || info.shape.is_empty() {
            return self
                .problem(info, format!("shape {:?} is empty: was it gathered before it was saved?", info.shape));
        }
        match config.token_indices.read(info) {
            None => {}
            Some(Err(what)) => return self.problem(info, what),
            Some(Ok(rows)) => {
                if self.rows.iter().any(|other| other.name == rows.name) {
                    return self.problem(info, "is there twice, under two names".to_owned());
                }
                return self.rows.push(rows);
            }
        }
        let Some(name) = PeftName::parse(&info.name, PART_PREFIX) else {
            // The module that one in `modules_to_save` stands in for: PEFT saves its bias with all others, and never uses it.
            if info.name.split('.').any(|word| word == "original_module") {
                return;
            }
            let is_saved_module = |name: &String| name.contains(".modules_to_save.");
            let tensors = self.full.entry(base_name(&info.name)).or_default();
            tensors.push(info.name.clone());
            if tensors.len() > 1 && !tensors.iter().any(is_saved_module) {
                self.problem(info, "is there twice, under two names".to_owned());
            }
            return;
        };
        let part =
            name.part.strip_suffix(".weight").filter(|part| !part.contains('.')).unwrap_or(&name.part).to_owned();
        if !matches!(
            part.as_str(),
            "lora_A" | "lora_B" | "lora_B.bias" | "lora_embedding_A" | "lora_embedding_B" | "lora_magnitude_vector"
        ) {
            return self.problem(info, format!("\"{}\" is no part of a LoRA adapter known here", Printable(&part)));
        }
        let parts = self.parts.entry((name.module, name.depth)).or_default();
        if parts.insert(part, info.clone()).is_some() {
            self.problem(info, "is there twice, under two names".to_owned());
        }
    }

    fn problem(&mut self, info: &TensorInfo, what: String) {
        self.problems.push(format!("\"{}\": {what}", Printable(&info.name)));
    }

    /// The modules, by module and parameter.
    fn modules(&mut self, config: &LoraConfig) -> Vec<LoraModule> {
        let parts = std::mem::take(&mut self.parts);
        // Depths of each module that have parts.
        let mut depths: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (module, depth) in parts.keys() {
            depths.entry(module).or_default().push(*depth);
        }
        let mut modules = Vec::new();
        for ((module, depth), parts) in &parts {
            let parameter = match parameter_of(config, module, parts, *depth, &depths[module.as_str()]) {
                Ok(parameter) => parameter,
                Err(what) => {
                    self.problems.push(format!("\"{}\": {what}", Printable(module)));
                    continue;
                }
            };
            match read_module(config, module, parameter.as_deref(), parts) {
                Ok(module) => modules.push(module),
                Err(what) => self.problems.push(format!("\"{}\": {what}", Printable(module))),
            }
        }
        modules.sort_by(|a, b| (&a.module, &a.parameter).cmp(&(&b.module, &b.parameter)));
        modules
    }
}

/// The parameter of `module` that the factors at `depth` are for, or `None` for the weight of a module targeted as such.
///
/// PEFT targets a parameter whose full name ends with a key of `target_parameters`. A key without an owner, such as `gate_up_proj`,
/// fits the name of every module that has such a parameter, which the adapter's file does not tell; but it is a parameter of
/// its own, so its factors are those of a stack, and no linear layer's.
fn parameter_of(
    config: &LoraConfig,
    module: &str,
    parts: &BTreeMap<String, TensorInfo>,
    depth: usize,
    depths: &[usize],
) -> Result<Option<String>, String> {
    let n_rows = |part: &str| Some(*parts.get(part)?.shape.first()?);
    let is_stack = || depths.len() > 1 || n_rows("lora_A").is_some_and(|rows| rows != config.rank(module));
    let ends = |key: &&String| match key.rsplit_once('.') {
        Some((owner, _)) => {
            module == owner || module.strip_suffix(owner).is_some_and(|rest| owner.is_empty() || rest.ends_with('.'))
        }
        None => projection_kind(module) == "experts" || is_stack(),
    };
    let mut named: Vec<&str> =
        config.target_parameters.iter().filter(ends).map(|key| projection_or_weight(key)).collect();
    named.sort_by_key(|name| (NESTING.iter().position(|known| known == name), *name));
    named.dedup();
    match (&named[..], depths) {
        ([], [_]) => Ok(None),
        ([only], [_]) => Ok(Some((*only).to_owned())),
        (_, [_]) => Err(format!("has one pair of factors, `target_parameters` names {} for it", named.join(" and "))),
        // The innermost has the most wrappers around it.
        (inner_first, depths) if inner_first == NESTING && depths == [0, 1] => Ok(Some(NESTING[1 - depth].to_owned())),
        _ => Err("has factors at several depths, and which parameter each is for cannot be told".to_owned()),
    }
}

/// The last word of a parameter's key.
fn projection_or_weight(key: &str) -> &str {
    if key.ends_with(".weight") { "weight" } else { projection_kind(key) }
}

fn read_module(
    config: &LoraConfig,
    module: &str,
    parameter: Option<&str>,
    parts: &BTreeMap<String, TensorInfo>,
) -> Result<LoraModule, String> {
    let is_embedding = parts.contains_key("lora_embedding_A") || parts.contains_key("lora_embedding_B");
    if is_embedding && (parts.contains_key("lora_A") || parts.contains_key("lora_B")) {
        return Err("has factors of a linear layer and of an embedding".to_owned());
    }
    let half = |name: &str| parts.get(name).ok_or_else(|| format!("{name} is missing: the other half is there"));
    let (a, b) = match is_embedding {
        true => (half("lora_embedding_A")?, half("lora_embedding_B")?),
        false => (half("lora_A")?, half("lora_B")?),
    };
    // Targeted by its own name, the parameter is part of what patterns are matched against.
    let key = parameter.map_or_else(|| module.to_owned(), |parameter| format!("{module}.{parameter}"));
    let (rank, scaling) = (config.rank(&key), config.scaling(&key));
    if !(scaling as f32).is_finite() {
        return Err(format!("its scaling {scaling} is not a number that float32 holds"));
    }
    let parameter = parameter.unwrap_or("weight").to_owned();
    let shape = if is_embedding {
        embedding_shape(a, b, rank)?
    } else if parameter == "weight" {
        linear_shape(a, b, rank)?
    } else {
        experts_shape(a, b, rank)?
    };
    let d_out = match shape {
        LoraShape::Linear { d_out, .. } | LoraShape::Embedding { d_out, .. } | LoraShape::Experts { d_out, .. } => {
            d_out
        }
    };
    let vector = |name: &str, is_wanted: bool, why: &str| match (parts.get(name), is_wanted) {
        (None, false) => Ok(None),
        (None, true) => Err(format!("{name} is missing: {why}")),
        (Some(_), false) => Err(format!("has {name}, which the config does not speak of")),
        (Some(info), true) if info.n_elements() != d_out => {
            Err(format!("{name} is {:?}, {d_out} elements are needed", info.shape))
        }
        (Some(info), true) => Ok(Some(info.name.clone())),
    };
    let is_stack = matches!(shape, LoraShape::Experts { .. });
    let magnitude = vector("lora_magnitude_vector", config.use_dora && !is_stack, "the config says `use_dora`")?;
    let bias = vector("lora_B.bias", config.lora_bias && !is_embedding && !is_stack, "the config says `lora_bias`")?;
    Ok(LoraModule {
        module: module.to_owned(),
        parameter,
        shape,
        rank,
        scaling,
        a: a.name.clone(),
        b: b.name.clone(),
        bias,
        magnitude,
    })
}

fn embedding_shape(a: &TensorInfo, b: &TensorInfo, rank: u64) -> Result<LoraShape, String> {
    match (&a.shape[..], &b.shape[..]) {
        (&[r, vocabulary], &[d_out, s]) if r == rank && s == rank => Ok(LoraShape::Embedding { vocabulary, d_out }),
        _ => Err(misfit(a, b, &format!("[{rank}, vocabulary] and [d_out, {rank}]"))),
    }
}

fn linear_shape(a: &TensorInfo, b: &TensorInfo, rank: u64) -> Result<LoraShape, String> {
    let wrong = || misfit(a, b, &format!("[{rank}, d_in] and [d_out, {rank}]"));
    match (&a.shape[..], &b.shape[..]) {
        // The second convolution of a pair has a kernel of one.
        ([r, d_in @ ..], [d_out, s, ones @ ..])
            if !d_in.is_empty() && d_in.len() == 1 + ones.len() && ones.iter().all(|&d| d == 1) =>
        {
            if *r != rank || *s != rank {
                return Err(wrong());
            }
            Ok(LoraShape::Linear { d_out: *d_out, d_in: d_in.iter().product() })
        }
        _ => Err(wrong()),
    }
}

fn experts_shape(a: &TensorInfo, b: &TensorInfo, rank: u64) -> Result<LoraShape, String> {
    match (&a.shape[..], &b.shape[..]) {
        (&[rows, d_in], &[d_out, columns]) if rows == columns && rows.is_multiple_of(rank) => {
            Ok(LoraShape::Experts { n_experts: rows / rank, d_out, d_in })
        }
        _ => Err(misfit(a, b, &format!("[E * {rank}, d_in] and [d_out, {rank} * E]"))),
    }
}

fn misfit(a: &TensorInfo, b: &TensorInfo, needed: &str) -> String {
    format!("its factors are {:?} and {:?}, the config needs {needed}", a.shape, b.shape)
}

#[cfg(test)]
#[path = "lora_tests.rs"]
mod tests;
