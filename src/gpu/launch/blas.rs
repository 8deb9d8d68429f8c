//! Matrix products of activations and weights, by cuBLASLt.
//!
//! Row-major `[n, d]` is column-major `[d, n]`, which is the library's view of all matrices here. Inputs have one
//! dtype; products and sums run in float32 (no TF32) and are rounded once, to the output's dtype.
//!
//! The same product gives the same bits each time, in every process on the same GPU model with this library and the
//! same workspace size. The library guarantees this for one stream and one version
//! (<https://docs.nvidia.com/cuda/cublas/#results-reproducibility>). The first proposed algorithm is always used.
//! Split-K sums must be stored separately, in float32, and added in their own step (`cublasLtReductionScheme_t` in
//! cublasLt.h: `COMPUTE_TYPE`). Other reductions are excluded, because accumulating in the output rounds each part to
//! its dtype. The sum of a row may still differ in its last bits with the number of other rows, which influences the
//! choice of algorithm.

use std::{
    collections::BTreeMap,
    ffi::{c_int, c_void},
    fmt,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    DeviceVec, Queue,
    cublaslt::{
        COMPUTE_32F, DESC_TRANSA, DESC_TRANSB, Functions, Library, OP_T, Opaque, PREF_MAX_WORKSPACE_BYTES,
        PREF_MIN_ALIGNMENT, PREF_REDUCTION_SCHEME_MASK, Proposal, R_16BF, R_16F, R_32F, REDUCTION_SCHEME_COMPUTE_TYPE,
        Status, cublaslt, name_of,
    },
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Maximum and minimum size of the workspace; without a workspace, sums cannot be split.
const WORKSPACE_BYTES: [usize; 2] = [32 << 20, 1 << 20];
/// Number of algorithms that the library proposes for a product.
const MAX_PROPOSALS: usize = 8;
/// Number of products whose algorithm is cached: the number of rows varies between batches.
const MAX_PLANS: usize = 1024;
/// The name that asynchronous failures are attributed to.
const NAME: &str = "cublasLtMatmul";

/// A weight matrix on a device, `[d_out, d_in]`, row-major.
#[derive(Clone, Copy)]
pub struct BlasWeight<'a> {
    /// Its elements; the buffer may be longer.
    pub values: &'a DeviceVec<u8>,
    /// The dtype of weights and activations: BF16, F16 or F32.
    pub dtype: Dtype,
    /// Number of rows.
    pub d_out: usize,
    /// Number of columns.
    pub d_in: usize,
}

/// Multiplies matrices on a device, in one queue.
///
/// Buffers may be longer than a product needs. Calls are asynchronous. The library's first proposed algorithm is used:
/// with autotuning, timing noise would determine the last bits of results.
pub struct Blas {
    library: &'static Library,
    state: Mutex<State>,
    workspace: DeviceVec<u8>,
    queue: Queue,
}

struct State {
    handle: Opaque,
    plans: BTreeMap<Key, ProductPlan>,
    /// Counts products, for cache eviction.
    clock: u64,
}

// SAFETY: the library allows any thread to use its handles and descriptors, one at a time; the state is behind a lock.
unsafe impl Send for State {}

/// The properties that determine the algorithm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kind: Kind,
    dtype: Dtype,
    d_out: usize,
    d_in: usize,
    n: usize,
    /// Elements between consecutive rows of the input.
    stride: usize,
    /// Alignment in bytes of the weights, the input and the output.
    alignments: [u32; 3],
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// `y = x w^T`.
    Transposed,
    /// The same with `y` in float32.
    TransposedF32,
    /// `dx = dy w`.
    Plain,
    /// `dw = dy^T x` in float32: `x` takes the role of the weights, `dy` is the input.
    Outer,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, dtype, d_out, d_in, n, .. } = self;
        match kind {
            Kind::Transposed => write!(f, "x w^T, x [{n}, {d_in}], w [{d_out}, {d_in}], {dtype:?}"),
            Kind::TransposedF32 => write!(f, "x w^T in F32, x [{n}, {d_in}], w [{d_out}, {d_in}], {dtype:?}"),
            Kind::Plain => write!(f, "dy w, dy [{n}, {d_out}], w [{d_out}, {d_in}], {dtype:?}"),
            Kind::Outer => write!(f, "dy^T x in F32, dy [{n}, {d_out}], x [{n}, {d_in}], {dtype:?}"),
        }
    }
}

