//! Kernels of attention: `attention.cu`, and on tensor cores `attention_mma.cuh`, for 16-bit types and the widths of heads that most
//! models have.
//!
//! Every function's errors are the driver's. Every function panics where memory is shorter than the shapes say, or belongs to another
//! queue. What `starts` and `past` hold on the device is not checked: the kernels cut it to what is there.

use super::{
    DeviceVec, HeadShape, Queue,
    kernels::{Arg, MAX_GRID_Y, blocks_for, small},
    passes::of_type,
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Tokens of a block of the plain kernels: one for each warp.
const TOKENS: usize = 8;
/// Threads of a block of the kernels on tensor cores.
const MMA_THREADS: u32 = 128;
/// Keys of a block on the way back, and queries of one that makes their gradient.
const MMA_ROWS_BACK: usize = 64;
/// The widest row of which 128 fit 32 bits.
const MAX_MMA_WIDTH: usize = 1 << 24;

/// The kernels on tensor cores of a type and a width of heads.
struct Mma {
    file: &'static str,
    /// Forward, the gradient by queries, the gradient by keys and values.
    names: [&'static str; 3],
    /// Queries of a block of the first.
    rows: usize,
    /// Rows of a tile of each.
    tiles: [usize; 3],
}

/// As the files `attention_<d>.cu` have them.
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

    /// Bytes of shared memory of each kernel: tiles of so many rows, 8 elements longer than a head, and on the last way four rows of
    /// floats.
    fn shared(&self, d_head: usize) -> [u32; 3] {
        let tiles = |own: usize, others: usize| (own + 4 * others) * (d_head + 8) * 2;
        let [forward, dq, dkv] = self.tiles;
        let all = [
            tiles(self.rows, forward),
            tiles(2 * MMA_ROWS_BACK, dq),
            tiles(2 * MMA_ROWS_BACK, dkv) + 4 * dkv * size_of::<f32>(),
        ];
        all.map(|n_bytes| n_bytes as u32)
    }
}

fn is_aligned<T>(memory: &DeviceVec<T>) -> bool {
    memory.at.is_multiple_of(16)
}

/// Causal attention inside each of several examples, which lie end to end.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Query head `h` reads key head `h / (n_q / n_kv)`; `d_head` is at most 256.
    pub heads: HeadShape,
    /// The type of activations: BF16, F16 or F32.
    pub dtype: Dtype,
    /// `[n_examples + 1]`: where each example begins, and where the last one ends, at `n`.
    pub starts: &'a DeviceVec<u32>,
    /// Examples.
    pub n_examples: usize,
    /// Tokens in all.
    pub n: usize,
    /// Whether the plain kernels work even where tensor cores could.
    pub is_plain: bool,
}

impl Attention<'_> {
    /// The widest head.
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

    /// `[starts, n_examples, n]`, once the shapes are seen to make sense.
    fn args(&self, queue: &Queue) -> [Arg; 3] {
        let HeadShape { n_q, n_kv, d_head } = self.heads;
        assert!(n_kv > 0 && n_q % n_kv == 0, "as many query heads for each key head");
        assert!((1..=Self::MAX_HEAD).contains(&d_head), "heads are at most {} wide", Self::MAX_HEAD);
        assert!(n_q <= MAX_GRID_Y as usize, "at most {MAX_GRID_Y} heads");
        assert!(self.n_examples > 0 && u32::try_from(self.heads.d_qkv()).is_ok(), "shapes on a device fit 32 bits");
        [queue.has(self.starts, self.n_examples + 1), small(self.n_examples), small(self.n)]
    }

    /// The kernels on tensor cores, where they take the shapes and these rows.
    fn mma(&self, rows: &[&DeviceVec<u8>]) -> Option<Mma> {
        let mma = Mma::of(self.dtype, self.heads.d_head).filter(|_| !self.is_plain)?;
        let fits = self.heads.d_qkv() <= MAX_MMA_WIDTH && self.slots(MMA_ROWS_BACK) <= MAX_GRID_Y as usize;
        (fits && rows.iter().all(|rows| is_aligned(rows))).then_some(mma)
    }

    /// Runs of `size` tokens, each of one example, and a few that are none: see `run_of` in `spans.cuh`.
    fn slots(&self, size: usize) -> usize {
        self.n / size + self.n_examples
    }

    /// Blocks of the kernels on tensor cores.
    fn mma_grid(&self, n_heads: usize, size: usize) -> (u32, u32) {
        (n_heads as u32, self.slots(size) as u32)
    }

    /// Blocks of the plain kernels, for one of so many heads each.
    fn grid(&self, n_heads: usize) -> (u32, u32) {
        (self.n.div_ceil(TOKENS) as u32, n_heads as u32)
    }

    /// Bytes of so many rows of floats for each warp.
    fn shared(&self, n_rows: usize) -> u32 {
        (4 * TOKENS * n_rows * self.heads.d_head) as u32
    }
}

impl Queue {
    /// Attends: `qkv` is `[n, d_qkv]`, `out` `[n, n_q * d_head]`, `lse` `[n, n_q]`: the natural logarithm of each softmax's denominator,
    /// for the way back. No other memory is needed.
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

