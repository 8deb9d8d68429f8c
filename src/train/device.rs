//! The operations from which the passes are built.
//!
//! A device owns its memory. Buffers are handles; values move between host and device only through the methods named
//! `write` and `read`, never inside an operation. Every comment states the shapes; matrices are row-major. `n` is a
//! number of tokens; buffers may be longer than an operation needs. Activations ([`Device::Act`]) use the device's own
//! dtype, everything else is float32 ([`Device::F32`]); sums accumulate in float32 or wider. Every operation is
//! deterministic: the same input gives the same bits.

use super::{DeviceError, config::Heads};
use crate::tensor::Dtype;

/// The result of an operation.
pub type DeviceResult = Result<(), DeviceError>;

/// A packed batch: examples concatenated without padding.
pub struct Spans<D: Device + ?Sized> {
    /// `[n_examples + 1]`: the start of each example, then the end of the last (`cu_seqlens`).
    pub starts: Vec<usize>,
    /// The same on the device.
    pub starts_dev: D::Ids,
    /// `[n_tokens]`: each token's position in its example.
    pub positions: D::Ids,
}

impl<D: Device + ?Sized> Spans<D> {
    /// Examples that begin at `starts`. The first new token of example `i` has position `past[i]`, or 0 if `past` is
    /// empty.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(device: &D, starts: &[usize], past: &[usize]) -> Result<Self, DeviceError> {
        let as_ids: Vec<u32> = starts.iter().map(|&start| start as u32).collect();
        let mut positions = Vec::with_capacity(*starts.last().unwrap_or(&0));
        for (i, span) in starts.windows(2).enumerate() {
            let first = past.get(i).copied().unwrap_or(0);
            positions.extend((first..first + span[1] - span[0]).map(|position| position as u32));
        }
        let (starts_dev, positions) = (device.ids(&as_ids)?, device.ids(&positions)?);
        Ok(Self { starts: starts.to_vec(), starts_dev, positions })
    }

    /// Total number of tokens.
    pub fn n_tokens(&self) -> usize {
        *self.starts.last().unwrap_or(&0)
    }
}

/// The trainable entries of one weight matrix `[d_out, d_in]`, or of a bias `[d_out, 1]`, with their state: 20 bytes
/// per entry plus its original value.
pub struct Deltas<D: Device + ?Sized> {
    /// Number of entries.
    pub nnz: usize,
    /// `[d_out + 1]`: the entries of row `i` are `offsets[i]..offsets[i + 1]`.
    pub offsets: D::Ids,
    /// `[nnz]`, ascending within a row.
    pub columns: D::Ids,
    /// `[nnz]` as a matrix `[1, nnz]` in the weight's dtype: the values before training.
    pub originals: D::Weight,
    /// `[nnz]`: the deltas.
    pub theta: D::F32,
    /// `[nnz]`: the gradient of the loss with respect to the deltas, accumulated since it was last cleared.
    pub grad: D::F32,
    /// `[nnz]`: AdamW's first moment, the moving average of the gradients.
    pub mean: D::F32,
    /// `[nnz]`: AdamW's second moment, the moving average of the squared gradients.
    pub variance: D::F32,
}

/// One AdamW step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamW {
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: the fraction that a step with learning rate 1 would remove.
    pub weight_decay: f64,
    /// Multiplied into the gradients first.
    pub grad_scale: f64,
    /// The number of this step, from 1.
    pub step: u64,
}

/// The scalars of an [`AdamW`] step as they enter float32 arithmetic, on every device:
///
/// ```text
/// grad *= grad_scale
/// mean += (grad - mean) * one_minus_beta1
/// variance = variance * beta2 + one_minus_beta2 * grad * grad
/// theta = theta * decay - step_size * (mean / (sqrt(variance) / bias_correction2_sqrt + eps))
/// ```
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamScalars {
    /// Multiplied into the gradients.
    pub grad_scale: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// Multiplied into theta: `1 - learning_rate * weight_decay`.
    pub decay: f32,
    /// The learning rate divided by the bias correction of the first moment.
    pub step_size: f32,
    /// The square root of the second moment's bias correction.
    pub bias_correction2_sqrt: f32,
    /// Added to the square root of the second moment.
    pub eps: f32,
}

