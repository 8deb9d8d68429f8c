//! Kernels of attention: `attention.cu`.
//!
//! Every function's errors are the driver's. Every function panics where memory is shorter than the shapes say, or belongs to another
//! queue. What `starts` and `past` hold on the device is not checked: the kernels cut it to what is there.

use super::{
    DeviceVec, HeadShape, Queue,
    kernels::{Arg, MOST_GRID_Y, blocks_for, small},
    passes::of_type,
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Tokens of a block of the plain kernels: one for each warp.
const TOKENS: usize = 8;

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
    pub const MOST_HEAD: usize = 256;

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
        assert!((1..=Self::MOST_HEAD).contains(&d_head), "heads are at most {} wide", Self::MOST_HEAD);
        assert!(n_q <= MOST_GRID_Y as usize, "at most {MOST_GRID_Y} heads");
        assert!(self.n_examples > 0 && u32::try_from(self.heads.d_qkv()).is_ok(), "shapes on a device fit 32 bits");
        [queue.has(self.starts, self.n_examples + 1), small(self.n_examples), small(self.n)]
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
        let lse = self.has(lse, of.n * of.heads.n_q);
        self.attend(of, qkv, [Arg::U64(0), Arg::U64(0), Arg::U32(0)], out, lse)
    }

    /// The gradient by `qkv`, given that by `out`: shapes of [`Self::attention`], whose `out` and `lse` these are. `delta` is for use
    /// within, `[n, n_q]`, of any value.
    #[expect(clippy::too_many_arguments, reason = "what the way there left, and what the way back gives")]
    pub fn attention_back(
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
        let outs = || [dout, out].map(|rows| self.has_rows(rows, of.dtype, of.n, of.d_q()));
        let ([dout, out], room) = (outs(), self.has(delta, of.n * n_q));
        let args = &mut [dout, out, small(of.n), small(n_q), small(d_head), room];
        // SAFETY: attention.cu takes these in this order; it reads `n` rows of both and writes a sum for each head: the lengths
        // asserted.
        unsafe { self.launch("attention", of_type!("attention_delta", of.dtype), of.grid(n_q), 0, args) }?;
        let args = || {
            let rows = [qkv, &*dqkv].map(|rows| self.has_rows(rows, of.dtype, of.n, of.heads.d_qkv()));
            let ([qkv, dqkv], [dout, _]) = (rows, outs());
            let sums = [lse, &*delta].map(|sums| self.has(sums, of.n * n_q));
            let ([lse, delta], [starts, n_examples, n], [n_q, n_kv, d_head]) = (sums, of.args(self), of.heads.args());
            [qkv, dout, lse, delta, starts, n_examples, n, n_q, n_kv, d_head, of.scale(), dqkv]
        };
        // SAFETY: attention.cu takes these in this order. A warp has a token and a head, reads rows of the token's example, which lies
        // within the `n` tokens whatever `starts` holds, and writes the head's part of the token's row: the lengths asserted.
        unsafe {
            self.launch("attention", of_type!("attention_dq", of.dtype), of.grid(n_q), of.shared(2), &mut args())
        }?;
        // SAFETY: as above.
        unsafe {
            self.launch("attention", of_type!("attention_dkv", of.dtype), of.grid(n_kv), of.shared(2), &mut args())
        }
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
        self.attend(of, qkv, cached(), out, Arg::U64(0))
    }

    /// Attends to the keys of `qkv`, or, where `[past, cache, capacity]` are no nulls, to those in a cache.
    fn attend(
        &self,
        of: &Attention<'_>,
        qkv: &DeviceVec<u8>,
        [past, cache, capacity]: [Arg; 3],
        out: &mut DeviceVec<u8>,
        lse: Arg,
    ) -> Result<(), GpuError> {
        let qkv = self.has_rows(qkv, of.dtype, of.n, of.heads.d_qkv());
        let out = self.has_rows(out, of.dtype, of.n, of.d_q());
        let ([starts, n_examples, n], [n_q, n_kv, d_head]) = (of.args(self), of.heads.args());
        let grid = of.grid(of.heads.n_q);
        let args = &mut [qkv, starts, n_examples, n, n_q, n_kv, d_head, of.scale(), past, cache, capacity, out, lse];
        // SAFETY: attention.cu takes these in this order. A warp has a token and a head, reads rows of the token's example, which lies
        // within the `n` tokens whatever `starts` holds, or rows below the capacity of its part of the cache, and writes the head's
        // part of the token's row: the lengths asserted here and by the callers.
        unsafe { self.launch("attention", of_type!("attention", of.dtype), grid, of.shared(1), args) }
    }
}
