//! Weights that stay on a device, with sparse deltas applied to them: for trainers and servers.
//!
//! ```no_run
//! use neuroada_ckpt::{Dtype, internals::{gpu::{DeviceMatrix, DevicePatch, Gpu, Queue}, tensor::RowBlock}};
//! let queue = Queue::new(&Gpu::open(0)?)?;
//! let rows = RowBlock::new(&[0; 8], Dtype::BF16, 2, 2);
//! let mut weights = DeviceMatrix::new(&queue, rows)?;
//! // One delta per row, removed again afterwards.
//! let patch = DevicePatch::new(&queue, &[1, 0], &[0.5, -0.25], 1, 2)?;
//! let originals = weights.patch(&queue, &patch, 1.0)?;
//! weights.restore(&queue, &patch, &originals)?;
//! # Ok::<(), neuroada_ckpt::internals::gpu::GpuError>(())
//! ```

use super::{
    DeviceVec, GpuError, MAX_COLUMNS, Queue,
    launch::{KeyRows, is_supported},
};
use crate::tensor::{Dtype, Float, RowBlock, RowColumns, with_float};

/// A weight on a device, `[n_rows, d_in]`, row-major: BF16, F16 or F32.
pub struct DeviceMatrix {
    values: DeviceVec<u8>,
    dtype: Dtype,
    n_rows: usize,
    d_in: usize,
}

/// Deltas of one adapter on a device, `k` per row.
pub struct DevicePatch {
    columns: DeviceVec<u32>,
    values: DeviceVec<f32>,
    k: usize,
    n_rows: usize,
    d_in: usize,
}

/// Deltas of several adapters on a device, grouped by position, for rows with different numbers of deltas.
pub struct DeviceTerms {
    positions: DeviceVec<u64>,
    starts: DeviceVec<u32>,
    terms: DeviceVec<f32>,
    n_rows: usize,
    d_in: usize,
}

impl DeviceMatrix {
    /// Copies rows to the device.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or other errors of the driver.
    ///
    /// # Panics
    /// If the elements are not BF16, F16 or F32.
    pub fn new(queue: &Queue, rows: RowBlock<'_>) -> Result<Self, GpuError> {
        Self::of(queue.upload_all(rows.bytes(), "a weight")?, rows.dtype(), rows.n_rows(), rows.d_in())
    }

    /// Wraps a weight that is already on the device, as memory of a queue (see [`Queue::from_raw`]).
    ///
    /// # Errors
    /// None at present.
    ///
    /// # Panics
    /// If its length does not match the shape, or the elements are not BF16, F16 or F32.
    pub fn of(values: DeviceVec<u8>, dtype: Dtype, n_rows: usize, d_in: usize) -> Result<Self, GpuError> {
        assert!(is_supported(dtype), "kernels support BF16, F16 and F32");
        assert_eq!(values.len() * 8, n_rows * d_in * dtype.bitsize(), "a matrix has whole rows");
        Ok(Self { values, dtype, n_rows, d_in })
    }

    /// `[n_rows, d_in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.n_rows, self.d_in]
    }
    /// The dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Copies the rows to the host.
    ///
    /// # Errors
    /// Errors of the driver, also of earlier work.
    pub fn download(&self, queue: &Queue) -> Result<Vec<u8>, GpuError> {
        queue.download_all(&self.values)
    }

    /// Starts to choose the `k` entries of largest magnitude in each row; ties go to the lower column.
    ///
    /// `columns` receives `[n_rows, k]`, ascending within a row; `first_nan` (one value, initially [`u64::MAX`]) is
    /// lowered to row << 32 | column of the first NaN.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If `k` is 0 or more than a row has, rows are longer than [`MAX_COLUMNS`], or lengths differ.
    pub fn topk(
        &self,
        queue: &Queue,
        k: usize,
        columns: &mut DeviceVec<u32>,
        first_nan: &mut DeviceVec<u64>,
    ) -> Result<(), GpuError> {
        assert!(self.d_in <= MAX_COLUMNS, "rows are within the device's limit");
        let (mask, largest) =
            with_float!(self.dtype, T => T::KEY_BITS, else unreachable!("kernels support only floats"));
        let rows = KeyRows {
            bytes: &self.values,
            key_bytes: self.dtype.bitsize() / 8,
            n_rows: self.n_rows,
            d_in: self.d_in,
            mask: mask as u32,
            largest: largest as u32,
        };
        queue.topk(&rows, k, columns, first_nan)
    }

    /// Starts to add the deltas times `scale`, each sum rounded once; returns the original values of the patched
    /// weights.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or other errors of the driver.
    ///
    /// # Panics
    /// If the patch has another shape.
    pub fn patch(&mut self, queue: &Queue, patch: &DevicePatch, scale: f32) -> Result<DeviceVec<u8>, GpuError> {
        self.fits(patch.n_rows, patch.d_in);
        let mut originals = queue.alloc(patch.columns.len() * self.dtype.bitsize() / 8, "the original weights")?;
        let weights = (&mut self.values, self.dtype, self.d_in);
        queue.originals(weights, (&patch.columns, patch.k), &mut originals, false)?;
        self.patch_from(queue, patch, scale, &originals)?;
        Ok(originals)
    }

    /// Starts to set the patched weights to their originals plus the deltas times `scale`, as a trainer does after
    /// each step.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If the patch or the originals have another shape.
    pub fn patch_from(
        &mut self,
        queue: &Queue,
        patch: &DevicePatch,
        scale: f32,
        originals: &DeviceVec<u8>,
    ) -> Result<(), GpuError> {
        self.fits(patch.n_rows, patch.d_in);
        let weights = (&mut self.values, self.dtype, self.d_in);
        queue.patch_rows(weights, (&patch.columns, &patch.values, patch.k), scale, Some(originals))
    }

    /// Starts to restore the patched weights, bit for bit.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If the patch or the originals have another shape.
    pub fn restore(&mut self, queue: &Queue, patch: &DevicePatch, originals: &DeviceVec<u8>) -> Result<(), GpuError> {
        self.fits(patch.n_rows, patch.d_in);
        // In this direction the kernel writes only the weights.
        let mut copy = queue.alloc(originals.len(), "the original weights")?;
        queue.copy(originals, &mut copy)?;
        let weights = (&mut self.values, self.dtype, self.d_in);
        queue.originals(weights, (&patch.columns, patch.k), &mut copy, true)
    }

    /// Starts to add the deltas of several adapters: sums in float32 in the adapters' order, rounded once.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Panics
    /// If the terms have another shape.
    pub fn patch_terms(&mut self, queue: &Queue, terms: &DeviceTerms) -> Result<(), GpuError> {
        self.fits(terms.n_rows, terms.d_in);
        queue.patch_terms((&mut self.values, self.dtype), &terms.positions, &terms.starts, &terms.terms)
    }

    fn fits(&self, n_rows: usize, d_in: usize) {
        assert_eq!([n_rows, d_in], self.shape(), "deltas match the weights' shape");
    }
}

