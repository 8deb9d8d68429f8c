//! The device that merges low-rank products: the CPU, or an accelerator with the CPU for everything it does not
//! support.

use std::{fmt, sync::Arc};

use super::{AcceleratorError, PatchCounts};
use crate::tensor::Dtype;

/// An accelerator that merges low-rank products.
pub trait LowRankMerger: fmt::Debug + Send + Sync {
    /// Whether it can merge into weights of this dtype.
    fn supports(&self, dtype: Dtype) -> bool;

    /// Computes `weights + u v * scale`, bit for bit as [`super::add_low_rank`] and [`super::merge_sums`] do. Returns
    /// `None`, with nothing changed, if the CPU must do it. `weights` are little-endian elements of `dtype`, `u` is
    /// `[n_rows, rank]`, `v` `[rank, n_columns]`.
    ///
    /// # Errors
    /// Errors of the accelerator.
    ///
    /// # Panics
    /// If the lengths are inconsistent, or [`Self::supports`] is false for the dtype.
    fn merge(
        &self,
        dtype: Dtype,
        weights: &mut [u8],
        factors: (&[f32], &Arc<Vec<f32>>, usize),
        scale: f32,
    ) -> Result<Option<PatchCounts>, AcceleratorError>;

    /// Counts weights that the CPU merged.
    fn count_on_cpu(&self, n_weights: u64);

    /// Counts of the weights so far.
    fn counts(&self) -> MergedWeights;
}

/// Weights processed by a [`LowRankMerger`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergedWeights {
    /// Weights merged on the GPU.
    pub on_gpu: u64,
    /// Weights merged on the CPU, because the GPU does not support their delta, dtype or size.
    pub on_cpu: u64,
}

/// The device that merges. The result is the same, bit for bit.
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

    /// Whether an accelerator can merge into weights of this dtype.
    pub fn supports(&self, dtype: Dtype) -> bool {
        self.accelerator.is_some_and(|accelerator| accelerator.supports(dtype))
    }

    /// As [`LowRankMerger::merge`]; `None` if there is no accelerator.
    ///
    /// # Errors
    /// Errors of the accelerator.
    ///
    /// # Panics
    /// If the lengths are inconsistent, or [`Self::supports`] is false for the dtype.
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
    pub fn count_on_cpu(&self, n_weights: u64) {
        if let Some(accelerator) = self.accelerator {
            accelerator.count_on_cpu(n_weights);
        }
    }
}
