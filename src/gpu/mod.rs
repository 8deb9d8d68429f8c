//! NVIDIA GPUs: what the machine has, memory on a device, and the kernels that work there.
//!
//! The driver is looked for when the program runs; nothing of CUDA is needed to build it, and the driver alone to use it: kernels are
//! PTX, compiled ahead from `kernels/*.cu` by `.ci/kernels.py` and carried in the binary under zstd. [`detect()`] says what was found and
//! why a GPU cannot be used. A [`Gpu`] is one device, a [`Queue`] a line of work on it, [`DeviceVec`] memory that belongs to a
//! queue, [`Pinned`] host memory that copies straight to the device. `launch` is the one folder that talks to the driver: every call
//! that Rust cannot check is proven there, one function per kernel.
//!
//! On top of that stand the jobs: [`RowRanker`] streams rows through the device and chooses the largest of each,
//! [`DeviceMatrix`] holds a weight that stays on the device and is patched there, [`LowRank`] merges `W + s * B A`. Each has a plain
//! judge on the CPU that it equals. [`Blas`] multiplies activations by weights for the trainer, through cuBLASLt, which is looked for
//! when it is wanted ([`blas_library`]). Nothing here reads a file.
//!
//! The rest of the library does not know of this folder. It says in traits what an accelerator can do for it, and this folder does that:
//! [`GpuChooser`] is a [`RowChooser`](crate::backend::RowChooser), [`GpuMerger`] a [`LowRankMerger`](crate::backend::LowRankMerger), and
//! `CudaDevice` a `Device` of the trainer.

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

/// The most columns that rows chosen on a device may have.
pub const MAX_COLUMNS: usize = 131_072;
