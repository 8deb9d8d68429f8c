//! The operations that the passes are made of.
//!
//! A device owns its memory: buffers are handles, and numbers pass between host and device through the few calls named `write`
//! and `read`, never inside an operation. Shapes stand in every comment; matrices are row-major. `n` is a number of tokens:
//! buffers may be longer than an operation needs. Activations ([`Device::Act`]) have the device's own type, all else is
//! float32 ([`Device::F32`]); sums run in float32 at least. Every operation gives the same bits for the same input.

use super::{DeviceError, config::Heads};
use crate::tensor::Dtype;

/// What operations return.
pub type DeviceResult = Result<(), DeviceError>;

/// How a batch lies: examples end to end.
pub struct Spans<D: Device + ?Sized> {
    /// `[n_examples + 1]`: where each example begins, and where the last one ends.
    pub starts: Vec<usize>,
    /// The same on the device.
    pub starts_dev: D::Ids,
    /// `[n_tokens]`: each token's position in its example.
    pub positions: D::Ids,
}

impl<D: Device + ?Sized> Spans<D> {
    /// Examples that begin at `starts`; the first tokens of example `i` stand at position `past[i]`, all at 0 where `past` is empty.
    ///
    /// # Errors
    /// The device's.
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

    /// Tokens in all.
    pub fn n_tokens(&self) -> usize {
        *self.starts.last().unwrap_or(&0)
    }
}

/// The trainable entries of one weight matrix `[d_out, d_in]`, or of a bias `[d_out, 1]`, and the state of each: 20 bytes and an original.
pub struct Deltas<D: Device + ?Sized> {
    /// Entries in all.
    pub nnz: usize,
    /// `[d_out + 1]`: the entries of row `i` are `offsets[i]..offsets[i + 1]`.
    pub offsets: D::Ids,
    /// `[nnz]`, ascending within a row.
    pub columns: D::Ids,
    /// `[1, nnz]`, of the weight's type: what the weight held before training.
    pub originals: D::Weight,
    /// `[nnz]`: the deltas.
    pub theta: D::F32,
    /// `[nnz]`: the gradient of the loss by the deltas, summed up since it was last cleared.
    pub grad: D::F32,
    /// `[nnz]`: AdamW's mean of the gradients.
    pub mean: D::F32,
    /// `[nnz]`: AdamW's mean of their squares.
    pub variance: D::F32,
}

/// One AdamW step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamW {
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Decay of the mean and of the mean square.
    pub betas: (f64, f64),
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Share of a value that a step with learning rate 1 would take away.
    pub weight_decay: f64,
    /// Gradients are multiplied by this first.
    pub grad_scale: f64,
    /// Which step this is, from 1.
    pub step: u64,
}

/// The numbers of an [`AdamW`] step as they enter float32 arithmetic, on every device:
///
/// ```text
/// grad *= grad_scale
/// mean += (grad - mean) * rest_1
/// variance = variance * beta_2 + rest_2 * grad * grad
/// theta = theta * keep - step_size * (mean / (sqrt(variance) / root + eps))
/// ```
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamNumbers {
    /// What gradients are multiplied by.
    pub grad_scale: f32,
    /// The share of a gradient in the mean.
    pub rest_1: f32,
    /// The share of the mean square that stays.
    pub beta_2: f32,
    /// The share of a square in the mean square.
    pub rest_2: f32,
    /// What a value is multiplied by, for weight decay.
    pub keep: f32,
    /// The learning rate over the correction of the mean.
    pub step_size: f32,
    /// The root of the correction of the mean square.
    pub root: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
}

impl AdamW {
    /// The numbers that enter the arithmetic.
    pub fn numbers(self) -> AdamNumbers {
        let Self { learning_rate, betas: (beta_1, beta_2), eps, weight_decay, grad_scale, step } = self;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        AdamNumbers {
            grad_scale: grad_scale as f32,
            rest_1: (1.0 - beta_1) as f32,
            beta_2: beta_2 as f32,
            rest_2: (1.0 - beta_2) as f32,
            keep: (1.0 - learning_rate * weight_decay) as f32,
            step_size: (learning_rate / correction(beta_1)) as f32,
            root: correction(beta_2).sqrt() as f32,
            eps: eps as f32,
        }
    }
}

/// A machine that trains.
pub trait Device {
    /// Activations and their gradients.
    type Act;
    /// Numbers in float32.
    type F32;
    /// Token ids, positions, columns.
    type Ids;
    /// A matrix `[d_out, d_in]` of the type in which it is stored.
    type Weight;

    /// Bytes of one activation.
    fn act_bytes(&self) -> usize;
    /// What losses are multiplied by on the way back, a power of two: small gradients are lost where activations have few exponents.
    fn loss_scale(&self) -> f32 {
        1.0
    }

