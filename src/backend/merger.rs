//! Which device merges low-rank products: the CPU, or an accelerator with the CPU for what it does not support.

use std::{fmt, sync::Arc};

use super::{AcceleratorError, PatchCounts};
use crate::tensor::Dtype;

/// An accelerator that merges low-rank products.
pub trait LowRankMerger: fmt::Debug + Send + Sync {
    /// Whether it merges into weights of this type.
    fn takes(&self, dtype: Dtype) -> bool;

    /// `weights + u v * scale`, as [`super::add_low_rank`] and [`super::merge_sums`] make it, bit for bit; `None` where the CPU has
    /// to: nothing was changed then. `weights` are little-endian elements of `dtype`, `u` is `[n_rows, rank]`, `v` `[rank, n_columns]`.
    ///
    /// # Errors
    /// What failed on the accelerator.
    ///
    /// # Panics
    /// Where lengths disagree, or [`Self::takes`] says no to the type.
    fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        factors: (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, AcceleratorError>;

    /// Counts weights that the CPU merged.
    fn left(&self, n_weights: u64);

    /// What it did so far.
    fn counts(&self) -> MergedWeights;
}

/// What a [`LowRankMerger`] did, in weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergedWeights {
    /// Merged on the GPU.
    pub on_gpu: u64,
    /// Merged on the CPU, because the GPU does not support what is added to them, their type or their size.
    pub on_cpu: u64,
}

/// Which device merges. The result is the same, bit for bit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merger<'a> {
    accelerator: Option<&'a dyn LowRankMerger>,
}

impl<'a> Merger<'a> {
    /// The CPU.
    pub fn cpu() -> Self {
        Self::default()
    }

    /// An accelerator.
    pub fn on(accelerator: &'a dyn LowRankMerger) -> Self {
        Self { accelerator: Some(accelerator) }
    }

    /// Whether an accelerator merges into weights of this type.
    pub fn takes(&self, dtype: Dtype) -> bool {
        self.accelerator.is_some_and(|accelerator| accelerator.takes(dtype))
    }

    /// As [`LowRankMerger::merge`]; `None` where there is no accelerator.
    ///
    /// # Errors
    /// What failed on the accelerator.
    ///
    /// # Panics
    /// Where lengths disagree, or [`Self::takes`] says no to the type.
    pub fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        factors: (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, AcceleratorError> {
        self.accelerator.map_or(Ok(None), |accelerator| accelerator.merge(dtype, weights, factors, scale))
    }

    /// Counts weights that the CPU merged.
    pub fn left(&self, n_weights: u64) {
        if let Some(accelerator) = self.accelerator {
            accelerator.left(n_weights);
        }
    }
}
