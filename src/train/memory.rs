//! Estimates the memory of a run before it begins.

use serde::Serialize;

use super::{
    config::ModelConfig,
    cpu::CpuDevice,
    pass::{Keep, Workspace},
};
use crate::{checkpoint::Checkpoint, tensor::Dtype};

/// Bytes that a run needs, by purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct MemoryEstimate {
    /// The model's weights, in their stored dtype.
    pub weights: u64,
    /// Activations of the largest batch, and the scratch memory of operations.
    pub activations: u64,
    /// Deltas, gradients, AdamW's moments, columns and original values.
    pub state: u64,
    /// The sum of all of them.
    pub total: u64,
}

/// The size of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunSize {
    /// Trained entries of weights.
    pub n_entries: u64,
    /// Trained elements of biases.
    pub n_biases: u64,
    /// Tokens of the largest batch.
    pub max_tokens: usize,
    /// The largest number of labeled tokens in a batch.
    pub max_supervised: usize,
    /// What a forward pass keeps.
    pub keep: Keep,
}

/// The size of the largest pass of an evaluation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EvalSize {
    /// Tokens of the largest batch.
    pub max_tokens: usize,
    /// The largest number of labeled tokens in a batch.
    pub max_supervised: usize,
    /// Tokens whose keys and values are cached at a time.
    pub n_cached: usize,
}

impl EvalSize {
    /// The elementwise maximum: enough for both, one after the other.
    pub fn max(self, other: Self) -> Self {
        Self {
            max_tokens: self.max_tokens.max(other.max_tokens),
            max_supervised: self.max_supervised.max(other.max_supervised),
            n_cached: self.n_cached.max(other.n_cached),
        }
    }
}

impl MemoryEstimate {
    /// The estimate for an evaluation on the CPU; there is no optimizer state.
    pub fn of_eval(config: &ModelConfig, base: &Checkpoint, size: EvalSize) -> Self {
        let EvalSize { max_tokens, max_supervised, n_cached } = size;
        let run = RunSize { n_entries: 0, n_biases: 0, max_tokens, max_supervised, keep: Keep::Nothing };
        let Self { weights, activations, .. } = Self::on_cpu(config, base, run);
        let cached = (n_cached * 2 * config.heads.d_kv() * config.n_layers) as u64 * 4;
        let activations = activations + cached;
        Self { weights, activations, state: 0, total: weights + activations }
    }

    /// The estimate for training on the CPU.
    pub fn on_cpu(config: &ModelConfig, base: &Checkpoint, run: RunSize) -> Self {
        let is_narrow = width(base) < 4;
        // The gradient of attention is computed per head, next to the buffer of the whole.
        let parts = if run.keep == Keep::Nothing { 0 } else { (run.max_tokens * config.heads.d_qkv() * 4) as u64 };
        let scratch = parts + CpuDevice::scratch_bytes(config, run.max_supervised, is_narrow);
        Self::of_run(config, base, run, 4, scratch)
    }

    /// The estimate for training on a device with `act_bytes` per activation, whose operations need `scratch` bytes
    /// beyond the model.
    pub fn of_run(config: &ModelConfig, base: &Checkpoint, run: RunSize, act_bytes: usize, scratch: u64) -> Self {
        let is_copy = |name: &str| config.is_tied && name == "lm_head.weight";
        // Quantized weights are decoded to float32.
        let tensors = base.weights().unwrap_or_default();
        let loaded = tensors.iter().filter(|tensor| !is_copy(&tensor.info.name));
        let weights: u64 = loaded.map(|tensor| tensor.info.n_bytes()).sum();
        let activations = Workspace::<CpuDevice>::n_bytes(config, run.max_tokens, run.keep, act_bytes) + scratch;
        // Theta, gradient, two moments, column, and the original value.
        let n_offsets = config.n_rows() as u64 + run.n_biases;
        let state = (run.n_entries + run.n_biases) * (5 * 4 + width(base)) + n_offsets * 4;
        Self { weights, activations, state, total: weights + activations + state }
    }
}

/// Bytes per element of most matrices.
fn width(base: &Checkpoint) -> u64 {
    base.tensors().map(|tensor| tensor.info.dtype).find(|dtype| *dtype != Dtype::F32).map_or(4, |_| 2)
}
