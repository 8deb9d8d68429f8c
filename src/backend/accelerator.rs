//! Errors of a device that computes instead of the CPU.

use std::{error::Error, fmt};

use crate::error::{ErrorKind, Failure};

/// An error of the accelerator, with its own message.
#[derive(Debug)]
pub struct AcceleratorError {
    error: Box<dyn Error + Send + Sync>,
    kind: ErrorKind,
}

impl AcceleratorError {
    /// Wraps an accelerator's error.
    pub fn new(error: impl Failure + Send + Sync + 'static) -> Self {
        Self { kind: error.kind(), error: Box::new(error) }
    }

    /// The accelerator's error, if it is an `E`.
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.error.downcast_ref()
    }
}

impl fmt::Display for AcceleratorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for AcceleratorError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

impl Failure for AcceleratorError {
    fn kind(&self) -> ErrorKind {
        self.kind
    }
}
