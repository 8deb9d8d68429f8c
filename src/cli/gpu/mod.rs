//! The GPU behind `--device cuda`. Only this folder of the command line knows the kind of GPU.
//!
//! `cuda` finds and opens NVIDIA GPUs. A build without GPU support has `none` in its place: the same functions, for a GPU that does not
//! exist, so that commands need not ask how they were built.

#[cfg_attr(not(feature = "cuda"), path = "none.rs")]
mod cuda;

use serde::Serialize;

pub(super) use cuda::{Gpu, IS_SUPPORTED, found};

/// The GPUs of the machine, their driver and their library.
pub(super) struct Found {
    /// The CUDA version that the NVIDIA driver supports.
    pub(super) driver: Option<String>,
    pub(super) gpus: Vec<GpuFacts>,
    /// Why no GPU can be used.
    pub(super) problem: Option<String>,
    /// The library of matrix products for training and evaluation, if there is a driver.
    pub(super) cublaslt: Option<LibraryFacts>,
}

/// One GPU, as the JSON document of `inspect --devices` has it.
#[derive(Serialize)]
pub(super) struct GpuFacts {
    pub(super) device: String,
    pub(super) name: String,
    pub(super) compute_capability: String,
    pub(super) n_bytes: u64,
    pub(super) problem: Option<String>,
}

/// A library, as the JSON document of `inspect --devices` has it.
#[derive(Serialize, Default)]
pub(super) struct LibraryFacts {
    pub(super) version: Option<String>,
    pub(super) path: Option<String>,
    /// Why it cannot be used.
    pub(super) problem: Option<String>,
    /// The searched places, if it was not found.
    pub(super) looked: Vec<String>,
}

/// Work on a device that trains and evaluates, whatever its kind.
#[cfg(feature = "train")]
pub(super) trait OnDevice {
    /// What it yields.
    type Output;

    /// Does the work on `device`.
    fn run<D: crate::train::Device>(self, device: &D) -> super::failure::CliResult<Self::Output>;
}
