//! Transform model checkpoints without loading them.
//!
//! `neuroada-ckpt` works on safetensors checkpoints of any size where they lie: it chooses the important connections of
//! every neuron (masks), packs trained deltas on them into small adapter files, merges them into checkpoints and takes
//! them out again bit for bit, and says exactly what changed. It implements NeuroAda (EMNLP 2025,
//! <https://arxiv.org/abs/2510.18940>).
//!
//! The [`guide`] explains the command line and the files, page by page.
//!
//! Imports go down this list, never up:
//!
//! - `cli` (feature `cli`): the command line
//! - [`merge`], [`diff`], [`extract`], [`combine`], [`convert`], [`sync`] and `train` (feature `train`): what users ask for; they do not import
//!   one another
//! - `data` (feature `train`): training data, from rows to packed batches
//! - [`adapter`]: compact sparse files
//! - [`mask`]: policy, which weights
//! - [`weights`]: the map of weights, what each one is and which stored tensors hold it
//! - [`foreign`]: adapters as other tools leave them on disk
//! - [`checkpoint`] (files) and [`backend`] (hot loops); neither knows the other
//! - [`tensor`]: plain values
//!
//! `gpu` (feature `cuda`) is a guest beside them: it implements traits of [`backend`] and `train`, and nothing imports it.
//! - [`error`]: what every error says about itself

pub mod adapter;
pub mod backend;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod combine;
pub mod convert;
#[cfg(feature = "train")]
pub mod data;
pub mod diff;
pub mod error;
pub mod extract;
pub mod foreign;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod guide;
pub mod mask;
pub mod merge;
pub mod sync;
pub mod tensor;
#[cfg(feature = "train")]
pub mod train;
pub mod weights;
