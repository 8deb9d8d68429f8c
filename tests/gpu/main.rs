//! The GPU paths, without a GPU: kernels compiled as C++ run behind a driver that is none (`fake_driver.cpp`), so that the library
//! and the binary go all the way, and every result is compared with the CPU's. Needs a C++ compiler; says so where there is none.
//!
//! With `NEUROADA_TEST_GPU=real` the same tests use the machine's own driver: see `on_device.sh`.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod attention;
mod binary;
mod conformance;
mod driver;
mod kernels;
mod merges;
mod operations;
mod products;
mod samples;
mod training;
mod whole_runs;

#[path = "../support/training.rs"]
mod reference;
