//! The trainer's operations on an NVIDIA GPU.
//!
//! Weights and activations have the dtype of the checkpoint: BF16, F16 or F32. Sums, norms, softmax, losses and all
//! state are float32. Matrix products use cuBLASLt, everything else the kernels of `gpu/kernels`. All work runs in
//! order in one queue; the host waits only where it reads a value. The order of every sum depends only on shapes, so a
//! run gives the same bits each time on the same GPU.

use std::cell::{Cell, RefCell};

use super::{
    Attention, Blas, BlasWeight, Copyable, DeviceVec, EntriesOf, Gpu, GpuError, HeadShape, Matrix, Pinned, Queue,
};
use crate::{
    backend::AcceleratorError,
    checkpoint::{Checkpoint, Printable},
    tensor::{Accumulator, Dtype, Float, dtype_name, widened, with_float},
    train::{
        AdamScalars, AdamW, Deltas, Device, DeviceError, DeviceResult, EMBEDDING, MemoryEstimate, ModelConfig, RunSize,
        Spans, TrainError, config::Heads,
    },
};

/// Bytes per copy between host and device; there are two such buffers.
const STAGED: usize = 16 << 20;
/// Maximum size of the float32 logits in memory, in bytes, or those of one token.
const MAX_LOGITS: usize = 128 << 20;
/// Maximum size of a dense float32 gradient tile in bytes, or that of one row.
const MAX_DENSE: usize = 64 << 20;
/// With more entries per row than this, a tile of the dense gradient is computed and the entries are taken from it.
const MANY_ENTRIES: usize = 64;
/// The maximum head width of attention.
const MAX_HEAD: usize = Attention::MAX_HEAD;
/// The loss scale in F16, whose smallest value is 6e-8; a mean loss has gradients of about 1e-6 with respect to its
/// logits.
const F16_LOSS_SCALE: f32 = 4096.0;

impl From<GpuError> for DeviceError {
    fn from(error: GpuError) -> Self {
        AcceleratorError::from(error).into()
    }
}

/// A GPU.
pub struct CudaDevice {
    queue: Queue,
    blas: Blas,
    dtype: Dtype,
    staging: RefCell<[Pinned; 2]>,
    turn: Cell<usize>,
    scratch: RefCell<Scratch>,
}

/// Scratch memory of operations; it grows to the largest need.
struct Scratch {
    /// Logits, a tile of a dense gradient, or sums by slices of tokens.
    numbers: DeviceVec<f32>,
    /// The gradient with respect to the logits.
    acts: DeviceVec<u8>,
    /// `sum(dout * out)` per token and query head.
    delta: DeviceVec<f32>,
    sums: DeviceVec<f64>,
    /// Ones, in the dtype of activations.
    ones: DeviceVec<u8>,
}

/// A matrix on a GPU, in its stored dtype.
pub struct CudaWeight {
    bytes: DeviceVec<u8>,
    d_out: usize,
    d_in: usize,
}