impl Key {
    /// Row lengths of the input and of the output.
    fn widths(&self) -> (usize, usize) {
        match self.kind {
            Kind::Plain | Kind::Outer => (self.d_out, self.d_in),
            _ => (self.d_in, self.d_out),
        }
    }

    fn out_type(&self) -> Dtype {
        if matches!(self.kind, Kind::TransposedF32 | Kind::Outer) { Dtype::F32 } else { self.dtype }
    }
}

/// A descriptor created by the library.
struct Description {
    at: Opaque,
    destroy: unsafe extern "C" fn(Opaque) -> Status,
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created by the matching function, and destroyed once; calls read descriptors before they return.
        let _ignored = unsafe { (self.destroy)(self.at) };
    }
}

struct ProductPlan {
    product: Description,
    /// Layouts of the weights, the input and the output.
    layouts: [Description; 3],
    chosen: Proposal,
    last_used: u64,
}

/// Addresses of the weights, the input and the output, with the lengths that the plan requires.
#[derive(Clone, Copy)]
struct Operands([u64; 3]);

impl Blas {
    /// Maximum size of the workspace in bytes.
    pub const MAX_SCRATCH: u64 = WORKSPACE_BYTES[0] as u64;

    /// Loads the library if necessary, and allocates a workspace: 32 MiB, or less if the device has less.
    ///
    /// # Errors
    /// [`GpuError::NoLibrary`], [`GpuError::BadLibrary`]; [`GpuError::Library`] if its initialization fails.
    pub fn new(queue: &Queue) -> Result<Self, GpuError> {
        let library = cublaslt()?;
        let queue = Queue { gpu: queue.gpu.clone(), stream: queue.stream.clone() };
        let [mut n_bytes, min_bytes] = WORKSPACE_BYTES;
        let workspace = loop {
            match queue.alloc(n_bytes, "scratch memory of matrix products") {
                Err(GpuError::OutOfMemory { .. }) if n_bytes > min_bytes => n_bytes /= 2,
                Err(GpuError::OutOfMemory { .. }) => break queue.alloc(0, "nothing")?,
                done => break done?,
            }
        };
        queue.gpu.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle, for the device that this thread was just bound to.
        let status = unsafe { (library.functions.create)(&mut handle) };
        let state = Mutex::new(State { handle, plans: BTreeMap::new(), clock: 0 });
        let blas = Self { library, state, workspace, queue };
        blas.check(status, "starting")?;
        Ok(blas)
    }

    /// `y = x w^T`, added to `y` if `accumulate`; `x` is `[n, d_in]` starting at row `first_row`, `y` `[n, d_out]`.
    ///
    /// # Errors
    /// [`GpuError::Library`] names the product.
    ///
    /// # Panics
    /// If buffers are too short or belong to another queue.
    pub fn times_transposed(
        &self,
        x: &DeviceVec<u8>,
        first_row: usize,
        w: BlasWeight<'_>,
        n: usize,
        accumulate: bool,
        y: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        self.queue.owns(y);
        self.product(Kind::Transposed, w, n, (x, first_row), (y.at, y.len, 0), accumulate)
    }

    /// `logits = x w^T` in float32; shapes as in [`Self::times_transposed`].
    ///
    /// # Errors
    /// As [`Self::times_transposed`].
    ///
    /// # Panics
    /// As [`Self::times_transposed`].
    pub fn times_transposed_f32(
        &self,
        x: &DeviceVec<u8>,
        first_row: usize,
        w: BlasWeight<'_>,
        n: usize,
        logits: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        self.queue.owns(logits);
        self.product(Kind::TransposedF32, w, n, (x, first_row), (logits.at, 4 * logits.len, 0), false)
    }

