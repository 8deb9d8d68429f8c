//! NVIDIA GPUs.

use std::fmt;

#[cfg(feature = "train")]
use super::OnDevice;
use super::{Found, GpuFacts, LibraryFacts};
use crate::cli::failure::CliResult;
use crate::{
    backend::{LowRankMerger, RowChooser},
    gpu::{self, GpuChooser, GpuError, GpuMerger, RowRanker},
};
#[cfg(feature = "train")]
use crate::{
    checkpoint::Checkpoint,
    gpu::CudaDevice,
    tensor::Dtype,
    train::{MemoryEstimate, ModelConfig, RunSize, TrainError},
};

/// Whether this build supports GPUs.
pub(in crate::cli) const IS_SUPPORTED: bool = true;

/// A GPU in use.
pub(in crate::cli) struct Gpu(gpu::Gpu);

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Gpu {
    /// Takes the GPU with this number into use.
    pub(in crate::cli) fn open(ordinal: usize) -> CliResult<Self> {
        Ok(Self(gpu::Gpu::open(ordinal)?))
    }

    /// Chooses rows in `gpu_memory` bytes of its memory and `pinned_bytes` of the host's; `check` is the share of rows that are chosen
    /// again on the CPU.
    pub(in crate::cli) fn chooser(&self, gpu_memory: u64, pinned_bytes: u64, check: f64) -> Box<dyn RowChooser> {
        let ranker = RowRanker::new(&self.0, rayon::current_num_threads(), gpu_memory, pinned_bytes);
        Box::new(GpuChooser::new(ranker, check))
    }

    /// Merges low-rank products in `gpu_memory` bytes of its memory.
    pub(in crate::cli) fn merger(&self, gpu_memory: u64) -> Box<dyn LowRankMerger> {
        Box::new(GpuMerger::new(&self.0, rayon::current_num_threads(), gpu_memory))
    }
}

#[cfg(feature = "train")]
impl Gpu {
    /// The name, as in `--device`.
    pub(in crate::cli) fn name(&self) -> String {
        format!("cuda:{}", self.0.ordinal())
    }

    /// Free bytes of its memory.
    pub(in crate::cli) fn free_bytes(&self) -> CliResult<u64> {
        Ok(self.0.memory()?.0)
    }

    /// Fails if `what` needs more bytes than are `available`.
    pub(in crate::cli) fn check_room(&self, what: &'static str, needed: u64, available: u64) -> CliResult<()> {
        let ordinal = self.0.ordinal();
        if needed > available { Err(GpuError::OutOfMemory { ordinal, what, needed, available })? } else { Ok(()) }
    }

    /// The dtype of computations with this model.
    pub(in crate::cli) fn dtype_of(&self, base: &Checkpoint) -> Result<Dtype, TrainError> {
        CudaDevice::dtype_of(base)
    }

    /// GPU memory of a training run, in bytes.
    pub(in crate::cli) fn memory_of_run(
        &self,
        config: &ModelConfig,
        base: &Checkpoint,
        dtype: Dtype,
        size: RunSize,
    ) -> MemoryEstimate {
        CudaDevice::memory_of_run(config, base, dtype, size)
    }

    /// Runs work of this dtype on it.
    pub(in crate::cli) fn run<W: OnDevice>(&self, dtype: Dtype, work: W) -> CliResult<W::Output> {
        work.run(&CudaDevice::new(&self.0, dtype)?)
    }
}

/// Detects GPUs.
pub(in crate::cli) fn found() -> Found {
    let found = gpu::detect();
    let facts = |device: gpu::DeviceInfo| GpuFacts {
        device: format!("cuda:{}", device.ordinal),
        name: device.name,
        compute_capability: format!("{}.{}", device.capability.0, device.capability.1),
        n_bytes: device.n_bytes,
        problem: device.problem,
    };
    let cublaslt = found.driver.is_some().then(cublaslt);
    let gpus = found.devices.into_iter().map(facts).collect();
    Found { driver: found.driver, gpus, problem: found.problem, cublaslt }
}

fn cublaslt() -> LibraryFacts {
    match gpu::blas_library() {
        Ok(found) => {
            let path = Some(found.path.to_string_lossy().into_owned());
            LibraryFacts { version: Some(found.version), path, ..LibraryFacts::default() }
        }
        Err(GpuError::NoLibrary { names, searched: looked }) => {
            LibraryFacts { problem: Some(format!("{names} was not found")), looked, ..LibraryFacts::default() }
        }
        Err(other) => LibraryFacts { problem: Some(other.to_string()), ..LibraryFacts::default() },
    }
}
