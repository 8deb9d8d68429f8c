//! A build without GPU support: the interface of `cuda.rs`, for a GPU that does not exist.

use super::Found;
#[cfg(feature = "train")]
use super::OnDevice;
use crate::backend::{LowRankMerger, RowChooser};
use crate::cli::failure::{CliError, CliResult};
#[cfg(feature = "train")]
use crate::{
    checkpoint::Checkpoint,
    tensor::Dtype,
    train::{MemoryEstimate, ModelConfig, RunSize, TrainError},
};

const NO_SUPPORT: &str = "this build has no GPU support";

/// Whether this build supports GPUs.
pub(in crate::cli) const IS_SUPPORTED: bool = false;

/// A GPU; there is none.
#[derive(Debug)]
pub(in crate::cli) enum Gpu {}

impl Gpu {
    pub(in crate::cli) fn open(_ordinal: usize) -> CliResult<Self> {
        Err(CliError::usage(NO_SUPPORT))
    }
    pub(in crate::cli) fn chooser(&self, _gpu_memory: u64, _pinned_bytes: u64, _check: f64) -> Box<dyn RowChooser> {
        match *self {}
    }
    pub(in crate::cli) fn merger(&self, _gpu_memory: u64) -> Box<dyn LowRankMerger> {
        match *self {}
    }
}

#[cfg(feature = "train")]
impl Gpu {
    pub(in crate::cli) fn name(&self) -> String {
        match *self {}
    }
    pub(in crate::cli) fn free_bytes(&self) -> CliResult<u64> {
        match *self {}
    }
    pub(in crate::cli) fn check_room(&self, _what: &'static str, _needed: u64, _available: u64) -> CliResult<()> {
        match *self {}
    }
    pub(in crate::cli) fn dtype_of(&self, _base: &Checkpoint) -> Result<Dtype, TrainError> {
        match *self {}
    }
    pub(in crate::cli) fn memory_of_run(
        &self,
        _config: &ModelConfig,
        _base: &Checkpoint,
        _dtype: Dtype,
        _size: RunSize,
    ) -> MemoryEstimate {
        match *self {}
    }
    pub(in crate::cli) fn run<W: OnDevice>(&self, _dtype: Dtype, _work: W) -> CliResult<W::Output> {
        match *self {}
    }
}

/// Looks for GPUs.
pub(in crate::cli) fn found() -> Found {
    Found { driver: None, gpus: Vec::new(), problem: Some(NO_SUPPORT.to_owned()), cublaslt: None }
}
