//! Every system call that writes fails once, in every way.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use super::{
    cycles, program,
    scenarios::{self, N_KINDS, SPARSE, Scenario, shards},
    skipped, works,
};
use crate::world::{World, tree};

/// What fails, and how.
const FAULTS: [(&str, &[&str]); 7] = [
    ("pwrite64", &["error=ENOSPC", "error=EIO", "error=EINTR"]),
    ("write", &["error=ENOSPC", "error=EIO", "error=EINTR"]),
    ("fsync", &["error=EIO", "error=ENOSPC"]),
    ("fdatasync", &["error=EIO"]),
    ("rename,renameat2", &["error=EIO", "error=ENOSPC"]),
    ("mkdir", &["error=ENOSPC"]),
    ("unlink", &["error=EIO"]),
];

/// Runs a command with a fault at the n-th call; its exit code and whether it said that its work is done, or `None` where there is no n-th
/// call.
fn run_with(arguments: &[String], calls: &str, fault: &str, n: u64, log: &Path) -> Option<(Option<i32>, bool)> {
    let output = Command::new("strace")
        .args(["-f", "-qq", "-o", &log.display().to_string(), "-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:{fault}:when={n}")])
        .arg(program())
        .args(["--threads", "1", "-q"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .unwrap();
    let is_done = String::from_utf8_lossy(&output.stderr).contains("the work is done");
    let happened = fs::read_to_string(log).unwrap().contains("(INJECTED)");
    happened.then(|| (output.status.code(), is_done))
}

/// The n-th calls to try: all up to `most`, then ever wider steps.
fn when(most: u64) -> impl Iterator<Item = u64> {
    let step = move |n: &u64| Some(if *n < most { n + 1 } else { n + n / 2 });
    std::iter::successors(Some(1), step).take_while(|n| *n < 100_000)
}

#[test]
fn a_failing_call_in_place_is_told_and_leaves_old_or_new() {
    fail_calls_in_place(World::new, &SPARSE[1..3]);
}

#[test]

fn a_failing_call_in_place_of_lora_is_told_and_leaves_old_or_new() {
    // A merge that keeps originals, and one taken out with the help of the base.
    let all = scenarios::lora();
    fail_calls_in_place(scenarios::world_with_lora, &[all[0], all[6]]);
}

fn fail_calls_in_place(world: impl Fn() -> World, scenarios: &[Scenario]) {
    if !works("strace", &["-qq", "-o", "/dev/null", "true"]) {
        return skipped("strace cannot trace here");
    }
    let world = world();
    let log = world.at("strace.log");
    let (mut n_faults, mut n_undone) = (0, 0);
    // All of them in a full run; else each kind of change tries its share.
    let share = if cycles(0) == 0 { N_KINDS as usize } else { 1 };
    for (i, scenario) in scenarios.iter().enumerate() {
        let states = scenario.states(&world);
        let path = world.at("work");
        scenario.prepare(&world, &path);
        let faults = FAULTS.iter().flat_map(|(calls, faults)| faults.iter().map(move |fault| (*calls, *fault)));
        for (calls, fault) in faults.skip(i % share).step_by(share) {
            for n in when(cycles(4)) {
                let Some((code, is_done)) = run_with(&scenario.arguments(&world, &path), calls, fault, n, &log) else {
                    // Undisturbed, it did its work.
                    fs::remove_dir_all(&path).unwrap();
                    scenario.prepare(&world, &path);
                    break;
                };
                n_faults += 1;
                let what = format!("{}: {calls} {n} {fault}, exit {code:?}", scenario.name);
                let state = |name: &str| path.join(".neuroada").join(name).exists();
                let interrupted = state("txn") || state("ledger.new");
                assert!(interrupted || code != Some(6), "{what}: nothing waits for recovery");
                let state = scenario.check_recovers(&world, &path, &states, &what);
                match code {
                    Some(0) => assert_eq!(state, 1, "{what}: it said that it was done"),
                    Some(5) => assert_eq!(state, usize::from(is_done), "{what}: it said the contrary"),
                    // Interrupted: either, and recovery found out which.
                    Some(6) => {}
                    other => panic!("{what}: {other:?}"),
                }
                if state == 0 {
                    n_undone += 1;
                } else {
                    fs::remove_dir_all(&path).unwrap();
                    scenario.prepare(&world, &path);
                }
            }
        }
        fs::remove_dir_all(&path).unwrap();
    }
    eprintln!("{n_faults} failing calls in place, {n_undone} of them undone");
    assert!(n_faults > 40 / share && n_undone > 20 / share, "{n_faults} {n_undone}");
}

#[test]
fn a_failing_call_out_of_place_leaves_no_output() {
    if !works("strace", &["-qq", "-o", "/dev/null", "true"]) {
        return skipped("strace cannot trace here");
    }
    let world = World::new();
    let (out, log) = (world.at("out"), world.at("strace.log"));
    fs::write(&log, "").unwrap();
    let expected = shards(&{
        let path = world.at("expected");
        let mut arguments = SPARSE[0].arguments(&world, &world.base());
        arguments[2] = format!("--output={}", path.display());
        assert!(super::run(&arguments).status.success());
        path
    });
    let mut arguments = SPARSE[0].arguments(&world, &world.base());
    arguments[2] = format!("--output={}", out.display());
    let before: Vec<_> =
        tree(world.dir.path()).into_iter().filter(|(path, _)| path != Path::new("strace.log")).collect();
    let mut n_faults = 0;
    for (calls, faults) in FAULTS.into_iter().chain([("copy_file_range", &["error=ENOSPC", "error=EXDEV"][..])]) {
        for fault in faults {
            for n in when(cycles(4)) {
                let Some((code, _)) = run_with(&arguments, calls, fault, n, &log) else {
                    // Undisturbed, it did its work.
                    fs::remove_dir_all(&out).unwrap();
                    break;
                };
                n_faults += 1;
                let what = format!("{calls} {n} {fault}, exit {code:?}");
                if code == Some(0) {
                    assert_eq!(shards(&out), expected, "{what}");
                    fs::remove_dir_all(&out).unwrap();
                    continue;
                }
                assert_eq!(code, Some(5), "{what}");
                if out.exists() {
                    // All of it is there; what failed came after.
                    assert_eq!(shards(&out), expected, "{what}");
                    fs::remove_dir_all(&out).unwrap();
                }
                let left: Vec<_> =
                    tree(world.dir.path()).into_iter().filter(|(path, _)| path != Path::new("strace.log")).collect();
                // A failing unlink leaves what it should have removed, under a temporary name.
                let is_clean = left == before || calls == "unlink";
                let names: Vec<_> =
                    left.iter().map(|(path, _)| path).filter(|path| !before.iter().any(|(b, _)| b == *path)).collect();
                assert!(is_clean, "{what}: left behind {names:?}");
            }
        }
    }
    eprintln!("{n_faults} failing calls out of place");
    assert!(n_faults > 30, "{n_faults}");
}
