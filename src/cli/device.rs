//! `--device`: the device of the work, and the report on devices.
//!
//! `auto` is the CPU for now: a GPU will be the default for work that it was measured to speed up, and no GPU has been measured yet.

use serde::Serialize;

use super::{
    gpu::{self, Found, GpuFacts, LibraryFacts},
    page::{Align, Page, Table, bytes},
};

/// The device of the work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Device {
    Auto,
    Cpu,
    /// A GPU, by number.
    Cuda(usize),
}

/// Reads `auto`, `cpu`, `cuda` or `cuda:1`.
pub(super) fn parse_device(text: &str) -> Result<Device, String> {
    let ordinal = match text {
        "auto" => return Ok(Device::Auto),
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
    };
    match ordinal {
        None => Err("expected auto, cpu, cuda or cuda:N".to_owned()),
        Some(_) if !gpu::IS_SUPPORTED => Err("this build has no GPU support; use auto or cpu".to_owned()),
        Some(ordinal) => Ok(Device::Cuda(ordinal)),
    }
}

/// The devices of the machine, with the fields of the JSON document of `inspect --devices`.
#[derive(Serialize)]
pub(super) struct DevicesReport {
    cpu: CpuFacts,
    /// The CUDA version that the NVIDIA driver supports.
    driver: Option<String>,
    gpus: Vec<GpuFacts>,
    /// Why no GPU can be used.
    problem: Option<String>,
    /// The library of matrix products for training and evaluation, if there is a driver.
    cublaslt: Option<LibraryFacts>,
}

#[derive(Serialize)]
struct CpuFacts {
    n_threads: usize,
    instruction_set: &'static str,
}

/// Detects the devices.
pub(super) fn devices() -> DevicesReport {
    let cpu = CpuFacts { n_threads: rayon::current_num_threads(), instruction_set: crate::backend::instruction_set() };
    let Found { driver, gpus, problem, cublaslt } = gpu::found();
    DevicesReport { cpu, driver, gpus, problem, cublaslt }
}

/// Prints the report as text.
pub(super) fn print(report: &DevicesReport, page: &mut Page) {
    let DevicesReport { cpu, driver, gpus, problem, cublaslt } = report;
    let mut facts = vec![("cpu", format!("{} threads, {}", cpu.n_threads, cpu.instruction_set))];
    facts.extend(driver.as_ref().map(|version| ("NVIDIA driver", format!("for CUDA {version}"))));
    facts.extend(problem.as_ref().map(|why| ("no GPU can be used", why.clone())));
    if let Some(LibraryFacts { version, path, problem, looked }) = cublaslt {
        let found = version.iter().zip(path).map(|(version, path)| ("cuBLASLt", format!("{version}, {path}")));
        facts.extend(found);
        facts.extend(problem.iter().map(|why| ("no cuBLASLt", format!("needed by train and eval only; {why}"))));
        facts.extend(looked.iter().map(|place| ("", format!("in {place}"))));
    }
    page.facts(&facts);
    page.blank();
    let mut table = Table::headless([Align::Left, Align::Left, Align::Left, Align::Right, Align::Left]);
    for gpu in gpus {
        let capability = format!("compute capability {}", gpu.compute_capability);
        let usable = gpu.problem.clone().unwrap_or_else(|| "can be used".to_owned());
        table.row([gpu.device.clone(), gpu.name.clone(), capability, bytes(gpu.n_bytes), usable]);
    }
    page.table(table);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!(parse_device("auto"), Ok(Device::Auto));
        assert_eq!(parse_device("cpu"), Ok(Device::Cpu));
        for bad in ["cudb", "cuda:", "cuda:-1", "cuda1", "gpu"] {
            assert!(parse_device(bad).unwrap_err().starts_with("expected auto"), "{bad}");
        }
        match gpu::IS_SUPPORTED {
            true => {
                assert_eq!((parse_device("cuda"), parse_device("cuda:1")), (Ok(Device::Cuda(0)), Ok(Device::Cuda(1))));
            }
            false => assert!(parse_device("cuda:1").unwrap_err().contains("no GPU support")),
        }
    }
}
