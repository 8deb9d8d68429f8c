//! Merges low-rank products on a GPU, and on the CPU if the GPU has not enough memory.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use super::{Gpu, GpuError, LowRank, LowRankCounts};
use crate::{
    backend::{AcceleratorError, LowRankMerger, MergedWeights, PatchCounts},
    tensor::Dtype,
};

/// Merges on the GPU what it supports, and counts weights.
pub struct GpuMerger {
    gpu: Gpu,
    /// Device memory per lane.
    device_bytes: u64,
    /// Lanes that are not in use.
    free: Mutex<Vec<LowRank>>,
    n_made: AtomicUsize,
    max_lanes: AtomicUsize,
    n_merged: AtomicU64,
    n_left: AtomicU64,
}

impl fmt::Debug for GpuMerger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.gpu)
    }
}

impl GpuMerger {
    /// A merger with one lane per thread for `n_lanes` threads, which together use at most `device_bytes` on the
    /// device. Nothing is allocated yet.
    pub fn new(gpu: &Gpu, n_lanes: usize, device_bytes: u64) -> Self {
        let (n_merged, n_left) = (AtomicU64::new(0), AtomicU64::new(0));
        Self {
            gpu: gpu.clone(),
            device_bytes: device_bytes / n_lanes.max(1) as u64,
            free: Mutex::new(Vec::new()),
            n_made: AtomicUsize::new(0),
            max_lanes: AtomicUsize::new(n_lanes.max(1)),
            n_merged,
            n_left,
        }
    }

    /// A lane, or `None` if device memory does not allow another one.
    fn acquire_lane(&self) -> Result<Option<LowRank>, GpuError> {
        if let Some(lane) = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(Some(lane));
        }
        if self.n_made.fetch_add(1, Ordering::Relaxed) >= self.max_lanes.load(Ordering::Relaxed) {
            self.n_made.fetch_sub(1, Ordering::Relaxed);
            return Ok(None);
        }
        LowRank::new(&self.gpu, self.device_bytes).map(Some)
    }

    fn merge_in_lane(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        (u, v, rank): (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, GpuError> {
        let row_bytes = v.len() / rank * dtype.bitsize() / 8;
        if LowRank::min_bytes(row_bytes, rank, v.len()) > self.device_bytes {
            return Ok(None);
        }
        let Some(mut lane) = self.acquire_lane()? else { return Ok(None) };
        match lane.merge_in_place(dtype, weights, (u, v, rank), scale) {
            Ok(LowRankCounts { nonzero, absorbed, changed, overflowed }) => {
                self.free.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
                let touched = weights.len() as u64 * 8 / dtype.bitsize() as u64;
                self.n_merged.fetch_add(touched, Ordering::Relaxed);
                Ok(Some(PatchCounts { touched, nonzero, absorbed, changed, overflowed }))
            }
            // Nothing was changed. The other lanes continue with the memory they have; this one was too many.
            Err(GpuError::OutOfMemory { .. }) => {
                drop(lane);
                let n_left = self.n_made.fetch_sub(1, Ordering::Relaxed) - 1;
                self.max_lanes.fetch_min(n_left, Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl LowRankMerger for GpuMerger {
    fn supports(&self, dtype: Dtype) -> bool {
        LowRank::supports(dtype)
    }

    fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        factors: (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, AcceleratorError> {
        Ok(self.merge_in_lane(dtype, weights, factors, scale)?)
    }

    fn count_on_cpu(&self, n_weights: u64) {
        self.n_left.fetch_add(n_weights, Ordering::Relaxed);
    }

    fn counts(&self) -> MergedWeights {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        MergedWeights { on_gpu: read(&self.n_merged), on_cpu: read(&self.n_left) }
    }
}
