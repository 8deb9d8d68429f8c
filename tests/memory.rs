//! Commands stay within `--max-memory`, as measured by the system: mapped pages, buffers and everything else.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

const MIB: u64 = 1 << 20;
/// The allowed memory above the limit, without headers.
const SLACK: u64 = 32 * MIB;

/// A checkpoint of zero BF16 matrices, as a sparse file: no data is written.
fn zeros(folder: &Path, matrices: &[(&str, u64, u64)]) -> PathBuf {
    fs::create_dir(folder).unwrap();
    let (mut at, mut entries) = (0, Vec::new());
    for (name, n_rows, d_in) in matrices {
        let end = at + 2 * n_rows * d_in;
        entries.push(format!(r#""{name}":{{"dtype":"BF16","shape":[{n_rows},{d_in}],"data_offsets":[{at},{end}]}}"#));
        at = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + at).unwrap();
    folder.to_owned()
}

/// Runs a command on two threads; returns its exit code, its stderr and, if reported, its peak memory.
fn run(limit: &str, io: &str, args: &[&str]) -> (Option<i32>, String, Option<u64>) {
    let output = Command::new(env!("CARGO_BIN_EXE_neuroada-ckpt"))
        .args(args)
        .args(["-v", "--threads", "2", "--max-memory", limit, "--io", io])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let peak = stderr.lines().find_map(|line| line.strip_suffix(" MiB of memory at the peak"));
    (output.status.code(), stderr.clone(), peak.map(|peak| peak.parse::<u64>().unwrap() * MIB))
}

/// Runs a command that must succeed within its limit.
fn run_within(limit_mib: u64, io: &str, args: &[&str]) {
    let (code, stderr, peak) = run(&format!("{limit_mib}M"), io, args);
    assert_eq!(code, Some(0), "{args:?} {io}: {stderr}");
    let peak = peak.expect("-v reports the peak");
    assert!(peak <= limit_mib * MIB + SLACK, "{} at --max-memory {limit_mib}M, --io {io}: {} MiB", args[0], peak / MIB);
}

/// An adapter of ones on column 0 of every row.
fn adapter_of(base: &Path, folder: &Path, matrices: &[(&str, u64, u64)]) -> PathBuf {
    let (mask, values, adapter) = (folder.join("mask"), folder.join("values"), folder.join("adapter"));
    let [base, mask_text, values_text, adapter_text] =
        [base, &mask, &values, &adapter].map(|path| path.to_str().unwrap());
    run_within(256, "auto", &["mask", base, "--targets", "*", "--k", "1", "-o", mask_text]);
    let (mut at, mut entries, mut data) = (0, Vec::new(), Vec::new());
    for (name, n_rows, _) in matrices {
        let end = at + 4 * n_rows;
        entries.push(format!(r#""{name}.values":{{"dtype":"F32","shape":[{n_rows},1],"data_offsets":[{at},{end}]}}"#));
        (0..*n_rows).for_each(|_| data.extend(1f32.to_le_bytes()));
        at = end;
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = File::create(&values).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&data).unwrap();
    run_within(256, "auto", &["init", base, "--mask", mask_text, "--values", values_text, "-o", adapter_text]);
    adapter
}

/// Matrices of 61 MB.
const MATRICES: [(&str, u64, u64); 4] =
    [("a.weight", 15_000, 2048), ("b.weight", 15_000, 2048), ("c.weight", 15_000, 2048), ("d.weight", 15_000, 2048)];
/// Rows of 9 MiB.
const LONG_ROWS: [(&str, u64, u64); 1] = [("long.weight", 24, 9 << 19)];

#[test]
fn direct_reads_and_cold_files_stay_within_the_limit() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = zeros(&dir.path().join("base"), &MATRICES);
    let other = zeros(&dir.path().join("other"), &MATRICES);
    let [base, other] = [&base, &other].map(|path| path.to_str().unwrap());
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    for limit in [16, 64] {
        for io in ["direct", "auto", "read"] {
            run_within(limit, io, &["diff", base, other]);
            run_within(limit, io, &["mask", base, "--targets", "*", "--k", "1", "--hash", "-o", out, "--force"]);
        }
    }
}

#[test]
fn very_long_rows_stay_within_the_limit() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = zeros(&dir.path().join("base"), &LONG_ROWS);
    let adapter = adapter_of(&base, dir.path(), &LONG_ROWS);
    let merged = dir.path().join("merged");
    let [base, adapter, merged] = [&base, &adapter, &merged].map(|path| path.to_str().unwrap());
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    for io in ["direct", "auto"] {
        run_within(64, io, &["mask", base, "--targets", "*", "--k", "1", "-o", out, "--force"]);
        run_within(64, io, &["merge", base, "--adapter", adapter, "-o", merged, "--force"]);
        run_within(64, io, &["verify", merged, "--base", base]);
    }
}

#[test]
fn a_limit_too_small_for_a_row_reports_the_required_one() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = zeros(&dir.path().join("base"), &LONG_ROWS);
    let out = dir.path().join("out");
    let [base, out_text] = [&base, &out].map(|path| path.to_str().unwrap());
    let args = ["mask", base, "--targets", "*", "--k", "1", "-o", out_text];
    let (code, stderr, _) = run("16M", "auto", &args);
    assert_eq!(code, Some(4), "{stderr}");
    assert!(stderr.contains("a memory limit of 16777216 bytes is too small for this operation"), "{stderr}");
    assert!(!out.exists(), "nothing was written");
    let needed =
        stderr.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).expect("the message has a number");
    let (code, stderr, _) = run(&format!("{needed}M"), "auto", &args);
    assert_eq!(code, Some(0), "with the required limit: {stderr}");
}