impl AdamW {
    /// The scalars of this step in float32.
    pub fn scalars(self) -> AdamScalars {
        let Self { learning_rate, betas: (beta1, beta2), eps, weight_decay, grad_scale, step } = self;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        AdamScalars {
            grad_scale: grad_scale as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
            step_size: (learning_rate / correction(beta1)) as f32,
            bias_correction2_sqrt: correction(beta2).sqrt() as f32,
            eps: eps as f32,
        }
    }
}

/// A device that can train.
pub trait Device {
    /// Activations and their gradients.
    type Act;
    /// Float32 values.
    type F32;
    /// Token ids, positions, columns.
    type Ids;
    /// A matrix `[d_out, d_in]` in its stored dtype.
    type Weight;

    /// Bytes per activation.
    fn act_bytes(&self) -> usize;
    /// The loss scale of the backward pass, a power of two. It keeps small gradients from underflowing in dtypes with
    /// a narrow exponent range.
    fn loss_scale(&self) -> f32 {
        1.0
    }

    // --- memory

    /// `n` activations, all zero.
    fn act(&self, n: usize) -> Result<Self::Act, DeviceError>;
    /// `n` numbers, all zero.
    fn zeros(&self, n: usize) -> Result<Self::F32, DeviceError>;
    /// A buffer that holds these ids.
    fn ids(&self, ids: &[u32]) -> Result<Self::Ids, DeviceError>;
    /// A matrix of zeros; `dtype` is BF16, F16 or F32.
    fn weight(&self, dtype: Dtype, d_out: usize, d_in: usize) -> Result<Self::Weight, DeviceError>;
    /// Fills the rows from `first_row` with `bytes`: whole rows, little-endian, as stored.
    fn write_rows(&self, weight: &mut Self::Weight, first_row: usize, bytes: &[u8]) -> DeviceResult;
    /// Overwrites the first elements of `to`.
    fn write(&self, from: &[f32], to: &mut Self::F32) -> DeviceResult;
    /// The first `n` elements.
    fn read(&self, from: &Self::F32, n: usize) -> Result<Vec<f32>, DeviceError>;
    /// Overwrites the first activations of `to`, rounded to the device's dtype.
    fn write_act(&self, from: &[f32], to: &mut Self::Act) -> DeviceResult;
    /// The first `n` activations, widened to float32.
    fn read_act(&self, from: &Self::Act, n: usize) -> Result<Vec<f32>, DeviceError>;
    /// `to[to_at..to_at + n] = from[from_at..from_at + n]`.
    fn copy(&self, from: &Self::Act, from_at: usize, to: &mut Self::Act, to_at: usize, n: usize) -> DeviceResult;
    /// Sets all values to zero.
    fn clear(&self, values: &mut Self::F32) -> DeviceResult;

    // --- the passes

    /// `x[t] = table[ids[t]]`; `table` is `[n_vocab, d]`, `x` `[n, d]`.
    fn embed(&self, ids: &Self::Ids, n: usize, table: &Self::Weight, x: &mut Self::Act) -> DeviceResult;

    /// `y = x * w^T + bias`, added to `y` if `accumulate`; `x` is `[n, d_in]`, `w` `[d_out, d_in]`, `bias` `[d_out]`,
    /// `y` `[n, d_out]`.
    fn linear(
        &self,
        x: &Self::Act,
        n: usize,
        w: &Self::Weight,
        bias: Option<&Self::F32>,
        accumulate: bool,
        y: &mut Self::Act,
    ) -> DeviceResult;