    /// `dx = dy w`; `dy` is `[n, d_out]`, `dx` `[n, d_in]` starting at row `first_row`.
    ///
    /// # Errors
    /// As [`Self::times_transposed`].
    ///
    /// # Panics
    /// As [`Self::times_transposed`].
    pub fn times(
        &self,
        dy: &DeviceVec<u8>,
        w: BlasWeight<'_>,
        n: usize,
        dx: &mut DeviceVec<u8>,
        first_row: usize,
    ) -> Result<(), GpuError> {
        self.queue.owns(dx);
        self.product(Kind::Plain, w, n, (dy, 0), (dx.at, dx.len, first_row), false)
    }

    /// `dw = dy^T x` in float32, for the columns `rows` of `dy`: `dy` is `[n, d_out]`, `x` `[n, d_in]`, `dw` `[rows.len(), d_in]`.
    ///
    /// # Errors
    /// As [`Self::times_transposed`].
    ///
    /// # Panics
    /// As [`Self::times_transposed`].
    pub fn outer(
        &self,
        (dy, d_out, rows): (&DeviceVec<u8>, usize, Range<usize>),
        (x, d_in): (&DeviceVec<u8>, usize),
        dtype: Dtype,
        n: usize,
        dw: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        for memory in [dy, x] {
            self.queue.owns(memory);
        }
        self.queue.owns(dw);
        let width = bytes_of(dtype);
        assert!(!rows.is_empty() && rows.end <= d_out && d_in > 0, "columns of dy");
        assert!(n * d_out * width <= dy.len && n * d_in * width <= x.len, "the inputs have n rows");
        assert!(rows.len() * d_in <= dw.len, "the output has all rows");
        if n == 0 {
            return self.queue.fill_first(dw, rows.len() * d_in, 0);
        }
        let input = dy.at + (rows.start * width) as u64;
        let (kind, alignments) = (Kind::Outer, [1; 3]);
        let key = Key { kind, dtype, d_out: rows.len(), d_in, n, stride: d_out, alignments };
        // SAFETY: the operands are as long as asserted; the columns of `dy` are within its rows, also in the last one.
        unsafe { self.run(key, Operands([x.at, input, dw.at]), false) }
    }

    /// Starts a product. The input is a buffer and a first row; the output an address, its size in bytes, and a first
    /// row.
    fn product(
        &self,
        kind: Kind,
        w: BlasWeight<'_>,
        n: usize,
        (input, input_row): (&DeviceVec<u8>, usize),
        (output, output_bytes, output_row): (u64, usize, usize),
        accumulate: bool,
    ) -> Result<(), GpuError> {
        let BlasWeight { values, dtype, d_out, d_in } = w;
        self.queue.owns(values);
        self.queue.owns(input);
        assert!(d_out > 0 && d_in > 0, "a weight is not empty");
        let mut key = Key { kind, dtype, d_out, d_in, n, stride: 0, alignments: [1; 3] };
        let (in_width, out_width) = key.widths();
        key.stride = in_width;
        let (in_bytes, out_bytes) = (bytes_of(dtype), bytes_of(key.out_type()));
        assert!(d_out * d_in * in_bytes <= values.len, "the buffer has all weights");
        assert!((input_row + n) * in_width * in_bytes <= input.len, "the input has all rows");
        assert!((output_row + n) * out_width * out_bytes <= output_bytes, "the output has all rows");
        if n == 0 {
            return Ok(());
        }
        let input = input.at + (input_row * in_width * in_bytes) as u64;
        let output = output + (output_row * out_width * out_bytes) as u64;
        // SAFETY: the operands are as long as asserted, and contiguous.
        unsafe { self.run(key, Operands([values.at, input, output]), accumulate) }
    }

