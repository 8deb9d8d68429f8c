//! Kernels of the trainer's passes that process each token independently: `passes.cu` and `head.cu`.
//!
//! Activations are bytes of one dtype, BF16, F16 or F32; `n` is a number of tokens, and buffers may be longer than `n`
//! tokens. All functions panic if buffers are shorter, or belong to another queue; all return the driver's errors.

use super::{
    DeviceVec, Queue,
    kernels::{Arg, blocks_for, bytes_of, memory, small},
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Bytes of shared memory for the sums of a block.
const SHARED_SUMS: u32 = 8 * 8;
/// Maximum number of blocks in the first dimension of a grid.
const MAX_BLOCKS: usize = (1 << 31) - 1;

/// The heads of an attention layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadShape {
    /// Query heads.
    pub n_q: usize,
    /// Key and value heads; divides `n_q`.
    pub n_kv: usize,
    /// Width of a head; even.
    pub d_head: usize,
}

impl HeadShape {
    /// Row width of a token: queries, keys and values.
    pub fn d_qkv(self) -> usize {
        (self.n_q + 2 * self.n_kv) * self.d_head
    }

    pub(super) fn args(self) -> [Arg; 3] {
        [small(self.n_q), small(self.n_kv), small(self.d_head)]
    }
}

/// Rows on the device with `d` elements of `dtype` each.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// The elements.
    pub bytes: &'a DeviceVec<u8>,
    /// Their dtype.
    pub dtype: Dtype,
    /// Elements per row.
    pub d: usize,
}

/// The kernel for a dtype.
macro_rules! of_type {
    ($name:literal, $dtype:expr) => {
        [concat!($name, "_bf16"), concat!($name, "_f16"), concat!($name, "_f32")]
            [$crate::gpu::launch::kernels::type_code($dtype) as usize]
    };
}
pub(super) use of_type;

impl Queue {
    /// The argument for `n` rows of `d` elements, after checking the length.
    pub(super) fn checked_rows(&self, matrix: &DeviceVec<u8>, dtype: Dtype, n: usize, d: usize) -> Arg {
        self.owns(matrix);
        let n_bytes = n.checked_mul(d).and_then(|n| n.checked_mul(bytes_of(dtype)));
        assert!(n_bytes.is_some_and(|n_bytes| n_bytes <= matrix.len), "the buffer has n rows");
        memory(matrix)
    }

    /// The argument for `n` values, after checking the length.
    pub(super) fn has<T>(&self, numbers: &DeviceVec<T>, n: usize) -> Arg {
        self.owns(numbers);
        assert!(n <= numbers.len, "the buffer has n values");
        memory(numbers)
    }

    /// `y = x / sqrt(mean(x^2) + eps) * gain`, for rows `[n, d]`.
    pub fn rms_norm(
        &self,
        x: Matrix<'_>,
        n: usize,
        gain: &DeviceVec<f32>,
        eps: f32,
        y: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let Matrix { bytes, dtype, d } = x;
        let (x, y) = (self.checked_rows(bytes, dtype, n, d), self.checked_rows(y, dtype, n, d));
        let args = &mut [x, self.has(gain, d), y, small(d), Arg::F32(eps)];
        // SAFETY: passes.cu takes these in this order and accesses `n` rows and one gain: the lengths are asserted.
        unsafe { self.launch("passes", of_type!("rms_norm", dtype), (blocks(n), 1), SHARED_SUMS, args) }
    }

    /// The backward pass of [`Self::rms_norm`]: adds the gradient with respect to `x` to `dx`, given `dy`.
    pub fn rms_norm_backward(
        &self,
        dy: &DeviceVec<u8>,
        x: Matrix<'_>,
        n: usize,
        gain: &DeviceVec<f32>,
        eps: f32,
        dx: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let Matrix { bytes, dtype, d } = x;
        let [dy, x, dx] = [dy, bytes, &*dx].map(|rows| self.checked_rows(rows, dtype, n, d));
        let args = &mut [dy, x, self.has(gain, d), dx, small(d), Arg::F32(eps)];
        // SAFETY: as in `rms_norm`.
        unsafe { self.launch("passes", of_type!("rms_norm_back", dtype), (blocks(n), 1), SHARED_SUMS, args) }
    }

    /// The norm of each query and key head, in place: `qkv` is `[n, d_qkv]`, the gains are `[d_head]`.
    pub fn head_norm(
        &self,
        qkv: &mut DeviceVec<u8>,
        dtype: Dtype,
        n: usize,
        heads: HeadShape,
        [q_gain, k_gain]: [&DeviceVec<f32>; 2],
        eps: f32,
    ) -> Result<(), GpuError> {
        let gains = [q_gain, k_gain].map(|gain| self.has(gain, heads.d_head));
        let qkv = self.checked_rows(qkv, dtype, n, heads.d_qkv());
        let ([q_gain, k_gain], [n_q, n_kv, d_head]) = (gains, heads.args());
        let args = &mut [qkv, q_gain, k_gain, small(n), n_q, n_kv, d_head, Arg::F32(eps)];
        // SAFETY: passes.cu takes these in this order and accesses `n` tokens and the gains: the lengths are asserted.
        unsafe { self.launch("passes", of_type!("head_norm", dtype), (warps(n, heads), 1), 0, args) }
    }

