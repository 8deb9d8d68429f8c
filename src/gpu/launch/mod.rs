//! All driver calls that Rust cannot check: the only unsafe code of the parent folder.
//!
//! `driver` queries the driver, `detect` decides which devices can be used, `device` opens one, `ptx` contains the
//! kernels, `memory` manages and copies device memory, `kernels` starts kernels, `blas` multiplies matrices with
//! cuBLASLt, and `cublaslt` binds that library. Three rules make the rest safe. Device memory belongs to one
//! [`Queue`], whose work runs in order, and every access goes through it. Pinned memory is accessible only when no
//! copy is in flight. A kernel is started only by the function of the same name, which checks its arguments against
//! the lengths of the memory.

#![allow(unsafe_code)]

mod attention;
mod blas;
mod cublaslt;
mod detect;
mod device;
mod driver;
mod kernels;
mod memory;
mod passes;
mod ptx;
mod sparse;

use cudarc::driver::DriverError;

pub use attention::Attention;
pub use blas::{Blas, BlasWeight};
pub use cublaslt::blas_library;
pub use detect::{Detection, DeviceInfo, detect};
pub use device::Gpu;
pub(super) use kernels::{KeyRows, is_supported};
pub use memory::{Copyable, DeviceVec, Pinned, Queue};
pub use passes::{HeadShape, Matrix};
pub use sparse::EntriesOf;

/// The driver's name of an error. (Displaying the error itself would query the driver for text.)
fn code_of(error: DriverError) -> String {
    format!("{:?}", error.0)
}