    /// # Safety
    /// The operands are memory of this queue, with the lengths given by the key.
    unsafe fn run(&self, mut key: Key, operands: Operands, accumulate: bool) -> Result<(), GpuError> {
        key.alignments = operands.0.map(|at| 1 << at.trailing_zeros().min(8));
        self.queue.gpu.bind()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { handle, plans, clock } = &mut *state;
        *clock += 1;
        if !plans.contains_key(&key) {
            if plans.len() >= MAX_PLANS {
                let oldest = plans.iter().min_by_key(|(_, plan)| plan.last_used).map(|(key, _)| *key);
                oldest.and_then(|key| plans.remove(&key));
            }
            plans.insert(key, self.plan(*handle, &key)?);
        }
        let plan = plans.get_mut(&key).expect("it was just inserted");
        plan.last_used = *clock;
        // SAFETY: the caller guarantees the operands, and the plan was made for the key.
        let status = unsafe { self.start(*handle, plan, operands, accumulate) };
        self.check(status, key)
    }

    /// Queries the library for an algorithm.
    fn plan(&self, handle: Opaque, key: &Key) -> Result<ProductPlan, GpuError> {
        let Functions { desc_create, desc_set, desc_destroy, preference_create, preference_destroy, propose, .. } =
            self.library.functions;
        let (in_width, out_width) = key.widths();
        let (in_type, out_type) = (type_code(key.dtype), type_code(key.out_type()));
        let product = self.describe(key, desc_destroy, |at| {
            // SAFETY: creates one descriptor, with float32 for accumulation and scaling factors.
            unsafe { desc_create(at, COMPUTE_32F, R_32F) }
        })?;
        let transposed = match key.kind {
            Kind::Transposed | Kind::TransposedF32 => Some(DESC_TRANSA),
            Kind::Outer => Some(DESC_TRANSB),
            Kind::Plain => None,
        };
        if let Some(attribute) = transposed {
            // SAFETY: marks one operand as transposed; the attribute is one integer.
            self.check(unsafe { set(desc_set, product.at, attribute, &OP_T) }, key)?;
        }
        // The numbers of columns of the weights' operand, and of the output.
        let (of_w, of_out) = if key.kind == Kind::Outer { (key.n, key.d_out) } else { (key.d_out, key.n) };
        let layouts = [
            self.layout(key, in_type, key.d_in, of_w, key.d_in)?,
            self.layout(key, in_type, in_width, key.n, key.stride)?,
            self.layout(key, out_type, out_width, of_out, out_width)?,
        ];
        let preference = self.describe(key, preference_destroy, |at| {
            // SAFETY: creates one descriptor.
            unsafe { preference_create(at) }
        })?;
        self.prefer(key, &preference)?;
        let mut proposals = [Proposal::EMPTY; MAX_PROPOSALS];
        let mut n_proposals: c_int = 0;
        let [w, input, output] = layouts.each_ref().map(|layout| layout.at);
        // SAFETY: the descriptors are valid; the output's is passed twice, because C and D have the same layout; there
        // is room for as many proposals as requested.
        let status = unsafe {
            let room = (MAX_PROPOSALS as c_int, proposals.as_mut_ptr(), &raw mut n_proposals);
            propose(handle, product.at, w, input, output, output, preference.at, room.0, room.1, room.2)
        };
        self.check(status, key)?;
        let n_proposals = usize::try_from(n_proposals).unwrap_or(0).min(MAX_PROPOSALS);
        let fits = |proposal: &&Proposal| proposal.status == 0 && proposal.workspace_bytes <= self.workspace.len;
        let Some(&chosen) = proposals[..n_proposals].iter().find(fits) else {
            return Err(self.refused(key, "no algorithm is available".to_owned()));
        };
        Ok(ProductPlan { product, layouts, chosen, last_used: 0 })
    }