    // --- memory

    /// `n` activations, all zero.
    fn act(&self, n: usize) -> Result<Self::Act, DeviceError>;
    /// `n` numbers, all zero.
    fn zeros(&self, n: usize) -> Result<Self::F32, DeviceError>;
    /// These ids.
    fn ids(&self, ids: &[u32]) -> Result<Self::Ids, DeviceError>;
    /// A matrix of zeros; `dtype` is BF16, F16 or F32.
    fn weight(&self, dtype: Dtype, d_out: usize, d_in: usize) -> Result<Self::Weight, DeviceError>;
    /// Fills the rows from `first_row` on with `bytes`, little-endian, as stored; `bytes` are whole rows.
    fn write_rows(&self, weight: &mut Self::Weight, first_row: usize, bytes: &[u8]) -> DeviceResult;
    /// Fills the first elements of `to`.
    fn write(&self, from: &[f32], to: &mut Self::F32) -> DeviceResult;
    /// The first `n` elements.
    fn read(&self, from: &Self::F32, n: usize) -> Result<Vec<f32>, DeviceError>;
    /// Fills the first activations of `to`, rounded to the device's type.
    fn write_act(&self, from: &[f32], to: &mut Self::Act) -> DeviceResult;
    /// The first `n` activations, widened.
    fn read_act(&self, from: &Self::Act, n: usize) -> Result<Vec<f32>, DeviceError>;
    /// `to[to_at..to_at + n] = from[from_at..from_at + n]`.
    fn copy(&self, from: &Self::Act, from_at: usize, to: &mut Self::Act, to_at: usize, n: usize) -> DeviceResult;
    /// Sets all to zero.
    fn clear(&self, values: &mut Self::F32) -> DeviceResult;

    // --- the passes

    /// `x[t] = table[ids[t]]`; `table` is `[n_vocab, d]`, `x` `[n, d]`.
    fn embed(&self, ids: &Self::Ids, n: usize, table: &Self::Weight, x: &mut Self::Act) -> DeviceResult;

    /// `y = x * w^T + bias`, or that added to `y`; `x` is `[n, d_in]`, `w` `[d_out, d_in]`, `bias` `[d_out]`, `y` `[n, d_out]`.
    fn linear(
        &self,
        x: &Self::Act,
        n: usize,
        w: &Self::Weight,
        bias: Option<&Self::F32>,
        adds: bool,
        y: &mut Self::Act,
    ) -> DeviceResult;

    /// `dx = dy * w`; `dy` is `[n, d_out]`, `w` `[d_out, d_in]`, `dx` `[n, d_in]`.
    fn linear_back(&self, dy: &Self::Act, n: usize, w: &Self::Weight, dx: &mut Self::Act) -> DeviceResult;

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

    /// Adds the gradient by `x` to `dx`, given that by `y`. Shapes of [`Device::rms_norm`].
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_back(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        n: usize,
        gain: &Self::F32,
        d: usize,
        eps: f32,
        dx: &mut Self::Act,
    ) -> DeviceResult;

    /// The RMS norm of each query and key head by itself: `qkv` is `[n, d_qkv]`, in place, the gains are `[d_head]`.
    fn head_norm(
        &self,
        qkv: &mut Self::Act,
        n: usize,
        heads: Heads,
        q_gain: &Self::F32,
        k_gain: &Self::F32,
        eps: f32,
    ) -> DeviceResult;

    /// Turns the gradient by what [`Device::head_norm`] gave into that by what it was given, `raw`, in place.
    #[allow(clippy::too_many_arguments)]
    fn head_norm_back(
        &self,
        dqkv: &mut Self::Act,
        raw: &Self::Act,
        n: usize,
        heads: Heads,
        q_gain: &Self::F32,
        k_gain: &Self::F32,
        eps: f32,
    ) -> DeviceResult;

    /// Turns each query and key head of `qkv`, `[n, d_qkv]`, in place: elements `i` and `i + d_head / 2` by `frequencies[i] *
    /// position` radians, backwards where `inverse`. The inverse is the gradient too.
    fn rope(
        &self,
        qkv: &mut Self::Act,
        positions: &Self::Ids,
        n: usize,
        heads: Heads,
        frequencies: &Self::F32,
        inverse: bool,
    ) -> DeviceResult;

    /// Causal attention inside each example; query head `h` reads key head `h / group`, scores are divided by `sqrt(d_head)`.
    ///
    /// `qkv` is `[n, d_qkv]`, `out` `[n, d_q]`, `lse` `[n, n_q]`: the logarithm of each softmax's denominator, for the way back.
    /// Memory beside: linear in the length of the longest example.
    fn attention(
        &self,
        qkv: &Self::Act,
        spans: &Spans<Self>,
        heads: Heads,
        out: &mut Self::Act,
        lse: &mut Self::F32,
    ) -> DeviceResult;

