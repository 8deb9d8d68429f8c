//! What can go wrong on a device that computes in place of the CPU.

use std::error::Error;

/// An accelerator failed; the error is the accelerator's own, in its own words.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct AcceleratorError(Box<dyn Error + Send + Sync>);

impl AcceleratorError {
    /// What went wrong.
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        Self(Box::new(error))
    }

    /// The accelerator's error, where it is an `E`.
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}
