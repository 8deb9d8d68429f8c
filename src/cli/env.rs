//! Global options, and the environment that they set up for a command.

use std::{
    cell::Cell,
    io::{self, IsTerminal, Write},
    thread,
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    color::ColorChoice,
    device::{Device, parse_device},
    failure::{CliError, CliResult, Hint},
    gpu::Gpu,
    limits::Limits,
    page::{Layout, MAX_WIDTH, MIN_WIDTH, Page},
    progress::Progress,
};
use crate::{
    backend::{LowRankMerger, RowChooser},
    checkpoint::{Context, InUse, Io, MIN_MEMORY},
};

/// The default of `--max-memory`.
const DEFAULT_MEMORY: u64 = 1 << 30;
/// The default of `--gpu-memory` for work that streams rows.
const GPU_MEMORY: u64 = 1 << 30;

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct GlobalArgs {
    /// Number of threads [default: all cores, or the CPU limit of the container or Slurm task]
    #[arg(long, global = true, value_name = "N", env = "NEUROADA_THREADS", hide_env_values = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Limit of resident memory, mapped pages and I/O buffers included [default: 1G; train and eval: as much as they need]
    ///
    /// A number of bytes, or a number with a unit: 256M, 4G, 1GiB. Units are powers of 1024. In a container or a Slurm job the default is
    /// at most half of the memory limit.
    #[arg(long, global = true, value_name = "SIZE", env = "NEUROADA_MAX_MEMORY", hide_env_values = true, value_parser = parse_size)]
    max_memory: Option<u64>,
    /// Method of reading tensors
    #[arg(long, global = true, value_enum, default_value_t = IoChoice::Auto)]
    io: IoChoice,
    /// Device: auto, cpu, cuda or cuda:N
    ///
    /// On a GPU, `mask` chooses connections and `merge` adds LoRA adapters, with the same bytes as on the CPU, and `train` and `eval` run
    /// the model. All other work runs on the CPU, and with auto everything does. `inspect --devices` lists the devices.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Limit of GPU memory [default: 1G; train and eval: all free memory]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    gpu_memory: Option<u64>,
    /// Color of messages and titles
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t = ColorChoice::Auto)]
    pub(super) color: ColorChoice,
    /// Print the report as one JSON document, errors too
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Print only errors, and the document of --json
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Print more on stderr: how the work is done, its speed and memory, and long lists in full
    #[arg(short, long, global = true)]
    pub(super) verbose: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum IoChoice {
    /// Cached files are mapped, others are read with direct I/O
    Auto,
    /// Memory-mapped windows
    #[value(name = "mmap", alias = "mapped")]
    Mapped,
    /// Direct I/O, past the page cache
    Direct,
    /// Ordinary reads, through the page cache
    Read,
}

/// Reads a size such as `256M`; units are powers of 1024, with or without `B` or `iB`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("expected a size such as 256M, 4G or 1073741824".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a size such as 256M, 4G or 1073741824".to_owned())?;
    let bytes = number.checked_mul(1 << shift).ok_or("more than 2^64 bytes")?;
    if bytes < MIN_MEMORY {
        return Err(format!("the minimum is {}M", MIN_MEMORY >> 20));
    }
    Ok(bytes)
}

/// The environment of a command: global options, progress, inputs.
pub(super) struct Env {
    args: GlobalArgs,
    progress: Progress,
    /// Limits of the container or the batch job.
    limits: Limits,
    /// Whether the command can use a GPU.
    asked_for_gpu: Cell<bool>,
    /// Existing paths that the command line names.
    _inputs: Vec<InUse>,
}

impl Env {
    /// Starts the threads and installs the signal handlers. `inputs` stay registered as in use, so that no output touches them.
    pub(super) fn new(args: GlobalArgs, inputs: Vec<InUse>) -> CliResult<Self> {
        let progress = Progress::new(args.quiet, args.verbose, args.color)?;
        let limits = Limits::of_process();
        let mut pool = rayon::ThreadPoolBuilder::new();
        if let Some(threads) = args.threads.map(usize::from).or(limits.threads) {
            pool = pool.num_threads(threads);
        }
        pool.build_global().map_err(|e| CliError::from(io::Error::other(e)).context("cannot start threads"))?;
        let env = Self { args, progress, limits, asked_for_gpu: Cell::new(false), _inputs: inputs };
        env.detail(&format!(
            "{} threads, {} MiB of memory, {} cores",
            rayon::current_num_threads(),
            env.max_memory() >> 20,
            thread::available_parallelism().map_or(1, std::num::NonZero::get),
        ));
        Ok(env)
    }

    /// Limit of resident memory, in bytes.
    fn max_memory(&self) -> u64 {
        let default =
            || self.limits.memory.map_or(DEFAULT_MEMORY, |limit| (limit / 2).clamp(MIN_MEMORY, DEFAULT_MEMORY));
        self.args.max_memory.unwrap_or_else(default)
    }

    /// `--max-memory` or its environment variable, if either is set.
    #[cfg(feature = "train")]
    pub(super) fn given_memory(&self) -> Option<u64> {
        self.args.max_memory
    }

    /// The memory limit of the container or the batch job, in bytes.
    #[cfg(feature = "train")]
    pub(super) fn job_memory(&self) -> Option<u64> {
        self.limits.memory
    }

