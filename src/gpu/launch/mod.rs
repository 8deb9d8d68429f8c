//! All calls of the driver that Rust cannot check: the only unsafe code of the folder above.
//!
//! `driver` asks what there is, `detect` says which of it can be used, `device` takes it into use, `ptx` has the kernels, `memory` holds what lies on them and moves it, `kernels` starts work, `blas` has
//! matrices multiplied by a library, of which `cublaslt` is what is called. Three rules make all else safe. Device memory belongs to
//! one [`Queue`], whose work happens in order, and every access goes through it. Pinned memory is handed out only when no copy is
//! under way in it. A kernel is started only by the function that bears its name, which ties its arguments to the lengths of the
//! memory it is given.

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
pub(super) use kernels::{KeyRows, is_known};
pub use memory::{Copyable, DeviceVec, Pinned, Queue};
pub use passes::{HeadShape, Matrix};
pub use sparse::EntriesOf;

/// The driver's name for a failure. (Printing the error itself would ask the driver for words.)
fn code_of(error: DriverError) -> String {
    format!("{:?}", error.0)
}
