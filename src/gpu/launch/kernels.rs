//! Kernels, one function each.

use cudarc::driver::{result, sys::CUfunction_attribute_enum};

use super::{DeviceVec, Queue};
use crate::{
    gpu::{GpuError, MAX_COLUMNS},
    tensor::Dtype,
};

const THREADS: u32 = 256;
/// Bytes of shared memory that a kernel has by default.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;
const ROWS_PER_BLOCK: u32 = THREADS / 32;
/// Rows and columns per block of the low-rank kernel.
const TILE: u32 = 64;
/// Maximum number of blocks in the second dimension of a grid.
pub(super) const MAX_GRID_Y: u32 = 65_535;

/// An argument of a kernel.
pub(super) enum Arg {
    U32(u32),
    U64(u64),
    F32(f32),
}

impl Arg {
    fn pointer(&mut self) -> *mut std::ffi::c_void {
        match self {
            Self::U32(value) => std::ptr::from_mut(value).cast(),
            Self::U64(value) => std::ptr::from_mut(value).cast(),
            Self::F32(value) => std::ptr::from_mut(value).cast(),
        }
    }
}

pub(super) fn memory<T>(memory: &DeviceVec<T>) -> Arg {
    Arg::U64(memory.at)
}

pub(super) fn small(n: usize) -> Arg {
    Arg::U32(u32::try_from(n).expect("shapes on a device fit 32 bits"))
}

/// Keys of rows on a device: elements of 2 or 4 bytes; `mask` selects the key, and `largest` is the largest key that
/// is not NaN.
pub(in crate::gpu) struct KeyRows<'a> {
    pub(in crate::gpu) bytes: &'a DeviceVec<u8>,
    pub(in crate::gpu) key_bytes: usize,
    pub(in crate::gpu) n_rows: usize,
    pub(in crate::gpu) d_in: usize,
    pub(in crate::gpu) mask: u32,
    pub(in crate::gpu) largest: u32,
}

impl Queue {
    /// Starts a kernel with blocks of [`THREADS`] threads.
    ///
    /// # Safety
    /// As [`Self::launch_blocks`].
    pub(super) unsafe fn launch(
        &self,
        file: &'static str,
        name: &'static str,
        grid: (u32, u32),
        shared_bytes: u32,
        args: &mut [Arg],
    ) -> Result<(), GpuError> {
        // SAFETY: the caller guarantees the arguments.
        unsafe { self.launch_blocks(file, name, grid, (THREADS, shared_bytes), args) }
    }

