//! The operations on the CPU: the plain form that every other device is tested against, and fast enough for small
//! models.
//!
//! Activations are float32. Weights keep their stored dtype and are widened one block of rows at a time ([`weight`]).
//! This costs 1 % of the following product at 1,024 tokens and 3 to 7 % at 256, and halves the memory. The size of
//! each piece of work depends on shapes alone, so every number of threads gives the same bits.

mod attention;
mod loss;
mod rows;
mod sparse;
#[cfg(test)]
mod tests;
mod weight;

use std::sync::Mutex;

pub use weight::CpuWeight;

use super::{
    DeviceError,
    config::{Heads, ModelConfig},
    device::{AdamW, Deltas, Device, DeviceResult, Spans},
};
use crate::tensor::Dtype;

/// The CPU, on the threads of the current rayon pool.
#[derive(Debug, Default)]
pub struct CpuDevice {
    /// Widened rows of the weight in use.
    widened: Mutex<Vec<f32>>,
}

impl CpuDevice {
    /// A device that has allocated nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Scratch bytes of the operations, beyond the model's buffers: widened rows, if weights are narrower than
    /// float32, and the logits of up to `max_supervised` tokens.
    pub fn scratch_bytes(config: &ModelConfig, max_supervised: usize, is_narrow: bool) -> u64 {
        let largest = config.n_vocab.max(2 * config.d_ff).max(config.heads.d_qkv()) * config.d_model;
        let widened = if is_narrow { largest.min(weight::MAX_WIDENED) } else { 0 };
        (widened + loss::n_logits(config.n_vocab, max_supervised)) as u64 * 4
    }
}

impl Device for CpuDevice {
    type Act = Vec<f32>;
    type F32 = Vec<f32>;
    type Ids = Vec<u32>;
    type Weight = CpuWeight;

