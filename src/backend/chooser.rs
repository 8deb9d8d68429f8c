//! Which device chooses: the CPU, or an accelerator with the CPU for what it does not support.

use std::fmt;

use super::{AcceleratorError, NotANumber, ScoredRows, topk_rows};

/// Why nothing was chosen.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// A NaN has no rank.
    #[error(transparent)]
    NotANumber(#[from] NotANumber),
    /// The accelerator failed.
    #[error(transparent)]
    Accelerator(#[from] AcceleratorError),
}

/// An accelerator that chooses the largest of each row.
pub trait RowChooser: fmt::Debug + Send + Sync {
    /// As [`topk_rows`], bit for bit; the CPU does what the accelerator does not support.
    ///
    /// # Errors
    /// [`NotANumber`] names the first row and column holding a NaN; the others are the accelerator's own.
    fn topk_rows(&self, rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, ChooseError>;

    /// What it did so far.
    fn counts(&self) -> ChosenRows;
}

/// What a [`RowChooser`] did, in rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChosenRows {
    /// Chosen on the GPU.
    pub on_gpu: u64,
    /// Chosen on the CPU, because the GPU does not support their type, length or score.
    pub on_cpu: u64,
    /// Of those on the GPU, chosen again on the CPU and found equal.
    pub checked: u64,
}

/// Which device chooses the largest of each row. The result is the same, bit for bit.
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
    /// [`NotANumber`] names the first row and column holding a NaN; on an accelerator also what failed there.
    pub fn topk_rows(&self, rows: &ScoredRows<'_>, k: usize) -> Result<Vec<u32>, ChooseError> {
        match self.accelerator {
            Some(accelerator) => accelerator.topk_rows(rows, k),
            None => Ok(topk_rows(rows, k)?),
        }
    }
}
