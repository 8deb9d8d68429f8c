//! What can go wrong on the way to a GPU and on it.

use std::path::PathBuf;

use crate::{
    backend::AcceleratorError,
    error::{ErrorKind, Failure},
};

/// What can go wrong on the way to a GPU and on it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no GPU that can be used, and why.
    #[error("no GPU can be used: {why}")]
    Unusable {
        /// Why, in a few words.
        why: String,
    },
    /// The device asked for is not there.
    #[error("there is no GPU {ordinal}: {}", found(*.count))]
    NoSuchDevice {
        /// Its number, from 0.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver refused something.
    #[error("GPU {ordinal}: {doing}: {code}")]
    Driver {
        /// The device.
        ordinal: usize,
        /// What was being done.
        doing: &'static str,
        /// The driver's name for the failure.
        code: String,
    },
    /// Work that was under way failed; the device takes no more from this process.
    #[error("GPU {ordinal}: kernel `{kernel}`, or what was started before it, failed: {code}")]
    Kernel {
        /// The device.
        ordinal: usize,
        /// The last kernel that was started.
        kernel: &'static str,
        /// The driver's name for the failure.
        code: String,
    },
    /// The device has too little memory, even for the smallest piece of the work.
    #[error("GPU {ordinal}: {what} needs {needed} bytes of device memory, {available} can be had")]
    OutOfMemory {
        /// The device.
        ordinal: usize,
        /// What the memory is for.
        what: &'static str,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are free, or that the work may use.
        available: u64,
    },
    /// The device's result is not what the CPU computes.
    #[error("GPU {ordinal}: kernel `{kernel}` gave a wrong result: row {row} of {n_rows}, {why}")]
    WrongResult {
        /// The device.
        ordinal: usize,
        /// The kernel.
        kernel: &'static str,
        /// The row, counted in the block that was handled.
        row: u64,
        /// Rows of that block.
        n_rows: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// cuBLASLt, which only training needs, is not there.
    #[error("cuBLASLt ({names}) was not found; it was looked for in: {}", .looked.join(", "))]
    NoLibrary {
        /// The names that were looked for.
        names: String,
        /// Every place, and what the loader said where there was a file.
        looked: Vec<String>,
    },
    /// A library was found that is not what its name says.
    #[error("`{}` cannot be used: {why}", .path.display())]
    BadLibrary {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// cuBLASLt refused something.
    #[error("GPU {ordinal}: cuBLASLt {version}: {doing}: {code}")]
    Library {
        /// The device.
        ordinal: usize,
        /// The library's version.
        version: String,
        /// What was being done: a product names its shape and type.
        doing: String,
        /// The library's name for the failure.
        code: String,
    },
}

impl From<GpuError> for AcceleratorError {
    fn from(error: GpuError) -> Self {
        Self::new(error)
    }
}

fn found(count: usize) -> String {
    match count {
        1 => "only GPU 0 was found".to_owned(),
        _ => format!("GPUs 0 to {} were found", count.saturating_sub(1)),
    }
}

/// A GPU that cannot be used was asked for; one that fails is a failing device.
impl Failure for GpuError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Unusable { .. } | Self::NoSuchDevice { .. } | Self::NoLibrary { .. } | Self::BadLibrary { .. } => {
                ErrorKind::Usage
            }
            _ => ErrorKind::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::ChooseError;

    #[test]
    fn an_error_keeps_its_words_and_fields_on_the_floors_below() {
        let error = GpuError::NoSuchDevice { ordinal: 3, count: 1 };
        let below = ChooseError::from(error.clone());
        assert_eq!(below.to_string(), "there is no GPU 3: only GPU 0 was found");
        let ChooseError::Accelerator(below) = below else { panic!("{below:?}") };
        assert_eq!(below.downcast_ref(), Some(&error));
    }
}