    /// The backward pass of [`Self::head_norm`], in place: `dqkv` is the gradient with respect to its output, then to
    /// its input `raw`.
    #[expect(clippy::too_many_arguments, reason = "the kernel's arguments")]
    pub fn head_norm_backward(
        &self,
        dqkv: &mut DeviceVec<u8>,
        raw: &DeviceVec<u8>,
        dtype: Dtype,
        n: usize,
        heads: HeadShape,
        [q_gain, k_gain]: [&DeviceVec<f32>; 2],
        eps: f32,
    ) -> Result<(), GpuError> {
        let gains = [q_gain, k_gain].map(|gain| self.has(gain, heads.d_head));
        let [dqkv, raw] = [&*dqkv, raw].map(|rows| self.checked_rows(rows, dtype, n, heads.d_qkv()));
        let ([q_gain, k_gain], [n_q, n_kv, d_head]) = (gains, heads.args());
        let args = &mut [dqkv, raw, q_gain, k_gain, small(n), n_q, n_kv, d_head, Arg::F32(eps)];
        // SAFETY: as in `head_norm`.
        unsafe { self.launch("passes", of_type!("head_norm_back", dtype), (warps(n, heads), 1), 0, args) }
    }

    /// Rotary embedding of each query and key head, in place: rotates by `frequencies[i] * position` radians,
    /// backwards if `inverse`; `qkv` is `[n, d_qkv]`, and there are `d_head / 2` frequencies.
    #[expect(clippy::too_many_arguments, reason = "the kernel's arguments")]
    pub fn rope(
        &self,
        qkv: &mut DeviceVec<u8>,
        dtype: Dtype,
        positions: &DeviceVec<u32>,
        n: usize,
        heads: HeadShape,
        frequencies: &DeviceVec<f32>,
        inverse: bool,
    ) -> Result<(), GpuError> {
        let half = heads.d_head / 2;
        assert!(heads.d_head == 2 * half && half > 0, "one frequency per pair of elements");
        let qkv = self.checked_rows(qkv, dtype, n, heads.d_qkv());
        let (positions, frequencies) = (self.has(positions, n), self.has(frequencies, half));
        let [n_q, n_kv, d_head] = heads.args();
        let args = &mut [qkv, positions, frequencies, small(n), n_q, n_kv, d_head, Arg::U32(inverse.into())];
        let n_blocks = blocks((n * half).div_ceil(256));
        // SAFETY: passes.cu takes these in this order and accesses `n` tokens: the lengths are asserted.
        unsafe { self.launch("passes", of_type!("rope", dtype), (n_blocks, 1), 0, args) }
    }

    /// `h = silu(gate) * up`; `gate_up` is `[n, 2 * d_ff]` (`[gate | up]`), `h` `[n, d_ff]`.
    pub fn swiglu(
        &self,
        gate_up: &DeviceVec<u8>,
        dtype: Dtype,
        n: usize,
        d_ff: usize,
        h: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let (gate_up, h) = (self.checked_rows(gate_up, dtype, n, 2 * d_ff), self.checked_rows(h, dtype, n, d_ff));
        let args = &mut [gate_up, h, small(n), small(d_ff)];
        // SAFETY: passes.cu takes these in this order and accesses `n` tokens: the lengths are asserted.
        unsafe { self.launch("passes", of_type!("swiglu", dtype), (blocks_for(n * d_ff), 1), 0, args) }
    }

    /// The backward pass of [`Self::swiglu`]: the gradient with respect to `gate_up`, given `dh`.
    pub fn swiglu_backward(
        &self,
        dh: &DeviceVec<u8>,
        gate_up: &DeviceVec<u8>,
        dtype: Dtype,
        n: usize,
        d_ff: usize,
        d_gate_up: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let [gate_up, d_gate_up] = [gate_up, &*d_gate_up].map(|rows| self.checked_rows(rows, dtype, n, 2 * d_ff));
        let args = &mut [self.checked_rows(dh, dtype, n, d_ff), gate_up, d_gate_up, small(n), small(d_ff)];
        // SAFETY: as in `swiglu`.
        unsafe { self.launch("passes", of_type!("swiglu_back", dtype), (blocks_for(n * d_ff), 1), 0, args) }
    }

    /// Sets every row of `y`, `[n, d]`, to `bias`, or adds `bias` to it.
    pub fn add_bias(
        &self,
        bias: &DeviceVec<f32>,
        (y, dtype): (&mut DeviceVec<u8>, Dtype),
        accumulate: bool,
        n: usize,
        d: usize,
    ) -> Result<(), GpuError> {
        let (bias, y) = (self.has(bias, d), self.checked_rows(y, dtype, n, d));
        let args = &mut [bias, y, Arg::U32(accumulate.into()), small(n), small(d)];
        // SAFETY: passes.cu takes these in this order and accesses `n` rows: the lengths are asserted.
        unsafe { self.launch("passes", of_type!("add_bias", dtype), (blocks_for(n * d), 1), 0, args) }
    }

