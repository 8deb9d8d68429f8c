//! The disk at the moment the power fails: what was synced is there, of the rest a random part.
//!
//! The checkpoint lies on an ext4 file system in a file. The command is killed at a random system call; then a random
//! subset of the pages it wrote is forced to disk; then the file system's image is copied as it is at that moment, and
//! the copy mounted, as after a power loss: ext4 replays its journal, and what was not synced is gone.

use std::{
    fs,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{
    cycles, is_root, must, program, run,
    scenarios::{self, N_KINDS, SPARSE, Scenario, Shards, shards},
    skipped, works,
};
use crate::world::{Random, World, tree};

/// `O_DSYNC` of Linux on all its common machines.
const O_DSYNC: i32 = 0o10000;
const PAGE: u64 = 4096;

/// Calls at which the command is killed.
const CALLS: [&str; 8] = ["pwrite64", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "openat"];

fn missing() -> Option<&'static str> {
    if !is_root() {
        Some("mounting needs root")
    } else if !works("strace", &["-qq", "-o", "/dev/null", "true"]) {
        Some("strace cannot trace here")
    } else if !works("mkfs.ext4", &["-V"]) {
        Some("mkfs.ext4 is not installed")
    } else {
        None
    }
}

/// An ext4 file system in a file, unmounted when dropped.
struct Image {
    file: PathBuf,
    mount: PathBuf,
}

impl Image {
    /// `None` where loop devices cannot be mounted here.
    fn mount(file: &Path, mount: &Path) -> Option<Self> {
        fs::create_dir_all(mount).unwrap();
        let (from, to) = (file.display().to_string(), mount.display().to_string());
        works("mount", &["-o", "loop", &from, &to]).then(|| Self { file: file.to_owned(), mount: mount.to_owned() })
    }
    fn make(file: &Path) {
        fs::write(file, []).unwrap();
        fs::File::options().write(true).open(file).unwrap().set_len(24 << 20).unwrap();
        must("mkfs.ext4", &["-q", "-b", "4096", &file.display().to_string()]);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        must("umount", &[&self.mount.display().to_string()]);
    }
}

