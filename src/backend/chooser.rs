//! The device that chooses: the CPU, or an accelerator with the CPU for everything it does not support.

use std::fmt;

use super::{AcceleratorError, NotANumber, ScoredRows, topk_rows};

/// Why choosing failed.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// A NaN cannot be ranked.
    #[error(transparent)]
    NotANumber(#[from] NotANumber),
    /// The accelerator failed.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
}

/// An accelerator that chooses the largest entries of each row.
pub trait RowChooser: fmt::Debug + Send + Sync {
    /// The same result as [`topk_rows`], bit for bit; runs on the CPU what the accelerator does not support.
    ///
    /// # Errors
    /// [`NotANumber`] names the first row and column with a NaN; other errors are the accelerator's.
    fn topk_rows(&self, rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, ChooseError>;

    /// Counts of the rows so far.
    fn counts(&self) -> ChosenRows;
}

/// Rows processed by a [`RowChooser`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChosenRows {
    /// Rows chosen on the GPU.
    pub on_gpu: u64,
    /// Rows chosen on the CPU, because the GPU does not support their dtype, length or score.
    pub on_cpu: u64,
    /// Rows chosen on the GPU that were chosen again on the CPU, with the same result.
    pub checked: u64,
}

/// The device that chooses the largest entries of each row. The result is the same, bit for bit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chooser<'a> {
    accelerator: Option<&'a dyn RowChooser>,
}

impl<'a> Chooser<'a> {
    /// The CPU.
    pub fn cpu() -> Self {
        Self::default()
    }

    /// An accelerator.
    pub fn on(accelerator: &'a dyn RowChooser) -> Self {
        Self { accelerator: Some(accelerator) }
    }

    /// As [`topk_rows`].
    ///
    /// # Errors
    /// [`NotANumber`] names the first row and column with a NaN; on an accelerator also its own errors.
    pub fn topk_rows(&self, rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, ChooseError> {
        match self.accelerator {
            Some(accelerator) => accelerator.topk_rows(rows, k),
            None => Ok(topk_rows(rows, k)?),
        }
    }
}
