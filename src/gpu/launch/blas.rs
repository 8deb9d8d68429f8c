//! Products of activations and weights, by cuBLASLt.
//!
//! Row-major `[n, d]` is column-major `[d, n]`, which is how the library sees all that is here. Inputs have one type; products and
//! sums run in float32 (no TF32), and are rounded once, to the output's type.
//!
//! The same product gives the same bits each time, in every process on such a GPU with this library and as much room for its
//! scratch memory: the library promises it for one stream and one version
//! (<https://docs.nvidia.com/cuda/cublas/#results-reproducibility>), the first algorithm that it proposes is taken, and sums that are
//! split over blocks must be stored apart, in float32, and added in a step of their own (`cublasLtReductionScheme_t` in cublasLt.h:
//! `COMPUTE_TYPE`). The other ways are refused: adding up in the output rounds each part to its type. Sums of one row may still
//! differ in their last bits with the number of rows beside it, by which algorithms are chosen.

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

/// Scratch memory of the products, at most and at least; without any, sums cannot be split.
const WORKSPACE_BYTES: [usize; 2] = [32 << 20, 1 << 20];
/// Algorithms that the library proposes for a product.
const MAX_PROPOSALS: usize = 8;
/// Products whose algorithms are remembered: numbers of rows vary from batch to batch.
const MAX_PLANS: usize = 1024;
/// What failures that show later are blamed on.
const NAME: &str = "cublasLtMatmul";

/// A weight matrix on a device, `[d_out, d_in]`, row-major.
#[derive(Clone, Copy)]
pub struct BlasWeight<'a> {
    /// Its elements, and maybe more behind them.
    pub values: &'a DeviceVec<u8>,
    /// Their type, and that of the activations: BF16, F16 or F32.
    pub dtype: Dtype,
    /// Rows.
    pub d_out: usize,
    /// Columns.
    pub d_in: usize,
}

/// Multiplies matrices on a device, as work of one queue.
///
/// Buffers may be longer than a product needs. Nothing is waited for. Of the algorithms that the library proposes the
/// first is taken: timing them would let chance decide the last bits of results.
pub struct Blas {
    library: &'static Library,
    state: Mutex<State>,
    workspace: DeviceVec<u8>,
    queue: Queue,
}

struct State {
    handle: Opaque,
    plans: BTreeMap<Key, ProductPlan>,
    /// Counts products.
    clock: u64,
}

// SAFETY: the library lets any thread use its handles and descriptions, one at a time; the state is behind a lock.
unsafe impl Send for State {}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kind: Kind,
    dtype: Dtype,
    d_out: usize,
    d_in: usize,
    n: usize,
    /// Elements from one row of the input to the next.
    stride: usize,
    /// Of the weights, the input and the output: bytes that divide the address.
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
    /// `dw = dy^T x` in float32: `x` takes the place of the weights, `dy` is the input.
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
    /// Lengths of a row of the input and of the output.
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

/// A description that the library made.
struct Description {
    at: Opaque,
    destroy: unsafe extern "C" fn(Opaque) -> Status,
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by the function that this one belongs to, and destroyed once; calls read descriptions before they return.
        let _nobody = unsafe { (self.destroy)(self.at) };
    }
}

struct ProductPlan {
    product: Description,
    /// Of the weights, the input and the output.
    layouts: [Description; 3],
    chosen: Proposal,
    last_used: u64,
}

/// Addresses of the weights, the input and the output; they are as long as the plan says.
#[derive(Clone, Copy)]
struct Operands([u64; 3]);

impl Blas {
    /// Bytes of scratch memory, at most.
    pub const MAX_SCRATCH: u64 = WORKSPACE_BYTES[0] as u64;

