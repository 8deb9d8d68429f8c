//! Whole commands on a checkpoint with a real model's shape, compared with the limits of the machine.
//!
//! `cargo bench --bench jobs -- [--shape 135m|1b|8b|70b] [--dir DIR] [--runs N] [--max-memory SIZE] [--cold]
//! [--only TEXT] [--results DIR]`
//!
//! The checkpoint is created under DIR (`target/bench` by default) and kept for later runs; results go to a folder
//! next to it, or under `--results`, and are removed. Every job runs N times, alternating with its limit. Medians are
//! printed: seconds, bytes of weights per second, the fraction of the preceding limit run, and peak resident memory.
//! `--cold` evicts the checkpoint from the page cache before every run; `--only` runs only the jobs whose names
//! contain TEXT. Results and the machine: README.md in the parent folder.

mod limits;
mod synthetic;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use synthetic::{SHAPES, Shape};

struct Options {
    shape: Shape,
    dir: PathBuf,
    runs: usize,
    max_memory: String,
    cold: bool,
    only: String,
    results: Option<PathBuf>,
}

fn options() -> Options {
    let mut options = Options {
        shape: SHAPES[0],
        dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench"),
        runs: 5,
        max_memory: "256M".to_owned(),
        cold: false,
        only: String::new(),
        results: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} takes a value"));
        match argument.as_str() {
            "--shape" => {
                let name = value();
                let known = SHAPES.iter().find(|shape| shape.name == name);
                options.shape = *known.unwrap_or_else(|| panic!("no shape {name}"));
            }
            "--dir" => options.dir = value().into(),
            "--runs" => options.runs = value().parse().expect("--runs takes a number"),
            "--max-memory" => options.max_memory = value(),
            "--cold" => options.cold = true,
            "--only" => options.only = value(),
            "--results" => options.results = Some(value().into()),
            // Passed by Cargo.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// The cost of one run of a command.
struct Run {
    time: Duration,
    peak_mib: u64,
}

/// Runs the command with `-v`, which prints the peak memory.
fn run(options: &Options, arguments: &[&str]) -> Run {
    let began = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_neuroada-ckpt"))
        .args(arguments)
        .args(["-v", "--max-memory", &options.max_memory])
        .output()
        .expect("the command starts");
    let time = began.elapsed();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    let peak = stderr.lines().find_map(|line| line.strip_suffix(" MiB of memory at the peak"));
    Run { time, peak_mib: peak.map_or(0, |mib| mib.parse().expect("a number")) }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Measures `job`, which reads `n_bytes`, alternating with its limit in bytes per second, after `prepare`, and prints
/// a line.
fn measure(
    options: &Options,
    name: &str,
    n_bytes: u64,
    mut prepare: impl FnMut(),
    mut limit: impl FnMut() -> Option<f64>,
    mut job: impl FnMut() -> Run,
) {
    if !name.contains(&options.only) {
        return;
    }
    let (mut limits, mut times, mut shares, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..options.runs {
        prepare();
        let limit = limit();
        prepare();
        let run = job();
        let time = run.time.as_secs_f64();
        times.push(time);
        limits.extend(limit);
        // The speed of a machine varies: a run is compared with the limit measured just before it.
        shares.extend(limit.map(|limit| 100.0 * n_bytes as f64 / time / limit));
        peak = peak.max(run.peak_mib);
    }
    let seconds = median(times);
    let speed = n_bytes as f64 / seconds / 1e9;
    let (limit, share) = match limits.is_empty() {
        true => ("-".to_owned(), "-".to_owned()),
        false => (format!("{:.2}", median(limits) / 1e9), format!("{:.0} %", median(shares))),
    };
    println!("{name:<28} {seconds:>8.3} {speed:>8.2} {limit:>8} {share:>7} {peak:>6}");
}

fn main() {
    let options = options();
    let base = options.dir.join(options.shape.name);
    options.shape.write(&base).expect("the checkpoint can be written");
    let work = options.results.as_ref().unwrap_or(&options.dir).join("work");
    let remove = |path: &Path| match path.is_dir() {
        true => fs::remove_dir_all(path).expect("output can be removed"),
        false => drop(fs::remove_file(path)),
    };
    remove(&work);
    fs::create_dir_all(&work).expect("a folder can be made");
    let at = |name: &str| work.join(name).display().to_string();
    let base_path = base.display().to_string();
    let n_bytes: u64 = fs::read_dir(&base)
        .expect("the checkpoint is a folder")
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .map(|meta| meta.len())
        .sum();
    let target_bytes = limits::target_bytes(&base);
    let per_second = |time: Duration| n_bytes as f64 / time.as_secs_f64();
    println!(
        "{} shape, {:.2} GB, {} cores, {}, --max-memory {}",
        options.shape.name,
        n_bytes as f64 / 1e9,
        rayon::current_num_threads(),
        if options.cold { "cold" } else { "warm" },
        options.max_memory
    );
    println!("{:<28} {:>8} {:>8} {:>8} {:>7} {:>6}", "job", "s", "GB/s", "limit", "share", "MiB");

    let prepare = || if options.cold { limits::chill(&base) } else { limits::warm(&base) };
    let read = || match options.cold {
        true => limits::read_direct(&base).map(per_second),
        false => Some(per_second(limits::read_mapped(&base))),
    };
    let mask = at("mask.safetensors");
    for (name, extra) in [
        ("mask --k 256", &["--k", "256"][..]),
        ("mask --k 20", &["--k", "20"]),
        ("mask --k 1 --hash", &["--k", "1", "--hash"]),
        ("mask --budget 0.02% global", &["--budget", "0.02%", "--scope", "global"]),
        ("mask --k 1", &["--k", "1"]),
    ] {
        let arguments = [&["mask", &base_path, "-o", &mask, "--force"], extra].concat();
        measure(&options, name, target_bytes, prepare, read, || run(&options, &arguments));
    }
    let adapter = at("adapter.safetensors");
    run(&options, &["mask", &base_path, "--k", "1", "-o", &mask, "--force"]);
    run(&options, &["init", &base_path, "--mask", &mask, "-o", &adapter]);
    measure(&options, "diff with itself", 2 * n_bytes, prepare, read, || {
        run(&options, &["diff", &base_path, &base_path])
    });

    let (copy, merged) = (work.join("copy"), work.join("merged"));
    let merged_path = merged.display().to_string();
    let cp = || {
        remove(&copy);
        let began = Instant::now();
        let status = Command::new("cp").arg("-r").arg(&base).arg(&copy).status();
        let time = began.elapsed();
        // Writes pending from one job must not affect the next measurement.
        remove(&copy);
        status.is_ok_and(|status| status.success()).then(|| per_second(time))
    };
    measure(&options, "merge -o (limit: cp -r)", n_bytes, prepare, cp, || {
        remove(&merged);
        run(&options, &["merge", &base_path, "--adapter", &adapter, "-o", &merged_path])
    });
    let needs_merged = ["verify --base", "unmerge --in-place", "merge --in-place"];
    if !merged.exists() && needs_merged.iter().any(|name| name.contains(&options.only)) {
        run(&options, &["merge", &base_path, "--adapter", &adapter, "-o", &merged_path]);
    }
    measure(
        &options,
        "verify --base",
        2 * n_bytes,
        prepare,
        || None,
        || run(&options, &["verify", &merged_path, "--base", &base_path]),
    );
    measure(
        &options,
        "unmerge --in-place",
        n_bytes,
        || run_quietly(&options, &adapter, &merged_path),
        || None,
        || run(&options, &["unmerge", &merged_path, "--in-place"]),
    );
    measure(
        &options,
        "merge --in-place",
        n_bytes,
        || unmerge_quietly(&options, &merged_path),
        || None,
        || run(&options, &["merge", &merged_path, "--adapter", &adapter, "--in-place"]),
    );
    remove(&work);
}

/// Merges in place unless already merged.
fn run_quietly(options: &Options, adapter: &str, merged: &str) {
    if !Path::new(merged).join(".neuroada/ledger").exists() {
        run(options, &["merge", merged, "--adapter", adapter, "--in-place"]);
    }
}

/// Unmerges.
fn unmerge_quietly(options: &Options, merged: &str) {
    if Path::new(merged).join(".neuroada/ledger").exists() {
        run(options, &["unmerge", merged, "--in-place"]);
    }
}