    /// The gradient by `qkv`, given that by `out`: shapes of [`Self::attention`], whose `out` and `lse` these are. `delta` is for use
    /// within, `[n, n_q]`, of any value.
    #[expect(clippy::too_many_arguments, reason = "what the way there left, and what the way back gives")]
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
        let outs = || [dout, out].map(|rows| self.has_rows(rows, of.dtype, of.n, of.d_q()));
        let ([dout, out], room) = (outs(), self.has(delta, of.n * n_q));
        let args = &mut [dout, out, small(of.n), small(n_q), small(d_head), room];
        // SAFETY: attention.cu takes these in this order; it reads `n` rows of both and writes a sum for each head: the lengths
        // asserted.
        unsafe { self.launch("attention", of_type!("attention_delta", of.dtype), of.grid(n_q), 0, args) }?;
        let args = |is_plain: bool| {
            let rows = [qkv, &*dqkv].map(|rows| self.has_rows(rows, of.dtype, of.n, of.heads.d_qkv()));
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
            let grid = |n_heads| of.mma_grid(n_heads, MMA_ROWS_BACK);
            // SAFETY: attention_mma.cuh takes what attention.cu does below, without the width of heads, which the name has, and does the
            // same; rows begin at multiples of 16 bytes, and the grid and the shared memory are what it asks for.
            unsafe { self.launch_blocks(mma.file, dq, grid(n_q), (MMA_THREADS, shared_dq), &mut args(false)) }?;
            // SAFETY: as above.
            return unsafe {
                self.launch_blocks(mma.file, dkv, grid(n_kv), (MMA_THREADS, shared_dkv), &mut args(false))
            };
        }
        let (dq, dkv) = (of_type!("attention_dq", of.dtype), of_type!("attention_dkv", of.dtype));
        // SAFETY: attention.cu takes these in this order. A warp has a token and a head, reads rows of the token's example, which lies
        // within the `n` tokens whatever `starts` holds, and writes the head's part of the token's row: the lengths asserted.
        unsafe { self.launch("attention", dq, of.grid(n_q), of.shared(2), &mut args(true)) }?;
        // SAFETY: as above.
        unsafe { self.launch("attention", dkv, of.grid(n_kv), of.shared(2), &mut args(true)) }
    }

    /// Attention of sequences that go on: their new tokens lie in `qkv`, what came before in `cache`, `[n_examples, capacity, 2 * n_kv *
    /// d_head]` (`[k | v]`), of which the first `past[i]` rows of example `i` are filled; `past` is `[n_examples]`. The new keys and
    /// values are appended. A token beyond the capacity is left out, and its row of `out` as it was.
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
        let n_rows = of.n_examples.checked_mul(capacity).expect("a cache fits memory");
        let cached = || {
            let cache = self.has_rows(cache, of.dtype, n_rows, 2 * d_kv);
            [self.has(past, of.n_examples), cache, small(capacity)]
        };
        let ([starts, n_examples, n], [of_past, to, most]) = (of.args(self), cached());
        let from = self.has_rows(qkv, of.dtype, of.n, of.heads.d_qkv());
        let args = &mut [from, starts, n_examples, n, small(d_q), small(d_kv), of_past, to, most];
        let blocks = blocks_for(of.n * 2 * d_kv);
        // SAFETY: attention.cu takes these in this order; it reads rows of `n` tokens and writes rows below the capacity of an example's
        // part of the cache, whatever `starts` and `past` hold: the lengths asserted.
        unsafe { self.launch("attention", of_type!("attention_append", of.dtype), (blocks, 1), 0, args) }?;
        let mma = of.mma(&[qkv, cache, out]);
        self.attend(of, mma, qkv, cached(), out, Arg::U64(0))
    }

    /// Attends to the keys of `qkv`, or, where `[past, cache, capacity]` are no nulls, to those in a cache.
    fn attend(
        &self,
        of: &Attention<'_>,
        mma: Option<Mma>,
        qkv: &DeviceVec<u8>,
        [past, cache, capacity]: [Arg; 3],
        out: &mut DeviceVec<u8>,
        lse: Arg,
    ) -> Result<(), GpuError> {
        let qkv = self.has_rows(qkv, of.dtype, of.n, of.heads.d_qkv());
        let out = self.has_rows(out, of.dtype, of.n, of.d_q());
        let ([starts, n_examples, n], [n_q, n_kv, d_head]) = (of.args(self), of.heads.args());
        let mut args = vec![qkv, starts, n_examples, n, n_q, n_kv];
        args.extend(mma.is_none().then_some(d_head));
        args.extend([of.scale(), past, cache, capacity, out, lse]);
        if let Some(mma) = mma {
            let ([name, ..], [shared, ..]) = (mma.names, mma.shared(of.heads.d_head));
            let grid = of.mma_grid(of.heads.n_q, mma.rows);
            // SAFETY: attention_mma.cuh takes what attention.cu does below, without the width of heads, which the name has, and does the
            // same; rows begin at multiples of 16 bytes, and the grid and the shared memory are what it asks for.
            return unsafe { self.launch_blocks(mma.file, name, grid, (MMA_THREADS, shared), &mut args) };
        }
        let (name, grid) = (of_type!("attention", of.dtype), of.grid(of.heads.n_q));
        // SAFETY: attention.cu takes these in this order. A warp has a token and a head, reads rows of the token's example, which lies
        // within the `n` tokens whatever `starts` holds, or rows below the capacity of its part of the cache, and writes the head's
        // part of the token's row: the lengths asserted here and by the callers.
        unsafe { self.launch("attention", name, grid, of.shared(1), &mut args) }
    }
}
