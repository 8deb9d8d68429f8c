//! What can go wrong while training and evaluating.

use std::path::{Path, PathBuf};

use super::config::ARCHITECTURES;
use crate::{
    adapter::AdapterError,
    backend::AcceleratorError,
    checkpoint::{CheckpointError, Printable, indented_list},
    error::{ErrorKind, Failure},
    mask::MaskError,
};

/// An operation that a device could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Too little memory on the device.
    #[error("the device has no room for {n_bytes} bytes of {what}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
        n_bytes: u64,
    },
    /// A request that the device cannot serve.
    #[error("{0}")]
    Failed(String),
    /// The accelerator's.
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

/// What can go wrong while training and evaluating. What was saved before stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file could not be read or written, or is not what it should be.
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
    /// A model that the passes are not right for.
    #[error("{}: model type {} cannot be trained; {} can", Printable::path(.path), quoted(.found), ARCHITECTURES.join(", "))]
    Architecture {
        /// The checkpoint.
        path: PathBuf,
        /// Its `model_type`, empty where it has none.
        found: String,
    },
    /// A configuration that is incomplete, or asks for what the passes do not do.
    #[error("{}: {what}", Printable::path(.path))]
    Config {
        /// `config.json`.
        path: PathBuf,
        /// The field, found and expected.
        what: String,
    },
    /// Tensors that the model's passes need and do not find, or find and do not know.
    #[error("{}: {what}:{}", Printable::path(.path), indented_list(.problems))]
    Tensors {
        /// The checkpoint, mask or state.
        path: PathBuf,
        /// What the list is about.
        what: &'static str,
        /// One line for each tensor.
        problems: Vec<String>,
    },
    /// The loss or a gradient is no number any more.
    #[error("step {step}, batch {batch}: the loss is {loss}; the first tensor that is not finite is {tensor}")]
    NotFinite {
        /// Optimizer steps begun, from 1.
        step: u64,
        /// The batch in its epoch, from 0.
        batch: u64,
        /// What the loss was.
        loss: f64,
        /// Where the trouble begins.
        tensor: String,
    },
    /// A model that computes no numbers: its weights or its configuration are broken.
    #[error("the {what} is {found}; the first tensor that is not finite is {tensor}")]
    NotANumber {
        /// What was computed: a loss, a likelihood.
        what: &'static str,
        /// What it was.
        found: f64,
        /// Where the trouble begins.
        tensor: String,
    },
    /// The state of another run cannot be resumed.
    #[error("{}: cannot be resumed: {what}", Printable::path(.path))]
    OtherRun {
        /// The state file.
        path: PathBuf,
        /// What differs, saved and asked for.
        what: String,
    },
    /// The user stopped the run; its state was saved.
    #[error("stopped after step {step}; `--resume` goes on from there")]
    Stopped {
        /// Optimizer steps done.
        step: u64,
    },
    /// A request that makes no sense, whatever the files hold.
    #[error("{0}")]
    Usage(String),
}

fn quoted(model_type: &str) -> String {
    if model_type.is_empty() { "that is not told".to_owned() } else { format!("`{}`", Printable(model_type)) }
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
