//! Global options, and what is made of them: what every command is given.

use std::{
    cell::Cell,
    io::{self, Write},
    thread,
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    device::{Device, parse_device},
    failure::{CliError, CliResult, Hint},
    gpu::Gpu,
    page::Page,
    progress::Progress,
};
use crate::{
    backend::{LowRankMerger, RowChooser},
    checkpoint::{Context, InUse, Io, MIN_MEMORY},
};

/// Where `--max-memory` is not given.
const DEFAULT_MEMORY: u64 = 1 << 30;
/// Memory of a GPU that streams of rows stay within.
const GPU_MEMORY: u64 = 1 << 30;

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct GlobalArgs {
    /// Threads to use [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Resident memory to stay within, mapped pages and I/O buffers counted [default: 1G; for models, what they need]
    ///
    /// A number of bytes, or one with a unit: 256M, 4G, 1GiB. Units are powers of 1024.
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,
    /// How tensors are read
    #[arg(long, global = true, value_enum, default_value_t = IoChoice::Auto)]
    io: IoChoice,
    /// Where the work is done: auto, cpu, cuda or cuda:N
    ///
    /// Where they are asked for a GPU, `mask` chooses and `merge` adds LoRA adapters on it, with the same bytes for a result, and `train`
    /// and `eval` work there. All else is done on the CPU, and so is everything with auto. `inspect --devices` tells what there is.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Memory of the GPU to stay within [default: 1G; for models, what is free]
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    gpu_memory: Option<u64>,
    /// Print the report as one JSON document; an error too
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Print nothing but errors, and what --json asks for
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Also say on stderr how the work is done and how fast it went
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum IoChoice {
    /// What is in memory is mapped, the rest read past the page cache
    Auto,
    /// Files are mapped, in windows
    #[value(name = "mmap", alias = "mapped")]
    Mapped,
    /// Files are read past the page cache
    Direct,
    /// Files are read through the page cache
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
    let bytes = number.checked_mul(1 << shift).ok_or("that is more than 2^64 bytes")?;
    if bytes < MIN_MEMORY {
        return Err(format!("at least {}M are needed", MIN_MEMORY >> 20));
    }
    Ok(bytes)
}

/// What a command is given beside its own arguments.
pub(super) struct Env {
    args: GlobalArgs,
    progress: Progress,
    /// Whether the command had a use for a GPU.
    asked_for_gpu: Cell<bool>,
    /// What the command line names and is there.
    _inputs: Vec<InUse>,
}

impl Env {
    /// Starts the threads, and listens to Ctrl-C from here on. What `inputs` hold is registered as read, so that no output touches it.
    pub(super) fn new(args: GlobalArgs, inputs: Vec<InUse>) -> CliResult<Self> {
        let progress = Progress::new(args.quiet, args.verbose)?;
        let mut pool = rayon::ThreadPoolBuilder::new();
        if let Some(threads) = args.threads {
            pool = pool.num_threads(usize::from(threads));
        }
        pool.build_global().map_err(|e| CliError::from(io::Error::other(e)).context("cannot start threads"))?;
        let env = Self { args, progress, asked_for_gpu: Cell::new(false), _inputs: inputs };
        env.detail(&format!(
            "{} threads, {} MiB of memory, {} cores",
            rayon::current_num_threads(),
            env.max_memory() >> 20,
            thread::available_parallelism().map_or(1, std::num::NonZero::get),
        ));
        Ok(env)
    }

    /// Bytes of resident memory to stay within.
    fn max_memory(&self) -> u64 {
        self.args.max_memory.unwrap_or(DEFAULT_MEMORY)
    }

    /// `--max-memory` where it was given.
    #[cfg(feature = "train")]
    pub(super) fn given_memory(&self) -> Option<u64> {
        self.args.max_memory
    }

    /// What library functions are given.
    pub(super) fn context(&self) -> Context<'_> {
        let io = match self.args.io {
            IoChoice::Auto => Io::Auto,
            IoChoice::Mapped => Io::Mapped,
            IoChoice::Direct => Io::Direct,
            IoChoice::Read => Io::Read,
        };
        Context { max_memory: self.max_memory(), io, observer: &self.progress }
    }

    /// The GPU that was asked for.
    pub(super) fn gpu(&self) -> CliResult<Option<Gpu>> {
        self.asked_for_gpu.set(true);
        let Device::Cuda(ordinal) = self.args.device else { return Ok(None) };
        Ok(Some(Gpu::open(ordinal).hint("--device cpu does the same without one")?))
    }

    /// Bytes of `gpu`'s memory that a model may take.
    #[cfg(feature = "train")]
    pub(super) fn memory_of(&self, gpu: &Gpu) -> CliResult<u64> {
        let free = gpu.free_bytes()?;
        Ok(self.args.gpu_memory.map_or(free, |most| most.min(free)))
    }

    /// The same for what streams through it, and bytes of its memory to stay within.
    fn streaming_gpu(&self) -> CliResult<Option<(Gpu, u64)>> {
        let Some(gpu) = self.gpu()? else { return Ok(None) };
        let gpu_memory = self.args.gpu_memory.unwrap_or(GPU_MEMORY);
        self.detail(&format!("{gpu:?}, {} MiB of its memory", gpu_memory >> 20));
        Ok(Some((gpu, gpu_memory)))
    }

    /// Who chooses, where a GPU was asked for; `check` is the share of rows that are chosen again on the CPU.
    pub(super) fn gpu_chooser(&self, check: f64) -> CliResult<Option<Box<dyn RowChooser>>> {
        let Some((gpu, gpu_memory)) = self.streaming_gpu()? else { return Ok(None) };
        // Windows and results take up to half of the memory.
        let pinned_bytes = self.max_memory() / 8;
        Ok(Some(gpu.chooser(gpu_memory, pinned_bytes, check)))
    }

    /// Who merges low-rank products, where a GPU was asked for.
    pub(super) fn gpu_merger(&self) -> CliResult<Option<Box<dyn LowRankMerger>>> {
        let Some((gpu, gpu_memory)) = self.streaming_gpu()? else { return Ok(None) };
        Ok(Some(gpu.merger(gpu_memory)))
    }

    /// Prints the report of work that is done: where it cannot be written, the error says so.
    pub(super) fn report_work<R: Serialize>(&self, report: &R, text: impl FnOnce(&R, &mut Page)) -> CliResult<()> {
        self.report(report, text)
            .map_err(|e| e.context("the work is done, but its report could not be written").after_work())
    }

    /// Prints a command's report: as JSON with `--json`, else what `text` makes of it.
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
        self.print(page.to_string().as_bytes())
    }

    /// Writes `bytes` to stdout, whatever `-q` says. A reader who left early is no failure.
    pub(super) fn print(&self, bytes: &[u8]) -> CliResult<()> {
        self.progress.clear();
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::from(e).context("cannot write to stdout")),
            _ => Ok(()),
        }
    }

    /// Tells something beside the report, on stderr; silent with `-q`.
    pub(super) fn note(&self, words: &str) {
        if !self.args.quiet {
            self.progress.tell(words);
        }
    }

    /// Tells what the work took, at the end.
    pub(super) fn farewell(&self) {
        self.progress.clear();
        if matches!(self.args.device, Device::Cuda(_)) && !self.asked_for_gpu.get() {
            self.note("note: this command does all its work on the CPU");
        }
        if let Some(peak) = peak_memory().filter(|_| self.args.verbose) {
            self.detail(&format!("{} MiB of memory at the peak", peak >> 20));
        }
    }

    /// Tells how the work is done, on stderr, with `-v`.
    pub(super) fn detail(&self, words: &str) {
        if self.args.verbose {
            self.progress.tell(words);
        }
    }
}

/// The most resident memory that this process has had, in bytes, where the system tells.
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
