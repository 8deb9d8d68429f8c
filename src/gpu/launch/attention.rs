//! Attention kernels: `attention.cu`, and `attention_mma.cuh` on tensor cores, for 16-bit dtypes and the head widths
//! of most models.
//!
//! All functions return the driver's errors. All functions panic if memory is shorter than the shapes require, or
//! belongs to another queue. The contents of `starts` and `past` on the device are not checked: the kernels clamp them
//! to the valid range.

use super::{
    DeviceVec, HeadShape, Queue,
    kernels::{Arg, MAX_GRID_Y, blocks_for, small},
    passes::of_type,
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Tokens per block of the plain kernels: one per warp.
const TOKENS: usize = 8;
/// Threads per block of the tensor core kernels.
const MMA_THREADS: u32 = 128;
/// Keys per block in the backward pass, and queries per block of the query gradient.
const MMA_ROWS_BACKWARD: usize = 64;
/// The widest row of which 128 are addressable with 32 bits.
const MAX_MMA_WIDTH: usize = 1 << 24;

/// The tensor core kernels for a dtype and a head width.
struct Mma {
    file: &'static str,
    /// Forward, the query gradient, the key and value gradient.
    names: [&'static str; 3],
    /// Queries per block of the first kernel.
    rows: usize,
    /// Rows per tile of each kernel.
    tiles: [usize; 3],
}

/// The kernel names in the files `attention_<d>.cu`.
macro_rules! mma {
    ($type:literal, $d:literal, $rows:literal, $tiles:expr) => {
        Mma {
            file: concat!("attention_", $d),
            names: [
                concat!("attention_mma_", $type, "_", $d),
                concat!("attention_dq_mma_", $type, "_", $d),
                concat!("attention_dkv_mma_", $type, "_", $d),
            ],
            rows: $rows,
            tiles: $tiles,
        }
    };
}

impl Mma {
    fn of(dtype: Dtype, d_head: usize) -> Option<Self> {
        Some(match (dtype, d_head) {
            (Dtype::BF16, 64) => mma!("bf16", 64, 128, [64, 64, 64]),
            (Dtype::BF16, 80) => mma!("bf16", 80, 128, [32, 32, 32]),
            (Dtype::BF16, 96) => mma!("bf16", 96, 128, [32, 32, 32]),
            (Dtype::BF16, 128) => mma!("bf16", 128, 128, [32, 32, 32]),
            (Dtype::F16, 64) => mma!("f16", 64, 128, [64, 64, 64]),
            (Dtype::F16, 80) => mma!("f16", 80, 128, [32, 32, 32]),
            (Dtype::F16, 96) => mma!("f16", 96, 128, [32, 32, 32]),
            (Dtype::F16, 128) => mma!("f16", 128, 128, [32, 32, 32]),
            _ => return None,
        })
    }

    /// Bytes of shared memory of each kernel: tiles with rows padded by 8 elements, and for the last kernel four rows
    /// of floats.
    fn shared(&self, d_head: usize) -> [u32; 3] {
        let tiles = |own: usize, others: usize| (own + 4 * others) * (d_head + 8) * 2;
        let [forward, dq, dkv] = self.tiles;
        let all = [
            tiles(self.rows, forward),
            tiles(2 * MMA_ROWS_BACKWARD, dq),
            tiles(2 * MMA_ROWS_BACKWARD, dkv) + 4 * dkv * size_of::<f32>(),
        ];
        all.map(|n_bytes| n_bytes as u32)
    }
}

fn is_aligned<T>(memory: &DeviceVec<T>) -> bool {
    memory.at.is_multiple_of(16)
}

/// Causal attention within each of several packed examples.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Query head `h` reads key head `h / (n_q / n_kv)`; `d_head` is at most 256.
    pub heads: HeadShape,
    /// The dtype of activations: BF16, F16 or F32.
    pub dtype: Dtype,
    /// `[n_examples + 1]`: the start of each example, then `n`, the end of the last one.
    pub starts: &'a DeviceVec<u32>,
    /// Number of examples.
    pub n_examples: usize,
    /// Total number of tokens.
    pub n: usize,
    /// Whether to use the plain kernels even where tensor cores could be used.
    pub is_plain: bool,
}

impl Attention<'_> {
    /// The maximum head width.
    pub const MAX_HEAD: usize = 256;

    fn scale(&self) -> Arg {
        Arg::F32(1.0 / (self.heads.d_head as f32).sqrt())
    }

    fn d_q(&self) -> usize {
        self.heads.n_q * self.heads.d_head
    }

    fn d_kv(&self) -> usize {
        self.heads.n_kv * self.heads.d_head
    }

    /// The arguments `[starts, n_examples, n]`, after checking the shapes.
    fn args(&self, queue: &Queue) -> [Arg; 3] {
        let HeadShape { n_q, n_kv, d_head } = self.heads;
        assert!(n_kv > 0 && n_q % n_kv == 0, "n_q is a multiple of n_kv");
        assert!((1..=Self::MAX_HEAD).contains(&d_head), "heads are at most {} wide", Self::MAX_HEAD);
        assert!(n_q <= MAX_GRID_Y as usize, "at most {MAX_GRID_Y} heads");
        assert!(self.n_examples > 0 && u32::try_from(self.heads.d_qkv()).is_ok(), "shapes on a device fit 32 bits");
        [queue.has(self.starts, self.n_examples + 1), small(self.n_examples), small(self.n)]
    }

    /// The tensor core kernels, if they support the shapes and the alignment of these rows.
    fn mma(&self, rows: &[&DeviceVec<u8>]) -> Option<Mma> {
        let mma = Mma::of(self.dtype, self.heads.d_head).filter(|_| !self.is_plain)?;
        let fits = self.heads.d_qkv() <= MAX_MMA_WIDTH && self.slots(MMA_ROWS_BACKWARD) <= MAX_GRID_Y as usize;
        (fits && rows.iter().all(|rows| is_aligned(rows))).then_some(mma)
    }

    /// Number of runs of up to `size` tokens, each within one example; a few runs are empty. See `run_of` in
    /// `spans.cuh`.
    fn slots(&self, size: usize) -> usize {
        self.n / size + self.n_examples
    }

    /// The grid of the tensor core kernels.
    fn mma_grid(&self, n_heads: usize, size: usize) -> (u32, u32) {
        (n_heads as u32, self.slots(size) as u32)
    }

    /// The grid of the plain kernels, for one of `n_heads` heads each.
    fn grid(&self, n_heads: usize) -> (u32, u32) {
        (self.n.div_ceil(TOKENS) as u32, n_heads as u32)
    }

    /// Bytes of `n_rows` rows of floats per warp.
    fn shared(&self, n_rows: usize) -> u32 {
        (4 * TOKENS * n_rows * self.heads.d_head) as u32
    }
}

