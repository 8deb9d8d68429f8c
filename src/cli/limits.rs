//! Limits that a container or a batch system sets on the process: the defaults of `--threads` and `--max-memory` stay within them.
//!
//! CPU quotas of control groups and CPU affinity are part of [`std::thread::available_parallelism`]. Memory limits of control groups
//! (version 2 `memory.max`, version 1 `memory.limit_in_bytes`) and the variables of Slurm are read here.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

/// Limits of version 1 that stand for "no limit" are close to 2^63.
const NO_LIMIT: u64 = 1 << 62;

/// Limits on this process; `None` for no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Limits {
    /// CPUs of the Slurm task, if they are fewer than those the system reports.
    pub(super) threads: Option<usize>,
    /// Bytes of memory.
    pub(super) memory: Option<u64>,
}

impl Limits {
    /// Reads the limits of this process.
    pub(super) fn of_process() -> Self {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::read(Path::new("/"), cores, |name| std::env::var(name).ok())
    }

    /// Reads the limits below the folder `root`, which holds `proc` and `sys`; `variable` returns environment variables.
    fn read(root: &Path, cores: usize, variable: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok().filter(|n| *n > 0);
        let slurm_cpus = number("SLURM_CPUS_PER_TASK");
        let per_node = variable("SLURM_MEM_PER_NODE").and_then(|text| slurm_bytes(&text));
        let per_cpu = variable("SLURM_MEM_PER_CPU").and_then(|text| slurm_bytes(&text));
        let of_cpus = per_cpu.map(|bytes| bytes.saturating_mul(slurm_cpus.unwrap_or(1) as u64));
        let memory = [memory_of_cgroup(root), per_node, of_cpus].into_iter().flatten().min();
        Self { threads: slurm_cpus.filter(|cpus| *cpus < cores), memory }
    }
}

/// Slurm's megabytes, or a number with a unit; 0 stands for all memory.
fn slurm_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let shift = match text[digits..].to_ascii_uppercase().as_str() {
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    let number: u64 = text[..digits].parse().ok()?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

/// The smallest memory limit of the process's control group and those above it.
fn memory_of_cgroup(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            names if names.split(',').any(|name| name == "memory") => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        let mount = root.join(mount);
        // In a container the path may be the host's, while the container's own group is the root of the mount.
        let group: PathBuf = mount.join(path.trim_start_matches('/'));
        for folder in group.ancestors().take_while(|folder| folder.starts_with(&mount)) {
            let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
            limits.extend(text.trim().parse::<u64>().ok().filter(|bytes| *bytes < NO_LIMIT));
        }
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(files: &[(&str, &str)], variables: &[(&str, &str)]) -> Limits {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Limits::read(root.path(), 16, variable)
    }

    #[test]
    fn the_smallest_limit_of_a_control_group_and_its_parents_holds() {
        let group = ("proc/self/cgroup", "0::/job/step\n");
        let inner = ("sys/fs/cgroup/job/step/memory.max", "max\n");
        let outer = ("sys/fs/cgroup/job/memory.max", "536870912\n");
        assert_eq!(limits(&[group, inner, outer], &[]).memory, Some(512 << 20));
        assert_eq!(limits(&[group, inner], &[]).memory, None);
        let own = ("sys/fs/cgroup/memory.max", "1073741824\n");
        assert_eq!(limits(&[("proc/self/cgroup", "0::/\n"), own], &[]).memory, Some(1 << 30));
        assert_eq!(limits(&[], &[]), Limits::default());
    }

    #[test]
    fn version_1_has_a_controller_of_its_own() {
        let groups = ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/a\n");
        let limit = |bytes: &'static str| ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", bytes);
        assert_eq!(limits(&[groups, limit("268435456\n")], &[]).memory, Some(256 << 20));
        assert_eq!(limits(&[groups, limit("9223372036854771712\n")], &[]).memory, None);
    }

    #[test]
    fn slurm_sets_cpus_and_memory_of_a_task() {
        let slurm = limits(&[], &[("SLURM_CPUS_PER_TASK", "4"), ("SLURM_MEM_PER_NODE", "2048")]);
        assert_eq!(slurm, Limits { threads: Some(4), memory: Some(2 << 30) });
        let per_cpu = limits(&[], &[("SLURM_CPUS_PER_TASK", "4"), ("SLURM_MEM_PER_CPU", "1G")]);
        assert_eq!(per_cpu.memory, Some(4 << 30));
        // More CPUs than the machine has; 0 for all memory; text that is not a number.
        let odd = limits(&[], &[("SLURM_CPUS_PER_TASK", "64"), ("SLURM_MEM_PER_NODE", "0")]);
        assert_eq!(odd, Limits::default());
        assert_eq!(limits(&[], &[("SLURM_MEM_PER_NODE", "lots")]).memory, None);
    }
}