    /// Loads the library where that was not done yet, and takes scratch memory: 32 MiB, less where the device has less.
    ///
    /// # Errors
    /// [`GpuError::NoLibrary`], [`GpuError::BadLibrary`]; [`GpuError::Library`] where it does not start.
    pub fn new(queue: &Queue) -> Result<Self, GpuError> {
        let library = cublaslt()?;
        let queue = Queue { gpu: queue.gpu.clone(), stream: queue.stream.clone() };
        let [mut n_bytes, least] = WORKSPACE_BYTES;
        let workspace = loop {
            match queue.alloc(n_bytes, "scratch memory of matrix products") {
                Err(GpuError::OutOfMemory { .. }) if n_bytes > least => n_bytes /= 2,
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

    /// `y = x w^T`, or that added to `y`; `x` is `[n, d_in]` from row `first_row` on, `y` `[n, d_out]`.
    ///
    /// # Errors
    /// [`GpuError::Library`] names the product.
    ///
    /// # Panics
    /// Where buffers are too short or belong to another queue.
    pub fn times_transposed(
        &self,
        x: &DeviceVec<u8>,
        first_row: usize,
        w: BlasWeight<'_>,
        n: usize,
        adds: bool,
        y: &mut DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        self.queue.owns(y);
        self.product(Kind::Transposed, w, n, (x, first_row), (y.at, y.len, 0), adds)
    }

    /// `logits = x w^T` in float32; shapes of [`Self::times_transposed`].
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

    /// `dx = dy w`; `dy` is `[n, d_out]`, `dx` `[n, d_in]` from row `first_row` on.
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
        assert!(n * d_out * width <= dy.len && n * d_in * width <= x.len, "all rows are there");
        assert!(rows.len() * d_in <= dw.len, "all rows of the output are there");
        if n == 0 {
            return self.queue.fill_first(dw, rows.len() * d_in, 0);
        }
        let input = dy.at + (rows.start * width) as u64;
        let (kind, alignments) = (Kind::Outer, [1; 3]);
        let key = Key { kind, dtype, d_out: rows.len(), d_in, n, stride: d_out, alignments };
        // SAFETY: the operands are as long as asserted: of `dy` columns within a row, of which the last row has them all.
        unsafe { self.run(key, Operands([x.at, input, dw.at]), false) }
    }

    /// Starts a product. The input is memory and a first row; the output an address, bytes that are there, and a first row.
    fn product(
        &self,
        kind: Kind,
        w: BlasWeight<'_>,
        n: usize,
        (input, input_row): (&DeviceVec<u8>, usize),
        (output, output_bytes, output_row): (u64, usize, usize),
        adds: bool,
    ) -> Result<(), GpuError> {
        let BlasWeight { values, dtype, d_out, d_in } = w;
        self.queue.owns(values);
        self.queue.owns(input);
        assert!(d_out > 0 && d_in > 0, "a weight has elements");
        let mut key = Key { kind, dtype, d_out, d_in, n, stride: 0, alignments: [1; 3] };
        let (in_width, out_width) = key.widths();
        key.stride = in_width;
        let (in_bytes, out_bytes) = (bytes_of(dtype), bytes_of(key.out_type()));
        assert!(d_out * d_in * in_bytes <= values.len, "all weights are there");
        assert!((input_row + n) * in_width * in_bytes <= input.len, "all rows of the input are there");
        assert!((output_row + n) * out_width * out_bytes <= output_bytes, "all rows of the output are there");
        if n == 0 {
            return Ok(());
        }
        let input = input.at + (input_row * in_width * in_bytes) as u64;
        let output = output + (output_row * out_width * out_bytes) as u64;
        // SAFETY: the operands are as long as asserted, without gaps.
        unsafe { self.run(key, Operands([values.at, input, output]), adds) }
    }

    /// # Safety
    /// The operands are memory of this queue, as long as the key says.
    unsafe fn run(&self, mut key: Key, operands: Operands, adds: bool) -> Result<(), GpuError> {
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
        let plan = plans.get_mut(&key).expect("it was just put there");
        plan.last_used = *clock;
        // SAFETY: the caller vouches for the operands, and the plan was made for the key.
        let status = unsafe { self.start(*handle, plan, operands, adds) };
        self.check(status, key)
    }

    /// Asks the library how the product may be done.
    fn plan(&self, handle: Opaque, key: &Key) -> Result<ProductPlan, GpuError> {
        let Functions { desc_create, desc_set, desc_destroy, preference_create, preference_destroy, propose, .. } =
            self.library.functions;
        let (in_width, out_width) = key.widths();
        let (in_type, out_type) = (type_code(key.dtype), type_code(key.out_type()));
        let product = self.describe(key, desc_destroy, |at| {
            // SAFETY: makes one description; float32 for sums and for what they are multiplied by.
            unsafe { desc_create(at, COMPUTE_32F, R_32F) }
        })?;
        let transposed = match key.kind {
            Kind::Transposed | Kind::TransposedF32 => Some(DESC_TRANSA),
            Kind::Outer => Some(DESC_TRANSB),
            Kind::Plain => None,
        };
        if let Some(attribute) = transposed {
            // SAFETY: one factor is read as transposed; the attribute is one integer.
            self.check(unsafe { set(desc_set, product.at, attribute, &OP_T) }, key)?;
        }
        // Columns of what takes the place of the weights, and of the output.
        let (of_w, of_out) = if key.kind == Kind::Outer { (key.n, key.d_out) } else { (key.d_out, key.n) };
        let layouts = [
            self.layout(key, in_type, key.d_in, of_w, key.d_in)?,
            self.layout(key, in_type, in_width, key.n, key.stride)?,
            self.layout(key, out_type, out_width, of_out, out_width)?,
        ];
        let preference = self.describe(key, preference_destroy, |at| {
            // SAFETY: makes one description.
            unsafe { preference_create(at) }
        })?;
        self.prefer(key, &preference)?;
        let mut proposals = [Proposal::EMPTY; MAX_PROPOSALS];
        let mut n_proposals: c_int = 0;
        let [w, input, output] = layouts.each_ref().map(|layout| layout.at);
        // SAFETY: descriptions that are alive, the output's twice: what is added to lies as what is written; room for as many
        // proposals as are asked for.
        let status = unsafe {
            let room = (MAX_PROPOSALS as c_int, proposals.as_mut_ptr(), &raw mut n_proposals);
            propose(handle, product.at, w, input, output, output, preference.at, room.0, room.1, room.2)
        };
        self.check(status, key)?;
        let n_proposals = usize::try_from(n_proposals).unwrap_or(0).min(MAX_PROPOSALS);
        let fits = |proposal: &&Proposal| proposal.status == 0 && proposal.workspace_bytes <= self.workspace.len;
        let Some(&chosen) = proposals[..n_proposals].iter().find(fits) else {
            return Err(self.refused(key, "it knows no way to do it".to_owned()));
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
    /// The operands are as long and as aligned as the product that the plan was made for needs, and belong to this queue.
    unsafe fn start(&self, handle: Opaque, plan: &ProductPlan, operands: Operands, adds: bool) -> Status {
        let (one, beta) = (1.0_f32, if adds { 1.0_f32 } else { 0.0 });
        let [w, input, output] = operands.0.map(|at| at as *mut c_void);
        let [of_w, of_input, of_output] = plan.layouts.each_ref().map(|layout| layout.at);
        let Self { workspace, queue, library, .. } = self;
        queue.gpu.starts(NAME);
        // SAFETY: the caller vouches for the operands; the scratch memory is as long as is said, and used by this stream alone; the
        // library reads numbers and descriptions before it returns.
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
            // SAFETY: makes one description.
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
            // Where earlier work failed, the driver knows better what happened.
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
            // SAFETY: made in `new`, destroyed once, with none of its work under way and bound to its device.
            let destroyed = unsafe { (self.library.functions.destroy)(state.handle) };
            let _nobody = (waited, destroyed);
        }
    }
}

/// # Safety
/// `at` is a description of the kind that `function` is for, and the attribute has the type of `value`.
unsafe fn set<T>(
    function: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
    at: Opaque,
    attribute: c_int,
    value: &T,
) -> Status {
    // SAFETY: the caller vouches for the types; the value is read before the call returns.
    unsafe { function(at, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn type_code(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::BF16 => R_16BF,
        Dtype::F16 => R_16F,
        Dtype::F32 => R_32F,
        other => panic!("products are of BF16, F16 and F32, not {other:?}"),
    }
}

fn bytes_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}
