//! Kernels for the trained entries: `sparse.cu`.

use super::{
    DeviceVec, Queue,
    kernels::{Arg, blocks_for, bytes_of, memory, small},
    passes::of_type,
};
use crate::{gpu::GpuError, tensor::Dtype};

/// Entries per block of the gradient kernel.
const ENTRIES: usize = 2048;
/// Its shared memory: the tokens of that many columns, 16 bytes each.
const STAGED: u32 = 16 * 2048;
/// Number of blocks that keeps every GPU busy; the tokens are split into slices until there are as many.
const MANY_BLOCKS: usize = 768;
/// Minimum number of tokens per slice.
const MIN_SLICE: usize = 32;
/// Maximum number of slices.
const MAX_SLICES: usize = 128;
/// Minimum number of values per sum of squares, and maximum number of sums.
const VALUES: usize = 4096;
const MAX_SUMS: usize = 64;

/// Chosen entries of a matrix `[d_out, d_in]`.
#[derive(Clone, Copy)]
pub struct EntriesOf<'a> {
    /// `[d_out + 1]`: the entries of row `i` are `offsets[i]..offsets[i + 1]`.
    pub offsets: &'a DeviceVec<u32>,
    /// `[nnz]`.
    pub columns: &'a DeviceVec<u32>,
    /// Number of entries.
    pub nnz: usize,
    /// Rows and columns of the matrix.
    pub shape: (usize, usize),
}

impl Queue {
    fn has_entries(&self, of: EntriesOf<'_>) -> [Arg; 2] {
        let EntriesOf { offsets, columns, nnz, shape: (d_out, _) } = of;
        self.owns(offsets);
        self.owns(columns);
        assert!(
            d_out > 0 && offsets.len == d_out + 1 && nnz <= columns.len,
            "offsets of all rows, columns of all entries"
        );
        [memory(offsets), memory(columns)]
    }

    /// Number of scratch values that [`Self::gather_dot`] needs for `n` tokens and `nnz` entries.
    pub fn gather_scratch_len(n: usize, nnz: usize) -> usize {
        slices(n, nnz).0 * nnz
    }

