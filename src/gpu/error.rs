//! Errors of finding and using a GPU.

use std::path::PathBuf;

use crate::{
    backend::AcceleratorError,
    error::{ErrorKind, Failure},
};

/// Errors of finding and using a GPU.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GpuError {
    /// No GPU can be used.
    #[error("no GPU can be used: {why}")]
    Unusable {
        /// The reason.
        why: String,
    },
    /// The requested device does not exist.
    #[error("there is no GPU {ordinal}: {}", found(*.count))]
    NoSuchDevice {
        /// Its number, from 0.
        ordinal: usize,
        /// The number of devices.
        count: usize,
    },
    /// A driver call failed.
    #[error("GPU {ordinal}: {doing}: {code}")]
    Driver {
        /// The device.
        ordinal: usize,
        /// The operation.
        doing: &'static str,
        /// The driver's name of the error.
        code: String,
    },
    /// A kernel failed; the device cannot be used any more in this process.
    #[error("GPU {ordinal}: kernel `{kernel}`, or one started before it, failed: {code}")]
    Kernel {
        /// The device.
        ordinal: usize,
        /// The last kernel that was started.
        kernel: &'static str,
        /// The driver's name of the error.
        code: String,
    },
    /// Not enough device memory, even for the smallest piece of the work.
    #[error("GPU {ordinal}: {what} needs {needed} bytes of device memory, {available} are available")]
    OutOfMemory {
        /// The device.
        ordinal: usize,
        /// The purpose of the memory.
        what: &'static str,
        /// The required bytes.
        needed: u64,
        /// The bytes that are free, or that the operation may use.
        available: u64,
    },
    /// The device's result differs from the CPU's.
    #[error("GPU {ordinal}: kernel `{kernel}` gave a wrong result: row {row} of {n_rows}, {why}")]
    WrongResult {
        /// The device.
        ordinal: usize,
        /// The kernel.
        kernel: &'static str,
        /// The row within the block.
        row: u64,
        /// Number of rows of that block.
        n_rows: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// cuBLASLt, which only training needs, was not found.
    #[error("cuBLASLt ({names}) was not found; searched: {}", .searched.join(", "))]
    NoLibrary {
        /// The file names that were searched.
        names: String,
        /// Every location, with the loader's message if there was a file.
        searched: Vec<String>,
    },
    /// A library was found that cannot be used.
    #[error("`{}` cannot be used: {why}", .path.display())]
    BadLibrary {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// A call of cuBLASLt failed.
    #[error("GPU {ordinal}: cuBLASLt {version}: {doing}: {code}")]
    Library {
        /// The device.
        ordinal: usize,
        /// The library's version.
        version: String,
        /// The operation; for a product its shape and dtype.
        doing: String,
        /// The library's name of the error.
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

/// An unusable GPU is a usage error; a failing one is an I/O error.
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
    fn an_error_keeps_its_message_and_fields_in_lower_layers() {
        let error = GpuError::NoSuchDevice { ordinal: 3, count: 1 };
        let below = ChooseError::from(error.clone());
        assert_eq!(below.to_string(), "there is no GPU 3: only GPU 0 was found");
        let ChooseError::Accelerator(below) = below else { panic!("{below:?}") };
        assert_eq!(below.downcast_ref(), Some(&error));
    }
}