    /// The gradient by `qkv`, given that by `out`. Shapes of [`Device::attention`].
    #[allow(clippy::too_many_arguments)]
    fn attention_back(
        &self,
        dout: &Self::Act,
        qkv: &Self::Act,
        out: &Self::Act,
        lse: &Self::F32,
        spans: &Spans<Self>,
        heads: Heads,
        dqkv: &mut Self::Act,
    ) -> DeviceResult;

    /// Attention of sequences that go on: their new tokens lie in `qkv`, what came before in `cache`, `[n_examples, capacity, 2 *
    /// d_kv]` (`[k | v]`), of which the first `past[i]` rows of example `i` are filled. The new keys and values are appended.
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

    /// The gradient by `gate_up`, given that by `h`. Shapes of [`Device::swiglu`].
    fn swiglu_back(
        &self,
        dh: &Self::Act,
        gate_up: &Self::Act,
        n: usize,
        d_ff: usize,
        d_gate_up: &mut Self::Act,
    ) -> DeviceResult;

    /// `y[i] = x[rows[i]]`; `y` is `[n_rows, d]`.
    fn take_rows(&self, x: &Self::Act, rows: &Self::Ids, n_rows: usize, d: usize, y: &mut Self::Act) -> DeviceResult;

    /// `x = 0`, then `x[rows[i]] = y[i]`; `x` is `[n, d]`, `y` `[n_rows, d]`, and no row comes twice.
    fn put_rows(
        &self,
        y: &Self::Act,
        rows: &Self::Ids,
        n_rows: usize,
        d: usize,
        n: usize,
        x: &mut Self::Act,
    ) -> DeviceResult;

    /// `losses[i] = -log(softmax(x[i] * head^T)[labels[i]])`, and in place of `x` its gradient by `grad_scale * sum(losses)`,
    /// where that is asked for.
    ///
    /// `x` is `[n_rows, d]`, `head` `[n_vocab, d]`, `labels` and `losses` `[n_rows]`. All logits are never there at once.
    fn cross_entropy(
        &self,
        x: &mut Self::Act,
        n_rows: usize,
        head: &Self::Weight,
        labels: &Self::Ids,
        grad_scale: Option<f32>,
        losses: &mut Self::F32,
    ) -> DeviceResult;

    /// The token of the largest logit of each row, the lowest where several are: `x` is `[n_rows, d]`, `head` `[n_vocab, d]`.
    fn argmax(&self, x: &Self::Act, n_rows: usize, head: &Self::Weight) -> Result<Vec<u32>, DeviceError>;

    // --- what is trained

    /// `grad[e] += sum_t dy[t, i] * x[t, columns[e]]` for each entry `e` of each row `i`; `x` is `[n, d_in]`, `dy` `[n, d_out]`.
    fn gather_dot(
        &self,
        dy: &Self::Act,
        x: &Self::Act,
        n: usize,
        shape: (usize, usize),
        deltas: &mut Deltas<Self>,
    ) -> DeviceResult;

    /// `grad[e] += sum_t dy[t, i]` for each entry `e` of each row `i` of a bias `[d_out, 1]`; `dy` is `[n, d_out]`, rows have one entry
    /// or none. It is [`Device::gather_dot`] with ones for `x`.
    fn bias_grad(&self, dy: &Self::Act, n: usize, d_out: usize, deltas: &mut Deltas<Self>) -> DeviceResult;

    /// `w[i, columns[e]] = round(originals[e] + theta[e])`: the sum in float32, rounded once to the weight's type, as a merge does.
    fn patch(&self, w: &mut Self::Weight, deltas: &Deltas<Self>) -> DeviceResult;

    /// `bias[i] = round(originals[e] + theta[e])` for each entry `e` of each row `i`: the sum in float32, rounded once to the type of the
    /// originals, as a merge does, and widened. Elements without an entry stay. `bias` is `[d_out]`.
    fn patch_bias(&self, bias: &mut Self::F32, deltas: &Deltas<Self>) -> DeviceResult;

    /// The sum of the squares of the first numbers of each buffer, in float64, always in the same order.
    fn sums_of_squares(&self, of: &[(&Self::F32, usize)]) -> Result<Vec<f64>, DeviceError>;

    /// One step of AdamW on `theta` with the gradient, in float32, in PyTorch's order of operations.
    ///
    /// Source: Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>.
    fn adamw(&self, deltas: &mut Deltas<Self>, step: AdamW) -> DeviceResult;
}
