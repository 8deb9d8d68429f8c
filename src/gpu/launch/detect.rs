//! Detects the machine's GPUs, and why one cannot be used.

use super::driver;

/// The minimum compute capability of the kernels.
const MIN_CAPABILITY: (i32, i32) = (8, 0);
/// The oldest driver version that supports the kernels (PTX ISA 8.0), in the driver's notation: 12.0.
const MIN_DRIVER: i32 = 12_000;

/// A device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (i32, i32),
    /// Total memory in bytes.
    pub n_bytes: u64,
    /// Why it cannot be used; `None` if it can.
    pub problem: Option<String>,
}

/// The result of the detection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Detection {
    /// The driver's CUDA version, such as `12.4`; `None` if there is no driver.
    pub driver: Option<String>,
    /// All devices.
    pub devices: Vec<DeviceInfo>,
    /// Why none of the devices can be used; `None` if one can.
    pub problem: Option<String>,
}

/// Detects the driver and its devices.
///
/// Never fails or panics: a missing driver, a driver without devices and an old driver are results, not errors.
/// Creates no context, so it takes no device memory.
pub fn detect() -> Detection {
    let mut found = Detection::default();
    match examine_devices(&mut found) {
        Err(why) => found.problem = Some(why),
        Ok(()) if found.devices.iter().all(|device| device.problem.is_some()) => {
            let why = found.devices.first().and_then(|device| device.problem.clone());
            found.problem = Some(why.unwrap_or_else(|| "the driver found no device".to_owned()));
        }
        Ok(()) => {}
    }
    found
}

fn examine_devices(found: &mut Detection) -> Result<(), String> {
    if !driver::has_driver() {
        return Err("there is no NVIDIA driver (libcuda.so.1 was not found)".to_owned());
    }
    let missing = driver::missing_symbols();
    if let Some(first) = missing.first() {
        let n = missing.len();
        return Err(format!("the driver lacks {first} ({n} of the required functions): expected CUDA 12.0 or newer"));
    }
    let version = driver::driver_version().map_err(|code| format!("cannot query the driver's version: {code}"))?;
    let spoken = format!("{}.{}", version / 1000, version % 1000 / 10);
    found.driver = Some(spoken.clone());
    if version < MIN_DRIVER {
        return Err(format!("the driver supports CUDA {spoken}; expected 12.0 (driver 525) or newer"));
    }
    let n = driver::init().map_err(|code| match code.as_str() {
        "CUDA_ERROR_NO_DEVICE" => "the driver found no device".to_owned(),
        code => format!("the driver cannot be initialized: {code}"),
    })?;
    for ordinal in 0..n {
        let facts = driver::device_facts(ordinal).map_err(|code| format!("cannot query GPU {ordinal}: {code}"))?;
        let (name, capability, n_bytes) = facts;
        let problem = (capability < MIN_CAPABILITY).then(|| {
            let ((major, minor), (min_major, _)) = (capability, MIN_CAPABILITY);
            format!("compute capability {major}.{minor}; expected {min_major}.0 (Ampere) or newer")
        });
        found.devices.push(DeviceInfo { ordinal, name, capability, n_bytes, problem });
    }
    Ok(())
}
