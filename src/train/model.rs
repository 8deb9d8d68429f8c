//! A model's weights on a device, and their trainable entries.
//!
//! Queries, keys and values are fused into one matrix, and so are gate and up: one product instead of three or two. A
//! target of the mask is then a range of rows ([`Part`]).

use std::ops::Range;

use super::{
    TrainError,
    attach::bias_of,
    config::ModelConfig,
    device::{Deltas, Device, DeviceResult},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Context, Printable, TensorRef},
    tensor::{Dtype, dtype_name, widened},
    weights::{Answers, TiedWeight, WeightMap},
};

/// A weight matrix `[d_out, d_in]`, made of one tensor of the checkpoint, or of several stacked by rows.
pub struct Linear<D: Device> {
    /// The weight, patched at its trained entries.
    pub weight: D::Weight,
    /// `[d_out]`, patched at its trained entries; zero in the rows of a part without a bias.
    pub bias: Option<D::F32>,
    /// Rows.
    pub d_out: usize,
    /// Length of a row.
    pub d_in: usize,
    /// The stored dtype.
    pub dtype: Dtype,
    /// The tensors that make up the weight.
    pub parts: Vec<Part>,
    /// The tensors that make up the bias, one per part, whether or not the checkpoint has them.
    pub bias_parts: Vec<Part>,
    /// The trainable entries of the weight.
    pub deltas: Option<Deltas<D>>,
    /// The trainable entries of the bias, as a matrix `[d_out, 1]`.
    pub bias_deltas: Option<Deltas<D>>,
}

/// One tensor of a [`Linear`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its rows.
    pub rows: Range<usize>,
    /// The range of its entries among the deltas.
    pub entries: Range<usize>,
}

/// One decoder layer.
pub struct Layer<D: Device> {
    /// `[d_model]`: gain of the norm before attention.
    pub attention_gain: D::F32,
    /// `[d_qkv, d_model]`.
    pub qkv: Linear<D>,
    /// `[d_head]` each: gains of the norms of queries and keys.
    pub head_gains: Option<[D::F32; 2]>,
    /// `[d_model, d_q]`.
    pub out: Linear<D>,
    /// `[d_model]`: gain of the norm before the feed-forward part.
    pub mlp_gain: D::F32,
    /// `[2 * d_ff, d_model]`.
    pub gate_up: Linear<D>,
    /// `[d_model, d_ff]`.
    pub down: Linear<D>,
}

impl<D: Device> Layer<D> {
    /// Its matrices, in the order of the forward pass.
    pub fn linears(&self) -> [&Linear<D>; 4] {
        [&self.qkv, &self.out, &self.gate_up, &self.down]
    }
    /// The same, mutable.
    pub fn linears_mut(&mut self) -> [&mut Linear<D>; 4] {
        [&mut self.qkv, &mut self.out, &mut self.gate_up, &mut self.down]
    }
}

/// A model on a device.
pub struct Model<D: Device> {
    /// Its shapes.
    pub config: ModelConfig,
    /// `[n_vocab, d_model]`.
    pub embedding: D::Weight,
    /// The decoder layers, in order.
    pub layers: Vec<Layer<D>>,
    /// `[d_model]`: gain of the final norm.
    pub gain: D::F32,
    /// `[n_vocab, d_model]`; `None` if it is tied to the embedding.
    head: Option<D::Weight>,
    /// `[d_head / 2]` radians per position.
    pub frequencies: D::F32,
}

impl<D: Device> Model<D> {
    /// Copies the weights of `checkpoint` to `device`, one window at a time.
    ///
    /// # Errors
    /// An unsupported architecture; a list of all tensors that are missing, unknown, or of another shape or type.
    pub fn load(ctx: &Context<'_>, device: &D, checkpoint: &Checkpoint) -> Result<Self, TrainError> {
        let config = check_model(checkpoint)?;
        let mut loader = Loader { ctx, device, checkpoint };
        ctx.observer.begin("loading", checkpoint.weights()?.iter().map(|tensor| tensor.info.n_bytes()).sum());
        let layers = (0..config.n_layers).map(|i| loader.layer(&config, i)).collect::<Result<Vec<_>, _>>()?;
        let (embedding, _) = loader.matrix(&[EMBEDDING])?;
        let head = if config.is_tied { None } else { Some(loader.matrix(&[HEAD])?.0) };
        let gain = loader.vector("model.norm.weight")?;
        let table = config.rope.frequencies(config.heads.d_head);
        let mut frequencies = device.zeros(table.len())?;
        device.write(&table, &mut frequencies)?;
        checkpoint.unchanged()?;
        Ok(Self { config, embedding, layers, gain, head, frequencies })
    }