impl CudaDevice {
    /// Opens a GPU for weights of `dtype`: BF16, F16 or F32.
    ///
    /// # Errors
    /// Errors of the driver; [`GpuError::NoLibrary`] lists where cuBLASLt was searched.
    ///
    /// # Panics
    /// If the dtype is not one of these.
    pub fn new(gpu: &Gpu, dtype: Dtype) -> Result<Self, DeviceError> {
        assert!(matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32), "weights are BF16, F16 or F32");
        let queue = Queue::new(gpu)?;
        let blas = Blas::new(&queue)?;
        let staging = RefCell::new([queue.pinned(STAGED)?, queue.pinned(STAGED)?]);
        let scratch = RefCell::new(Scratch {
            numbers: queue.alloc(0, "nothing")?,
            acts: queue.alloc(0, "nothing")?,
            delta: queue.alloc(0, "nothing")?,
            sums: queue.alloc(0, "nothing")?,
            ones: queue.alloc(0, "nothing")?,
        });
        Ok(Self { queue, blas, dtype, staging, turn: Cell::new(0), scratch })
    }

    /// The common dtype of all matrices of a model.
    ///
    /// # Errors
    /// A list of all matrices whose dtype differs from the embedding's; heads that are too wide.
    pub fn dtype_of(checkpoint: &Checkpoint) -> Result<Dtype, TrainError> {
        checkpoint.refuse_codes()?;
        let d_head = ModelConfig::of(checkpoint)?.heads.d_head;
        if d_head > MAX_HEAD {
            let what = format!("heads are {d_head} wide, at most {MAX_HEAD} is supported on a GPU");
            return Err(TrainError::Config { path: checkpoint.root().join("config.json"), what });
        }
        let matrices = || checkpoint.tensors().filter(|tensor| tensor.info.shape.len() > 1);
        let embedding = checkpoint.tensor(EMBEDDING);
        let Some(dtype) = embedding.or_else(|| matrices().next()).map(|tensor| tensor.info.dtype) else {
            return Ok(Dtype::F32);
        };
        let others = matrices().filter(|tensor| tensor.info.dtype != dtype);
        let problems: Vec<String> = others
            .map(|tensor| format!("\"{}\": {}", Printable(&tensor.info.name), dtype_name(tensor.info.dtype)))
            .collect();
        if problems.is_empty() {
            return Ok(dtype);
        }
        let what = "on a GPU all matrices must have the type of the embedding; these do not";
        Err(TrainError::Tensors { path: checkpoint.root().to_owned(), what, problems })
    }

    /// The GPU memory that training needs, besides the driver's own; `dtype` is the dtype of activations, as returned
    /// by [`Self::dtype_of`].
    pub fn memory_of_run(config: &ModelConfig, base: &Checkpoint, dtype: Dtype, run: RunSize) -> MemoryEstimate {
        let scratch = Self::scratch_bytes(config, dtype, run);
        MemoryEstimate::of_run(config, base, run, dtype.bitsize() / 8, scratch)
    }

    /// Scratch bytes of the operations of a run, beyond the model's buffers.
    fn scratch_bytes(config: &ModelConfig, dtype: Dtype, run: RunSize) -> u64 {
        let logits = at_once(config.n_vocab).min(run.max_supervised) * config.n_vocab;
        // Those of the largest matrix, as if the entries were spread evenly over all matrices.
        let k = run.n_entries.div_ceil(config.n_rows().max(1) as u64) as usize;
        let max_entries = k * (2 * config.d_ff).max(config.heads.d_qkv());
        let partial = Queue::gather_scratch_len(run.max_tokens, max_entries);
        let delta = run.max_tokens * config.heads.n_q;
        let acts = logits * dtype.bitsize() / 8;
        (logits.max(partial) * 4 + acts + delta * 4) as u64 + Blas::MAX_SCRATCH
    }

    /// Copies to `to`, at byte offset `at`, through pinned memory.
    fn put<T: Copyable>(
        &self,
        n_bytes: usize,
        to: &mut DeviceVec<T>,
        at: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> DeviceResult {
        let staging = &mut *self.staging.borrow_mut();
        for first in (0..n_bytes).step_by(STAGED) {
            let n = STAGED.min(n_bytes - first);
            let pinned = &mut staging[self.turn.replace(1 - self.turn.get())];
            fill(first, &mut pinned.bytes_mut()?[..n]);
            self.queue.upload_at(pinned, 0..n, to, at + first)?;
        }
        Ok(())
    }

    fn matrix<'a>(&self, bytes: &'a DeviceVec<u8>, d: usize) -> Matrix<'a> {
        Matrix { bytes, dtype: self.dtype, d }
    }

    fn factor<'a>(&self, w: &'a CudaWeight) -> BlasWeight<'a> {
        BlasWeight { values: &w.bytes, dtype: self.dtype, d_out: w.d_out, d_in: w.d_in }
    }

    fn attending<'a>(&self, spans: &'a Spans<Self>, heads: Heads) -> Attention<'a> {
        Attention {
            heads: shape_of(heads),
            dtype: self.dtype,
            starts: &spans.starts_dev,
            n_examples: spans.starts.len() - 1,
            n: spans.n_tokens(),
            is_plain: false,
        }
    }

    fn act_size(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Grows memory to `n` values; its content is lost.
    fn grow<T: Copyable>(&self, memory: &mut DeviceVec<T>, n: usize, what: &'static str) -> DeviceResult {
        if memory.len() < n {
            *memory = self.queue.alloc(0, what)?;
            *memory = self.queue.alloc(n, what)?;
        }
        Ok(())
    }
}

