//! Who merges low-rank products: the CPU, or a GPU with the CPU for what it cannot take.

#[cfg(feature = "cuda")]
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

#[cfg(feature = "cuda")]
use super::PatchCounts;
#[cfg(feature = "cuda")]
use crate::{
    gpu::{Gpu, GpuError, LowRank, LowRankCounts},
    tensor::Dtype,
};

/// Who merges. The result is the same, bit for bit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merger<'a> {
    #[cfg(feature = "cuda")]
    gpu: Option<&'a GpuMerger>,
    #[cfg(not(feature = "cuda"))]
    marker: std::marker::PhantomData<&'a ()>,
}

/// Merges on a GPU what it can take, and counts.
#[cfg(feature = "cuda")]
pub struct GpuMerger {
    gpu: Gpu,
    /// Of one lane.
    device_bytes: u64,
    /// Lanes that nobody uses.
    free: Mutex<Vec<LowRank>>,
    n_made: AtomicUsize,
    most_made: AtomicUsize,
    n_merged: AtomicU64,
    n_left: AtomicU64,
}

#[cfg(feature = "cuda")]
impl std::fmt::Debug for GpuMerger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.gpu)
    }
}

/// What a [`GpuMerger`] did, in weights.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergedWeights {
    /// Merged on the GPU.
    pub on_gpu: u64,
    /// Merged on the CPU, because the GPU does not take what is added to them, their type or their size.
    pub on_cpu: u64,
}

#[cfg(feature = "cuda")]
impl GpuMerger {
    /// A merger with a lane for each of `n_lanes` threads, which together use at most `device_bytes` on the device. Nothing is
    /// allocated yet.
    pub fn new(gpu: &Gpu, n_lanes: usize, device_bytes: u64) -> Self {
        let (n_merged, n_left) = (AtomicU64::new(0), AtomicU64::new(0));
        Self {
            gpu: gpu.clone(),
            device_bytes: device_bytes / n_lanes.max(1) as u64,
            free: Mutex::new(Vec::new()),
            n_made: AtomicUsize::new(0),
            most_made: AtomicUsize::new(n_lanes.max(1)),
            n_merged,
            n_left,
        }
    }

    /// What it did so far.
    pub fn counts(&self) -> MergedWeights {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        MergedWeights { on_gpu: read(&self.n_merged), on_cpu: read(&self.n_left) }
    }

    /// A lane, or `None` where the device has room for no more than there are.
    fn take(&self) -> Result<Option<LowRank>, GpuError> {
        if let Some(lane) = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(Some(lane));
        }
        if self.n_made.fetch_add(1, Ordering::Relaxed) >= self.most_made.load(Ordering::Relaxed) {
            self.n_made.fetch_sub(1, Ordering::Relaxed);
            return Ok(None);
        }
        LowRank::new(&self.gpu, self.device_bytes).map(Some)
    }

    fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        (u, v, rank): (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, GpuError> {
        let row_bytes = v.len() / rank * dtype.bitsize() / 8;
        if LowRank::least_bytes(row_bytes, rank, v.len()) > self.device_bytes {
            return Ok(None);
        }
        let Some(mut lane) = self.take()? else { return Ok(None) };
        match lane.merge_in_place(dtype, weights, (u, v, rank), scale) {
            Ok(LowRankCounts { nonzero, absorbed, changed, overflowed }) => {
                self.free.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
                let touched = weights.len() as u64 * 8 / dtype.bitsize() as u64;
                self.n_merged.fetch_add(touched, Ordering::Relaxed);
                Ok(Some(PatchCounts { touched, nonzero, absorbed, changed, overflowed }))
            }
            // Nothing was changed. The other lanes go on with what they have; this one was too many.
            Err(GpuError::OutOfMemory { .. }) => {
                drop(lane);
                let n_left = self.n_made.fetch_sub(1, Ordering::Relaxed) - 1;
                self.most_made.fetch_min(n_left, Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl<'a> Merger<'a> {
    /// The CPU.
    pub fn cpu() -> Self {
        Self::default()
    }

    /// A GPU.
    #[cfg(feature = "cuda")]
    pub fn gpu(gpu: &'a GpuMerger) -> Self {
        Self { gpu: Some(gpu) }
    }

    /// Whether products are merged on a GPU into weights of this type.
    #[cfg(feature = "cuda")]
    pub fn takes(&self, dtype: Dtype) -> bool {
        self.gpu.is_some() && LowRank::takes(dtype)
    }

    /// `weights + u v * scale`, as [`super::add_low_rank`] and [`super::merge_sums`] make it, on a GPU; `None` where the CPU has
    /// to: nothing was changed then. `weights` are little-endian elements of `dtype`, `u` is `[n_rows, rank]`, `v` `[rank, n_columns]`.
    ///
    /// # Errors
    /// What failed on the GPU.
    ///
    /// # Panics
    /// Where lengths disagree, or [`Self::takes`] says no to the type.
    #[cfg(feature = "cuda")]
    pub fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        factors: (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, GpuError> {
        self.gpu.map_or(Ok(None), |gpu| gpu.merge(dtype, weights, factors, scale))
    }

    /// Counts weights that the CPU merged.
    pub fn left(&self, n_weights: u64) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.gpu {
            gpu.n_left.fetch_add(n_weights, Ordering::Relaxed);
        }
        #[cfg(not(feature = "cuda"))]
        let _nobody_asks = n_weights;
    }
}