    fn prefer(&self, key: &Key, preference: &Description) -> Result<(), GpuError> {
        let set_preference = self.library.functions.preference_set;
        let [w, input, output] = key.alignments;
        let (room, reductions) = (self.workspace.len as u64, REDUCTION_SCHEME_COMPUTE_TYPE);
        // SAFETY: the attribute is one u64.
        self.check(unsafe { set(set_preference, preference.at, PREF_MAX_WORKSPACE_BYTES, &room) }, key)?;
        // SAFETY: the attribute is one u32; sums that are not split are always allowed.
        self.check(unsafe { set(set_preference, preference.at, PREF_REDUCTION_SCHEME_MASK, &reductions) }, key)?;
        for (attribute, alignment) in PREF_MIN_ALIGNMENT.into_iter().zip([w, input, output, output]) {
            // SAFETY: the attribute is one u32.
            self.check(unsafe { set(set_preference, preference.at, attribute, &alignment) }, key)?;
        }
        Ok(())
    }

    /// # Safety
    /// The operands have the lengths and alignments of the product that the plan was made for, and belong to this
    /// queue.
    unsafe fn start(&self, handle: Opaque, plan: &ProductPlan, operands: Operands, accumulate: bool) -> Status {
        let (one, beta) = (1.0_f32, if accumulate { 1.0_f32 } else { 0.0 });
        let [w, input, output] = operands.0.map(|at| at as *mut c_void);
        let [of_w, of_input, of_output] = plan.layouts.each_ref().map(|layout| layout.at);
        let Self { workspace, queue, library, .. } = self;
        queue.gpu.record_kernel(NAME);
        // SAFETY: the caller guarantees the operands; the workspace has the stated size and is used by this stream
        // alone; the library reads scalars and descriptors before it returns.
        unsafe {
            (library.functions.matmul)(
                handle,
                plan.product.at,
                &one,
                w,
                of_w,
                input,
                of_input,
                &beta,
                output,
                of_output,
                output,
                of_output,
                &plan.chosen.algorithm,
                workspace.at as *mut c_void,
                workspace.len,
                queue.stream.cu_stream().cast(),
            )
        }
    }

    fn layout(
        &self,
        key: &Key,
        type_code: c_int,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Description, GpuError> {
        let Functions { layout_create, layout_destroy, .. } = self.library.functions;
        self.describe(key, layout_destroy, |at| {
            // SAFETY: creates one descriptor.
            unsafe { layout_create(at, type_code, rows as u64, columns as u64, stride as i64) }
        })
    }

    fn describe(
        &self,
        key: &Key,
        destroy: unsafe extern "C" fn(Opaque) -> Status,
        create: impl FnOnce(&mut Opaque) -> Status,
    ) -> Result<Description, GpuError> {
        let mut at = std::ptr::null_mut();
        self.check(create(&mut at), key)?;
        Ok(Description { at, destroy })
    }

    fn check(&self, status: Status, doing: impl fmt::Display) -> Result<(), GpuError> {
        match status {
            0 => Ok(()),
            // If earlier work failed, the driver's error is more precise.
            _ => self.queue.wait().and_then(|()| Err(self.refused(doing, name_of(status)))),
        }
    }

    fn refused(&self, doing: impl fmt::Display, code: String) -> GpuError {
        let version = self.library.facts().version.clone();
        GpuError::Library { ordinal: self.queue.gpu.ordinal(), version, doing: doing.to_string(), code }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let waited = self.queue.wait();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.plans.clear();
        if !state.handle.is_null() {
            // SAFETY: created in `new`, destroyed once, with none of its work in flight and bound to its device.
            let destroyed = unsafe { (self.library.functions.destroy)(state.handle) };
            let _ignored = (waited, destroyed);
        }
    }
}

/// # Safety
/// `at` is a descriptor of the kind that `function` sets, and the attribute has the type of `value`.
unsafe fn set<T>(
    function: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
    at: Opaque,
    attribute: c_int,
    value: &T,
) -> Status {
    // SAFETY: the caller guarantees the types; the value is read before the call returns.
    unsafe { function(at, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn type_code(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::BF16 => R_16BF,
        Dtype::F16 => R_16F,
        Dtype::F32 => R_32F,
        other => panic!("products support BF16, F16 and F32, not {other:?}"),
    }
}

fn bytes_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}