impl Queue {
    /// The forward pass: `qkv` is `[n, d_qkv]`, `out` `[n, n_q * d_head]`, `lse` `[n, n_q]`: the natural log-sum-exp
    /// of each softmax, for the backward pass. Needs no other memory.
    pub fn attention(
        &self,
        of: &Attention<'_>,
        qkv: &DeviceVec<u8>,
        out: &mut DeviceVec<u8>,
        lse: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        if of.n == 0 {
            return Ok(());
        }
        let (lse, mma) = (self.has(lse, of.n * of.heads.n_q), of.mma(&[qkv, out]));
        self.attend(of, mma, qkv, [Arg::U64(0), Arg::U64(0), Arg::U32(0)], out, lse)
    }

    /// The gradient with respect to `qkv`, given `dout`; shapes as in [`Self::attention`], which wrote `out` and
    /// `lse`. `delta` is scratch memory, `[n, n_q]`, with arbitrary content.
    #[expect(clippy::too_many_arguments, reason = "the results of the forward pass, and the gradients")]
    pub fn attention_backward(
        &self,
        of: &Attention<'_>,
        dout: &DeviceVec<u8>,
        qkv: &DeviceVec<u8>,
        out: &DeviceVec<u8>,
        lse: &DeviceVec<f32>,
        delta: &mut DeviceVec<f32>,
        dqkv: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        if of.n == 0 {
            return Ok(());
        }
        let HeadShape { n_q, n_kv, d_head } = of.heads;
        let mma = of.mma(&[dout, qkv, dqkv]);
        let outs = || [dout, out].map(|rows| self.checked_rows(rows, of.dtype, of.n, of.d_q()));
        let ([dout, out], room) = (outs(), self.has(delta, of.n * n_q));
        let args = &mut [dout, out, small(of.n), small(n_q), small(d_head), room];
        // SAFETY: attention.cu takes these in this order; it reads `n` rows of both and writes a sum per head: the
        // lengths are asserted.
        unsafe { self.launch("attention", of_type!("attention_delta", of.dtype), of.grid(n_q), 0, args) }?;
        let args = |is_plain: bool| {
            let rows = [qkv, &*dqkv].map(|rows| self.checked_rows(rows, of.dtype, of.n, of.heads.d_qkv()));
            let ([qkv, dqkv], [dout, _]) = (rows, outs());
            let sums = [lse, &*delta].map(|sums| self.has(sums, of.n * n_q));
            let ([lse, delta], [starts, n_examples, n], [n_q, n_kv, d_head]) = (sums, of.args(self), of.heads.args());
            let mut args = vec![qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv];
            args.extend(is_plain.then_some(d_head));
            args.extend([of.scale(), dqkv]);
            args
        };
        if let Some(mma) = mma {
            let ([_, dq, dkv], [_, shared_dq, shared_dkv]) = (mma.names, mma.shared(d_head));
            let grid = |n_heads| of.mma_grid(n_heads, MMA_ROWS_BACKWARD);
            // SAFETY: attention_mma.cuh takes the same arguments as attention.cu below, except for the head width,
            // which is part of the name, and does the same; rows begin at multiples of 16 bytes, and the grid and the
            // shared memory are as it requires.
            unsafe { self.launch_blocks(mma.file, dq, grid(n_q), (MMA_THREADS, shared_dq), &mut args(false)) }?;
            // SAFETY: as above.
            return unsafe {
                self.launch_blocks(mma.file, dkv, grid(n_kv), (MMA_THREADS, shared_dkv), &mut args(false))
            };
        }
        let (dq, dkv) = (of_type!("attention_dq", of.dtype), of_type!("attention_dkv", of.dtype));
        // SAFETY: attention.cu takes these in this order. A warp processes a token and a head, reads rows of the
        // token's example, which is clamped to the `n` tokens whatever `starts` contains, and writes the head's part
        // of the token's row: the lengths are asserted.
        unsafe { self.launch("attention", dq, of.grid(n_q), of.shared(2), &mut args(true)) }?;
        // SAFETY: as above.
        unsafe { self.launch("attention", dkv, of.grid(n_kv), of.shared(2), &mut args(true)) }
    }