    /// `[n_vocab, d_model]`: the projection to logits.
    pub fn head(&self) -> &D::Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// All matrices that can be trained, layer by layer.
    pub fn linears(&self) -> impl Iterator<Item = &Linear<D>> {
        self.layers.iter().flat_map(Layer::linears)
    }
    /// The same, mutable.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<D>> {
        self.layers.iter_mut().flat_map(Layer::linears_mut)
    }
    /// All trained deltas with the tensors they belong to, layer by layer.
    pub fn trained(&self) -> impl Iterator<Item = (&[Part], &Deltas<D>)> {
        self.linears().flat_map(Linear::trained)
    }
    /// The same, mutable.
    pub fn trained_mut(&mut self) -> impl Iterator<Item = (&[Part], &mut Deltas<D>)> {
        self.linears_mut().flat_map(Linear::trained_mut)
    }
    /// The number of trained entries, biases included.
    pub fn n_trained(&self) -> usize {
        self.trained().map(|(_, deltas)| deltas.nnz).sum()
    }
}

impl<D: Device> Linear<D> {
    /// Its trained deltas with the tensors they belong to: those of the weight, then those of the bias.
    pub fn trained(&self) -> impl Iterator<Item = (&[Part], &Deltas<D>)> {
        let weight = self.deltas.as_ref().map(|deltas| (&self.parts[..], deltas));
        let bias = self.bias_deltas.as_ref().map(|deltas| (&self.bias_parts[..], deltas));
        weight.into_iter().chain(bias)
    }
    /// The same, mutable.
    pub fn trained_mut(&mut self) -> impl Iterator<Item = (&[Part], &mut Deltas<D>)> {
        let weight = self.deltas.as_mut().map(|deltas| (&self.parts[..], deltas));
        let bias = self.bias_deltas.as_mut().map(|deltas| (&self.bias_parts[..], deltas));
        weight.into_iter().chain(bias)
    }

    /// Writes the merged values of the deltas into weight and bias.
    pub(super) fn patch(&mut self, device: &D) -> DeviceResult {
        if let Some(deltas) = &self.deltas {
            device.patch(&mut self.weight, deltas)?;
        }
        match (&mut self.bias, &self.bias_deltas) {
            (Some(bias), Some(deltas)) => device.patch_bias(bias, deltas),
            _ => Ok(()),
        }
    }
}

/// Reads the configuration of `checkpoint` and checks that its tensors match it. Reads headers only.
///
/// # Errors
/// As [`Model::load`].
pub fn check_model(checkpoint: &Checkpoint) -> Result<ModelConfig, TrainError> {
    let mut config = ModelConfig::of(checkpoint)?;
    // A model may be tied although its config does not say so.
    let map = WeightMap::new(checkpoint, Answers::default())?;
    config.is_tied |= map.tie(HEAD).is_some_and(TiedWeight::is_head_tied);
    let (n_layers, n_tensors) = (config.n_layers, checkpoint.tensors().len());
    if n_layers > n_tensors {
        let what = format!("`num_hidden_layers` is {n_layers}, the checkpoint has {n_tensors} tensors");
        return Err(TrainError::Config { path: checkpoint.root().join("config.json"), what });
    }
    ExpectedTensors::of(&config, checkpoint).check(checkpoint)?;
    Ok(config)
}

/// The name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The tensors that a model should have: name, shape, and whether it is optional.
struct ExpectedTensors(Vec<(String, Vec<u64>, bool)>);