    /// Starts a kernel, given blocks, threads per block, and bytes of shared memory per block.
    ///
    /// # Safety
    /// `args` are as declared in the kernel's source, in this order, and the memory they point to is as long as the
    /// kernel requires.
    pub(super) unsafe fn launch_blocks(
        &self,
        file: &'static str,
        name: &'static str,
        (x, y): (u32, u32),
        (threads, shared_bytes): (u32, u32),
        args: &mut [Arg],
    ) -> Result<(), GpuError> {
        if x == 0 || y == 0 {
            return Ok(());
        }
        let function = self.gpu.function(file, name)?;
        self.gpu.bind()?;
        let failed = |e| self.gpu.failed("starting a kernel", e);
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let which = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(which, shared_bytes as i32).map_err(failed)?;
        }
        self.gpu.record_kernel(name);
        let mut pointers: Vec<*mut std::ffi::c_void> = args.iter_mut().map(Arg::pointer).collect();
        let (grid, block) = ((x, y, 1), (threads, 1, 1));
        let (function, stream) = (function.cu_function(), self.stream.cu_stream());
        // SAFETY: the caller guarantees the arguments; the driver reads them before it returns.
        unsafe { result::launch_kernel(function, grid, block, shared_bytes, stream, &mut pointers) }.map_err(failed)
    }

    /// Writes the columns of the `k` largest keys of each row to the start of `columns`; lowers `first_nan` to row <<
    /// 32 | column.
    pub(in crate::gpu) fn topk(
        &self,
        rows: &KeyRows<'_>,
        k: usize,
        columns: &mut DeviceVec<u32>,
        first_nan: &mut DeviceVec<u64>,
    ) -> Result<(), GpuError> {
        self.owns(rows.bytes);
        self.owns(columns);
        self.owns(first_nan);
        let (n_rows, d_in) = (rows.n_rows, rows.d_in);
        assert!(n_rows * d_in * rows.key_bytes <= rows.bytes.len, "the buffer has all rows");
        assert!(n_rows * k <= columns.len && first_nan.len == 1, "one column per chosen key");
        assert!(0 < k && k <= d_in && d_in <= MAX_COLUMNS, "k columns of a row");
        assert!(rows.mask >> (8 * rows.key_bytes - 1) == 0 || rows.key_bytes == 4, "keys of 16 bits use 15 of them");
        let wide = rows.key_bytes == 4;
        assert!(wide || rows.key_bytes == 2, "keys have 16 or 32 bits");
        let blocks = (n_rows as u32).div_ceil(ROWS_PER_BLOCK);
        let (mask, largest) = (Arg::U32(rows.mask), Arg::U32(rows.largest));
        let (from, to, nan) = (memory(rows.bytes), memory(columns), memory(first_nan));
        match k {
            1 => {
                let name = if wide { "top1_u32" } else { "top1_u16" };
                let args = &mut [from, small(n_rows), small(d_in), mask, largest, to, nan];
                // SAFETY: topk.cu takes (rows, n_rows, d_in, mask, largest, columns, first_nan) and accesses whole
                // rows, with the lengths asserted above; keys and columns fit in one word, as asserted.
                unsafe { self.launch("topk", name, (blocks, 1), 0, args) }
            }
            2..=32 => {
                let name = if wide { "topk_warp_u32" } else { "topk_warp_u16" };
                // 64 words of twice the key width per warp.
                let shared = ROWS_PER_BLOCK * 64 * 2 * rows.key_bytes as u32;
                let args = &mut [from, small(n_rows), small(d_in), small(k), mask, largest, to, nan];
                // SAFETY: as above, with k after d_in; the shared memory is as topk.cu requires.
                unsafe { self.launch("topk", name, (blocks, 1), shared, args) }
            }
            _ => {
                let name = if wide { "topk_block_u32" } else { "topk_block_u16" };
                let args = &mut [from, small(d_in), small(k), mask, largest, to, nan];
                // SAFETY: as above, without n_rows: one block per row.
                unsafe { self.launch("topk", name, (n_rows as u32, 1), 4 * (256 + 16 + 2), args) }
            }
        }
    }

    /// Writes the keys of scores, 4 bytes each, to the start of `keys`; see `score.cu` for kinds.
    #[expect(clippy::too_many_arguments, reason = "the kernel's arguments")]
    pub(in crate::gpu) fn score_keys(
        &self,
        (weights, weight_type): (&DeviceVec<u8>, Dtype),
        gradients: Option<(&DeviceVec<u8>, Dtype)>,
        norms: &DeviceVec<f32>,
        (first_row, d_out): (u32, u32),
        kind: u32,
        (n_rows, d_in): (usize, usize),
        keys: &mut DeviceVec<u8>,
        first_nan: &mut DeviceVec<u64>,
    ) -> Result<(), GpuError> {
        self.owns(weights);
        self.owns(norms);
        self.owns(keys);
        self.owns(first_nan);
        let n = n_rows * d_in;
        assert!(
            n * bytes_of(weight_type) <= weights.len && 4 * n <= keys.len && first_nan.len == 1,
            "the buffers have all rows"
        );
        let (gradients, gradient_type) = gradients.unwrap_or((weights, weight_type));
        self.owns(gradients);
        assert!(n * bytes_of(gradient_type) <= gradients.len, "one gradient per weight");
        let n_matrices = (first_row as usize + n_rows.saturating_sub(1)) / d_out as usize + 1;
        assert!(kind != 4 || n_matrices * d_in <= norms.len, "one norm per column");
        let types = (Arg::U32(type_code(weight_type)), Arg::U32(type_code(gradient_type)));
        let args = &mut [
            memory(weights),
            types.0,
            memory(gradients),
            types.1,
            memory(norms),
            Arg::U32(first_row),
            Arg::U32(d_out),
            Arg::U32(kind),
            small(d_in),
            memory(keys),
            memory(first_nan),
        ];
        // SAFETY: score.cu takes these in this order, one block per row; it accesses whole rows, and norms only for
        // kind 4: the lengths are asserted above.
        unsafe { self.launch("score", "score_keys", (n_rows as u32, 1), 0, args) }
    }

    /// `weights[row, columns[row, j]] = round(original + values[row, j] * scale)`; columns must be in range.
    pub(in crate::gpu) fn patch_rows(
        &self,
        (weights, dtype, d_in): (&mut DeviceVec<u8>, Dtype, usize),
        (columns, values, k): (&DeviceVec<u32>, &DeviceVec<f32>, usize),
        scale: f32,
        originals: Option<&DeviceVec<u8>>,
    ) -> Result<(), GpuError> {
        let n = columns.len;
        self.owns(weights);
        self.owns(columns);
        self.owns(values);
        assert!(values.len == n && k > 0 && n % k == 0, "one value per column");
        assert!(n / k * d_in * bytes_of(dtype) == weights.len, "columns for every row");
        let originals = originals.map_or(Arg::U64(0), |originals| {
            self.owns(originals);
            assert!(originals.len == n * bytes_of(dtype), "one original per column");
            memory(originals)
        });
        let name = ["patch_rows_bf16", "patch_rows_f16", "patch_rows_f32"][type_code(dtype) as usize];
        let (from, of_values) = (memory(columns), memory(values));
        let n_all = Arg::U64(n as u64);
        let args = &mut [memory(weights), from, of_values, Arg::F32(scale), originals, small(d_in), small(k), n_all];
        // SAFETY: patch.cu takes these in this order and accesses one weight per column: `DevicePatch` contains only
        // columns below d_in.
        unsafe { self.launch("patch", name, (blocks_for(n), 1), 0, args) }
    }

    /// `weights[positions[i]] = round(weight + sum of its terms)`; positions and starts must be in range.
    pub(in crate::gpu) fn patch_terms(
        &self,
        (weights, dtype): (&mut DeviceVec<u8>, Dtype),
        positions: &DeviceVec<u64>,
        starts: &DeviceVec<u32>,
        terms: &DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        self.owns(weights);
        self.owns(positions);
        self.owns(starts);
        self.owns(terms);
        assert!(starts.len == positions.len + 1, "terms for every position");
        let name = ["patch_terms_bf16", "patch_terms_f16", "patch_terms_f32"][type_code(dtype) as usize];
        let n = Arg::U64(positions.len as u64);
        let args = &mut [memory(weights), memory(positions), memory(starts), memory(terms), n];
        // SAFETY: patch.cu takes these in this order; `DeviceTerms` contains only positions inside its shape, which
        // the caller has compared with that of the weights, and starts that ascend to the number of terms.
        unsafe { self.launch("patch", name, (blocks_for(positions.len), 1), 0, args) }
    }

    /// Copies the weights at `columns` to `originals`, or the reverse.
    pub(in crate::gpu) fn originals(
        &self,
        (weights, dtype, d_in): (&mut DeviceVec<u8>, Dtype, usize),
        (columns, k): (&DeviceVec<u32>, usize),
        originals: &mut DeviceVec<u8>,
        restore: bool,
    ) -> Result<(), GpuError> {
        let n = columns.len;
        self.owns(weights);
        self.owns(columns);
        self.owns(originals);
        assert!(k > 0 && n % k == 0 && n / k * d_in * bytes_of(dtype) == weights.len, "columns for every row");
        assert!(originals.len == n * bytes_of(dtype), "one original per column");
        let name = if bytes_of(dtype) == 2 { "originals_u16" } else { "originals_u32" };
        let (to, restore) = (memory(originals), Arg::U32(restore.into()));
        let args = &mut [memory(weights), memory(columns), to, restore, small(d_in), small(k), Arg::U64(n as u64)];
        // SAFETY: patch.cu takes these in this order and accesses one weight per column: `DevicePatch` contains only
        // columns below d_in.
        unsafe { self.launch("patch", name, (blocks_for(n), 1), 0, args) }
    }

    /// `weights += scale * b a`, with shapes `[n_rows, d_in]`, `[n_rows, rank]` and `[rank, d_in]`; adds to `counts`.
    pub(in crate::gpu) fn low_rank(
        &self,
        (weights, dtype): (&mut DeviceVec<u8>, Dtype),
        (b, a): (&DeviceVec<f32>, &DeviceVec<f32>),
        scale: f32,
        (n_rows, d_in, rank): (usize, usize, usize),
        counts: &mut DeviceVec<u64>,
    ) -> Result<(), GpuError> {
        self.owns(weights);
        self.owns(b);
        self.owns(a);
        self.owns(counts);
        assert!(counts.len == 4, "four counts");
        assert!(n_rows * d_in * bytes_of(dtype) <= weights.len, "the buffer has all rows");
        assert!(n_rows * rank <= b.len && rank * d_in <= a.len, "the buffers have both factors");
        let (x, y) = ((d_in as u32).div_ceil(TILE), (n_rows as u32).div_ceil(TILE));
        assert!(y <= MAX_GRID_Y, "at most {} rows at once", MAX_GRID_Y * TILE);
        let name = ["low_rank_bf16", "low_rank_f16", "low_rank_f32"][type_code(dtype) as usize];
        let (n_rows, d_in, rank) = (small(n_rows), small(d_in), small(rank));
        let args = &mut [memory(weights), memory(b), memory(a), Arg::F32(scale), n_rows, d_in, rank, memory(counts)];
        // SAFETY: low_rank.cu takes these in this order and accesses whole rows and four counts: the lengths are
        // asserted above.
        unsafe { self.launch("low_rank", name, (x, y), 4 * 2 * 16 * TILE, args) }
    }
}

pub(super) fn blocks_for(n: usize) -> u32 {
    n.div_ceil(THREADS as usize).min(1 << 20) as u32
}

/// Whether the kernels support the dtype.
pub(in crate::gpu) fn is_supported(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}

pub(super) fn type_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::BF16 => 0,
        Dtype::F16 => 1,
        Dtype::F32 => 2,
        other => panic!("kernels support BF16, F16 and F32, not {other:?}"),
    }
}

pub(super) fn bytes_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}
