//! Errors of training and evaluation.

use std::path::{Path, PathBuf};

use super::config::ARCHITECTURES;
use crate::{
    adapter::AdapterError,
    backend::AcceleratorError,
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    mask::MaskError,
};

/// An operation that failed on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not enough memory on the device.
    #[error("out of device memory: cannot allocate {n_bytes} bytes for {what}")]
    OutOfMemory {
        /// The purpose of the allocation.
        what: &'static str,
        /// The requested size.
        n_bytes: u64,
    },
    /// A request that the device does not support.
    #[error("{0}")]
    Failed(String),
    /// An error of the accelerator.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
}

impl Failure for DeviceError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfMemory { .. } => ErrorKind::Io,
            Self::Failed(_) => ErrorKind::Usage,
            Self::Accelerator(e) => e.kind(),
        }
    }
}

/// Errors of training and evaluation. Files that were saved before an error remain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file could not be read or written, or is invalid.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The mask cannot be used.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The adapter cannot be read or written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An architecture that the passes do not support.
    #[error("{}: model type {} cannot be trained; {} can", Printable::path(.path), quoted(.found), ARCHITECTURES.join(", "))]
    Architecture {
        /// The checkpoint.
        path: PathBuf,
        /// Its `model_type`; empty if it has none.
        found: String,
    },
    /// A configuration that is incomplete, or has values that the passes do not support.
    #[error("{}: {what}", Printable::path(.path))]
    Config {
        /// `config.json`.
        path: PathBuf,
        /// The field, with its value and what was expected.
        what: String,
    },
    /// Tensors that the model needs and are missing, or that it does not have.
    #[error("{}: {what}:{}", Printable::path(.path), indented_list(.problems))]
    Tensors {
        /// The checkpoint, mask or state.
        path: PathBuf,
        /// What is wrong with the tensors.
        what: &'static str,
        /// One line per tensor.
        problems: Vec<String>,
    },
    /// The loss or a gradient is no longer finite.
    #[error("step {step}, batch {batch}: the loss is {loss}; the first tensor that is not finite is {tensor}")]
    NotFinite {
        /// The number of the optimizer step, from 1.
        step: u64,
        /// The batch within its epoch, from 0.
        batch: u64,
        /// The value of the loss.
        loss: f64,
        /// The first tensor that is not finite.
        tensor: String,
    },
    /// A model whose results are not finite: its weights or its configuration are broken.
    #[error("the {what} is {found}; the first tensor that is not finite is {tensor}")]
    NotANumber {
        /// The value computed: a loss, a likelihood.
        what: &'static str,
        /// Its value.
        found: f64,
        /// The first tensor that is not finite.
        tensor: String,
    },
    /// The saved state belongs to another run.
    #[error("{}: cannot be resumed: {what}", Printable::path(.path))]
    OtherRun {
        /// The state file.
        path: PathBuf,
        /// The fields that differ, saved and requested.
        what: String,
    },
    /// The user stopped the run; its state was saved.
    #[error("stopped after step {step}; `--resume` continues from there")]
    Stopped {
        /// Optimizer steps completed.
        step: u64,
    },
    /// An invalid request, whatever the files contain.
    #[error("{0}")]
    Usage(String),
}

fn quoted(model_type: &str) -> String {
    if model_type.is_empty() { "(none)".to_owned() } else { format!("`{}`", Printable(model_type)) }
}

impl Failure for TrainError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Checkpoint(e) => e.kind(),
            Self::Mask(e) => e.kind(),
            Self::Adapter(e) => e.kind(),
            Self::Device(_) => ErrorKind::Io,
            Self::Config { .. } | Self::Tensors { .. } | Self::NotANumber { .. } => ErrorKind::BadInput,
            Self::Architecture { .. } | Self::OtherRun { .. } | Self::NotFinite { .. } => ErrorKind::Refused,
            Self::Stopped { .. } => ErrorKind::Cancelled,
            Self::Usage(_) => ErrorKind::Usage,
        }
    }

    fn inner(&self) -> Option<&dyn Failure> {
        match self {
            Self::Checkpoint(e) => Some(e),
            Self::Mask(e) => Some(e),
            Self::Adapter(e) => Some(e),
            _ => None,
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::Architecture { path, .. }
            | Self::Config { path, .. }
            | Self::Tensors { path, .. }
            | Self::OtherRun { path, .. } => Some(path),
            _ => self.inner()?.file(),
        }
    }
}