    /// `y[i] = table[rows[i]]` for the first `n_rows` of `rows`; zero if the table, of `n_table` rows, has no such
    /// row.
    pub fn take_rows(
        &self,
        table: Matrix<'_>,
        n_table: usize,
        rows: &DeviceVec<u32>,
        n_rows: usize,
        y: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let Matrix { bytes, dtype, d } = table;
        let (table, y) = (self.checked_rows(bytes, dtype, n_table, d), self.checked_rows(y, dtype, n_rows, d));
        let (name, n_units) = units(["take_rows_wide", "take_rows_narrow"], d * bytes_of(dtype));
        let args = &mut [table, self.has(rows, n_rows), y, small(n_table), small(n_units)];
        // SAFETY: passes.cu takes these in this order, reads only rows below `n_table` and writes `n_rows`: the
        // lengths are asserted.
        unsafe { self.launch("passes", name, (blocks(n_rows), 1), 0, args) }
    }

    /// `x[rows[i]] = y[i]` for the first `n_rows` of `rows`; `x` is `[n, d]`, and rows outside it are skipped.
    pub fn put_rows(
        &self,
        y: Matrix<'_>,
        rows: &DeviceVec<u32>,
        n_rows: usize,
        n: usize,
        x: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        let Matrix { bytes, dtype, d } = y;
        let (y, x) = (self.checked_rows(bytes, dtype, n_rows, d), self.checked_rows(x, dtype, n, d));
        let (name, n_units) = units(["put_rows_wide", "put_rows_narrow"], d * bytes_of(dtype));
        let args = &mut [y, self.has(rows, n_rows), x, small(n), small(n_units)];
        // SAFETY: passes.cu takes these in this order, and writes only rows below `n`: the lengths are asserted.
        unsafe { self.launch("passes", name, (blocks(n_rows), 1), 0, args) }
    }

    /// `losses[first + i] = log(sum(exp(logits[i]))) - logits[i, labels[first + i]]` for `n` rows of `logits`,
    /// `[n, n_vocab]`, and optionally the gradient of `grad_scale` times their sum.
    #[expect(clippy::too_many_arguments, reason = "the kernel's arguments")]
    pub fn cross_entropy(
        &self,
        logits: &DeviceVec<f32>,
        n_vocab: usize,
        labels: &DeviceVec<u32>,
        (first, n): (usize, usize),
        grad_scale: f32,
        d_logits: Option<(&mut DeviceVec<u8>, Dtype)>,
        losses: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let dtype = d_logits.as_ref().map_or(Dtype::F32, |(_, dtype)| *dtype);
        self.has(labels, first + n);
        self.has(losses, first + n);
        let (labels, losses) = (labels.at + 4 * first as u64, losses.at + 4 * first as u64);
        let gradient = d_logits.map_or(Arg::U64(0), |(rows, dtype)| self.checked_rows(rows, dtype, n, n_vocab));
        let logits = self.has(logits, n * n_vocab);
        let args = &mut [logits, Arg::U64(labels), Arg::U64(losses), Arg::F32(grad_scale), gradient, small(n_vocab)];
        // SAFETY: head.cu takes these in this order; it accesses `n` rows, labels and losses, with the lengths
        // asserted, and in each row the label's column if the row has it.
        unsafe { self.launch("head", of_type!("cross_entropy", dtype), (blocks(n), 1), SHARED_SUMS, args) }
    }

    /// `tokens[i]` is the column of the largest of `logits[i]`, the lowest on ties; `logits` is `[n, n_vocab]`.
    pub fn argmax_rows(
        &self,
        logits: &DeviceVec<f32>,
        n: usize,
        n_vocab: usize,
        tokens: &mut DeviceVec<u32>,
    ) -> Result<(), GpuError> {
        let args = &mut [self.has(logits, n * n_vocab), self.has(tokens, n), small(n_vocab)];
        // SAFETY: head.cu takes these in this order and accesses `n` rows: the lengths are asserted.
        unsafe { self.launch("head", "argmax_rows", (blocks(n), 1), SHARED_SUMS, args) }
    }
}

fn blocks(n: usize) -> u32 {
    assert!(n <= MAX_BLOCKS, "at most {MAX_BLOCKS} blocks");
    n as u32
}

/// Number of blocks of eight warps, with one warp per query or key head.
fn warps(n: usize, heads: HeadShape) -> u32 {
    blocks((n * (heads.n_q + heads.n_kv)).div_ceil(8))
}

/// Rows in units of 16 or 2 bytes, and the kernel for that unit.
fn units([wide, narrow]: [&'static str; 2], row_bytes: usize) -> (&'static str, usize) {
    if row_bytes.is_multiple_of(16) { (wide, row_bytes / 16) } else { (narrow, row_bytes / 2) }
}