/// Runs the command under strace and kills it at the n-th call named `call`; whether it was killed.
fn run_and_kill(arguments: &[String], call: &str, n: u64) -> bool {
    let status = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={n}")])
        .arg(program())
        .args(["--threads", "1", "-q"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    !status.success()
}

/// How often a command makes each call of [`CALLS`].
fn count_calls(arguments: &[String], log: &Path) -> [u64; CALLS.len()] {
    let status = Command::new("strace")
        .args(["-f", "-qq", "-o", &log.display().to_string(), "-e", &format!("trace={}", CALLS.join(","))])
        .arg(program())
        .args(["--threads", "1", "-q"])
        .args(arguments)
        .status()
        .unwrap();
    assert!(status.success());
    let log = fs::read_to_string(log).unwrap();
    CALLS.map(|call| log.lines().filter(|line| line.contains(&format!(" {call}("))).count() as u64)
}

/// Forces a random subset of the pages of every file below `folder` to disk, page by page.
fn tear(folder: &Path, random: &mut Random) {
    let share = random.below(101);
    for path in tree(folder).into_keys() {
        let path = folder.join(path);
        let Ok(file) = fs::File::options().read(true).write(true).custom_flags(O_DSYNC).open(&path) else { continue };
        let n_bytes = file.metadata().unwrap().len();
        let mut page = vec![0; PAGE as usize];
        for at in (0..n_bytes).step_by(PAGE as usize) {
            if random.below(100) < share {
                let n = PAGE.min(n_bytes - at) as usize;
                file.read_exact_at(&mut page[..n], at).unwrap();
                file.write_all_at(&page[..n], at).unwrap();
            }
        }
    }
}

/// One crash; what the shards were after recovery, and whether they were a mixture before it.
fn crash(
    world: &World,
    scenario: &Scenario,
    prepared: &Path,
    counts: &[u64; CALLS.len()],
    states: &[Shards; 2],
    random: &mut Random,
) -> (Option<usize>, bool) {
    let (work, crashed) = (world.at("work.img"), world.at("crashed.img"));
    fs::copy(prepared, &work).unwrap();
    let call = loop {
        // Writes to the shards are where a mixture comes from: every second crash is there.
        let i = if random.below(2) == 0 { 0 } else { random.below(CALLS.len() as u64) as usize };
        if counts[i] > 0 {
            break i;
        }
    };
    let n = 1 + random.below(counts[call]);
    let what = format!("{} killed at {} {n}", scenario.name, CALLS[call]);
    {
        let image = Image::mount(&work, &world.at("mnt")).unwrap();
        let path = image.mount.join("ckpt");
        run_and_kill(&scenario.arguments(world, &path), CALLS[call], n);
        tear(&path, random);
        fs::copy(&image.file, &crashed).unwrap();
    }
    let image = Image::mount(&crashed, &world.at("mnt")).unwrap();
    let path = image.mount.join("ckpt");
    let is_mixture = !states.contains(&shards(&path));
    // Recovery is interrupted too, one time in four.
    if random.below(4) == 0 {
        let recover = scenario.recover_line(world, &path);
        run_and_kill(&recover, ["pwrite64", "fdatasync", "unlink"][random.below(3) as usize], 1 + random.below(20));
    }
    let state = scenario.check_recovers(world, &path, states, &what);
    // And the next change works.
    let output = run(&scenario.recover_line(world, &path));
    assert!(output.status.success(), "{what}");
    (Some(state), is_mixture)
}

#[test]
fn power_loss_leaves_the_old_bytes_or_the_new_ones() {
    lose_power(World::new, &SPARSE);
}

#[test]

fn power_loss_in_a_change_of_lora_leaves_the_old_bytes_or_the_new_ones() {
    lose_power(scenarios::world_with_lora, &scenarios::lora());
}

fn lose_power(world: impl Fn() -> World, scenarios: &[Scenario]) {
    if let Some(why) = missing() {
        return skipped(why);
    }
    let world = world();
    let prepared = world.at("prepared.img");
    Image::make(&prepared);
    match Image::mount(&prepared, &world.at("mnt")) {
        Some(image) => drop(image),
        None => return skipped("loop devices cannot be mounted here"),
    }
    let n_cycles = cycles(48) / N_KINDS / scenarios.len() as u64;
    let (mut n_mixtures, mut outcomes) = (0, [0u64; 2]);
    for scenario in scenarios {
        Image::make(&prepared);
        {
            let image = Image::mount(&prepared, &world.at("mnt")).unwrap();
            scenario.prepare(&world, &image.mount.join("ckpt"));
        }
        let states = scenario.states(&world);
        let rehearsal = world.at("rehearsal");
        scenario.prepare(&world, &rehearsal);
        let counts = count_calls(&scenario.arguments(&world, &rehearsal), &world.at("strace.log"));
        fs::remove_dir_all(&rehearsal).unwrap();
        let mut random = Random(scenario.name.len() as u64);
        for _ in 0..n_cycles {
            let (state, is_mixture) = crash(&world, scenario, &prepared, &counts, &states, &mut random);
            outcomes[state.unwrap()] += 1;
            n_mixtures += u64::from(is_mixture);
        }
    }
    let n = outcomes[0] + outcomes[1];
    eprintln!(
        "{n} crashes: {} old, {} new, 0 others; without the journal {n_mixtures} would be corrupt",
        outcomes[0], outcomes[1]
    );
    // The control: had nothing been recovered from the journal, some of these would be neither old nor new.
    assert!(n_mixtures > 0, "the harness tears writes, or it proves nothing");
    assert!(outcomes[0] > 0, "some crashes come before the commit");
}
