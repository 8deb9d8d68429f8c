//! The GPU paths without a GPU: kernels compiled as C++ run on a fake driver (`fake_driver.cpp`), so that the library
//! and the binary run end to end, and every result is compared with the CPU's. Needs a C++ compiler; prints that tests
//! are skipped if there is none.
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