impl ExpectedTensors {
    fn of(config: &ModelConfig, checkpoint: &Checkpoint) -> Self {
        let mut expected = Vec::new();
        let mut expect = |name: String, shape: &[usize], optional: bool| {
            expected.push((name, shape.iter().map(|&size| size as u64).collect(), optional));
        };
        let (d, heads) = (config.d_model, config.heads);
        expect(EMBEDDING.to_owned(), &[config.n_vocab, d], false);
        expect(HEAD.to_owned(), &[config.n_vocab, d], config.is_tied);
        expect("model.norm.weight".to_owned(), &[d], false);
        for i in 0..config.n_layers {
            let layer = format!("model.layers.{i}");
            for (module, d_out, d_in) in projections(config) {
                expect(format!("{layer}.{module}.weight"), &[d_out, d_in], false);
                expect(format!("{layer}.{module}.bias"), &[d_out], true);
            }
            expect(format!("{layer}.input_layernorm.weight"), &[d], false);
            expect(format!("{layer}.post_attention_layernorm.weight"), &[d], false);
            for norm in ["q_norm", "k_norm"].iter().filter(|_| config.has_head_norms) {
                expect(format!("{layer}.self_attn.{norm}.weight"), &[heads.d_head], false);
            }
        }
        // Old checkpoints store the rotary frequencies as tensors; they follow from the configuration.
        let is_table = |name: &str| name.ends_with(".rotary_emb.inv_freq");
        for tensor in checkpoint.tensors().filter(|tensor| is_table(&tensor.info.name)) {
            expected.push((tensor.info.name.clone(), tensor.info.shape.clone(), true));
        }
        Self(expected)
    }