    /// The progress bar.
    #[cfg(feature = "train")]
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The context for library functions.
    pub(super) fn context(&self) -> Context<'_> {
        let io = match self.args.io {
            IoChoice::Auto => Io::Auto,
            IoChoice::Mapped => Io::Mapped,
            IoChoice::Direct => Io::Direct,
            IoChoice::Read => Io::Read,
        };
        Context { max_memory: self.max_memory(), io, observer: &self.progress }
    }

    /// The GPU that `--device` names.
    pub(super) fn gpu(&self) -> CliResult<Option<Gpu>> {
        self.asked_for_gpu.set(true);
        let Device::Cuda(ordinal) = self.args.device else { return Ok(None) };
        Ok(Some(Gpu::open(ordinal).hint("--device cpu does the same work on the CPU")?))
    }

    /// Bytes of `gpu`'s memory that a model may use.
    #[cfg(feature = "train")]
    pub(super) fn memory_of(&self, gpu: &Gpu) -> CliResult<u64> {
        let free = gpu.free_bytes()?;
        Ok(self.args.gpu_memory.map_or(free, |most| most.min(free)))
    }

    /// The GPU for work that streams rows through it, and its memory limit in bytes.
    fn streaming_gpu(&self) -> CliResult<Option<(Gpu, u64)>> {
        let Some(gpu) = self.gpu()? else { return Ok(None) };
        let gpu_memory = self.args.gpu_memory.unwrap_or(GPU_MEMORY);
        self.detail(&format!("{gpu:?}, {} MiB of its memory", gpu_memory >> 20));
        Ok(Some((gpu, gpu_memory)))
    }

    /// The row chooser on the GPU that `--device` names; `check` is the share of rows that the CPU chooses again for comparison.
    pub(super) fn gpu_chooser(&self, check: f64) -> CliResult<Option<Box<dyn RowChooser>>> {
        let Some((gpu, gpu_memory)) = self.streaming_gpu()? else { return Ok(None) };
        // Windows and results take up to half of the memory.
        let pinned_bytes = self.max_memory() / 8;
        Ok(Some(gpu.chooser(gpu_memory, pinned_bytes, check)))
    }

    /// The merger of low-rank products on the GPU that `--device` names.
    pub(super) fn gpu_merger(&self) -> CliResult<Option<Box<dyn LowRankMerger>>> {
        let Some((gpu, gpu_memory)) = self.streaming_gpu()? else { return Ok(None) };
        Ok(Some(gpu.merger(gpu_memory)))
    }

    /// Prints the report of finished work; an error while printing says that the work is done.
    pub(super) fn report_work<R: Serialize>(&self, report: &R, text: impl FnOnce(&R, &mut Page)) -> CliResult<()> {
        self.report(report, text)
            .map_err(|e| e.context("the work is done, but its report cannot be written").after_work())
    }

    /// Prints a command's report: as JSON with `--json`, else as the text that `text` writes.
    pub(super) fn report<R: Serialize>(&self, report: &R, text: impl FnOnce(&R, &mut Page)) -> CliResult<()> {
        if self.args.json {
            let mut json = serde_json::to_vec_pretty(report).map_err(io::Error::from)?;
            json.push(b'\n');
            return self.print(&json);
        }
        if self.args.quiet {
            return Ok(());
        }
        let mut page = Page::default();
        text(report, &mut page);
        let is_terminal = io::stdout().is_terminal();
        let layout = Layout { width: width(is_terminal), is_colored: self.args.color.applies_to(is_terminal) };
        self.print(page.render(layout).as_bytes())
    }

    /// Writes `bytes` to stdout, even with `-q`. A closed pipe is not an error.
    pub(super) fn print(&self, bytes: &[u8]) -> CliResult<()> {
        self.progress.clear();
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::from(e).context("cannot write to stdout")),
            _ => Ok(()),
        }
    }

    /// Prints a note on stderr; not with `-q`.
    pub(super) fn note(&self, message: &str) {
        if !self.args.quiet {
            self.progress.print(message);
        }
    }

    /// Reports the resources that the work took, at its end.
    pub(super) fn farewell(&self) {
        self.progress.clear();
        if matches!(self.args.device, Device::Cuda(_)) && !self.asked_for_gpu.get() {
            self.note("note: this command does all of its work on the CPU");
        }
        if let Some(peak) = peak_memory().filter(|_| self.args.verbose) {
            self.detail(&format!("{} MiB of memory at the peak", peak >> 20));
        }
    }

    /// Prints a detail of the work on stderr, with `-v`.
    pub(super) fn detail(&self, message: &str) {
        if self.args.verbose {
            self.progress.print(message);
        }
    }
}

/// The width of a page: that of COLUMNS or of the terminal; `None` without either.
fn width(is_terminal: bool) -> Option<usize> {
    let of_terminal = || {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| is_terminal)?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    };
    let set = std::env::var("COLUMNS").ok().and_then(|text| text.trim().parse().ok());
    set.or_else(of_terminal).map(|columns: usize| columns.clamp(MIN_WIDTH, MAX_WIDTH))
}

/// The peak of this process's resident memory, in bytes, if the system reports it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        assert_eq!(parse_size("20000 kb"), Ok(20000 << 10));
        assert_eq!(parse_size("1073741824"), Ok(1 << 30));
        for bad in ["", "G", "-1G", "1.5G", "1X", "99999999999T", "1M", "0"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
