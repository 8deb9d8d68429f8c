//! What must never go wrong: power loss, kills, failing system calls, full disks, other people's files.
//!
//! Every test runs the built binary on real files. What a machine cannot do (no root, no loop devices, no strace) is skipped
//! with the reason on stderr. The counts are small enough for every run; `NEUROADA_FAULT_CYCLES=2000 cargo test --release
//! --test faults` runs the full ones.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod commands;
mod disk;
mod kill;
mod power_loss;
mod scenarios;
mod syscalls;

#[path = "../support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

/// How often a random experiment is repeated: `small` times, or as often as the full run asks for.
fn cycles(small: u64) -> u64 {
    std::env::var("NEUROADA_FAULT_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(small)
}

/// Says why a test is not run here.
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

/// Whether a command exists and ends well.
fn works(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Runs a program that must end well.
fn must(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The binary under test, one thread so that system calls come in one order.
fn program() -> &'static str {
    env!("CARGO_BIN_EXE_neuroada-ckpt")
}

fn run(arguments: &[String]) -> Output {
    Command::new(program()).args(["--threads", "1", "-q"]).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (path, bytes) in world::tree(from) {
        let target = to.join(&path);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
}
