//! A device in use.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule, DriverError},
    nvrtc::Ptx,
};

use super::{
    code_of,
    detect::{Detection, detect},
    ptx::ptx_of,
};
use crate::gpu::GpuError;

/// Sticky errors of asynchronous work, by the driver's names; they persist for the rest of the process.
const STICKY: [&str; 10] = [
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
];

/// A device that is ready for use. Cheap to clone.
#[derive(Clone)]
pub struct Gpu {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    ordinal: usize,
    name: String,
    pub(super) context: Arc<CudaContext>,
    /// Compiled by the driver on first use.
    modules: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    /// The last kernel that was started, or an empty name: asynchronous failures are attributed to it.
    kernel: Mutex<&'static str>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GPU {} ({})", self.inner.ordinal, self.inner.name)
    }
}

impl Gpu {
    /// Opens a device.
    ///
    /// # Errors
    /// [`GpuError::Unusable`] states why none can be used, [`GpuError::NoSuchDevice`] how many there are.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        let Detection { devices, problem, .. } = detect();
        let Some(device) = devices.get(ordinal) else {
            return Err(match problem {
                Some(why) => GpuError::Unusable { why },
                None => GpuError::NoSuchDevice { ordinal, count: devices.len() },
            });
        };
        if let Some(why) = &device.problem {
            return Err(GpuError::Unusable { why: format!("GPU {ordinal} ({}): {why}", device.name) });
        }
        let failed = |error| GpuError::Driver { ordinal, doing: "opening it", code: code_of(error) };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let (modules, functions, kernel) = Default::default();
        Ok(Self { inner: Arc::new(Inner { ordinal, name: device.name.clone(), context, modules, functions, kernel }) })
    }

    /// Its number, from 0.
    pub fn ordinal(&self) -> usize {
        self.inner.ordinal
    }
    /// Its product name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Free and total device memory in bytes.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn memory(&self) -> Result<(u64, u64), GpuError> {
        let (free, total) = self.inner.context.mem_get_info().map_err(|e| self.failed("querying its memory", e))?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn failed(&self, doing: &'static str, error: DriverError) -> GpuError {
        let (ordinal, code) = (self.inner.ordinal, code_of(error));
        // After work has failed, every call returns that error.
        let is_of_work = STICKY.contains(&code.as_str());
        match self.last_kernel() {
            kernel if is_of_work && !kernel.is_empty() => GpuError::Kernel { ordinal, kernel, code },
            _ => GpuError::Driver { ordinal, doing, code },
        }
    }

    /// The last kernel that was started, or an empty name.
    pub(in crate::gpu) fn last_kernel(&self) -> &'static str {
        *self.inner.kernel.lock().expect("no thread panics while holding the lock")
    }

    pub(super) fn record_kernel(&self, kernel: &'static str) {
        *self.inner.kernel.lock().expect("no thread panics while holding the lock") = kernel;
    }

    /// Binds this thread's calls to the device.
    pub(super) fn bind(&self) -> Result<(), GpuError> {
        self.inner.context.bind_to_thread().map_err(|e| self.failed("binding a thread to it", e))
    }

    pub(super) fn function(&self, file: &'static str, name: &'static str) -> Result<CudaFunction, GpuError> {
        let mut functions = self.inner.functions.lock().expect("no thread panics while holding the lock");
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let mut modules = self.inner.modules.lock().expect("no thread panics while holding the lock");
        let module = match modules.get(file) {
            Some(module) => Arc::clone(module),
            None => {
                let loaded = self.inner.context.load_module(Ptx::from_src(ptx_of(file)));
                let module = loaded.map_err(|e| self.failed("compiling kernels for it", e))?;
                modules.insert(file, Arc::clone(&module));
                module
            }
        };
        let function = module.load_function(name).map_err(|e| self.failed("finding a kernel", e))?;
        functions.insert(name, function.clone());
        Ok(function)
    }
}