impl DevicePatch {
    /// Copies the deltas of one adapter to the device: `columns` and `values` are `[n_rows, k]`, and columns ascend
    /// within a row.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or other errors of the driver.
    ///
    /// # Panics
    /// If the lengths are inconsistent, a column is not below `d_in`, or columns do not ascend.
    pub fn new(queue: &Queue, columns: &[u32], values: &[f32], k: usize, d_in: usize) -> Result<Self, GpuError> {
        assert!(k > 0 && columns.len().is_multiple_of(k), "whole rows of k columns");
        assert_eq!(columns.len(), values.len(), "one delta per column");
        let ascend =
            |row: &[u32]| row.is_sorted_by(|a, b| a < b) && row.last().is_none_or(|&last| (last as usize) < d_in);
        assert!(columns.chunks(k).all(ascend), "columns ascend within a row and are in range");
        let n_rows = columns.len() / k;
        let columns = queue.upload_all(columns, "columns of deltas")?;
        Ok(Self { columns, values: queue.upload_all(values, "deltas")?, k, n_rows, d_in })
    }

    /// The deltas, `[n_rows, k]`, for a trainer that updates them on the device.
    pub fn values_mut(&mut self) -> &mut DeviceVec<f32> {
        &mut self.values
    }
}

impl DeviceTerms {
    /// Copies the deltas of several adapters to the device, each with its columns row by row, its values and its
    /// scale, in the order of summation.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or other errors of the driver.
    ///
    /// # Panics
    /// If there are no adapters, they differ in rows, the lengths are inconsistent, a column is not below `d_in`, or
    /// there are 2^32 deltas.
    pub fn new(queue: &Queue, parts: &[(&RowColumns, &[f32], f32)], d_in: usize) -> Result<Self, GpuError> {
        let n_rows = parts.first().expect("deltas of at least one adapter").0.n_rows();
        let mut entries: Vec<(u64, f32)> = Vec::new();
        for (columns, values, scale) in parts {
            assert_eq!((columns.n_rows(), columns.nnz()), (n_rows, values.len()), "all adapters cover the same rows");
            for row in 0..n_rows {
                for (&column, &value) in columns.row(row).iter().zip(&values[columns.row_range(row)]) {
                    assert!((column as usize) < d_in, "columns are in range");
                    entries.push((row as u64 * d_in as u64 + u64::from(column), value * scale));
                }
            }
        }
        // A stable sort: the terms of one position stay in the adapters' order.
        entries.sort_by_key(|&(position, _)| position);
        let n = u32::try_from(entries.len()).expect("fewer than 2^32 deltas of one weight");
        let (mut positions, mut starts) = (Vec::new(), Vec::new());
        for (&(position, _), at) in entries.iter().zip(0..) {
            if positions.last() != Some(&position) {
                positions.push(position);
                starts.push(at);
            }
        }
        starts.push(n);
        let terms: Vec<f32> = entries.iter().map(|&(_, term)| term).collect();
        Ok(Self {
            positions: queue.upload_all(&positions, "positions of deltas")?,
            starts: queue.upload_all(&starts, "positions of deltas")?,
            terms: queue.upload_all(&terms, "deltas")?,
            n_rows,
            d_in,
        })
    }
}