/// Number of tokens whose logits are computed at once: whole tiles of a product if possible.
fn at_once(n_vocab: usize) -> usize {
    let n = MAX_LOGITS / 4 / n_vocab;
    if n >= 64 { n / 64 * 64 } else { n.max(1) }
}

fn shape_of(heads: Heads) -> HeadShape {
    HeadShape { n_q: heads.n_q, n_kv: heads.n_kv, d_head: heads.d_head }
}

fn entries<'a>(deltas: &'a Deltas<CudaDevice>, shape: (usize, usize)) -> EntriesOf<'a> {
    EntriesOf { offsets: &deltas.offsets, columns: &deltas.columns, nnz: deltas.nnz, shape }
}

impl Device for CudaDevice {
    type Act = DeviceVec<u8>;
    type F32 = DeviceVec<f32>;
    type Ids = DeviceVec<u32>;
    type Weight = CudaWeight;

    fn act_bytes(&self) -> usize {
        self.act_size()
    }
    fn loss_scale(&self) -> f32 {
        if self.dtype == Dtype::F16 { F16_LOSS_SCALE } else { 1.0 }
    }

    fn act(&self, n: usize) -> Result<DeviceVec<u8>, DeviceError> {
        let mut acts = self.queue.alloc(n * self.act_size(), "activations")?;
        self.queue.fill(&mut acts, 0)?;
        Ok(acts)
    }
    fn zeros(&self, n: usize) -> Result<DeviceVec<f32>, DeviceError> {
        let mut numbers = self.queue.alloc(n, "trainer state")?;
        self.queue.fill(&mut numbers, 0)?;
        Ok(numbers)
    }
    fn ids(&self, ids: &[u32]) -> Result<DeviceVec<u32>, DeviceError> {
        Ok(self.queue.upload_all(ids, "tokens and columns")?)
    }
    fn weight(&self, dtype: Dtype, d_out: usize, d_in: usize) -> Result<CudaWeight, DeviceError> {
        if dtype != self.dtype {
            let (found, all) = (dtype_name(dtype), dtype_name(self.dtype));
            return Err(DeviceError::Failed(format!(
                "a {found} matrix cannot be used together with {all} matrices on a GPU"
            )));
        }
        let mut bytes = self.queue.alloc(d_out * d_in * self.act_size(), "weights")?;
        self.queue.fill(&mut bytes, 0)?;
        Ok(CudaWeight { bytes, d_out, d_in })
    }
    fn write_rows(&self, weight: &mut CudaWeight, first_row: usize, bytes: &[u8]) -> DeviceResult {
        let at = first_row * weight.d_in * self.act_size();
        self.put(bytes.len(), &mut weight.bytes, at, |first, to| to.copy_from_slice(&bytes[first..first + to.len()]))
    }
    fn write(&self, from: &[f32], to: &mut DeviceVec<f32>) -> DeviceResult {
        self.put(4 * from.len(), to, 0, |first, to| {
            for (le, value) in to.chunks_exact_mut(4).zip(&from[first / 4..]) {
                le.copy_from_slice(&value.to_le_bytes());
            }
        })
    }
    fn read(&self, from: &DeviceVec<f32>, n: usize) -> Result<Vec<f32>, DeviceError> {
        Ok(self.queue.download_first(from, n)?)
    }
    fn write_act(&self, from: &[f32], to: &mut DeviceVec<u8>) -> DeviceResult {
        let (dtype, width) = (self.dtype, self.act_size());
        self.put(width * from.len(), to, 0, |first, to| {
            let elements = to.chunks_exact_mut(width).zip(&from[first / width..]);
            with_float!(dtype, T => {
                elements.for_each(|(le, value)| T::from_acc(Accumulator::from_f64(f64::from(*value))).write_le(le));
            }, else unreachable!("checked when the device was created"));
        })
    }
    fn read_act(&self, from: &DeviceVec<u8>, n: usize) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.queue.download_first(from, n * self.act_size())?;
        Ok(widened(self.dtype, &bytes))
    }
    fn copy(
        &self,
        from: &DeviceVec<u8>,
        from_at: usize,
        to: &mut DeviceVec<u8>,
        to_at: usize,
        n: usize,
    ) -> DeviceResult {
        let bytes = |n: usize| n * self.act_size();
        Ok(self.queue.copy_part(from, bytes(from_at), to, bytes(to_at), bytes(n))?)
    }
    fn clear(&self, values: &mut DeviceVec<f32>) -> DeviceResult {
        Ok(self.queue.fill(values, 0)?)
    }

    fn embed(&self, ids: &DeviceVec<u32>, n: usize, table: &CudaWeight, x: &mut DeviceVec<u8>) -> DeviceResult {
        Ok(self.queue.take_rows(self.matrix(&table.bytes, table.d_in), table.d_out, ids, n, x)?)
    }

    fn linear(
        &self,
        x: &DeviceVec<u8>,
        n: usize,
        w: &CudaWeight,
        bias: Option<&DeviceVec<f32>>,
        accumulate: bool,
        y: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        if let Some(bias) = bias {
            self.queue.add_bias(bias, (y, self.dtype), accumulate, n, w.d_out)?;
        }
        let accumulate = accumulate || bias.is_some();
        Ok(self.blas.times_transposed(x, 0, self.factor(w), n, accumulate, y)?)
    }

    fn linear_backward(&self, dy: &DeviceVec<u8>, n: usize, w: &CudaWeight, dx: &mut DeviceVec<u8>) -> DeviceResult {
        Ok(self.blas.times(dy, self.factor(w), n, dx, 0)?)
    }

    fn rms_norm(
        &self,
        x: &DeviceVec<u8>,
        n: usize,
        gain: &DeviceVec<f32>,
        d: usize,
        eps: f32,
        y: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        Ok(self.queue.rms_norm(self.matrix(x, d), n, gain, eps, y)?)
    }

    fn rms_norm_backward(
        &self,
        dy: &DeviceVec<u8>,
        x: &DeviceVec<u8>,
        n: usize,
        gain: &DeviceVec<f32>,
        d: usize,
        eps: f32,
        dx: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        Ok(self.queue.rms_norm_backward(dy, self.matrix(x, d), n, gain, eps, dx)?)
    }

    fn head_norm(
        &self,
        qkv: &mut DeviceVec<u8>,
        n: usize,
        heads: Heads,
        q_gain: &DeviceVec<f32>,
        k_gain: &DeviceVec<f32>,
        eps: f32,
    ) -> DeviceResult {
        Ok(self.queue.head_norm(qkv, self.dtype, n, shape_of(heads), [q_gain, k_gain], eps)?)
    }

    fn head_norm_backward(
        &self,
        dqkv: &mut DeviceVec<u8>,
        raw: &DeviceVec<u8>,
        n: usize,
        heads: Heads,
        q_gain: &DeviceVec<f32>,
        k_gain: &DeviceVec<f32>,
        eps: f32,
    ) -> DeviceResult {
        Ok(self.queue.head_norm_backward(dqkv, raw, self.dtype, n, shape_of(heads), [q_gain, k_gain], eps)?)
    }

    fn rope(
        &self,
        qkv: &mut DeviceVec<u8>,
        positions: &DeviceVec<u32>,
        n: usize,
        heads: Heads,
        frequencies: &DeviceVec<f32>,
        inverse: bool,
    ) -> DeviceResult {
        Ok(self.queue.rope(qkv, self.dtype, positions, n, shape_of(heads), frequencies, inverse)?)
    }

    fn attention(
        &self,
        qkv: &DeviceVec<u8>,
        spans: &Spans<Self>,
        heads: Heads,
        out: &mut DeviceVec<u8>,
        lse: &mut DeviceVec<f32>,
    ) -> DeviceResult {
        Ok(self.queue.attention(&self.attending(spans, heads), qkv, out, lse)?)
    }

    fn attention_backward(
        &self,
        dout: &DeviceVec<u8>,
        qkv: &DeviceVec<u8>,
        out: &DeviceVec<u8>,
        lse: &DeviceVec<f32>,
        spans: &Spans<Self>,
        heads: Heads,
        dqkv: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        let delta = &mut self.scratch.borrow_mut().delta;
        self.grow(delta, spans.n_tokens() * heads.n_q, "the gradient of attention")?;
        Ok(self.queue.attention_backward(&self.attending(spans, heads), dout, qkv, out, lse, delta, dqkv)?)
    }

    fn attention_cached(
        &self,
        qkv: &DeviceVec<u8>,
        spans: &Spans<Self>,
        past: &[usize],
        heads: Heads,
        cache: &mut DeviceVec<u8>,
        capacity: usize,
        out: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        let past: Vec<u32> = past.iter().map(|&past| past as u32).collect();
        let past = self.ids(&past)?;
        Ok(self.queue.attention_cached(&self.attending(spans, heads), qkv, &past, cache, capacity, out)?)
    }

    fn swiglu(&self, gate_up: &DeviceVec<u8>, n: usize, d_ff: usize, h: &mut DeviceVec<u8>) -> DeviceResult {
        Ok(self.queue.swiglu(gate_up, self.dtype, n, d_ff, h)?)
    }

    fn swiglu_backward(
        &self,
        dh: &DeviceVec<u8>,
        gate_up: &DeviceVec<u8>,
        n: usize,
        d_ff: usize,
        d_gate_up: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        Ok(self.queue.swiglu_backward(dh, gate_up, self.dtype, n, d_ff, d_gate_up)?)
    }

    fn take_rows(
        &self,
        x: &DeviceVec<u8>,
        rows: &DeviceVec<u32>,
        n_rows: usize,
        d: usize,
        y: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        let n = x.len() / (d * self.act_size());
        Ok(self.queue.take_rows(self.matrix(x, d), n, rows, n_rows, y)?)
    }

    fn put_rows(
        &self,
        y: &DeviceVec<u8>,
        rows: &DeviceVec<u32>,
        n_rows: usize,
        d: usize,
        n: usize,
        x: &mut DeviceVec<u8>,
    ) -> DeviceResult {
        self.queue.fill_first(x, n * d * self.act_size(), 0)?;
        Ok(self.queue.put_rows(self.matrix(y, d), rows, n_rows, n, x)?)
    }

    fn cross_entropy(
        &self,
        x: &mut DeviceVec<u8>,
        n_rows: usize,
        head: &CudaWeight,
        labels: &DeviceVec<u32>,
        grad_scale: Option<f32>,
        losses: &mut DeviceVec<f32>,
    ) -> DeviceResult {
        let Scratch { numbers: logits, acts, .. } = &mut *self.scratch.borrow_mut();
        let n_vocab = head.d_out;
        let max_rows = at_once(n_vocab).min(n_rows);
        self.grow(logits, max_rows * n_vocab, "logits")?;
        if grad_scale.is_some() {
            self.grow(acts, max_rows * n_vocab * self.act_size(), "the gradient of the logits")?;
        }
        for first in (0..n_rows).step_by(max_rows.max(1)) {
            let n = max_rows.min(n_rows - first);
            self.blas.times_transposed_f32(x, first, self.factor(head), n, logits)?;
            let gradient = grad_scale.is_some().then_some((&mut *acts, self.dtype));
            let scale = grad_scale.unwrap_or(0.0);
            self.queue.cross_entropy(logits, n_vocab, labels, (first, n), scale, gradient, losses)?;
            if grad_scale.is_some() {
                self.blas.times(acts, self.factor(head), n, x, first)?;
            }
        }
        Ok(())
    }

    fn argmax(&self, x: &DeviceVec<u8>, n_rows: usize, head: &CudaWeight) -> Result<Vec<u32>, DeviceError> {
        let logits = &mut self.scratch.borrow_mut().numbers;
        let max_rows = at_once(head.d_out).min(n_rows);
        self.grow(logits, max_rows * head.d_out, "logits")?;
        let mut on_device = self.queue.alloc(max_rows, "tokens")?;
        let mut tokens = Vec::with_capacity(n_rows);
        for first in (0..n_rows).step_by(max_rows.max(1)) {
            let n = max_rows.min(n_rows - first);
            self.blas.times_transposed_f32(x, first, self.factor(head), n, logits)?;
            self.queue.argmax_rows(logits, n, head.d_out, &mut on_device)?;
            tokens.extend(self.queue.download_first(&on_device, n)?);
        }
        Ok(tokens)
    }

    fn gather_dot(
        &self,
        dy: &DeviceVec<u8>,
        x: &DeviceVec<u8>,
        n: usize,
        (d_out, d_in): (usize, usize),
        deltas: &mut Deltas<Self>,
    ) -> DeviceResult {
        let scratch = &mut self.scratch.borrow_mut().numbers;
        let Deltas { offsets, columns, grad, nnz, .. } = deltas;
        let of = EntriesOf { offsets, columns, nnz: *nnz, shape: (d_out, d_in) };
        if *nnz <= MANY_ENTRIES * d_out {
            self.grow(scratch, Queue::gather_scratch_len(n, *nnz), "the gradient of deltas")?;
            return Ok(self.queue.gather_dot((dy, x, self.dtype), n, of, grad, scratch)?);
        }
        let max_rows = (MAX_DENSE / 4 / d_in).clamp(1, d_out);
        self.grow(scratch, max_rows * d_in, "the gradient of deltas")?;
        for first in (0..d_out).step_by(max_rows) {
            let n_rows = max_rows.min(d_out - first);
            self.blas.outer((dy, d_out, first..first + n_rows), (x, d_in), self.dtype, n, scratch)?;
            self.queue.take_entries(scratch, (first, n_rows), of, grad)?;
        }
        Ok(())
    }

    fn bias_grad(&self, dy: &DeviceVec<u8>, n: usize, d_out: usize, deltas: &mut Deltas<Self>) -> DeviceResult {
        let Scratch { numbers: scratch, ones, .. } = &mut *self.scratch.borrow_mut();
        if ones.len() < n * self.act_size() {
            self.grow(ones, n * self.act_size(), "ones")?;
            self.write_act(&vec![1.0; n], ones)?;
        }
        let Deltas { offsets, columns, grad, nnz, .. } = deltas;
        let of = EntriesOf { offsets, columns, nnz: *nnz, shape: (d_out, 1) };
        self.grow(scratch, Queue::gather_scratch_len(n, *nnz), "the gradient of biases")?;
        Ok(self.queue.gather_dot((dy, ones, self.dtype), n, of, grad, scratch)?)
    }

    fn patch(&self, w: &mut CudaWeight, deltas: &Deltas<Self>) -> DeviceResult {
        let of = entries(deltas, (w.d_out, w.d_in));
        Ok(self.queue.patch_entries((&mut w.bytes, self.dtype), of, &deltas.originals.bytes, &deltas.theta)?)
    }

    fn patch_bias(&self, bias: &mut DeviceVec<f32>, deltas: &Deltas<Self>) -> DeviceResult {
        let of = entries(deltas, (bias.len(), 1));
        Ok(self.queue.patch_bias(bias, of, (&deltas.originals.bytes, self.dtype), &deltas.theta)?)
    }

    fn sums_of_squares(&self, of: &[(&DeviceVec<f32>, usize)]) -> Result<Vec<f64>, DeviceError> {
        let sums = &mut self.scratch.borrow_mut().sums;
        let n_sums = of.iter().map(|(_, n)| Queue::n_sums(*n)).sum();
        self.grow(sums, n_sums, "sums")?;
        let mut at = 0;
        for (values, n) in of {
            self.queue.sum_of_squares(values, *n, sums, at)?;
            at += Queue::n_sums(*n);
        }
        let sums = self.queue.download_first(sums, n_sums)?;
        let mut rest = sums.as_slice();
        let add = |(_, n): &(_, usize)| rest.split_off(..Queue::n_sums(*n)).expect("that many").iter().sum();
        Ok(of.iter().map(add).collect())
    }

    fn adamw(&self, deltas: &mut Deltas<Self>, step: AdamW) -> DeviceResult {
        let Deltas { theta, grad, mean, variance, nnz, .. } = deltas;
        let AdamScalars {
            grad_scale,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            decay,
            step_size,
            bias_correction2_sqrt,
            eps,
        } = step.scalars();
        let numbers =
            [grad_scale, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, bias_correction2_sqrt, eps];
        Ok(self.queue.adamw(theta, grad, [mean, variance], *nnz, numbers)?)
    }
}
