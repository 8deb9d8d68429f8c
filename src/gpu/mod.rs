//! NVIDIA GPUs: detection, device memory, and the kernels.
//!
//! The driver is loaded at run time. The build needs no part of CUDA, and running needs only the driver: kernels are
//! PTX, compiled ahead of time from `kernels/*.cu` by `.ci/kernels.py` and embedded in the binary, compressed with
//! zstd. [`detect()`] reports the devices and why a GPU cannot be used. A [`Gpu`] is one device, a [`Queue`] a CUDA
//! stream on it, [`DeviceVec`] memory that belongs to a queue, [`Pinned`] host memory for direct copies. Only `launch`
//! calls the driver: every call that Rust cannot check is justified there, with one function per kernel.
//!
//! On top of these: [`RowRanker`] streams rows through the device and chooses the largest entries of each;
//! [`DeviceMatrix`] is a weight that stays on the device and is patched there; [`LowRank`] merges `W + s * B A`. Each
//! is tested for equality against a plain reference implementation on the CPU. [`Blas`] multiplies activations by
//! weights for the trainer, with cuBLASLt, which is searched for on first use ([`blas_library`]). Nothing here reads a
//! file.
//!
//! The rest of the library does not depend on this folder. It defines traits for accelerators, and this folder
//! implements them: [`GpuChooser`] is a [`RowChooser`](crate::backend::RowChooser), [`GpuMerger`] a
//! [`LowRankMerger`](crate::backend::LowRankMerger), and `CudaDevice` a `Device` of the trainer.

mod chooser;
mod error;
mod launch;
mod library;
mod low_rank;
mod matrix;
mod merger;
mod ranker;
#[cfg(feature = "train")]
mod train;

pub use chooser::GpuChooser;
pub use error::GpuError;
pub use launch::{
    Attention, Blas, BlasWeight, Copyable, Detection, DeviceInfo, DeviceVec, EntriesOf, Gpu, HeadShape, Matrix, Pinned,
    Queue, blas_library, detect,
};
pub use library::BlasLibrary;
pub use low_rank::{LowRank, LowRankCounts, LowRankFactors, merged_low_rank};
pub use matrix::{DeviceMatrix, DevicePatch, DeviceTerms};
pub use merger::GpuMerger;
pub use ranker::{Factor, Ranked, RowRanker};
#[cfg(feature = "train")]
pub use train::{CudaDevice, CudaWeight};

/// Maximum number of columns of rows that are chosen on a device.
pub const MAX_COLUMNS: usize = 131_072;
