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
mod syscalls;

#[path = "../support/world.rs"]
#[allow(dead_code, reason = "shared by tests that need different parts of it")]
mod world;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use world::World;

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

/// A change in place: its arguments behind the checkpoint's path, and what was merged before.
struct Scenario {
    name: &'static str,
    merged_before: &'static [usize],
    merged_after: &'static [usize],
}

const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "first merge", merged_before: &[], merged_after: &[0] },
    Scenario { name: "second merge", merged_before: &[1], merged_after: &[1, 3] },
    Scenario { name: "unmerge one", merged_before: &[0, 1], merged_after: &[1] },
    Scenario { name: "unmerge all", merged_before: &[0, 2], merged_after: &[] },
];

impl Scenario {
    /// The command line that makes this change at `path`.
    fn arguments(&self, world: &World, path: &Path) -> Vec<String> {
        let path = path.display().to_string();
        let added: Vec<usize> = self.merged_after.iter().copied().filter(|i| !self.merged_before.contains(i)).collect();
        let removed: Vec<usize> =
            self.merged_before.iter().copied().filter(|i| !self.merged_after.contains(i)).collect();
        let mut arguments =
            vec![if added.is_empty() { "unmerge" } else { "merge" }.to_owned(), path, "--in-place".to_owned()];
        for i in added {
            let input = world.input(i);
            let scale = input.scale.map_or(String::new(), |scale| format!("={scale}"));
            arguments.extend(["--adapter".to_owned(), format!("{}{scale}", input.adapter.display())]);
        }
        for i in removed {
            arguments.extend(["--adapter".to_owned(), world.ids[i].to_string()]);
        }
        arguments
    }

    /// A checkpoint in the state before the change, at `path`.
    fn prepare(&self, world: &World, path: &Path) {
        copy_tree(&world.base(), path);
        self.merge(world, path, self.merged_before);
    }

    fn merge(&self, world: &World, path: &Path, which: &[usize]) {
        if which.is_empty() {
            return;
        }
        let scenario = Scenario { name: self.name, merged_before: &[], merged_after: &[] };
        let mut arguments = vec!["merge".to_owned(), path.display().to_string(), "--in-place".to_owned()];
        for &i in which {
            let one = world.input(i);
            let scale = one.scale.map_or(String::new(), |scale| format!("={scale}"));
            arguments.extend(["--adapter".to_owned(), format!("{}{scale}", one.adapter.display())]);
        }
        let output = run(&arguments);
        assert!(output.status.success(), "{}: {}", scenario.name, String::from_utf8_lossy(&output.stderr));
    }

    /// The shards before and after the change.
    fn states(&self, world: &World) -> [Shards; 2] {
        [self.merged_before, self.merged_after].map(|which| {
            let path = world.at("state");
            copy_tree(&world.base(), &path);
            self.merge(world, &path, which);
            let state = shards(&path);
            fs::remove_dir_all(&path).unwrap();
            state
        })
    }
}

/// The bytes of every shard, by name.
type Shards = BTreeMap<PathBuf, Vec<u8>>;

fn shards(folder: &Path) -> Shards {
    world::tree(folder)
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "safetensors") && path.components().count() == 1)
        .collect()
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (path, bytes) in world::tree(from) {
        let target = to.join(&path);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
}

/// After whatever happened to `path`: recovery ends well, the shards are those of one state, and the ledger is that state's.
/// Returns which state it is.
fn check_recovers(path: &Path, states: &[Shards; 2], merged: [&[usize]; 2], what: &str) -> usize {
    let arguments = |command: &str| vec![command.to_owned(), path.display().to_string()];
    let output = run(&arguments("recover"));
    assert!(output.status.success(), "{what}: recover: {}", String::from_utf8_lossy(&output.stderr));
    let found = shards(path);
    let state = states.iter().position(|state| *state == found);
    let state =
        state.unwrap_or_else(|| panic!("{what}: the shards are neither those before nor those after the change"));
    let has_ledger = path.join(".neuroada/ledger").exists();
    if merged[state].is_empty() {
        let output = run(&arguments("unmerge").into_iter().chain(["--in-place".to_owned()]).collect::<Vec<_>>());
        assert!(!has_ledger || output.status.success() || output.status.code() == Some(4), "{what}: nothing is merged");
    } else {
        assert!(has_ledger, "{what}: the ledger of state {state} is there");
        let output = run(&arguments("verify"));
        assert!(output.status.success(), "{what}: verify: {}", String::from_utf8_lossy(&output.stdout));
    }
    state
}