    /// `grad[e] += sum_t dy[t, i] * x[t, columns[e]]` for each entry `e` of each row `i`, always in the same order;
    /// `dy` is `[n, d_out]`, `x` `[n, d_in]`, both of `dtype`; `scratch` has [`Self::gather_scratch_len`] values, with arbitrary
    /// content.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn gather_dot(
        &self,
        (dy, x, dtype): (&DeviceVec<u8>, &DeviceVec<u8>, Dtype),
        n: usize,
        of: EntriesOf<'_>,
        grad: &mut DeviceVec<f32>,
        scratch: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let (nnz, (d_out, d_in)) = (of.nnz, of.shape);
        let [offsets, columns] = self.has_entries(of);
        let (n_slices, slice) = slices(n, nnz);
        let (dy, x) = (self.checked_rows(dy, dtype, n, d_out), self.checked_rows(x, dtype, n, d_in));
        let stride = Arg::U32(if nnz > 4 * d_out { 1 } else { 256 });
        let partial = self.has(scratch, n_slices * nnz);
        let (rows, entries) = (small(d_out), small(nnz));
        let args = &mut [dy, x, offsets, columns, partial, small(n), rows, small(d_in), entries, small(slice), stride];
        let grid = (nnz.div_ceil(ENTRIES) as u32, n_slices as u32);
        // SAFETY: sparse.cu takes these in this order. It reads `n` rows, whatever offsets and columns contain: rows
        // are found below d_out, columns beyond d_in are skipped. It writes a partial sum per slice and entry: the
        // lengths are asserted.
        unsafe { self.launch("sparse", of_type!("gather_dot", dtype), grid, STAGED, args) }?;
        let args = &mut [memory(scratch), self.has(grad, nnz), small(n_slices), small(nnz)];
        // SAFETY: as above; one sum per entry.
        unsafe { self.launch("sparse", "add_slices", (blocks_for(nnz), 1), 0, args) }
    }

    /// `grad[e] += dense[i - first_row, columns[e]]` for each entry `e` of the rows `i` of `dense`, `[n_rows, d_in]`.
    ///
    ///  # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn take_entries(
        &self,
        dense: &DeviceVec<f32>,
        (first_row, n_rows): (usize, usize),
        of: EntriesOf<'_>,
        grad: &mut DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let (nnz, (d_out, d_in)) = (of.nnz, of.shape);
        let [offsets, columns] = self.has_entries(of);
        assert!(first_row + n_rows <= d_out, "rows are inside the matrix");
        let (dense, grad) = (self.has(dense, n_rows * d_in), self.has(grad, nnz));
        let args = &mut [dense, offsets, columns, grad, small(first_row), small(d_in), small(nnz)];
        // SAFETY: sparse.cu takes these in this order; entries beyond nnz and columns beyond d_in are skipped, and all
        // other accesses are within the lengths asserted.
        unsafe { self.launch("sparse", "take_entries", (n_rows as u32, 1), 0, args) }
    }

    /// `weights[i, columns[e]] = round(originals[e] + theta[e])` for each entry `e` of each row `i`: the sum in
    /// float32, rounded once to the weights' dtype. A NaN original keeps its bits.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn patch_entries(
        &self,
        (weights, dtype): (&mut DeviceVec<u8>, Dtype),
        of: EntriesOf<'_>,
        originals: &DeviceVec<u8>,
        theta: &DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let (nnz, (d_out, d_in)) = (of.nnz, of.shape);
        let [offsets, columns] = self.has_entries(of);
        self.owns(originals);
        assert!(nnz * bytes_of(dtype) <= originals.len, "one original per entry");
        let (weights, theta) = (self.checked_rows(weights, dtype, d_out, d_in), self.has(theta, nnz));
        let args = &mut [weights, offsets, columns, memory(originals), theta, small(d_out), small(d_in), small(nnz)];
        // SAFETY: sparse.cu takes these in this order; entries beyond nnz and columns beyond d_in are skipped, and all
        // other accesses are within the lengths asserted.
        unsafe { self.launch("sparse", of_type!("patch_entries", dtype), (blocks_for(d_out), 1), 0, args) }
    }

    /// `bias[i] = round(originals[e] + theta[e])` for each entry `e` of each row `i`, rounded to `dtype` and widened;
    /// `bias` is `[d_out]`, with entries of shape `(d_out, 1)`.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn patch_bias(
        &self,
        bias: &mut DeviceVec<f32>,
        of: EntriesOf<'_>,
        (originals, dtype): (&DeviceVec<u8>, Dtype),
        theta: &DeviceVec<f32>,
    ) -> Result<(), GpuError> {
        let (nnz, (d_out, _)) = (of.nnz, of.shape);
        let [offsets, _] = self.has_entries(of);
        self.owns(originals);
        assert!(nnz * bytes_of(dtype) <= originals.len, "one original per entry");
        let (bias, theta) = (self.has(bias, d_out), self.has(theta, nnz));
        let args = &mut [bias, offsets, memory(originals), theta, small(d_out), small(nnz)];
        // SAFETY: sparse.cu takes these in this order; entries beyond nnz are skipped, and all other accesses are
        // within the lengths asserted.
        unsafe { self.launch("sparse", of_type!("patch_bias", dtype), (blocks_for(d_out), 1), 0, args) }
    }

    /// One AdamW step on `theta`, `[n]`, with its gradient and state; `numbers` are the kernel's scalars, from
    /// `grad_scale` to `eps`.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn adamw(
        &self,
        theta: &mut DeviceVec<f32>,
        grad: &DeviceVec<f32>,
        [mean, variance]: [&mut DeviceVec<f32>; 2],
        n: usize,
        numbers: [f32; 8],
    ) -> Result<(), GpuError> {
        let mut args: Vec<Arg> = [&*theta, grad, &*mean, &*variance].map(|of| self.has(of, n)).into();
        args.push(small(n));
        args.extend(numbers.map(Arg::F32));
        // SAFETY: sparse.cu takes these in this order and accesses `n` values of each: the lengths are asserted.
        unsafe { self.launch("sparse", "adamw", (blocks_for(n), 1), 0, &mut args) }
    }

    /// The number of partial sums that [`Self::sum_of_squares`] writes for `n` values.
    pub fn n_sums(n: usize) -> usize {
        n.div_ceil(VALUES).clamp(1, MAX_SUMS)
    }

    /// Writes partial sums of the squares of the first `n` values, in float64, to `sums[at..]`, as many as
    /// [`Self::n_sums`] returns.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If memory is too short, or belongs to another queue.
    pub fn sum_of_squares(
        &self,
        values: &DeviceVec<f32>,
        n: usize,
        sums: &mut DeviceVec<f64>,
        at: usize,
    ) -> Result<(), GpuError> {
        let n_sums = Self::n_sums(n);
        let args = &mut [self.has(values, n), small(n), self.has(sums, at + n_sums), small(at)];
        // SAFETY: sparse.cu takes these in this order, reads `n` values and writes one sum per block: the lengths are
        // asserted.
        unsafe { self.launch("sparse", "sum_of_squares", (n_sums as u32, 1), 8 * 8, args) }
    }
}

/// Number of slices of the tokens, and tokens per slice: determined by shapes alone, so that every GPU sums in the
/// same order.
fn slices(n: usize, nnz: usize) -> (usize, usize) {
    let n_blocks = nnz.div_ceil(ENTRIES).max(1);
    let wanted = MANY_BLOCKS.div_ceil(n_blocks).min(n.div_ceil(MIN_SLICE)).clamp(1, MAX_SLICES);
    // Whole groups of tokens, so that only the last slice ends inside one.
    let slice = n.div_ceil(wanted).max(1).next_multiple_of(8);
    (n.div_ceil(slice).max(1), slice)
}
