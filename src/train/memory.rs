//! What a run will take, told before it begins.

use serde::Serialize;

use super::{
    config::ModelConfig,
    cpu::CpuDevice,
    pass::{Keep, Workspace},
};
use crate::{checkpoint::Checkpoint, tensor::Dtype};

/// Bytes that a run takes, by what they are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct MemoryEstimate {
    /// The model's weights, of the type that they are stored in.
    pub weights: u64,
    /// Activations of the largest batch, and what operations need beside them.
    pub activations: u64,
    /// Deltas, gradients, AdamW's means, columns and originals.
    pub state: u64,
    /// All of it.
    pub total: u64,
}

impl MemoryEstimate {
    /// What training on the processor takes: `n_trained` entries, batches of up to `most_tokens` tokens of which up to `most_supervised` have
    /// labels.
    pub fn on_cpu(
        config: &ModelConfig,
        base: &Checkpoint,
        n_trained: u64,
        most_tokens: usize,
        most_supervised: usize,
        keep: Keep,
    ) -> Self {
        let is_copy = |name: &str| config.is_tied && name == "lm_head.weight";
        let loaded = base.tensors().filter(|tensor| !is_copy(&tensor.info.name));
        let weights: u64 = loaded.map(|tensor| tensor.info.n_bytes()).sum();
        let width = base.tensors().map(|tensor| tensor.info.dtype).find(|dtype| *dtype != Dtype::F32).map_or(4, |_| 2);
        let is_narrow = width < 4;
        let heads = config.heads;
        // The gradient of attention comes in parts by head, beside the whole.
        let parts = if keep == Keep::Nothing { 0 } else { (most_tokens * heads.d_qkv() * 4) as u64 };
        let activations = Workspace::<CpuDevice>::n_bytes(config, most_tokens, keep, 4)
            + parts
            + CpuDevice::scratch_bytes(config, most_supervised, is_narrow);
        // Theta, gradient, mean, variance, column, and the original.
        let n_rows = (heads.d_qkv() + 2 * config.d_ff + 2 * config.d_model) * config.n_layers;
        let state = n_trained * (5 * 4 + width) + n_rows as u64 * 4;
        Self { weights, activations, state, total: weights + activations + state }
    }
}
