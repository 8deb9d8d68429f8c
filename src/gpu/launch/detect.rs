//! What GPUs the machine has, and why one cannot be used.

use super::driver;

/// The least compute capability that the kernels run on.
const MIN_CAPABILITY: (i32, i32) = (8, 0);
/// The oldest driver that reads the kernels (PTX ISA 8.0), as the driver counts: 12.0.
const MIN_DRIVER: i32 = 12_000;

/// A device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Its maker's name for it.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (i32, i32),
    /// Memory in all.
    pub n_bytes: u64,
    /// Why it cannot be used, or `None`.
    pub problem: Option<String>,
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Detection {
    /// The CUDA version that the driver speaks, such as `12.4`, or `None` where there is no driver.
    pub driver: Option<String>,
    /// All devices.
    pub devices: Vec<DeviceInfo>,
    /// Why none of them can be used, or `None` where one can.
    pub problem: Option<String>,
}

/// Looks for a driver and its devices.
///
/// Never fails and never panics: a missing driver, a driver without a device and one too old are answers, not errors. Creates no
/// context, so that no device memory is taken.
pub fn detect() -> Detection {
    let mut found = Detection::default();
    match look(&mut found) {
        Err(why) => found.problem = Some(why),
        Ok(()) if found.devices.iter().all(|device| device.problem.is_some()) => {
            let why = found.devices.first().and_then(|device| device.problem.clone());
            found.problem = Some(why.unwrap_or_else(|| "the driver found no device".to_owned()));
        }
        Ok(()) => {}
    }
    found
}

fn look(found: &mut Detection) -> Result<(), String> {
    if !driver::has_driver() {
        return Err("there is no NVIDIA driver (libcuda.so.1 was not found)".to_owned());
    }
    let missing = driver::missing_symbols();
    if let Some(first) = missing.first() {
        let n = missing.len();
        return Err(format!(
            "the driver lacks {first} ({n} of the functions needed): one for CUDA 12.0 or newer is needed"
        ));
    }
    let version = driver::driver_version().map_err(|code| format!("the driver does not tell its version: {code}"))?;
    let spoken = format!("{}.{}", version / 1000, version % 1000 / 10);
    found.driver = Some(spoken.clone());
    if version < MIN_DRIVER {
        return Err(format!("the driver speaks CUDA {spoken}; 12.0 (driver 525) or newer is needed"));
    }
    let n = driver::init().map_err(|code| match code.as_str() {
        "CUDA_ERROR_NO_DEVICE" => "the driver found no device".to_owned(),
        code => format!("the driver does not start: {code}"),
    })?;
    for ordinal in 0..n {
        let facts = driver::device_facts(ordinal).map_err(|code| format!("GPU {ordinal} does not answer: {code}"))?;
        let (name, capability, n_bytes) = facts;
        let problem = (capability < MIN_CAPABILITY).then(|| {
            let ((major, minor), (least, _)) = (capability, MIN_CAPABILITY);
            format!("compute capability {major}.{minor}; {least}.0 (Ampere) or newer is needed")
        });
        found.devices.push(DeviceInfo { ordinal, name, capability, n_bytes, problem });
    }
    Ok(())
}