    /// `dx = dy * w`; `dy` is `[n, d_out]`, `w` `[d_out, d_in]`, `dx` `[n, d_in]`.
    fn linear_backward(&self, dy: &Self::Act, n: usize, w: &Self::Weight, dx: &mut Self::Act) -> DeviceResult;

    /// `y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * gain`; `x` and `y` are `[n, d]`, `gain` `[d]`.
    fn rms_norm(
        &self,
        x: &Self::Act,
        n: usize,
        gain: &Self::F32,
        d: usize,
        eps: f32,
        y: &mut Self::Act,
    ) -> DeviceResult;

    /// Adds the gradient with respect to `x` to `dx`, given `dy`. Shapes as in [`Device::rms_norm`].
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_backward(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        n: usize,
        gain: &Self::F32,
        d: usize,
        eps: f32,
        dx: &mut Self::Act,
    ) -> DeviceResult;

    /// The RMS norm of each query and key head separately: `qkv` is `[n, d_qkv]`, in place; the gains are `[d_head]`.
    fn head_norm(
        &self,
        qkv: &mut Self::Act,
        n: usize,
        heads: Heads,
        q_gain: &Self::F32,
        k_gain: &Self::F32,
        eps: f32,
    ) -> DeviceResult;

    /// The backward pass of [`Device::head_norm`], in place: `dqkv` is the gradient with respect to its output, then
    /// to its input `raw`.
    #[allow(clippy::too_many_arguments)]
    fn head_norm_backward(
        &self,
        dqkv: &mut Self::Act,
        raw: &Self::Act,
        n: usize,
        heads: Heads,
        q_gain: &Self::F32,
        k_gain: &Self::F32,
        eps: f32,
    ) -> DeviceResult;

    /// Rotary embedding of each query and key head of `qkv`, `[n, d_qkv]`, in place: elements `i` and `i + d_head / 2`
    /// are rotated by `frequencies[i] * position` radians, backwards if `inverse`. The inverse is also the backward
    /// pass.
    fn rope(
        &self,
        qkv: &mut Self::Act,
        positions: &Self::Ids,
        n: usize,
        heads: Heads,
        frequencies: &Self::F32,
        inverse: bool,
    ) -> DeviceResult;

    /// Causal attention within each example. Query head `h` reads key head `h / group`; scores are divided by
    /// `sqrt(d_head)`.
    ///
    /// `qkv` is `[n, d_qkv]`, `out` `[n, d_q]`, `lse` `[n, n_q]`: the log-sum-exp of each softmax, for the backward
    /// pass. Extra memory: linear in the length of the longest example.
    fn attention(
        &self,
        qkv: &Self::Act,
        spans: &Spans<Self>,
        heads: Heads,
        out: &mut Self::Act,
        lse: &mut Self::F32,
    ) -> DeviceResult;

