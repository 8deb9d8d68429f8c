//! Queries to the driver before a device is opened.

use cudarc::driver::{
    result,
    sys::{self, CUdevice_attribute_enum as Attribute},
};

use super::code_of;

/// Every driver function that may be called; all exist in CUDA 12.0 or older.
const SYMBOLS: [&str; 36] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
];

/// Whether the driver's library can be loaded.
pub(super) fn has_driver() -> bool {
    // SAFETY: loads libcuda, whose initializers may run at any time.
    unsafe { sys::is_culib_present() }
}

/// The functions of [`SYMBOLS`] that the driver lacks; the driver must exist. Calling a missing one would panic.
pub(super) fn missing_symbols() -> Vec<&'static str> {
    // SAFETY: the library was just loaded, and is never unloaded; symbols are looked up, not called.
    let is_missing = |name: &&str| unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_err() };
    SYMBOLS.into_iter().filter(is_missing).collect()
}

/// The driver's CUDA version: 12040 is 12.4.
pub(super) fn driver_version() -> Result<i32, String> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(code_of)?;
    Ok(version)
}

/// Initializes the driver; returns the number of devices.
pub(super) fn init() -> Result<usize, String> {
    result::init().map_err(code_of)?;
    Ok(result::device::get_count().map_err(code_of)?.try_into().unwrap_or(0))
}

/// A device's name, compute capability and bytes of memory.
pub(super) fn device_facts(ordinal: usize) -> Result<(String, (i32, i32), u64), String> {
    let device = result::device::get(ordinal as i32).map_err(code_of)?;
    // SAFETY: the device was just returned by the driver; each call writes one number.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map_err(code_of);
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let n_bytes = unsafe { result::device::total_mem(device) }.map_err(code_of)?;
    Ok((result::device::get_name(device).map_err(code_of)?, (major, minor), n_bytes as u64))
}