    /// Reports all tensors that are missing, unknown, or of another shape or type.
    fn check(&self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let mut problems = Vec::new();
        for (name, shape, optional) in &self.0 {
            let shown = Printable(name);
            match checkpoint.weight(name)? {
                None if *optional => {}
                None => problems.push(format!("\"{shown}\" is missing")),
                Some(found) if found.info.shape != *shape => {
                    problems.push(format!(
                        "\"{shown}\": shape {:?}, the configuration requires {shape:?}",
                        found.info.shape
                    ));
                }
                Some(found) if !matches!(found.info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) => {
                    let dtype = dtype_name(found.info.dtype);
                    problems.push(format!("\"{shown}\": type {dtype}, the trainer supports BF16, F16 and F32"));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<&str> = self.0.iter().map(|(name, ..)| name.as_str()).collect();
        for tensor in checkpoint.weights()?.iter().filter(|tensor| !known.contains(tensor.info.name.as_str())) {
            problems.push(format!("\"{}\": not a tensor of this architecture", Printable(&tensor.info.name)));
        }
        if problems.is_empty() {
            return Ok(());
        }
        let what = "the tensors do not match the configuration";
        Err(TrainError::Tensors { path: checkpoint.root().to_owned(), what, problems })
    }
}

/// The projections of a layer: module, `d_out`, `d_in`.
fn projections(config: &ModelConfig) -> [(&'static str, usize, usize); 7] {
    let (d, d_ff, heads) = (config.d_model, config.d_ff, config.heads);
    [
        ("self_attn.q_proj", heads.d_q(), d),
        ("self_attn.k_proj", heads.d_kv(), d),
        ("self_attn.v_proj", heads.d_kv(), d),
        ("self_attn.o_proj", d, heads.d_q()),
        ("mlp.gate_proj", d_ff, d),
        ("mlp.up_proj", d_ff, d),
        ("mlp.down_proj", d, d_ff),
    ]
}

/// Reads tensors that have been checked.
struct Loader<'a, D: Device> {
    ctx: &'a Context<'a>,
    device: &'a D,
    checkpoint: &'a Checkpoint,
}

impl<D: Device> Loader<'_, D> {
    fn layer(&mut self, config: &ModelConfig, i: usize) -> Result<Layer<D>, TrainError> {
        let at = |module: &str| format!("model.layers.{i}.{module}");
        let head_gains = if config.has_head_norms {
            let gain = |norm: &str| self.vector(&at(&format!("self_attn.{norm}.weight")));
            Some([gain("q_norm")?, gain("k_norm")?])
        } else {
            None
        };
        Ok(Layer {
            attention_gain: self.vector(&at("input_layernorm.weight"))?,
            qkv: self.linear(&[at("self_attn.q_proj"), at("self_attn.k_proj"), at("self_attn.v_proj")])?,
            head_gains,
            out: self.linear(&[at("self_attn.o_proj")])?,
            mlp_gain: self.vector(&at("post_attention_layernorm.weight"))?,
            gate_up: self.linear(&[at("mlp.gate_proj"), at("mlp.up_proj")])?,
            down: self.linear(&[at("mlp.down_proj")])?,
        })
    }

    fn tensor(&self, name: &str) -> TensorRef<'_> {
        self.checkpoint.weight(name).ok().flatten().expect("all tensors were checked")
    }

    fn linear(&mut self, modules: &[String]) -> Result<Linear<D>, TrainError> {
        let names: Vec<String> = modules.iter().map(|module| format!("{module}.weight")).collect();
        let (weight, dtype) = self.matrix(&names)?;
        let mut parts: Vec<Part> = Vec::new();
        for name in names {
            let first = parts.last().map_or(0, |part| part.rows.end);
            let rows = first..first + self.tensor(&name).info.shape[0] as usize;
            parts.push(Part { name, rows, entries: 0..0 });
        }
        let d_in = self.tensor(&parts[0].name).info.shape[1] as usize;
        let d_out = parts.last().map_or(0, |part| part.rows.end);
        // A part without a bias gets zeros if another part has one.
        let bias_part = |part: &Part| Part { name: bias_of(&part.name), ..part.clone() };
        let bias_parts: Vec<Part> = parts.iter().map(bias_part).collect();
        let mut bias = vec![0.0; d_out];
        let mut has_bias = false;
        for part in bias_parts.iter().filter(|part| self.checkpoint.tensor(&part.name).is_some()) {
            bias[part.rows.clone()].copy_from_slice(&self.numbers(&part.name)?);
            has_bias = true;
        }
        let bias = has_bias.then(|| self.upload(&bias)).transpose()?;
        Ok(Linear { weight, bias, d_out, d_in, dtype, parts, bias_parts, deltas: None, bias_deltas: None })
    }

    /// Stacks tensors by rows.
    fn matrix(&mut self, names: &[impl AsRef<str>]) -> Result<(D::Weight, Dtype), TrainError> {
        let tensors: Vec<TensorRef<'_>> = names.iter().map(|name| self.tensor(name.as_ref())).collect();
        let (dtype, d_in) = (tensors[0].info.dtype, tensors[0].info.shape[1] as usize);
        if let Some(other) = tensors.iter().find(|tensor| tensor.info.dtype != dtype) {
            let what = format!(
                "type {}, but \"{}\", which is fused with it, has type {}",
                dtype_name(other.info.dtype),
                Printable(&tensors[0].info.name),
                dtype_name(dtype)
            );
            return Err(CheckpointError::bad_tensor(other.shard.path(), &other.info.name, what).into());
        }
        let d_out = tensors.iter().map(|tensor| tensor.info.shape[0] as usize).sum();
        let mut weight = self.device.weight(dtype, d_out, d_in)?;
        let row_bytes = d_in as u64 * (dtype.bitsize() as u64 / 8);
        let mut row = 0;
        for tensor in tensors {
            let n_rows = (self.ctx.window_bytes() / row_bytes).max(1);
            for first in (0..tensor.info.shape[0]).step_by(n_rows as usize) {
                self.ctx.check()?;
                let last = (first + n_rows).min(tensor.info.shape[0]);
                let window = tensor.window(self.ctx, first * row_bytes..last * row_bytes)?;
                self.device.write_rows(&mut weight, row, &window)?;
                self.ctx.observer.advance(window.len() as u64);
                row += (last - first) as usize;
            }
        }
        Ok((weight, dtype))
    }

    /// A vector, widened to float32, which is exact.
    fn numbers(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        let tensor = self.tensor(name);
        let bytes = tensor.window(self.ctx, 0..tensor.info.n_bytes())?;
        Ok(widened(tensor.info.dtype, &bytes))
    }

    fn upload(&self, values: &[f32]) -> Result<D::F32, TrainError> {
        let mut on_device = self.device.zeros(values.len())?;
        self.device.write(values, &mut on_device)?;
        Ok(on_device)
    }

    fn vector(&self, name: &str) -> Result<D::F32, TrainError> {
        self.upload(&self.numbers(name)?)
    }
}