    /// The gradient with respect to `qkv`, given `dout`. Shapes as in [`Device::attention`].
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dout: &Self::Act,
        qkv: &Self::Act,
        out: &Self::Act,
        lse: &Self::F32,
        spans: &Spans<Self>,
        heads: Heads,
        dqkv: &mut Self::Act,
    ) -> DeviceResult;

    /// Attention with a key-value cache. The new tokens of each sequence are in `qkv`, the earlier ones in `cache`,
    /// `[n_examples, capacity, 2 * d_kv]` (`[k | v]`), of which the first `past[i]` rows of example `i` are filled.
    /// The new keys and values are appended.
    #[allow(clippy::too_many_arguments)]
    fn attention_cached(
        &self,
        qkv: &Self::Act,
        spans: &Spans<Self>,
        past: &[usize],
        heads: Heads,
        cache: &mut Self::Act,
        capacity: usize,
        out: &mut Self::Act,
    ) -> DeviceResult;

    /// `h = silu(gate) * up`; `gate_up` is `[n, 2 * d_ff]` (`[gate | up]`), `h` `[n, d_ff]`.
    fn swiglu(&self, gate_up: &Self::Act, n: usize, d_ff: usize, h: &mut Self::Act) -> DeviceResult;

    /// The gradient with respect to `gate_up`, given `dh`. Shapes as in [`Device::swiglu`].
    fn swiglu_backward(
        &self,
        dh: &Self::Act,
        gate_up: &Self::Act,
        n: usize,
        d_ff: usize,
        d_gate_up: &mut Self::Act,
    ) -> DeviceResult;

    /// `y[i] = x[rows[i]]`; `y` is `[n_rows, d]`.
    fn take_rows(&self, x: &Self::Act, rows: &Self::Ids, n_rows: usize, d: usize, y: &mut Self::Act) -> DeviceResult;

    /// `x = 0`, then `x[rows[i]] = y[i]`; `x` is `[n, d]`, `y` `[n_rows, d]`; rows are unique.
    fn put_rows(
        &self,
        y: &Self::Act,
        rows: &Self::Ids,
        n_rows: usize,
        d: usize,
        n: usize,
        x: &mut Self::Act,
    ) -> DeviceResult;

    /// `losses[i] = -log(softmax(x[i] * head^T)[labels[i]])`. With `grad_scale`, `x` is replaced by the gradient of
    /// `grad_scale * sum(losses)` with respect to `x`.
    ///
    /// `x` is `[n_rows, d]`, `head` `[n_vocab, d]`, `labels` and `losses` `[n_rows]`. The logits are never all in
    /// memory at once.
    fn cross_entropy(
        &self,
        x: &mut Self::Act,
        n_rows: usize,
        head: &Self::Weight,
        labels: &Self::Ids,
        grad_scale: Option<f32>,
        losses: &mut Self::F32,
    ) -> DeviceResult;

    /// The token with the largest logit of each row, the lowest id on ties: `x` is `[n_rows, d]`, `head`
    /// `[n_vocab, d]`.
    fn argmax(&self, x: &Self::Act, n_rows: usize, head: &Self::Weight) -> Result<Vec<u32>, DeviceError>;

    // --- trainable entries

    /// `grad[e] += sum_t dy[t, i] * x[t, columns[e]]` for each entry `e` of each row `i`; `x` is `[n, d_in]`, `dy` `[n, d_out]`.
    fn gather_dot(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        n: usize,
        shape: (usize, usize),
        deltas: &mut Deltas<Self>,
    ) -> DeviceResult;

    /// `grad[e] += sum_t dy[t, i]` for each entry `e` of each row `i` of a bias `[d_out, 1]`; `dy` is `[n, d_out]`; a
    /// row has one entry or none. Equals [`Device::gather_dot`] with ones for `x`.
    fn bias_grad(&self, dy: &Self::Act, n: usize, d_out: usize, deltas: &mut Deltas<Self>) -> DeviceResult;

    /// `w[i, columns[e]] = round(originals[e] + theta[e])`: the sum in float32, rounded once to the weight's type, as a merge does.
    fn patch(&self, w: &mut Self::Weight, deltas: &Deltas<Self>) -> DeviceResult;

    /// `bias[i] = round(originals[e] + theta[e])` for each entry `e` of each row `i`: the sum in float32, rounded once
    /// to the dtype of the originals, as a merge does, then widened. Elements without an entry are unchanged. `bias`
    /// is `[d_out]`.
    fn patch_bias(&self, bias: &mut Self::F32, deltas: &Deltas<Self>) -> DeviceResult;

    /// The sum of squares of the first elements of each buffer, in float64, always in the same order.
    fn sums_of_squares(&self, of: &[(&Self::F32, usize)]) -> Result<Vec<f64>, DeviceError>;

    /// One AdamW step on `theta`, in float32, in PyTorch's order of operations.
    ///
    /// Source: Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>.
    fn adamw(&self, deltas: &mut Deltas<Self>, step: AdamW) -> DeviceResult;
}