    /// Attention with a key-value cache: the new tokens are in `qkv`, the earlier ones in `cache`,
    /// `[n_examples, capacity, 2 * n_kv * d_head]` (`[k | v]`), of which the first `past[i]` rows of example `i` are
    /// filled; `past` is `[n_examples]`. The new keys and values are appended. A token beyond the capacity is skipped,
    /// and its row of `out` is unchanged.
    pub fn attention_cached(
        &self,
        of: &Attention<'_>,
        qkv: &DeviceVec<u8>,
        past: &DeviceVec<u32>,
        cache: &mut DeviceVec<u8>,
        capacity: usize,
        out: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        if of.n == 0 {
            return Ok(());
        }
        let (d_q, d_kv) = (of.d_q(), of.d_kv());
        let n_rows = of.n_examples.checked_mul(capacity).expect("the size of a cache fits in usize");
        let cached = || {
            let cache = self.checked_rows(cache, of.dtype, n_rows, 2 * d_kv);
            [self.has(past, of.n_examples), cache, small(capacity)]
        };
        let ([starts, n_examples, n], [of_past, to, most]) = (of.args(self), cached());
        let from = self.checked_rows(qkv, of.dtype, of.n, of.heads.d_qkv());
        let args = &mut [from, starts, n_examples, n, small(d_q), small(d_kv), of_past, to, most];
        let blocks = blocks_for(of.n * 2 * d_kv);
        // SAFETY: attention.cu takes these in this order; it reads rows of `n` tokens and writes rows below the
        // capacity of an example's part of the cache, whatever `starts` and `past` contain: the lengths are asserted.
        unsafe { self.launch("attention", of_type!("attention_append", of.dtype), (blocks, 1), 0, args) }?;
        let mma = of.mma(&[qkv, cache, out]);
        self.attend(of, mma, qkv, cached(), out, Arg::U64(0))
    }

    /// Attends to the keys of `qkv` or, if `[past, cache, capacity]` are not null, to those in a cache.
    fn attend(
        &self,
        of: &Attention<'_>,
        mma: Option<Mma>,
        qkv: &DeviceVec<u8>,
        [past, cache, capacity]: [Arg; 3],
        out: &mut DeviceVec<u8>,
        lse: Arg,
    ) -> Result<(), GpuError> {
        let qkv = self.checked_rows(qkv, of.dtype, of.n, of.heads.d_qkv());
        let out = self.checked_rows(out, of.dtype, of.n, of.d_q());
        let ([starts, n_examples, n], [n_q, n_kv, d_head]) = (of.args(self), of.heads.args());
        let mut args = vec![qkv, starts, n_examples, n, n_q, n_kv];
        args.extend(mma.is_none().then_some(d_head));
        args.extend([of.scale(), past, cache, capacity, out, lse]);
        if let Some(mma) = mma {
            let ([name, ..], [shared, ..]) = (mma.names, mma.shared(of.heads.d_head));
            let grid = of.mma_grid(of.heads.n_q, mma.rows);
            // SAFETY: attention_mma.cuh takes the same arguments as attention.cu below, except for the head width,
            // which is part of the name, and does the same; rows begin at multiples of 16 bytes, and the grid and the
            // shared memory are as it requires.
            return unsafe { self.launch_blocks(mma.file, name, grid, (MMA_THREADS, shared), &mut args) };
        }
        let (name, grid) = (of_type!("attention", of.dtype), of.grid(of.heads.n_q));
        // SAFETY: attention.cu takes these in this order. A warp processes a token and a head, reads rows of the
        // token's example, which is clamped to the `n` tokens whatever `starts` contains, or rows below the capacity
        // of its part of the cache, and writes the head's part of the token's row: the lengths are asserted here and
        // by the callers.
        unsafe { self.launch("attention", name, grid, of.shared(1), &mut args) }
    }
}