    fn act_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn act(&self, n: usize) -> Result<Vec<f32>, DeviceError> {
        allocate("activations", n)
    }
    fn zeros(&self, n: usize) -> Result<Vec<f32>, DeviceError> {
        allocate("trainer state", n)
    }
    fn ids(&self, ids: &[u32]) -> Result<Vec<u32>, DeviceError> {
        Ok(ids.to_vec())
    }
    fn weight(&self, dtype: Dtype, d_out: usize, d_in: usize) -> Result<CpuWeight, DeviceError> {
        CpuWeight::zeros(dtype, d_out, d_in)
    }
    fn write_rows(&self, weight: &mut CpuWeight, first_row: usize, bytes: &[u8]) -> DeviceResult {
        weight.write_rows(first_row, bytes);
        Ok(())
    }
    fn write(&self, from: &[f32], to: &mut Vec<f32>) -> DeviceResult {
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn read(&self, from: &Vec<f32>, n: usize) -> Result<Vec<f32>, DeviceError> {
        Ok(from[..n].to_vec())
    }
    fn write_act(&self, from: &[f32], to: &mut Vec<f32>) -> DeviceResult {
        self.write(from, to)
    }
    fn read_act(&self, from: &Vec<f32>, n: usize) -> Result<Vec<f32>, DeviceError> {
        self.read(from, n)
    }
    fn copy(&self, from: &Vec<f32>, from_at: usize, to: &mut Vec<f32>, to_at: usize, n: usize) -> DeviceResult {
        to[to_at..to_at + n].copy_from_slice(&from[from_at..from_at + n]);
        Ok(())
    }
    fn clear(&self, values: &mut Vec<f32>) -> DeviceResult {
        values.fill(0.0);
        Ok(())
    }

    fn embed(&self, ids: &Vec<u32>, n: usize, table: &CpuWeight, x: &mut Vec<f32>) -> DeviceResult {
        table.take_rows(&ids[..n], x);
        Ok(())
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        n: usize,
        w: &CpuWeight,
        bias: Option<&Vec<f32>>,
        accumulate: bool,
        y: &mut Vec<f32>,
    ) -> DeviceResult {
        let beta = match bias {
            None => f32::from(u8::from(accumulate)),
            Some(bias) => {
                rows::start_with(bias, accumulate, &mut y[..n * w.d_out()]);
                1.0
            }
        };
        w.times(x, n, beta, y, &mut self.widened.lock().expect("no thread panics while holding the lock"));
        Ok(())
    }

    fn linear_backward(&self, dy: &Vec<f32>, n: usize, w: &CpuWeight, dx: &mut Vec<f32>) -> DeviceResult {
        w.transposed_times(dy, n, dx, &mut self.widened.lock().expect("no thread panics while holding the lock"));
        Ok(())
    }

    fn rms_norm(&self, x: &Vec<f32>, n: usize, gain: &Vec<f32>, d: usize, eps: f32, y: &mut Vec<f32>) -> DeviceResult {
        rows::rms_norm(&x[..n * d], gain, eps, &mut y[..n * d]);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        n: usize,
        gain: &Vec<f32>,
        d: usize,
        eps: f32,
        dx: &mut Vec<f32>,
    ) -> DeviceResult {
        rows::rms_norm_backward(&dy[..n * d], &x[..n * d], gain, eps, &mut dx[..n * d]);
        Ok(())
    }

    fn head_norm(
        &self,
        qkv: &mut Vec<f32>,
        n: usize,
        heads: Heads,
        q_gain: &Vec<f32>,
        k_gain: &Vec<f32>,
        eps: f32,
    ) -> DeviceResult {
        rows::head_norm(&mut qkv[..n * heads.d_qkv()], heads, [q_gain, k_gain], eps);
        Ok(())
    }

    fn head_norm_backward(
        &self,
        dqkv: &mut Vec<f32>,
        raw: &Vec<f32>,
        n: usize,
        heads: Heads,
        q_gain: &Vec<f32>,
        k_gain: &Vec<f32>,
        eps: f32,
    ) -> DeviceResult {
        let d = n * heads.d_qkv();
        rows::head_norm_backward(&mut dqkv[..d], &raw[..d], heads, [q_gain, k_gain], eps);
        Ok(())
    }

    fn rope(
        &self,
        qkv: &mut Vec<f32>,
        positions: &Vec<u32>,
        n: usize,
        heads: Heads,
        frequencies: &Vec<f32>,
        inverse: bool,
    ) -> DeviceResult {
        rows::rope(&mut qkv[..n * heads.d_qkv()], &positions[..n], heads, frequencies, inverse);
        Ok(())
    }

    fn attention(
        &self,
        qkv: &Vec<f32>,
        spans: &Spans<Self>,
        heads: Heads,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) -> DeviceResult {
        attention::forward(qkv, &spans.starts, heads, out, lse);
        Ok(())
    }

    fn attention_backward(
        &self,
        dout: &Vec<f32>,
        qkv: &Vec<f32>,
        out: &Vec<f32>,
        lse: &Vec<f32>,
        spans: &Spans<Self>,
        heads: Heads,
        dqkv: &mut Vec<f32>,
    ) -> DeviceResult {
        attention::backward(dout, qkv, out, lse, &spans.starts, heads, dqkv);
        Ok(())
    }

    fn attention_cached(
        &self,
        qkv: &Vec<f32>,
        spans: &Spans<Self>,
        past: &[usize],
        heads: Heads,
        cache: &mut Vec<f32>,
        capacity: usize,
        out: &mut Vec<f32>,
    ) -> DeviceResult {
        attention::cached(qkv, &spans.starts, past, heads, cache, capacity, out);
        Ok(())
    }

    fn swiglu(&self, gate_up: &Vec<f32>, n: usize, d_ff: usize, h: &mut Vec<f32>) -> DeviceResult {
        rows::swiglu(&gate_up[..n * 2 * d_ff], d_ff, &mut h[..n * d_ff]);
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dh: &Vec<f32>,
        gate_up: &Vec<f32>,
        n: usize,
        d_ff: usize,
        d_gate_up: &mut Vec<f32>,
    ) -> DeviceResult {
        rows::swiglu_backward(&dh[..n * d_ff], &gate_up[..n * 2 * d_ff], d_ff, &mut d_gate_up[..n * 2 * d_ff]);
        Ok(())
    }

    fn take_rows(&self, x: &Vec<f32>, rows: &Vec<u32>, n_rows: usize, d: usize, y: &mut Vec<f32>) -> DeviceResult {
        for (&row, y) in rows[..n_rows].iter().zip(y.chunks_exact_mut(d)) {
            y.copy_from_slice(&x[row as usize * d..][..d]);
        }
        Ok(())
    }

    fn put_rows(
        &self,
        y: &Vec<f32>,
        rows: &Vec<u32>,
        n_rows: usize,
        d: usize,
        n: usize,
        x: &mut Vec<f32>,
    ) -> DeviceResult {
        x[..n * d].fill(0.0);
        for (&row, y) in rows[..n_rows].iter().zip(y.chunks_exact(d)) {
            x[row as usize * d..][..d].copy_from_slice(y);
        }
        Ok(())
    }

    fn cross_entropy(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        head: &CpuWeight,
        labels: &Vec<u32>,
        grad_scale: Option<f32>,
        losses: &mut Vec<f32>,
    ) -> DeviceResult {
        let widened = &mut self.widened.lock().expect("no thread panics while holding the lock");
        let x = &mut x[..n_rows * head.d_in()];
        loss::cross_entropy(x, head, &labels[..n_rows], grad_scale, &mut losses[..n_rows], widened);
        Ok(())
    }

    fn argmax(&self, x: &Vec<f32>, n_rows: usize, head: &CpuWeight) -> Result<Vec<u32>, DeviceError> {
        let widened = &mut self.widened.lock().expect("no thread panics while holding the lock");
        Ok(loss::argmax(&x[..n_rows * head.d_in()], head, widened))
    }

    fn gather_dot(
        &self,
        dy: &Vec<f32>,
        x: &Vec<f32>,
        n: usize,
        (d_out, d_in): (usize, usize),
        deltas: &mut Deltas<Self>,
    ) -> DeviceResult {
        sparse::gather_dot(&dy[..n * d_out], &x[..n * d_in], n, &deltas.offsets, &deltas.columns, &mut deltas.grad);
        Ok(())
    }

    fn bias_grad(&self, dy: &Vec<f32>, n: usize, d_out: usize, deltas: &mut Deltas<Self>) -> DeviceResult {
        sparse::sum_tokens(&dy[..n * d_out], d_out, &deltas.offsets, &mut deltas.grad);
        Ok(())
    }

    fn patch(&self, w: &mut CpuWeight, deltas: &Deltas<Self>) -> DeviceResult {
        w.patch(&deltas.offsets, &deltas.columns, &deltas.originals, &deltas.theta);
        Ok(())
    }

    fn patch_bias(&self, bias: &mut Vec<f32>, deltas: &Deltas<Self>) -> DeviceResult {
        deltas.originals.patched(&deltas.offsets, &deltas.theta, bias);
        Ok(())
    }

    fn sums_of_squares(&self, of: &[(&Vec<f32>, usize)]) -> Result<Vec<f64>, DeviceError> {
        Ok(of.iter().map(|(values, n)| sparse::sum_of_squares(&values[..*n])).collect())
    }

    fn adamw(&self, deltas: &mut Deltas<Self>, step: AdamW) -> DeviceResult {
        let Deltas { theta, grad, mean, variance, .. } = deltas;
        sparse::adamw(theta, grad, mean, variance, step);
        Ok(())
    }
}

fn allocate(what: &'static str, n: usize) -> Result<Vec<f32>, DeviceError> {
    let mut values = Vec::new();
    let n_bytes = (n as u64).saturating_mul(4);
    values.try_reserve_exact(n).map_err(|_| DeviceError::OutOfMemory { what, n_bytes })?;
    values.resize(n, 0.0);
    Ok(values)
}
